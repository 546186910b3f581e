"""Time of finalizing, top-k and self-influence, against that of their products.

``python benchmarks/scoring.py --n 10000 100000`` writes random features to a store, as
featurizing would, and prints a line for each step: wall time, its ratio to the floor, and
the peak of the process's own memory. The floor is the time that the multiplications take
that cannot be avoided, at the speed that ``torch.mm`` has before and after the step, on
matrices in memory. ``--exponents`` fits how the times grow with n, p and m.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trak import TRAKer
from trak._featurizing import write_rows
from trak._gram import panels

ROWS = 8192
"""Rows that are drawn; every block of the store is these, each column times a number."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured."""

    n: int
    p: int = 2048
    m: int = 1000
    checkpoints: int = 1
    k: int = 100
    half: bool = True
    """Whether rows are stored in half precision."""

    scale: float = 1.0
    """Standard deviation of the features; below 2**-10, rows get exponents."""

    clock: str = "wall"
    """``"wall"`` or ``"cpu"``."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step took."""

    name: str
    seconds: float
    floor: float
    """Seconds of the multiplications that cannot be avoided."""

    plain: float
    """Seconds of the matrix products in full, without the use of symmetry."""

    memory: float
    """Peak of the process's own memory in GB, without what is mapped from files."""

    @property
    def ratio(self) -> float:
        """Time over floor."""
        return self.seconds / self.floor


# -- the store --------------------------------------------------------------------------


def open_traker(size: Size, directory: Path) -> TRAKer:
    """Open the store, for a model whose gradients nobody computes here."""
    return TRAKer(
        torch.nn.Linear(3, 2),
        "image_classification",
        size.n,
        directory,
        proj_dim=size.p,
        use_half_precision=size.half,
        logging_level=logging.ERROR,
    )


def checkpoint(model_id: int) -> dict[str, torch.Tensor]:
    """Give the weights of a checkpoint."""
    return {"weight": torch.full((2, 3), 1.0 + model_id), "bias": torch.zeros(2)}


def random_rows(size: Size, total: int, seed: int) -> Iterator[tuple[int, Any]]:
    """Give blocks of features whose columns fade, as those of gradients do."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(min(ROWS, total), size.p, generator=generator)
    base *= size.scale * torch.logspace(0, -1, size.p)
    for low in range(0, total, ROWS):
        columns = torch.rand(size.p, generator=generator) + 0.5
        yield low, base[: total - low] * columns


def fill(size: Size, directory: Path) -> None:
    """Write a store as featurizing and scoring leave it."""
    traker = open_traker(size, directory)
    for model_id in range(size.checkpoints):
        traker.load_checkpoint(checkpoint(model_id), model_id)
        write(traker, "", "is_featurized", random_rows(size, size.n, model_id))
        traker.saver.serialize_current_model_id_metadata()
    # Targets can only be scored once features are finalized; the files are made by hand.
    for model_id in range(size.checkpoints):
        traker.saver.init_experiment("bench", size.m, model_id)
        rows = random_rows(size, size.m, 1000 + model_id)
        write(traker, "bench_", "bench_is_scored", rows)


def write(traker: TRAKer, prefix: str, flag: str, rows: Iterator[Any]) -> None:
    """Write rows of the current store, with made-up weights and hashes."""
    store = traker.saver.current_store
    for low, block in rows:
        inds = np.arange(low, low + len(block))
        extras = {f"{prefix}row_digest": inds[:, None]}
        if not prefix:
            extras["out_to_loss"] = np.full((len(block), 1), 0.5, np.float32)
        finite = np.ones(len(block), bool)
        write_rows(store, prefix, flag, inds, block, extras, finite)


# -- measuring --------------------------------------------------------------------------


class OwnMemory:
    """Samples the memory of this process that is not a file's, and keeps the peak."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> OwnMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024 / 1e9)
            if self._ended.wait(0.02):
                return


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""The time that passes; and that of all threads, for machines that do other things."""


def seconds(run: Callable[[], Any], clock: str) -> float:
    """Time a call."""
    start = CLOCKS[clock]()
    run()
    return CLOCKS[clock]() - start


class Products:
    """The speed of the products that a step consists of.

    Args:
        shapes: ``(rows, inner, columns)`` of each, and how often the step has it.
        clock: What to time them with.
    """

    def __init__(
        self, shapes: Sequence[tuple[tuple[int, int, int], float]], clock: str
    ) -> None:
        self._clock = clock
        self._parts = [
            (torch.randn(i, k), torch.randn(k, j), torch.empty(i, j), times)
            for (i, k, j), times in shapes
        ]

    def __call__(self, rounds: int = 3) -> float:
        """Give the seconds that the step's products take, from the quickest of each."""
        return sum(
            times
            * min(
                seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), self._clock)
                for _ in range(rounds)
            )
            for a, b, out, times in self._parts
        )


