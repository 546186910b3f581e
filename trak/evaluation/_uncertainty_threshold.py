"""Soft thresholds of scores, and how much of the scores one keeps best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from trak._members import balanced
from trak.errors import OptionError
from trak.evaluation._arrays import check_targets_finite, listed, to_numpy
from trak.evaluation._cross_validation_checks import (
    check_arrays,
    check_subsets,
    held_out,
    varying,
)
from trak.evaluation._cross_validation_choice import Trial, choose, tabulate
from trak.evaluation._cross_validation_estimate import Prediction, correlate
from trak.evaluation._cross_validation_maths import near_one
from trak.evaluation._uncertainty import checked, combine

TARGETS = 64
"""Targets that a threshold is chosen on, at most."""

SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
"""Shares of the scores that thresholds are tried to keep."""


def soft_threshold(
    scores: np.ndarray | Tensor, level: float | np.ndarray
) -> Float64[np.ndarray, "n m"]:
    r"""Shrink scores towards 0: :math:`\operatorname{sign}(\tau) \max(|\tau|-\lambda, 0)`.

    The operator of equation 17 of Park et al. (2023).

    Args:
        scores: Scores. Shape ``(n, m)``.
        level: The threshold, or one for each target. Shape ``()`` or ``(m,)``.

    Returns:
        The shrunk scores. Shape ``(n, m)``.

    Raises:
        OptionError: If a level is negative or NaN, or neither one number nor one a target.
        NonFiniteError: If a score is NaN or infinite.

    Example:
        >>> soft_threshold(np.array([[3.0], [-0.5]]), 1.0)
        array([[2.],
               [0.]])
    """
    values, levels = _scores(scores), to_numpy("level", level)
    if levels.shape not in {(), values.shape[1:]} or not bool((levels >= 0).all()):
        raise OptionError(
            f"level={level}; pass thresholds >= 0: one, or one for each of the "
            f"{values.shape[1]} targets."
        )
    # Not by the sign, which would leave negative zeros.
    shrunk: np.ndarray = values - np.clip(values, -levels, levels)
    return shrunk


def threshold_keeping(
    scores: np.ndarray | Tensor, share: float
) -> Float64[np.ndarray, " m"]:
    """Find each target's threshold that leaves a share of its scores above 0.

    Scores that tie at the threshold go together, so that fewer may be left.

    Args:
        scores: Scores. Shape ``(n, m)``.
        share: The share to keep, in (0, 1].

    Returns:
        The thresholds; 0 for a share of 1. Shape ``(m,)``.

    Raises:
        OptionError: If the share is not in (0, 1], or there are no examples.
        NonFiniteError: If a score is NaN or infinite.

    Example:
        >>> threshold_keeping(np.array([[4.0], [-3.0], [2.0], [1.0]]), 0.5)
        array([2.])
    """
    if not 0 < share <= 1:
        raise OptionError(f"share={share}; pass a share in (0, 1].")
    sizes = np.abs(_scores(scores))
    if len(sizes) == 0:
        raise OptionError("scores has no training example; pass at least one.")
    drop = len(sizes) - max(1, round(share * len(sizes)))
    if drop == 0:
        return np.zeros(sizes.shape[1])
    level: np.ndarray = np.partition(sizes, drop - 1, axis=0)[drop - 1]
    return level


def _scores(scores: np.ndarray | Tensor) -> Float64[np.ndarray, "n m"]:
    values = to_numpy("scores", scores)
    if values.ndim != 2:
        raise OptionError(f"scores has {values.ndim} axes; pass scores (n, m).")
    check_targets_finite("scores", values, "compute the scores again.")
    return values.astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class ThresholdChoice:
    """The share of the scores that is best kept."""

    share: float
    """The chosen share; 1 where no threshold is clearly better than none."""

    shares: tuple[float, ...]
    """The shares that were tried, 1 first."""

    lds: tuple[float, ...]
    """The expected LDS with each."""

    gain_errors: tuple[float, ...]
    """The standard error of each one's gain over 1."""

    n_targets: int
    """Targets behind it."""


