"""The loops of 0.3.2's documentation and of the method's talk, as they are printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.compat.problem import (
    CHECKPOINTS,
    TARGETS,
    TRAIN,
    M,
    N,
    assert_scores,
    batches,
    make,
    network,
    textbook,
)
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import NoOpProjector


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return textbook()


@pytest.fixture
def traker(tmp_path: Path) -> TRAKer:
    return make(tmp_path, projector=NoOpProjector())


def test_the_talks_loop(traker: TRAKer, expected: Tensor) -> None:
    """No ids and no names."""
    for checkpoint in CHECKPOINTS:
        traker.load_checkpoint(checkpoint)
        for batch in batches(TRAIN, 8):
            traker.featurize(batch=batch, num_samples=batch[0].shape[0])
    traker.finalize_features()
    for checkpoint in CHECKPOINTS:
        traker.start_scoring_checkpoint(checkpoint, num_targets=M)
        for batch in batches(TARGETS, 2):
            traker.score(batch=batch, num_samples=batch[0].shape[0])
    scores = traker.finalize_scores()
    assert scores.shape == (N, M)
    assert_scores(scores, expected)


def test_the_readmes_loop(traker: TRAKer, expected: Tensor) -> None:
    """The checkpoint comes first, everything else by name."""
    for model_id, checkpoint in enumerate(CHECKPOINTS):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for batch in map(list, batches(TRAIN, 8)):  # as loaders give them
            traker.featurize(batch=batch, num_samples=batch[0].shape[0])
    traker.finalize_features()
    for model_id, checkpoint in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint(
            checkpoint, model_id=model_id, exp_name="test", num_targets=M
        )
        for batch in batches(TARGETS, 2):
            traker.score(batch=batch, num_samples=batch[0].shape[0])
    scores = traker.finalize_scores(exp_name="test")
    assert_scores(scores, expected)


def test_everything_by_position(tmp_path: Path, expected: Tensor) -> None:
    traker = TRAKer(
        network(),
        "image_classification",
        N,
        str(tmp_path),
        True,
        "cpu",
        FunctionalGradientComputer,
        NoOpProjector(),
        None,
        None,
        2048,
        100,
        False,
        32,
        0,
        None,
        0.5,
    )
    for model_id, checkpoint in enumerate(CHECKPOINTS):
        traker.load_checkpoint(checkpoint, model_id)
        for start in range(0, N, 8):
            rows = np.arange(start, min(start + 8, N))
            traker.featurize((TRAIN[0][rows], TRAIN[1][rows]), rows)
    traker.finalize_features([0, 1])
    for model_id, checkpoint in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("exp", checkpoint, model_id, M)
        traker.score(TARGETS, None, M)
    assert_scores(traker.finalize_scores("exp", [0, 1], False), expected)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list])
def test_inds_of_every_kind(kind: Any, traker: TRAKer, expected: Tensor) -> None:
    order = np.random.default_rng(0).permutation(N)
    for model_id, checkpoint in enumerate(CHECKPOINTS):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for rows in np.array_split(order, 7):
            batch = TRAIN[0][rows], TRAIN[1][rows]
            traker.featurize(batch=batch, inds=kind(rows))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("exp", checkpoint, model_id, num_targets=M)
        rows = np.arange(M)[::-1].copy()
        batch = TARGETS[0][rows], TARGETS[1][rows]
        traker.score(batch=batch, inds=kind(rows))
    assert_scores(traker.finalize_scores("exp"), expected)


def test_one_job_for_each_checkpoint(tmp_path: Path, expected: Tensor) -> None:
    """The loop for job arrays: every job sees its own checkpoint, a last one gathers."""
    options: dict[str, Any] = {"projector": NoOpProjector(), "save_dir": tmp_path}
    for model_id, checkpoint in enumerate(CHECKPOINTS):
        job = make(**options, load_from_save_dir=False)
        job.load_checkpoint(checkpoint, model_id=model_id)
        job.featurize(TRAIN, num_samples=N)
        job.finalize_features(model_ids=[model_id])
        job.start_scoring_checkpoint("exp", checkpoint, model_id, num_targets=M)
        job.score(TARGETS, num_samples=M)
    gather = make(**options)
    assert_scores(gather.finalize_scores(exp_name="exp"), expected)


def test_scoring_in_a_later_process(tmp_path: Path, expected: Tensor) -> None:
    options: dict[str, Any] = {"projector": NoOpProjector(), "save_dir": tmp_path}
    first = make(**options)
    for model_id, checkpoint in enumerate(CHECKPOINTS):
        first.load_checkpoint(checkpoint, model_id=model_id)
        first.featurize(TRAIN, num_samples=N)
    first.finalize_features()
    second = make(**options)
    for model_id, checkpoint in enumerate(CHECKPOINTS):
        second.start_scoring_checkpoint("exp", checkpoint, model_id, num_targets=M)
        second.score(TARGETS, num_samples=M)
    assert_scores(second.finalize_scores("exp"), expected)


def test_allow_skip_leaves_a_checkpoint_out(tmp_path: Path) -> None:
    traker = make(tmp_path, projector=NoOpProjector())
    for model_id, checkpoint in enumerate(CHECKPOINTS):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        traker.featurize(TRAIN, num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", CHECKPOINTS[0], 0, num_targets=M)
    traker.score(TARGETS, num_samples=M)
    skipped = np.array(traker.finalize_scores("exp", allow_skip=True))
    alone = np.array(traker.finalize_scores("exp", model_ids=[0]))
    np.testing.assert_array_equal(skipped, alone)
