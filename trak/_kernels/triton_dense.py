"""Kernels of the dense Rademacher sketch; imports triton.

Signs are exact in every floating dtype, so only the gradients need care: float32 ones
are cut into three bfloat16 numbers, of 8 bits each, that add up to them. The matrix
units then multiply without rounding and sum in float32. The signs of a tile are made
once for all three, so at 32 rows the cut costs little.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from trak._kernels.triton_philox import one_of, words

_SIGN = tl.constexpr(0)


@triton.jit
@no_type_check
def _coordinates(COUNT: tl.constexpr):
    """Return the order in which coordinates are multiplied.

    Coordinates ``c`` and ``c + 16`` of a word are neighbours, so that one shift of the
    word puts both of their bits where the signs of two 16-bit numbers are.
    """
    at = tl.arange(0, COUNT)
    return at // 32 * 32 + at % 2 * 16 + at % 32 // 2


@triton.jit(do_not_specialize=["b", "k", "width", "skip", "x_row"])
@no_type_check
def pack(
    x,
    packed,
    b,
    k,
    width,
    skip,
    x_row,
    x_column,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Lay coordinates out as `multiply` reads them: whole draws, in order, in parts.

    Args:
        x: Gradients of coordinates. Shape ``(b, k)``.
        packed: Where the parts go, contiguous. Shape ``(PARTS, b, width)``.
        b: Rows.
        k: Coordinates.
        width: Coordinates of the draws that cover them.
        skip: Coordinates of the first draw that precede the first column.
        x_row: Stride of the rows.
        x_column: Stride of the columns.
        PARTS: Numbers that each gradient is cut into.
        COLUMNS: Coordinates of a program.
    """
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.program_id(0) * COLUMNS + _coordinates(COLUMNS) - skip
    inside = (source >= 0) & (source < k)
    columns = source.to(tl.int64) * x_column
    rest = tl.load(x + row * x_row + columns, mask=inside, other=0.0)
    if PARTS > 1:
        rest = rest.to(tl.float32)
    to = packed + row * width + at
    step = (row * 0 + b) * width
    for part in tl.static_range(PARTS):
        value = rest.to(packed.dtype.element_ty)
        tl.store(to + step * part, value, mask=at < width)
        if part + 1 < PARTS:
            rest = rest - value.to(rest.dtype)