def gram_products(size: Size) -> tuple[Products, Products]:
    """Give the products of the Gram matrices: of one triangle, and in full."""
    n, p = max(size.n, size.p), min(size.n, size.p)
    inner = min(n, ROWS)
    times = size.checkpoints * n / inner
    triangle = [((high - low, inner, high), times) for low, high in panels(p)]
    return Products(triangle, size.clock), Products(
        [((p, inner, p), times)], size.clock
    )


def score_products(size: Size) -> Products:
    """Give the products of the scores."""
    rows = min(size.n, 2048)
    times = size.checkpoints * size.n / rows
    return Products([((rows, size.p, size.m), times)], size.clock)


def measure(size: Size, directory: Path) -> list[Step]:
    """Fill a store and measure the three steps on it.

    Args:
        size: What to measure.
        directory: Where the store may be; it is left there.

    Returns:
        ``finalize``, ``top-k``, ``self-influence``, and the first two together.
    """
    fill(size, directory)
    triangle, full = gram_products(size)
    scores = score_products(size)
    traker = open_traker(size, directory)

    def best() -> None:
        traker.top_k("bench", size.k)

    steps = [
        step("finalize", traker.finalize_features, triangle, full, size.clock),
        step("top-k", best, scores, scores, size.clock),
        step("self-influence", traker.self_influence, triangle, full, size.clock),
    ]
    first, second, _ = steps
    both = Step(
        "finalize + top-k",
        first.seconds + second.seconds,
        first.floor + second.floor,
        first.plain + second.plain,
        max(first.memory, second.memory),
    )
    return [*steps, both]


def step(
    name: str, run: Callable[[], Any], floor: Products, plain: Products, clock: str
) -> Step:
    """Measure a step, its products before it and after it."""
    before = floor(), plain()
    with OwnMemory() as memory:
        taken = seconds(run, clock)
    after = floor(), plain()
    least, whole = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    return Step(name, taken, least, whole, memory.peak)


# -- reporting --------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe where this runs."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": round(memory / 1e9, 1),
        "torch": torch.__version__,
    }


def describe_row(size: Size, found: Step) -> str:
    """Give a line of the table."""
    return (
        f"| {size.n:,} | {size.p} | {size.m} | {size.checkpoints} | {found.name} | "
        f"{found.seconds:.2f} | {found.floor:.2f} | {found.ratio:.2f} | "
        f"{found.seconds / found.plain:.2f} | {found.memory:.2f} |"
    )


HEADER = """\
| n | p | m | checkpoints | step | seconds | floor | over floor | over full products | GB |
|---|---|---|---|---|---|---|---|---|---|"""


def exponents(size: Size, directory: Path) -> dict[str, dict[str, float]]:
    """Fit how each step's time grows when n, p or m do, the others being ``size``'s.

    Args:
        size: The largest; the others are a half and a quarter of it.
        directory: Where the stores may be.

    Returns:
        The exponent for each of ``n``, ``p`` and ``m``, and each step.
    """
    found: dict[str, dict[str, float]] = {}
    for axis in ("n", "p", "m"):
        values = [getattr(size, axis) // part for part in (4, 2, 1)]
        times: dict[str, list[float]] = {}
        for value in values:
            with tempfile.TemporaryDirectory(dir=directory) as place:
                for one in measure(replace(size, **{axis: value}), Path(place)):
                    times.setdefault(one.name, []).append(math.log(one.seconds))
        logs = np.log(values)
        found[axis] = {
            name: round(float(np.polyfit(logs, series, 1)[0]), 2)
            for name, series in times.items()
        }
    return found


def main() -> None:
    """Measure, print and perhaps write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--p", type=int, default=2048)
    parser.add_argument("--m", type=int, default=1000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--checkpoints", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--float32", action="store_true", help="store rows as float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--exponents", action="store_true")
    parser.add_argument("--dir", type=Path, help="where stores are made for a while")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {"machine": machine(), "steps": []}
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    print(HEADER)
    for n in options.n:
        size = Size(
            n,
            options.p,
            options.m,
            options.checkpoints,
            min(options.k, n),
            not options.float32,
            options.scale,
            options.clock,
        )
        with tempfile.TemporaryDirectory(dir=options.dir) as directory:
            for found in measure(size, Path(directory)):
                print(describe_row(size, found), flush=True)
                figures["steps"].append({**asdict(size), **asdict(found)})
    if options.exponents:
        largest = replace(size, n=max(options.n))
        with tempfile.TemporaryDirectory(dir=options.dir) as directory:
            figures["exponents"] = exponents(largest, Path(directory))
        for axis, by_step in figures["exponents"].items():
            fitted = ", ".join(f"{name} {value}" for name, value in by_step.items())
            print(f"growth with {axis}: {fitted}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