def choose_threshold(
    kernels: np.ndarray | Tensor,
    out_to_loss: np.ndarray | Tensor | None,
    members: np.ndarray | Tensor,
    outputs: np.ndarray | Tensor,
    *,
    exponent: float = 1.0,
    shares: Sequence[float] = SHARES,
) -> ThresholdChoice:
    """Choose how many scores a soft threshold keeps, by predicting checkpoints left out.

    Args:
        kernels: Scores of each checkpoint, before the weight of the rows; up to 64
            targets of them are used. Shape ``(c, n, m)``.
        out_to_loss: Weights of the rows, which are balanced between each checkpoint's
            members and the others; None if ``kernels`` have them. Shape ``(c, n)``.
        members: Which examples each checkpoint was trained on. Shape ``(c, n)``.
        outputs: The checkpoints' outputs on the targets. Shape ``(c, m)``.
        exponent: The power of the weight.
        shares: Shares of the scores to keep.

    Returns:
        The choice; it applies to scores by :func:`threshold_keeping` and
        :func:`soft_threshold`.

    Raises:
        OptionError: If there are fewer than 3 checkpoints trained on a part of the
            training set, shapes do not fit, a share is not in (0, 1], the exponent is
            negative, two subsets are the same or complementary, or no output varies.
        NonFiniteError: If a score, a weight or an output is NaN or infinite.
    """
    tried = tuple(dict.fromkeys([1.0, *map(float, listed("shares", shares))]))
    blocks, weights = checked(kernels, out_to_loss, exponent)
    members, outputs = to_numpy("members", members), to_numpy("outputs", outputs)
    count, n, m = blocks.shape
    if not len(members) == len(outputs) == count:
        raise OptionError(
            f"kernels are of {count} checkpoints, members of {len(members)} and outputs "
            f"of {len(outputs)}; pass the same checkpoints."
        )
    shown = np.ones((count, n)) if weights is None else weights
    check_arrays(list(shown), list(outputs), list(members), n, m)
    if weights is not None:
        weights = np.stack([*map(balanced, weights, members)])
    held, _ = held_out(list(members))
    check_subsets(list(members), held)
    if len(held) < 3:
        raise OptionError(
            f"{len(held)} checkpoints trained on a part of the training set do not "
            f"choose a threshold; train at least 3."
        )
    real = outputs[held].astype(np.float64)
    targets, _ = varying(real, TARGETS)
    trials = []
    for share in tried:
        found = correlate(
            [
                _thresholded(
                    blocks[:, :, targets], weights, members, j, exponent, share
                )
                for j in held
            ],
            real[:, targets],
        )
        null = found.null[0, 0]
        trials.append(Trial((0.0, exponent), share, found.per_target[0, 0], null, 0.0))
    table = tabulate(trials, len(held))
    return ThresholdChoice(
        share=tried[choose(table)],
        shares=tried,
        lds=tuple(one.lds for one in table),
        gain_errors=tuple(one.gain_error for one in table),
        n_targets=len(targets),
    )


def _thresholded(
    kernels: Float[np.ndarray, "c n m"],
    weights: Float64[np.ndarray, "c n"] | None,
    members: Bool[np.ndarray, "c n"],
    j: int,
    exponent: float,
    share: float,
) -> Prediction:
    """Predict checkpoint ``j`` from the shrunk scores of the others."""
    others = np.arange(len(kernels)) != j
    own = None if weights is None else weights[others]
    scores = near_one(combine(kernels[others], own, exponent))
    shrunk = soft_threshold(scores, threshold_keeping(scores, share))
    shrunk -= shrunk.mean(axis=0)
    n, size = len(shrunk), int(members[j].sum())
    return Prediction(
        own=shrunk[members[j]].sum(axis=0, dtype=np.float32)[None, None],
        probes=shrunk.astype(np.float32)[None, None],
        variance=size * (n - size) / (n * (n - 1)),
        draws=None,
    )
