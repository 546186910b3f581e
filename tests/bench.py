"""A small job that can be stopped at any stage, broken, and brought to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.problems import assert_scores, classification, featurize, make, score, split
from trak import TRAKer
from trak.errors import TrakError

STAGES = ("made", "loaded", "featurized", "finalized", "scoring", "scored")
"""Nothing; 4 of 11 rows; all rows; finalized; 2 of 4 targets; everything."""


def layers() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5),
        torch.nn.BatchNorm1d(5),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(5, 3),
    )


class Bench:
    """One checkpoint, 11 training examples and 4 targets, brought to a stage."""

    def __init__(self, directory: Path, stage: str = "made", **options: Any) -> None:
        self.directory = directory
        self.problem = classification(layers(), 4)
        self.ckpt = self.problem.checkpoints[0]
        self.images, self.labels = self.problem.train
        self.store = directory / "store"
        self.traker = self.open(**options)
        reached = STAGES.index(stage)
        if reached >= 1:
            self.traker.load_checkpoint(self.ckpt)
            for batch, _ in list(split(self.problem.train, 11, 4))[
                : 3 if reached > 1 else 1
            ]:
                self.traker.featurize(batch)
        if reached >= 3:
            self.traker.finalize_features()
        if reached >= 4:
            self.start()
            for batch, _ in list(split(self.problem.targets, 4, 2))[
                : 2 if reached > 4 else 1
            ]:
                self.traker.score(batch)
        if reached >= 5:
            self.traker.finalize_scores()

    def open(self, **options: Any) -> TRAKer:
        """Another TRAKer on the same store."""
        return make(self.problem, self.store, **options)

    def fresh(self, **options: Any) -> TRAKer:
        """A TRAKer on a store of its own."""
        return make(
            self.problem, options.pop("save_dir", self.directory / "fresh"), **options
        )

    def job(self, **options: Any) -> TRAKer:
        """A TRAKer on a store of its own, featurized and finalized."""
        traker = self.fresh(**options)
        featurize(traker, self.problem)
        traker.finalize_features()
        return traker

    def start(self, exp_name: Any = "exp", **changed: Any) -> None:
        given = {"checkpoint": self.ckpt, "model_id": 0, "num_targets": 4, **changed}
        self.traker.start_scoring_checkpoint(exp_name=exp_name, **given)

    def feed(self, **changed: Any) -> None:
        """Featurize examples 4 to 6, some of what is passed being changed."""
        batch = changed.pop("batch", None)
        images = changed.pop("images", self.images[4:7])
        labels = changed.pop("labels", self.labels[4:7])
        self.traker.featurize((images, labels) if batch is None else batch, **changed)

    def with_images(self, index: int, value: float) -> Tensor:
        images = self.images[4:7].clone()
        images[index, 1] = value
        return images

    def changed(self, **entries: Any) -> dict[str, Any]:
        """The checkpoint with some entries changed, or left out where None."""
        entries = {name.replace("_", ".", 1): value for name, value in entries.items()}
        return {k: v for k, v in {**self.ckpt, **entries}.items() if v is not None}

    def rows(self) -> dict[str, np.ndarray]:
        """What is stored and done: gradients of rows whose flag is set."""
        found = {}
        for flags in sorted(self.store.glob("*/*_is_*.mmap")):
            prefix = flags.name.replace("is_scored.mmap", "").replace(
                "is_featurized.mmap", ""
            )
            grads = flags.with_name(f"{prefix.removeprefix('_')}grads.mmap")
            done = np.load(flags)[:, 0] == 1
            found[str(grads)] = np.load(grads)[done]
        return found

    def complete(self, traker: TRAKer | None = None) -> Tensor:
        """Bring the job to its end; the scores."""
        traker = traker or self.traker
        featurize(traker, self.problem, 4)
        traker.finalize_features()
        return score(traker, self.problem, 2)


class Case(NamedTuple):
    """Something wrong that is done at some stage, and what must come of it."""

    name: str
    stage: str
    error: type[Exception]
    action: Callable[[Bench], Any]
    regex: str


def check_case(case: Case, directory: Path, expected: Tensor) -> None:
    """It is a named error, what was stored is still there, and work can go on."""
    bench = Bench(directory, case.stage)
    before = bench.rows()
    with pytest.raises(case.error, match=case.regex) as caught:
        case.action(bench)
    assert isinstance(caught.value, TrakError)
    after = bench.rows()
    for path, rows in before.items():
        np.testing.assert_array_equal(after[path][: len(rows)], rows)
    assert_scores(bench.complete(), expected, 1e-6)
