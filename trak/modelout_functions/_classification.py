"""Multi-class classification: images and text, one margin an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._types import Batch, Weights
from trak.errors import BatchError
from trak.modelout_functions._abstract import AbstractModelOutput
from trak.modelout_functions._calls import (
    ModelCall,
    as_batch,
    call_for_logits,
    split_labels,
)
from trak.modelout_functions._margins import (
    check_class_labels,
    check_logits,
    check_positive,
    log_odds,
)
from trak.modelout_functions._texts import check_problem, check_texts, explain

_TEXT_INPUTS = {
    2: ("input_ids",),
    3: ("input_ids", "attention_mask"),
    4: ("input_ids", "token_type_ids", "attention_mask"),
}


class _SoftmaxModelOutput(AbstractModelOutput):
    """Margins and out-to-loss of a softmax; a batch is taken apart as of images."""

    # Best or next to it on two image data sets, of those that were tried.
    exponents = (0.25, 0.5)

    def __init__(self, temperature: float = 1.0) -> None:
        check_positive("temperature", temperature)
        self.loss_temperature = temperature

    @staticmethod
    def _split(batch: Batch) -> ModelCall:
        """Take the labels out of a batch."""
        return _split_image(batch)

    @staticmethod
    def _logits(
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        call: ModelCall,
    ) -> Float[Tensor, "b k"]:
        """Call the model; give its logits, and labels that fit them."""
        return _checked_logits(model, weights, buffers, call)

    def get_outputs(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, " b"]:
        """Compute the margins of a batch, after checking its labels.

        Returns:
            The margins, differentiable. Shape ``(b,)``.
        """
        call = self._split(batch)
        return log_odds(self._logits(model, weights, buffers, call), call.labels)

    def get_out_to_loss_grad(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, "b 1"]:
        """Compute one minus the probability of the correct class.

        Returns:
            ``1 - p`` at the loss temperature, detached. Shape ``(b, 1)``.
        """
        call = self._split(batch)
        with torch.no_grad():
            logits = self._logits(model, weights, buffers, call)
            # 1 - p without the subtraction, which is 0 once p rounds to 1.
            margins = log_odds(logits / self.loss_temperature, call.labels)
            return torch.sigmoid(-margins).unsqueeze(1)


class ImageClassificationModelOutput(_SoftmaxModelOutput):
    r"""The margin of the correct class of an image.

    :math:`f = \log p / (1 - p)` and :math:`Q = 1 - p`, for the softmax probability
    :math:`p` of the correct class (Park et al., 2023, Section 3.3). Batches are tuples
    ``(images, labels)``, or mappings whose key ``labels`` or ``label`` is not passed to
    the model. Half-precision logits are widened to float32 first.

    Args:
        temperature: Divides the logits in ``Q``; the margin does not depend on it.

    Attributes:
        loss_temperature: The constructor's ``temperature``.

    Raises:
        OptionError: If ``temperature`` is not positive and finite.
    """

    @staticmethod
    def get_output(
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        image: Tensor | Mapping[str, Any],
        label: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Compute the margin of one image.

        Args:
            model: The model.
            weights: Its parameters by name, or None for those it holds.
            buffers: Its buffers by name.
            image: One image without batch axis, or a mapping with image and label.
            label: Its class, shape ``()``; None where ``image`` is a mapping.

        Returns:
            The margin. Shape ``()``.
        """
        example = (image,) if label is None else (image, label)
        return _margin(model, weights, buffers, _split_image(as_batch(example)))


class IterativeImageClassificationModelOutput(_SoftmaxModelOutput):
    """The margin of the correct class, for gradient computers that loop over a batch.

    As :class:`ImageClassificationModelOutput`, but :meth:`get_output` takes a whole
    batch and returns one margin an example.

    Args:
        temperature: Divides the logits in ``Q``; the margin does not depend on it.

    Attributes:
        loss_temperature: The constructor's ``temperature``.

    Raises:
        OptionError: If ``temperature`` is not positive and finite.
    """

    @staticmethod
    def get_output(
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        images: Tensor | Mapping[str, Any],
        labels: Tensor | None = None,
    ) -> Float[Tensor, " b"]:
        """Compute the margins of a batch of images, after checking its labels.

        Args:
            model: The model.
            weights: Its parameters by name, or None for those it holds.
            buffers: Its buffers by name.
            images: The images, shape ``(b, ...)``, or a mapping with images and labels.
            labels: Their classes, shape ``(b,)``; None where ``images`` is a mapping.

        Returns:
            The margins, differentiable. Shape ``(b,)``.
        """
        call = _split_image(images if labels is None else (images, labels))
        return log_odds(_checked_logits(model, weights, buffers, call), call.labels)


