"""One cell: both libraries warmed up, timed by turns, and what came out of it.

A cell's result is plain data. ``series`` has, for each thing that was timed, its turns
as ``[round, milliseconds of wall time, of processor time]`` an example, the peak of
anonymous memory in MiB and, in ``how``, whether it was ``measured``, ``extrapolated``
from one block of the projection, or why it was not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from speed_plan import Featurize, Plan, Project
from speed_turns import Series, Worker, WorkerError, calls_for, interleave, plain, ratio

BLOCK = 100
"""Columns of the projection that 0.3.2's `BasicProjector` draws at a time."""

STORE = 2**28
"""Bytes of rows that a cell may write."""

DENSE = {"torch": 8e-11, "auto": 8e-11, "native": 2e-11}
"""Seconds, roughly, that our dense projection takes for one of its ``b d p`` products."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the two libraries are, and how long everything may take."""

    ours: str
    """Python of our environment."""

    theirs: str | None
    """Python of the environment with traker 0.3.2; None to leave it out."""

    directory: Path
    """For weights and batches."""

    plan: Plan
    show: bool = False
    """Whether the workers' messages are shown."""

    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Weights and batches that are written already."""

    @contextlib.contextmanager
    def workers(self, threads: int) -> Iterator[tuple[Worker, Worker | None]]:
        """Start a fresh process for each library; they import at the same time."""
        with contextlib.ExitStack() as stack:
            pythons = [self.ours] + ([self.theirs] if self.theirs else [])
            started = [
                stack.enter_context(
                    Worker(python, threads, self.directory, show=self.show)
                )
                for python in pythons
            ]
            hellos = [worker.ask("hello") for worker in started]
            if self.theirs and hellos[1]["version"] != "0.3.2":
                raise WorkerError(f"{self.theirs} has {hellos[1]}, not traker 0.3.2")
            yield started[0], started[1] if self.theirs else None

    def materials(self, model: str, b: int) -> dict[str, Any]:
        """Write a model's weights and batches, once.

        Returns:
            Their file under ``path``, the number of parameters under ``d``.
        """
        name = f"{model}-{b}.pt"
        if name not in self.made:
            path = str(self.directory / name)
            with Worker(self.ours, 1, self.directory, show=self.show) as worker:
                made = worker.ask("materials", model=model, b=b, path=path)
            self.made[name] = {"path": path, **made}
        return self.made[name]


def blocks(p: int) -> int:
    return math.ceil(p / BLOCK)


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 2**63


def described(series: Series, how: str = "measured", **more: Any) -> dict[str, Any]:
    """Give a series as plain data."""
    if series.error and not series.turns:
        how = f"failed: {series.error}"
    return {"how": how, "turns": series.turns, "note": series.error, **more}


# -- featurize ------------------------------------------------------------------------


def whole_call(reply: dict[str, Any], p: int) -> tuple[float, float]:
    """Add up the parts of one call of 0.3.2, whose blocks are independent and equal."""
    totals = []
    for clock in ("wall", "cpu"):
        parts = {name: part[clock] for name, part in reply["parts"].items()}
        totals.append(sum(parts.values()) + parts["two blocks"] * (blocks(p) / 2 - 1))
    return totals[0], totals[1]


class FeaturizeCell:
    """The run of one `Featurize`."""

    def __init__(self, bench: Bench, cell: Featurize) -> None:
        self.bench, self.cell, self.plan = bench, cell, bench.plan
        made = bench.materials(cell.model, cell.b)
        self.path, self.d = made["path"], made["d"]
        self.found: dict[str, dict[str, Any]] = {}
        self.steady: list[Series] = []
        self.slow: list[Series] = []
        self.about: dict[str, dict[str, Any]] = {}
        self.grams: list[tuple[list[list[float]], int]] = []

    def run(self) -> dict[str, Any]:
        with self.bench.workers(self.cell.threads) as (ours, theirs):
            self.prepare_ours(ours)
            if theirs is None:
                self.found["theirs"] = {"how": "left out", "turns": []}
            else:
                self.prepare_theirs(theirs)
            interleave(self.steady, self.slow, self.plan.budget, self.plan.rounds)
            series = {one.name: one for one in self.steady + self.slow}
            for name, one in series.items():
                self.found[name] = described(one, **self.about[name])
        return {
            "kind": "featurize",
            **asdict(self.cell),
            "d": self.d,
            "series": self.found,
            "ratios": ratios(series),
            "grams": self.compare(),
        }

    def load(self, worker: Worker, name: str) -> dict[str, Any]:
        """Load the model and time a plain forward and backward."""
        cell = asdict(self.cell)
        loaded = worker.ask("load", cell=cell, materials=self.path)
        self.add(worker, name, "floor", loaded, calls=64)
        return loaded

    def add(
        self,
        worker: Worker,
        name: str,
        what: str,
        opened: dict[str, Any],
        calls: int,
        **named: Any,
    ) -> None:
        """Add a series of calls that each take what ``opened`` took the second time."""
        once = opened["again"]["wall"]
        times = calls_for(once, self.plan.turn, calls)
        request = {"do": "turn", "what": what, "times": times, **named}
        one = Series(name, worker, request, times * self.cell.b, times * once)
        patient = once * 3 < self.plan.budget / 4 or name != "theirs"
        (self.steady if patient else self.slow).append(one)
        self.about[name] = {"peak": opened["peak"]}

    def rows(self) -> tuple[int, int]:
        """Choose the most calls of a turn, and the rows that all turns may need.

        Returns:
            Both numbers.
        """
        for calls in (64, 32, 16, 8, 4, 2, 1):
            n = self.cell.b * (3 + calls * self.plan.rounds)
            if n * self.cell.p * 4 <= STORE:
                break
        return calls, n

    def prepare_ours(self, worker: Worker) -> None:
        self.load(worker, "floor")
        calls, n = self.rows()
        opened = worker.ask("open", p=self.cell.p, n=n)
        self.grams.append((worker.ask("gram")["gram"], self.cell.p))
        self.add(worker, "ours", "featurize", opened, calls)
        if self.cell.in_memory:
            opened = worker.ask("open", p=self.cell.p, n=n, in_memory=True)
            self.add(
                worker, "ours in memory", "featurize", opened, calls, in_memory=True
            )

    def prepare_theirs(self, worker: Worker) -> None:
        p, d, b = self.cell.p, self.d, self.cell.b
        need = 4 * d * (min(p, BLOCK) + 2 * b)
        if need * 1.1 > available_bytes():
            how = (
                f"does not fit: its projection block and gradients take "
                f"{need / 2**30:.1f} GiB"
            )
            self.found["theirs"] = {"how": how, "turns": []}
            return
        try:
            self.open_theirs(worker)
        except WorkerError as error:
            self.found["theirs"] = {"how": f"failed: {error}", "turns": []}

    def open_theirs(self, worker: Worker) -> None:
        """Open it with two blocks, and with all if that does not take too long."""
        self.load(worker, "floor of theirs")
        calls, n = self.rows()
        p, small = self.cell.p, min(self.cell.p, 2 * BLOCK)
        opened = worker.ask("open", p=small, n=n)
        parts = worker.ask("parts")
        wall, cpu = whole_call(parts, p)
        if wall <= self.plan.cap:
            small = p
            opened = worker.ask("open", p=p, n=n)
        self.grams.append((worker.ask("gram")["gram"], small))
        if wall > self.plan.cap and self.cell.real:
            peak = max(
                opened["peak"], parts["peak"]
            )  # it has warmed up with two blocks
            worker.ask("open", p=p, n=n, warm=False)
            opened = {"again": {"wall": wall, "cpu": cpu}, "peak": peak}
            small = p
        if small == p:
            self.add(worker, "theirs", "featurize", opened, calls)
            return
        seconds = sum(part["wall"] for part in parts["parts"].values())
        one = Series(
            "theirs",
            worker,
            {"do": "parts"},
            self.cell.b,
            seconds,
            lambda reply: whole_call(reply, p),
        )
        self.slow.append(one)
        self.about["theirs"] = {
            "how": "extrapolated",
            "peak": max(opened["peak"], parts["peak"]),
        }

    def compare(self) -> dict[str, float]:
        """Compare the inner products that both sides estimate.

        Returns:
            The norm of the difference in units of the trace, and what two independent
            projections may differ by.
        """
        if len(self.grams) < 2:
            return {}
        (a, p), (b, q) = self.grams
        trace = sum(row[i] for i, row in enumerate(a)) / p
        square = sum(
            (x / p - y / q) ** 2
            for one, other in zip(a, b, strict=True)
            for x, y in zip(one, other, strict=True)
        )
        return {
            "difference": math.sqrt(square) / trace,
            "chance": math.sqrt(2 / p + 2 / q),
        }


def ratios(series: dict[str, Series]) -> dict[str, dict[str, Any]]:
    """Compare what can be compared, round by round, on both clocks."""
    found = {}
    for above, below in (
        ("ours", "floor"),
        ("ours in memory", "floor"),
        ("theirs", "floor of theirs"),
        ("theirs", "ours"),
    ):
        if above in series and below in series:
            found[f"{above} / {below}"] = {
                "wall": ratio(series[above], series[below], 1),
                "cpu": ratio(series[above], series[below], 2),
            }
    return found


# -- project --------------------------------------------------------------------------


def variants(bench: Bench, backends: list[str]) -> Iterator[tuple[str, str, str]]:
    """List the projectors of both sides.

    Yields:
        The side, the law, the back end.
    """
    for law in ("sparse", "rademacher"):
        for backend in backends:
            yield "ours", law, backend
    if bench.theirs:
        yield "theirs", "normal", ""
        yield "theirs", "rademacher", ""


def run_project(bench: Bench, cell: Project) -> dict[str, Any]:
    """Time every projector on the same gradients.

    Args:
        bench: Where and how long.
        cell: The sizes.

    Returns:
        The result.
    """
    plan = bench.plan
    steady: list[Series] = []
    slow: list[Series] = []
    about: dict[str, dict[str, Any]] = {}
    left_out: dict[str, dict[str, Any]] = {}
    with bench.workers(cell.threads) as (ours, theirs):
        sides = {"ours": ours, "theirs": theirs}
        backends = ours.ask("hello")["backends"]
        for side, worker in sides.items():
            if worker is not None:
                read = worker.ask("load_projection", d=cell.d, b=cell.b)["again"]
                if side == "ours":
                    request = {"do": "turn", "what": "read", "times": 1}
                    once = read["wall"]
                    steady.append(Series("read once", worker, request, cell.b, once))
                    about["read once"] = {}
        for side, law, backend in variants(bench, backends):
            name = f"{side} {law} {backend}".strip()
            if side == "ours" and law != "sparse":
                seconds = DENSE[backend] * cell.b * cell.d * cell.p
                if seconds > 2 * plan.cap:
                    how = f"left out: about {seconds:.0f} s a call"
                    left_out[name] = {"how": how, "turns": []}
                    continue
            one, more = open_projector(plan, cell, sides[side], name)
            patient = one.expected * 3 < plan.budget / 4
            (steady if patient else slow).append(one)
            about[one.name] = more
        interleave(steady, slow, plan.budget, plan.rounds)
    series = {one.name: one for one in steady + slow}
    reference = series.get("theirs normal")
    return {
        "kind": "project",
        **asdict(cell),
        "series": left_out
        | {name: described(one, **about[name]) for name, one in series.items()},
        "ratios": {
            f"theirs normal / {name}": {
                "wall": ratio(reference, one, 1),
                "cpu": ratio(reference, one, 2),
            }
            for name, one in series.items()
            if reference is not None and one is not reference
        },
    }


def open_projector(
    plan: Plan, cell: Project, worker: Worker, name: str
) -> tuple[Series, dict[str, Any]]:
    """Make a projector, and a series of its calls.

    Args:
        plan: How long a call and a turn may take.
        cell: The sizes.
        worker: The library's process.
        name: Side, law and back end.

    Returns:
        The series, and what else is known.
    """
    side, law, *rest = name.split(" ")
    backend = rest[0] if rest else ""
    small = min(cell.p, 2 * BLOCK) if side == "theirs" else cell.p
    ask = {"do": "open_projection", "law": law, "backend": backend}
    opened = worker.ask(**ask, p=small)
    times = blocks(cell.p) / blocks(small) if side == "theirs" else 1
    how = "measured"
    if times > 1 and opened["again"]["wall"] * times <= plan.cap:
        small, times = cell.p, 1
        opened = worker.ask(**ask, p=small)
    elif times > 1:
        how = "extrapolated"
    once = opened["again"]["wall"]
    calls = calls_for(once, plan.turn, 256)
    named = f"{law} {backend}"
    request = {"do": "turn", "what": "project", "times": calls, "name": named}

    def read(reply: dict[str, Any]) -> tuple[float, float]:
        wall, cpu = plain(reply)
        return wall * times, cpu * times

    one = Series(name, worker, request, calls * cell.b, calls * once, read)
    return one, {"how": how, "peak": opened["peak"], "before": opened["before"]}
