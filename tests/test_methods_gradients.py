"""Methods of projected gradients, against explicit loops."""

from __future__ import annotations

import inspect
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import problems, reference
from tests.contracts.method_contract import MethodContract, cut, problem
from tests.problems import Problem, assert_scores, draw
from trak import TRAKer
from trak.errors import (
    BatchError,
    CheckpointError,
    NoCheckpointError,
    NonFiniteError,
    OptionError,
    StaleRowError,
    TrakError,
)
from trak.methods import (
    GAS,
    TRAK,
    GradientCosine,
    GradientDot,
    Method,
    ProjectedGradients,
    TracIn,
)
from trak.methods._gradients import unit_rows
from trak.projectors import NoOpProjector

EXACT: dict[str, Any] = {"projector": NoOpProjector(), "use_half_precision": False}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time would go into it; that files survive is tested elsewhere."""
    monkeypatch.setattr(np.memmap, "flush", lambda _array: None)
    monkeypatch.setattr(os, "fsync", lambda _file: None)


def gradients(found: Problem, save_dir: Path, **options: Any) -> ProjectedGradients:
    options = {"logging_level": 100, **EXACT, **options}
    return ProjectedGradients(
        found.model, found.task, found.checkpoints, save_dir=save_dir, **options
    )


class OfGradients(MethodContract):
    kind: type[Any]

    def make(self, problem: Problem, save_dir: Path, **options: Any) -> Method:
        options.pop("targets", None)
        return self.kind(gradients(problem, save_dir, **options))


class TestTRAK(OfGradients):
    kind = TRAK


class TestGradientDot(OfGradients):
    kind = GradientDot


class TestGradientCosine(OfGradients):
    kind = GradientCosine


class TestTracIn(OfGradients):
    kind = TracIn


class TestGAS(OfGradients):
    kind = GAS


# -- closed forms ---------------------------------------------------------------------


def by_loops(
    found: Problem, rates: list[float], *, unit: bool, signs_only: bool = False
) -> torch.Tensor:
    """Loss gradients of training examples with output gradients of targets: (n, m)."""
    total = torch.zeros(found.n, found.m, dtype=torch.float64)
    for checkpoint, rate in zip(found.checkpoints, rates, strict=True):
        train = found.gradients(checkpoint, found.train, found.n)
        targets = found.gradients(checkpoint, found.targets, found.m)
        q = found.out_to_loss(checkpoint)
        for i in range(found.n):
            for j in range(found.m):
                loss = -q[i] * train[i]
                product = -torch.dot(loss, targets[j])
                lengths = loss.norm() * targets[j].norm() if unit else 1.0
                total[i, j] += rate * product / lengths
    return total


@pytest.mark.parametrize(
    ("make", "rates", "unit"),
    [
        (GradientDot, [0.5, 0.5], False),
        (GradientCosine, [0.5, 0.5], True),
        (lambda shared: TracIn(shared, [0.3, 0.1]), [0.3, 0.1], False),
        (lambda shared: TracIn(shared, 0.2), [0.2, 0.2], False),
        (TracIn, [1.0, 1.0], False),
        (lambda shared: GAS(shared, (0.3, 0.1)), [0.3, 0.1], True),
        (GAS, [1.0, 1.0], True),
    ],
)
@pytest.mark.parametrize("name", ["mlp", "residual", "frozen"])
def test_products_are_those_of_explicit_loops(tmp_path, name, make, rates, unit):
    found = problems.PROBLEMS[name](checkpoints=2)
    method = make(gradients(found, tmp_path)).fit([found.train])
    scores = torch.from_numpy(method.score([found.targets]))
    assert_scores(scores, by_loops(found, rates, unit=unit))


def regression() -> tuple[Problem, torch.Tensor]:
    """A linear regression, and its residuals y - f: out-to-loss of either sign."""
    model = torch.nn.Linear(3, 1).double()
    x, y = draw(9, 3, seed=1), draw(9, 1, seed=2)
    state = problems.randomized(model, 0)
    found = Problem(model, (x, y), (x[:2], y[:2]), 9, 2, [state], "regression")
    residuals = y[:, 0] - (x @ state["weight"].T + state["bias"])[:, 0]
    return found, residuals


def test_the_sign_is_that_of_the_loss_gradient(tmp_path):
    found, residuals = regression()
    assert (residuals < 0).any()
    assert (residuals > 0).any()
    shared = gradients(found, tmp_path).fit([found.train])
    x = torch.cat([found.train[0], torch.ones(9, 1, dtype=torch.float64)], dim=1)
    kernel = x @ x[:2].T
    lengths = x.norm(dim=1)[:, None] * x[:2].norm(dim=1)
    for method, expected in [
        (GradientDot(shared), residuals[:, None] * kernel),
        (TracIn(shared, 0.5), 0.5 * residuals[:, None] * kernel),
        (GradientCosine(shared), residuals.sign()[:, None] * kernel / lengths),
        (GAS(shared, 2.0), 2 * residuals.sign()[:, None] * kernel / lengths),
    ]:
        assert_scores(torch.from_numpy(method.score([found.targets])), expected)


def test_tracin_is_the_step_of_gradient_descent(tmp_path):
    """One small step on an example's loss raises a target's output by its score."""
    found, _ = regression()
    rate = 1e-6
    method = TracIn(gradients(found, tmp_path), rate).fit([found.train])
    scores = method.score([found.targets])
    x, y = found.train
    for i in range(found.n):
        found.model.load_state_dict(found.checkpoints[0])
        before = found.model(found.targets[0]).detach()
        loss = (found.model(x[i]) - y[i]).square().sum() / 2
        grads = torch.autograd.grad(loss, list(found.model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(found.model.parameters(), grads, strict=True):
                parameter -= rate * grad
            rise = (found.model(found.targets[0]) - before)[:, 0]
        torch.testing.assert_close(
            torch.from_numpy(scores[i]).double(), rise, rtol=1e-4, atol=1e-13
        )


@pytest.mark.parametrize("p", [64, 2048])
def test_projected_products_estimate_the_exact_ones(tmp_path, p):
    found = problem(checkpoints=1)
    options = {"projector": None, "proj_dim": p}
    method = GradientDot(gradients(found, tmp_path, **options)).fit([found.train])
    error = torch.from_numpy(method.score([found.targets])) - by_loops(
        found, [1.0], unit=False
    )
    # The variance of one projected product is at most 2 |a|² |b|² / p, and the mean
    # over 44 dependent ones is below four times its expectation with certainty enough.
    train = found.gradients(found.checkpoints[0], found.train, found.n)
    targets = found.gradients(found.checkpoints[0], found.targets, found.m)
    losses = train.norm(dim=1) * found.out_to_loss(found.checkpoints[0])
    variance = 2 * (losses[:, None] * targets.norm(dim=1)).square() / p
    assert error.square().mean() < 4 * variance.mean()


@pytest.mark.parametrize("lambda_reg", ["auto", 0.01, "pinv"])
@pytest.mark.parametrize("half", [True, False])
def test_trak_is_what_traker_gives(tmp_path, lambda_reg, half):
    found = problems.PROBLEMS["mlp"](checkpoints=2)
    options = {"proj_dim": 7, "use_half_precision": half, "lambda_reg": lambda_reg}
    expected = problems.run(found, tmp_path / "traker", **options).numpy()
    del options["lambda_reg"]
    shared = gradients(found, tmp_path / "shared", projector=None, **options)
    method = TRAK(shared, lambda_reg).fit([found.train])
    np.testing.assert_array_equal(method.score([found.targets]), expected)


@pytest.mark.skipif(
    "exponents" not in inspect.signature(TRAKer).parameters,
    reason="TRAKer has no exponents",
)
def test_trak_passes_exponents_on(tmp_path):
    found = problems.PROBLEMS["mlp"](checkpoints=2)
    options = {"proj_dim": 7, "use_half_precision": False}
    shared = gradients(found, tmp_path / "shared", projector=None, **options)
    for exponents in [(0.5, 0.25), (0.0, 1.0)]:
        given = {**options, "exponents": exponents}
        expected = problems.run(found, tmp_path / str(exponents), **given).numpy()
        method = TRAK(shared, exponents=exponents).fit([found.train])
        np.testing.assert_array_equal(method.score([found.targets]), expected)


@pytest.mark.skipif(
    "train_inds" not in inspect.signature(TRAKer.load_checkpoint).parameters,
    reason="checkpoints do not remember their training sets",
)
def test_the_training_sets_of_checkpoints_are_recorded(tmp_path):
    found = problem()
    known = [np.arange(3), np.arange(11) % 2 == 0]
    shared = gradients(found, tmp_path, train_inds=known).fit([found.train])
    with pytest.raises(TrakError, match="train_inds"):  # it is another set now
        shared.traker.load_checkpoint(found.checkpoints[0], 0, train_inds=[5])


def test_trak_without_projection_is_textbook(tmp_path):
    found = problem()
    shared = gradients(found, tmp_path)
    method = TRAK(shared, 0.05, **paper()).fit([found.train])
    features, targets = [], []
    d = sum(value.numel() for value in found.parameters().values())
    for state in found.checkpoints:
        features.append(found.gradients(state, found.train, found.n) / math.sqrt(d))
        targets.append(found.gradients(state, found.targets, found.m) / math.sqrt(d))
    weights = [found.out_to_loss(state) for state in found.checkpoints]
    expected = reference.trak(features, targets, weights, 0.05)
    assert_scores(torch.from_numpy(method.score([found.targets])), expected)


def paper() -> dict[str, Any]:
    has = "exponents" in inspect.signature(TRAKer).parameters
    return {"exponents": (0.0, 1.0)} if has else {}


# -- one pass -------------------------------------------------------------------------


class Counting(torch.nn.Module):
    """Counts the examples that go through it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = problems.mlp().double()
        self.seen = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += len(inputs)
        return self.inner(inputs)


