"""Tasks whose model returns numbers, not classes: regression, binary, multilabel."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._types import Batch, Weights
from trak.errors import BatchError, TaskError
from trak.modelout_functions._abstract import AbstractModelOutput
from trak.modelout_functions._calls import as_batch, call_for_logits, split_labels
from trak.modelout_functions._margins import check_binary_labels, signed


class _LabelledModelOutput(AbstractModelOutput):
    """A task that is a formula in the model's output and the labels.

    Batches are tuples ``(*inputs, labels)``, or mappings whose key ``labels`` or
    ``label`` is not passed to the model.
    """

    def get_output(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        *example: Any,
    ) -> Float[Tensor, ""]:
        """Compute the output of one example.

        Returns:
            The output, differentiable. Shape ``()``.
        """
        # Under vmap no value can be looked at, so labels go unchecked here.
        predicted, labels = self._forward(model, weights, buffers, as_batch(example))
        return self._output(predicted, labels)[0]

    def get_outputs(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, " b"]:
        """Compute the outputs of a batch, after checking its labels.

        Returns:
            The outputs, differentiable. Shape ``(b,)``.
        """
        predicted, labels = self._forward(model, weights, buffers, batch)
        self._check_labels(labels)
        return self._output(predicted, labels)

    def get_out_to_loss_grad(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, "b 1"]:
        """Compute the out-to-loss weights of a batch, after checking its labels.

        Returns:
            The weights, detached. Shape ``(b, 1)``.
        """
        with torch.no_grad():
            predicted, labels = self._forward(model, weights, buffers, batch)
            self._check_labels(labels)
            return self._out_to_loss(predicted, labels).unsqueeze(1)

    def _forward(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
        call = split_labels(batch)
        predicted = call_for_logits(model, weights, buffers, call)
        predicted, labels = self._align(predicted, call.labels)
        return predicted, labels.to(predicted.dtype)

    @staticmethod
    @abstractmethod
    def _align(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Bring predictions and labels to one shape, or raise."""

    @staticmethod
    @abstractmethod
    def _check_labels(labels: Tensor) -> None:
        """Raise on values that are no labels."""

    @staticmethod
    @abstractmethod
    def _output(predicted: Tensor, labels: Tensor) -> Float[Tensor, " b"]:
        """Compute ``f``."""

    @staticmethod
    @abstractmethod
    def _out_to_loss(predicted: Tensor, labels: Tensor) -> Float[Tensor, " b"]:
        """Compute ``Q``."""


class RegressionModelOutput(_LabelledModelOutput):
    r"""The prediction of a scalar regression.

    :math:`f` is the model's output and :math:`Q = y - f`, from the loss
    :math:`\tfrac12 (f - y)^2`. The model returns one number an example, shape ``(b,)``
    or ``(b, 1)``; so do the targets, in any dtype. A positive score means that the
    training example pushes the prediction up, which helps only where it is too low.
    """

    @staticmethod
    def _align(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _one_each(predicted, labels)

    @staticmethod
    def _check_labels(labels: Tensor) -> None:
        if not labels.isfinite().all():
            position = int((~labels.isfinite()).nonzero()[0])
            raise BatchError(
                f"The target at position {position} of the batch is "
                f"{labels[position].item()}; fix the targets, or leave these examples "
                f"out."
            )

    @staticmethod
    def _output(predicted: Tensor, labels: Tensor) -> Float[Tensor, " b"]:
        return predicted

    @staticmethod
    def _out_to_loss(predicted: Tensor, labels: Tensor) -> Float[Tensor, " b"]:
        return labels - predicted


class BinaryClassificationModelOutput(_LabelledModelOutput):
    r"""The margin of a single logit.

    :math:`f = (2y - 1) z` for the logit :math:`z` of label 1, and :math:`Q = 1 - p`
    with the sigmoid probability :math:`p` of the correct label. The model returns one
    logit an example, shape ``(b,)`` or ``(b, 1)``; labels are 0 or 1 in any dtype.
    """

    exponents = (0.25, 0.5)  # a softmax of two classes

    @staticmethod
    def _align(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _one_each(predicted, labels)

    @staticmethod
    def _check_labels(labels: Tensor) -> None:
        check_binary_labels(labels)

    @staticmethod
    def _output(predicted: Tensor, labels: Tensor) -> Float[Tensor, " b"]:
        return signed(predicted, labels)

    @staticmethod
    def _out_to_loss(predicted: Tensor, labels: Tensor) -> Float[Tensor, " b"]:
        return torch.sigmoid(-signed(predicted, labels))


class MultilabelModelOutput(_LabelledModelOutput):
    r"""The sum of the margins of several independent binary labels.

    With the margins :math:`m_l = (2 y_l - 1) z_l`, the output is
    :math:`f = \sum_l m_l` and the loss the summed binary cross-entropy
    :math:`L = \sum_l \log(1 + e^{-m_l})`. As :math:`L` is not a function of :math:`f`
    alone, ``Q`` is its slope along the direction in which the logits move :math:`f`,

    .. math:: Q = -\frac{\langle \nabla_z L, \nabla_z f \rangle}
                        {\langle \nabla_z f, \nabla_z f \rangle}
                = \frac{1}{|l|} \sum_l (1 - p_l),

    the mean over labels of the missing probability. The model returns logits of shape
    ``(b, labels)``; labels are 0 or 1 in any dtype, of the same shape.
    """

    @staticmethod
    def _align(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if predicted.ndim != 2 or predicted.shape[1] == 0:
            raise TaskError(
                f"Multilabel classification needs logits of shape (b, labels), the model "
                f"returned {tuple(predicted.shape)}."
            )
        if labels.shape != predicted.shape:
            raise BatchError(
                f"The labels have shape {tuple(labels.shape)}, the logits "
                f"{tuple(predicted.shape)}; pass a 0 or 1 for every logit."
            )
        return predicted, labels

    @staticmethod
    def _check_labels(labels: Tensor) -> None:
        check_binary_labels(labels)

    @staticmethod
    def _output(predicted: Tensor, labels: Tensor) -> Float[Tensor, " b"]:
        return signed(predicted, labels).sum(1)

    @staticmethod
    def _out_to_loss(predicted: Tensor, labels: Tensor) -> Float[Tensor, " b"]:
        return torch.sigmoid(-signed(predicted, labels)).mean(1)


def _one_each(
    predicted: Tensor, labels: Tensor
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"] | Tensor]:
    b = len(labels) if labels.ndim else 0
    if labels.shape not in {(b,), (b, 1)}:
        raise BatchError(
            f"The labels have shape {tuple(labels.shape)}; pass one number an example, "
            f"shape (b,) or (b, 1)."
        )
    # Models that end in squeeze() return shape () for a batch of one.
    single = b == 1 and predicted.ndim == 0
    if predicted.shape not in {(b,), (b, 1)} and not single:
        raise TaskError(
            f"The model returned shape {tuple(predicted.shape)} for {b} examples; this "
            f"task needs one number an example, shape ({b},) or ({b}, 1)."
        )
    return predicted.reshape(b), labels.reshape(b)
