"""The triton back end: whether it can be used, and its functions.

Triton is imported where a function of it is called, never where this module is: the
import takes a second, and most installations of it have no GPU.
"""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trak._kernels.plans import PlanCache
from trak._signs import Key
from trak.errors import BackendError

# The first with bfloat16 matrix units; triton compiles for none before it.
_OLDEST: Final = (8, 0)


def unavailable(device: torch.device) -> str | None:
    """Say why the kernels cannot run on a device.

    Args:
        device: Where the gradients are.

    Returns:
        The reason, or None if they can.
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return _missing()
    if device.type != "cuda":
        return f"triton kernels need a CUDA device, got {str(device)!r}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "triton kernels need CUDA, which this torch cannot use here"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return (
            f"triton kernels need a GPU of compute capability 8.0 or above, got "
            f"{capability[0]}.{capability[1]}"
        )
    return _missing()


def sparse_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "b k"],
    key: Key,
    offset: int,
    sizes: tuple[int, ...],
    plans: PlanCache | None = None,
) -> None:
    """Add the sparse sketch of some coordinates of one parameter.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the coordinates, in any floating dtype. Shape ``(b, k)``.
        key: The stream's key.
        offset: Position of the first column in the parameter.
        sizes: Outputs of each block.
        plans: Nothing is kept: a GPU draws signs in less time than it waits for rows.

    Raises:
        BackendError: If triton cannot compile or launch the kernels.
    """
    with _launching("sparse") as launch:
        launch.sparse_into(out, x, key, offset, sizes)


def dense_into(
    out: Float[Tensor, "b p"], x: Float[Tensor, "b k"], key: Key, offset: int
) -> None:
    """Add the dense sign sketch of some coordinates of one parameter.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the coordinates, in any floating dtype. Shape ``(b, k)``.
        key: The stream's key.
        offset: Position of the first column in the parameter.

    Raises:
        BackendError: If triton cannot compile or launch the kernels.
    """
    with _launching("dense") as launch:
        launch.dense_into(out, x, key, offset)


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

    Raises:
        BackendError: If triton cannot compile or launch the kernels.
    """
    with _launching("sparse") as launch:
        launch.sparse_segments_into(out, x, examples, positions, key, sizes)


def dense_segments_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "k w"],
    examples: Int[Tensor, " k"],
    positions: Int[Tensor, " k"],
    key: Key,
) -> None:
    """Add the dense sign sketch of segments of one parameter.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the segments, in any floating dtype. Shape ``(k, w)``.
        examples: Which example each segment is of, int64. Shape ``(k,)``.
        positions: Position of each segment's first coordinate, int64. Shape ``(k,)``.
        key: The stream's key.

    Raises:
        BackendError: If triton cannot compile or launch the kernels.
    """
    with _launching("dense") as launch:
        launch.dense_segments_into(out, x, examples, positions, key)


@contextmanager
def _launching(sketch: str) -> Iterator[Any]:
    """Give the module that launches the kernels of a sketch.

    Yields:
        The module.

    Raises:
        BackendError: If triton cannot compile or launch them.
    """
    launch = importlib.import_module(f"trak._kernels.triton_{sketch}_launch")
    problems = importlib.import_module("triton.errors").TritonError
    try:
        yield launch
    # Triton runs a compiler of C, and its own assembler.
    except (problems, subprocess.SubprocessError) as error:
        raise BackendError(
            f"triton cannot compile or launch the {sketch} kernels here "
            f"({type(error).__name__}: {error}); sum by torch operations with "
            f"backend='torch' or TRAK_BACKEND=torch"
        ) from error


def _missing() -> str | None:
    """Say why triton cannot be imported, if it cannot."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); `pip install triton` installs it"
    return None
