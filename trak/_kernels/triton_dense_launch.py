"""How the dense sketch is cut into launches; imports triton."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from trak._kernels import triton_dense
from trak._kernels.triton_sums import (
    FUSED,
    MOST_OF_A_SPLIT,
    PARTIALS,
    ROWS,
    SPLITS_OF_SEGMENTS,
    accumulator,
    add_up,
    by_example,
    key_words,
    on,
    pieces,
    share,
)
from trak._signs import SIGNS_PER_DRAW, Key

INTERPRETED: Final = not isinstance(triton_dense.multiply, triton.JITFunction)
"""Whether triton runs its interpreter in place of a GPU."""

# A tile: two warpgroups of matrix rows on Hopper. With three parts and 32 rows, or one
# part and 64, the units that make its signs and those that use them take about as long.
_OUTPUTS: Final = 128
_ROWS_OF_PARTS: Final = {3: 32, 1: 64}
# Of float64, or its registers spill.
_WIDE_OUTPUTS: Final = 32
_WIDE_ROWS: Final = 16
# Coordinates of a launch; packed float32 rows are 6 bytes each.
_WIDTH: Final = 2**19
_COLUMNS_TO_PACK: Final = 1024
# Threads use a gradient that they loaded for each of their four outputs.
_SEGMENT_OUTPUTS: Final = 512


def dense_into(
    out: Float[Tensor, "b p"], x: Float[Tensor, "b k"], key: Key, offset: int
) -> None:
    """Add the dense sign sketch of some coordinates of one parameter.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the coordinates, in any floating dtype. Shape ``(b, k)``.
        key: The stream's key.
        offset: Position of the first column in the parameter.
    """
    if x.numel() == 0:
        return
    most = max(1, PARTIALS // out.shape[1]) * MOST_OF_A_SPLIT * SIGNS_PER_DRAW
    with on(x.device):
        for lo, hi in pieces(offset, offset + x.shape[1], min(_WIDTH, most)):
            for top in range(0, len(x), ROWS):
                rows = slice(top, top + ROWS)
                piece = x[rows, lo - offset : hi - offset]
                _piece(out[rows], piece, key, lo)


def dense_segments_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "k w"],
    examples: Int[Tensor, " k"],
    positions: Int[Tensor, " k"],
    key: Key,
) -> None:
    """Add the dense sign sketch of segments of one parameter.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the segments, in any floating dtype. Shape ``(k, w)``.
        examples: Which example each segment is of, int64. Shape ``(k,)``.
        positions: Position of each segment's first coordinate, int64. Shape ``(k,)``.
        key: The stream's key.
    """
    if x.numel() == 0 or len(out) == 0:
        return
    outputs = min(_SEGMENT_OUTPUTS, max(128, triton.next_power_of_2(out.shape[1])))
    with on(x.device):
        order, bounds = by_example(len(out), examples)
        tiles = triton.cdiv(out.shape[1], outputs)
        for top in range(0, len(out), ROWS):
            rows = out[top : top + ROWS]
            partials = out.new_empty((SPLITS_OF_SEGMENTS, *rows.shape))
            grid = (tiles, len(rows), SPLITS_OF_SEGMENTS)
            triton_dense.multiply_segments[grid](
                x,
                order,
                bounds[top:],
                positions,
                partials,
                len(rows),
                x.shape[1],
                out.shape[1],
                *key_words(key),
                *x.stride(),
                SPLITS=SPLITS_OF_SEGMENTS,
                OUTPUTS=outputs,
                ACC=accumulator(out),
                num_warps=4,
                **FUSED,
            )
            add_up(rows, partials, out.shape[1])


def _piece(
    out: Float[Tensor, "b p"], x: Float[Tensor, "b k"], key: Key, start: int
) -> None:
    """Add the dense sketch of coordinates ``start..start + k`` of some rows."""
    b, p = out.shape
    first_draw = start // SIGNS_PER_DRAW
    draws = triton.cdiv(start + x.shape[1], SIGNS_PER_DRAW) - first_draw
    parts, kept = _parts(x.dtype, out.dtype)
    width = draws * SIGNS_PER_DRAW
    packed = x.new_empty((parts, b, width), dtype=kept)
    triton_dense.pack[triton.cdiv(width, _COLUMNS_TO_PACK), b](
        x,
        packed,
        *x.shape,
        width,
        start - first_draw * SIGNS_PER_DRAW,
        *x.stride(),
        PARTS=parts,
        COLUMNS=_COLUMNS_TO_PACK,
        num_warps=4,
        **FUSED,
    )
    per_split = share(draws)
    partials = out.new_empty((triton.cdiv(draws, per_split), b, p))
    wide = kept == torch.float64
    outputs = _WIDE_OUTPUTS if wide else _OUTPUTS
    # Not fewer for a small batch: other tiles may mean another order of summation.
    rows = _WIDE_ROWS if wide else _ROWS_OF_PARTS[parts]
    grid = (triton.cdiv(p, outputs), triton.cdiv(b, rows), len(partials))
    triton_dense.multiply[grid](
        packed,
        partials,
        b,
        p,
        first_draw,
        draws,
        per_split,
        *key_words(key),
        PARTS=parts,
        ROWS=rows,
        OUTPUTS=outputs,
        DOT=_operand(kept),
        ACC=accumulator(out),
        num_warps=4,
        **FUSED,
        num_stages=2 if wide else 3,
    )
    add_up(out, partials, out.shape[1])


def _parts(given: torch.dtype, sums: torch.dtype) -> tuple[int, torch.dtype]:
    """Return into how many numbers a gradient is cut, and of which dtype they are."""
    if sums == torch.float64:
        return 1, torch.float64
    if given in {torch.float16, torch.bfloat16}:
        return 1, given
    return 3, torch.bfloat16


def _operand(kept: torch.dtype) -> Any:
    """Return the dtype of a matrix product's operands, as triton names it."""
    if kept == torch.float64:
        return tl.float64
    if INTERPRETED:
        # Triton's interpreter (3.9) multiplies the bit patterns of bfloat16 numbers.
        return tl.float32
    return tl.bfloat16 if kept == torch.bfloat16 else tl.float16