def counting() -> Problem:
    found = problem()
    found.model = Counting()
    found.checkpoints = [problems.randomized(found.model, seed) for seed in range(2)]
    return found


def several(shared: ProjectedGradients) -> list[Method]:
    return [
        TRAK(shared),
        GradientDot(shared),
        TRAK(shared, 0.1),
        GradientCosine(shared),
        TracIn(shared, [0.1, 0.2]),
        GAS(shared),
        TRAK(shared),
    ]


def all_scores(methods: list[Method], found: Problem) -> list[np.ndarray]:
    train, targets = cut(found.train, 3), cut(found.targets, 3)
    return [method.fit(train).score(targets) for method in methods]


def test_methods_share_one_pass(tmp_path):
    found = counting()
    shared = gradients(found, tmp_path / "shared")
    scores = all_scores(several(shared), found)
    seen = found.model.seen
    alone = []
    for i, method in enumerate(several(gradients(found, tmp_path / "one"))):
        found.model.seen = 0
        alone += all_scores([method], found)
        assert found.model.seen == (seen if i == 0 else 0)
    for one, other in zip(scores, alone, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(scores[0], scores[-1])


def test_another_process_finds_the_gradients(tmp_path):
    found = counting()
    first = all_scores(several(gradients(found, tmp_path)), found)
    found.model.seen = 0
    again = all_scores(several(gradients(found, tmp_path)), found)
    assert found.model.seen == 0
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_pass_that_was_cut_short_is_gone_on_with(tmp_path):
    found = counting()
    expected = all_scores([GradientDot(gradients(found, tmp_path / "whole"))], found)

    class StopError(Exception):
        pass

    class Failing(list):
        def __iter__(self):
            self.passes = getattr(self, "passes", 0) + 1
            for i, batch in enumerate(super().__iter__()):
                if self.passes == 3 and i == 2:  # in the second checkpoint
                    raise StopError
                yield batch

    with pytest.raises(StopError):
        gradients(found, tmp_path / "cut").fit(Failing(cut(found.train, 3)))
    found.model.seen = 0
    resumed = gradients(found, tmp_path / "cut").fit(cut(found.train, 3))
    rest = found.model.seen
    again = GradientDot(resumed).score(cut(found.targets, 3))
    np.testing.assert_array_equal(again, expected[0])
    found.model.seen = 0
    gradients(found, tmp_path / "new").fit(cut(found.train, 3))
    assert 0 < rest < found.model.seen / 2


def test_target_sets_do_not_mix(tmp_path):
    found = problem()
    shared = gradients(found, tmp_path).fit([found.train])
    methods = [TRAK(shared), GradientDot(shared)]
    x, y = found.train
    for method in methods:
        whole = method.score([(x, y)])
        for low, high in [(0, 4), (4, 8), (2, 5)]:
            part = method.score([(x[low:high], y[low:high])])
            np.testing.assert_allclose(part, whole[:, low:high], rtol=1e-5, atol=1e-7)


def test_a_container_that_has_changed_is_read_again(tmp_path):
    found = problem()
    method = GradientDot(gradients(found, tmp_path)).fit([found.train])
    every = cut(found.targets, 1)
    expected = method.score(every)
    targets = every[:2]
    np.testing.assert_allclose(method.score(targets), expected[:, :2], rtol=1e-5)
    targets[0] = every[3]
    np.testing.assert_allclose(method.score(targets), expected[:, [3, 1]], rtol=1e-5)
    targets += every[2:]
    scores = method.score(targets)
    np.testing.assert_allclose(scores, expected[:, [3, 1, 2, 3]], rtol=1e-5)


def test_rows_are_those_of_the_store(tmp_path):
    found = problem()
    shared = gradients(found, tmp_path).fit([found.train])
    parts = shared.rows([found.targets])
    assert len(parts) == len(shared.model_ids) == 2
    d = shared.traker.num_params_for_grad
    assert shared.gain == d
    for part, state in zip(parts, found.checkpoints, strict=True):
        expected = found.gradients(state, found.train, found.n) / math.sqrt(d)
        assert_scores(part.train(0, found.n), expected)
        assert_scores(part.train(3, 5), expected[3:5])
        assert_scores(part.targets(0, 4), expected[:4])
        weights = torch.from_numpy(part.out_to_loss)
        assert_scores(weights, found.out_to_loss(state))


def test_examples_without_gradient_score_zero():
    rows = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [3e30, 4e30]])
    read = unit_rows(lambda low, high: rows[low:high].clone())
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(read(0, 3), expected)


