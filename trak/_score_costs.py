"""What finalizing and scoring cost, as functions of the sizes: bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass

from trak._linalg import TILE

_FLOAT, _DOUBLE = 4, 8


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage takes."""

    device: int
    """Most bytes at once where the products are made."""

    host: int
    """Most bytes at once in main memory besides, wherever the products are made."""

    float32: float
    """Floating-point operations in float32, a multiplication and an addition each."""

    float64: float
    """The same in float64."""

    entries: float
    """Entries of stored rows that are read and widened, or compared."""


def finalize_cost(n: int, p: int) -> Cost:
    """Give the cost of finalizing one checkpoint.

    Args:
        n: Training examples.
        p: Projected entries.

    Returns:
        The cost.
    """
    q = min(n, p)
    rows = min(n, max(1, TILE // p)) * p
    gram = rows * _FLOAT + q * q * (2 * _DOUBLE + _FLOAT)
    return Cost(
        device=max(gram, 3 * _DOUBLE * q * q),
        host=2 * rows,
        float32=2.0 * n * p * q / (1 if n > p else 2),
        float64=q**3 / 3 + 200.0 * q * q,
        entries=2.0 * n * p,
    )


def scores_cost(n: int, m: int, p: int, c: int) -> Cost:
    """Give the cost of all scores of an experiment.

    Args:
        n: Training examples.
        m: Targets.
        p: Projected entries.
        c: Checkpoints.

    Returns:
        The cost.
    """
    q = min(n, p)
    width = min(m, max(1, TILE // (q * c)))
    height = min(n, max(1, TILE // max(p, width)))
    solve = 3 * _DOUBLE * q * q + 2 * _DOUBLE * q * width + _FLOAT * p * width
    tile = _FLOAT * height * p + 3 * _FLOAT * height * width
    tiles = -(-m // width)
    return Cost(
        device=c * _FLOAT * q * width + max(solve, tile),
        host=2 * height * p,
        float32=2.0 * n * m * p * c,
        float64=c * (tiles * (q**3 / 3 + 200.0 * q * q) + 2.0 * q * q * m),
        entries=float(tiles) * n * p * c + n * m,
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
