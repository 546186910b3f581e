"""Methods of retraining banks, against arithmetic by hand and linear truths."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.contracts.method_contract import M, MethodContract, N
from tests.problems import Problem
from trak.errors import BackendError, BatchError, NonFiniteError, OptionError
from trak.evaluation import GroundTruth, lds, random_subsets
from trak.methods import Datamodels, EmpiricalInfluence, Method


def linear_truth(
    n: int, s: int, m: int, noise: float = 0.0, repeats: int = 1, share: float = 0.2
) -> tuple[GroundTruth, np.ndarray]:
    """Outputs that are sums over the subsets of a few weights, and those weights."""
    rng = np.random.default_rng(0)
    masks = random_subsets(n, s, seed=1)
    weights = rng.standard_normal((n, m)) * (rng.random((n, m)) < share)
    exact = (masks @ weights + 3.0)[:, None]
    return GroundTruth(
        masks, exact + noise * rng.standard_normal((s, repeats, m))
    ), weights


def of_training_set(targets: int) -> GroundTruth:
    """A bank in which each of the first examples raises the target that it is."""
    masks = random_subsets(N, 60, seed=1)
    outputs = masks[:, None, :targets] + 0.01 * np.arange(60)[:, None, None]
    return GroundTruth(masks, outputs)


class OfBank(MethodContract):
    needs_fit = False
    options: ClassVar[dict[str, Any]] = {}
    kind: type[Any]

    def make(self, problem: Problem, save_dir: Path, **options: Any) -> Method:
        return self.kind(of_training_set(options.get("targets", M)), **self.options)

    def test_it_needs_no_fit(self, problem_targets: Any = None) -> None:
        method = self.make(None, None)  # type: ignore[arg-type]
        assert method.scores.shape == (N, M)


class TestEmpiricalInfluence(OfBank):
    kind = EmpiricalInfluence


class TestDatamodels(OfBank):
    kind = Datamodels
    rtol = 1e-3


class TestRidge(OfBank):
    kind = Datamodels
    options: ClassVar[dict[str, Any]] = {"penalty": "ridge"}


# -- empirical influence --------------------------------------------------------------


def test_empirical_influence_by_hand():
    rng = np.random.default_rng(0)
    masks = random_subsets(7, 9, seed=3)
    outputs = rng.standard_normal((9, 2, 3)) + 1e6
    scores = EmpiricalInfluence(GroundTruth(masks, outputs)).scores
    truth = outputs.mean(axis=1)
    for i in range(7):
        expected = truth[masks[:, i]].mean(axis=0) - truth[~masks[:, i]].mean(axis=0)
        np.testing.assert_allclose(scores[i], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("value", "where"), [(True, "all"), (False, "none")])
def test_examples_that_nothing_is_known_of(value, where):
    masks = random_subsets(7, 9, seed=3)
    masks[:, 4] = value
    with pytest.raises(OptionError, match=rf"example 4 is in {where} of the 9.*1 such"):
        EmpiricalInfluence(GroundTruth(masks, np.zeros((9, 1, 2))))


# -- datamodels -----------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["lasso", "ridge"])
@pytest.mark.parametrize("per_target", [True, False])
def test_datamodels_recover_a_linear_truth(penalty, per_target):
    bank, weights = linear_truth(n=30, s=120, m=3, noise=0.01, repeats=2)
    method = Datamodels(bank, penalty=penalty, per_target=per_target)
    # The smallest lasso penalty tried is 3 % of what makes all weights zero.
    atol = 0.15 if penalty == "lasso" else 0.05
    if penalty == "ridge":  # the subsets, of one size, do not tell the mean
        weights = weights - weights.mean(axis=0)
    np.testing.assert_allclose(method.scores, weights, atol=atol)
    fresh, _ = linear_truth(n=30, s=200, m=3)
    assert lds(method.scores, fresh.masks[120:], fresh.outputs[120:]).mean > 0.9


def test_the_lasso_is_sparse_where_the_truth_is():
    bank, weights = linear_truth(n=100, s=80, m=4, noise=0.05, share=0.03)
    lasso, ridge = Datamodels(bank).scores, Datamodels(bank, penalty="ridge").scores
    assert (lasso == 0).mean() > 0.5
    assert (ridge != 0).all()
    assert np.abs(lasso - weights).mean() < np.abs(ridge - weights).mean()


@pytest.mark.parametrize(("n", "s"), [(6, 40), (40, 12), (9, 20)])
def test_the_lasso_is_at_its_optimum(n, s):
    """Every weight's correlation with what is left is alpha, or less where it is 0."""
    bank, _ = linear_truth(n, s, m=3, noise=0.5)
    method = Datamodels(bank, alpha=0.05)
    assert (method.alphas == 0.05).all()
    centred = bank.masks - bank.masks.mean(axis=0)
    outputs = bank.outputs.mean(axis=1)
    weights = method.scores.astype(np.float64)
    left = outputs - outputs.mean(axis=0) - centred @ weights
    pull = centred.T @ left / s
    np.testing.assert_allclose(pull.clip(-0.05, 0.05), pull, atol=3e-3)
    active = np.abs(weights) > 1e-2
    assert active.any()
    np.testing.assert_allclose(pull[active], 0.05 * np.sign(weights[active]), atol=3e-3)