def test_half_precision_and_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("trak._memory.TILE", 64)
    found = problem()
    options = {"use_half_precision": True}
    method = TracIn(gradients(found, tmp_path, **options), [0.3, 0.1])
    scores = method.fit([found.train]).score([found.targets])
    expected = by_loops(found, [0.3, 0.1], unit=False)
    assert_scores(torch.from_numpy(scores), expected, 2e-3)


# -- errors ---------------------------------------------------------------------------


def test_what_cannot_be_shared_is_refused(tmp_path):
    found = problem()
    with pytest.raises(NoCheckpointError, match="checkpoints is empty"):
        ProjectedGradients(found.model, found.task, [], save_dir=tmp_path)
    for name in ("lambda_reg", "exponents"):
        with pytest.raises(
            OptionError, match=f"{name} is no option .* pass it to TRAK"
        ):
            gradients(found, tmp_path, **{name: 1})
    with pytest.raises(OptionError, match="train_inds has 1 entries for 2 checkpoints"):
        gradients(found, tmp_path, train_inds=[[0, 1]])
    with pytest.raises(OptionError, match="train_set_size must be at least 1"):
        gradients(found, tmp_path, train_set_size=0)
    assert not any(tmp_path.iterdir())


def test_the_training_set_is_one(tmp_path):
    found = problem()
    with pytest.raises(BatchError, match="11 examples, and train_set_size is 12"):
        gradients(found, tmp_path / "a", train_set_size=12).fit([found.train])
    shared = gradients(found, tmp_path, train_set_size=11).fit([found.train])
    shared.fit(cut(found.train, 5))
    x, y = found.train
    with pytest.raises(BatchError, match="11 examples that are not the 11"):
        shared.fit([(x.flip(0), y.flip(0))])
    with pytest.raises(StaleRowError, match="is not the one"):
        gradients(found, tmp_path).fit([(x.flip(0), y.flip(0))])


