"""Retrieval metrics against every order that ties leave open."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from trak.errors import NonFiniteError, OptionError
from trak.evaluation import (
    TargetMean,
    bootstrap_interval,
    mean_reciprocal_rank,
    recall_at_k,
)

N, M = 6, 8


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=[2, 3, 100], ids=["many ties", "ties", "few ties"])
def problem(request, rng):
    scores = rng.integers(0, request.param, (N, M)).astype(np.float64)
    relevant = rng.random((N, M)) < 0.4
    relevant[0] |= ~relevant.any(axis=0)
    return scores, relevant


def over_orders(scores, relevant, measure):
    """Average a metric of one target over all orders that its scores allow."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        in_order = scores[list(order)]
        if (in_order[:-1] >= in_order[1:]).all():
            found.append(measure(relevant[list(order)]))
    return np.mean(found)


def reference(scores, relevant, measure):
    pairs = zip(scores.T, relevant.T, strict=True)
    return np.array([over_orders(s, r, measure) for s, r in pairs])


@pytest.mark.parametrize("k", [1, 3, N])
def test_recall_is_the_mean_over_orders(problem, k):
    found = recall_at_k(*problem, k)
    expected = reference(*problem, lambda hits: hits[:k].sum() / hits.sum())
    torch.testing.assert_close(found.per_target, expected)
    assert found.name == f"recall@{k}"


def test_reciprocal_rank_is_the_mean_over_orders(problem):
    found = mean_reciprocal_rank(*problem)
    expected = reference(*problem, lambda hits: 1 / (1 + np.flatnonzero(hits)[0]))
    torch.testing.assert_close(found.per_target, expected)
    assert found.name == "MRR"


METRICS = [lambda s, r, **o: recall_at_k(s, r, 2, **o), mean_reciprocal_rank]
METRIC_NAMES = ["recall", "MRR"]
both = pytest.mark.parametrize("metric", METRICS, ids=METRIC_NAMES)


@both
def test_result_rests_on_the_targets(metric, problem):
    found = metric(*problem, n_bootstrap=50, seed=3)
    assert found.n_targets == M
    assert found.mean == found.per_target.mean()
    expected = bootstrap_interval(found.per_target, n_bootstrap=50, seed=3)
    assert found.interval == expected


@both
def test_order_of_the_examples_does_not_matter(metric, problem, rng):
    order = rng.permutation(N)
    scores, relevant = problem
    torch.testing.assert_close(
        metric(scores[order], relevant[order]).per_target, metric(*problem).per_target
    )


@both
def test_lists_of_indices_are_as_good_as_booleans(metric, problem):
    scores, relevant = problem
    lists = [np.flatnonzero(column).tolist() * 2 for column in relevant.T]  # duplicates
    expected = metric(*problem).per_target
    np.testing.assert_array_equal(metric(scores, lists).per_target, expected)
    tensors = torch.from_numpy(scores), torch.from_numpy(relevant)
    np.testing.assert_array_equal(metric(*tensors).per_target, expected)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_type_of_scores(metric, problem, dtype):
    scores, relevant = problem
    cast = torch.from_numpy(scores).to(dtype)
    found = metric(cast.requires_grad_(), relevant).per_target
    np.testing.assert_array_equal(found, metric(scores, relevant).per_target)


@both
def test_blocks_of_targets_and_strides_do_not_matter(metric, problem, monkeypatch):
    expected = metric(*problem).per_target
    monkeypatch.setattr("trak.evaluation._retrieval._ENTRIES_AT_ONCE", 3 * N)
    np.testing.assert_array_equal(metric(*problem).per_target, expected)
    strided = [np.asfortranarray(np.repeat(array, 2, axis=0))[::2] for array in problem]
    np.testing.assert_array_equal(metric(*strided).per_target, expected)


def test_constant_scores_come_to_chance():
    n, k = 50, 5
    scores, relevant = np.zeros((n, 2)), [[7], range(n)]
    recall = recall_at_k(scores, relevant, k)
    torch.testing.assert_close(recall.per_target, np.array([k / n, k / n]))
    ranks = mean_reciprocal_rank(scores, relevant)
    harmonic = (1 / np.arange(1, n + 1)).mean()
    torch.testing.assert_close(ranks.per_target, np.array([harmonic, 1.0]))


