"""A model that changes between loading a checkpoint and using it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.problems import (
    Problem,
    assert_scores,
    classification,
    featurize,
    make,
    mlp,
    score,
    sparse,
    split,
)
from trak.errors import OrderError
from trak.gradient_computers import (
    FunctionalGradientComputer,
    IterativeGradientComputer,
)


def train_on(problem: Problem) -> None:
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    problem.call(problem.model, problem.train).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def load_by_hand(problem: Problem) -> None:
    problem.model.load_state_dict(problem.checkpoints[1])


def assign_by_hand(problem: Problem) -> None:
    other = {k: value.clone() for k, value in problem.checkpoints[1].items()}
    problem.model.load_state_dict(other, assign=True)


@pytest.mark.parametrize("change", [train_on, load_by_hand, assign_by_hand])
@pytest.mark.parametrize(
    "computer", [FunctionalGradientComputer, IterativeGradientComputer]
)
def test_a_model_that_changed_since_it_was_loaded(
    tmp_path: Path, computer: type, change: Callable[[Problem], None]
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    traker = make(problem, tmp_path, gradient_computer=computer)
    traker.load_checkpoint(problem.checkpoints[0], model_id=0)
    change(problem)
    with pytest.raises(OrderError, match="not those of model id 0 any more"):
        traker.featurize(problem.train)
    featurize(traker, problem)
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", problem.checkpoints[0], 0, problem.m)
    change(problem)
    with pytest.raises(OrderError, match="not those of model id 0 any more"):
        traker.score(problem.targets)
    assert_scores(score(traker, problem), problem.expected(sparse(problem)))


def test_a_model_that_is_loaded_with_the_same_weights_again(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path)
    traker.load_checkpoint(problem.checkpoints[0])
    for batch, inds in split(problem.train, problem.n, 4):
        problem.model.load_state_dict(problem.checkpoints[0])
        problem.model.requires_grad_()
        traker.featurize(batch, inds=inds)
    traker.finalize_features()
    assert_scores(score(traker, problem), problem.expected(sparse(problem)))


def test_two_trakers_that_share_a_model(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    first, second = make(problem, tmp_path / "1"), make(problem, tmp_path / "2")
    first.load_checkpoint(problem.checkpoints[0])
    second.load_checkpoint(problem.checkpoints[1])
    with pytest.raises(OrderError, match="a model of its own"):
        first.featurize(problem.train)


def test_looking_at_another_checkpoint_does_not_redirect_rows(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    traker = make(problem, tmp_path / "looked")
    for model_id, checkpoint in enumerate(problem.checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for batch, inds in split(problem.train, problem.n, 4):
            traker.featurize(batch, inds=inds)
            traker.saver.load_current_store(0)
    traker.finalize_features()
    for model_id, checkpoint in enumerate(problem.checkpoints):
        traker.start_scoring_checkpoint("exp", checkpoint, model_id, problem.m)
        for batch, inds in split(problem.targets, problem.m, 3):
            traker.score(batch, inds=inds)
            traker.saver.load_current_store(1)
    scores = torch.from_numpy(traker.finalize_scores("exp") + 0.0)
    assert_scores(scores, problem.expected(sparse(problem)))
