"""The linear datamodeling score: do scores predict what retraining does?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from trak.errors import NonFiniteError, OptionError
from trak.evaluation._arrays import (
    check_scores_finite,
    check_targets_finite,
    to_numpy,
    with_repeats,
)
from trak.evaluation._bank import GroundTruth
from trak.evaluation._bootstrap import bootstrap_interval

_MIN_SUBSETS = 3  # two subsets correlate at -1 or 1 whatever the scores are
_TOO_LARGE = "scale it down: its parts are finite, and overflow float64 together."
_ROWS_AT_ONCE = 4096  # scores may be memory-mapped; widen this many rows at a time


@dataclass(frozen=True, slots=True, eq=False)
class LdsResult:
    """An LDS with what it rests on."""

    mean: float
    """Mean over targets of the rank correlation, in [-1, 1]."""

    interval: tuple[float, float]
    """95 % bootstrap interval of ``mean``, resampling targets."""

    per_target: Float[np.ndarray, " m"]
    """Rank correlation of each target, float64. Shape ``(m,)``."""

    n_subsets: int
    """Subsets that models were retrained on."""

    n_repeats: int
    """Retrainings a subset, whose outputs were averaged."""

    n_targets: int
    """Targets the mean is over."""

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"LDS {self.mean:.3f} [{low:.3f}, {high:.3f}] ({self.n_targets} targets, "
            f"{self.n_subsets} subsets x {self.n_repeats} retrainings)"
        )


def lds(
    scores: np.ndarray | Tensor,
    masks: np.ndarray | Tensor | GroundTruth,
    outputs: np.ndarray | Tensor | None = None,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> LdsResult:
    r"""Correlate what scores predict for training subsets with what retraining gave.

    For a target :math:`z` and training subsets :math:`S_1, ..., S_s`,

    .. math::
        \mathrm{LDS}(\tau, z) = \rho\Big(
            \big(\textstyle\sum_{i \in S_j} \tau(z)_i\big)_j,\;
            \big(f(z; \theta^*(S_j))\big)_j \Big)

    with Spearman's :math:`\rho`, ties sharing their average rank (Park et al., 2023,
    Section 2; https://arxiv.org/abs/2303.14186; after Ilyas et al., 2022).

    The models behind ``outputs`` must not be the checkpoints that the scores came
    from. A target whose predictions are the same for every subset counts as 0: its
    scores say nothing.

    Args:
        scores: Attribution scores, larger where the training example raises the
            output. Shape ``(n, m)``.
        masks: Which training examples each retrained model saw, boolean. Shape
            ``(s, n)``. Or a :class:`GroundTruth`, which has the outputs too.
        outputs: The retrained models' outputs on the targets. Shape ``(s, m)``, or
            ``(s, r, m)`` with ``r`` retrainings a subset, which are averaged. None
            with a :class:`GroundTruth`.
        n_bootstrap: Resamples of the targets behind the interval.
        seed: Seed of the resampling.

    Returns:
        The mean over targets, its interval and the correlation of each target.

    Raises:
        OptionError: If the shapes do not fit each other, ``masks`` is not boolean or the
            same for every subset, there are fewer than 3 subsets or no targets, or a
            target's outputs are the same for every subset, or outputs are given twice or
            not at all.
        NonFiniteError: If a score or an output is NaN or infinite, or their sums are.

    Example:
        The first target's scores order the four subsets as retraining did; the second
        target's reverse them.

        >>> masks = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 1]]) == 1
        >>> scores = np.array([[1.0, -1.0], [2.0, -2.0], [4.0, -4.0]])
        >>> outputs = np.array([[0.3, 0.3], [0.5, 0.5], [0.6, 0.6], [0.4, 0.4]])
        >>> lds(scores, masks, outputs).per_target
        array([ 1., -1.])
    """
    score_array = to_numpy("scores", scores)
    mask_array, output_array = _retrainings(masks, outputs)
    _check_shapes(score_array, mask_array, output_array)
    _check_outputs(output_array)
    with np.errstate(over="ignore", invalid="ignore"):
        truth = output_array.astype(np.float64).mean(axis=1)
        predicted = _predict(score_array, mask_array)
    check_targets_finite("the mean of outputs", truth, _TOO_LARGE)
    check_targets_finite("the sum of scores", predicted, _TOO_LARGE)
    _check_outputs_vary(truth)
    per_target = _spearman(predicted, truth)
    return LdsResult(
        mean=float(per_target.mean()),
        interval=bootstrap_interval(per_target, n_bootstrap=n_bootstrap, seed=seed),
        per_target=per_target,
        n_subsets=truth.shape[0],
        n_repeats=output_array.shape[1],
        n_targets=truth.shape[1],
    )


def _predict(
    scores: Float[np.ndarray, "n m"], masks: Bool[np.ndarray, "s n"]
) -> Float[np.ndarray, "s m"]:
    """Return each subset's sum of scores in float64, 0 where all subsets' are equal."""
    totals = np.zeros((len(masks), scores.shape[1]))
    magnitude = np.zeros(scores.shape[1])
    for start in range(0, len(scores), _ROWS_AT_ONCE):
        rows = scores[start : start + _ROWS_AT_ONCE].astype(np.float64)
        check_scores_finite(rows, first_row=start)
        totals += masks[:, start : start + len(rows)].astype(np.float64) @ rows
        magnitude += np.abs(rows).sum(axis=0)
    # Sums of equal scores in another order differ by rounding, which has a ranking.
    rounding = len(scores) * np.finfo(np.float64).eps * magnitude
    return np.where(np.ptp(totals, axis=0) <= rounding, 0.0, totals)


def _spearman(
    first: Float[np.ndarray, "s m"], second: Float[np.ndarray, "s m"]
) -> Float[np.ndarray, " m"]:
    """Return the rank correlation of each column pair, 0 where one is constant."""
    x, y = _average_ranks(first), _average_ranks(second)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))
    # Constant columns have zero ranks after centring: 0 / 1.
    correlation: np.ndarray = (x * y).sum(axis=0) / np.where(scale > 0, scale, 1.0)
    return correlation.clip(-1.0, 1.0)


def _average_ranks(values: Float[np.ndarray, "s m"]) -> Float[np.ndarray, "s m"]:
    """Return each column's ranks from 1; ties share the average of what they span."""
    order = np.argsort(values, axis=0, kind="stable")
    in_order = np.take_along_axis(values, order, axis=0)
    changes = in_order[1:] != in_order[:-1]
    edge = np.ones((1, values.shape[1]), dtype=np.bool_)
    position = np.arange(len(values))[:, None]
    # The first and the last position of the run of ties that each position is in.
    first = np.where(np.concatenate([edge, changes]), position, 0)
    last = np.where(np.concatenate([changes, edge]), position, len(values))
    first = np.maximum.accumulate(first, axis=0)
    last = np.minimum.accumulate(last[::-1], axis=0)[::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=0)
    return ranks


