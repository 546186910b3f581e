"""Removal of each target's top examples, on models that are solved by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from trak.errors import NonFiniteError, OptionError, StoreMismatchError
from trak.evaluation import (
    bootstrap_interval,
    counterfactual_curve,
    removal_masks,
    remove_and_retrain,
)

N, M, KS = 9, 4, [1, 2, 5]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# -- the curve -------------------------------------------------------------------------


def test_curve_is_the_difference_of_means(rng):
    full, removed = rng.standard_normal((3, M)), rng.standard_normal((3, 2, M))
    curve = counterfactual_curve(full, removed, KS, n_bootstrap=50, seed=2)
    expected = full.mean(axis=0) - removed.mean(axis=1)
    torch.testing.assert_close(curve.per_target, expected)
    torch.testing.assert_close(curve.mean, expected.mean(axis=1))
    for row, bounds in zip(expected, curve.interval, strict=True):
        want = bootstrap_interval(row, n_bootstrap=50, seed=2)
        assert bounds == pytest.approx(want)
    assert (curve.ks, curve.n_targets, curve.n_repeats) == ((1, 2, 5), M, 2)


def test_one_retraining_needs_no_axis(rng):
    full, removed = rng.standard_normal(M), rng.standard_normal((3, M))
    one = counterfactual_curve(full, removed, KS)
    other = counterfactual_curve(full[None], removed[:, None], KS)
    np.testing.assert_array_equal(one.per_target, other.per_target)
    tensors = torch.from_numpy(full), torch.from_numpy(removed)
    np.testing.assert_array_equal(
        counterfactual_curve(*tensors, KS).per_target, one.per_target
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_means_are_in_float64(rng, dtype):
    full = torch.from_numpy(1000 + rng.standard_normal((50, M))).to(dtype)
    removed = torch.from_numpy(1000 + rng.standard_normal((1, 50, M))).to(dtype)
    curve = counterfactual_curve(full, removed, [1])
    expected = full.double().mean(0) - removed.double().mean(1)
    torch.testing.assert_close(curve.per_target, expected.numpy())


def test_curves_are_subtracted_target_by_target(rng):
    full = rng.standard_normal(M)
    a, b = rng.standard_normal((3, 2, M)), rng.standard_normal((3, 5, M))
    one, other = (counterfactual_curve(full, x, KS) for x in (a, b))
    found = one.minus(other, n_bootstrap=50, seed=1)
    difference = one.per_target - other.per_target
    torch.testing.assert_close(found.per_target, difference)
    want = bootstrap_interval(difference[0], n_bootstrap=50, seed=1)
    assert found.interval[0] == pytest.approx(want)
    assert found.n_repeats == 2
    torch.testing.assert_close(one.minus(one).interval, np.zeros((3, 2)))


def test_curves_of_something_else_are_not_subtracted(rng):
    full, removed = rng.standard_normal(M), rng.standard_normal((3, M))
    curve = counterfactual_curve(full, removed, KS)
    with pytest.raises(OptionError, match=r"k=\[1, 2, 5\] and 4 .* k=\[1, 2, 6\]"):
        curve.minus(counterfactual_curve(full, removed, [1, 2, 6]))
    with pytest.raises(OptionError, match="and 3 targets; compare"):
        curve.minus(counterfactual_curve(full[1:], removed[:, 1:], KS))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_diverged_retrainings_name_the_target(bad):
    full, removed = np.zeros((2, M)), np.zeros((3, 2, M))
    removed[1, 0, 2] = bad
    with pytest.raises(
        NonFiniteError, match=r"removed\[1, 0, 2\] is .* target 2"
    ) as err:
        counterfactual_curve(full, removed, KS)
    assert err.value.index == 2
    full[1, 3] = bad
    with pytest.raises(NonFiniteError, match=r"full\[1, 3\] is .* for target 3"):
        counterfactual_curve(full, removed, KS)


@pytest.mark.parametrize(
    ("full", "removed", "message"),
    [
        ((M,), (3, M + 1), "m=4 targets, removed for 5"),
        ((M,), (2, M), "2 values of k, and ks has 3"),
        ((1, 1, M), (3, M), r"full has shape \(1, 1, 4\)"),
        ((M,), (M,), r"removed \(4,\); pass"),
        ((0,), (3, 0), "none of them 0"),
        ((0, M), (3, M), "none of them 0"),
        ((M,), (3, 0, M), "none of them 0"),
    ],
)
def test_shapes_must_agree(full, removed, message):
    with pytest.raises(OptionError, match=message):
        counterfactual_curve(np.zeros(full), np.zeros(removed), KS)


@pytest.mark.parametrize("ks", [[], [0, 1], [2, 1], [3, 3], [-1]])
def test_ks_ascend(ks):
    with pytest.raises(OptionError, match="pass numbers that ascend from at least 1"):
        counterfactual_curve(np.zeros(M), np.zeros((len(ks), M)), ks)
    with pytest.raises(OptionError, match="pass numbers that ascend from at least 1"):
        removal_masks(np.zeros((N, M)), ks)


@pytest.mark.parametrize("k", [1.5, np.nan, "1"])
def test_ks_are_whole_numbers(untyped, k):
    with pytest.raises(OptionError, match="entry of ks must be a whole number"):
        removal_masks(np.zeros((N, M)), [k])
    with pytest.raises(OptionError, match=r"ks=.*; pass a list"):
        removal_masks(np.zeros((N, M)), 5)


def test_result_is_frozen_and_prints_what_it_rests_on():
    curve = counterfactual_curve(
        np.full(2, 3.0), np.array([[2.0] * 2, [1.0] * 2]), [5, 9]
    )
    assert str(curve) == (
        "fall without the top k, k=5: 1.000 [1.000, 1.000], k=9: 2.000 [2.000, 2.000] "
        "(2 targets, 1 retrainings)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        curve.ks = ()


# -- what is removed -------------------------------------------------------------------


@pytest.mark.parametrize("as_type", [np.asarray, torch.from_numpy, np.asfortranarray])
def test_the_largest_scores_go(rng, as_type):
    scores = rng.standard_normal((N, M))
    masks = removal_masks(as_type(scores), KS)
    assert masks.shape == (3, M, N)
    for row, k in enumerate(KS):
        for target in range(M):
            gone = np.flatnonzero(~masks[row, target])
            np.testing.assert_array_equal(
                gone, np.sort(np.argsort(scores[:, target])[::-1][:k])
            )


def test_of_equal_scores_the_first_goes_first():
    gone = ~removal_masks(np.array([[1.0], [2.0], [2.0], [1.0]]), [1, 3])[:, 0]
    np.testing.assert_array_equal(
        gone, [[False, True, False, False], [True, True, True, False]]
    )


def test_removals_that_cannot_be():
    with pytest.raises(OptionError, match="without the top 9 of n=9"):
        removal_masks(np.zeros((N, M)), [9])
    with pytest.raises(OptionError, match="scores has 1 axes"):
        removal_masks(np.zeros(N), [1])
    scores = np.zeros((N, M))
    scores[3, 2] = np.nan
    with pytest.raises(NonFiniteError, match="training example 3 and target 2") as err:
        removal_masks(scores, [1])
    assert err.value.index == 3


# -- the driver ------------------------------------------------------------------------


class Sums:
    """A "model" is how much its examples give each target: exact scores are known."""

    def __init__(self, rng):
        self.effect = rng.standard_normal((N, M))
        self.seeds = []

    def train(self, indices, seed):
        self.seeds.append(seed)
        return self.effect[indices].sum(axis=0)

    @staticmethod
    def outputs(model):
        return model


@pytest.mark.parametrize("n_repeats", [1, 2])
def test_every_method_is_measured_on_its_own_removals(rng, n_repeats):
    world = Sums(rng)
    scores = {"exact": world.effect, "worst": -world.effect}
    curves = remove_and_retrain(
        world.train,
        world.outputs,
        scores,
        KS,
        n_random=7,
        n_repeats=n_repeats,
        seed=5,
        progress=False,
    )
    assert list(curves) == ["exact", "worst", "random"]
    descending = np.sort(world.effect, axis=0)[::-1]
    exact = np.stack([descending[:k].sum(axis=0) for k in KS])
    torch.testing.assert_close(curves["exact"].per_target, exact)
    worst = np.stack([descending[::-1][:k].sum(axis=0) for k in KS])
    torch.testing.assert_close(curves["worst"].per_target, worst)
    assert curves["exact"].n_repeats == n_repeats
    assert curves["random"].n_repeats == 7 * n_repeats
    # All models of a repeat share its seed.
    assert len(world.seeds) == n_repeats * (1 + 3 * (2 * M + 7))
    assert len(set(world.seeds)) == n_repeats
    drawn = np.random.default_rng(5).random((N, 7))
    kept = removal_masks(drawn, KS).astype(float) @ world.effect
    random = world.effect.sum(axis=0) - kept.mean(axis=1)
    torch.testing.assert_close(curves["random"].per_target, random)
    better = curves["exact"].minus(curves["random"])
    assert (better.interval[:, 0] > 0).all()


def test_an_interrupted_comparison_goes_on(rng, tmp_path):
    world, path = Sums(rng), tmp_path / "removals.npz"

    def run(train, **options):
        return remove_and_retrain(
            train,
            world.outputs,
            {"exact": world.effect},
            KS,
            path,
            n_random=2,
            progress=False,
            **options,
        )

    def dying(indices, seed):
        if len(world.seeds) == 5:
            raise KeyboardInterrupt
        return world.train(indices, seed)

    with pytest.raises(KeyboardInterrupt):
        run(dying)
    curves = run(world.train)
    assert len(world.seeds) == 1 + 3 * (M + 2)
    again = run(dying)
    assert len(world.seeds) == 1 + 3 * (M + 2)
    for name, curve in curves.items():
        np.testing.assert_array_equal(again[name].per_target, curve.per_target)
    with pytest.raises(StoreMismatchError, match="other subsets"):
        run(dying, seed=1)
    with pytest.raises(StoreMismatchError, match="metadata"):
        run(dying, metadata={"epochs": 3})


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({}, {}, r"methods \[\]; pass at least one"),
        ({"random": np.zeros((N, M))}, {}, "none that is called 'random'"),
        ({"a": np.zeros((N, M)), "b": np.zeros((N, 1))}, {}, r"shapes .*\(9, 1\)"),
        ({"a": np.zeros(N)}, {}, r"shapes .*\(9,\)"),
        ({"a": np.zeros((N, 0))}, {}, "neither of them 0"),
        ({"a": np.zeros((N, M))}, {"n_random": 0}, "n_random must be at least 1"),
        ({"a": np.zeros((N, M))}, {"n_repeats": 0}, "n_repeats must be at least 1"),
        ({"a": np.zeros((N, M))}, {"n_bootstrap": 0}, "n_bootstrap must be at least 1"),
        ({"a": np.zeros((N, M))}, {"seed": -1}, "seed=-1"),
        ({"a": np.zeros((N, M))}, {"seed": 0.5}, "seed must be a whole number"),
        ({"a": np.zeros((N, M))}, {"n_repeats": 1.5}, "n_repeats must be a whole"),
        (np.zeros((N, M)), {}, "scores is a ndarray; pass a dict"),
        ({"a": np.full((N, M), 1j)}, {}, r"scores\['a'\] is a ndarray of complex128"),
        ({"a": np.zeros((N, M))}, {"metadata": {1: 2}}, "metadata would be read"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(
    rng, untyped, scores, options, message
):
    world = Sums(rng)
    with pytest.raises(OptionError, match=message):
        remove_and_retrain(
            world.train, world.outputs, scores, KS, progress=False, **options
        )
    assert world.seeds == []


def test_outputs_of_other_targets_are_refused_at_once(rng):
    world = Sums(rng)
    with pytest.raises(OptionError, match="3 numbers where 4 targets were expected"):
        remove_and_retrain(
            world.train,
            lambda model: model[1:],
            {"a": world.effect},
            KS,
            progress=False,
        )
    assert len(world.seeds) == 1
