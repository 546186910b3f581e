"""Standard errors, stability of the top examples, and soft thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests import reference
from trak.errors import NonFiniteError, OptionError
from trak.evaluation import random_subsets
from trak.evaluation._uncertainty import combine, standard_errors, top_k_stability
from trak.evaluation._uncertainty_threshold import (
    choose_threshold,
    soft_threshold,
    threshold_keeping,
)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# -- standard errors ------------------------------------------------------------------


def test_without_weights_it_is_the_standard_error_of_a_mean():
    kernels = draws(5, 7, 3)
    expected = kernels.std(axis=0, ddof=1) / 5**0.5
    assert_close(standard_errors(kernels), expected)
    assert_close(standard_errors(torch.from_numpy(kernels)), expected)


@pytest.mark.parametrize("exponent", [1.0, 0.25, 0.0])
def test_weights_are_left_out_with_their_checkpoint(exponent):
    kernels, weights = draws(4, 6, 2), draws(4, 6, seed=1)
    left = []
    for c in range(4):
        others = [k for k in range(4) if k != c]
        used = reference.result_weights(torch.from_numpy(weights[others]), exponent)
        left.append(used.numpy()[:, None] * kernels[others].mean(axis=0))
        assert_close(combine(kernels[others], weights[others], exponent), left[-1])
    expected = (np.var(left, axis=0) * 3) ** 0.5
    assert_close(standard_errors(kernels, weights, exponent=exponent), expected)


def test_agreeing_checkpoints_have_no_error_whatever_the_scale():
    kernels = np.full((3, 2, 1), 1e8 + 0.1, dtype=np.float32)
    assert_close(standard_errors(kernels), np.zeros((2, 1)))


def test_it_says_how_far_the_mean_is_from_the_truth():
    kernels = draws(6, 400, 20)  # of which the truth is 0
    errors = standard_errors(kernels)
    assert_close(
        float((kernels.mean(axis=0) ** 2).mean()),
        float((errors**2).mean()),
        rtol=0.1,
        atol=0.0,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_and_strides(dtype):
    kernels = torch.from_numpy(draws(3, 5, 4)).to(dtype).transpose(1, 2)
    expected = standard_errors(kernels.double().contiguous())
    assert_close(standard_errors(kernels), expected, rtol=1e-5, atol=1e-6)


# -- top k ----------------------------------------------------------------------------


def test_stability_is_foreseen_from_halves():
    """Normal scores: what 8 others have in common, from 8."""
    n, m, k = 500, 40, 25
    truth = draws(n, m)
    first = truth + 2 * draws(8, n, m, seed=1)
    second = truth + 2 * draws(8, n, m, seed=2)
    found = top_k_stability([first[:, :, :15], first[:, :, 15:]], k)

    def top(scores):
        chosen = np.zeros_like(scores, dtype=bool)
        np.put_along_axis(chosen, np.argsort(-scores, axis=0)[:k], True, axis=0)
        return chosen

    again = (top(first.mean(axis=0)) & top(second.mean(axis=0))).sum() / k / m
    limit = (top(first.mean(axis=0)) & top(truth)).sum() / k / m
    # 40 targets x 25 examples: a deviation of 0.5 / sqrt(1000) for each of two figures.
    assert_close(float(found.again.mean()), float(again), rtol=0.0, atol=0.06)
    assert_close(float(found.limit.mean()), float(limit), rtol=0.0, atol=0.06)
    assert found.halves.mean() < found.again.mean() < found.limit.mean()
    assert found.halves.shape == (m,)
    assert str(found).startswith("top 25: ")


def test_certain_and_random_tops():
    same = np.repeat(draws(1, 100, 5), 4, axis=0)
    found = top_k_stability([same], 10)
    assert_close(found.halves, np.ones(5))
    assert_close(found.again, np.ones(5), rtol=0.0, atol=1e-3)
    noise = top_k_stability([draws(2, 1000, 30)], 100)
    assert_close(float(noise.halves.mean()), 0.1, rtol=0.0, atol=0.03)


def test_weights_take_part():
    kernels = np.abs(draws(3, 30, 2)) + 1
    weights = np.full((3, 30), 1e-6)
    weights[:, :5] = 1.0
    found = top_k_stability([kernels], 5, weights)
    assert_close(found.halves, np.ones(2))


# -- thresholds -----------------------------------------------------------------------


def test_soft_threshold():
    scores = torch.tensor([[3.0, -3.0], [0.5, -0.5]])
    expected = np.array([[2.0, -1.0], [0.0, 0.0]])
    found = soft_threshold(scores, np.array([1.0, 2.0]))
    assert_close(found, expected)
    assert not np.signbit(found[1]).any()
    with pytest.raises(OptionError, match=r"level=-1.0; pass thresholds >= 0"):
        soft_threshold(scores, -1.0)
    for level in (np.ones(3), np.ones((2, 1)), np.array([1.0, np.nan])):
        with pytest.raises(OptionError, match=r"one for each of the 2 targets"):
            soft_threshold(scores, level)


def test_scores_that_tie_at_a_threshold_go_together():
    scores = np.array([[2.0], [1.0], [-1.0], [1.0]])
    assert threshold_keeping(scores, 0.5).tolist() == [1.0]
    assert (soft_threshold(scores, 1.0) != 0).sum() == 1


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 1e-9])
def test_a_threshold_keeps_its_share(share):
    scores = draws(40, 3)
    kept = (soft_threshold(scores, threshold_keeping(scores, share)) != 0).sum(axis=0)
    assert kept.tolist() == [max(1, round(40 * share))] * 3


def sparse_world(count, n=400, m=20, signal=12, noise=1.0):
    """A few examples matter for each target, and the others' scores are noise."""
    rng = np.random.default_rng(0)
    effects = np.zeros((n, m))
    for z in range(m):
        effects[rng.permutation(n)[:signal], z] = 5.0
    masks = random_subsets(n, count, 0.5, 0)
    kernels = effects + noise * rng.standard_normal((count, n, m))
    return kernels, masks, masks @ effects + rng.standard_normal((count, m))


