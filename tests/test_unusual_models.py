"""Models and checkpoints that are not what they seem, or do not stay it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.problems import (
    Problem,
    assert_scores,
    classification,
    featurize,
    make,
    mlp,
    randomized,
    run,
    score,
    sparse,
    split,
)
from trak._batches import row_digests, take
from trak.errors import GradientError, OptionError, OrderError
from trak.gradient_computers import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import resolve_task
from trak.projectors import SparseProjector


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
    "computer",
    [HookGradientComputer, FunctionalGradientComputer, IterativeGradientComputer],
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


def wrapped_by_compile(model: torch.nn.Module) -> torch.nn.Module:
    wrapped: torch.nn.Module = torch.compile(model, backend="eager")
    return wrapped


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [(torch.nn.DataParallel, "module."), (wrapped_by_compile, "_orig_mod.")],
)
def test_wrapped_models_and_their_checkpoints(
    tmp_path: Path, wrap: Callable[[torch.nn.Module], torch.nn.Module], prefix: str
) -> None:
    plain, wrapped = classification(mlp(), 4), classification(mlp(), 4)
    wrapped.model = wrap(wrapped.model)
    options = {"gradient_computer": IterativeGradientComputer}
    saved = {prefix + k: value for k, value in plain.checkpoints[0].items()}
    known = run(plain, tmp_path / "1", **options)
    wrapped.checkpoints = [saved]
    scores = run(wrapped, tmp_path / "2", **options)
    assert_scores(scores, plain.expected(sparse(plain)))
    assert torch.equal(scores, known)
    # Each takes the other's checkpoint, and goes on with the other's store.
    for problem, store, checkpoint in [
        (plain, "2", saved),
        (wrapped, "1", plain.checkpoints[0]),
    ]:
        traker = make(problem, tmp_path / store, **options)
        traker.load_checkpoint(checkpoint)
        traker.featurize(problem.train)
        assert list(traker.saver.model_ids) == [0]
        traker.start_scoring_checkpoint(checkpoint, num_targets=problem.m)
        traker.score(problem.targets)
        again = torch.from_numpy(traker.finalize_scores() + 0.0)
        torch.testing.assert_close(again, known)


def test_the_functional_engine_cannot_call_data_parallel(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    problem.model = torch.nn.DataParallel(problem.model)
    with pytest.raises(GradientError, match=r"model\.module"):
        make(problem, tmp_path, gradient_computer=FunctionalGradientComputer)


def test_a_model_without_values(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    problem.model = problem.model.to("meta")
    with pytest.raises(OptionError, match="to_empty"):
        make(problem, tmp_path)


class Embedding(torch.nn.Module):
    """Word vectors, whose gradients may be sparse, before layers of other types."""

    def __init__(self, *, sparse: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
        self.embed = torch.nn.Embedding(5, 4, sparse=sparse, dtype=torch.float64)
        self.head = torch.nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.embed(ids) + self.shift))
        return logits


@pytest.mark.parametrize("sparse_gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sparse_gradients_and_parameters_of_several_types(
    tmp_path: Path, dtype: torch.dtype, sparse_gradients: bool
) -> None:
    model = Embedding(sparse=sparse_gradients, dtype=dtype)
    ids = torch.arange(11) % 5
    checkpoint = randomized(model, 0)
    problem = Problem(
        model, (ids, ids % 3), (ids[:4], ids[:4] % 2), 11, 4, [checkpoint]
    )
    computer = IterativeGradientComputer(model, resolve_task("image_classification"))
    model.load_state_dict(checkpoint)
    rows = computer.compute_per_sample_grad(problem.train)
    assert rows.dtype == torch.float64
    model.embed.sparse = False
    expected = problem.gradients(checkpoint, problem.train, 11)
    model.embed.sparse = sparse_gradients
    first = expected[:, :4].to(dtype).double()
    torch.testing.assert_close(rows, torch.cat([first, expected[:, 4:]], 1))
    scores = run(problem, tmp_path, gradient_computer=IterativeGradientComputer)
    assert torch.isfinite(scores).all()


def test_sparse_batches_have_digests_too() -> None:
    dense = torch.eye(3)[[0, 2, 1]]
    np.testing.assert_array_equal(row_digests(dense.to_sparse()), row_digests(dense))


def test_several_threads_with_one_model(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path)
    traker.load_checkpoint(problem.checkpoints[0], model_id=0)

    def one(i: int) -> None:
        traker.featurize(take(problem.train, slice(i, i + 1)), inds=[i])

    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(one, range(problem.n)):
            pass
    assert all(value.requires_grad for value in problem.model.parameters())
    traker.finalize_features()
    assert_scores(score(traker, problem), problem.expected(sparse(problem)))


def test_a_module_that_was_replaced_by_its_copy(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path)
    traker.load_checkpoint(problem.checkpoints[0], model_id=0)
    traker.featurize(take(problem.train, slice(0, 4)), num_samples=4)
    problem.model[0] = copy.deepcopy(problem.model[0])
    traker.featurize(take(problem.train, slice(4, None)), num_samples=problem.n - 4)
    traker.finalize_features()
    assert_scores(score(traker, problem), problem.expected(sparse(problem)))


class Words(torch.nn.Module):
    """An embedding, whose gradients come in runs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.words(ids)).mean(1))
        return logits


