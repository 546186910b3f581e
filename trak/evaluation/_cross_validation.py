"""Cross-validation of checkpoints: the LDS of their scores, without retraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64

from trak._exponents import Exponents as WeightExponents
from trak._linalg import RowReader
from trak._members import balanced
from trak.evaluation._cross_validation_checks import (
    check_arrays,
    check_options,
    check_subsets,
    check_width,
    held_out,
    varying,
)
from trak.evaluation._cross_validation_choice import Trial, choose, refine, tabulate
from trak.evaluation._cross_validation_estimate import (
    Correlations,
    Prediction,
    agreement,
    correlate,
    growth,
)
from trak.evaluation._cross_validation_maths import (
    near_one,
    noise_with_more,
    project_reliability,
    spearman_of,
)
from trak.evaluation._cross_validation_probes import (
    Probe,
    ScoreSet,
    Sizes,
    Source,
    chosen_rows,
    predictions,
    scaled_rows,
)
from trak.evaluation._cross_validation_result import CrossValidation, Exponents

MULTIPLES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Dampings that are tried, in mean eigenvalues."""

MIN_TO_CHOOSE = 3
"""Checkpoints held out below which the default is kept, whatever the estimates are."""

_SPLITS = 3  # pairs of halves of the checkpoints whose agreement is averaged


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointData:
    """What cross-validation needs of a checkpoint."""

    train: RowReader
    """Reads projected gradients of training examples. Shape ``(n, p)``."""

    targets: RowReader
    """Reads projected gradients of targets. Shape ``(m, p)``."""

    out_to_loss: Float64[np.ndarray, " n"]
    """The out-to-loss weight of every training example, signed. Shape ``(n,)``."""

    outputs: Float64[np.ndarray, " m"]
    """The model's own output on every target. Shape ``(m,)``."""

    members: Bool[np.ndarray, " n"]
    """Which training examples it was trained on. Shape ``(n,)``."""