class TextClassificationModelOutput(_SoftmaxModelOutput):
    """The margin of the correct class of a text.

    As :class:`ImageClassificationModelOutput`, for models called by keyword. Batches
    are mappings (a tokenizer's output with a key ``labels`` or ``label``, which is not
    passed to the model), or tuples ``(input_ids, token_type_ids, attention_mask,
    label)``, ``(input_ids, attention_mask, label)`` or ``(input_ids, label)``. The
    model, such as an ``AutoModelForSequenceClassification`` with two labels or more,
    returns logits, a tuple that starts with them, or anything with ``logits``.

    Args:
        temperature: Divides the logits in ``Q``; the margin does not depend on it.

    Attributes:
        loss_temperature: The constructor's ``temperature``.

    Raises:
        OptionError: If ``temperature`` is not positive and finite.
    """

    @staticmethod
    def get_output(
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        *example: Any,
    ) -> Float[Tensor, ""]:
        """Compute the margin of one text.

        Args:
            model: The model.
            weights: Its parameters by name, or None for those it holds.
            buffers: Its buffers by name.
            *example: The entries of a tuple batch, or one mapping, without batch axis.

        Returns:
            The margin. Shape ``()``.
        """
        # Under vmap no value can be looked at, so labels and masks go unchecked here.
        call = _split_text(as_batch(example))
        logits = _call_for_text_logits(model, weights, buffers, call)
        check_logits(logits)
        return log_odds(logits, call.labels)[0]

    @staticmethod
    def _split(batch: Batch) -> ModelCall:
        return _split_text(batch)

    @staticmethod
    def _logits(
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        call: ModelCall,
    ) -> Float[Tensor, "b k"]:
        check_texts(model, call)
        logits = _call_for_text_logits(model, weights, buffers, call)
        return _checked(logits, call)


def _split_image(batch: Batch) -> ModelCall:
    if isinstance(batch, tuple | list) and len(batch) > 2:
        raise BatchError(
            f"An image classification batch is (images, labels), got {len(batch)} "
            f"entries; drop the others, or pass a mapping whose other keys the model "
            f"takes."
        )
    return split_labels(batch)


def _split_text(batch: Batch) -> ModelCall:
    call = split_labels(batch)
    if not call.args:
        return call
    names = _TEXT_INPUTS.get(len(call.args) + 1)
    if names is None:
        raise BatchError(
            f"A text classification tuple is (input_ids, [token_type_ids,] "
            f"[attention_mask,] label), got {len(call.args) + 1} entries; pass a mapping "
            f"to name other inputs."
        )
    return ModelCall((), dict(zip(names, call.args, strict=True)), call.labels)


def _margin(
    model: Module, weights: Weights | None, buffers: Weights | None, call: ModelCall
) -> Float[Tensor, ""]:
    # Under vmap no value can be looked at, so labels go unchecked here.
    logits = call_for_logits(model, weights, buffers, call)
    check_logits(logits)
    return log_odds(logits, call.labels)[0]


def _checked_logits(
    model: Module, weights: Weights | None, buffers: Weights | None, call: ModelCall
) -> Float[Tensor, "b k"]:
    return _checked(call_for_logits(model, weights, buffers, call), call)


def _checked(logits: Tensor, call: ModelCall) -> Float[Tensor, "b k"]:
    check_logits(logits)
    check_class_labels(call.labels, logits)
    return logits


def _call_for_text_logits(
    model: Module, weights: Weights | None, buffers: Weights | None, call: ModelCall
) -> Float[Tensor, "*shape"]:
    check_problem(model)
    try:
        return call_for_logits(model, weights, buffers, call)
    except (IndexError, RuntimeError, ValueError) as error:
        explained = explain(error, model, call)
        if explained is None:
            raise
        raise explained from error
