"""The native CPU kernels, loaded with ctypes: arguments checked and passed, no more.

``native.c`` has the arithmetic. It is compiled when trak is installed, if there is a
compiler then; ``unavailable`` says where it was not.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trak._kernels.plans import PlanCache
from trak._signs import Key
from trak.errors import BackendError

SOURCES: Final = (
    "native.c",
    "native.h",
    "native_dense.h",
    "native_scatter.h",
    "native_variants.h",
)
"""What the library is compiled from; ``setup.py`` puts their digest into it."""

_LIBRARY: Final = "_native.so"
# In the order of native.c's enum.
_TYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Variant(IntEnum):
    """The instruction sets that the kernels are compiled for."""

    portable = 0
    avx2 = 1
    avx512 = 2


class _Task(ctypes.Structure):
    """The arguments of a kernel, as native.c declares them."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("out_type", ctypes.c_int64),
        ("p", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("x_step", ctypes.c_int64),
        ("x_type", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("out_rows", ctypes.c_int64),
        ("examples", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("key_low", ctypes.c_int64),
        ("key_high", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("variant", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("plan", ctypes.c_void_p),
        ("is_drawn", ctypes.c_int64),
    )


def unavailable(device: torch.device) -> str | None:
    """Say why the kernels cannot run on a device.

    Args:
        device: The device of the gradients.

    Returns:
        The reason; None where they can.
    """
    if device.type != "cpu":
        return f"they run on the CPU, not on {device.type}"
    loaded = _load(_LIBRARY)
    return loaded if isinstance(loaded, str) else None


def variant() -> Variant:
    """Tell which instruction set the kernels use on this processor.

    Returns:
        The most advanced one that it has; results do not depend on it.

    Raises:
        BackendError: If the library cannot be loaded.
    """
    return Variant(_library().trak_best_variant())


def sparse_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "b k"],
    key: Key,
    offset: int,
    sizes: Sequence[int],
    plans: PlanCache | None = None,
) -> None:
    """Add the sparse sketch of some coordinates of one parameter.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the coordinates, of any floating dtype and strides. Shape
            ``(b, k)``.
        key: The stream's key.
        offset: Position of the first column in the parameter.
        sizes: Sizes of the sketch's blocks, from `trak._signs.block_sizes`.
        plans: Where to keep what is drawn; None to draw it every time.
    """
    _run("trak_sparse", out, x, key, offset=offset, blocks=len(sizes), plans=plans)


def dense_into(
    out: Float[Tensor, "b p"], x: Float[Tensor, "b k"], key: Key, offset: int
) -> None:
    """Add the dense sketch, of random signs, of some coordinates of one parameter.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the coordinates, of any floating dtype and strides. Shape
            ``(b, k)``.
        key: The stream's key.
        offset: Position of the first column in the parameter.
    """
    rows = torch.arange(len(x), device="cpu")
    _run("trak_dense", out, x, key, offset=offset, order=rows)


def sparse_segments_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "k w"],
    examples: Int[Tensor, " k"],
    positions: Int[Tensor, " k"],
    key: Key,
    sizes: Sequence[int],
) -> None:
    """Add the sparse sketch of segments of one parameter.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the segments' coordinates. Shape ``(k, w)``.
        examples: Row of ``out`` that each segment is added to, int64, in range. Shape
            ``(k,)``.
        positions: First coordinate of each segment, int64. Shape ``(k,)``.
        key: The stream's key.
        sizes: Sizes of the sketch's blocks, from `trak._signs.block_sizes`.
    """
    _run(
        "trak_sparse_segments",
        out,
        x,
        key,
        blocks=len(sizes),
        examples=examples,
        positions=positions,
    )


def dense_segments_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "k w"],
    examples: Int[Tensor, " k"],
    positions: Int[Tensor, " k"],
    key: Key,
) -> None:
    """Add the dense sketch, of random signs, of segments of one parameter.

    Segments of one position share its signs, so they are taken together.

    Args:
        out: Sketch to add to, float32 or float64; sums run in its dtype. Shape
            ``(b, p)``.
        x: Gradients of the segments' coordinates. Shape ``(k, w)``.
        examples: Row of ``out`` that each segment is added to, int64, in range. Shape
            ``(k,)``.
        positions: First coordinate of each segment, int64. Shape ``(k,)``.
        key: The stream's key.
    """
    _run(
        "trak_dense",
        out,
        x,
        key,
        examples=examples,
        positions=positions,
        order=positions.argsort(stable=True),
    )