@triton.jit(
    do_not_specialize=[
        "b",
        "p",
        "first_draw",
        "draws",
        "per_split",
        "key_low",
        "key_high",
    ]
)
@no_type_check
def multiply(
    packed,
    partials,
    b,
    p,
    first_draw,
    draws,
    per_split,
    key_low,
    key_high,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Multiply packed gradients by the signs of some draws, made where they are used.

    Args:
        packed: From `pack`. Shape ``(PARTS, b, 128 * draws)``.
        partials: Where the sums go, in ``ACC``, contiguous. Shape ``(splits, b, p)``.
        b: Rows.
        p: Outputs.
        first_draw: Index of the first draw, int64.
        draws: How many of them.
        per_split: Draws of a program.
        key_low: First key word, as an int32.
        key_high: Second key word, as an int32.
        PARTS: Numbers that each gradient is cut into.
        ROWS: Rows of a program.
        OUTPUTS: Outputs of a program.
        DOT: Dtype of the product's operands.
        ACC: Dtype of the sums.
    """
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    width = (split.to(tl.int64) * 0 + draws) * 128
    at = rows[None, :].to(tl.int64) * width + tl.arange(0, 128)[:, None]
    here = (rows < b)[None, :]
    sums = tl.zeros((OUTPUTS, ROWS), dtype=ACC)
    first = split * per_split
    for step in range(first, tl.minimum(first + per_split, draws)):
        index = outputs.to(tl.int64) * 0 + first_draw + step
        w0, w1, w2, w3 = words(index, outputs, key_low, key_high, _SIGN)
        signs = _signs(w0, w1, w2, w3, OUTPUTS, DOT)
        for part in tl.static_range(PARTS):
            source = packed + part * b * width + step * 128 + at
            value = tl.load(source, mask=here, other=0.0).to(DOT)
            sums = tl.dot(signs, value, sums, input_precision="ieee", out_dtype=ACC)
    to = partials + (split.to(tl.int64) * b + rows[None, :]) * p + outputs[:, None]
    tl.store(to, sums, mask=here & (outputs < p)[:, None])


@triton.jit
@no_type_check
def _signs(w0, w1, w2, w3, OUTPUTS: tl.constexpr, DOT: tl.constexpr):
    """Return the signs of a draw of each output, in the order of `_coordinates`."""
    if DOT.primitive_bitwidth == 16:
        pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(OUTPUTS, 4, 1)
        left = (15 - tl.arange(0, 16)).to(tl.uint32)[None, None, :]
        pairs = (pairs << left) & 0x80008000
        # The bits of 1.0, twice.
        pairs = pairs ^ (0x3F803F80 if DOT == tl.bfloat16 else 0x3C003C00)
        low = pairs.to(tl.uint16).to(DOT, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(DOT, bitcast=True)
        return tl.join(low, high).reshape(OUTPUTS, 128)
    at = _coordinates(128)[None, :]
    word = one_of(w0[:, None], w1[:, None], w2[:, None], w3[:, None], at // 32)
    return (1 - 2 * ((word >> (at % 32).to(tl.uint32)) & 1).to(tl.int32)).to(DOT)


@triton.jit(do_not_specialize=["b", "w", "p", "key_low", "key_high", "x_row"])
@no_type_check
def multiply_segments(
    x,
    order,
    bounds,
    positions,
    partials,
    b,
    w,
    p,
    key_low,
    key_high,
    x_row,
    x_column,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Multiply an example's segments by their signs, for a tile of outputs.

    Segments share no signs unless they share their position, so there is no matrix
    product here: a thread adds up its own outputs.

    Args:
        x: Segments, in any floating dtype. Shape ``(k, w)``.
        order: Indices of the segments, by example, int64. Shape ``(k,)``.
        bounds: Where in ``order`` an example's segments begin, int64. Shape
            ``(b + 1,)``.
        positions: Positions of the segments in the parameter, int64. Shape ``(k,)``.
        partials: Where the sums go, in ``ACC``, contiguous. Shape ``(SPLITS, b, p)``.
        b: Examples.
        w: Coordinates of a segment.
        p: Outputs.
        key_low: First key word, as an int32.
        key_high: Second key word, as an int32.
        x_row: Stride of the segments.
        x_column: Stride of their coordinates.
        SPLITS: Programs that share an example's segments.
        OUTPUTS: Outputs of a program.
        ACC: Dtype of the sums.
    """
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    example = tl.program_id(1)
    split = tl.program_id(2)
    low = tl.load(bounds + example)
    count = tl.load(bounds + example + 1) - low
    bits = tl.arange(0, 32)
    sums = tl.zeros((OUTPUTS,), dtype=ACC)
    for at in range(low + count * split // SPLITS, low + count * (split + 1) // SPLITS):
        segment = tl.load(order + at)
        begin = tl.load(positions + segment)
        for index in range(begin // 128, (begin + w - 1) // 128 + 1):
            w0, w1, w2, w3 = words(
                outputs.to(tl.int64) * 0 + index, outputs, key_low, key_high, _SIGN
            )
            for part in tl.static_range(4):
                word = (
                    w0
                    if part == 0
                    else (w1 if part == 1 else (w2 if part == 2 else w3))
                )
                source = (index * 128 - begin).to(tl.int32) + part * 32 + bits
                inside = (source >= 0) & (source < w)
                at_source = x + segment * x_row + source.to(tl.int64) * x_column
                value = tl.load(at_source, mask=inside, other=0.0).to(ACC)
                # Bits are the first axis, which no two threads share: the sum over
                # them stays in a thread.
                sums += tl.sum(_signed(value, word, ACC), axis=0)
    to = partials + (split.to(tl.int64) * b + example) * p + outputs
    tl.store(to, sums, mask=outputs < p)


@triton.jit
@no_type_check
def _signed(value, word, ACC: tl.constexpr):
    """Return 32 values with the signs that are the bits of each word."""
    bits = tl.arange(0, 32).to(tl.uint32)[:, None]
    if ACC == tl.float32:
        flip = (word[None, :] << (31 - bits)) & 0x80000000
        same = value[:, None].to(tl.uint32, bitcast=True)
        return (same ^ flip).to(tl.float32, bitcast=True)
    negative = (word[None, :] >> bits) & 1
    return tl.where(negative != 0, -value[:, None], value[:, None])