def test_a_threshold_is_chosen_where_few_examples_matter():
    kernels, masks, outputs = sparse_world(8, noise=4.0)
    found = choose_threshold(kernels, None, masks, outputs)
    assert found.share < 0.5
    assert found.lds[found.shares.index(found.share)] > found.lds[0]
    assert found.n_targets == 20


def test_no_threshold_where_all_examples_matter():
    rng = np.random.default_rng(0)
    n, m, count = 100, 20, 8
    effects = rng.standard_normal((n, m))
    masks = random_subsets(n, count, 0.5, 0)
    kernels = effects + 0.1 * rng.standard_normal((count, n, m))
    weights = np.ones((count, n))
    found = choose_threshold(kernels, weights, masks, masks @ effects, shares=[0.02])
    assert found.share == 1.0
    assert found.shares == (1.0, 0.02)
    assert found.gain_errors[0] == 0.0


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_weights_of_a_threshold_are_balanced(exponent):
    kernels, masks, outputs = sparse_world(6, n=60, m=8, noise=2.0)
    weights = np.random.default_rng(1).random((6, 60)) * np.where(masks, 0.1, 1.0)
    pairs = zip(torch.from_numpy(weights), torch.from_numpy(masks), strict=True)
    levelled = np.stack([reference.level(*pair).numpy() for pair in pairs])
    found, expected = (
        choose_threshold(kernels, q, masks, outputs, exponent=exponent)
        for q in (weights, levelled)
    )
    assert_close(found.lds, expected.lds)
    assert found.share == expected.share
    # Weights of 0 are 1 to the power of 0.
    weights[:, :30] = 0.0
    found, expected = (
        choose_threshold(kernels, q, masks, outputs, exponent=0.0)
        for q in (weights, None)
    )
    assert_close(found.lds, expected.lds)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_a_threshold_does_not_depend_on_the_scale(scale):
    kernels, masks, outputs = sparse_world(4, n=60, m=4, signal=5)
    weights = np.exp(draws(4, 60))
    wanted = choose_threshold(kernels, weights, masks, outputs)
    found = choose_threshold(kernels, scale * weights, masks, outputs)
    assert found.share == wanted.share
    assert found.lds == pytest.approx(wanted.lds, rel=1e-5)


def test_lists_and_tensors_are_arrays():
    kernels, masks, outputs = sparse_world(3, n=30, m=2, signal=3)
    wanted = choose_threshold(kernels, None, masks, outputs)
    tensors = map(torch.from_numpy, (kernels, masks, outputs))
    assert choose_threshold(next(tensors), None, *tensors).lds == wanted.lds


