"""Attribute handwritten digits, and check the scores against real retraining.

Run ``python examples/digits.py``; it takes about two minutes on two cores, needs no
network, and writes its results into ``./demo_results``.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _before_torch  # noqa: F401  imported for its effect
import _digits_model as digits_model
import _digits_picture as picture
import numpy as np
import torch
from _digits_rivals import GradientDotProduct, UndampedInverse
from torch import Tensor
from tqdm.auto import tqdm

from trak import TRAKer
from trak.evaluation import (
    CrossValidation,
    LdsResult,
    bootstrap_interval,
    lds,
    random_subsets,
)
from trak.projectors import BasicProjector

BATCH_SIZE = 256
WIDTH = 88  # of the printed report


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is trained and measured. No model is used for two purposes."""

    n_train: int = 1297
    n_test: int = 500
    epochs: int = 20
    n_checkpoints: int = 5
    """Models that are attributed, each trained on its own random half."""
    n_subsets: int = 100
    """Other random halves, retrained on to see what the data really does."""
    n_repeats: int = 2
    """Retrainings of each of them, which differ in their seed."""
    n_removals: int = 15
    """Test digits whose top training digits are removed."""
    n_removed: int = 30
    n_removal_repeats: int = 3
    n_pictured: int = 8


@dataclass(frozen=True, slots=True)
class Method:
    """A way to turn the checkpoints' gradients into scores."""

    name: str
    options: Mapping[str, Any]
    """What ``TRAKer`` is given besides the model and the data."""

    knows_halves: bool = False
    """Whether it is told what each checkpoint was trained on."""


TRAK = Method("trak, as it comes", {}, knows_halves=True)
# traker 0.3.2's dense projection and arithmetic, in float32, where it does best.
_FLOAT32 = {"projector": BasicProjector, "use_half_precision": False}
_UNDAMPED = {**_FLOAT32, "score_computer": UndampedInverse}
UNDAMPED = (
    Method("undamped (0.3.2), p=512", {**_UNDAMPED, "proj_dim": 512}),
    Method("undamped (0.3.2), p=2048", {**_UNDAMPED, "proj_dim": 2048}),
)
DOT_PRODUCT = Method(
    "gradient dot product", {**_FLOAT32, "score_computer": GradientDotProduct}
)
PIXELS = "same label x pixel similarity"


@dataclass(frozen=True, slots=True)
class Removal:
    """What removing training digits did to a test digit's margin, one value a target.

    Each drop is against models that lost as many random training digits.
    """

    by_trak: np.ndarray
    by_pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that is attributed."""

    weights: dict[str, Tensor]
    half: np.ndarray
    """Which training digits it was trained on. (n,)"""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a method gives. (n, m) each"""

    first: np.ndarray
    """From the first checkpoint."""
    every: np.ndarray
    """From all of them."""
    expected: CrossValidation | None = None
    """How good the checkpoints themselves say that those are."""


@dataclass(frozen=True, slots=True)
class Results:
    """Everything the demo measured."""

    table: dict[str, tuple[LdsResult, LdsResult]]
    removal: Removal
    read_right: np.ndarray
    """Share of the retrained models that read each test digit correctly. (m,)"""
    scores: Scores
    """trak's."""


def score(
    method: Method,
    data: digits_model.Digits,
    checkpoints: list[Checkpoint],
    save_dir: Path,
    bar: tqdm,
) -> Scores:
    """Score every training digit for every test digit, through the public API alone."""
    bar.set_postfix_str(method.name)
    traker = TRAKer(
        model=digits_model.make_model(),
        task="image_classification",
        train_set_size=len(data.train[0]),
        save_dir=save_dir,
        logging_level=logging.WARNING,  # one progress bar is enough
        **method.options,
    )
    for model_id, checkpoint in enumerate(checkpoints):
        half = checkpoint.half if method.knows_halves else None
        traker.load_checkpoint(checkpoint.weights, model_id=model_id, train_inds=half)
        for batch in _batches(data.train):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
            bar.update(len(batch[0]))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint(
            exp_name="test",
            checkpoint=checkpoint.weights,
            model_id=model_id,
            num_targets=len(data.test[0]),
        )
        for batch in _batches(data.test):
            traker.score(batch=batch, num_samples=len(batch[0]))
            bar.update(len(batch[0]))
    first = np.array(traker.finalize_scores(exp_name="test", model_ids=[0]))
    every = np.array(traker.finalize_scores(exp_name="test"))
    return Scores(
        first, every, traker.cross_validate() if method.knows_halves else None
    )


