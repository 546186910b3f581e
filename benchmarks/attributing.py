"""Attribution in small, cut into jobs, and ways to compare the stores that come out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forked import Job, Report

from trak import TRAKer
from trak.score_computers import BasicScoreComputer


class PlainScoreComputer(BasicScoreComputer):
    """Replaces a step, so that features are made and kept the way of 0.3.2."""

    def get_xtx(self, grads: torch.Tensor) -> torch.Tensor:
        return super().get_xtx(grads)


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
