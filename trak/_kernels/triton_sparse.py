"""Kernels of the rotated sparse sketch; imports triton.

In the gather form every output of a program sums its own coordinates in the order of
the chunks. Nothing is added atomically, and neither the batch nor the size of a tile
enters the order, so an example's sketch does not depend on what runs beside it.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from trak._kernels.triton_philox import one_of, words
from trak._kernels.triton_sums import scale

_SIGN = tl.constexpr(2)
_ROTATION = tl.constexpr(3)


@triton.jit(
    do_not_specialize=[
        "first_draw",
        "draws",
        "sign_programs",
        "first_large",
        "first_small",
        "chunks",
        "larger",
        "small",
        "key_low",
        "key_high",
    ]
)
@no_type_check
def draw(
    signs,
    rotations,
    first_draw,
    draws,
    sign_programs,
    first_large,
    first_small,
    chunks,
    larger,
    small,
    key_low,
    key_high,
    LANES: tl.constexpr,
) -> None:
    """Draw what `gather` reads: 32 signs a word, and a rotation a chunk.

    A program draws of block ``program_id(1)`` the signs, or past ``sign_programs`` the
    rotations. In `gather` itself they would be drawn anew by every tile of rows, and
    a draw of 128 signs by every one of the 128 outputs that read one of them.

    Args:
        signs: Words of signs, int32. Shape ``(s, 4 * draws)``.
        rotations: Rotations of chunks, int32. Shape ``(s, chunks)``.
        first_draw: Index of the first draw of signs, int64.
        draws: How many of them.
        sign_programs: How many programs a block's signs take.
        first_large: First chunk of the blocks of ``small + 1`` outputs, int64.
        first_small: First chunk of the blocks of ``small`` outputs, int64.
        chunks: Chunks of a block.
        larger: Number of blocks of ``small + 1`` outputs, which come first.
        small: Outputs of the other blocks.
        key_low: First key word, as an int32.
        key_high: Second key word, as an int32.
        LANES: Draws of a program.
    """
    pid = tl.program_id(0)
    block = tl.program_id(1)
    lane = tl.arange(0, LANES)
    if pid < sign_programs:
        i = pid * LANES + lane
        index = i.to(tl.int64) + first_draw
        w0, w1, w2, w3 = words(index, lane * 0 + block, key_low, key_high, _SIGN)
        to = signs + (block.to(tl.int64) * draws + i) * 4
        tl.store(to, w0.to(tl.int32, bitcast=True), mask=i < draws)
        tl.store(to + 1, w1.to(tl.int32, bitcast=True), mask=i < draws)
        tl.store(to + 2, w2.to(tl.int32, bitcast=True), mask=i < draws)
        tl.store(to + 3, w3.to(tl.int32, bitcast=True), mask=i < draws)
    else:
        j = (pid - sign_programs) * LANES + lane
        wide = (lane * 0 + block) < larger
        size = tl.where(wide, small + 1, small)
        chunk = tl.where(wide, first_large, first_small) + j.to(tl.int64)
        w0, w1, w2, w3 = words(
            chunk >> 2, lane * 0 + block, key_low, key_high, _ROTATION
        )
        word = one_of(w0, w1, w2, w3, (chunk & 3).to(tl.int32))
        turn = (word.to(tl.uint64) * size.to(tl.uint64)) >> 32
        to = rotations + block.to(tl.int64) * chunks + j
        tl.store(to, turn.to(tl.int32), mask=j < chunks)


@triton.jit(
    do_not_specialize=[
        "b",
        "k",
        "p",
        "larger",
        "small",
        "begin_large",
        "begin_small",
        "skip",
        "draws",
        "chunks",
        "per_split",
        "x_row",
    ]
)
@no_type_check
def gather(
    x,
    signs,
    rotations,
    partials,
    b,
    k,
    p,
    larger,
    small,
    begin_large,
    begin_small,
    skip,
    draws,
    chunks,
    per_split,
    x_row,
    x_column,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Sum the coordinates of some chunks for a tile of rows and outputs.

    A tile spans several blocks, so that the coordinates they share are read from memory
    once and come from the L1 cache after that.

    Args:
        x: Gradients of coordinates, in any floating dtype. Shape ``(b, k)``.
        signs: From `draw`. Shape ``(s, 4 * draws)``.
        rotations: From `draw`. Shape ``(s, chunks)``.
        partials: Where the sums go, in ``ACC``, contiguous. Shape ``(splits, b, p)``.
        b: Rows.
        k: Coordinates.
        p: Outputs.
        larger: Number of blocks of ``small + 1`` outputs, which come first.
        small: Outputs of the other blocks.
        begin_large: Column at which the first chunk of a larger block begins; it is
            negative where the chunk begins before ``x``.
        begin_small: The same of the other blocks.
        skip: Signs of the first draw that precede the first column.
        draws: Draws of signs of a block.
        chunks: Chunks of a block.
        per_split: Chunks of a program.
        x_row: Stride of the rows.
        x_column: Stride of the columns.
        ROWS: Rows of a program.
        OUTPUTS: Outputs of a program.
        ACC: Dtype of the sums.
    """
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    boundary = larger * (small + 1)
    wide = outputs < boundary
    size = tl.where(wide, small + 1, small)
    within = tl.where(wide, outputs, outputs - boundary)
    block = tl.where(wide, 0, larger) + within // size
    place = within % size
    first = split * per_split
    begin = tl.where(wide, begin_large, begin_small) + first * size
    turns = rotations + block.to(tl.int64) * chunks
    packed = signs + block.to(tl.int64) * draws * 4
    # Rows past the last read the last: a mask of rows would be a comparison an entry.
    row_starts = x + tl.minimum(rows, b - 1)[:, None].to(tl.int64) * x_row
    written = outputs < p
    sums = tl.zeros((ROWS, OUTPUTS), dtype=ACC)
    for chunk in range(first, tl.minimum(first + per_split, chunks)):
        turn = tl.load(turns + chunk, mask=written, other=0)
        source = place - turn
        source = begin + tl.where(source < 0, source + size, source)
        inside = (source >= 0) & (source < k) & written
        bit = source + skip
        word = tl.load(packed + (bit >> 5), mask=inside, other=0)
        sign = (1 - 2 * ((word >> (bit & 31)) & 1)).to(ACC)
        columns = source.to(tl.int64)[None, :] * x_column
        value = tl.load(row_starts + columns, mask=inside[None, :], other=0.0)
        sums += value.to(ACC) * sign[None, :]
        begin += size
    to = partials + (split.to(tl.int64) * b + rows[:, None]) * p + outputs[None, :]
    tl.store(to, sums, mask=(rows < b)[:, None] & written[None, :])


