"""Language models: one number a sequence, from the margins of its labelled tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import Module

from trak._types import Batch, Weights
from trak.errors import BatchError, OptionError, TaskError
from trak.modelout_functions._abstract import AbstractModelOutput
from trak.modelout_functions._calls import (
    ModelCall,
    as_batch,
    call_for_logits,
    split_labels,
)
from trak.modelout_functions._inputs import forward_parameters
from trak.modelout_functions._margins import log_odds

IGNORED = -100
"""Label of a token that is not predicted, as in ``transformers`` and in PyTorch."""


class _TokenModelOutput(AbstractModelOutput):
    """Margins and out-to-loss of tokens; labels stand where their logits do."""

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
        # Under vmap no value can be looked at, so labels go unchecked here.
        logits, labels = self._read(model, weights, buffers, as_batch(example))
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

    def _margins(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> tuple[Float[Tensor, " k"], Bool[Tensor, "b t"]]:
        """Compute the margins of the labelled tokens of a batch, in order."""
        logits, labels = self._read(model, weights, buffers, batch)
        is_labelled = labels != IGNORED
        _check_labels(labels, is_labelled, logits.shape[-1])
        return log_odds(logits[is_labelled], labels[is_labelled]), is_labelled

    def _read(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
        """Call the model; give logits, and the label of each."""
        call = self._call(batch)
        if call.labels.ndim < 2:
            raise BatchError(
                f"The labels have shape {tuple(call.labels.shape)}; (b, tokens) is needed. A "
                f"batch of one text needs its axis: a slice such as dataset[3:4], or "
                f"tensor.unsqueeze(0)."
            )
        if "use_cache" in forward_parameters(model):  # it would be kept for nothing
            call.kwargs.setdefault("use_cache", False)
        try:
            logits = call_for_logits(model, weights, buffers, call)
        except IndexError as error:
            shapes = {
                key: tuple(value.shape)
                for key, value in call.kwargs.items()
                if isinstance(value, Tensor)
            }
            raise BatchError(
                f"The model has no such token or position ({error}); its inputs have "
                f"shapes {shapes}. Truncate sequences to the longest that the model "
                f"takes, and use the model's own tokenizer."
            ) from error
        return self._align(logits, call.labels)

    @staticmethod
    def _call(batch: Batch) -> ModelCall:
        """Take the labels out of a batch."""
        return split_labels(_as_mapping(batch))

    @staticmethod
    def _align(
        logits: Tensor, labels: Tensor
    ) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
        """Bring logits and the labels that they predict to the same places."""
        return _aligned(logits, labels)


class CausalLMModelOutput(_TokenModelOutput):
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
    def _call(batch: Batch) -> ModelCall:
        batch = _as_mapping(batch)
        if "labels" not in batch and "label" not in batch:
            batch = {**batch, "labels": _tokens_as_labels(batch)}
        return split_labels(batch)

    @staticmethod
    def _align(
        logits: Tensor, labels: Tensor
    ) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
        logits, labels = _aligned(logits, labels)
        return logits[:, :-1], labels[:, 1:]


class MaskedLMModelOutput(_TokenModelOutput):
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


class Seq2SeqLMModelOutput(_TokenModelOutput):
    """The margins of the target's tokens, given the source and the tokens before.

    As :class:`CausalLMModelOutput`, for encoder-decoder models: ``labels`` are the target's
    tokens, -100 where it is padded. The model gets ``decoder_input_ids`` if the batch has
    them; else it is given the labels and makes these itself, as those of ``transformers``
    do.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the target's tokens.

    Attributes:
        reduction: The constructor's.

    Raises:
        OptionError: If ``reduction`` is neither.
    """

    @staticmethod
    def _call(batch: Batch) -> ModelCall:
        call = split_labels(_as_mapping(batch))
        if "decoder_input_ids" not in call.kwargs:
            call.kwargs["labels"] = call.labels
        return call


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


def _aligned(
    logits: Tensor, labels: Tensor
) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
    if logits.ndim != 3:
        raise TaskError(
            f"A language model returns logits of shape (b, tokens, vocabulary), this one "
            f"returned {tuple(logits.shape)}; use 'text_classification' for one label a "
            f"text, or write a FunctionTask."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise BatchError(
            f"The labels have dtype {labels.dtype}; token ids are integers, so convert "
            f"them with labels.long()."
        )
    if labels.shape != logits.shape[:2]:
        raise BatchError(
            f"The labels have shape {tuple(labels.shape)}, the logits "
            f"{tuple(logits.shape)}; pass a token id, or {IGNORED}, for every position."
        )
    return logits, labels


def _check_labels(
    labels: Int[Tensor, "b t"], is_labelled: Bool[Tensor, "b t"], vocabulary: int
) -> None:
    bad = is_labelled & ((labels < 0) | (labels >= vocabulary))
    if bad.any():
        row, place = bad.nonzero()[0].tolist()
        raise BatchError(
            f"The label of token {place} of sequence {row} of the batch is "
            f"{labels[row, place].item()}, which is neither {IGNORED} nor a token from 0 to "
            f"{vocabulary - 1}; use the model's own tokenizer."
        )
    empty = ~is_labelled.any(1)
    if empty.any():
        row = int(empty.nonzero()[0])
        raise BatchError(
            f"Sequence {row} of the batch has no token to predict: all its labels are "
            f"{IGNORED}, or it is too short or was truncated before its first label; leave it "
            f"out, or truncate less."
        )
