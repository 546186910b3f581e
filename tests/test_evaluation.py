"""Subset retraining scores against SciPy, and every named edge case."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from trak.errors import NonFiniteError, OptionError
from trak.evaluation import LdsResult, bootstrap_interval, lds, random_subsets

N, S, M = 20, 12, 5


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def arrays(rng):
    masks = random_subsets(N, S, seed=1)
    return rng.standard_normal((N, M)), masks, rng.standard_normal((S, M))


def reference(scores, masks, outputs):
    """Return the textbook LDS, one target at a time."""
    predictions = masks.astype(np.float64) @ scores
    pairs = zip(predictions.T, outputs.T, strict=True)
    return np.array([stats.spearmanr(a, b).statistic for a, b in pairs])


def test_lds_matches_scipy(arrays):
    result = lds(*arrays)
    torch.testing.assert_close(result.per_target, reference(*arrays))
    assert result.mean == pytest.approx(reference(*arrays).mean())
    assert (result.n_subsets, result.n_repeats, result.n_targets) == (S, 1, M)


def test_lds_shares_average_ranks_between_ties(rng):
    masks = random_subsets(N, S, seed=1)
    scores = rng.integers(0, 2, (N, M)).astype(float)
    outputs = rng.integers(0, 3, (S, M)).astype(float)
    predictions = masks.astype(float) @ scores
    assert len(np.unique(predictions[:, 0])) < S
    result = lds(scores, masks, outputs)
    torch.testing.assert_close(result.per_target, reference(scores, masks, outputs))


def test_lds_averages_repeats(arrays, rng):
    scores, masks, _ = arrays
    outputs = rng.standard_normal((S, 3, M))
    result = lds(scores, masks, outputs)
    expected = reference(scores, masks, outputs.mean(1))
    torch.testing.assert_close(result.per_target, expected)
    assert result.n_repeats == 3


def test_lds_takes_tensors_and_arrays_alike(arrays):
    tensors = [torch.from_numpy(array) for array in arrays]
    torch.testing.assert_close(lds(*tensors).per_target, lds(*arrays).per_target)


def test_float64_tensors_keep_their_digits() -> None:
    masks = np.eye(4, dtype=bool)
    scores = 1 + 1e-12 * np.arange(4.0)[:, None]
    found = lds(torch.from_numpy(scores), masks, torch.from_numpy(scores))
    assert found.mean == lds(scores, masks, scores).mean == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lds_sums_in_float64(arrays, dtype):
    scores = torch.from_numpy(arrays[0]).to(dtype).requires_grad_()
    result = lds(scores, arrays[1], arrays[2])
    expected = reference(scores.detach().double().numpy(), *arrays[1:])
    torch.testing.assert_close(result.per_target, expected)


def test_lds_of_many_rows_does_not_depend_on_the_block(arrays, monkeypatch):
    whole = lds(*arrays).per_target
    monkeypatch.setattr("trak.evaluation._lds._ROWS_AT_ONCE", 3)
    torch.testing.assert_close(lds(*arrays).per_target, whole)


@pytest.mark.parametrize("m", [1, 3])
def test_lds_of_few_targets(arrays, m):
    scores, masks, outputs = arrays
    result = lds(scores[:, :m], masks, outputs[:, :m])
    assert result.per_target.shape == (m,)
    assert result.interval[0] <= result.mean <= result.interval[1]


def test_lds_recovers_a_perfect_and_a_reversed_ranking(arrays):
    scores, masks, _ = arrays
    truth = masks @ scores
    assert lds(scores, masks, truth).mean == pytest.approx(1)
    assert lds(scores, masks, np.exp(-truth)).mean == pytest.approx(-1)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e8])
def test_constant_scores_count_as_no_information(arrays, constant):
    scores, masks, outputs = arrays
    scores[:, 2] = constant
    assert lds(scores, masks, outputs).per_target[2] == 0


def test_constant_outputs_name_the_target(arrays):
    scores, masks, outputs = arrays
    outputs[:, 3] = 0.25
    with pytest.raises(OptionError, match=r"target 3 are 0\.25 for every subset"):
        lds(scores, masks, outputs)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_values_name_their_place(arrays, bad):
    scores, masks, outputs = (array.copy() for array in arrays)
    scores[7, 4] = bad
    with pytest.raises(NonFiniteError, match="training example 7 and target 4") as err:
        lds(scores, masks, outputs)
    assert err.value.index == 7
    outputs[2, 1] = bad
    with pytest.raises(NonFiniteError, match="target 1 and subset 2") as err:
        lds(arrays[0], masks, outputs)
    assert err.value.index == 1


def test_too_few_subsets(arrays):
    scores, masks, outputs = arrays
    with pytest.raises(OptionError, match="s=2 subsets cannot rank"):
        lds(scores, masks[:2], outputs[:2])


@pytest.mark.parametrize("members", [True, False])
def test_subsets_that_are_all_the_same(arrays, members):
    scores, masks, outputs = arrays
    with pytest.raises(
        OptionError, match=f"the s={S} subsets in masks are all the same"
    ):
        lds(scores, np.full_like(masks, fill_value=members), outputs)
    with pytest.raises(OptionError, match="are all the same"):
        lds(scores, masks[:1].repeat(S, 0), outputs)


def test_sums_that_overflow(arrays):
    scores, masks, outputs = arrays
    large = np.full((S, 2, M), 1.5e308) * np.sign(outputs)[:, None]
    with pytest.raises(NonFiniteError, match=r"the mean of outputs.* scale it down"):
        lds(scores, masks, large)
    with pytest.raises(NonFiniteError, match=r"the sum of scores.* scale it down"):
        lds(np.full_like(scores, 1e308), masks, outputs)


@pytest.mark.parametrize(("part", "shape"), [(0, (S, 0)), (1, (0, M))])
def test_nothing_to_average(arrays, part, shape):
    scores, masks, _ = arrays
    outputs = np.zeros((S, *shape) if part else (S, 1, 0))
    scores = scores if part else scores[:, :0]
    with pytest.raises(OptionError, match="at least one of each"):
        lds(scores, masks, outputs)


def test_shapes_must_agree(arrays):
    scores, masks, outputs = arrays
    with pytest.raises(OptionError, match="make the three agree"):
        lds(scores[:-1], masks, outputs)
    with pytest.raises(OptionError, match="make the three agree"):
        lds(scores, masks[:-1], outputs)
    with pytest.raises(OptionError, match="make the three agree"):
        lds(scores, masks, outputs[:, :-1])
    with pytest.raises(OptionError, match="scores has 1 axes"):
        lds(scores[:, 0], masks, outputs)


def test_masks_must_be_boolean(arrays):
    scores, masks, outputs = arrays
    with pytest.raises(OptionError, match="masks has dtype int64"):
        lds(scores, masks.astype(np.int64), outputs)


def test_lds_interval_is_the_bootstrap_of_the_targets(arrays):
    result = lds(*arrays, n_bootstrap=50, seed=3)
    expected = bootstrap_interval(result.per_target, n_bootstrap=50, seed=3)
    assert result.interval == expected
    assert lds(*arrays, n_bootstrap=50, seed=4).interval != expected


def test_result_is_frozen_and_prints_what_it_rests_on(arrays):
    result = lds(*arrays)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.mean = 1.0
    text = str(LdsResult(0.5, (0.4, 0.6), np.zeros(5), 12, 2, 5))
    assert text == "LDS 0.500 [0.400, 0.600] (5 targets, 12 subsets x 2 retrainings)"


def test_bootstrap_covers_the_standard_error(rng):
    values = rng.standard_normal(400)
    lower, upper = bootstrap_interval(values)
    # 2 * 1.96 standard errors, 1/20 each; the quantiles of 1000 draws vary by ~5 %.
    assert upper - lower == pytest.approx(2 * 1.96 / 20, rel=0.2)


def test_bootstrap_refuses_what_has_no_interval():
    with pytest.raises(OptionError, match="values is empty"):
        bootstrap_interval(np.zeros(0))
    with pytest.raises(OptionError, match="n_bootstrap=0"):
        bootstrap_interval(np.zeros(3), n_bootstrap=0)
    with pytest.raises(NonFiniteError, match=r"values\[1\] is nan") as err:
        bootstrap_interval(np.array([0.0, np.nan]))
    assert err.value.index == 1
    with pytest.raises(
        NonFiniteError, match=r"up to 1.5e\+308, and a sum .* overflows"
    ):
        bootstrap_interval(np.array([1e308, -1.5e308]))


def test_arguments_of_the_wrong_type(arrays, untyped):
    scores, masks, outputs = arrays
    with pytest.raises(OptionError, match="seed=-1; pass a whole number of at least 0"):
        lds(*arrays, seed=-1)
    with pytest.raises(
        OptionError, match=r"n_bootstrap must be a whole number; got 1\.5"
    ):
        lds(*arrays, n_bootstrap=1.5)
    for wrong in (scores + 0j, scores.astype(str), scores.astype(object), None):
        with pytest.raises(OptionError, match=r"scores is a .*; pass an array of real"):
            lds(wrong, masks, outputs)
    with pytest.raises(OptionError, match="outputs is a list of object"):
        lds(scores, masks, [[1.0], [1.0, 2.0]])
    with pytest.raises(OptionError, match="values has 2 axes"):
        bootstrap_interval(scores)
    for options in ({"n": 10.5}, {"s": 2.5}, {"seed": 0.5}):
        with pytest.raises(OptionError, match="must be a whole number"):
            random_subsets(**{"n": 10, "s": 2, **options})
    with pytest.raises(OptionError, match="seed=-2"):
        random_subsets(10, 2, seed=-2)


def test_lists_are_arrays(arrays, untyped):
    assert lds(*(array.tolist() for array in arrays)).mean == lds(*arrays).mean


@pytest.mark.parametrize("s", [0, 1, 3])
def test_subsets_have_exact_size_and_follow_the_seed(s):
    masks = random_subsets(11, s, fraction=0.3, seed=5)
    assert masks.shape == (s, 11)
    assert masks.dtype == np.bool_
    assert (masks.sum(axis=1) == 3).all()
    assert (masks == random_subsets(11, 8, fraction=0.3, seed=5)[:s]).all()


def test_a_share_of_whole_examples_is_whole():
    for percent in range(1, 100):
        assert random_subsets(100, 1, fraction=percent / 100).sum() == percent


def test_subsets_cover_examples_evenly():
    counts = random_subsets(50, 400).sum(axis=0)
    # Binomial(400, 1/2) has standard deviation 10; five of them never happen.
    assert abs(counts - 200).max() < 50


@pytest.mark.parametrize("fraction", [0.0, 0.05, 1.0, -1.0, np.nan, np.inf])
def test_subsets_must_leave_something_in_and_out(fraction):
    with pytest.raises(OptionError, match="at least one example"):
        random_subsets(10, 2, fraction=fraction)


def test_number_of_subsets_is_not_negative():
    with pytest.raises(OptionError, match="s=-1 subsets"):
        random_subsets(10, -1)
