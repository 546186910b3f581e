"""Kill, stop and race the processes that write a store, and look at what comes out.

``python benchmarks/faults.py [--kills 50] [--only SCENARIO ...]`` prints a table and
exits with 1 if any result is not what an uninterrupted process gives.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from forked import Child, Ended, Job, Report, Trap, run, running, start, warm_up

from trak import TRAKer


@dataclass(frozen=True, slots=True)
class Work:
    """A job's size and settings."""

    n: int
    m: int
    checkpoints: int
    batch: int
    options: dict[str, Any] = field(default_factory=dict)
    del_grads: bool = False
    read_features: bool = False

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 8, 3),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(128, 10),
        )

    def checkpoint(self, model_id: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 + model_id)
        return {
            name: torch.randn(value.shape, generator=generator) * 0.2
            for name, value in self.model().state_dict().items()
        }

    def data(self, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(size, 1, 8, 8, generator=generator)
        return images, torch.randint(10, (size,), generator=generator)

    def traker(self, directory: Path) -> TRAKer:
        return TRAKer(
            self.model(),
            "image_classification",
            self.n,
            directory,
            logging_level=logging.WARNING,
            **self.options,
        )

    def batches(self, size: int, seed: int) -> Iterator[tuple[Any, np.ndarray]]:
        images, labels = self.data(size, seed)
        for low in range(0, size, self.batch):
            rows = np.arange(low, min(low + self.batch, size))
            yield (images[rows], labels[rows]), rows


FULL = Work(n=400, m=60, checkpoints=3, batch=32)
SMALL = Work(n=11, m=5, checkpoints=2, batch=4, options={"proj_dim": 16})
ONE = replace(SMALL, checkpoints=1)
PRIMAL = replace(ONE, options={"proj_dim": 8})


# -- jobs -----------------------------------------------------------------------------


def featurizing(work: Work, directory: Path, share: Callable[[int, int], bool]) -> Job:
    """Featurize the batches for which ``share(model_id, number of the batch)``."""

    def job(report: Report) -> None:
        traker = work.traker(directory)
        for model_id in range(work.checkpoints):
            mine = [
                batch
                for k, batch in enumerate(work.batches(work.n, 0))
                if share(model_id, k)
            ]
            if not mine:
                continue
            report("registering")
            traker.load_checkpoint(work.checkpoint(model_id), model_id)
            report("featurizing")
            for batch, rows in mine:
                traker.featurize(batch, inds=rows)

    return job


def finalizing(work: Work, directory: Path) -> Job:
    """Finalize the features."""

    def job(report: Report) -> None:
        traker = work.traker(directory)
        report("finalizing features")
        traker.finalize_features(del_grads=work.del_grads)
        if work.read_features:
            report("reading features")
            for model_id in range(work.checkpoints):
                traker.saver.load_current_store(model_id)
                np.array(traker.saver.current_store["features"])

    return job


def scoring(work: Work, directory: Path) -> Job:
    """Score the targets."""

    def job(report: Report) -> None:
        traker = work.traker(directory)
        for model_id in range(work.checkpoints):
            report("starting to score")
            traker.start_scoring_checkpoint(
                "faults", work.checkpoint(model_id), model_id, work.m
            )
            report("scoring")
            for batch, rows in work.batches(work.m, 1):
                traker.score(batch, inds=rows)
        report("finalizing scores")
        traker.finalize_scores("faults")

    return job


def everything(work: Work, directory: Path) -> Job:
    """Go from nothing to scores."""

    def job(report: Report) -> None:
        featurizing(work, directory, lambda *_: True)(report)
        finalizing(work, directory)(report)
        scoring(work, directory)(report)

    return job


# -- comparing ------------------------------------------------------------------------


def snapshot(directory: Path) -> dict[str, bytes]:
    """Read every file of a store; what depends on its place is left out."""
    return {
        str(path.relative_to(directory)): path.read_bytes().replace(
            str(directory).encode(), b""
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """List the files that are not as they should be."""
    return sorted(
        name for name in found | expected if found.get(name) != expected.get(name)
    )


def scores(directory: Path) -> np.ndarray:
    """Map an experiment's scores."""
    return np.load(directory / "scores" / "faults.mmap", mmap_mode="r")


@dataclass(slots=True)
class Result:
    """What a scenario found."""

    name: str
    runs: int = 0
    failures: list[str] = field(default_factory=list)
    stages: Counter[str] = field(default_factory=Counter)
    note: str = ""

    def check(self, what: str, wrong: list[str]) -> None:
        self.runs += 1
        if wrong:
            self.failures.append(f"{what}: {', '.join(wrong[:4])}")


class Faults:
    """The scenarios, over temporary stores."""

    def __init__(self, root: Path, kills: int, seed: int) -> None:
        self.root = root
        self.kills = kills
        self.random = Random(seed)  # noqa: S311
        self._numbers = itertools.count()
        self._references: dict[str, dict[str, bytes]] = {}

    def store(self) -> Path:
        path = self.root / f"store{next(self._numbers)}"
        path.mkdir()
        return path

    def reference(self, work: Work) -> dict[str, bytes]:
        """Give what one uninterrupted process leaves."""
        key = repr(work)
        if key not in self._references:
            directory = self.store()
            run(everything(work, directory))
            self._references[key] = snapshot(directory)
        return self._references[key]

    def attempt(
        self, result: Result, what: str, trial: Callable[[Path], list[str]]
    ) -> None:
        """Count one trial; an error of a process in it is a failure."""
        directory = self.store()
        try:
            wrong = trial(directory)
        except RuntimeError as error:
            wrong = [str(error)]
        result.check(what, wrong)
        shutil.rmtree(directory)

    def duration(self, work: Work) -> float:
        """Measure an uninterrupted process, from readiness to its end."""
        times = []
        for _ in range(3):
            child = start(everything(work, self.store()))
            begin = child.go()
            child.end()
            times.append(time.perf_counter() - begin)
        return sorted(times)[1]

    def killed(self, job: Job, delay: float) -> Ended:
        child = start(job)
        begin = child.go()
        time.sleep(max(0.0, begin + delay - time.perf_counter()))
        child.send(signal.SIGKILL)
        return child.end()

    # -- scenarios --------------------------------------------------------------------

    def moments(self) -> Result:
        """SIGKILL at random moments, then run to the end."""
        result = Result("killed at a random moment")
        length = self.duration(FULL)
        for k in range(self.kills):
            delay = (k + self.random.random()) / self.kills * length

            def trial(directory: Path, delay: float = delay) -> list[str]:
                job = everything(FULL, directory)
                result.stages[self.killed(job, delay).stage] += 1
                run(job)
                return differences(snapshot(directory), self.reference(FULL))

            self.attempt(result, f"after {delay:.3f} s", trial)
        result.note = f"run of {length:.2f} s; stores compared byte for byte"
        return result

    def batch_sizes(self) -> Result:
        """SIGKILL five times over, every restart with another batch size."""
        result = Result("the same, another batch size each time")
        length = self.duration(FULL)
        worst = 0.0
        expected_dir = self.store()
        run(everything(FULL, expected_dir))
        expected = scores(expected_dir)
        for k in range(max(1, self.kills // 5)):

            def trial(directory: Path) -> list[str]:
                nonlocal worst
                for size in self.random.sample(range(1, 100), 5):
                    work = replace(FULL, batch=size)
                    delay = self.random.random() * length / 2
                    ended = self.killed(everything(work, directory), delay)
                    result.stages[ended.stage] += 1
                size = self.random.randrange(1, 100)
                run(everything(replace(FULL, batch=size), directory))
                error = np.abs(scores(directory) - expected).max()
                relative = float(error / np.abs(expected).max())
                worst = max(worst, relative)
                # Rows are stored in float16, of which a few round the other way.
                return (
                    [] if relative < 1e-3 else [f"relative difference {relative:.1e}"]
                )

            self.attempt(result, f"chain {k}", trial)
        result.note = f"largest difference {worst:.1e} of the largest score"
        return result

    def events(self) -> Result:
        """SIGKILL before every file-system event of a run, then run to the end."""
        result = Result("killed before every file-system event")
        kinds: Counter[str] = Counter()
        for work in (
            SMALL,
            replace(ONE, del_grads=True),
            replace(PRIMAL, options={"proj_dim": 8, "use_half_precision": False}),
        ):
            self._all_events(result, kinds, work, lambda d: None, everything)
        result.note = ", ".join(
            f"{count} {kind}" for kind, count in kinds.most_common()
        )
        return result

    def _all_events(
        self,
        result: Result,
        kinds: Counter[str],
        work: Work,
        prepare: Callable[[Path], None],
        make: Callable[[Work, Path], Job],
        finish: Callable[[Work, Path], Job] | None = None,
        expected: dict[str, bytes] | None = None,
    ) -> None:
        expected = expected or self.reference(work)
        directory = self.store()
        prepare(directory)
        listed = run(
            make(work, directory), Trap(directory, -1), list_events=True
        ).events
        for k, kind in enumerate(listed):
            kinds[kind] += 1

            def trial(directory: Path, k: int = k) -> list[str]:
                prepare(directory)
                ended = run(make(work, directory), Trap(directory, k))
                result.stages[ended.stage] += 1
                if not ended.killed:
                    return ["it was not killed"]
                run((finish or make)(work, directory))
                return differences(snapshot(directory), expected)

            self.attempt(result, f"before event {k} ({kind})", trial)

    def damping(self) -> Result:
        """SIGKILL before every event of finalizing anew, then go back or go on."""
        result = Result("killed while the damping changes")
        kinds: Counter[str] = Counter()
        before = replace(ONE, read_features=True)
        after = replace(before, options={**before.options, "lambda_reg": 2.0})

        def prepare(directory: Path) -> None:
            run(everything(before, directory))

        def change(_: Work, directory: Path) -> Job:
            return finalizing(after, directory)

        for goal in (before, after):
            directory = self.store()
            prepare(directory)
            run(everything(goal, directory))
            self._all_events(
                result, kinds, goal, prepare, change, everything, snapshot(directory)
            )
        return result

    def writers(self) -> Result:
        """Two processes that write at once."""
        result = Result("two writers at once")
        shares: dict[str, tuple[Callable[[int, int], bool], ...]] = {
            "rows": (lambda _, k: k % 2 == 0, lambda _, k: k % 2 == 1),
            "checkpoints": (lambda c, _: c == 0, lambda c, _: c != 0),
            "the same": (lambda *_: True, lambda *_: True),
        }
        for what, pair in shares.items():
            for k in range(max(2, self.kills // 10)):

                def trial(directory: Path, pair: Any = pair) -> list[str]:
                    jobs = [featurizing(FULL, directory, share) for share in pair]
                    children = [start(job) for job in jobs]
                    for child in children:
                        child.go()
                    for child in children:
                        result.stages[child.end().stage] += 1
                    run(everything(FULL, directory))
                    return differences(snapshot(directory), self.reference(FULL))

                self.attempt(result, f"{what}, {k}", trial)
        result.stages.clear()
        result.note = "rows of one checkpoint; other checkpoints; the same rows"
        return result

    def both(self) -> Result:
        """SIGKILL two writers, start both again, and so on."""
        result = Result("both writers killed, both restarted")
        length = self.duration(FULL)
        for k in range(max(2, self.kills // 2)):

            def trial(directory: Path) -> list[str]:
                jobs = [
                    everything(FULL, directory),
                    featurizing(FULL, directory, lambda _, k: k % 2 == 1),
                ]
                children = [start(job) for job in jobs]
                begin = [child.go() for child in children][0]
                moments = sorted(
                    (self.random.random() * length, child.pid, child)
                    for child in children
                )
                for moment, _, child in moments:
                    time.sleep(max(0.0, begin + moment - time.perf_counter()))
                    child.send(signal.SIGKILL)
                for child in children:
                    result.stages[child.end().stage] += 1
                self.together(jobs)
                run(jobs[0])
                return differences(snapshot(directory), self.reference(FULL))

            self.attempt(result, f"pair {k}", trial)
        return result

    def together(self, jobs: list[Job]) -> None:
        """Run jobs at once. Those that find rows missing that another has yet to write
        may say so."""
        children: list[Child] = [start(job) for job in jobs]
        for child in children:
            child.go()
        for child in children:
            child.end()

    def stopped(self) -> Result:
        """SIGSTOP before every event, another process does it all, SIGCONT."""
        result = Result("stopped before every event, overtaken")
        for work in (ONE, replace(PRIMAL, del_grads=True)):
            directory = self.store()
            trap = Trap(directory, -1)
            listed = run(everything(work, directory), trap, list_events=True).events
            for k, kind in enumerate(listed):

                def trial(directory: Path, k: int = k, work: Work = work) -> list[str]:
                    job = everything(work, directory)
                    trap = Trap(directory, k, signal.SIGSTOP)
                    with running(job, trap) as child:
                        if not child.wait_until_stopped():
                            return ["it did not stop"]
                        run(job)
                        child.send(signal.SIGCONT)
                        result.stages[child.end().stage] += 1
                    return differences(snapshot(directory), self.reference(work))

                self.attempt(result, f"before event {k} ({kind})", trial)
        result.stages.clear()
        result.note = "every interleaving of one process within the other"
        return result

    def races(self) -> Result:
        """Stop one, kill another at some event, and go on with both."""
        result = Result("stopped, while another is killed")
        work = replace(PRIMAL, del_grads=True)
        directory = self.store()
        trap = Trap(directory, -1)
        total = len(run(everything(work, directory), trap, list_events=True).events)
        for _ in range(4 * self.kills):
            first, second = self.random.randrange(total), self.random.randrange(total)

            def trial(
                directory: Path, at: tuple[int, int] = (first, second)
            ) -> list[str]:
                job = everything(work, directory)
                with running(job, Trap(directory, at[0], signal.SIGSTOP)) as child:
                    if not child.wait_until_stopped():
                        return ["it did not stop"]
                    ended = run(job, Trap(directory, at[1]))
                    result.stages[ended.stage] += 1
                    child.send(signal.SIGCONT)
                    child.end()
                run(job)
                return differences(snapshot(directory), self.reference(work))

            self.attempt(result, f"events {first} and {second}", trial)
        return result


SCENARIOS = (
    "moments",
    "batch_sizes",
    "events",
    "damping",
    "writers",
    "both",
    "stopped",
    "races",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    arguments = parser.parse_args()
    warm_up()
    failed = False
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        faults = Faults(Path(root).resolve(), arguments.kills, arguments.seed)
        for name in arguments.only:
            begin = time.perf_counter()
            result: Result = getattr(faults, name)()
            failed |= bool(result.failures)
            good = result.runs - len(result.failures)
            print(
                f"{result.name:42} {good:4} of {result.runs:4} "
                f"{time.perf_counter() - begin:5.0f} s  {result.note}"
            )
            if result.stages:
                print("   killed while", dict(result.stages.most_common()))
            for line in result.failures[:10]:
                print("   FAILED", line)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
