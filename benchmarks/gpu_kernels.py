"""The kernels' part of ``gpu.py``: what is compared with float64, and what is timed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak._kernels import triton_backend
from trak._signs import (
    block_sizes,
    dense_signs,
    sparse_rotations,
    sparse_signs,
    stream_key,
)
from trak.errors import TrakError
from trak.projectors import CudaProjector

KEY = stream_key(0, 0, "weight")
NONZEROS = 4
VOCABULARY = 30522
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Float32 sums of 1e5 and more terms; a wrong sign or place is an error of order one.
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    checked: tuple[tuple[int, int, int, int], ...]
    """Rows, coordinates, outputs and position of what is compared with float64."""

    timed: tuple[tuple[int, int, int], ...]
    """Rows, coordinates and outputs of what is timed."""

    segments: tuple[int, int, int, int]
    """Segments, their coordinates, examples and outputs."""

    subjects: tuple[str, ...]
    """Models that are featurized."""

    batch: int
    copied: int
    """Bytes of the buffer that is copied to measure memory."""

    side: int
    """Of the square matrices that are multiplied."""

    repeats: int


FULL = Sizes(
    checked=(
        (1, 10, 512, 3),
        (3, 5_000, 2048, 0),
        (33, 300_001, 2048, 77),
        (64, 2_300_032, 2048, 2**33 + 5),
        (5, 100_003, 1000, 127),
        (70, 40_000, 4096, 1),
        (2, 20_000_000, 512, 0),
    ),
    timed=(
        (32, 2_300_032, 2048),
        (256, 2_300_032, 2048),
        (32, 100_000_000, 2048),
        (64, 100_000_000, 4096),
        (8, 100_000_000, 16384),
    ),
    segments=(32 * 512, 768, 32, 2048),
    subjects=("resnet9", "resnet18", "minilm"),
    batch=64,
    copied=4 * 2**30,
    side=8192,
    repeats=20,
)
SMOKE = Sizes(
    checked=((3, 40, 64, 3), (2, 400, 64, 2**40 + 5)),
    timed=((2, 300, 64),),
    segments=(4, 24, 2, 64),
    subjects=("resnet9",),
    batch=2,
    copied=2**20,
    side=64,
    repeats=1,
)


class Clock:
    """Times calls on a device, by events where it has them."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats

    def __call__(self, call: Callable[[int], object]) -> float:
        """Return the median milliseconds of a call that is given its number."""
        warm = 3 if self.device.type == "cuda" else 0
        times = [self._one(call, i) for i in range(warm + self.repeats)]
        return statistics.median(times[warm:])

    def _one(self, call: Callable[[int], object], i: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call(i)
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def check(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Compare the kernels with float64 sums; yields a line a result."""
    print("\nagainst float64, relative error of the whole batch")
    for b, k, p, offset in sizes.checked:
        for name, dtype in DTYPES.items():
            x = random((b, k), dtype, device)
            for law in ("sparse", "dense"):
                wanted = reference(law, x, p, offset)
                out, again, alone = (
                    torch.zeros(rows, p, device=device) for rows in (b, b, 1)
                )
                run(law, out, x, offset)
                run(law, again, x, offset)
                run(law, alone, x[-1:], offset)
                yield {
                    "sketch": law,
                    "b": b,
                    "d": k,
                    "p": p,
                    "at": offset,
                    "dtype": name,
                    **verdict(out, wanted),
                    "repeated": torch.equal(out, again),
                    "independent of the batch": torch.equal(out[-1:], alone),
                }
    yield from check_segments(device, sizes)


def check_segments(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    k, w, b, p = sizes.segments
    x, examples, positions = segments(k, w, b, device)
    some = min(k, 200)
    for law in ("sparse", "dense"):
        wanted = torch.zeros(b, p, dtype=torch.float64, device=device)
        for j in range(some):
            row = reference(law, x[j : j + 1], p, int(positions[j]))
            wanted[int(examples[j])] += row[0]
        out = torch.zeros(b, p, device=device)
        run_segments(law, out, x[:some], examples[:some], positions[:some])
        yield {"sketch": f"{law} segments", "b": b, "d": w, "p": p} | verdict(
            out, wanted
        )


def verdict(out: Tensor, wanted: Tensor) -> dict[str, Any]:
    error = float((out.double() - wanted).norm() / wanted.norm())
    return {"error": error, "right": error < TOLERANCE}


def time_kernels(
    device: torch.device, sizes: Sizes, clock: Clock, ceilings: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Time projections of gradients in memory; yields a line a kernel and size."""
    print("\nprojection alone; shares are of the ceilings above")
    copy = ceilings["GB/s copied, read and written"]
    product = ceilings["TFLOP/s bf16"]
    for b, k, p in sizes.timed:
        for name in ("fp32", "bf16"):
            dtype = DTYPES[name]
            needed = 2 * b * k * dtype.itemsize
            if (
                device.type == "cuda"
                and needed > torch.cuda.mem_get_info(device)[0] / 2
            ):
                print(
                    f"b={b} d={k} {name}: more than half of the free memory, left out"
                )
                continue
            # Two, by turns, so that the second level cache does not hold a small one.
            pair = [random((b, k), dtype, device) for _ in range(2)]
            out = torch.zeros(b, p, device=device)
            for law, call in projections(law_calls(out, k, p, device), pair):
                took = clock(call)
                read, done = needed / 2 / took / 1e6, 2 * b * k * p / took / 1e9
                line = {"kernel": law, "b": b, "d": k, "p": p, "dtype": name}
                line |= {"ms": took, "ms/example": took / b}
                if law == "sparse":
                    line |= {"GB/s read": read, "share": read / copy}
                else:
                    line |= {"TFLOP/s": done, "share": done / product}
                yield line
    k, w, b, p = sizes.segments
    x, examples, positions = segments(k, w, b, device)
    out = torch.zeros(b, p, device=device)
    for law in ("sparse", "dense"):
        took = clock(lambda _, law=law: run_segments(law, out, x, examples, positions))
        line = {"kernel": f"{law} segments", "b": b, "d": w, "p": p, "dtype": "fp32"}
        yield line | {"ms": took, "ms/example": took / b}


def law_calls(
    out: Tensor, k: int, p: int, device: torch.device
) -> dict[str, Callable[[Tensor], object]]:
    """Return the projections that can run here, by name."""
    calls: dict[str, Callable[[Tensor], object]] = {
        law: lambda x, law=law: run(law, out, x, 0) for law in ("sparse", "dense")
    }
    try:
        projector = CudaProjector(k, p, 0, "rademacher", device, 32)
    except TrakError as error:
        print(f"p={p} without fast_jl: {error}")
    else:
        calls["fast_jl"] = lambda x: projector.project(x, model_id=0)
    return calls


def projections(
    calls: dict[str, Callable[[Tensor], object]], pair: list[Tensor]
) -> Iterator[tuple[str, Callable[[int], object]]]:
    for law, call in calls.items():
        yield law, lambda i, call=call: call(pair[i % 2])


def run(law: str, out: Tensor, x: Tensor, offset: int) -> None:
    if law == "sparse":
        sizes = block_sizes(out.shape[1], NONZEROS)
        triton_backend.sparse_into(out, x, KEY, offset, sizes)
    else:
        triton_backend.dense_into(out, x, KEY, offset)


def run_segments(
    law: str, out: Tensor, x: Tensor, examples: Tensor, positions: Tensor
) -> None:
    if law == "sparse":
        sizes = block_sizes(out.shape[1], NONZEROS)
        triton_backend.sparse_segments_into(out, x, examples, positions, KEY, sizes)
    else:
        triton_backend.dense_segments_into(out, x, examples, positions, KEY)


def reference(law: str, x: Tensor, p: int, offset: int) -> Tensor:
    """Sketch in float64 from the definition, a stretch of coordinates at a time."""
    out = torch.zeros(len(x), p, dtype=torch.float64, device=x.device)
    for lo in range(0, x.shape[1], 2**16):
        part = x[:, lo : lo + 2**16].double()
        start, stop = offset + lo, offset + lo + part.shape[1]
        if law == "dense":
            out += part @ dense_signs(KEY, start, stop, range(p), x.device).double()
            continue
        signs = sparse_signs(KEY, start, stop, NONZEROS, x.device)
        at = 0
        for r, size in enumerate(block_sizes(p, NONZEROS)):
            i = torch.arange(start, stop, device=x.device)
            first, last = start // size, -(-stop // size)
            one = range(r, r + 1)
            turns = sparse_rotations(KEY, first, last, one, size, x.device)[0]
            to = at + (i % size + turns[i // size - first]) % size
            out.index_add_(1, to, part * signs[r] * math.sqrt(p / NONZEROS))
            at += size
    return out


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def segments(
    k: int, w: int, b: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of an embedding's gradient: values, examples and positions."""
    x = random((k, w), torch.float32, device)
    examples = torch.arange(k, device=device) * b // k
    return x, examples, torch.randint(VOCABULARY, (k,), device=device) * w
