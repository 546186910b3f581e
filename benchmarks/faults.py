"""Kill, stop and race the processes that write a store, and look at what comes out.

``python benchmarks/faults.py [--kills 50] [--every 1] [--only SCENARIO ...]`` prints a
table and exits with 1 if any store is not what one uninterrupted process leaves.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from attributing import (
    PlainScoreComputer,
    Work,
    differences,
    everything,
    featurizing,
    finalizing,
    scores,
    snapshot,
)
from forked import Ended, Job, Trap, run, running, start, warm_up

FULL = Work(n=400, m=60, checkpoints=3, batch=32)
SMALL = Work(n=11, m=5, checkpoints=2, batch=4, options={"proj_dim": 16})
ONE = replace(SMALL, checkpoints=1)
PRIMAL = replace(ONE, options={"proj_dim": 8}, del_grads=True)
WIDE = replace(ONE, options={"proj_dim": 8, "use_half_precision": False})
PLAIN = replace(ONE, options={"proj_dim": 8, "score_computer": PlainScoreComputer})

ROUNDING = 1e-4
"""Largest difference that another batch size may make, relative to the largest score.

Rows are stored in float16, so where sums differ in the last bit of float32, one entry in
a few thousand is rounded the other way, by 5e-4 of its size."""


@dataclass(slots=True)
class Result:
    """What a scenario found."""

    name: str
    runs: int = 0
    failures: list[str] = field(default_factory=list)
    stages: Counter[str] = field(default_factory=Counter)
    note: str = ""

    def show(self, seconds: float) -> None:
        good = self.runs - len(self.failures)
        print(f"{self.name:40} {good:4} of {self.runs:4} {seconds:5.0f} s  {self.note}")
        if self.stages:
            fell = ", ".join(f"{k} {v}" for k, v in self.stages.most_common())
            print(f"    signals came while: {fell}")
        for line in self.failures[:10]:
            print(f"    FAILED {line}")


class Faults:
    """The scenarios, over temporary stores.

    Args:
        root: Where the stores are made.
        kills: Number of signals at random moments.
        every: Which events are tried: each ``every``-th.
        seed: Seed of the random moments.
    """

    def __init__(self, root: Path, kills: int, every: int, seed: int) -> None:
        self.root = root
        self.kills = kills
        self.every = every
        self.random = Random(seed)
        self._numbers = itertools.count()
        self._references: dict[str, dict[str, bytes]] = {}

    def store(self) -> Path:
        path = self.root / f"store{next(self._numbers)}"
        path.mkdir()
        return path

    def reference(self, work: Work) -> dict[str, bytes]:
        """Give what one uninterrupted process leaves."""
        if repr(work) not in self._references:
            directory = self.store()
            run(everything(work, directory))
            self._references[repr(work)] = snapshot(directory)
        return self._references[repr(work)]

    def attempt(
        self, result: Result, what: str, trial: Callable[[Path], list[str]]
    ) -> None:
        """Count one trial; an error of a process in it is a failure."""
        directory = self.store()
        try:
            wrong = trial(directory)
        except RuntimeError as error:
            wrong = [str(error)]
        result.runs += 1
        if wrong:
            result.failures.append(f"{what}: {', '.join(wrong[:4])}")
        shutil.rmtree(directory)

    def compare(self, directory: Path, work: Work) -> list[str]:
        return differences(snapshot(directory), self.reference(work))

    def duration(self, work: Work) -> float:
        """Measure an uninterrupted process, from readiness to its end."""
        times = []
        for _ in range(3):
            child = start(everything(work, self.store()))
            begin = child.go()
            child.end()
            times.append(time.perf_counter() - begin)
        return sorted(times)[1]

    def killed(self, jobs: list[Job], delays: list[float]) -> list[Ended]:
        """Run jobs at once, and kill each after its delay."""
        children = [start(job) for job in jobs]
        begin = 0.0
        for child in children:
            begin = child.go()
        for delay, k in sorted(zip(delays, range(len(jobs)), strict=True)):
            time.sleep(max(0.0, begin + delay - time.perf_counter()))
            children[k].send(signal.SIGKILL)
        return [child.end() for child in children]

    def together(self, jobs: list[Job]) -> None:
        """Run jobs at once, to their ends."""
        children = [start(job) for job in jobs]
        for child in children:
            child.go()
        for child in children:
            child.end()

    def listed(self, job: Job, directory: Path) -> list[tuple[int, str]]:
        """List the numbered file-system events of a job that are to be tried."""
        events = run(job, Trap(directory, -1), list_events=True).events
        return list(enumerate(events))[:: self.every]

    # -- random moments ---------------------------------------------------------------

    def moments(self) -> Result:
        """SIGKILL at random moments, then run to the end."""
        result = Result("killed at a random moment")
        length = self.duration(FULL)
        for k in range(self.kills):
            delay = (k + self.random.random()) / self.kills * length

            def trial(directory: Path, delay: float = delay) -> list[str]:
                job = everything(FULL, directory)
                while (stage := self.killed([job], [delay])[0].stage) == "done":
                    # This process was quicker than the one that was timed: an earlier
                    # moment, in a new store.
                    shutil.rmtree(directory)
                    directory.mkdir()
                    delay *= self.random.random()
                result.stages[stage] += 1
                run(job)
                return self.compare(directory, FULL)

            self.attempt(result, f"after {delay:.3f} s", trial)
        result.note = f"a run takes {length:.2f} s; every byte compared"
        return result

    def batch_sizes(self) -> Result:
        """SIGKILL five times over, every restart with another batch size."""
        result = Result("five times over, other batch sizes")
        length = self.duration(FULL)
        errors: dict[bool, float] = {}
        for k in range(max(2, self.kills // 5)):
            half = k % 2 == 0
            work = replace(FULL, options={"use_half_precision": half})
            run(everything(work, reference := self.store()))
            expected = scores(reference)

            def trial(
                directory: Path,
                work: Work = work,
                expected: np.ndarray = expected,
                *,
                half: bool = half,
            ) -> list[str]:
                sizes = self.random.sample(range(1, 100), 6)
                for size in sizes[:-1]:
                    job = everything(replace(work, batch=size), directory)
                    delay = self.random.random() * length / 2
                    result.stages[self.killed([job], [delay])[0].stage] += 1
                run(everything(replace(work, batch=sizes[-1]), directory))
                difference = np.abs(scores(directory) - expected).max()
                error = float(difference / np.abs(expected).max())
                errors[half] = max(errors.get(half, 0.0), error)
                return [] if error < ROUNDING else [f"relative difference {error:.1e}"]

            self.attempt(result, f"chain {k}", trial)
        result.note = (
            f"differ by {errors.get(True, 0.0):.1e} (float16 rows) and "
            f"{errors.get(False, 0.0):.1e} (float32) of the largest score"
        )
        return result

    def writers(self) -> Result:
        """Two processes that write at once: rows, checkpoints, the same rows."""
        result = Result("two writers at once")
        pairs: list[tuple[Callable[[int, int], bool], ...]] = [
            (lambda _, k: k % 2 == 0, lambda _, k: k % 2 == 1),
            (lambda c, _: c == 0, lambda c, _: c != 0),
            (lambda *_: True, lambda *_: True),
        ]
        for k in range(max(3, self.kills // 2)):

            def trial(directory: Path, pair: Any = pairs[k % 3]) -> list[str]:
                self.together([featurizing(FULL, directory, share) for share in pair])
                run(everything(FULL, directory))
                return self.compare(directory, FULL)

            self.attempt(result, f"pair {k}", trial)
        result.note = "other rows, other checkpoints, the same rows"
        return result

    def both(self) -> Result:
        """SIGKILL two writers, and start both again."""
        result = Result("both writers killed, both restarted")
        length = self.duration(FULL)

        def trial(directory: Path) -> list[str]:
            odd = featurizing(FULL, directory, lambda _, batch: batch % 2 == 1)
            jobs = [everything(FULL, directory), odd]
            delays = [self.random.random() * length for _ in jobs]
            for ended in self.killed(jobs, delays):
                result.stages[ended.stage] += 1
            self.together(jobs)
            return self.compare(directory, FULL)

        for k in range(max(2, self.kills // 2)):
            self.attempt(result, f"pair {k}", trial)
        return result

    # -- every event ------------------------------------------------------------------

    def events(self) -> Result:
        """SIGKILL before every file-system event of a run, then run to the end."""
        result = Result("killed before a file-system event")
        kinds: Counter[str] = Counter()
        for work in (SMALL, PRIMAL, WIDE, PLAIN):
            for k, kind in self.listed(everything(work, at := self.store()), at):
                kinds[kind] += 1

                def trial(directory: Path, k: int = k, work: Work = work) -> list[str]:
                    job = everything(work, directory)
                    ended = run(job, Trap(directory, k))
                    result.stages[ended.stage] += 1
                    if not ended.killed:
                        return ["it was not killed"]
                    run(job)
                    return self.compare(directory, work)

                self.attempt(result, f"event {k} ({kind})", trial)
        result.note = ", ".join(
            f"{count} {kind}" for kind, count in kinds.most_common()
        )
        return result

    def damping(self) -> Result:
        """SIGKILL before every event of finalizing anew, then go back or go on."""
        result = Result("killed while the damping changes")
        for work in (replace(ONE, read_features=True), PLAIN):
            other = replace(work, options={**work.options, "lambda_reg": 2.0})
            run(everything(work, at := self.store()))
            listed = self.listed(finalizing(other, at), at)
            for goal, (k, kind) in itertools.product((work, other), listed):

                def trial(
                    directory: Path, k: int = k, pair: Any = (work, other, goal)
                ) -> list[str]:
                    before, after, goal = pair
                    run(everything(before, directory))
                    ended = run(finalizing(after, directory), Trap(directory, k))
                    result.stages[ended.stage] += 1
                    run(everything(goal, directory))
                    return self.compare(directory, goal)

                self.attempt(result, f"event {k} ({kind})", trial)
        return result

    def stopped(self) -> Result:
        """SIGSTOP before every event, another process does it all, SIGCONT."""
        result = Result("stopped before an event, overtaken")
        for work in (ONE, PRIMAL):
            for k, kind in self.listed(everything(work, at := self.store()), at):

                def trial(directory: Path, k: int = k, work: Work = work) -> list[str]:
                    job = everything(work, directory)
                    trap = Trap(directory, k, signal.SIGSTOP)
                    with running(job, trap) as child:
                        child.wait_until_stopped()
                        run(job)
                        child.send(signal.SIGCONT)
                        child.end()
                    return self.compare(directory, work)

                self.attempt(result, f"event {k} ({kind})", trial)
        result.note = "registering, featurizing, finalizing, scoring"
        return result

    def races(self) -> Result:
        """Stop one before an event, kill another before an event, go on with both."""
        result = Result("one stopped, another killed")
        events = run(
            everything(PRIMAL, at := self.store()), Trap(at, -1), list_events=True
        ).events
        for k in range(4 * self.kills):
            # Every other pair races for the registration of the same new checkpoint.
            total = len(events) if k % 2 else len(events) // 4
            pair = self.random.randrange(total), self.random.randrange(total)

            def trial(directory: Path, pair: tuple[int, int] = pair) -> list[str]:
                job = everything(PRIMAL, directory)
                with running(job, Trap(directory, pair[0], signal.SIGSTOP)) as child:
                    child.wait_until_stopped()
                    result.stages[run(job, Trap(directory, pair[1])).stage] += 1
                    child.send(signal.SIGCONT)
                    child.end()
                run(job)
                return self.compare(directory, PRIMAL)

            self.attempt(result, f"events {pair}", trial)
        return result


SCENARIOS = (
    "moments",
    "batch_sizes",
    "writers",
    "both",
    "events",
    "damping",
    "stopped",
    "races",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--every", type=int, default=1, help="try each n-th event")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # read when NumPy is imported
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    warm_up()
    failed = False
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        faults = Faults(
            Path(root).resolve(), arguments.kills, arguments.every, arguments.seed
        )
        for name in arguments.only:
            begin = time.perf_counter()
            result: Result = getattr(faults, name)()
            result.show(time.perf_counter() - begin)
            failed |= bool(result.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
