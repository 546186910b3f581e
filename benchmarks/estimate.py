"""What `trak.estimate` says, beside what then happens: disk, memory and time by stage.

Every stage runs in a process of its own, which goes on with the store of the one before,
so that its peak of memory is its own. Linux only: memory is read from ``/proc``.

    python benchmarks/estimate.py rows resnet9 --threads 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from speed_models import SUBJECTS

import trak
from trak import TRAKer

STAGES = ("featurize", "finalize_features", "score", "finalize_scores", "top_k")


@dataclass(frozen=True, slots=True)
class Job:
    """One row of the first column: a model, or none, and the sizes."""

    subject: str
    n: int
    m: int
    c: int
    p: int
    b: int
    half: bool = True

    @property
    def title(self) -> str:
        name = SUBJECTS[self.subject].title if self.subject else "one linear layer"
        kind = "float16" if self.half else "float32"
        return (
            f"{name}; n={self.n:,}, m={self.m:,}, c={self.c}, p={self.p:,}, "
            f"b={self.b}, {kind} rows"
        )

    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return (
            SUBJECTS[self.subject].make() if self.subject else torch.nn.Linear(32, 10)
        )

    @property
    def task(self) -> str:
        return SUBJECTS[self.subject].task if self.subject else "image_classification"

    def batch(self, number: int) -> Any:
        generator = torch.Generator().manual_seed(number)
        if self.subject:
            return SUBJECTS[self.subject].batch(self.b, generator)
        x = torch.randn(self.b, 32, generator=generator)
        return x, torch.randint(10, (self.b,), generator=generator)

    def traker(self, directory: Path) -> TRAKer:
        return TRAKer(
            self.model(),
            self.task,
            self.n,
            directory,
            proj_dim=self.p,
            use_half_precision=self.half,
            logging_level=logging.ERROR,
        )


JOBS = {
    "rows": Job("", 20_000, 4_000, 2, 2048, 1000),
    "dual": Job("", 3_000, 20_000, 1, 4096, 1000, half=False),
    "mlp": Job("mlp", 2_560, 256, 2, 2048, 64),
    "resnet9": Job("resnet9", 320, 64, 1, 2048, 32),
    "minilm": Job("minilm", 64, 16, 1, 2048, 16),
}
"""`n` and `m` are multiples of `b`, or fewer than one batch."""


# -- in the process of a stage ----------------------------------------------------------


def anonymous() -> int:
    """Read the memory of this process that is not the cache of files, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("/proc/self/status has no RssAnon; this needs Linux 4.5 or newer")


@contextlib.contextmanager
def watching() -> Iterator[dict[str, float]]:
    """Fill in ``ram``, the largest growth of memory, and ``seconds`` if they are not."""
    found: dict[str, float] = {}
    base = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        yield found
        found.setdefault("seconds", time.perf_counter() - start)
    finally:
        done.set()
        watcher.join()
    found["ram"] = float(max(peak, anonymous()) - base)


def rows(traker: TRAKer, job: Job, *, targets: bool) -> None:
    total = job.m if targets else job.n
    for model_id in range(job.c):
        checkpoint = {
            k: v * (1 + model_id) for k, v in traker.model.state_dict().items()
        }
        if targets:
            traker.start_scoring_checkpoint(checkpoint, model_id, num_targets=job.m)
        else:
            traker.load_checkpoint(checkpoint, model_id)
        add = traker.score if targets else traker.featurize
        for low in range(0, total, job.b):
            batch = job.batch(low)
            add(batch, num_samples=min(job.b, total - low))


def run(job: Job, stage: str, directory: Path) -> dict[str, float]:
    """Run a stage in this process."""
    job.model()  # what it imports is not part of the stage
    with watching() as found:
        if stage == "estimate":
            model = job.model()
            sizes = {"num_targets": job.m, "num_checkpoints": job.c, "proj_dim": job.p}
            options = {"use_half_precision": job.half, "batch_size": job.b}
            batch = job.batch(0)
            result = trak.estimate(
                model, job.task, job.n, batch=batch, **sizes, **options
            )
            print(result, file=sys.stderr)
            for name in STAGES:
                for key, value in asdict(getattr(result, name)).items():
                    found[f"{name} {key}"] = value
            return found
        traker = job.traker(directory)
        start = time.perf_counter()
        if stage in ("featurize", "score"):
            rows(traker, job, targets=stage == "score")
        elif stage == "finalize_features":
            traker.finalize_features()
        elif stage == "finalize_scores":
            traker.finalize_scores()
        else:
            traker.top_k(k=10)
        found["seconds"] = time.perf_counter() - start
    return found


def warm_up() -> None:
    """Load and start whatever torch does only once."""
    small = Job("", 40, 8, 1, 16, 8)
    with tempfile.TemporaryDirectory() as directory:
        for stage in STAGES:
            run(small, stage, Path(directory) / "store")


# -- in the parent ----------------------------------------------------------------------


def start(name: str, stage: str, directory: Path, threads: int) -> dict[str, float]:
    """Run a stage in a process of its own."""
    # Freed memory goes back at once, so that what is held is what is used.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, __file__, name, "--stage", stage, "--store"]
    done = subprocess.run(
        [*command, str(directory)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def compare(name: str, threads: int) -> list[dict[str, Any]]:
    """Estimate a job, do it, and print both."""
    print(f"\n{JOBS[name].title}; {threads} threads\n")
    print(
        f"| stage | {' | '.join(3 * ['estimated', 'measured', 'ratio'])} |".replace(
            "estimated", "{} estimated"
        ).format("disk, MB", "RAM, MB", "time, s")
    )
    print("|---|" + 9 * "---:|")
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "store"
        expected = start(name, "estimate", directory, threads)
        for stage in STAGES:
            before = on_disk(Path(temporary))
            measured = start(name, stage, directory, threads)
            measured["disk"] = on_disk(Path(temporary)) - before
            cells = []
            for key, unit in (("disk", 1e6), ("ram", 1e6), ("seconds", 1.0)):
                guess, truth = expected[f"{stage} {key}"] / unit, measured[key] / unit
                ratio = f"{guess / truth:.2f}" if truth else "-"
                cells += [f"{guess:.3g}", f"{truth:.3g}", ratio]
            print(f"| {stage} | {' | '.join(cells)} |", flush=True)
            found.append({
                "job": name,
                "stage": stage,
                **measured,
                "estimate": {
                    key: expected[f"{stage} {key}"]
                    for key in ("disk", "ram", "seconds")
                },
            })
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("jobs", nargs="*", default=[*JOBS], metavar="job")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.jobs) - set(JOBS):
        parser.error(f"there is no job {', '.join(unknown)}; choose from {[*JOBS]}")
    if arguments.stage:
        warm_up()
        found = run(JOBS[arguments.jobs[0]], arguments.stage, arguments.store)
        print(json.dumps(found))
        return
    results = [
        row for name in arguments.jobs for row in compare(name, arguments.threads)
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
