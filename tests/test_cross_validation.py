"""Cross-validation of checkpoints, against the whole matrices and a world known in closed
form."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests import reference
from trak.errors import NonFiniteError, OptionError, SingularKernelError
from trak.evaluation import _cross_validation as module
from trak.evaluation import random_subsets
from trak.evaluation._cross_validation import CheckpointData, cross_validate
from trak.evaluation._cross_validation_choice import choose, refine
from trak.evaluation._cross_validation_estimate import (
    Prediction,
    agreement,
    correlate,
    growth,
)
from trak.evaluation._cross_validation_maths import (
    deviation_bias,
    noise_with_more,
    overlap_of_normals,
    peak_of_parabola,
    project_reliability,
    spearman_of,
    spearman_slope,
)
from trak.evaluation._cross_validation_probes import Probe, chosen_rows
from trak.evaluation._cross_validation_result import Candidate

PAPER = (0.0, 1.0)


def reader(rows):
    tensor = torch.as_tensor(rows).float()
    return lambda low, high: tensor[low:high]


def random_checkpoints(count, n, m, p, seed=0, fraction=0.5):
    """Rows, weights and outputs that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    masks = random_subsets(n, count, fraction, seed)
    return [
        CheckpointData(
            train=reader(rng.standard_normal((n, p))),
            targets=reader(rng.standard_normal((m, p))),
            out_to_loss=rng.standard_normal(n),
            outputs=rng.standard_normal(m),
            members=masks[c],
        )
        for c in range(count)
    ]


# -- against the whole matrices -------------------------------------------------------


def kernel_of(one, n, m, multiple, a):
    rows = one.train(0, n).double().numpy() * np.abs(one.out_to_loss)[:, None] ** a
    gram = rows.T @ rows
    ridge = multiple * np.trace(gram) / min(rows.shape)
    inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
    return rows @ inverse @ one.targets(0, m).double().numpy().T


def scores_of(checkpoints, chosen, n, m, multiple, exponents):
    a, b = exponents
    kernels = [kernel_of(checkpoints[c], n, m, multiple, a) for c in chosen]
    weights = [torch.from_numpy(checkpoints[c].out_to_loss) for c in chosen]
    members = [torch.from_numpy(checkpoints[c].members) for c in chosen]
    weight = reference.result_weights(weights, b, members).numpy()
    return weight[:, None] * np.mean(kernels, axis=0)


def whole_matrices(checkpoints, n, m, multiple, exponents):
    """Estimate each target's correlation the textbook way, with scores of (n, m)."""
    count = len(checkpoints)
    outputs = np.stack([one.outputs for one in checkpoints])
    guesses, products, null = [], [], 0.0
    for j, one in enumerate(checkpoints):
        others = [c for c in range(count) if c != j]
        scores = scores_of(checkpoints, others, n, m, multiple, exponents)
        scores -= scores.mean(axis=0)
        k = one.members.sum()
        variance = k * (n - k) / (n * (n - 1)) * (scores**2).sum(axis=0)
        real = (outputs[j] - outputs.mean(axis=0)) / outputs.std(axis=0, ddof=1)
        real /= deviation_bias(count) * (count - 1)
        guesses.append(scores[one.members].sum(axis=0) / variance**0.5)
        products.append(guesses[-1] * real * count)
        pooled = (scores / variance**0.5 * real).mean(axis=1)
        null += k * (n - k) / (n * (n - 1)) * (pooled**2).sum()
    steadied = []
    for j in range(count):
        known = np.mean([products[k].mean() for k in range(count) if k != j])
        known = min(1.0, max(-1.0, known))
        steadied.append(products[j] - known / 2 * (guesses[j] ** 2 - 1))
    return np.mean(steadied, axis=0), null**0.5


