"""Models retrained without a target's most helpful examples: how far its margin falls."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_alike import alike
from accuracy_banks import given
from accuracy_cells import Runner
from accuracy_plan import Line
from accuracy_setting import EXPERIMENT, Setting
from accuracy_truths import Truth

from trak import methods
from trak.evaluation import GroundTruth, remove_and_retrain

TRUTHS = ("digits", "mnist")
SHARES = (0.01, 0.02, 0.05, 0.1)
TARGETS = {"quick": 2, "default": 10, "full": 20}
REPEATS = {"quick": 2, "default": 20, "full": 20}
RETRAININGS = 1000
"""Retrainings that datamodels are estimated from here, or as many as there are."""


def counterfactual(truth: Truth, runner: Runner, plan: str) -> None:
    """Remove and retrain, on the truths where training takes less than a second."""
    output = runner.cells / f"{truth.name}_counterfactual.json"
    if truth.name not in TRUTHS or output.exists():
        return
    runner.say(f"{truth.name}: counterfactuals")
    # The first targets of a test set that was shuffled are random ones.
    m = TARGETS[plan]
    scores = {k: v[:, :m] for k, v in _scores(truth, runner).items()}
    curves = remove_and_retrain(
        truth.train,
        lambda model: truth.outputs(model)[:m],
        scores,
        ks=[round(share * truth.split.n) for share in SHARES],
        n_random=2,
        n_repeats=REPEATS[plan],
        path=runner.work / f"{truth.name}-removed.npz",
        progress=False,
    )
    rows: list[dict[str, Any]] = []
    for name, curve in curves.items():
        rows.append({
            "truth": truth.name,
            "name": name,
            "ks": list(curve.ks),
            "mean": curve.mean.tolist(),
            "interval": curve.interval.tolist(),
            "targets": curve.n_targets,
            "repeats": curve.n_repeats,
        })
    output.write_text(json.dumps(rows))


def _scores(truth: Truth, runner: Runner) -> dict[str, np.ndarray]:
    """Score as the lines of the same names do."""
    count = min(10, truth.n_checkpoints)
    with tempfile.TemporaryDirectory(prefix="accuracy-") as directory:
        line = Line("", "trak", needs="sparse")
        work = Path(directory)
        setting = Setting(truth, line, runner.folder, work, runner.as_stored)
        traker = setting.open()
        for c in range(count):
            setting.featurize(traker, c)
        found = {"TRAK": np.array(traker.finalize_scores(EXPERIMENT, [*range(count)]))}
    by_label = Line("", "similarity", options={"by": "label"})
    found["similarity of inputs"] = alike(replace(setting, line=by_label))
    if truth.n_given >= 20:
        bank = given(truth, runner.folder, as_stored=runner.as_stored)
        part = GroundTruth(bank.masks[:RETRAININGS], bank.outputs[:RETRAININGS])
        found["datamodels"] = methods.Datamodels(part).score(setting.targets)
    return found
