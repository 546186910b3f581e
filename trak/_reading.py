"""From arrays of the store to rows of floats on the working device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from trak._linalg import decode_half, spans

PAGE = 4096
"""Bytes of which one must be looked at for all to come into memory; or more."""

CACHED = 1 << 20
"""Entries that are scaled at once, so that they are still in the cache."""


class Fetched(NamedTuple):
    """Stored rows that are in memory, or nearly so."""

    low: int
    """The first one's number."""

    rows: Any
    """As they are stored."""

    exponents: np.ndarray | None
    """Powers of two to multiply them with."""


class StoredRows:
    """Rows of an array as float32, each with its power of two.

    Args:
        array: Rows: an array or a tensor, of any type. Shape ``(n, p)``.
        exponents: Powers of two, or None. Shape ``(n, 1)``.
        device: Where the rows are wanted.
        look: Is called with ``(low, rows)`` for every block that is read.
        weights: What each row is multiplied with, after that; None for 1.
    """

    def __init__(
        self,
        array: Any,
        exponents: Any,
        device: torch.device,
        look: Callable[[int, Tensor], None] | None = None,
        weights: Float32[np.ndarray, " n"] | None = None,
    ) -> None:
        self._array = array
        self._exponents = exponents
        self._device = device
        self._look = look
        self._weights = None
        if weights is not None:
            self._weights = torch.from_numpy(weights).to(device)[:, None]

    def __call__(self, low: int, high: int) -> Float32[Tensor, "b p"]:
        """Read rows ``low..high``, into memory of their own."""
        out = self.buffer(high - low)
        self.decode(self.fetch(low, high), out)
        return out

    def buffer(self, height: int) -> Float32[Tensor, "height p"]:
        """Give a place for the rows of a block, on their device."""
        p = self._array.shape[1]
        return torch.empty(height, p, dtype=torch.float32, device=self._device)

    def fetch(self, low: int, high: int) -> Fetched:
        """Bring rows into memory, without copying those that are mapped from a file."""
        rows = self._array[low:high]
        if isinstance(rows, np.ndarray) and rows.flags.c_contiguous and rows.size:
            # The maximum is not wanted: a byte of every page is looked at, so that
            # whoever computes need not wait for the disk.
            rows.reshape(-1).view(np.uint8)[::PAGE].max()
        exponents = self._exponents
        if exponents is not None:
            exponents = np.array(exponents[low:high]).reshape(-1)
        return Fetched(low, rows, exponents)

    def decode(self, fetched: Fetched, out: Float32[Tensor, "b p"]) -> None:
        """Put fetched rows into a place as float32: no tensor aliases a file."""
        rows, exponents = _as_tensor(fetched.rows), fetched.exponents
        if exponents is None or not exponents.any():
            out.copy_(rows.to(out.device))  # and converted there
        else:
            for low, high in spans(len(rows), max(1, CACHED // max(out.shape[1], 1))):
                part = torch.from_numpy(exponents[low:high]).to(out.device)
                decode_half(rows[low:high].to(out.device), part, out[low:high])
        if self._look is not None:
            self._look(fetched.low, out)
        if self._weights is not None:
            out.mul_(self._weights[fetched.low : fetched.low + len(out)])


def read_rows(
    store: Mapping[str, Any],
    prefix: str,
    device: torch.device,
    look: Callable[[int, Tensor], None] | None = None,
    weights: Float32[np.ndarray, " n"] | None = None,
) -> StoredRows:
    """Make a reader of projected gradients.

    Args:
        store: The saver's current arrays.
        prefix: ``""`` for training rows, ``"{exp}_"`` for targets.
        device: Where the rows are wanted.
        look: Is called with ``(low, rows)`` for every block that is read.
        weights: What each row is multiplied with, after that; None for 1.

    Returns:
        ``read(low, high)``, which gives float32 rows of shape ``(high - low, p)``.
    """
    exponents = store.get(f"{prefix}grads_exponent")
    return StoredRows(store[f"{prefix}grads"], exponents, device, look, weights)


def read_array(array: Any, device: torch.device) -> StoredRows:
    """Make a reader of the rows of any array, as float32."""
    return StoredRows(array, None, device)


def _as_tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    array = np.asarray(array)
    if not array.flags.writeable or min(array.strides) < 0:
        array = np.array(array, order="C")  # from_numpy does not take the others
    return torch.from_numpy(array)


class ZeroRows:
    """Notes which rows are zero while they pass by, in any order, once or more.

    Args:
        n: Number of rows.
    """

    def __init__(self, n: int) -> None:
        self._zero: Bool[Tensor, " n"] = torch.zeros(n, dtype=torch.bool, device="cpu")
        self._seen = torch.zeros(n, dtype=torch.bool, device="cpu")

    def __call__(self, low: int, rows: Float32[Tensor, "b p"]) -> None:
        """Look at rows ``low``, ``low + 1``, ..."""
        self._seen[low : low + len(rows)] = True
        # Only rows that begin with a zero are looked at further: one entry of each is
        # read, and not all.
        candidates = (rows[:, 0] == 0).nonzero()[:, 0]
        if len(candidates):
            is_zero = (rows[candidates] == 0).all(dim=1)
            self._zero[low + candidates[is_zero].cpu()] = True

    @property
    def is_complete(self) -> bool:
        """Whether every row was seen."""
        return bool(self._seen.all())

    @property
    def count(self) -> int:
        """How many are zero."""
        return int(self._zero.sum())