# -- what is refused ------------------------------------------------------------------


def test_refusals():
    with pytest.raises(OptionError, match=r"the scores have 2 axes; pass \(c, n, m\)"):
        standard_errors(draws(3, 4))
    with pytest.raises(OptionError, match="1 checkpoints do not tell"):
        standard_errors(draws(1, 4, 2))
    with pytest.raises(OptionError, match=r"out_to_loss has shape \(3, 5\)"):
        standard_errors(draws(3, 4, 2), draws(3, 5))
    with pytest.raises(OptionError, match="there is no block of scores"):
        top_k_stability([], 3)
    with pytest.raises(OptionError, match="k=4 of n=4 examples; pass 1 to n - 1"):
        top_k_stability([draws(2, 4, 1)], 4)
    with pytest.raises(OptionError, match=r"share=0.0; pass a share in \(0, 1\]"):
        threshold_keeping(draws(4, 1), 0.0)
    kernels, masks, outputs = sparse_world(3, n=30, m=2, signal=3)
    with pytest.raises(OptionError, match=r"2 checkpoints trained on a part .* do not"):
        choose_threshold(kernels[:2], None, masks[:2], outputs[:2])
    outputs[1, 1] = np.inf
    with pytest.raises(
        NonFiniteError, match="output of checkpoint 1 is inf for target 1"
    ):
        choose_threshold(kernels, None, masks, outputs)
    outputs[1, 1] = 0.0
    with pytest.raises(
        OptionError, match="3 checkpoints, members of 3 and outputs of 2"
    ):
        choose_threshold(kernels, None, masks, outputs[:2])
    with pytest.raises(OptionError, match="scores has no training example"):
        threshold_keeping(np.zeros((0, 2)), 0.5)
    with pytest.raises(OptionError, match="there is no block of scores"):
        top_k_stability([draws(3, 4, 0)], 2)


def test_wrong_types_are_named(untyped):
    kernels = draws(3, 8, 2)
    with pytest.raises(OptionError, match="scores has 1 axes"):
        threshold_keeping(np.ones(3), 0.5)
    with pytest.raises(OptionError, match="kernels is a ndarray of complex128"):
        standard_errors(kernels + 1j)
    with pytest.raises(OptionError, match=r"k must be a whole number; got 2\.5"):
        top_k_stability([kernels], 2.5)
    with pytest.raises(OptionError, match="seed=-1; pass a whole number"):
        top_k_stability([kernels], 2, seed=-1)
    with pytest.raises(OptionError, match=r"shares=0.5; pass a list"):
        choose_threshold(kernels, None, kernels > 0, kernels[:, 0], shares=0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite(bad):
    """They would otherwise be on top, or make every candidate look alike."""
    kernels, masks, outputs = sparse_world(3, n=30, m=2, signal=3)
    broken = kernels.copy()
    broken[1, 7, 1] = bad
    for call in (
        lambda: standard_errors(broken),
        lambda: top_k_stability([kernels, broken], 3),
        lambda: choose_threshold(broken, None, masks, outputs),
    ):
        with pytest.raises(
            NonFiniteError, match=rf"kernels\[1, 7, 1\] is {bad}"
        ) as err:
            call()
        assert err.value.index == 1
    for call in (lambda x: soft_threshold(x, 1.0), lambda x: threshold_keeping(x, 0.5)):
        with pytest.raises(NonFiniteError, match=rf"scores\[7, 1\] is {bad}"):
            call(broken[1])
    weights = np.ones((3, 30))
    weights[2, 5] = bad
    with pytest.raises(NonFiniteError, match=r"of checkpoint 2 .* example 5") as err:
        standard_errors(kernels, weights)
    assert err.value.index == 5
    with pytest.raises(NonFiniteError, match="squares overflow float64"):
        standard_errors(1e200 * kernels)


@pytest.mark.parametrize("exponent", [-1.0, np.nan])
def test_exponents_are_at_least_0(exponent):
    kernels, masks, outputs = sparse_world(3, n=30, m=2, signal=3)
    for call in (
        lambda: standard_errors(kernels, np.ones((3, 30)), exponent=exponent),
        lambda: top_k_stability([kernels], 3, exponent=exponent),
        lambda: choose_threshold(kernels, None, masks, outputs, exponent=exponent),
    ):
        with pytest.raises(OptionError, match="not a pair of numbers >= 0"):
            call()
