"""Labels of tokens, and what can be wrong with them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trak.errors import BatchError, TaskError

IGNORED = -100
"""Label of a token that is not predicted, as in ``transformers`` and in PyTorch."""


def checked_shapes(
    logits: Tensor, labels: Tensor
) -> tuple[Float[Tensor, "b t v"], Int[Tensor, "b t"]]:
    """Refuse logits and labels that do not stand beside each other."""
    if labels.ndim < 2:
        raise BatchError(
            f"The labels have shape {tuple(labels.shape)}; (b, tokens) is needed. A "
            f"batch of one text needs its axis: a slice such as dataset[3:4], or "
            f"tensor.unsqueeze(0)."
        )
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


def check_labels(
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
