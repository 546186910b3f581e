"""Which back end sums a sketch: asked for by name, or the fastest that proves itself.

A back end is a module of four functions and ``unavailable``. Before its first use in a
process it sketches a small random input, and is used only if that agrees with the same
sketch by torch operations.
"""

from __future__ import annotations

import importlib
import os
import warnings
from enum import Enum
from functools import cache
from typing import Final, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from trak._kernels.plans import PlanCache
from trak._kernels.torch_segments import dense_segments_into, sparse_segments_into
from trak._signs import Key, block_sizes, stream_key
from trak.errors import BackendError, BackendWarning, UnknownNameError

VARIABLE: Final = "TRAK_BACKEND"
"""The environment variable that names the back end where a projector says ``auto``."""

# Rows that fill no vector, coordinates and outputs in no whole chunks, draws or blocks.
_ROWS, _COLUMNS, _OUTPUTS, _NONZEROS, _OFFSET = 5, 1031, 45, 2, 77
# Coordinates that are sketched first: so few may have kernels of their own.
_FEW: Final = 300
# More than any back end keeps of so small an input.
_PLAN_BYTES: Final = 2**20


class Backend(str, Enum):
    """What sums a sketch."""

    auto = "auto"
    """The fastest that can run on the gradients' device."""

    torch = "torch"
    """Torch operations, on any device."""

    native = "native"
    """Compiled kernels, on the CPU."""

    triton = "triton"
    """Triton kernels, on CUDA."""


@runtime_checkable
class Kernels(Protocol):
    """A module that sums sketches."""

    def unavailable(self, device: torch.device) -> str | None:
        """Say why it cannot run on a device; None where it can."""

    def sparse_into(
        self,
        out: Tensor,
        x: Tensor,
        key: Key,
        offset: int,
        sizes: tuple[int, ...],
        plans: PlanCache | None = None,
    ) -> None:
        """Add the sparse sketch of coordinates ``offset..offset + k``.

        What it draws may be kept in ``plans``, for later calls with the same
        coordinates.
        """

    def dense_into(self, out: Tensor, x: Tensor, key: Key, offset: int) -> None:
        """Add the sketch by random signs of coordinates ``offset..offset + k``."""

    def sparse_segments_into(
        self,
        out: Tensor,
        x: Tensor,
        examples: Tensor,
        positions: Tensor,
        key: Key,
        sizes: tuple[int, ...],
    ) -> None:
        """Add the sparse sketch of segments."""

    def dense_segments_into(
        self, out: Tensor, x: Tensor, examples: Tensor, positions: Tensor, key: Key
    ) -> None:
        """Add the sketch by random signs of segments."""


_MODULES: Final = {
    Backend.native: "trak._kernels.native",
    Backend.triton: "trak._kernels.triton_backend",
}
_BY_DEVICE: Final = {"cpu": Backend.native, "cuda": Backend.triton}


def parse_backend(value: str | Backend, what: str = "backend") -> Backend:
    """Parse the name of a back end.

    Args:
        value: The back end or its name.
        what: What named it, for the message.

    Returns:
        The back end.

    Raises:
        UnknownNameError: If there is none of that name.

    Example:
        >>> parse_backend("torch").value
        'torch'
    """
    try:
        return Backend(value)
    except ValueError:
        names = ", ".join(repr(member.value) for member in Backend)
        raise UnknownNameError(
            f"{what} must be one of {names}, got {value!r}"
        ) from None


def choose(backend: Backend, device: torch.device) -> tuple[Backend, Kernels | None]:
    """Choose what sums sketches on a device.

    Args:
        backend: What was asked for. For ``auto``, the environment variable
            ``TRAK_BACKEND`` may name one.
        device: The device of the gradients.

    Returns:
        The back end that is used, and its kernels; None for torch operations. Where
        ``auto`` cannot have the device's own kernels, it warns once of the reason.

    Raises:
        BackendError: If one is asked for by name and cannot run.
        UnknownNameError: If the environment variable names none.
    """
    named = backend
    if backend is Backend.auto:
        named = parse_backend(os.environ.get(VARIABLE) or Backend.auto, VARIABLE)
    if named is Backend.torch:
        return Backend.torch, None
    if named is Backend.auto:
        return _fastest(device)
    reason = problem(named, device)
    if reason is not None:
        hint = "" if backend is named else f" ({VARIABLE} names {named.value})"
        raise BackendError(
            f"the {named.value} kernels cannot run on {device}: {reason}. Use "
            f"backend='auto', or 'torch' for torch operations{hint}"
        )
    return named, _kernels(named)


