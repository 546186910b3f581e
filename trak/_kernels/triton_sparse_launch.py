"""How the sparse sketch is cut into launches; imports triton."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from trak._kernels import triton_sparse
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

# Up to so many chunks, one launch costs less than three.
_FEW: Final = 16
# 32 sums for each of 512 threads. The tile spans the blocks, so that L1 serves all but
# the first reading of a coordinate; its rows share the work of finding a coordinate.
_OUTPUTS: Final = 2048
_ROWS: Final = 8
_WIDE_ROWS: Final = 4
_SUMS_PER_WARP: Final = 32 * 32
# Outputs of a program that draws for itself, all of one block.
_OUTPUTS_OF_A_BLOCK: Final = 512
_LANES: Final = 128


class _Blocks(NamedTuple):
    """The blocks of a sparse sketch."""

    larger: int
    """How many have one output more than the others; they come first."""

    small: int
    """Outputs of the others."""

    number: int
    """How many there are in all."""


def sparse_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "b k"],
    key: Key,
    offset: int,
    sizes: tuple[int, ...],
) -> None:
    """Add the sparse sketch of some coordinates of one parameter.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the coordinates, in any floating dtype. Shape ``(b, k)``.
        key: The stream's key.
        offset: Position of the first column in the parameter.
        sizes: Outputs of each block.
    """
    if x.numel() == 0:
        return
    blocks = _blocks(sizes)
    with on(x.device):
        if x.shape[1] <= _FEW * blocks.small:
            _few(out, x, key, offset, blocks)
            return
        # Not a number of rows: a row's sums must not depend on the others.
        length = max(1, PARTIALS // out.shape[1]) * MOST_OF_A_SPLIT * blocks.small
        for lo, hi in pieces(offset, offset + x.shape[1], length):
            _piece(out, x[:, lo - offset : hi - offset], key, lo, blocks)


def sparse_segments_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "k w"],
    examples: Int[Tensor, " k"],
    positions: Int[Tensor, " k"],
    key: Key,
    sizes: tuple[int, ...],
) -> None:
    """Add the sparse sketch of segments of one parameter.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the segments, in any floating dtype. Shape ``(k, w)``.
        examples: Which example each segment is of, int64. Shape ``(k,)``.
        positions: Position of each segment's first coordinate, int64. Shape ``(k,)``.
        key: The stream's key.
        sizes: Outputs of each block.
    """
    if x.numel() == 0 or len(out) == 0:
        return
    blocks = _blocks(sizes)
    outputs = min(_OUTPUTS_OF_A_BLOCK, triton.next_power_of_2(max(sizes)))
    tiles = triton.cdiv(max(sizes), outputs)
    with on(x.device):
        order, bounds = by_example(len(out), examples)
        for top in range(0, len(out), ROWS):
            rows = out[top : top + ROWS]
            partials = out.new_empty((SPLITS_OF_SEGMENTS, *rows.shape))
            grid = (blocks.number * tiles, len(rows), SPLITS_OF_SEGMENTS)
            triton_sparse.gather_segments[grid](
                x,
                order,
                bounds[top:],
                positions,
                partials,
                len(rows),
                x.shape[1],
                out.shape[1],
                blocks.larger,
                blocks.small,
                *key_words(key),
                *x.stride(),
                SPLITS=SPLITS_OF_SEGMENTS,
                TILES=tiles,
                OUTPUTS=outputs,
                ACC=accumulator(out),
                num_warps=4,
                **FUSED,
            )
            add_up(rows, partials, blocks.number)


def _few(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "b k"],
    key: Key,
    start: int,
    blocks: _Blocks,
) -> None:
    """Add the sparse sketch of a few chunks of coordinates."""
    size = blocks.small + (blocks.larger > 0)
    rows = min(_tile_rows(out), triton.next_power_of_2(len(x)))
    outputs = min(_OUTPUTS_OF_A_BLOCK, triton.next_power_of_2(size))
    grid = (triton.cdiv(size, outputs), triton.cdiv(len(x), rows), blocks.number)
    triton_sparse.gather_few[grid](
        x,
        out,
        *x.shape,
        out.shape[1],
        start,
        *blocks,
        *key_words(key),
        *x.stride(),
        *out.stride(),
        ROWS=rows,
        OUTPUTS=outputs,
        ACC=accumulator(out),
        num_warps=4,
        **FUSED,
    )


def _piece(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "b k"],
    key: Key,
    start: int,
    blocks: _Blocks,
) -> None:
    """Add the sparse sketch of coordinates ``start..start + k``."""
    stop, p = start + x.shape[1], out.shape[1]
    first_draw = start // SIGNS_PER_DRAW
    draws = triton.cdiv(stop, SIGNS_PER_DRAW) - first_draw
    first_large, first_small = start // (blocks.small + 1), start // blocks.small
    # Near a multiple of both sizes the larger blocks can have one chunk more.
    chunks = max(
        triton.cdiv(stop, blocks.small) - first_small,
        triton.cdiv(stop, blocks.small + 1) - first_large,
    )
    signs = x.new_empty((blocks.number, 4 * draws), dtype=torch.int32)
    rotations = x.new_empty((blocks.number, chunks), dtype=torch.int32)
    sign_programs = triton.cdiv(draws, _LANES)
    programs = sign_programs + triton.cdiv(chunks, _LANES)
    triton_sparse.draw[programs, blocks.number](
        signs,
        rotations,
        first_draw,
        draws,
        sign_programs,
        first_large,
        first_small,
        chunks,
        blocks.larger,
        blocks.small,
        *key_words(key),
        LANES=_LANES,
        num_warps=4,
        **FUSED,
    )
    per_split = share(chunks)
    splits = triton.cdiv(chunks, per_split)
    rows = min(_tile_rows(out), triton.next_power_of_2(len(x)))
    outputs = min(_OUTPUTS, triton.next_power_of_2(p))
    warps = max(1, min(16, rows * outputs // _SUMS_PER_WARP))
    for top in range(0, len(x), ROWS):
        part = x[top : top + ROWS]
        partials = out.new_empty((splits, len(part), p))
        grid = (triton.cdiv(p, outputs), triton.cdiv(len(part), rows), splits)
        triton_sparse.gather[grid](
            part,
            signs,
            rotations,
            partials,
            *part.shape,
            p,
            blocks.larger,
            blocks.small,
            first_large * (blocks.small + 1) - start,
            first_small * blocks.small - start,
            start - first_draw * SIGNS_PER_DRAW,
            draws,
            chunks,
            per_split,
            *part.stride(),
            ROWS=rows,
            OUTPUTS=outputs,
            ACC=accumulator(out),
            num_warps=warps,
            **FUSED,
        )
        add_up(out[top : top + ROWS], partials, blocks.number)


def _blocks(sizes: tuple[int, ...]) -> _Blocks:
    return _Blocks(sum(size > sizes[-1] for size in sizes), sizes[-1], len(sizes))


def _tile_rows(out: Tensor) -> int:
    return _WIDE_ROWS if out.dtype == torch.float64 else _ROWS
