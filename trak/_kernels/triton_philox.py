"""The random words of `trak._signs`, for kernels to draw; imports triton."""

from __future__ import annotations

from typing import Any, no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def words(index, lane, key_low, key_high, DOMAIN: tl.constexpr) -> Any:
    """Draw the four words of each address, as ``draw`` of ``docs/projections.md``.

    Args:
        index: Which draws of each lane, int64 and not negative.
        lane: Outputs or blocks, int32, of the shape of ``index``.
        key_low: First key word, as an int32 of the same bits.
        key_high: Second key word, likewise.
        DOMAIN: What the draw is for.

    Returns:
        Four uint32 tensors of the shape of ``index``.
    """
    # Scalars meet tensors before any conversion: a scalar argument may be a plain
    # Python number, which has none.
    nothing = lane * 0
    c0 = index.to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c2 = lane.to(tl.uint32)
    c3 = (nothing + DOMAIN).to(tl.uint32)
    low = (nothing + key_low).to(tl.uint32)
    high = (nothing + key_high).to(tl.uint32)
    # One product of 64 bits where the halves would take two.
    first_factor = (nothing.to(tl.int64) + 0xD2511F53).to(tl.uint64)
    second_factor = (nothing.to(tl.int64) + 0xCD9E8D57).to(tl.uint64)
    for _ in tl.static_range(7):
        first = c0.to(tl.uint64) * first_factor
        second = c2.to(tl.uint64) * second_factor
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ low
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ high
        c1 = second.to(tl.uint32)
        c3 = first.to(tl.uint32)
        low += 0x9E3779B9
        high += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
@no_type_check
def one_of(w0, w1, w2, w3, which) -> Any:
    """Return word ``which`` of four, elementwise."""
    return tl.where(
        which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3))
    )