def _batches(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(part.split(BATCH_SIZE) for part in data), strict=True))


def score_all(
    data: digits_model.Digits, checkpoints: list[Checkpoint]
) -> dict[str, Scores]:
    """Score with every method on the same checkpoints."""
    methods = (TRAK, *UNDAMPED, DOT_PRODUCT)
    work = len(methods) * len(checkpoints) * (len(data.train[0]) + len(data.test[0]))
    scores = {}
    with (
        tempfile.TemporaryDirectory() as store,
        tqdm(total=work, desc="featurize and score", unit="digit") as bar,
    ):
        for number, method in enumerate(methods):
            save_dir = Path(store) / str(number)
            scores[method.name] = score(method, data, checkpoints, save_dir, bar)
    by_pixels = pixel_scores(data)
    scores[PIXELS] = Scores(by_pixels, by_pixels)
    return scores


def pixel_scores(data: digits_model.Digits) -> np.ndarray:
    """Cosine similarity of the images where the labels agree, else 0: no model."""
    train, test = (
        torch.nn.functional.normalize(images.flatten(1), dim=1)
        for images, _ in (data.train, data.test)
    )
    same_label = data.train[1][:, None] == data.test[1][None, :]
    return (same_label * (train @ test.T)).numpy()


def retrain_on_subsets(
    plan: Plan, data: digits_model.Digits
) -> tuple[np.ndarray, np.ndarray]:
    """Retrain on random halves; return masks (s, n) and test margins (s, r, m)."""
    masks = random_subsets(plan.n_train, plan.n_subsets, seed=2)
    subsets = [np.flatnonzero(mask) for mask in masks for _ in range(plan.n_repeats)]
    seeds = range(10_000, 10_000 + len(subsets))
    weights = digits_model.train(
        data.train, subsets, seeds, epochs=plan.epochs, name="retrain on halves"
    )
    outputs = digits_model.margins(weights, data.test).numpy()
    return masks, outputs.reshape(plan.n_subsets, plan.n_repeats, -1)


def remove_and_retrain(
    plan: Plan,
    data: digits_model.Digits,
    rankings: dict[str, np.ndarray],
) -> Removal:
    """Take away each target's top training digits, retrain, and see its margin fall."""
    rng = np.random.default_rng(3)
    targets = rng.choice(plan.n_test, plan.n_removals, replace=False)
    k, everything = plan.n_removed, np.arange(plan.n_train)
    removed = [
        np.argsort(-scores[:, target])[:k]
        for scores in rankings.values()
        for target in targets
    ]
    # Random removals hurt no target in particular, so every target can share them.
    n_random = plan.n_removals
    removed += [rng.choice(plan.n_train, k, replace=False) for _ in range(n_random)]
    kept = [
        np.setdiff1d(everything, gone)
        for gone in removed
        for _ in range(plan.n_removal_repeats)
    ]
    seeds = [20_000 + number % plan.n_removal_repeats for number in range(len(kept))]
    weights = digits_model.train(
        data.train, kept, seeds, epochs=plan.epochs, name="retrain without the top"
    )
    outputs = digits_model.margins(weights, data.test).numpy()[:, targets]
    outputs = outputs.reshape(len(rankings) + 1, len(targets), -1, len(targets))
    *tops, random = outputs.mean(axis=2)
    own = np.arange(len(targets))
    drops = [random.mean(axis=0) - top[own, own] for top in tops]
    return Removal(*drops)


def run(plan: Plan) -> tuple[Results, digits_model.Digits]:
    """Train, attribute, and check."""
    data = digits_model.load(plan.n_train, plan.n_test)
    halves = random_subsets(plan.n_train, plan.n_checkpoints, seed=1)
    weights = digits_model.train(
        data.train,
        [np.flatnonzero(half) for half in halves],
        range(plan.n_checkpoints),
        epochs=plan.epochs,
        name="train checkpoints",
    )
    scores = score_all(data, [*map(Checkpoint, weights, halves)])
    masks, outputs = retrain_on_subsets(plan, data)
    table = {
        name: (lds(one.first, masks, outputs), lds(one.every, masks, outputs))
        for name, one in scores.items()
    }
    rankings = {name: scores[name].every for name in (TRAK.name, PIXELS)}
    removal = remove_and_retrain(plan, data, rankings)
    read_right = (outputs > 0).mean(axis=(0, 1))
    return Results(table, removal, read_right, scores[TRAK.name]), data