def test_iterators_are_refused(tmp_path):
    found = problem()
    shared = gradients(found, tmp_path)
    with pytest.raises(BatchError, match=r"train is a list_iterator, .* only once"):
        shared.fit(iter([found.train]))
    shared.fit([found.train])
    with pytest.raises(BatchError, match="targets is a generator"):
        shared.prepare(batch for batch in [found.targets])


class Shuffling:
    """Gives its examples in another order, or fewer, every time."""

    def __init__(self, batch: Any, *, fewer: bool = False) -> None:
        self.batch, self.fewer, self.passes = batch, fewer, 0

    def __iter__(self):
        self.passes += 1
        order = torch.roll(torch.arange(len(self.batch[0])), self.passes)
        if self.fewer:
            order = torch.arange(len(self.batch[0]) - self.passes)
        yield tuple(part[order] for part in self.batch)


@pytest.mark.parametrize("fewer", [True, False])
def test_loaders_that_shuffle_are_refused(tmp_path, fewer):
    found = problem()
    shared = gradients(found, tmp_path)
    with pytest.raises(BatchError, match="train gave other examples, or another order"):
        shared.fit(Shuffling(found.train, fewer=fewer))
    shared = gradients(found, tmp_path / "b").fit([found.train])
    with pytest.raises(BatchError, match="targets gave other examples"):
        shared.prepare(Shuffling(found.targets, fewer=fewer))
    shared.prepare([found.targets])


