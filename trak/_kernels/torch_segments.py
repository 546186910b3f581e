"""Sketches of scattered runs of coordinates, as an embedding's gradient has them.

In torch operations, for any device. A segment is one example's gradient of a run of
consecutive coordinates; segments may repeat, overlap and come in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trak._signs import Domain, Key, entries_at, rotations_at

# Entries made at a time: tens of MiB with what they are made from.
_ENTRIES: Final = 2**19
_DOMAINS: Final = {
    "rademacher": Domain.DENSE_SIGN,
    "normal": Domain.DENSE_NORMAL,
}


def sparse_segments_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "k w"],
    examples: Int[Tensor, " k"],
    positions: Int[Tensor, " k"],
    key: Key,
    sizes: Sequence[int],
) -> None:
    """Add the sparse sketch of segments of one parameter.

    Args:
        out: Sketch to add to; sums run in its dtype. Shape ``(b, p)``.
        x: Gradients of the segments' coordinates. Shape ``(k, w)``.
        examples: Row of ``out`` that each segment is added to, int64. Shape ``(k,)``.
        positions: First coordinate of each segment, int64. Shape ``(k,)``.
        key: The stream's key.
        sizes: Sizes of the sketch's blocks.
    """
    b, p = out.shape
    total = out.new_zeros(b * p)
    columns = torch.arange(x.shape[1], device=x.device)
    for lo, hi in _pieces(len(x), x.shape[1] * len(sizes)):
        starts = positions[lo:hi]
        signs = entries_at(
            key, starts, x.shape[1], range(len(sizes)), Domain.SPARSE_SIGN
        )
        wide = x[lo:hi].to(out.dtype)
        rows = examples[lo:hi, None] * p
        at = 0
        for r, size in enumerate(sizes):
            coordinates = starts[:, None] + columns
            chunks = coordinates // size
            first = (starts // size)[:, None]
            # Rotations of the chunks a segment can touch, one draw each, not one a
            # coordinate.
            span = torch.arange((x.shape[1] + 2 * size - 2) // size, device=x.device)
            rotations = rotations_at(key, first + span, r, size)
            turned = coordinates % size + rotations.gather(1, chunks - first)
            _add_at(total, rows + at + turned % size, signs[r].to(out.dtype) * wide)
            at += size
    out.add_(total.view(b, p), alpha=math.sqrt(p / len(sizes)))


def dense_segments_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "k w"],
    examples: Int[Tensor, " k"],
    positions: Int[Tensor, " k"],
    key: Key,
    law: str,
) -> None:
    """Add the dense sketch of segments of one parameter.

    Segments of the same position share its entries, which cost more than their use.

    Args:
        out: Sketch to add to; sums run in its dtype. Shape ``(b, p)``.
        x: Gradients of the segments' coordinates. Shape ``(k, w)``.
        examples: Row of ``out`` that each segment is added to, int64. Shape ``(k,)``.
        positions: First coordinate of each segment, int64. Shape ``(k,)``.
        key: The stream's key.
        law: ``"normal"`` or ``"rademacher"``.
    """
    b, p = out.shape
    width = x.shape[1]
    starts, group = torch.unique(positions, return_inverse=True)
    order = group.argsort(stable=True)
    ends = group.bincount(minlength=len(starts)).cumsum(0).tolist()
    columns = torch.arange(width, device=x.device)
    block = min(p, max(1, _ENTRIES // width))
    for lo, hi in _pieces(len(starts), width * max(block, b)):
        taken = order[ends[lo - 1] if lo else 0 : ends[hi - 1]]
        merged = out.new_zeros(b * (hi - lo) * width)
        at = (examples[taken] * (hi - lo) + group[taken] - lo) * width
        _add_at(merged, at[:, None] + columns, x[taken].to(out.dtype))
        rows = merged.view(b, (hi - lo) * width)
        for first in range(0, p, block):
            outputs = range(first, min(first + block, p))
            entries = entries_at(key, starts[lo:hi], width, outputs, _DOMAINS[law])
            tile = entries.flatten(1).T.to(out.dtype)
            out[:, first : outputs.stop].addmm_(rows, tile)


def _pieces(count: int, entries: int) -> Iterator[tuple[int, int]]:
    """Cut a number of things that make so many entries each into bounded pieces.

    Yields:
        The first of a piece, and one past its last.
    """
    step = max(1, _ENTRIES // max(1, entries))
    for lo in range(0, count, step):
        yield lo, min(lo + step, count)


def _add_at(
    total: Float[Tensor, " n"], index: Int[Tensor, "k w"], values: Float[Tensor, "k w"]
) -> None:
    """Add values at indices that may repeat, in an order that is fixed."""
    if total.device.type == "cpu":
        total.index_add_(0, index.flatten(), values.flatten())
    else:  # `index_add_` adds atomically there, this after sorting
        total.index_put_((index,), values, accumulate=True)
