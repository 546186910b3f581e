"""``except`` clauses written for 0.3.2 still catch what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compat.problem import (
    CHECKPOINTS,
    TARGETS,
    TRAIN,
    M,
    N,
    featurize,
    make,
    network,
)
from trak import TRAKer, utils
from trak.errors import TrakError
from trak.modelout_functions import CLIPModelOutput
from trak.projectors import BasicProjector, CudaProjector
from trak.savers import ModelIDException

ROWS = torch.arange(N)


def both(traker: TRAKer) -> None:
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize(TRAIN, inds=ROWS, num_samples=N)


def both_for_targets(traker: TRAKer) -> None:
    featurize(traker)
    traker.start_scoring_checkpoint("exp", CHECKPOINTS[0], 0, M)
    traker.score(TARGETS, inds=ROWS[:M], num_samples=M)


def part_featurized(traker: TRAKer) -> None:
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize((TRAIN[0][:4], TRAIN[1][:4]), num_samples=4)
    traker.finalize_features()


def twice_registered(traker: TRAKer) -> None:
    featurize(traker)
    traker.saver.register_model_id(0, False)


def missing_key(traker: TRAKer) -> None:
    checkpoint = dict(CHECKPOINTS[0])
    del checkpoint["0.bias"]
    traker.load_checkpoint(checkpoint, 0)


def unknown_experiment(traker: TRAKer) -> None:
    featurize(traker)
    traker.finalize_scores("nothing")


def no_model_ids(traker: TRAKer) -> None:
    featurize(traker)
    traker.start_scoring_checkpoint("exp", CHECKPOINTS[0], 0, M)
    traker.score(TARGETS, num_samples=M)
    traker.finalize_scores("exp", model_ids=[])


@pytest.mark.parametrize(
    ("action", "old"),
    [
        (lambda t: t.featurize(TRAIN, num_samples=N), AssertionError),
        (both, AssertionError),
        (both_for_targets, AssertionError),
        (no_model_ids, AssertionError),
        (lambda t: t.finalize_features([7]), ModelIDException),
        (part_featurized, ModelIDException),
        (twice_registered, ModelIDException),
        (
            lambda t: t.start_scoring_checkpoint("exp", CHECKPOINTS[0], 7, M),
            ModelIDException,
        ),
        (missing_key, RuntimeError),
        (unknown_experiment, ValueError),
        (lambda t: make(t.save_dir, proj_dim=32), AssertionError),
        (lambda t: make(t.save_dir, train_set_size=N + 1), AssertionError),
        (
            lambda t: make(
                t.save_dir, projector=BasicProjector(43, 16, 0, "normal", "cpu")
            ),
            AssertionError,
        ),
        (lambda t: make(t.save_dir, task="image_clasification"), KeyError),
        (lambda t: make(t.save_dir, grad_wrt=["2.wieght"]), KeyError),
    ],
    ids=[
        "featurize-first",
        "inds-and-num_samples",
        "inds-and-num_samples-of-targets",
        "no-model-ids",
        "finalize-unknown",
        "finalize-part",
        "register-twice",
        "score-unknown",
        "checkpoint-keys",
        "unknown-experiment",
        "other-proj_dim",
        "other-size",
        "other-law",
        "unknown-task",
        "unknown-parameter",
    ],
)
def test_an_error_of_the_façade(
    action: Callable[[TRAKer], Any], old: type[Exception], tmp_path: Path
) -> None:
    traker = make(tmp_path)
    with pytest.raises(old) as caught:
        action(traker)
    assert isinstance(caught.value, TrakError)


@pytest.mark.parametrize(
    ("action", "old"),
    [
        (lambda: BasicProjector(4, 2, 0, "guassian", "cpu"), KeyError),
        (lambda: CudaProjector(4, 512, 0, "normal", "cpu", 8), ValueError),
        (
            lambda: utils.vectorize({"a": torch.ones(2, 1), "b": torch.ones(3, 1)}),
            AssertionError,
        ),
        (
            lambda: CLIPModelOutput().get_output(
                network(), {}, {}, torch.ones(1), torch.ones(1)
            ),
            AssertionError,
        ),
    ],
    ids=["projection-type", "cuda-on-a-cpu", "vectorize", "no-embeddings"],
)
def test_an_error_of_a_part(action: Callable[[], Any], old: type[Exception]) -> None:
    with pytest.raises(old) as caught:
        action()
    assert isinstance(caught.value, TrakError)


def test_messages_are_those_of_any_exception(tmp_path: Path) -> None:
    """A KeyError shows its message's repr; these show the message."""
    with pytest.raises(KeyError) as caught:
        make(tmp_path, grad_wrt=["2.wieght"])
    assert str(caught.value).startswith("grad_wrt names '2.wieght'")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelIDException, match="featurize first"):
        make(tmp_path).finalize_features()
    with pytest.raises(ModelIDException, match="featurize one first"):
        make(tmp_path).self_influence()
    traker = make(tmp_path)
    with pytest.raises(ModelIDException, match="model_ids is empty"):
        no_model_ids(traker)