def halves_agree(checkpoints, n, m, multiple, exponents, seed=0):
    count = len(checkpoints)
    size = count // 2
    order = np.random.default_rng([seed, 1]).permutation(count)
    found = []
    for split in range(min(3, count if count % 2 else size)):
        turned = np.roll(order, split)
        first, second = (
            scores_of(checkpoints, part, n, m, multiple, exponents)
            for part in (turned[:size], turned[size : 2 * size])
        )
        found += [np.corrcoef(first[:, z], second[:, z])[0, 1] for z in range(m)]
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("count", "n", "m", "p"),
    [(2, 30, 3, 7), (3, 29, 1, 5), (4, 21, 5, 40), (5, 9, 3, 9)],
)
@pytest.mark.parametrize("exponents", [(0.0, 1.0), (0.25, 0.5)])
def test_equals_the_estimate_from_whole_score_matrices(count, n, m, p, exponents):
    checkpoints = random_checkpoints(count, n, m, p)
    multiples = [0.1, 1.0, 10.0]
    found = cross_validate(
        checkpoints, n, m, p, multiples=multiples, exponents=[exponents]
    )
    for candidate in found.candidates:
        per_target, null = whole_matrices(
            checkpoints, n, m, candidate.multiple, exponents
        )
        reliability = halves_agree(checkpoints, n, m, candidate.multiple, exponents)
        factor = growth(reliability, count // 2, count - 1, count)
        mean = per_target.mean() * factor
        assert_close(candidate.lds, spearman_of(mean), rtol=1e-3, atol=1e-4)
        if candidate.multiple == found.multiple:
            assert_close(found.per_target, per_target * factor, rtol=1e-3, atol=1e-3)
        if m == 1:
            shrunk = 1 - min(1, mean**2) * (1 - 1 / count)
            expected = null * factor * shrunk**0.5
            expected *= spearman_slope(mean)
            assert_close(candidate.standard_error, expected, rtol=1e-3, atol=1e-4)


def test_random_signs_measure_what_unit_vectors_do():
    n, m, p = 400, 6, 10
    checkpoints = random_checkpoints(4, n, m, p)
    exact = cross_validate(checkpoints, n, m, p, n_probes=n)
    drawn = cross_validate(checkpoints, n, m, p, n_probes=256)
    # A deviation from 256 draws is off by 1 / sqrt(512), 4.4 %; of 4 of them each.
    assert_close(drawn.per_target, exact.per_target, rtol=0.1, atol=0.08)
    assert_close(
        drawn.candidates[0].standard_error,
        exact.candidates[0].standard_error,
        rtol=0.2,
        atol=0.0,
    )


def test_signs_do_not_depend_on_what_is_read_at_once():
    probe = Probe(3000, 8, (1,), np.arange(3000) % 2 == 0)
    whole = probe(0, 3000)
    parts = [probe(low, min(low + 700, 3000)) for low in range(0, 3000, 700)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert_close(whole.sum(axis=0), np.zeros(9), rtol=0.0, atol=1e-9)
    assert probe.width == 9


def test_a_reader_of_some_rows():
    rows = torch.arange(10.0)[:, None]
    read = chosen_rows(lambda low, high: rows[low:high], np.array([0, 3, 4, 9]))
    assert_close(read(1, 4), torch.tensor([[3.0], [4.0], [9.0]]))


# -- invariances ----------------------------------------------------------------------


def test_scales_do_not_matter():
    n, m, p = 40, 5, 6
    plain = random_checkpoints(3, n, m, p)
    scaled = [
        replace(
            one,
            train=reader(one.train(0, n) * 8),
            targets=reader(one.targets(0, m) * 4),
            out_to_loss=one.out_to_loss * 2,
            outputs=one.outputs * 3 - 5,
        )
        for one in plain
    ]
    before, after = (cross_validate(one, n, m, p) for one in (plain, scaled))
    assert_close(after.per_target, before.per_target, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-290, 1e-60, 1e60, 1e290])
@pytest.mark.parametrize("part", ["outputs", "out_to_loss"])
def test_scales_beyond_those_of_float32_do_not_matter(part, scale):
    """They would over- or underflow, and the estimate be 0 without a word."""
    checkpoints = random_checkpoints(3, 20, 4, 6)
    other = [replace(one, **{part: scale * getattr(one, part)}) for one in checkpoints]
    found, wanted = (cross_validate(x, 20, 4, 6) for x in (other, checkpoints))
    assert_close(found.per_target, wanted.per_target, rtol=1e-5, atol=1e-6)
    assert found.lds == pytest.approx(wanted.lds, rel=1e-5)


@pytest.mark.parametrize("exponents", [(0.0, 0.5), (0.5, 0.0)])
def test_only_rows_tell_how_well_each_group_is_fitted(exponents):
    """Halves, whose weights come back to the same mean whatever they are fitted by."""
    n, m, p = 40, 5, 6
    found = []
    for inside, outside in [(1.0, 1.0), (0.4, 1.6)]:
        fitted = []
        for one in random_checkpoints(4, n, m, p):
            weights, mask = torch.tensor(one.out_to_loss), torch.tensor(one.members)
            sizes = np.where(one.members, inside, outside)
            levelled = reference.level(weights, mask).numpy() * sizes
            fitted.append(replace(one, out_to_loss=levelled))
        result = cross_validate(fitted, n, m, p, exponents=[exponents])
        found.append(result.per_target)
    if exponents[0]:
        assert np.abs(found[1] - found[0]).max() > 0.01
    else:
        assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_columns_that_are_not_contiguous_and_order_of_targets():
    n, m, p = 40, 5, 6
    plain = random_checkpoints(3, n, m, p)
    turned = [
        replace(
            one,
            train=reader(one.train(0, n).T.contiguous()),
            targets=reader(one.targets(0, m).flip(0)),
            outputs=one.outputs[::-1],
        )
        for one in plain
    ]
    turned = [
        replace(one, train=lambda low, high, r=one.train: r(0, p).T[low:high])
        for one in turned
    ]
    before, after = (cross_validate(one, n, m, p) for one in (plain, turned))
    assert_close(after.per_target[::-1].copy(), before.per_target, rtol=1e-4, atol=1e-5)


def test_the_same_twice_and_another_seed_is_another_draw():
    n, m, p = 300, 4, 6
    data = random_checkpoints(3, n, m, p)
    first, second, other = (
        cross_validate(data, n, m, p, n_probes=32, seed=seed) for seed in (0, 0, 1)
    )
    assert first.lds == second.lds != other.lds


# -- a world known in closed form -----------------------------------------------------


def linear_world(seed, count, n=80, p=12, m=20, noise=1.0):
    """Outputs are sums of effects plus noise, and checkpoints see the effects noisily."""
    # Rows are orthonormal, and so scores at a damping of 1 are half the product.
    rng = np.random.default_rng(seed)
    rows = np.linalg.qr(rng.standard_normal((n, p)))[0]
    shared = rng.standard_normal((m, 3))
    phi = shared @ rng.standard_normal((3, p)) / 2 + rng.standard_normal((m, p)) / 2
    effects = rows @ phi.T / 2
    effects -= effects.mean(axis=0)
    k = n // 2
    deviation = (k * (n - k) / (n * (n - 1)) * (effects**2).sum(axis=0)) ** 0.5
    masks = random_subsets(n, count, 0.5, seed)
    scale = (np.square(shared).sum(axis=1) / 3 + 0.5) ** 0.5
    own = rng.standard_normal((count, 3)) @ shared.T / 3**0.5
    own = (own + 0.5**0.5 * rng.standard_normal((count, m))) / scale
    outputs = masks @ effects + noise * deviation * own + rng.standard_normal(m)
    seen = [phi + rng.standard_normal((m, p)) for _ in range(count)]
    checkpoints = [
        CheckpointData(reader(rows), reader(seen[c]), np.ones(n), outputs[c], masks[c])
        for c in range(count)
    ]
    scores = rows @ np.mean(seen, axis=0).T
    scores -= scores.mean(axis=0)
    cosine = (scores * effects).sum(axis=0)
    cosine /= ((scores**2).sum(axis=0) * (effects**2).sum(axis=0)) ** 0.5
    return checkpoints, (n, m, p), cosine / (1 + noise**2) ** 0.5


@pytest.mark.parametrize("count", [2, 3, 5])
def test_unbiased_and_covered_over_many_worlds(count):
    worlds = 50
    errors, inside, claimed = [], 0, []
    for seed in range(worlds):
        checkpoints, (n, m, p), truth = linear_world(seed, count)
        found = cross_validate(checkpoints, n, m, p, multiples=[1.0])
        errors.append(found.per_target.mean() - truth.mean())
        low, high = found.interval
        inside += low <= spearman_of(float(truth.mean())) <= high
        claimed.append(found.candidates[0].standard_error)
    spread = np.std(errors)
    assert abs(np.mean(errors)) < 3 * spread / worlds**0.5
    # Of 50, 95 % are 47.5; fewer than 43 have a probability of 0.004.
    assert inside >= 43
    assert 0.6 < np.mean(claimed) / spread < 1.7


def test_more_checkpoints_are_foreseen():
    """The LDS at 8 checkpoints, foreseen from 4: closer than what 4 have."""
    foreseen, there, true = [], [], []
    for seed in range(30):
        checkpoints, (n, m, p), truth = linear_world(seed, 8)
        found = cross_validate(checkpoints[:4], n, m, p, multiples=[1.0])
        foreseen.append(found.over_checkpoints[8.0])
        there.append(found.lds)
        true.append(spearman_of(float(truth.mean())))
    errors = np.array(foreseen) - true
    assert abs(errors.mean()) < 3 * errors.std() / 30**0.5
    assert np.mean(there) < np.mean(foreseen)


def leaking_world(seed, count=4, n=80, p=4, m=20):
    """Scores that know nothing; weights that tell a checkpoint's subset and its level."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, p))
    helps = np.arange(n) % 2 == 0
    rows[:, 0] = np.where(helps, 1.0, -1.0)
    masks = random_subsets(n, count, 0.5, seed)
    checkpoints = []
    for c in range(count):
        level = np.exp(0.5 * rng.standard_normal())
        targets = 0.1 * rng.standard_normal((m, p))
        targets[:, 0] = 1.0
        outputs = -np.log(level) + 0.3 * rng.standard_normal(m)
        # Only examples that help can be fitted, and so those of the subset that do not
        # weigh more than those that do, though both groups are balanced.
        weights = level * np.where(masks[c] & helps, 0.2, 1.0)
        checkpoints.append(
            CheckpointData(reader(rows), reader(targets), weights, outputs, masks[c])
        )
    return checkpoints, (n, m, p)


def test_the_weights_of_the_predicted_checkpoint_would_leak(monkeypatch):
    def estimates():
        means = []
        for seed in range(25):
            checkpoints, (n, m, p) = leaking_world(seed)
            found = cross_validate(checkpoints, n, m, p, multiples=[1.0])
            means.append(found.per_target.mean())
        return np.array(means)

    ours = estimates()
    assert abs(ours.mean()) < 3 * ours.std() / 5

    whole = module._weights
    monkeypatch.setattr(
        module, "_weights", lambda job, _, powers: whole(job, range(4), powers)
    )
    leaking = estimates()
    assert leaking.mean() > 4 * leaking.std() / 5


# -- choice ---------------------------------------------------------------------------


def candidate(multiple, gain, error, exponents=PAPER):
    return Candidate(exponents, multiple, 0.3 + gain, 0.05, gain, error)


def test_the_default_stays_unless_another_is_clearly_better():
    default = candidate(1.0, 0.0, 0.0)
    assert choose([default, candidate(0.1, 0.05, 0.06)]) == 0
    assert choose([default, candidate(0.1, 0.05, 0.04)]) == 1
    assert choose([default, candidate(0.1, 0.05, 0.04)], margin=2.0) == 0
    assert (
        choose([default, candidate(3.0, 0.03, 0.001), candidate(9.0, 0.05, 0.04)]) == 1
    )


def test_the_damping_is_refined_only_around_a_peak():
    grid = [
        candidate(1.0, 0.0, 0.0),
        candidate(0.1, 0.1, 0.0),
        candidate(0.01, 0.1, 0.0),
    ]
    assert refine(grid, 0) == 1.0  # the end of the grid
    other = candidate(0.01, 0.3, 0.0, exponents=(0.0, 0.5))
    assert refine([*grid[:2], other], 1) == 0.1  # the end of its own exponents' grid
    grid[0] = candidate(1.0, 0.2, 0.0)
    assert refine(grid, 1) == 0.1  # a neighbour is better
    grid[0] = candidate(1.0, 0.05, 0.0)
    assert 0.01 < refine(grid, 1) < 0.1


def test_two_checkpoints_do_not_choose():
    n, m, p = 60, 8, 5
    checkpoints, _, _ = linear_world(0, 2, n=n, p=p, m=m)
    found = cross_validate(checkpoints, n, m, p)
    assert found.is_default
    assert found.multiple == 1.0
    assert any("do not choose" in note for note in found.notes)


def test_a_clearly_better_damping_is_chosen_and_the_end_of_the_grid_is_noted():
    """Effects along directions of small eigenvalues: little damping is better."""
    rng = np.random.default_rng(0)
    n, m, p, count = 200, 40, 30, 8
    rows = rng.standard_normal((n, p)) * np.logspace(1.5, 0, p)
    masks = random_subsets(n, count, 0.5, 0)
    phi = rng.standard_normal((m, p)) * np.logspace(0, 1.5, p)
    inverse = np.linalg.inv(rows.T @ rows)
    outputs = masks @ (rows @ inverse @ phi.T)
    checkpoints = [
        CheckpointData(
            reader(rows),
            reader(phi + rng.standard_normal((m, p))),
            np.ones(n),
            outputs[c],
            masks[c],
        )
        for c in range(count)
    ]
    found = cross_validate(checkpoints, n, m, p, multiples=[0.01, 0.1, 10.0])
    assert not found.is_default
    assert found.multiple == 0.01
    assert any("end of those tried" in note for note in found.notes)
    assert found.lds > found.candidates[0].lds


# -- curves ---------------------------------------------------------------------------


def test_curves_over_checkpoints_and_columns():
    checkpoints, (n, m, p), _ = linear_world(1, 4)
    found = cross_validate(checkpoints, n, m, p, columns=[3, 6, p])
    sizes = sorted(found.over_checkpoints)
    assert sizes == [1.0, 2.0, 4.0, 5.0, 8.0, 16.0, inf]
    values = [found.over_checkpoints[size] for size in sizes]
    assert values == sorted(values)
    assert_close(found.over_checkpoints[4.0], found.lds)
    assert sorted(found.over_columns) == [3, 6, p, 2 * p]
    assert_close(found.over_columns[p], found.lds)
    few = [
        replace(
            one,
            train=lambda low, high, r=one.train: r(low, high)[:, :6],
            targets=lambda low, high, r=one.targets: r(low, high)[:, :6],
        )
        for one in checkpoints
    ]
    assert_close(
        cross_validate(few, n, m, 6, multiples=[1.0]).lds,
        found.over_columns[6],
        rtol=1e-4,
        atol=1e-5,
    )


def test_noise_with_more_columns():
    assert_close(noise_with_more(8, 16, 3.0, 2.0, wanted=32), 1.5)
    assert (
        noise_with_more(8, 16, 2.0, 3.0, wanted=32) == 3.0
    )  # it rose: nothing to gain
    assert noise_with_more(8, 16, 3.0, 0.1, wanted=32) == 0.0


def test_columns_alone_and_the_whole_number_of_them():
    checkpoints, (n, m, p), _ = linear_world(1, 3)
    assert cross_validate(checkpoints, n, m, p).over_columns == {}
    found = cross_validate(checkpoints, n, m, p, columns=[p])
    assert found.over_columns == {p: found.lds}


def test_more_columns_are_foreseen():
    """Sketches of 8 and 16 entries foresee 32, of rows of 64."""
    rng = np.random.default_rng(0)
    n, m, d, p, count = 150, 40, 64, 32, 12
    rows, phi = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    masks = random_subsets(n, count, 0.5, 0)
    effects = rows @ np.linalg.inv(rows.T @ rows + n * np.eye(d)) @ phi.T
    checkpoints = []
    for c in range(count):
        sketch = rng.standard_normal((d, p))
        checkpoints.append(
            CheckpointData(
                reader(rows @ sketch),
                reader(phi @ sketch),
                np.ones(n),
                masks[c] @ effects,
                masks[c],
            )
        )
    whole = cross_validate(checkpoints, n, m, p, multiples=[1.0])
    half = [
        replace(
            one,
            train=lambda low, high, r=one.train: r(low, high)[:, :16],
            targets=lambda low, high, r=one.targets: r(low, high)[:, :16],
        )
        for one in checkpoints
    ]
    found = cross_validate(half, n, m, 16, multiples=[1.0], columns=[8])
    gain = whole.lds - found.lds
    assert gain > 0.03
    assert_close(found.over_columns[32] - found.lds, gain, rtol=0.5, atol=0.0)


def test_growth_and_agreement():
    assert growth(0.5, 2, before=3, after=3) == 1.0
    assert_close(growth(0.5, 1, before=1, after=inf), 2**0.5)
    assert_close(growth(-0.2, 1, before=1, after=4), 2.0, rtol=1e-4, atol=0.0)
    sums = np.random.default_rng(0).standard_normal((1, 1, 9, 4)).astype(np.float32)
    assert_close(agreement(sums, 2 * sums), np.ones((1, 1)))
    assert_close(agreement(sums, 0 * sums), np.zeros((1, 1)))


def test_scores_that_are_zero_correlate_with_nothing():
    own = np.zeros((1, 1, 2), np.float32)
    probes = np.zeros((1, 1, 8, 2), np.float32)
    predicted = [Prediction(own, probes, 1.0, draws) for draws in (8, None)]
    found = correlate(predicted, np.array([[1.0, 2.0], [2.0, 1.0]]))
    assert_close(found.per_target, np.zeros((1, 1, 2)))
    assert found.spread == 0.0


# -- what is refused, and what is noted -----------------------------------------------

SIZES = (30, 3, 4)


@pytest.fixture
def three():
    return random_checkpoints(3, *SIZES)


def refused(checkpoints, match, error=OptionError, **options):
    with pytest.raises(error, match=match) as raised:
        cross_validate(checkpoints, *SIZES, **options)
    return raised.value


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"multiples": []}, r"multiples=\[\]; pass dampings above 0"),
        ({"multiples": [0.0]}, r"multiples=\[0.0\]"),
        ({"multiples": [inf]}, "multiples"),
        ({"exponents": []}, r"exponents=\[\]; pass a list of pairs of numbers >= 0"),
        ({"exponents": [(-1.0, 0.0)]}, "exponents"),
        ({"columns": [5]}, r"columns=\[5\]; pass numbers from 1 to p=4"),
        ({"columns": [0]}, "columns"),
        ({"max_targets": 0}, "max_targets=0; pass at least 1"),
        ({"n_probes": 4}, "n_probes=4 cannot measure a variance"),
        ({"multiples": [1e-13]}, "from 1e-12 to 1e.12, or rounding is all"),
        ({"multiples": [1.0, 1e13]}, "or rounding is all that is left"),
        ({"multiples": [nan]}, "multiples"),
        ({"multiples": ["a"]}, r"multiples=\['a'\]"),
        ({"multiples": 1.0}, "multiples=1.0; pass a list"),
        ({"exponents": (0.25, 0.5)}, r"exponents=\[0.25, 0.5\]; pass a list of pairs"),
        ({"exponents": [(0.5,)]}, r"exponents=\[\(0.5,\)\]"),
        ({"columns": 3}, "columns=3; pass a list"),
        ({"columns": [2.5]}, "an entry of columns must be a whole number"),
        ({"max_targets": 2.5}, "max_targets must be a whole number"),
        ({"n_probes": 9.5}, "n_probes must be a whole number"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options_that_cannot_work(three, options, match, untyped):
    refused(three, match, **options)


def test_too_few_checkpoints(three):
    refused(three[:1], "1 checkpoints cannot be cross-validated")
    whole = replace(three[1], members=np.ones(30, dtype=bool))
    refused([three[0], whole], "1 of 2 checkpoints were trained on a part")


def test_no_targets():
    with pytest.raises(OptionError, match="n=30 training examples and m=0 targets"):
        cross_validate(random_checkpoints(2, 30, 0, 4), 30, 0, 4)


def test_arrays_of_other_shapes_and_types(three, untyped):
    short = replace(three[1], outputs=np.zeros(2))
    refused([three[0], short], r"checkpoint 1 has out_to_loss, outputs and members")
    with pytest.raises(OptionError, match="members of checkpoint 1 has dtype int64"):
        module.check_arrays(
            [three[0].out_to_loss, three[1].out_to_loss],
            [three[0].outputs, three[1].outputs],
            [three[0].members, np.arange(30)],
            30,
            3,
        )

    listed = replace(three[1], outputs=[0.0, 1.0, 2.0])
    refused([three[0], listed], "checkpoint 1 .* that are ndarray, list, ndarray; pass")


@pytest.mark.parametrize("part", ["train", "targets"])
def test_rows_of_another_width(three, part):
    wide = replace(three[1], **{part: reader(torch.ones(30, 5))})
    match = rf"checkpoint 1 has rows of shape \(1, 5\) in {part}\(0, 1\), and p=4"
    refused([three[0], wide], match)


def test_numbers_that_are_not_finite(three):
    diverged = replace(three[1], outputs=np.array([0.0, nan, 1.0]))
    error = refused(
        [three[0], diverged],
        "the model output of checkpoint 1 is nan for target 1",
        NonFiniteError,
    )
    assert error.index == 1
    weights = three[1].out_to_loss.copy()
    weights[7] = inf
    error = refused(
        [three[0], replace(three[1], out_to_loss=weights)],
        "out_to_loss of checkpoint 1 is inf for training example 7",
        NonFiniteError,
    )
    rows = torch.ones(30, 4)
    rows[3, 2] = nan
    refused(
        [three[0], replace(three[1], train=reader(rows))],
        "the projected gradients of checkpoint 1 on the training examples are not all",
        NonFiniteError,
    )
    rows = torch.ones(3, 4)
    rows[2, 2] = nan
    error = refused(
        [three[0], replace(three[1], targets=reader(rows))],
        "the predictions of checkpoint 1 for target 2",
        NonFiniteError,
    )
    assert error.index == 2


def test_rows_that_are_all_zero(three):
    zero = replace(three[1], train=reader(torch.zeros(30, 4)))
    refused(
        [three[0], zero],
        "all projected gradients of checkpoint 1 are zero",
        SingularKernelError,
    )


def test_subsets_that_are_not_independent(three):
    same = replace(three[1], members=three[0].members)
    refused([three[0], same], "checkpoints 0 and 1 were trained on the same subsets")
    other = replace(three[1], members=~three[0].members)
    refused([three[0], three[2], other], "checkpoints 0 and 2 .* complementary subsets")


def test_outputs_that_never_vary(three):
    constant = [replace(one, outputs=np.ones(3)) for one in three]
    refused(constant, "3 checkpoints' outputs are the same on each of the 3 targets")


def test_notes_on_targets_and_checkpoints(three):
    outputs = [one.outputs.copy() for one in three]
    for one in outputs:
        one[1] = 5.0
    changed = [replace(one, outputs=f) for one, f in zip(three, outputs, strict=True)]
    changed.append(replace(changed[0], members=np.ones(30, dtype=bool)))
    found = cross_validate(changed, *SIZES, max_targets=1)
    assert found.targets.tolist() == [0]
    assert (found.n_checkpoints, found.n_held_out) == (4, 3)
    notes = " ".join(found.notes)
    assert "checkpoints 3 saw all examples or none" in notes
    assert "1 targets are left out" in notes
    assert "1 of 2 targets are used" in notes


def test_a_fixed_core_of_examples_is_noted_and_harmless():
    checkpoints, (n, m, p), _ = linear_world(0, 3, n=400)
    core = np.arange(n) < n // 2
    changed = [replace(one, members=one.members | core) for one in checkpoints]
    found = cross_validate(changed, n, m, p)
    assert any("have a correlation of" in note for note in found.notes)
    assert np.isfinite(found.lds)


def test_subsets_of_unequal_sizes_and_an_example_that_is_in_all():
    checkpoints, (n, m, p), _ = linear_world(0, 4)
    masks = [random_subsets(n, 1, 0.2 + 0.2 * c, c)[0] for c in range(4)]
    for mask in masks:
        mask[0] = True
    changed = [
        replace(one, members=mask) for one, mask in zip(checkpoints, masks, strict=True)
    ]
    found = cross_validate(changed, n, m, p)
    assert np.isfinite(found.lds)
    assert not found.notes


def test_subsets_of_whole_groups_are_noted():
    """Ten groups of 20 examples that are alike: their sums vary 20 times as much."""
    rng = np.random.default_rng(0)
    n, m, p, count = 200, 30, 5, 6
    group = np.repeat(np.arange(10), 20)
    rows = rng.standard_normal((10, p))[group]
    checkpoints = [
        CheckpointData(
            reader(rows),
            reader(rng.standard_normal((m, p))),
            np.ones(n),
            rng.standard_normal(m),
            random_subsets(10, count, 0.5, 3)[c][group],
        )
        for c in range(count)
    ]
    found = cross_validate(checkpoints, n, m, p, n_probes=32)
    assert any("were whole groups drawn?" in note for note in found.notes)


# -- how it reads ---------------------------------------------------------------------


def test_it_reads_as_a_table_and_as_json():
    checkpoints, (n, m, p), _ = linear_world(1, 4)
    found = cross_validate(checkpoints, n, m, p, columns=[6])
    text = str(found)
    assert text.startswith("expected LDS 0.")
    assert "4 checkpoints, 4 held out in turn, 20 targets" in text
    assert "damping" in text
    assert "proj_dim" in text
    assert "mean eigenvalues, exponents (0, 1)" in text
    assert text.splitlines()[-1].startswith("advice: ")
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["lds"] == found.lds
    assert data["over_checkpoints"]["inf"] == found.over_checkpoints[inf]
    assert data["candidates"][0]["exponents"] == [0.0, 1.0]
    assert data["over_columns"]["6"] == found.over_columns[6]


def test_advice():
    checkpoints, (n, m, p), _ = linear_world(1, 4)
    found = cross_validate(checkpoints, n, m, p)
    base = {4.0: 0.3, 8.0: 0.35}
    sure = replace(found, lds=0.3, interval=(0.2, 0.4), over_checkpoints=base)
    assert sure.advice == "advice: 4 more checkpoints would add about 0.05."
    enough = replace(sure, over_checkpoints={4.0: 0.3, 8.0: 0.304})
    assert enough.advice.startswith("advice: more checkpoints would add little (0.004")
    unsure = replace(sure, interval=(-0.1, 0.4))
    assert "the interval reaches -0.10; train more" in unsure.advice


# -- formulas -------------------------------------------------------------------------


def test_formulas_against_draws_and_limits():
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((20000, 5)).std(axis=1, ddof=1).mean()
    assert_close(deviation_bias(5), float(draws), rtol=0.01, atol=0.0)
    assert spearman_of(7.0) == 1.0
    assert spearman_of(-7.0) == -1.0
    step = (spearman_of(0.501) - spearman_of(0.499)) / 0.002
    assert_close(spearman_slope(0.5), step, rtol=1e-5, atol=0.0)
    with pytest.raises(OptionError, match=r"factor=0.* does not make sense"):
        project_reliability(0.5, 0.0)
    assert project_reliability(-0.5, inf) == 0.0
    assert peak_of_parabola([0.0, 1.0, 3.0], [1.0, 1.0, 1.0]) == 1.0
    pairs = rng.standard_normal((200000, 2))
    other = 0.6 * pairs[:, 0] + 0.8 * pairs[:, 1]
    high, too = pairs[:, 0] > 1.2815516, other > 1.2815516
    expected = float((high & too).sum() / high.sum())
    assert_close(overlap_of_normals(0.6, 0.1), expected, rtol=0.02, atol=0.0)
