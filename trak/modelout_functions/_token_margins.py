"""Margins of some of many rows of logits, with no copy of all of them, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trak.modelout_functions._margins import log_odds

_TILE = 1 << 20
"""Logits that are worked on at once: 4 MB of float32."""


def margins_of_rows(
    logits: Float[Tensor, "r v"], rows: Int64[Tensor, " k"], labels: Int64[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """Compute the log-odds of the correct classes of some rows.

    As :func:`log_odds` of ``logits[rows]``, widened. A vocabulary has many classes: that
    would copy the logits several times, and their gradient as often.

    Args:
        logits: Rows of logits, in any floating-point type. Shape ``(r, v)``.
        rows: Which rows, each at most once. Shape ``(k,)``.
        labels: Their correct classes. Shape ``(k,)``.

    Returns:
        The margins, in float32 or wider; differentiable, twice if needed. Shape ``(k,)``.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
        >>> margins_of_rows(logits, torch.tensor([1]), torch.tensor([0]))
        tensor([2.])
    """
    found: Tensor = _Margins.apply(logits, rows, labels)  # type: ignore[no-untyped-call]
    return found


class _Margins(torch.autograd.Function):
    """Differentiates tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "r v"],
        rows: Int64[Tensor, " k"],
        labels: Int64[Tensor, " k"],
    ) -> Float[Tensor, " k"]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        margins = logits.new_empty(len(rows), dtype=wide)
        for part in _tiles(len(rows), logits.shape[1]):
            block, columns = _tile(logits, rows[part], labels[part], wide)
            chosen = block.gather(1, columns)[:, 0]
            block.scatter_(1, columns, -math.inf)
            margins[part] = chosen - block.logsumexp(1)
        ctx.save_for_backward(logits, rows, labels)
        return margins

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (along,) = grads
        logits, rows, labels = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            wide = logits[rows].to(along.dtype)
            again = _slope(wide, labels, along).to(logits.dtype)
            return torch.zeros_like(logits).index_copy(0, rows, again), None, None
        gradient = torch.zeros_like(logits)
        for part in _tiles(len(rows), logits.shape[1]):
            block, columns = _tile(logits, rows[part], labels[part], along.dtype)
            block.scatter_(1, columns, -math.inf)
            block.sub_(block.logsumexp(1, keepdim=True)).exp_()
            block.mul_(-along[part, None])
            block.scatter_(1, columns, along[part, None])
            gradient[rows[part]] = block.to(gradient.dtype)
        return gradient, None, None


def _slope(
    logits: Float[Tensor, "k v"], labels: Int64[Tensor, " k"], along: Tensor
) -> Float[Tensor, "k v"]:
    """Differentiate margins by logits, so that the result can be differentiated."""
    with torch.enable_grad():
        if not logits.requires_grad:
            logits = logits.requires_grad_()
        return torch.autograd.grad(
            log_odds(logits, labels), logits, along, create_graph=True
        )[0]


def _tiles(k: int, v: int) -> Iterator[slice]:
    step = max(1, _TILE // max(1, v))
    return (slice(low, low + step) for low in range(0, k, step))


def _tile(
    logits: Tensor, rows: Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[Float[Tensor, "k v"], Int64[Tensor, "k 1"]]:
    """Copy some rows, to be written to."""
    return logits[rows].to(dtype), labels[:, None]