@pytest.mark.parametrize("kind", [TracIn, GAS])
@pytest.mark.parametrize(
    "rates",
    [
        [0.1],
        [0.1, 0.2, 0.3],
        0.0,
        -1.0,
        [0.1, math.nan],
        math.inf,
        ["a", "b"],
        "12",
        [1, "2"],
        None,
        True,
        2 + 1j,
        [[0.1], [0.2]],
        [[0.1], [0.2, 0.3]],
        torch.ones(2, 1),
    ],
)
def test_learning_rates_are_one_a_checkpoint(tmp_path, untyped, kind, rates):
    shared = gradients(problem(), tmp_path)
    with pytest.raises(OptionError, match="do not fit 2 checkpoints; pass a positive"):
        kind(shared, rates)


@pytest.mark.parametrize(
    "rates",
    [
        np.float32(0.5),
        np.array(0.5),
        torch.tensor(0.5),
        torch.tensor([0.5, 0.5]),
        np.array([0.5, 0.5], dtype=np.float16),
        [torch.tensor(0.5), np.float32(0.5)],
    ],
)
def test_learning_rates_of_any_numeric_type(tmp_path, untyped, rates):
    found = problem()
    shared = gradients(found, tmp_path).fit([found.train])
    expected = TracIn(shared, 0.5).score([found.targets])
    np.testing.assert_array_equal(
        TracIn(shared, rates).score([found.targets]), expected
    )


def test_empty_batches_count_for_nothing(tmp_path):
    found = problem()
    whole = cut(found.train, 4)
    expected = GradientDot(gradients(found, tmp_path / "a")).fit(whole)
    empty = tuple(part[:0] for part in found.train)
    method = GradientDot(gradients(found, tmp_path / "b")).fit([empty, *whole, empty])
    np.testing.assert_array_equal(
        method.score([empty, found.targets]), expected.score([found.targets])
    )


def test_one_state_dict_is_no_list_of_them(tmp_path, untyped):
    found = problem()
    found.checkpoints = found.checkpoints[0]
    with pytest.raises(CheckpointError, match=r"such as \[state_dict\]"):
        gradients(found, tmp_path)


def test_scores_that_overflow_are_refused(tmp_path):
    found = problem()
    method = TracIn(gradients(found, tmp_path), 3e38).fit([found.train])
    with pytest.raises(
        NonFiniteError, match=r"TracIn scores .* smaller learning rates"
    ):
        method.score([found.targets])
