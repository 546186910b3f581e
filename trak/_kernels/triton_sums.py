"""Partial sums, and what the launches of both sketches share; imports triton.

Every number that decides how sums are cut depends on the shapes alone, never on the
device or on the number of rows; nothing is tuned at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from trak._signs import Key

# Said outright, because triton 3.9 warns where it is left to change in 3.10. Products
# with a sign are exact, so it changes the speed of the sums and none of their bits.
FUSED: Final = {"enable_fp_fusion": True}

PARTIALS: Final = 2**19
"""Partial sums of a row in one launch; with `ROWS` rows, 128 MiB of float32."""

ROWS: Final = 64
"""Rows of a launch."""

MOST_OF_A_SPLIT: Final = 64
"""Most chunks (sparse) or draws (dense) that a program sums: enough that writing a
partial sum and reading it back is small beside reading what it sums; for the sparse
sketch, s / 64 of it."""

# A parameter with fewer than this many splits of the most gets smaller ones, and so
# enough programs to fill a GPU; but not so small that partial sums dominate.
_SPLITS: Final = 64
_FEWEST_OF_A_SPLIT: Final = 8
# Programs that share the segments of an example, however many it has: with a number that
# followed from the batch, an example's sum would depend on what is beside it.
SPLITS_OF_SEGMENTS: Final = 8


def add_up(
    out: Float[Tensor, "b p"], partials: Float[Tensor, "j b p"], blocks: int
) -> None:
    """Add partial sums to a sketch, always in the same order.

    Args:
        out: Sketch to add to. Shape ``(b, p)``.
        partials: Sums of signed coordinates, in its dtype. Shape ``(splits, b, p)``.
        blocks: Nonzero entries of a coordinate; the number of outputs if dense.
    """
    b, p = out.shape
    entries = min(256, triton.next_power_of_2(p))
    _add_up[triton.cdiv(p, entries), b](
        partials,
        out,
        *partials.shape,
        blocks,
        *out.stride(),
        ENTRIES=entries,
        ACC=accumulator(out),
        num_warps=max(1, entries // 32),
        **FUSED,
    )


def by_example(
    b: int, examples: Int[Tensor, " k"]
) -> tuple[Int[Tensor, " k"], Int[Tensor, " e"]]:
    """Order segments by example.

    Args:
        b: Number of examples.
        examples: Which example each segment is of, int64. Shape ``(k,)``.

    Returns:
        The order of the segments, and where in it each example's begin; one place more
        than there are examples.
    """
    # Stable, so that an example's segments keep their order, whatever the device.
    ordered, order = torch.sort(examples, stable=True)
    rows = torch.arange(b + 1, device=examples.device)
    return order, torch.searchsorted(ordered, rows)


def share(number: int) -> int:
    """Return how many of a number of chunks or draws one program sums."""
    wanted = -(-number // _SPLITS)
    return max(_FEWEST_OF_A_SPLIT, min(MOST_OF_A_SPLIT, wanted))


def pieces(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a range at multiples of a length.

    Yields:
        The first coordinate of a piece, and one past its last.
    """
    while start < stop:
        end = min(stop, (start // length + 1) * length)
        yield start, end
        start = end


def key_words(key: Key) -> tuple[int, int]:
    """Return the key's words as int32 numbers, which all keys then are to a kernel."""
    low, high = (word - 2**32 if word >= 2**31 else word for word in key)
    return low, high


def accumulator(out: Tensor) -> Any:
    return tl.float64 if out.dtype == torch.float64 else tl.float32


def on(device: torch.device) -> Any:
    """Return a context in which triton launches on a device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@triton.jit(do_not_specialize=["splits", "b", "p", "blocks", "out_row"])
@no_type_check
def _add_up(
    partials,
    out,
    splits,
    b,
    p,
    blocks,
    out_row,
    out_column,
    ENTRIES: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Add partial sums to a sketch, always in the same order.

    Args:
        partials: The sums, contiguous. Shape ``(splits, b, p)``.
        out: What to add to. Shape ``(b, p)``.
        splits: Partial sums of an entry.
        b: Rows.
        p: Outputs.
        blocks: Nonzero entries of a coordinate; the number of outputs if dense.
        out_row: Stride of the rows of ``out``.
        out_column: Stride of its columns.
        ENTRIES: Entries of a program.
        ACC: Dtype of the sums.
    """
    row = tl.program_id(1)
    column = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    held = column < p
    at = partials + row.to(tl.int64) * p + column
    step = (row.to(tl.int64) * 0 + b) * p
    sums = tl.zeros((ENTRIES,), dtype=ACC)
    for _ in range(splits):
        sums += tl.load(at, mask=held, other=0.0)
        at += step
    to = out + row.to(tl.int64) * out_row + column.to(tl.int64) * out_column
    before = tl.load(to, mask=held, other=0.0)
    tl.store(to, before + sums * scale(p, blocks, ACC), mask=held)


@triton.jit
@no_type_check
def scale(p, blocks, ACC: tl.constexpr):
    """Return the size of an entry; float arguments of a kernel are only float32."""
    nothing = tl.zeros((1,), dtype=tl.float64)
    return tl.sqrt((nothing + p) / (nothing + blocks)).to(ACC)