def _retrainings(
    masks: np.ndarray | Tensor | GroundTruth, outputs: np.ndarray | Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(masks, GroundTruth):
        if outputs is not None:
            raise OptionError(
                "a GroundTruth has outputs of its own; pass lds(scores, bank), or masks "
                "and outputs."
            )
        return masks.masks, masks.outputs
    if outputs is None:
        raise OptionError(
            "outputs is missing; pass lds(scores, masks, outputs), or a GroundTruth."
        )
    return to_numpy("masks", masks), with_repeats(to_numpy("outputs", outputs))


def _check_shapes(scores: np.ndarray, masks: np.ndarray, outputs: np.ndarray) -> None:
    if scores.ndim != 2 or masks.ndim != 2 or outputs.ndim != 3:
        raise OptionError(
            f"scores has {scores.ndim} axes, masks {masks.ndim} and outputs "
            f"{outputs.ndim}; pass scores (n, m), masks (s, n) and outputs (s, m) or "
            f"(s, r, m)."
        )
    if masks.dtype != np.bool_:
        raise OptionError(
            f"masks has dtype {masks.dtype}; pass booleans, such as masks == 1."
        )
    (n, m), (s, masked), (trained, r, measured) = (
        scores.shape,
        masks.shape,
        outputs.shape,
    )
    if (masked, trained, measured) != (n, s, m):
        raise OptionError(
            f"scores are for n={n} training examples and m={m} targets, masks for "
            f"s={s} subsets of {masked} examples, outputs for {trained} subsets and "
            f"{measured} targets; make the three agree."
        )
    if s < _MIN_SUBSETS:
        raise OptionError(
            f"s={s} subsets cannot rank anything; retrain on at least {_MIN_SUBSETS}, "
            f"better on 50 or more."
        )
    if not (masks != masks[0]).any():
        raise OptionError(
            f"the s={s} subsets in masks are all the same, so scores predict the same for "
            f"each; retrain on different ones, such as those of random_subsets."
        )
    if m == 0 or r == 0:
        raise OptionError(
            f"outputs holds m={m} targets and r={r} retrainings a subset; pass at "
            f"least one of each."
        )


def _check_outputs(outputs: Float[np.ndarray, "s r m"]) -> None:
    bad = np.argwhere(~np.isfinite(outputs))
    if len(bad):
        subset, _, target = (int(index) for index in bad[0])
        raise NonFiniteError(
            f"outputs is not finite for target {target} and subset {subset}; check "
            f"that retraining, or leave the subset out of masks and outputs, as "
            f"GroundTruth.finite() does.",
            index=target,
        )


def _check_outputs_vary(truth: Float[np.ndarray, "s m"]) -> None:
    constant = np.flatnonzero(np.ptp(truth, axis=0) == 0)
    if len(constant):
        raise OptionError(
            f"outputs of target {constant[0]} are {truth[0, constant[0]]:g} for every "
            f"subset, so they have no ranking; leave out such targets ({len(constant)} "
            f"here), or check that each retraining's own outputs were stored."
        )