def _run(
    kernel: str,
    out: Tensor,
    x: Tensor,
    key: Key,
    *,
    offset: int = 0,
    blocks: int = 0,
    examples: Tensor | None = None,
    positions: Tensor | None = None,
    order: Tensor | None = None,
    plans: PlanCache | None = None,
    chosen: Variant | None = None,
) -> None:
    """Call a kernel of the library.

    Raises:
        MemoryError: If the kernel could not set its memory aside.
    """
    if x.numel() == 0:
        return
    if out.stride(1) != 1 or (len(out) > 1 and out.stride(0) < out.shape[1]):
        # Rows of out may overlap or be spread; sums want neither.
        total = out.new_zeros(out.shape)
        _run(
            kernel,
            total,
            x,
            key,
            offset=offset,
            blocks=blocks,
            examples=examples,
            positions=positions,
            order=order,
            plans=plans,
            chosen=chosen,
        )
        out.add_(total)
        return
    library = _library()
    if x.dtype not in _TYPES:
        x = x.float()
    # The kernels read plain memory, and keep their own references to nothing.
    x = x.resolve_neg()
    index = [t.contiguous() if t is not None else None for t in (examples, positions)]
    task = _Task(
        out=out.data_ptr(),
        out_stride=out.stride(0),
        out_type=_TYPES.index(out.dtype),
        p=out.shape[1],
        x=x.data_ptr(),
        x_stride=x.stride(0),
        x_step=x.stride(1),
        x_type=_TYPES.index(x.dtype),
        rows=len(x),
        columns=x.shape[1],
        offset=offset,
        blocks=blocks,
        out_rows=len(out),
        examples=_address(index[0]),
        positions=_address(index[1]),
        order=_address(order),
        key_low=key.low,
        key_high=key.high,
        threads=_threads(x.numel() * (blocks or out.shape[1] // 16 + 1)),
        variant=library.trak_best_variant() if chosen is None else chosen,
        scale=math.sqrt(out.shape[1] / max(1, blocks)),
    )
    plan = None if plans is None else _take_plan(plans, task)
    if getattr(library, kernel)(ctypes.byref(task)):
        raise MemoryError(
            f"the native kernels found no memory to sketch gradients of shape "
            f"{tuple(x.shape)} to {out.shape[1]} outputs; use a smaller batch"
        )
    if plan is not None and plans is not None and not task.is_drawn:
        plans.keep(_address_of_plan(task), plan, plan.nbytes)


def _take_plan(plans: PlanCache, task: _Task) -> Tensor | None:
    """Give a sparse sketch its plan, or the memory for one that is worth keeping.

    Returns:
        The plan, to be kept while the kernel runs; None where it needs none.
    """
    plan: Tensor | None = plans.get(_address_of_plan(task))
    task.is_drawn = plan is not None
    if plan is None:
        size = _library().trak_sparse_plan_bytes(ctypes.byref(task))
        if size == 0 or not plans.has_room(size):
            return None
        plan = torch.empty(size, dtype=torch.uint8, device="cpu")
    task.plan = plan.data_ptr()
    return plan


def _address_of_plan(task: _Task) -> tuple[int, ...]:
    """Return all that a plan depends on."""
    return (
        task.key_low,
        task.key_high,
        task.offset,
        task.columns,
        task.p,
        task.blocks,
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(additions: int) -> int:
    """Return how many threads are worth starting.

    Those of torch spin for a while after each of its operations and keep the processors
    busy, so another thread pays only where it works for several milliseconds.
    """
    return max(1, min(torch.get_num_threads(), additions >> 24))


def _library() -> ctypes.CDLL:
    """Return the library.

    Raises:
        BackendError: If it cannot be loaded.
    """
    loaded = _load(_LIBRARY)
    if isinstance(loaded, str):
        raise BackendError(f"the native kernels cannot run: {loaded}")
    return loaded


@cache
def _load(name: str) -> ctypes.CDLL | str:
    """Load the library, or say why it cannot be."""
    path = Path(__file__).parent / name
    if not path.exists():
        return (
            "they were not compiled when trak was installed. Install a C compiler "
            "(gcc or clang) and then trak again, which says what is wrong if given "
            "--verbose"
        )
    try:
        library = ctypes.CDLL(str(path))
        library.trak_sources.restype = ctypes.c_uint64
        current = library.trak_sources() == digest()
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded ({error}); install trak again"
    if not current:
        return f"{path} was compiled from other sources; install trak again"
    names = ("best_variant", "sparse", "sparse_segments", "dense", "sparse_plan_bytes")
    for name in names:
        getattr(library, f"trak_{name}").restype = ctypes.c_int64
    return library


def digest() -> int:
    """Return the digest of the C sources, as ``setup.py`` puts it into the library."""
    directory = Path(__file__).parent
    content = b"".join((directory / name).read_bytes() for name in SOURCES)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
