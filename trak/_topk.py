"""The best of every column of a matrix that arrives in blocks of rows."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

GROUP = 16
"""Rows of which the best is looked at before any other."""

LAST = 0xFFFFFFFF
"""The largest row number there may be."""


class TopK:
    """The k best of every column of a matrix that arrives in blocks of rows.

    Of each 16 rows the best is compared with the k-th best so far, which costs one pass
    over a block; only what is better is kept, and sorted when there is as much of it as
    there are results. Of equal values the one in the lower row is better.

    Args:
        k: How many of each column.
        columns: Number of columns, ``m``.
        largest: Whether large values are good; else small ones are.
    """

    def __init__(self, k: int, columns: int, *, largest: bool = True) -> None:
        self._k = k
        self._sign = 1.0 if largest else -1.0
        # One row for each column of the matrix: the keys of the best, the least first, ...
        self._best = np.empty((columns, 0), np.int64)
        # ... and of what was better since then, unsorted, after which there are zeros.
        self._better = np.empty((columns, 0), np.int64)
        self._counts = np.zeros(columns, np.int64)

    @property
    def values(self) -> Float32[Tensor, "k m"]:
        """The best values, best first, on the CPU; fewer while there are fewer rows."""
        return torch.from_numpy(self._sorted()[0] * np.float32(self._sign))

    @property
    def indices(self) -> Int64[Tensor, "k m"]:
        """The rows that they are in."""
        return torch.from_numpy(self._sorted()[1])

    def update(self, block: Float[Tensor, "rows m"], first_row: int) -> None:
        """Take the next rows into account.

        Args:
            block: Consecutive rows, all finite; not changed. Shape ``(rows, m)``.
            first_row: The matrix row that the block begins with; later blocks begin
                with larger ones.
        """
        if not len(block):
            return
        block = block.float() if self._sign > 0 else -block.float()
        is_short = len(block) <= self._k and self._best.shape[1] < self._k
        if is_short or not block.numel():
            rows = np.arange(first_row, first_row + len(block))
            self._append(pack(block.T.contiguous().cpu().numpy(), rows))
        else:
            bar = torch.from_numpy(self._bar(block)).to(block.device)
            column, row, values = better(block.contiguous(), bar)
            if len(column):
                self._keep(column, pack(values, row + first_row))
            if self._best.shape[1] < self._k:
                self._merge()

    def _bar(self, block: Float32[Tensor, "rows m"]) -> np.ndarray:
        """Give what an entry must be above to be among the best of its column."""
        if self._best.shape[1] == self._k:
            known, _ = unpack(self._best[:, 0])
            return known
        # None is known yet. What is not among the best of the block is not, anyway.
        columns = block.T.contiguous().cpu().numpy()
        kth = columns.shape[1] - self._k
        least = np.partition(columns, kth, axis=1)[:, kth]
        below: np.ndarray = np.nextafter(least, np.float32(-np.inf))
        return below

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        self._merge()
        return unpack(np.sort(self._best, axis=1)[:, ::-1].T)

    def _keep(self, column: np.ndarray, keys: np.ndarray) -> None:
        """Put keys, which are in the order of their columns, behind those kept."""
        found = np.bincount(column, minlength=len(self._counts))
        if int((self._counts + found).max()) > self._better.shape[1]:
            self._merge()
            width = max(self._k, int(found.max()))
            self._better = np.full((len(self._counts), width), np.iinfo(np.int64).min)
        first = np.cumsum(found) - found - self._counts
        self._better[column, np.arange(len(column)) - first[column]] = keys
        self._counts += found

    def _merge(self) -> None:
        """Sort what was kept into the best."""
        used = int(self._counts.max(initial=0))
        if used:
            self._append(self._better[:, :used])
            self._better[:, :used] = np.iinfo(np.int64).min
            self._counts[:] = 0

    def _append(self, keys: np.ndarray) -> None:
        keys = np.concatenate([self._best, keys], axis=1)
        keys.partition(max(0, keys.shape[1] - self._k), axis=1)
        self._best = keys[:, -self._k :].copy()


def better(
    block: Float32[Tensor, "rows m"], bar: Float32[Tensor, " m"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the entries that are above the bar of their column.

    Args:
        block: A matrix, contiguous. Shape ``(rows, m)``.
        bar: Bars, on its device. Shape ``(m,)``.

    Returns:
        Columns, rows and values of the entries, in the order of the columns.

    Example:
        >>> better(torch.tensor([[1.0, 5.0], [2.0, 6.0]]), torch.tensor([1.5, 5.5]))
        (array([0, 1]), array([1, 1]), array([2., 6.], dtype=float32))
    """
    rows, m = block.shape
    whole = rows - rows % GROUP
    peaks = block[:whole].view(-1, GROUP, m).amax(dim=1)
    column, group = _above(peaks, bar)
    if (
        len(column) * 32 * GROUP > block.numel()
    ):  # so many that looking at all is quicker
        column, row = _above(block, bar)
    else:
        row = (
            group[:, None] * GROUP + torch.arange(GROUP, device=block.device)
        ).ravel()
        column = column.repeat_interleave(GROUP)
        chosen = block.take(row * m + column) > bar.take(column)
        column, row = column[chosen], row[chosen]
        late, tail = _above(block[whole:], bar)
        column, order = torch.cat([column, late]).sort(stable=True)
        row = torch.cat([row, tail + whole])[order]
    values = block.take(row * m + column)
    return column.cpu().numpy(), row.cpu().numpy(), values.cpu().numpy()


def _above(
    block: Float32[Tensor, "rows m"], bar: Float32[Tensor, " m"]
) -> tuple[Int64[Tensor, " w"], Int64[Tensor, " w"]]:
    """Give columns and rows of what is above the bar, in the order of the columns."""
    rows = max(len(block), 1)
    if block.device.type == "cpu":  # NumPy is three times as fast as torch 2.13 here
        mask = np.ascontiguousarray((block.numpy() > bar.numpy()).T)
        found = torch.from_numpy(np.flatnonzero(mask))
    else:
        found = (block > bar).T.reshape(-1).nonzero()[:, 0]
    column = found.div(rows, rounding_mode="floor")
    return column, found - column * rows


def pack(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Make integers that are in the order of values and, for equal ones, against rows.

    Args:
        values: Finite values, in float32.
        rows: Row numbers below 2**32, which go with the last axis of the values.

    Returns:
        The integers, of 64 bits, in the shape of the values.

    Example:
        >>> keys = pack(np.float32([1.0, -2.0, 1.0]), np.arange(3))
        >>> unpack(np.sort(keys))
        (array([-2.,  1.,  1.], dtype=float32), array([1, 2, 0]))
    """
    bits = (values + np.float32(0)).view(np.int32)  # and no negative zero
    keys: np.ndarray = (_flipped(bits).astype(np.int64) << 32) | (LAST - rows)
    return keys


def unpack(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undo :func:`pack`.

    Returns:
        The values and the rows.
    """
    values: np.ndarray = _flipped((keys >> 32).astype(np.int32)).view(np.float32)
    return values, LAST - (keys & LAST)


def _flipped(bits: np.ndarray) -> np.ndarray:
    """Turn the bits of floats into integers of the same order, and back."""
    flipped: np.ndarray = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return flipped
