"""The area under the ROC curve against scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from trak.errors import NonFiniteError, OptionError
from trak.evaluation import MislabelResult, mislabel_auc

N = 61


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def flipped(rng):
    return rng.permutation(N) < 17


@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_auc_matches_scikit_learn_and_scipy(rng, flipped, levels):
    values = rng.integers(0, levels, N) + 0.3 * levels * flipped
    found = mislabel_auc(values, flipped)
    assert found.mean == pytest.approx(roc_auc_score(flipped, values))
    u = stats.mannwhitneyu(values[flipped], values[~flipped]).statistic
    assert found.mean == pytest.approx(u / (17 * (N - 17)))
    assert (found.n_flipped, found.n_clean) == (17, N - 17)


def test_each_flipped_example_has_its_share(rng, flipped):
    values = rng.integers(0, 9, N).astype(np.float32)
    clean = values[~flipped]
    expected = [
        ((clean < value).sum() + (clean == value).sum() / 2) / len(clean)
        for value in values[flipped]
    ]
    found = mislabel_auc(values, flipped)
    torch.testing.assert_close(found.per_flipped, np.array(expected))
    assert found.mean == found.per_flipped.mean()


def test_interval_resamples_both_kinds(rng, flipped):
    values = rng.standard_normal(N) + flipped
    low, high = mislabel_auc(values, flipped, n_bootstrap=4000).interval
    bad, good = values[flipped], values[~flipped]
    draws = [
        stats.mannwhitneyu(
            rng.choice(bad, len(bad)), rng.choice(good, len(good))
        ).statistic
        / (len(bad) * len(good))
        for _ in range(500)
    ]
    # A 2.5 % quantile of 500 draws of deviation 0.07 is off by about 0.008.
    expected = np.percentile(draws, [2.5, 97.5])
    np.testing.assert_allclose([low, high], expected, atol=0.03)
    other = mislabel_auc(values, flipped, n_bootstrap=4000, seed=1).interval
    assert other != (low, high)
    assert mislabel_auc(values, flipped, n_bootstrap=4000).interval == (low, high)


def test_perfect_reversed_and_constant(flipped):
    values = np.arange(N) + 1000 * flipped
    assert mislabel_auc(values, flipped).interval == (1.0, 1.0)
    assert mislabel_auc(-values, flipped).mean == 0.0
    constant = mislabel_auc(np.full(N, 0.1), flipped)
    assert (constant.mean, constant.interval) == (0.5, (0.5, 0.5))


def test_the_smallest_problem():
    found = mislabel_auc(np.array([1.0, 1.0]), np.array([True, False]))
    assert (found.mean, found.per_flipped.tolist()) == (0.5, [0.5])


def test_tensors_and_strides(rng, flipped):
    values = rng.standard_normal(2 * N)[::2]
    expected = mislabel_auc(values, flipped).mean
    tensors = (
        torch.from_numpy(values.copy()).requires_grad_(),
        torch.from_numpy(flipped),
    )
    assert mislabel_auc(*tensors).mean == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_suspicions_name_their_place(rng, flipped, bad):
    values = rng.standard_normal(N)
    values[7] = bad
    with pytest.raises(NonFiniteError, match=r"suspicion\[7\] is") as err:
        mislabel_auc(values, flipped)
    assert err.value.index == 7


def test_what_has_no_auc(rng, flipped):
    values = rng.standard_normal(N)
    with pytest.raises(OptionError, match="0 of 61 examples are flipped"):
        mislabel_auc(values, np.zeros(N, bool))
    with pytest.raises(OptionError, match="61 of 61 examples are flipped"):
        mislabel_auc(values, np.ones(N, bool))
    with pytest.raises(OptionError, match="0 of 0 examples"):
        mislabel_auc(values[:0], flipped[:0])
    with pytest.raises(OptionError, match="flipped has dtype int64"):
        mislabel_auc(values, flipped.astype(np.int64))
    with pytest.raises(OptionError, match=r"suspicion has shape \(60,\)"):
        mislabel_auc(values[1:], flipped)
    with pytest.raises(OptionError, match="suspicion has shape"):
        mislabel_auc(values[:, None], flipped[:, None])
    with pytest.raises(OptionError, match="n_bootstrap=0"):
        mislabel_auc(values, flipped, n_bootstrap=0)


def test_result_prints_what_it_rests_on():
    text = str(MislabelResult(0.9, (0.8, 0.95), np.zeros(3), 3, 40))
    assert text == "AUC 0.900 [0.800, 0.950] (3 mislabelled, 40 clean)"
