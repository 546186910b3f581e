"""What finalizing and scoring cost, as functions of the sizes: bytes and operations.

The tiles are those of the code that does the work, where there is memory for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from trak._gram import panels
from trak._linalg import spans
from trak._memory import TILE, read_height, score_height, score_width

_FLOAT, _DOUBLE = 4, 8

_SIFTING = 8
"""Bytes for each score of the first block of ``top_k``, to find the best of it; ..."""

_PACKING = 20
"""... where all of them are."""

_KEPT = 40
"""Bytes for each result of ``top_k``."""

_PACKED = 1 << 23
"""Bytes that a product takes for rearranged pieces of its factors."""

_CONDITION = 10
"""What estimating the condition number of a kernel takes, in passes over it that are as
slow as those over rows."""

_FACTOR = 3
"""How much slower a factorisation runs than products; at 2048 rows on two CPU cores."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage takes."""

    device: int
    """Most bytes at once where the products are made."""

    host: int
    """Most bytes at once in main memory besides, wherever the products are made."""

    float32: float
    """Floating-point operations in float32; a multiplication and an addition are two."""

    float64: float
    """The same in float64."""

    entries: float
    """Entries that are read, widened, summed or compared, apart from products."""


def finalize_cost(n: int, p: int) -> Cost:
    """Give the cost of finalizing one checkpoint.

    Args:
        n: Training examples.
        p: Projected entries.

    Returns:
        The cost.
    """
    q, height = min(n, p), min(n, read_height(p))
    if n > p:
        tiles = height * p + _widest(q) * q
        float32 = 2.0 * n * _triangle(p)
        entries = n * p + n / height * _triangle(p)
    else:
        tiles = min(2 * height, n) * p + height * height
        blocks = [*spans(n, height)]
        whole = sum((high - low) * low for low, high in blocks)
        float32 = 2.0 * p * (whole + sum(_triangle(hi - lo) for lo, hi in blocks))
        entries = n * p * (len(blocks) + 1) / 2 + p / height * q * q / 2
    return Cost(
        device=_DOUBLE * q * q
        + max(_FLOAT * tiles, 2 * _DOUBLE * q * q)
        + min(_PACKED, _FLOAT * height * p),
        host=0,
        float32=float32,
        float64=_FACTOR * q**3 / 3,
        entries=entries + _CONDITION * q * q,
    )


def scores_cost(n: int, m: int, p: int, c: int, k: int = 0) -> Cost:
    """Give the cost of all scores of an experiment.

    Args:
        n: Training examples.
        m: Targets.
        p: Projected entries.
        c: Checkpoints.
        k: Examples for each target that ``top_k`` keeps; 0 if all are written.

    Returns:
        The cost.
    """
    q, is_dual = min(n, p), n <= p
    width = min(m, score_width(p, c))
    rights = c * (n if is_dual else p) * width * _FLOAT
    part = min(width, max(1, TILE // p))
    solved = part * q * (_FLOAT + 2 * _DOUBLE)
    if is_dual:
        solved = max(solved, part * (p + 2 * n) * _FLOAT)
    kernel = _DOUBLE * q * q
    height = min(n, score_height(p, width))
    tile = (2 * height * width + (0 if is_dual else height * p)) * _FLOAT
    packing = (_PACKING if k >= height else _SIFTING) * height * width if k else 0
    tiles = -(-m // width)
    return Cost(
        device=rights
        + max(3 * kernel, kernel + solved, tile + packing)
        + min(_PACKED, _FLOAT * p * width),
        host=_KEPT * m * k,
        float32=2.0 * n * m * p * c,
        float64=c * (_FACTOR * tiles * q**3 / 3 + 2.0 * q * q * m),
        entries=float(tiles * n * p * c + 2 * n * m),
    )


def whole_cost(n: int, m: int, p: int, c: int) -> Cost:
    """Give the cost of a stage of a score computer that takes whole matrices.

    Args:
        n: Training examples.
        m: Targets; 0 while finalizing.
        p: Projected entries.
        c: Checkpoints.

    Returns:
        The cost.
    """
    return Cost(
        device=_FLOAT * (2 * n * p + 2 * p * p + m * p),
        host=_FLOAT * n * m,
        float32=2.0 * n * p * (m * c if m else 2 * p),
        float64=0.0,
        entries=float(n * p * c + n * m),
    )


def _widest(q: int) -> int:
    return max((high - low for low, high in panels(q)), default=0)


def _triangle(q: int) -> int:
    """Count the entries of a triangle of panels."""
    return sum((high - low) * high for low, high in panels(q))