def _fastest(device: torch.device) -> tuple[Backend, Kernels | None]:
    """Return the device's own kernels, or torch operations, with a warning."""
    candidate = _BY_DEVICE.get(device.type)
    if candidate is None:
        return Backend.torch, None
    reason = problem(candidate, device)
    if reason is None:
        return candidate, _kernels(candidate)
    _warn(
        f"trak's {candidate.value} kernels are not used: {reason}. Sketches are summed "
        f"by torch operations, which give the same numbers in many times the time; "
        f"backend='torch' or {VARIABLE}=torch says that this is meant."
    )
    return Backend.torch, None


def problem(backend: Backend, device: torch.device) -> str | None:
    """Say why a back end cannot be used on a device.

    Args:
        backend: One with kernels of its own.
        device: The device of the gradients.

    Returns:
        The reason; None where it can run and has proved itself, which it does once in
        a process.
    """
    return _problem(backend, str(device))


@cache
def _problem(backend: Backend, device_name: str) -> str | None:
    device = torch.device(device_name)
    try:
        kernels = _kernels(backend)
    except ImportError as error:
        return f"they cannot be imported ({error})"
    return kernels.unavailable(device) or prove(kernels, device)


@cache
def _kernels(backend: Backend) -> Kernels:
    return cast("Kernels", importlib.import_module(_MODULES[backend]))


@cache
def _warn(message: str) -> None:
    """Warn, once for every message."""
    warnings.warn(message, BackendWarning, stacklevel=2)


def prove(kernels: Kernels, device: torch.device) -> str | None:
    """Compare a back end's sketches of a small random input with those of torch.

    Args:
        kernels: The back end.
        device: Where to run it.

    Returns:
        What is wrong; None where all agree.
    """
    generator = torch.Generator().manual_seed(0)
    key = stream_key(0, 0, "proof")
    sizes = block_sizes(_OUTPUTS, _NONZEROS)
    shape = (_ROWS, _COLUMNS)
    x = torch.randn(shape, generator=generator, device="cpu").to(device)
    rows = torch.arange(_ROWS, device=device)
    starts = torch.full((_ROWS,), _OFFSET, device=device)
    wide = torch.zeros(_ROWS, _OUTPUTS, dtype=torch.float64, device=device)
    sparse, dense = wide.clone(), wide.clone()
    sparse_segments_into(sparse, x, rows, starts, key, sizes)
    dense_segments_into(dense, x, rows, starts, key, "rademacher")
    found = [torch.zeros_like(wide, dtype=torch.float32) for _ in range(5)]
    plans = PlanCache(_PLAN_BYTES)
    try:
        kernels.sparse_into(found[0], x[:, :_FEW], key, _OFFSET, sizes)
        kernels.sparse_into(found[0], x[:, _FEW:], key, _OFFSET + _FEW, sizes)
        kernels.sparse_segments_into(found[1], x, rows, starts, key, sizes)
        kernels.dense_into(found[2], x, key, _OFFSET)
        kernels.dense_segments_into(found[3], x, rows, starts, key)
        for _ in range(2):
            kernels.sparse_into(found[4].zero_(), x, key, _OFFSET, sizes, plans)
    except (RuntimeError, TypeError, ValueError, OSError, MemoryError) as error:
        return f"they fail on a small input ({type(error).__name__}: {error})"
    for name, sketch, expected in zip(
        ("sparse", "sparse segment", "dense", "dense segment", "second sparse"),
        found,
        (sparse, sparse, dense, dense, sparse),
        strict=True,
    ):
        distance = float(
            (sketch.double() - expected).abs().max() / expected.abs().max()
        )
        if not distance < 1e-5:
            return (
                f"their {name} sketch of a small random input is {distance:.1e} from "
                f"the one by torch operations"
            )
    return None
