"""What scores are judged by: which subsets, and what models retrained on them put out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from accuracy_truths import GIVEN, JUDGES, Truth

from trak.evaluation import GroundTruth, random_subsets

PUBLISHED = "kronfluence_lds_groundtruth.npz"
"""``rte_masks`` (100, 2432) and ``rte_margins`` (100, 277) of BERT retrainings."""

JUDGED_BY_OTHERS = ("rte", "rte_top", "rte_head")

SHIPPED = Path(__file__).with_name("banks")
"""Banks that judge without any retraining, in half precision."""


class MissingBankError(Exception):
    """Nothing is there to judge by."""


def judging_masks(truth: Truth) -> np.ndarray:
    """Give the subsets that judge a truth; no method sees them. Shape ``(s, n)``."""
    if truth.name in JUDGED_BY_OTHERS:
        return _published(truth).masks
    return random_subsets(truth.split.n, truth.n_subsets, seed=JUDGES)


def judges(truth: Truth, folder: Path, *, as_stored: bool) -> GroundTruth:
    """Read the retrainings that judge, and train what is missing unless ``as_stored``.

    Where the directory has none, those that come with the benchmark are taken.

    Args:
        truth: The truth.
        folder: Directory of the retrainings.
        as_stored: Whether those that are stored will do.

    Returns:
        The first subsets of :func:`judging_masks`, all of them unless ``as_stored``.

    Raises:
        MissingBankError: If fewer than 3 subsets are stored and none may be trained.
    """
    if truth.name in JUDGED_BY_OTHERS:
        return _published(truth)
    if not as_stored:
        return truth.judges(folder)
    path = folder / f"{truth.name}.npz"
    if not path.exists() and not path.with_name(f"{path.name}.parts").exists():
        path = SHIPPED / path.name
    return _stored(truth, path, JUDGES)


def ship(bank: GroundTruth, truth: Truth) -> None:
    """Write a bank in half precision beside the benchmark: ranks hardly change."""
    SHIPPED.mkdir(exist_ok=True)
    small = bank.outputs.astype(np.float16)
    about = {"trained_by": "python benchmarks/accuracy.py --ship", **truth.metadata}
    path = SHIPPED / f"{truth.name}.npz"
    GroundTruth(bank.masks, small, metadata=about).save(path)


def given(truth: Truth, folder: Path, *, as_stored: bool) -> GroundTruth:
    """Read, or train, the retrainings that datamodels are estimated from."""
    if not as_stored:
        return truth.given(folder)
    one = replace(truth, n_repeats=1, n_subsets=truth.n_given)
    return _stored(one, folder / f"{truth.name}-given.npz", GIVEN)


def _published(truth: Truth) -> GroundTruth:
    with np.load(truth.root / PUBLISHED, allow_pickle=False) as archive:
        train, targets = truth.split.rows
        masks = archive["rte_masks"].astype(bool)[:, train]
        margins = archive["rte_margins"].astype(np.float64)[:, targets]
        return GroundTruth(masks, margins[:, None])


def _stored(truth: Truth, path: Path, seed: int) -> GroundTruth:
    """Read the whole subsets that are there, as many as come first."""
    if path.exists():
        bank = GroundTruth.load(path)
        masks, outputs = bank.masks, bank.outputs.astype(np.float64)
    else:
        outputs = read_parts(path, truth.n_repeats)
        masks = random_subsets(truth.split.n, truth.n_subsets, seed=seed)[
            : len(outputs)
        ]
    if len(outputs) < 3:
        raise MissingBankError(f"{path} has {len(outputs)} subsets; train more first.")
    expected = random_subsets(truth.split.n, len(masks), seed=seed)
    if not np.array_equal(masks, expected):
        raise MissingBankError(f"{path} is not of the subsets of this truth.")
    return GroundTruth(masks, outputs)


def read_parts(path: Path, n_repeats: int) -> np.ndarray:
    """Read a bank that is still being made: the whole subsets that come first.

    Args:
        path: The bank's; its parts are in ``PATH.parts``.
        n_repeats: Retrainings of each subset.

    Returns:
        Outputs. Shape ``(s, r, m)``; ``(0, r, 0)`` where there are none.
    """
    files = {}
    for file in path.with_name(f"{path.name}.parts").glob("*.npz"):
        subset, repeat = file.name.split("-")[:2]
        files[int(subset), int(repeat)] = file
    rows: list[list[np.ndarray]] = []
    while all((len(rows), k) in files for k in range(n_repeats)):
        found = [np.load(files[len(rows), k]) for k in range(n_repeats)]
        rows.append([one["outputs"] for one in found])
    return np.array(rows) if rows else np.empty((0, n_repeats, 0))
