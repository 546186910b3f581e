"""Influence functions beside TRAK on the digits: LDS, minutes, and a scan of the damping.

Run ``python benchmarks/influence.py``; the retrained models go to ``--cache``.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import _digits_model as digits_model

from trak import TRAKer
from trak.evaluation import GroundTruth, lds, random_subsets
from trak.methods import EKFAC, Arnoldi, InfluenceFunction

BATCH_SIZE = 256
TASK = "image_classification"
MULTIPLES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

Weights = dict[str, Tensor]
Score = Callable[[list[Weights]], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("influence_cache"))
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--methods", nargs="*", help="names, or what they begin with")
    options = parser.parse_args()
    data = digits_model.load()
    subsets = random_subsets(len(data.train[0]), 5, seed=1)
    inds = [np.flatnonzero(mask) for mask in np.asarray(subsets)]
    checkpoints, truth = _trained(data, inds, options.cache)
    m = options.targets
    data = digits_model.Digits(data.train, (data.test[0][:m], data.test[1][:m]))
    truth = GroundTruth(truth.masks, truth.outputs[:, :, :m])
    print(f"{'':34}{'LDS, 1 checkpoint':>28}{'5 checkpoints':>16}{'CPU s each':>12}")
    for name, score, most in _methods(data):
        begins = (
            name == it or name.startswith(f"{it} ") for it in options.methods or ()
        )
        if options.methods and not any(begins):
            continue
        row = f"{name:34}"
        for c, width in ((1, 28), (5, 16)):
            if c > most:
                row += f"{'':{width}}"
                continue
            start = time.process_time()
            found = lds(score(checkpoints[:c]), truth)
            seconds = (time.process_time() - start) / c
            low, high = found.interval
            text = f"{found.mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if c == 1 else "")
            row += f"{text:>{width}}"
        print(f"{row}{seconds:>12.1f}", flush=True)


def _trained(
    data: digits_model.Digits, inds: list[np.ndarray], cache: Path
) -> tuple[list[Weights], GroundTruth]:
    """Train the checkpoints, and the models that check them, once."""
    cache.mkdir(exist_ok=True)
    bank, weights = cache / "bank.npz", cache / "checkpoints.pt"
    if not bank.exists():
        halves = random_subsets(len(data.train[0]), 100, seed=2)
        twice = [np.flatnonzero(mask) for mask in np.asarray(halves) for _ in range(2)]
        models = digits_model.train(data.train, twice, [*range(1000, 1200)])
        margins = digits_model.margins(models, data.test)
        outputs = margins.reshape(100, 2, -1).numpy()
        GroundTruth(np.asarray(halves), outputs).save(bank)
    if not weights.exists():
        models = digits_model.train(data.train, inds, [*range(len(inds))])
        torch.save(models, weights)
    return torch.load(weights, weights_only=True), GroundTruth.load(bank)


def _methods(data: digits_model.Digits) -> Iterator[tuple[str, Score, int]]:
    """Name every method, how it scores, and the checkpoints it has the time for."""
    train, targets = _batches(data.train), _batches(data.test)
    yield "TRAK", lambda weights: _trak(weights, data), 5

    def of(kind: Any, **options: Any) -> Score:
        def score(weights: list[Weights]) -> np.ndarray:
            # The curvature is of all examples, as TRAK's kernel is.
            model = digits_model.make_model()
            method = kind(model, TASK, weights, **options)
            return method.fit(train).score(targets)

        return score

    for multiple in MULTIPLES:
        yield f"EK-FAC {multiple:g}", of(EKFAC, multiple=multiple), 5
    yield "EK-FAC exact 1", of(EKFAC, multiple=1.0, fisher="exact"), 5
    yield "EK-FAC empirical 1", of(EKFAC, multiple=1.0, fisher="empirical"), 5
    for multiple in (0.001, 0.01, 0.1, 1.0):
        yield f"Arnoldi 200 {multiple:g}", of(Arnoldi, multiple=multiple), 5
    for multiple in (10.0, 3.0, 1.0, 0.3):
        cg = of(InfluenceFunction, multiple=multiple, tolerance=1e-2)
        yield f"CG {multiple:g}", cg, 5 if multiple >= 1 else 1
    lissa = {"solver": "lissa", "depth": 300}
    yield "LiSSA 1", of(InfluenceFunction, **lissa, multiple=1.0), 1
    hessian = {"curvature": "hessian", "multiple": 3.0, "tolerance": 1e-2}
    yield "CG Hessian 3", of(InfluenceFunction, **hessian), 1


def _trak(weights: list[Weights], data: digits_model.Digits) -> np.ndarray:
    with tempfile.TemporaryDirectory() as save_dir:
        traker = TRAKer(
            digits_model.make_model(),
            TASK,
            len(data.train[0]),
            save_dir=save_dir,
            logging_level=logging.WARNING,
        )
        for model_id, checkpoint in enumerate(weights):
            traker.load_checkpoint(checkpoint, model_id=model_id)
            for batch in _batches(data.train):
                traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for model_id, checkpoint in enumerate(weights):
            m = len(data.test[0])
            traker.start_scoring_checkpoint("test", checkpoint, model_id, m)
            for batch in _batches(data.test):
                traker.score(batch=batch, num_samples=len(batch[0]))
        return np.array(traker.finalize_scores("test"))


def _batches(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(part.split(BATCH_SIZE) for part in data), strict=True))


if __name__ == "__main__":
    main()
