"""The process that runs one line: what it took, and what its scores predict.

``python benchmarks/accuracy_worker.py JOB.json`` writes ``KEY.npz``, which has for every
number of models the predictions of the subsets that judge, ``(s, m)``, and ``KEY.json``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import accuracy_lines
import accuracy_tried
import numpy as np
import torch
from accuracy_plan import Line
from accuracy_setting import Setting
from accuracy_truths import TRUTHS


class Clock:
    """Seconds by the wall and of processor time since it was started."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "wall": time.perf_counter() - self.wall,
            "cpu": time.process_time() - self.cpu,
        }


def added(*parts: dict[str, float]) -> dict[str, float]:
    """Add times.

    Returns:
        The sums.

    Example:
        >>> added({"wall": 1.0, "cpu": 2.0}, {})
        {'wall': 1.0, 'cpu': 2.0}
    """
    return {k: sum(part.get(k, 0.0) for part in parts) for k in ("wall", "cpu")}


def run(setting: Setting) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run a line to its end.

    Returns:
        What it took, and predictions by number of models.
    """
    # Reading data is no part of any method.
    _ = setting.masks, setting.train, setting.targets, setting.truth.model
    steps: dict[str, Any] = {}
    each: list[dict[str, float]] = []
    predictions: dict[str, np.ndarray] = {}
    shared: dict[str, float] = {}
    clock = Clock()
    method = setting.line.method
    known = accuracy_tried if hasattr(accuracy_tried, method) else accuracy_lines
    for step in getattr(known, method)(setting):
        shared = added(shared, clock.read())
        each.append(shared)
        clock, name = Clock(), f"{step.count}{'_' if step.label else ''}{step.label}"
        own: dict[str, float] = {}
        if step.scores is not None:
            scores = np.asarray(step.scores(), dtype=np.float64)
            own = clock.read()
            found = setting.masks.astype(np.float64) @ scores
            predictions[name] = found.astype(np.float32)
        steps[name] = {
            "count": step.count,
            "label": step.label,
            "trained": step.count if step.trained is None else step.trained,
            "seconds": added(shared, own, step.spent),
            "notes": step.notes,
        }
        clock = Clock()
    return {"steps": steps, "each": each, "m": setting.m}, predictions


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("once")
    given = {**job["line"], "counts": tuple(job["line"]["counts"])}
    truth = replace(TRUTHS[job["truth"]], root=Path(job["data"]))
    folder, work = Path(job["folder"]), Path(job["work"])
    setting = Setting(truth, Line(**given), folder, work, job["as_stored"])
    found, predictions = run(setting)
    output = Path(job["output"])
    if predictions:
        np.savez(output.with_suffix(".part.npz"), **predictions)
        output.with_suffix(".part.npz").replace(output.with_suffix(".npz"))
    output.with_suffix(".part").write_text(json.dumps(found))
    output.with_suffix(".part").replace(output.with_suffix(".json"))


if __name__ == "__main__":
    main()