def report(plan: Plan, results: Results) -> str:
    """Put the numbers into a table and a paragraph."""
    c = plan.n_checkpoints
    lines = [
        f"Linear datamodeling score (LDS), with 95 % intervals: {plan.n_test} test digits,",
        f"{plan.n_subsets} random halves x {plan.n_repeats} retrainings that are not checkpoints",
        "",
        f"{'':30}{'1 checkpoint':26}{c} checkpoints",
    ]
    for name, (first, every) in results.table.items():
        cells = [_cell(first.mean, first.interval), _cell(every.mean, every.interval)]
        lines.append(f"{name:30}{cells[0]:26}{cells[1]}".rstrip())
    expected = results.scores.expected
    if expected is not None:
        cell = _cell(expected.lds, expected.interval)
        lines.append(f"{'trak, expected by its checkpoints':56}{cell}")
    ours = [result.mean for result in results.table[TRAK.name]]
    undamped = [
        max(results.table[method.name][column].mean for method in UNDAMPED)
        for column in (0, 1)
    ]
    ratios = [mine / theirs for mine, theirs in zip(ours, undamped, strict=True)]
    drops = {
        "trak's top": results.removal.by_trak,
        "the nearest of the same label": results.removal.by_pixels,
    }
    removed = (
        f"Fall of a test digit's log-odds when {plan.n_removed} training digits are "
        f"removed,\ninstead of as many at random: {plan.n_removals} random test digits, "
        f"{plan.n_removal_repeats} retrainings each"
    )
    lines += ["", removed, ""]
    for name, values in drops.items():
        lines.append(f"{name:30}{_cell(values.mean(), bootstrap_interval(values))}")
    lines += ["", _reading(results, ratios)]
    return "\n".join(lines)


def _cell(mean: float, interval: tuple[float, float]) -> str:
    return f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _reading(results: Results, ratios: list[float]) -> str:
    by_trak, by_pixels = results.removal.by_trak, results.removal.by_pixels
    text = (
        f"How to read this. The retrained models read {results.read_right.mean():.1%} of "
        f"the test digits correctly. An LDS of 1 would mean that a digit's scores rank "
        f"all retrainings by how sure they were of it, 0 that they know nothing about "
        f"them. On the same checkpoints, trak's scores reach {ratios[0]:.1f} times the "
        f"LDS of the better undamped setting with one checkpoint, and {ratios[1]:.1f} "
        f"times with all. Without the digits that trak names, the margin of a test digit "
        f"falls by {by_trak.mean():.1f}, and its odds by a factor of "
        f"{np.exp(by_trak.mean()):.0f}; without as many look-alikes of its label, by "
        f"{by_pixels.mean():.1f}. The rows above the last of the first table differ only "
        f"in what is done with the gradients, and with how sure the checkpoints are of a "
        f"training digit: trak takes roots of its 1 - p, and balances it between what a "
        f"checkpoint was trained on and what not, and the others multiply by the mean of "
        f"1 - p. What the checkpoints expect is of models that are retrained once."
    )
    return textwrap.fill(text, WIDTH)


def save(out: Path, plan: Plan, results: Results, data: digits_model.Digits) -> Path:
    """Write the scores, the numbers and the picture; return the picture's path."""
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "scores.npy", results.scores.every)
    numbers = {
        "accuracy": float(results.read_right.mean()),
        "lds": {
            name: [{"mean": r.mean, "interval": r.interval} for r in pair]
            for name, pair in results.table.items()
        },
        "expected": results.scores.expected and results.scores.expected.to_dict(),
        "removal": {
            "by_trak": results.removal.by_trak.tolist(),
            "by_pixels": results.removal.by_pixels.tolist(),
        },
    }
    (out / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (out / "report.txt").write_text(report(plan, results) + "\n")
    return picture.draw(
        out / "digits.png",
        data,
        results.scores.every,
        results.read_right,
        plan.n_pictured,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_results"))
    args = parser.parse_args()
    plan = Plan()
    results, data = run(plan)
    path = save(args.out, plan, results, data)
    print(f"\n{report(plan, results)}\n\nPicture: {path.resolve()}")


if __name__ == "__main__":
    main()