def test_one_example_and_one_target():
    scores, relevant = np.zeros((1, 1)), np.ones((1, 1), bool)
    assert recall_at_k(scores, relevant, 1).interval == (1.0, 1.0)
    assert mean_reciprocal_rank(scores, relevant).mean == 1.0


def test_recall_has_a_ceiling():
    scores = np.arange(10.0)[:, None]
    assert recall_at_k(scores, [range(10)], 4).mean == pytest.approx(0.4)


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_scores_name_their_place(metric, problem, monkeypatch, bad):
    monkeypatch.setattr("trak.evaluation._retrieval._ENTRIES_AT_ONCE", 2 * N)
    problem[0][4, 5] = bad
    with pytest.raises(NonFiniteError, match="training example 4 and target 5") as err:
        metric(*problem)
    assert err.value.index == 4


@both
def test_a_target_without_relevant_examples_is_named(metric, problem, monkeypatch):
    monkeypatch.setattr("trak.evaluation._retrieval._ENTRIES_AT_ONCE", 2 * N)
    scores, relevant = problem
    relevant[:, 5] = False
    with pytest.raises(OptionError, match="target 5 has no relevant"):
        metric(scores, relevant)
    with pytest.raises(OptionError, match="target 1 has no relevant"):
        metric(scores[:, :2], [[0], []])


@both
def test_shapes_must_agree(metric, problem):
    scores, relevant = problem
    with pytest.raises(OptionError, match=r"n=6 .* m=8 targets, .* for \(6, 7\)"):
        metric(scores, relevant[:, :-1])
    with pytest.raises(OptionError, match=r"relevant for \(5, 8\)"):
        metric(scores, relevant[:-1])
    with pytest.raises(OptionError, match=r"relevant for \(6, 2\)"):
        metric(scores, [[0], [1]])
    with pytest.raises(OptionError, match="scores has 1 axes"):
        metric(scores[:, 0], relevant)
    with pytest.raises(OptionError, match="relevant has dtype int64"):
        metric(scores, relevant.astype(np.int64))
    with pytest.raises(OptionError, match=r"no targets \(m=0\) to average (rec|MRR)"):
        metric(scores[:, :0], relevant[:, :0])


@both
@pytest.mark.parametrize("index", [-1, N])
def test_indices_are_those_of_training_examples(metric, problem, index):
    with pytest.raises(OptionError, match=f"relevant\\[1\\] has the index {index}"):
        metric(problem[0][:, :2], [[0], [1, index]])


@both
@pytest.mark.parametrize(
    "given",
    [
        [[True, False, False, False, False, False]] * 2,
        [np.arange(N) < 1] * 2,
        [torch.arange(N) < 1] * 2,
        [[1.5]] * 2,
    ],
)
def test_flags_of_each_target_are_not_taken_for_indices(
    metric, problem, given, untyped
):
    with pytest.raises(
        OptionError, match=r"index in relevant\[0\] must be a whole numb"
    ):
        metric(problem[0][:, :2], given)


@both
def test_relevant_examples_are_listed_for_each_target(metric, problem, untyped):
    scores = problem[0][:, :2]
    with pytest.raises(OptionError, match=r"relevant\[0\]=0; pass a list"):
        metric(scores, [0, 1])
    with pytest.raises(OptionError, match="relevant is a NoneType; pass booleans"):
        metric(scores, None)


@pytest.mark.parametrize("k", [0, N + 1, -1])
def test_k_is_a_length(problem, k, untyped):
    with pytest.raises(OptionError, match=f"k={k} of n=6"):
        recall_at_k(*problem, k)
    with pytest.raises(OptionError, match="k must be a whole number"):
        recall_at_k(*problem, 2.0)


def test_result_prints_what_it_rests_on():
    text = str(TargetMean("MRR", 0.5, (0.25, 0.75), np.zeros(4), 4))
    assert text == "MRR 0.500 [0.250, 0.750] (4 targets)"