class HalvesPieces(SparseProjector):
    def project_into(
        self, out: Any, grads: Any, model_id: int, parameter: str = "", offset: int = 0
    ) -> None:
        super().project_into(out, grads / 2, model_id, parameter, offset)


def halve_whole(projector: SparseProjector) -> None:
    whole = projector.project
    projector.project = lambda *args, **kwargs: whole(*args, **kwargs) / 2


@pytest.mark.parametrize("way", ["a method of the class", "one of the instance"])
def test_projectors_that_change_what_they_inherit(tmp_path: Path, way: str) -> None:
    ids = torch.arange(33).reshape(11, 3) % 7
    problem = classification(Words(), 4)
    problem.train = (ids, problem.train[1])
    problem.targets = (ids[:4], problem.targets[1])
    d = sum(value.numel() for value in problem.model.parameters())
    kind = SparseProjector if way == "one of the instance" else HalvesPieces
    projector = kind(d, 64, 0)
    if way == "one of the instance":
        halve_whole(projector)
    traker = make(problem, tmp_path, projector=projector, proj_dim=64)
    featurize(traker, problem)
    traker.saver.load_current_store(0)
    found = torch.from_numpy(traker.saver.current_store["grads"] + 0.0)
    expected, _, _ = problem.parts(projector)
    torch.testing.assert_close(found.double(), expected[0], rtol=2e-3, atol=2e-3)


class Writes(torch.nn.Module):
    """Doubles its input where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.mul_(2))


@pytest.mark.parametrize(
    "kind",
    [HookGradientComputer, FunctionalGradientComputer, IterativeGradientComputer],
)
def test_a_model_that_writes_to_its_input_leaves_the_batch_alone(kind: Any) -> None:
    model = randomized_model(Writes())
    task = resolve_task("image_classification")
    options = {"grad_dim": 15, "dtype": torch.float32, "device": "cpu"}
    x, y = (
        torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),
        torch.arange(5) % 3,
    )
    batch = x.clone(), y
    computer = kind(model, task, **options)
    computer.load_model_params(model)
    weights = [computer.compute_loss_grad(batch) for _ in range(2)]
    computer.compute_per_sample_grad(batch)
    weights.append(computer.compute_loss_grad(batch))
    torch.testing.assert_close(batch[0], x)
    expected = task.get_out_to_loss_grad(model.layer, None, None, (2 * x, y))
    for found in weights:
        torch.testing.assert_close(found, expected)


def randomized_model(model: torch.nn.Module) -> torch.nn.Module:
    model.load_state_dict(randomized(model, 0))
    return model.eval()
