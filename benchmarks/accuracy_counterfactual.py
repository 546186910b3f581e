"""Models retrained without a target's most helpful examples: how far its margin falls."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
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
from trak.evaluation import (
    CounterfactualCurve,
    GroundTruth,
    bootstrap_interval,
    remove_and_retrain,
)


@dataclass(frozen=True)
class Removals:
    """What is removed of a truth, and how often models are retrained without it."""

    shares: tuple[float, ...]
    """Of the training examples, one stage after the other."""

    targets: dict[str, int]
    repeats: dict[str, int]
    n_random: int
    checkpoints: int
    modest: bool = False
    """Whether targets are drawn of those that are right by a modest margin, and stages
    stored as they are done. Else they are the first ones, which are random, too."""


SMALL = Removals(
    shares=(0.01, 0.02, 0.05, 0.1),
    targets={"quick": 2, "default": 10, "full": 20},
    repeats={"quick": 2, "default": 20, "full": 20},
    n_random=2,
    checkpoints=10,
)
TEXT = Removals(
    shares=(0.1, 0.05, 0.01),
    targets={"quick": 2, "default": 8, "full": 20},
    repeats={"quick": 2, "default": 5, "full": 10},
    n_random=1,
    checkpoints=5,
    modest=True,
)
HEADS = replace(TEXT, n_random=2, checkpoints=10)
REMOVALS = {
    **dict.fromkeys(("digits", "mnist"), SMALL),
    **dict.fromkeys(("sst2_head", "qnli_head"), HEADS),
    **dict.fromkeys(("sst2_top", "qnli_top"), TEXT),
}
RETRAININGS = 1000
"""Retrainings that datamodels are estimated from here, or as many as there are."""


def counterfactual(truth: Truth, runner: Runner, plan: str) -> None:
    """Remove and retrain, on the truths where training takes seconds."""
    output = runner.cells / f"{truth.name}_counterfactual.json"
    removals = REMOVALS.get(truth.name)
    if removals is None or output.exists():
        return
    runner.say(f"{truth.name}: counterfactuals")
    if removals.modest:
        _in_stages(truth, runner, removals, plan, output)
        return
    m = removals.targets[plan]
    scores = {
        k: v[:, :m] for k, v in _scores(truth, runner, removals.checkpoints).items()
    }
    curves = remove_and_retrain(
        truth.train,
        lambda model: truth.outputs(model)[:m],
        scores,
        ks=[round(share * truth.split.n) for share in removals.shares],
        n_random=removals.n_random,
        n_repeats=removals.repeats[plan],
        path=runner.work / f"{truth.name}-removed.npz",
        progress=False,
    )
    rows = [_row(truth, name, curve) for name, curve in curves.items()]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows))


def _in_stages(
    truth: Truth, runner: Runner, removals: Removals, plan: str, output: Path
) -> None:
    """Do one share after the other; what is done is written down after each."""
    chosen = _modest(truth, runner, removals, removals.targets[plan])
    few = replace(truth, read=lambda _: _targets(truth, chosen))
    few.__dict__["material"] = truth.material  # the training examples are the same
    cache = runner.work / f"{truth.name}-removed-scores.npz"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, **_scores(few, runner, removals.checkpoints))
    with np.load(cache, allow_pickle=False) as archive:
        scores = {name: archive[name] for name in archive.files}
    rows: list[dict[str, Any]] = []
    for share in removals.shares:
        k = round(share * truth.split.n)
        path = runner.work / f"{truth.name}-removed-{k}.npz"
        curves = remove_and_retrain(
            few.train,
            few.outputs,
            scores,
            ks=[k],
            n_random=removals.n_random,
            n_repeats=removals.repeats[plan],
            path=path,
            metadata={**truth.metadata, "targets": chosen.tolist()},
            progress=False,
        )
        wrong = wrong_labels(GroundTruth.load(path), [*curves])
        for name, curve in curves.items():
            rows.append({
                **_row(truth, name, curve),
                "wrong": wrong[name],
                "before": wrong[""],
                "chosen": chosen.tolist(),
            })
        output.parent.mkdir(parents=True, exist_ok=True)
        (runner.work / f"{truth.name}-removed.json").write_text(json.dumps(rows))
        runner.say(f"  {k} removed")
    output.write_text(json.dumps(rows))


def _row(truth: Truth, name: str, curve: CounterfactualCurve) -> dict[str, Any]:
    return {
        "truth": truth.name,
        "title": truth.title,
        "n": truth.split.n,
        "name": name,
        "ks": list(curve.ks),
        "mean": curve.mean.tolist(),
        "interval": curve.interval.tolist(),
        "targets": curve.n_targets,
        "repeats": curve.n_repeats,
    }


def wrong_labels(bank: GroundTruth, names: list[str]) -> dict[str, list[float]]:
    """Say how many of the retrained models give a target of two classes the other label.

    Args:
        bank: Margins of removals of one size, as ``remove_and_retrain`` stores them:
            nothing removed, what each method removes of each target, random removals.
        names: The methods in order, random removals last.

    Returns:
        Of each, and of nothing removed under ``""``, the share and its interval, over
        targets.
    """
    is_wrong = (bank.outputs < 0).astype(np.float64)
    m = bank.n_targets
    found = {"": is_wrong[0].mean(axis=0)}
    for place, name in enumerate(names[:-1]):
        rows = is_wrong[1 + place * m : 1 + (place + 1) * m]
        # Of the models without a target's examples, its own label.
        found[name] = rows.mean(axis=1).diagonal()
    found[names[-1]] = is_wrong[1 + (len(names) - 1) * m :].mean(axis=(0, 1))
    return {
        name: [float(share.mean()), *bootstrap_interval(share)]
        for name, share in found.items()
    }


def _modest(truth: Truth, runner: Runner, removals: Removals, count: int) -> np.ndarray:
    """Draw targets that every checkpoint has right, by less than most of those."""
    model, found = truth.model, []
    for state in replace(truth, n_checkpoints=removals.checkpoints).checkpoints(
        runner.folder
    ):
        model.load_state_dict(state)
        found.append(truth.outputs(model.eval()))
    margins = np.array(found)
    right = np.flatnonzero((margins > 0).all(axis=0))
    mean = margins.mean(axis=0)
    modest = right[mean[right] <= np.median(mean[right])]
    return np.sort(np.random.default_rng(0).choice(modest, count, replace=False))


def _targets(truth: Truth, chosen: np.ndarray) -> Any:
    columns = tuple(column[chosen] for column in truth.split.targets)
    return replace(truth.split, targets=columns)


def _scores(truth: Truth, runner: Runner, most: int) -> dict[str, np.ndarray]:
    """Score as the lines of the same names do."""
    count = min(most, truth.n_checkpoints)
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
