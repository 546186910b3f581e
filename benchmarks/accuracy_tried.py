"""Lines that change the estimator: how their scores come from a truth and its files."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_models import train
from accuracy_setting import Setting
from accuracy_steps import Lines, Step
from accuracy_variants import (
    Tried,
    late_epochs,
    pieces,
    sketched,
    split_kernels,
    tried,
)

from trak.modelout_functions import TASK_TO_MODELOUT


def variants(setting: Setting) -> Lines:
    """Score with every change to the estimator that was tried, without projection."""
    truth, count = setting.truth, max(setting.line.counts)
    chosen, late = late_epochs(truth.recipe.epochs), []

    def keep(epoch: int, model: torch.nn.Module) -> None:
        if epoch in chosen:
            late.append({k: v.clone() for k, v in model.state_dict().items()})

    own, data = np.flatnonzero(setting.halves[0]), truth.material
    train(truth.build, truth.loss, data, own, 0, truth.recipe, keep)

    def gradients(state: dict[str, torch.Tensor]) -> tuple:
        with tempfile.TemporaryDirectory(prefix="accuracy-") as directory:
            held = replace(setting, work=Path(directory))
            traker = held.open()
            held.featurize(traker, 0, state)
            return held.rows(traker, 0)

    checkpoints = [(setting.checkpoint(c), setting.halves[c]) for c in range(count)]
    exponents = tuple(TASK_TO_MODELOUT[truth.task].exponents)
    found = tried(
        truth.model, exponents, checkpoints, late, gradients, _lengths(setting)
    )
    for trained, name, scores in found:
        yield Step(trained, lambda scores=scores: scores, label=name)


def changes(setting: Setting) -> Lines:
    """Score with the changes to the estimator that projected gradients are enough for."""
    traker = setting.open()
    lengths = _lengths(setting)
    found = Tried(tuple(traker.exponents), lengths)
    for c in range(max(setting.line.counts)):
        rows, targets, weights = setting.rows(traker, c)
        found.add(rows, targets, weights, setting.halves[c])
        if c + 1 in setting.line.counts:
            for name, scores in found.scores():
                yield Step(c + 1, lambda scores=scores: scores, label=name)


def layers(setting: Setting) -> Lines:
    """Give each parameter a kernel, of gradients that are projected for it alone."""
    traker, p = setting.open(), setting.line.options["p"]
    places = [place for place, _ in pieces(setting.truth.model)]
    found = Tried(tuple(traker.exponents))
    total: Any = 0
    for c in range(max(setting.line.counts)):
        rows, targets, weights = setting.rows(traker, c)
        one = found.add_base(rows, targets, weights, setting.halves[c])
        *parts, kept = sketched(rows, targets, places, p, seed=c)
        total = total + split_kernels(*parts, kept, one, found.exponents[0])
        if c + 1 in setting.line.counts:
            scores = found.weighted(total, found.exponents[1])
            yield Step(c + 1, lambda scores=scores: scores)


def _lengths(setting: Setting) -> np.ndarray | None:
    """Count the tokens of the training texts of a language model."""
    if setting.truth.task != "causal_lm":
        return None
    return setting.truth.split.train[1].sum(1).double().numpy()
