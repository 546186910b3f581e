"""A truth with its files: checkpoints, batches, and projected gradients that lines share."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_banks import judging_masks
from accuracy_plan import Line
from accuracy_truths import Truth
from torch import Tensor

from trak import TRAKer
from trak._reading import read_rows
from trak.projectors import BasicProjector, NoOpProjector, ProjectionType

EXPERIMENT = "targets"


@dataclass(frozen=True)
class Setting:
    """What a line is run on."""

    truth: Truth
    line: Line
    folder: Path
    """Of checkpoints and banks."""

    work: Path
    """Of what is measured."""

    as_stored: bool = False

    @cached_property
    def masks(self) -> np.ndarray:
        return judging_masks(self.truth)

    @cached_property
    def halves(self) -> np.ndarray:
        return self.truth.halves()

    @cached_property
    def train(self) -> list[Any]:
        return self.truth.batches("train")

    @cached_property
    def targets(self) -> list[Any]:
        """Batches of the targets that are scored."""
        return self.truth.batches("targets", self.m)

    @property
    def n(self) -> int:
        return self.truth.split.n

    @property
    def m(self) -> int:
        return min(self.line.targets or self.truth.split.m, self.truth.split.m)

    def checkpoint(self, c: int) -> dict[str, Tensor]:
        path = self.folder / f"{self.truth.name}-checkpoints" / f"{c}.pt"
        return torch.load(path, weights_only=True)

    # -- projected gradients ----------------------------------------------------------

    @property
    def store(self) -> Path:
        return self.work / "stores" / f"{self.truth.name}-{self.line.needs}"

    def open(self, **options: Any) -> TRAKer:
        """Open the store of the kind of gradients that the line needs."""
        model = self.truth.model
        given: dict[str, Any] = {"proj_dim": 2048}
        if self.line.needs == "wide":
            given = {"proj_dim": 8192}
        if self.line.needs == "exact":
            given = {"projector": NoOpProjector(), "use_half_precision": False}
        if self.line.needs == "dense":
            d = sum(value.numel() for value in model.parameters())
            given = {
                "use_half_precision": False,
                "projector": BasicProjector(
                    grad_dim=d,
                    proj_dim=4096,
                    seed=0,
                    proj_type=ProjectionType.rademacher,
                    device="cpu",
                ),
            }
        return TRAKer(
            model,
            self.truth.task,
            self.n,
            save_dir=self.store,
            logging_level=logging.ERROR,
            **given,
            **options,
        )

    def featurize(
        self, traker: TRAKer, c: int, checkpoint: dict[str, Tensor] | None = None
    ) -> None:
        """Store the projected gradients of a checkpoint, or of weights in its place."""
        checkpoint = checkpoint or self.checkpoint(c)
        traker.load_checkpoint(checkpoint, model_id=c, train_inds=self.halves[c])
        for batch in self.train:
            traker.featurize(batch)
        traker.finalize_features([c])
        traker.start_scoring_checkpoint(EXPERIMENT, checkpoint, c, self.m)
        for batch in self.targets:
            traker.score(batch)

    def spent(self, count: int) -> dict[str, float]:
        """Read what the gradients of so many checkpoints took."""
        name = Line("", "features", needs=self.line.needs).key(self.truth.name)
        found = json.loads((self.work / "cells" / f"{name}.json").read_text())
        return found["each"][count - 1]

    def rows(self, traker: TRAKer, c: int) -> tuple[Tensor, Tensor, np.ndarray]:
        """Read projected gradients and out-to-loss weights.

        Returns:
            Rows ``(n, p)`` and ``(m, p)``, and weights ``(n,)``.
        """
        saver, device = traker.saver, torch.device("cpu")
        saver.load_current_store(c)
        store = dict(saver.current_store)
        saver.load_current_store(c, EXPERIMENT, self.m)
        scored = dict(saver.current_store)
        weights = np.array(store["out_to_loss"], dtype=np.float64).reshape(-1)
        return (
            read_rows(store, "", device)(0, self.n),
            read_rows(scored, f"{EXPERIMENT}_", device)(0, self.m),
            weights,
        )