@pytest.mark.parametrize(("n", "s"), [(6, 40), (40, 12)])
def test_the_ridge_is_the_closed_form(n, s):
    bank, _ = linear_truth(n, s, m=3, noise=0.5, repeats=3)
    alpha = 0.02
    scores = Datamodels(bank, alpha, "ridge").scores
    centred = bank.masks - bank.masks.mean(axis=0)
    outputs = bank.outputs.mean(axis=1)
    kernel = centred.T @ centred / s + alpha * np.eye(n)
    expected = np.linalg.solve(kernel, centred.T @ outputs / s)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per_target", [True, False])
def test_the_ridge_is_chosen_by_leaving_one_out(per_target):
    bank, _ = linear_truth(n=8, s=15, m=3, noise=1.0)
    found = Datamodels(bank, penalty="ridge", per_target=per_target)
    masks, outputs = bank.masks.astype(float), bank.outputs[:, 0]
    centred = masks - masks.mean(axis=0)
    unit = np.square(centred).sum() / 8 / 15
    grid = np.geomspace(1e-2, 1e3, 16) * unit
    errors = np.zeros((16, 3))
    for k, alpha in enumerate(grid):
        for left in range(15):
            rest = np.arange(15) != left
            x, y = masks[rest], outputs[rest]
            mean, offset = x.mean(axis=0), y.mean(axis=0)
            # The penalty is alpha * s / 2 of the whole bank.
            kernel = (x - mean).T @ (x - mean) + 15 * alpha * np.eye(8)
            weights = np.linalg.solve(kernel, (x - mean).T @ (y - offset))
            errors[k] += (outputs[left] - offset - (masks[left] - mean) @ weights) ** 2
    best = errors.argmin(axis=0)
    if not per_target:
        best = np.full(3, (errors / np.var(outputs, axis=0)).mean(axis=1).argmin())
    np.testing.assert_allclose(found.alphas, grid[best], rtol=1e-10)


