"""Gram matrices of rows that are read block by block."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from trak._linalg import RowReader, product, spans
from trak._memory import halved, read_height
from trak._streaming import over_rows

WHAT = "the Gram matrix of the features"

COLUMNS = 4096
"""Most products of a row that are summed in float32 before float64 takes over."""


def gram(
    read: RowReader, n: int, p: int, device: torch.device | str = "cpu"
) -> Float64[Tensor, "q q"]:
    r"""Sum the smaller Gram matrix of the features, in float32 blocks, into float64.

    Only one triangle is computed, ``n * p * q`` multiplications and additions.

    Args:
        read: Reads rows of :math:`X`. Shape ``(n, p)``.
        n: Number of rows.
        p: Number of columns.
        device: Where the rows come to.

    Returns:
        :math:`X X^\top` where ``n <= p``, else :math:`X^\top X`; ``q = min(n, p)``.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0]])
        >>> gram(lambda low, high: rows[low:high], n=2, p=1)
        tensor([[5.]], dtype=torch.float64)
    """
    q = min(n, p)
    total = torch.zeros(q, q, dtype=torch.float64, device=device)
    if n > p:
        for _ in over_rows([read], n, read_height(p), _Adder(total), WHAT):
            pass
    else:
        for low, high in spans(n, read_height(p)):
            _add_block(total, read, low, high)
    mirror(total)
    return total


class _Adder:
    """Adds the Gram matrix of the columns of blocks of rows to the lower triangle."""

    def __init__(self, total: Float64[Tensor, "p p"]) -> None:
        self._total = total

    def __call__(self, low: int, high: int, parts: Iterator[Tensor]) -> None:
        for rows in parts:
            add_gram(self._total, rows)


def add_gram(total: Float64[Tensor, "p p"], rows: Float32[Tensor, "b p"]) -> None:
    """Add the products of the columns of some rows, to the lower triangle.

    What is above the diagonal is not what it should be until :func:`mirror`.

    Args:
        total: Changed in place. Shape ``(p, p)``.
        rows: Rows, at most 8192. Shape ``(b, p)``.
    """
    for low, high in panels(len(total)):
        accumulate(total[low:high, :high], rows[:, low:high].T, rows[:, :high])


def _add_block(
    total: Float64[Tensor, "n n"], read: RowReader, low: int, high: int
) -> None:
    """Fill rows ``low..high`` of a dual Gram matrix up to the diagonal."""
    left = read(low, high)

    def add(start: int, stop: int, parts: Iterator[Tensor]) -> None:
        for right in parts:
            _add_outer(total[low:high, start:stop], left, right)

    for _ in over_rows([read], low, high - low, add, WHAT):
        pass
    for start, stop in panels(high - low):
        panel = total[low + start : low + stop, low : low + stop]
        _add_outer(panel, left[start:stop], left[:stop])


def _add_outer(
    total: Float64[Tensor, "i j"],
    left: Float32[Tensor, "i p"],
    right: Float32[Tensor, "j p"],
) -> None:
    for low, high in spans(left.shape[1], COLUMNS):
        accumulate(total, left[:, low:high], right[:, low:high].T)


def panels(q: int) -> Iterator[tuple[int, int]]:
    """Cut the side of a matrix into 16 panels at most, none below 256.

    With one triangle of panels computed, 16 save 47 % of the products and 8 save 44 %;
    narrower ones run slower than that gains.

    Yields:
        The bounds of each.

    Example:
        >>> list(panels(600))
        [(0, 256), (256, 512), (512, 600)]
    """
    yield from spans(q, max(256, ceil(q / 16)))


def accumulate(
    total: Float64[Tensor, "i j"],
    left: Float[Tensor, "i k"],
    right: Float[Tensor, "k j"],
) -> None:
    """Add a product to a wider matrix; in parts if there is no memory for it at once.

    Args:
        total: Changed in place, and only by whole products. Shape ``(i, j)``.
        left: Left matrix. Shape ``(i, k)``.
        right: Right matrix. Shape ``(k, j)``.

    Raises:
        OutOfMemoryError: If there is no memory for a single entry.
    """
    try:
        part = product(left, right)
    except (RuntimeError, MemoryError) as error:
        axis = 0 if total.shape[0] >= total.shape[1] else 1
        half = halved(total.shape[axis], error, WHAT)
    else:
        total.add_(part)
        return
    if axis == 0:
        accumulate(total[:half], left[:half], right)
        accumulate(total[half:], left[half:], right)
    else:
        accumulate(total[:, :half], left, right[:, :half])
        accumulate(total[:, half:], left, right[:, half:])


def mirror(total: Float64[Tensor, "q q"]) -> None:
    """Copy the lower triangle to the upper one.

    Args:
        total: Changed in place. Shape ``(q, q)``.
    """
    for low, high in panels(len(total)):
        total[:low, low:high] = total[low:high, :low].T
        corner = total[low:high, low:high].tril()
        total[low:high, low:high] = corner + corner.tril(-1).T
