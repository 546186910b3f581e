"""From sums of scores over subsets and probes to an estimate of the LDS: arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from jaxtyping import Float, Float32, Float64

from trak.evaluation._cross_validation_maths import (
    deviation_bias,
    inverse_bias,
    project_reliability,
)


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What the scores of the others say of a checkpoint's subset."""

    own: Float32[np.ndarray, "k w m"]
    """Centred sum of the scores over its subset, for every damping and weighting."""

    probes: Float32[np.ndarray, "k w v m"]
    """The same of probes."""

    variance: float
    """What the sum of squared probes is multiplied with to be the variance of ``own``."""

    draws: int | None
    """Random draws behind that sum, or None if it is exact."""


@dataclass(frozen=True, slots=True, eq=False)
class Correlations:
    """Correlation of predicted and real outputs, for every damping and weighting."""

    per_target: Float64[np.ndarray, "k w m"]
    """Of every target; unbiased, and so at times beyond 1."""

    null: Float64[np.ndarray, "k w q"]
    """Means over targets, had the subsets been other ones: their squares sum to the
    variance of the estimate."""

    spread: float
    """Variance of the predictions, over what it is for random subsets."""

    spread_error: float
    """The standard error of that; infinite where it is not known."""


def standardized(outputs: Float64[np.ndarray, "j m"]) -> Float64[np.ndarray, "j m"]:
    r"""Centre outputs, and scale them so that correlations with them are unbiased.

    :math:`(f_j - \bar f) / (c_4 s)`: for normal outputs, of which one deviates by
    :math:`f_j - \mu` where its prediction is :math:`\rho (f_j - \mu) / \sigma`, the
    products sum to :math:`\rho\, s / (c_4 \sigma)` each, on average :math:`\rho`.

    Args:
        outputs: Outputs of models, 2 or more, that vary. Shape ``(j, m)``.

    Returns:
        As many numbers.

    Example:
        >>> standardized(np.array([[1.0], [3.0]])).round(4)
        array([[-0.8862],
               [ 0.8862]])
    """
    count = len(outputs)
    deviation = outputs.std(axis=0, ddof=1) * deviation_bias(count)
    centred: np.ndarray = (outputs - outputs.mean(axis=0)) / deviation
    return centred


def correlate(
    predicted: Sequence[Prediction], outputs: Float64[np.ndarray, "j m"]
) -> Correlations:
    r"""Correlate predictions, whose variance is known, with outputs.

    With :math:`u_j` the prediction over its standard deviation and :math:`s` the sample's
    standard deviation of the outputs, the estimate for a target is

    .. math:: \hat r = \frac{1}{c_4 (k - 1)} \sum_{j=1}^{k} u_j \frac{f_j - \bar f}{s}

    which is unbiased for outputs that are normal and linear in :math:`u`.

    Args:
        predicted: One prediction for each model.
        outputs: Outputs of the models. Shape ``(j, m)``.

    Returns:
        The correlations.
    """
    real = standardized(outputs)
    k, w, m = predicted[0].own.shape
    total = np.zeros((k, w, m))
    null, spreads, errors = [], [], []
    for one, output in zip(predicted, real, strict=True):
        unit = _inverse_deviation(one)
        guess = one.own * unit
        total += guess * output
        size = sqrt(one.variance)
        null.append(np.einsum("kwvm,kwm->kwv", one.probes, unit * output) * size / m)
        spreads.append(float((guess**2).mean()))
        errors.append(_spread_error(one, unit))
    count = len(predicted) - 1
    return Correlations(
        per_target=total / count,
        null=np.concatenate(null, axis=2) / count,
        spread=float(np.mean(spreads)),
        spread_error=float(np.mean(errors)) / sqrt(len(errors)),
    )


def _inverse_deviation(one: Prediction) -> Float64[np.ndarray, "k w m"]:
    """Give one over the standard deviation of predictions, 0 where they do not vary."""
    squares = np.einsum("kwvm,kwvm->kwm", one.probes, one.probes, dtype=np.float64)
    deviation = np.sqrt(one.variance * squares)
    if one.draws is not None:
        deviation *= inverse_bias(one.draws)
    inverse: np.ndarray = np.zeros_like(deviation)
    np.divide(1.0, deviation, out=inverse, where=deviation > 0)
    return inverse


def _spread_error(one: Prediction, unit: Float64[np.ndarray, "k w m"]) -> float:
    """Give how much the mean square of a prediction would vary between subsets."""
    if one.draws is None:
        return float("inf")
    squares = (one.probes[0, 0] * unit[0, 0]) ** 2 * one.variance * one.draws
    return float(squares.mean(axis=1).std())


def agreement(
    first: Float[np.ndarray, "k w v m"], second: Float[np.ndarray, "k w v m"]
) -> Float64[np.ndarray, "k w"]:
    """Correlate the sums of two sets of scores over the same probes.

    Args:
        first: Sums over centred probes. Shape ``(k, w, v, m)``.
        second: Those of other scores.

    Returns:
        The mean over targets. Shape ``(k, w)``.
    """
    sums = [
        np.einsum("kwvm,kwvm->kwm", left, right, dtype=np.float64)
        for left, right in ((first, second), (first, first), (second, second))
    ]
    scale = np.sqrt(sums[1] * sums[2])
    ratio = np.zeros_like(scale)
    np.divide(sums[0], scale, out=ratio, where=scale > 0)
    result: np.ndarray = ratio.mean(axis=2)
    return result


def growth(reliability: float, measured: int, before: int, after: float | int) -> float:
    r"""Give by what factor a correlation grows with the number of checkpoints.

    Noise that differs between checkpoints lowers a correlation by the root of the
    reliability, :math:`r_K = r_\infty \sqrt{\mathrm{rel}_K}`.

    Args:
        reliability: Correlation of the scores of two sets of checkpoints.
        measured: Checkpoints in each of them.
        before: Checkpoints behind the correlation that is known.
        after: Checkpoints to say it for; may be infinite.

    Returns:
        The factor.

    Example:
        >>> round(growth(0.5, measured=1, before=1, after=2), 4)
        1.1547
    """
    known = max(reliability, 1e-6)
    low = project_reliability(known, before / measured)
    high = project_reliability(known, after / measured)
    return sqrt(high / low)