def test_a_strong_ridge_is_empirical_influence():
    bank, _ = linear_truth(n=20, s=30, m=3, noise=0.5)
    ridge = Datamodels(bank, 1e9, "ridge").scores.astype(np.float64)
    share = bank.masks.mean(axis=0)[:, None]
    covariance = EmpiricalInfluence(bank).scores * share * (1 - share)
    np.testing.assert_allclose(ridge * 1e9, covariance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("penalty", ["lasso", "ridge"])
def test_outputs_that_never_change_have_no_causes(penalty):
    bank, _ = linear_truth(n=12, s=30, m=3, noise=0.1)
    bank.outputs[:, :, 1] = 2.5
    method = Datamodels(bank, penalty=penalty)
    assert (method.scores[:, 1] == 0).all()
    assert method.alphas[1] == 0
    assert (method.scores[:, [0, 2]] != 0).any(axis=0).all()


def test_an_example_in_every_subset_has_no_weight():
    bank, _ = linear_truth(n=12, s=30, m=2, noise=0.1)
    bank.masks[:, 3] = True
    for penalty in ("lasso", "ridge"):
        assert (Datamodels(bank, penalty=penalty).scores[3] == 0).all()


def test_many_targets_share_the_choice_of_some():
    bank, weights = linear_truth(n=20, s=60, m=90, noise=0.1)
    method = Datamodels(bank)
    assert method.scores.shape == (20, 90)
    assert np.corrcoef(method.scores.ravel(), weights.ravel())[0, 1] > 0.95


# -- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EmpiricalInfluence, Datamodels])
def test_banks_that_say_nothing_are_refused(kind):
    bank, _ = linear_truth(n=12, s=30, m=2)
    with pytest.raises(OptionError, match=r"the bank has 0 subsets .* one of each"):
        kind(GroundTruth(bank.masks[:0], bank.outputs[:0]))
    with pytest.raises(OptionError, match=r"0 targets; a method needs"):
        kind(GroundTruth(bank.masks, bank.outputs[:, :, :0]))
    bank.outputs[4, 0, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"retraining 0 of subset 4.*finite\(\)"):
        kind(bank)


def test_other_data_than_the_banks_is_refused():
    method = EmpiricalInfluence(of_training_set(M))
    batch = np.zeros((12, 2)), np.zeros(12)
    with pytest.raises(
        BatchError, match="12 examples, and the bank's subsets are of 11"
    ):
        method.fit([batch])
    with pytest.raises(
        BatchError, match="targets are 12, and the bank has outputs on 4"
    ):
        method.score([batch])


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_penalties_are_positive(alpha):
    with pytest.raises(OptionError, match=r"alpha=.* is no penalty"):
        Datamodels(of_training_set(M), alpha)


def test_options_of_datamodels():
    with pytest.raises(OptionError, match=r"'elastic' is unknown; pass 'lasso' or"):
        Datamodels(of_training_set(M), penalty="elastic")
    bank, _ = linear_truth(n=6, s=9, m=2, noise=0.1)
    with pytest.raises(OptionError, match=r"9 subsets are too few .* at least 10"):
        Datamodels(bank)
    assert Datamodels(bank, alpha=0.1).scores.shape == (6, 2)


@pytest.mark.parametrize("value", ["0.1", np.array([0.1, 0.2])])
def test_a_penalty_is_one_number(untyped, value):
    with pytest.raises(OptionError, match=r"alpha=.* is no penalty"):
        Datamodels(of_training_set(M), value)


@pytest.mark.parametrize("s", [1, 12])
@pytest.mark.parametrize("penalty", ["lasso", "ridge"])
def test_subsets_that_are_all_the_same_say_nothing(s, penalty):
    masks = np.repeat(random_subsets(7, 1, seed=3), s, axis=0)
    outputs = np.random.default_rng(0).standard_normal((s, 1, 2))
    with pytest.raises(OptionError, match=rf"the bank's {s} subsets are all the same"):
        Datamodels(GroundTruth(masks, outputs), 0.1, penalty)


@pytest.mark.parametrize("size", [1e40, 1e200])
def test_outputs_that_overflow_are_refused(size):
    bank, _ = linear_truth(n=12, s=30, m=2, noise=0.1)
    for kind in (EmpiricalInfluence, Datamodels):
        with pytest.raises(
            NonFiniteError, match="has an output that overflows float32"
        ):
            kind(GroundTruth(bank.masks, bank.outputs * size))


def test_scores_that_overflow_are_refused():
    masks = np.array([[True, False], [False, True]])
    method = EmpiricalInfluence(GroundTruth(masks, np.array([[[3e38]], [[-3e38]]])))
    with pytest.raises(NonFiniteError, match="influence scores overflow float32"):
        _ = method.scores


def test_a_bank_is_a_bank(untyped):
    for kind in (EmpiricalInfluence, Datamodels):
        with pytest.raises(OptionError, match="bank is a tuple; pass a GroundTruth"):
            kind((np.ones((3, 2), dtype=bool), np.ones((3, 1, 2))))


def test_scores_that_are_kept_cannot_be_written_to():
    method = EmpiricalInfluence(of_training_set(M))
    with pytest.raises(ValueError, match="read-only"):
        method.scores[0, 0] = 1.0
    batch = np.zeros((M, 2)), np.zeros(M)
    method.score([batch])[0, 0] = 1.0  # a copy


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(BackendError, match=r"pip install trak\[methods\]"):
        Datamodels(of_training_set(M))
    Datamodels(of_training_set(M), penalty="ridge")