@triton.jit(
    do_not_specialize=[
        "b",
        "k",
        "p",
        "start",
        "larger",
        "small",
        "blocks",
        "key_low",
        "key_high",
        "x_row",
        "out_row",
    ]
)
@no_type_check
def gather_few(
    x,
    out,
    b,
    k,
    p,
    start,
    larger,
    small,
    blocks,
    key_low,
    key_high,
    x_row,
    x_column,
    out_row,
    out_column,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Add the sketch of a few chunks of coordinates in one launch.

    It draws for itself: a parameter as small as a bias costs its launches, not its
    arithmetic. A program is a tile of rows and of outputs of one block.

    Args:
        x: Gradients of coordinates, in any floating dtype. Shape ``(b, k)``.
        out: What to add to, in ``ACC``. Shape ``(b, p)``.
        b: Rows.
        k: Coordinates.
        p: Outputs.
        start: Position of the first column in the parameter, int64.
        larger: Number of blocks of ``small + 1`` outputs, which come first.
        small: Outputs of the other blocks.
        blocks: Number of blocks.
        key_low: First key word, as an int32.
        key_high: Second key word, as an int32.
        x_row: Stride of the rows.
        x_column: Stride of the columns.
        out_row: Stride of the rows of ``out``.
        out_column: Stride of its columns.
        ROWS: Rows of a program.
        OUTPUTS: Outputs of a program.
        ACC: Dtype of the sums.
    """
    place = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(2)
    size = small + (block < larger).to(tl.int32)
    output = block * small + tl.minimum(block, larger) + place
    row_starts = x + tl.minimum(rows, b - 1)[:, None].to(tl.int64) * x_row
    begin = block.to(tl.int64) * 0 + start
    sums = tl.zeros((ROWS, OUTPUTS), dtype=ACC)
    for chunk in range(begin // size, (begin + k - 1) // size + 1):
        position, sign = _source(chunk, block, place, size, key_low, key_high, ACC)
        source = (position - begin).to(tl.int32)
        inside = (source >= 0) & (source < k) & (place < size)
        columns = source.to(tl.int64)[None, :] * x_column
        value = tl.load(row_starts + columns, mask=inside[None, :], other=0.0)
        sums += value.to(ACC) * sign[None, :]
    to = out + rows[:, None].to(tl.int64) * out_row
    to += output[None, :].to(tl.int64) * out_column
    held = (rows < b)[:, None] & (place < size)[None, :]
    before = tl.load(to, mask=held, other=0.0)
    tl.store(to, before + sums * scale(p, blocks, ACC), mask=held)


@triton.jit(
    do_not_specialize=["b", "w", "p", "larger", "small", "key_low", "key_high", "x_row"]
)
@no_type_check
def gather_segments(
    x,
    order,
    bounds,
    positions,
    partials,
    b,
    w,
    p,
    larger,
    small,
    key_low,
    key_high,
    x_row,
    x_column,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Sum an example's segments for a tile of the outputs of one block.

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
        larger: Number of blocks of ``small + 1`` outputs, which come first.
        small: Outputs of the other blocks.
        key_low: First key word, as an int32.
        key_high: Second key word, as an int32.
        x_row: Stride of the segments.
        x_column: Stride of their coordinates.
        SPLITS: Programs that share an example's segments.
        TILES: Programs that share the outputs of a block.
        OUTPUTS: Outputs of a program.
        ACC: Dtype of the sums.
    """
    example = tl.program_id(1)
    split = tl.program_id(2)
    block = tl.program_id(0) // TILES
    place = tl.program_id(0) % TILES * OUTPUTS + tl.arange(0, OUTPUTS)
    size = small + (block < larger).to(tl.int32)
    output = block * small + tl.minimum(block, larger) + place
    low = tl.load(bounds + example)
    count = tl.load(bounds + example + 1) - low
    sums = tl.zeros((OUTPUTS,), dtype=ACC)
    for at in range(low + count * split // SPLITS, low + count * (split + 1) // SPLITS):
        segment = tl.load(order + at)
        begin = tl.load(positions + segment)
        for chunk in range(begin // size, (begin + w - 1) // size + 1):
            position, sign = _source(chunk, block, place, size, key_low, key_high, ACC)
            source = (position - begin).to(tl.int32)
            inside = (source >= 0) & (source < w) & (place < size)
            at_source = x + segment * x_row + source.to(tl.int64) * x_column
            value = tl.load(at_source, mask=inside, other=0.0)
            sums += value.to(ACC) * sign
    to = partials + (split.to(tl.int64) * b + example) * p + output
    tl.store(to, sums, mask=place < size)


@triton.jit
@no_type_check
def _source(chunk, block, place, size, key_low, key_high, ACC: tl.constexpr):
    """Return which coordinate each place of a block takes of a chunk, and its sign."""
    chunk = block.to(tl.int64) * 0 + chunk
    w0, w1, w2, w3 = words(chunk >> 2, block, key_low, key_high, _ROTATION)
    word = one_of(w0, w1, w2, w3, (chunk & 3).to(tl.int32))
    turn = ((word.to(tl.uint64) * size.to(tl.uint64)) >> 32).to(tl.int32)
    source = place - turn
    source = tl.where(source < 0, source + size, source)
    position = chunk * size + source.to(tl.int64)
    w0, w1, w2, w3 = words(position >> 7, place * 0 + block, key_low, key_high, _SIGN)
    bit = (position & 127).to(tl.int32)
    word = one_of(w0, w1, w2, w3, bit >> 5)
    sign = 1 - 2 * ((word >> (bit & 31).to(tl.uint32)) & 1).to(tl.int32)
    return position, sign.to(ACC)