def cross_validate(
    checkpoints: Sequence[CheckpointData],
    n: int,
    m: int,
    p: int,
    *,
    multiples: Sequence[float] = MULTIPLES,
    exponents: Sequence[Exponents] = ((0.0, 1.0),),
    columns: Sequence[int] = (),
    max_targets: int = 1000,
    n_probes: int | None = None,
    seed: int = 0,
) -> CrossValidation:
    r"""Estimate the LDS of checkpoints' scores by predicting each from the others.

    Hold out checkpoint :math:`j`, which was trained on :math:`S_j`, and let the others
    predict its outputs:

    .. math::
        g_j(z) = \sum_i \big([i \in S_j] - |S_j|/n\big)\, w_i^{(-j)}
            \frac{1}{C-1} \sum_{c \ne j} K_c[i, z]
        \qquad
        w^{(-j)} = \operatorname{sign}(\bar Q^{(-j)}) |\bar Q^{(-j)}|^b

    with each checkpoint's :math:`Q_c` balanced between its members and the others.
    Nothing of :math:`j` is in its prediction but the subset. The variance of :math:`g_j`
    over subsets is known without training, so that a few pairs :math:`(g_j, f_j)` for
    each target are enough.

    Args:
        checkpoints: Two or more, trained on subsets drawn independently of each other.
        n: Training examples.
        m: Targets.
        p: Projected entries.
        multiples: Dampings to try, in mean eigenvalues. The default, 1, is tried
            always.
        exponents: Powers of the out-to-loss weight to try, of the rows and of the
            scores. The first pair is the default. Every other power of the rows takes
            one more Gram matrix a checkpoint.
        columns: Numbers of projected entries to estimate the LDS for as well, with the
            same damping in mean eigenvalues; each takes one more Gram matrix a
            checkpoint. All columns of a sketch's first quarters are sketches.
        max_targets: Targets that are used at most; evenly spaced if there are more.
        n_probes: Random vectors behind each variance; None for 640 over all
            checkpoints, but 32 to 256 for each.
        seed: Seed of those.

    Returns:
        The estimate, its interval, how it depends on damping, exponents, checkpoints and
        columns, and the choice.

    Raises:
        OptionError: If there are fewer than 2 checkpoints, or fewer than 2 trained on a
            part of the training set, two were trained on the same subset or on
            complementary ones, no target's outputs vary, or an argument cannot work.
        NonFiniteError: If an output, a weight or a row is NaN or infinite.
    """
    check_options(p, multiples, exponents, columns, max_targets, n_probes, seed)
    check_arrays(
        [one.out_to_loss for one in checkpoints],
        [one.outputs for one in checkpoints],
        [one.members for one in checkpoints],
        n,
        m,
    )
    job, notes = _plan(checkpoints, n, p, max_targets, n_probes, seed)
    grid = tuple(sorted({1.0, *map(float, multiples)}))
    trials, noted = _trials(job, exponents, grid)
    notes += noted
    table = tabulate(trials, len(job.held))
    chosen = choose(table) if len(job.held) >= MIN_TO_CHOOSE else 0
    if len(job.held) < MIN_TO_CHOOSE and len(table) > 1:
        notes.append(
            f"{len(job.held)} checkpoints do not choose: the default is kept. Train "
            f"{MIN_TO_CHOOSE} or more."
        )
    best, count = trials[chosen], len(checkpoints)
    if chosen and best.multiple in {grid[0], grid[-1]}:
        notes.append(
            f"the best damping, {best.multiple:g}, is at the end of those tried."
        )
    return CrossValidation(
        lds=table[chosen].lds,
        interval=best.interval(len(job.held)),
        exponents=best.exponents,
        multiple=refine(table, chosen) if chosen else best.multiple,
        is_default=chosen == 0,
        candidates=table,
        per_target=best.per_target,
        target_error=1 / sqrt(len(job.held) - 1),
        targets=job.targets,
        over_checkpoints=_over_checkpoints(best, count),
        over_columns=_over_columns(job, best, columns),
        n_checkpoints=count,
        n_held_out=len(job.held),
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Checked arguments."""

    checkpoints: Sequence[CheckpointData]
    sizes: Sizes
    targets: np.ndarray
    held: Sequence[int]
    outputs: Float64[np.ndarray, "j m"]
    n_probes: int
    seed: int


def _plan(
    checkpoints: Sequence[CheckpointData],
    n: int,
    p: int,
    max_targets: int,
    n_probes: int | None,
    seed: int,
) -> tuple[_Job, list[str]]:
    members = [one.members for one in checkpoints]
    held, notes = held_out(members)
    notes += check_subsets(members, held)
    outputs = np.stack([checkpoints[j].outputs for j in held]).astype(np.float64)
    targets, noted = varying(outputs, max_targets)
    device: torch.device = checkpoints[0].train(0, 1).device
    for index, one in enumerate(checkpoints):
        check_width(index, one.train(0, 1), one.targets(0, 1), p)
    job = _Job(
        checkpoints=checkpoints,
        sizes=Sizes(n=n, m=len(targets), p=p, device=device),
        targets=targets,
        held=held,
        outputs=outputs[:, targets],
        n_probes=n_probes or min(256, max(32, 640 // len(checkpoints))),
        seed=seed,
    )
    return job, notes + noted


class _Measured(NamedTuple):
    """What one power of the rows gave, for every damping and power of the scores."""

    correlations: Correlations
    reliability: Float64[np.ndarray, "k w"]


def _trials(
    job: _Job, exponents: Sequence[Exponents], grid: Sequence[float]
) -> tuple[list[Trial], list[str]]:
    """Try everything; the default comes first."""
    pairs = list(dict.fromkeys((float(a), float(b)) for a, b in exponents))
    found: dict[tuple[Exponents, float], Trial] = {}
    notes: list[str] = []
    for a in dict.fromkeys(a for a, _ in pairs):
        powers = [b for other, b in pairs if other == a]
        measured = _measure(job, a, powers, grid, job.sizes.p)
        if a == pairs[0][0]:
            notes = _spread_note(measured.correlations)
        for w, b in enumerate(powers):
            for k, multiple in enumerate(grid):
                trial = _trial(job, measured, (a, b), multiple, k, w)
                found[(a, b), multiple] = trial
    first = (pairs[0], 1.0)
    rest = [trial for key, trial in found.items() if key != first]
    return [found[first], *rest], notes


def _trial(
    job: _Job,
    measured: _Measured,
    exponents: Exponents,
    multiple: float,
    k: int,
    w: int,
) -> Trial:
    """Bring a correlation from one checkpoint fewer to all of them."""
    count = len(job.checkpoints)
    reliability = float(measured.reliability[k, w])
    factor = growth(reliability, count // 2, before=count - 1, after=count)
    return Trial(
        exponents=exponents,
        multiple=multiple,
        per_target=measured.correlations.per_target[k, w] * factor,
        null=measured.correlations.null[k, w] * factor,
        reliability=reliability,
    )


def _measure(
    job: _Job, a: float, powers: Sequence[float], grid: Sequence[float], columns: int
) -> _Measured:
    """Predict every checkpoint from the others, and halves from halves."""
    sets = [_leaving_out(job, j, powers) for j in job.held]
    halves = list(_halves(job, powers))
    sources = [_source(job, one, a, columns) for one in job.checkpoints]
    sums = predictions(sources, [*sets, *halves], grid, replace(job.sizes, p=columns))
    predicted = [
        _prediction(job, j, one, total)
        for j, one, total in zip(job.held, sets, sums[: len(sets)], strict=True)
    ]
    rest = [total.numpy() for total in sums[len(sets) :]]
    agreements = [
        agreement(left, right)
        for left, right in zip(rest[::2], rest[1::2], strict=True)
    ]
    return _Measured(correlate(predicted, job.outputs), np.mean(agreements, axis=0))


def _source(job: _Job, one: CheckpointData, a: float, columns: int) -> Source:
    powers = WeightExponents(a).row_weights(one.out_to_loss)
    scale = None if powers is None else torch.from_numpy(powers)[:, None]
    cut = None if columns == job.sizes.p else columns
    return Source(
        scaled_rows(one.train, scale, cut),
        chosen_rows(scaled_rows(one.targets, None, cut), job.targets),
    )


def _leaving_out(job: _Job, j: int, powers: Sequence[float]) -> ScoreSet:
    others = tuple(c for c in range(len(job.checkpoints)) if c != j)
    mask = job.checkpoints[j].members
    probe = Probe(job.sizes.n, job.n_probes, (job.seed, 0, j), mask)
    return ScoreSet(others, _weights(job, others, powers), probe)


def _halves(job: _Job, powers: Sequence[float]) -> list[ScoreSet]:
    """Cut the checkpoints into halves a few times, which share their probes."""
    count = len(job.checkpoints)
    size = count // 2
    order = np.random.default_rng([job.seed, 1]).permutation(count)
    distinct = count if count % 2 else size
    sets = []
    for split in range(min(_SPLITS, distinct)):
        probe = Probe(job.sizes.n, 2 * job.n_probes, (job.seed, 2, split))
        turned = [int(c) for c in np.roll(order, split)]
        for scorers in (tuple(turned[:size]), tuple(turned[size : 2 * size])):
            weights = _weights(job, scorers, powers)
            sets.append(ScoreSet(scorers, weights, probe))
    return sets


def _weights(
    job: _Job, scorers: Sequence[int], powers: Sequence[float]
) -> Float64[np.ndarray, "n w"]:
    used = [job.checkpoints[c] for c in scorers]
    mean = np.mean([balanced(one.out_to_loss, one.members) for one in used], axis=0)
    found = [WeightExponents(result=power).result_weights(mean) for power in powers]
    return near_one(np.stack(found, axis=1))


def _prediction(job: _Job, j: int, one: ScoreSet, total: torch.Tensor) -> Prediction:
    n, size = job.sizes.n, int(job.checkpoints[j].members.sum())
    sums = total.numpy()
    return Prediction(
        own=sums[:, :, 0],
        probes=sums[:, :, 1:],
        variance=size * (n - size) / (n * (n - 1)) * one.probe.scale,
        draws=one.probe.draws,
    )


def _spread_note(correlations: Correlations) -> list[str]:
    """Say so where the predictions vary otherwise than for random subsets."""
    if correlations.spread == 1:
        return []
    return [
        (
            f"predictions vary {correlations.spread:.2g} times as much as for subsets of "
            f"single examples drawn at random, which is allowed for; were whole groups "
            f"drawn?"
        )
    ]


def _over_checkpoints(best: Trial, count: int) -> dict[float, float]:
    """Give the expected LDS for other numbers of checkpoints."""
    sizes = sorted({1, 2, max(1, count // 2), count, count + 1, 2 * count, 4 * count})
    return {
        float(size): spearman_of(
            best.mean * growth(best.reliability, count // 2, count, size)
        )
        for size in [*sizes, inf]
    }


def _over_columns(job: _Job, best: Trial, columns: Sequence[int]) -> dict[int, float]:
    """Give the LDS with fewer projected entries, and what twice as many would reach."""
    p, count = job.sizes.p, len(job.checkpoints)
    trials = {p: best}
    for size in {*columns} - {p}:
        a, b = best.exponents
        measured = _measure(job, a, [b], [best.multiple], size)
        trials[size] = _trial(job, measured, best.exponents, best.multiple, 0, 0)
    found = {size: spearman_of(trials[size].mean) for size in sorted(trials)}
    if len(trials) < 2:
        return found if columns else {}
    below = max(size for size in trials if size < p)
    return found | {2 * p: spearman_of(_with_twice(below, p, trials, count))}


def _with_twice(below: int, p: int, trials: Mapping[int, Trial], count: int) -> float:
    """Extrapolate in 1/p what is sure of the gain, or the noise if that says more."""
    few, best = trials[below], trials[p]
    noise = [1 / max(one.reliability, 1e-6) - 1 for one in (few, best)]
    halved = noise_with_more(below, p, noise[0], noise[1], wanted=2 * p)
    before, after = (
        project_reliability(1 / (1 + one), count / (count // 2))
        for one in (noise[1], halved)
    )
    sure = best.mean - few.mean - float(np.linalg.norm(best.null - few.null))
    ratio = (1 / p - 1 / (2 * p)) / (1 / below - 1 / p)
    return max(best.mean * sqrt(after / before), best.mean + ratio * sure)
