"""Cells: one line on one truth, run by a process of its own, and once only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_banks import judging_masks
from accuracy_plan import Line, features
from accuracy_truths import Truth

HERE = Path(__file__).parent


class CellError(Exception):
    """A line could not be run to its end."""


@dataclass(frozen=True)
class Runner:
    """Where lines run, and for how long at most."""

    data: Path
    folder: Path
    """Of checkpoints and banks."""

    work: Path
    theirs: Path | None
    """Python of traker 0.3.2; None to leave it out."""

    limit: float
    """Seconds that a line may take."""

    as_stored: bool
    """Whether nothing may be retrained."""

    say: Callable[[str], None]
    retrain: bool = False
    """Whether judges are retrained although there are some."""

    @property
    def cells(self) -> Path:
        return self.work / "cells"

    def is_done(self, truth: Truth, line: Line) -> bool:
        path = self.cells / f"{line.key(truth.name)}.json"
        if not path.exists():
            return False
        return line.method != "features" or self._store(truth, line).exists()

    def run(self, truth: Truth, line: Line) -> None:
        """Run a line unless it is done, and the gradients it needs before it.

        Raises:
            CellError: If it fails, or takes too long.
        """
        if line.needs and line.method != "features":
            self.run(truth, features(line.needs, truth.n_checkpoints))
        if self.is_done(truth, line):
            return
        if line.theirs and self.theirs is None:
            raise CellError("no environment of traker 0.3.2 was named")
        if line.method == "features":  # what was stored before would take no time now
            shutil.rmtree(self._store(truth, line), ignore_errors=True)
        self.cells.mkdir(parents=True, exist_ok=True)
        job = self._job(truth, line)
        path = self.cells / f"{line.key(truth.name)}.job"
        path.write_text(json.dumps(job))
        self.say(f"{truth.name}: {line.name} {line.variant}")
        self._call(self.theirs if line.theirs else Path(sys.executable), path, line)
        path.unlink()

    def read(self, truth: Truth, line: Line) -> dict[str, Any]:
        """Read what a line found, its predictions among it."""
        stem = self.cells / line.key(truth.name)
        found = json.loads(Path(f"{stem}.json").read_text())
        path = Path(f"{stem}.npz")
        if path.exists():
            with np.load(path, allow_pickle=False) as archive:
                for name, step in found["steps"].items():
                    if name in archive:
                        step["predictions"] = archive[name].astype(np.float64)
        return found

    def _store(self, truth: Truth, line: Line) -> Path:
        return self.work / "stores" / f"{truth.name}-{line.needs}"

    def _job(self, truth: Truth, line: Line) -> dict[str, Any]:
        job = {
            "truth": truth.name,
            "line": asdict(line),
            "data": str(self.data),
            "folder": str(self.folder),
            "work": str(self.work),
            "output": str(self.cells / f"{line.key(truth.name)}.json"),
            "as_stored": self.as_stored,
        }
        if line.theirs:
            job |= self._materials(truth)
        return job

    def _materials(self, truth: Truth) -> dict[str, str]:
        path = self.work / f"{truth.name}-materials.pt"
        masks = self.work / f"{truth.name}-masks.npz"
        if not path.exists():
            parts = {part: truth.batches(part) for part in ("train", "targets")}
            torch.save({**parts, "task": truth.task}, path)
        np.savez(masks, masks=judging_masks(truth))
        return {"materials": str(path), "masks": str(masks)}

    def _call(self, python: Path, job: Path, line: Line) -> None:
        name = "accuracy_theirs.py" if line.theirs else "accuracy_worker.py"
        keep = dict(os.environ)
        if line.theirs:
            keep.pop("PYTHONPATH", None)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        log, start = job.with_suffix(".log"), time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(
                [str(python), str(HERE / name), str(job)],
                env={**keep, **threads},
                stdout=file,
                stderr=file,
            )
            try:
                code = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
        if code is None:
            raise CellError(f"stopped after {self.limit / 60:.3g} minutes")
        if code != 0:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise CellError(lines[-1] if lines else f"exit status {code}")
        self.say(f"  [{time.perf_counter() - start:.0f} s]")
