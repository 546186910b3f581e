"""Language models: one number a sequence, from the margins of its labelled tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from torch.nn import Module

from trak._types import Batch, Weights
from trak.errors import BatchError, OptionError
from trak.modelout_functions._abstract import AbstractModelOutput
from trak.modelout_functions._calls import (
    ModelCall,
    as_batch,
    call_for_raw_logits,
    split_labels,
    widen,
)
from trak.modelout_functions._inputs import forward_parameters
from trak.modelout_functions._margins import log_odds
from trak.modelout_functions._padding import check_padding, padded_on_the_right
from trak.modelout_functions._texts import no_such_token
from trak.modelout_functions._token_labels import (
    IGNORED,
    check_labels,
    checked_shapes,
)
from trak.modelout_functions._token_margins import margins_of_rows


class TokenModelOutput(AbstractModelOutput):
    """Margins and out-to-loss of tokens; labels stand where their logits do."""

    # The best of ten pairs by the LDS of a Llama fine-tuned on WebNLG, at 1, 5 and 10
    # checkpoints; docs/language-models.md has the table.
    exponents = (0.0, 0.25)

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in {"mean", "sum"}:
            raise OptionError(
                f"reduction={reduction!r} is not 'mean' or 'sum'; a sequence's output is "
                f"the mean or the sum of the margins of its labelled tokens."
            )
        self.reduction = reduction

    def get_output(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        *example: Any,
    ) -> Float[Tensor, ""]:
        """Compute the output of one sequence.

        Args:
            model: The model.
            weights: Its parameters by name, or None for those it holds.
            buffers: Its buffers by name.
            *example: One mapping, without batch axis.

        Returns:
            The mean, or the sum, of its margins; 0 where no token has a label. Shape
            ``()``.
        """
        # Under vmap no value can be looked at, so nothing is checked here.
        logits, labels = self._all_logits(model, weights, buffers, as_batch(example))
        is_labelled = labels != IGNORED
        known = labels.where(is_labelled, 0)
        margins = log_odds(logits.flatten(0, 1), known.flatten())
        total = margins.where(is_labelled.flatten(), 0).sum()
        if self.reduction == "sum":
            return total
        return total / is_labelled.sum().clamp(min=1)

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
        margins, is_labelled = self._margins(model, weights, buffers, batch)
        return _by_sequence(margins, is_labelled, self.reduction)

    def get_out_to_loss_grad(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, "b 1"]:
        """Compute the mean of one minus the probability over a sequence's tokens.

        Returns:
            The means, detached. Shape ``(b, 1)``.
        """
        with torch.no_grad():
            margins, is_labelled = self._margins(model, weights, buffers, batch)
            missing = torch.sigmoid(-margins)  # 1 - p without the subtraction
            return _by_sequence(missing, is_labelled, "mean").unsqueeze(1)

    def logits_and_labels(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
        """Call the model, and bring each label to the logits that predict it.

        Returns:
            Logits, and labels, which are -100 where nothing is predicted.

        Raises:
            BatchError: If a label is no token, or a sequence has none.
        """
        logits, labels = self._all_logits(model, weights, buffers, batch)
        check_labels(labels, labels != IGNORED, logits.shape[-1])
        return logits, labels

    def _all_logits(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
        call = self._call(model, batch)
        logits = widen(_run(model, weights, buffers, call))
        return self._align(*checked_shapes(logits, call.labels))

    def _margins(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> tuple[Float[Tensor, " k"], Bool[Tensor, "b t"]]:
        """Compute the margins of the labelled tokens of a batch, in order."""
        call = self._call(model, batch)
        places = self._needed(model, call)
        if places is not None:
            call.kwargs["logits_to_keep"] = places
        logits = _run(model, weights, buffers, call)
        labels = call.labels
        if places is not None and logits.ndim == 3 and logits.shape[1] == len(places):
            labels = labels[:, places + 1]
        else:
            logits, labels = checked_shapes(logits, labels)
            # Labels are moved, as logits are too many to copy.
            labels = self._moved(labels)
        is_labelled = labels != IGNORED
        check_labels(labels, is_labelled, logits.shape[-1])
        rows = is_labelled.flatten().nonzero()[:, 0]
        known = labels.flatten()[rows].long()
        if torch._C._functorch.is_functorch_wrapped_tensor(logits):
            return log_odds(widen(logits.flatten(0, 1)[rows]), known), is_labelled
        return margins_of_rows(logits.flatten(0, 1), rows, known), is_labelled

    @staticmethod
    def _call(model: Module, batch: Batch) -> ModelCall:
        """Take the labels out of a batch."""
        del model
        return split_labels(_as_mapping(batch))

    @staticmethod
    def _needed(model: Module, call: ModelCall) -> Int64[Tensor, " k"] | None:
        """Find the only positions whose logits are needed, if the model may leave some out."""
        del model, call
        return None

    @staticmethod
    def _align(
        logits: Tensor, labels: Tensor
    ) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
        """Bring logits and the labels that they predict to the same places."""
        return logits, labels

    @staticmethod
    def _moved(labels: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        """Bring labels to the places of the logits that predict them."""
        return labels


class CausalLMModelOutput(TokenModelOutput):
    r"""The margins of a text's tokens, each predicted from those before it.

    With the margin :math:`m_t = \log p_t / (1 - p_t)` of token :math:`t` given the
    tokens before it, :math:`f` is the mean of the :math:`m_t`, or their sum, over tokens
    with a label. The loss, of cross-entropy, is the mean or the sum of
    :math:`\log(1 + e^{-m_t})`; it is not a function of :math:`f` alone, so ``Q`` is its
    slope along the direction in which the margins move :math:`f`,

    .. math:: Q = \frac{1}{T} \sum_t (1 - p_t).

    This is the output of Park et al. (2023), Section 5.2, over the tokens of a sequence.

    Batches are mappings as tokenizers and data collators of ``transformers`` make them.
    ``labels`` stand where their token does, as there: those at position ``t`` are
    compared with the logits at ``t - 1``, -100 marks tokens that are not predicted, and the
    model is not given them. Without ``labels`` every token is predicted but those whose
    ``attention_mask`` is 0.

    Args:
        reduction: ``"mean"``, so that long texts count as much as short ones, or ``"sum"``,
            the log-odds of a text as the sum over its tokens.

    Attributes:
        reduction: The constructor's.

    Raises:
        OptionError: If ``reduction`` is neither.
    """

    @staticmethod
    def _call(model: Module, batch: Batch) -> ModelCall:
        batch = _as_mapping(batch)
        if "labels" not in batch and "label" not in batch:
            check_padding(model, batch)
            batch = {**batch, "labels": _tokens_as_labels(batch)}
        else:
            check_padding(model, batch, sides="left")
        return split_labels(padded_on_the_right(batch))

    @staticmethod
    def _needed(model: Module, call: ModelCall) -> Int64[Tensor, " k"] | None:
        labels, inputs = call.labels, call.kwargs
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if not isinstance(tokens, Tensor) or labels.shape != tokens.shape[:2]:
            return None  # only beside all logits is it seen whether labels fit
        if labels.is_floating_point() or labels.dtype == torch.bool:
            return None
        if "logits_to_keep" not in forward_parameters(model):
            return None
        places = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
        # Where none is labelled there is an error to come; one more is not worth it.
        return places if 0 < len(places) < labels.shape[1] - 1 else None

    @staticmethod
    def _align(
        logits: Tensor, labels: Tensor
    ) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
        return logits[:, :-1], labels[:, 1:]

    @staticmethod
    def _moved(labels: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        last = labels.new_full((len(labels), 1), IGNORED)
        return torch.cat([labels[:, 1:], last], dim=1)


class MaskedLMModelOutput(TokenModelOutput):
    """The margins of the tokens that were masked, each from the others.

    As :class:`CausalLMModelOutput`, but the logits at a position predict its own label.
    The batch says which tokens are masked: their ``input_ids`` hold the mask's token, and
    ``labels`` the true one; labels are -100 everywhere else.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the masked tokens.

    Attributes:
        reduction: The constructor's.

    Raises:
        OptionError: If ``reduction`` is neither.
    """

    @staticmethod
    def _call(model: Module, batch: Batch) -> ModelCall:
        batch = _as_mapping(batch)
        check_padding(model, batch)
        return split_labels(batch)


class Seq2SeqLMModelOutput(TokenModelOutput):
    """The margins of the target's tokens, given the source and the tokens before.

    As :class:`CausalLMModelOutput`, for encoder-decoder models: ``labels`` are the target's
    tokens, -100 where it is padded. The model gets ``decoder_input_ids`` if the batch has
    them; else its ``prepare_decoder_input_ids_from_labels`` makes them, or it is given the
    labels and makes them itself.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the target's tokens.

    Attributes:
        reduction: The constructor's.

    Raises:
        OptionError: If ``reduction`` is neither.
    """

    @staticmethod
    def _call(model: Module, batch: Batch) -> ModelCall:
        batch = _as_mapping(batch)
        check_padding(model, batch)
        call = split_labels(batch)
        if "decoder_input_ids" not in call.kwargs:
            prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if prepare is not None:  # given labels, it would compute a loss for nothing
                call.kwargs["decoder_input_ids"] = prepare(labels=call.labels)
            else:
                call.kwargs["labels"] = call.labels
        return call


def _run(
    model: Module, weights: Weights | None, buffers: Weights | None, call: ModelCall
) -> Float[Tensor, "*shape"]:
    """Call the model for its logits, in whatever type they have."""
    if "use_cache" in forward_parameters(model):  # it would be kept for nothing
        call.kwargs.setdefault("use_cache", False)
    try:
        return call_for_raw_logits(model, weights, buffers, call)
    except IndexError as error:
        raise no_such_token(error, call) from error


def _by_sequence(
    values: Float[Tensor, " k"], is_labelled: Bool[Tensor, "b t"], reduction: str
) -> Float[Tensor, " b"]:
    rows = is_labelled.nonzero()[:, 0]
    totals = values.new_zeros(len(is_labelled)).index_add(0, rows, values)
    return totals if reduction == "sum" else totals / is_labelled.sum(1)


def _as_mapping(batch: Batch) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return batch
    raise BatchError(
        f"A batch of a language model is a mapping, such as a tokenizer's output with "
        f"return_tensors='pt', got a {type(batch).__name__}; name its tensors, e.g. "
        f"{{'input_ids': ..., 'attention_mask': ..., 'labels': ...}}."
    )


def _tokens_as_labels(batch: Mapping[str, Any]) -> Tensor:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) and ids:
        raise BatchError(
            f"input_ids is a {type(ids).__name__}, not a tensor. Pad and stack the rows, e.g. "
            f"with DataCollatorWithPadding(tokenizer) of transformers."
        )
    if not isinstance(ids, Tensor):
        raise BatchError(
            f"The batch has neither labels nor a tensor input_ids, got "
            f"{sorted(map(str, batch))}; pass one of them."
        )
    return ids.where(mask != 0, IGNORED) if isinstance(mask, Tensor) else ids
