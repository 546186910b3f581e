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
    near_one,
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
    """Variance of the predictions over what it is for random subsets of single examples;
    1 where it is not clearly another one. It is allowed for."""


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
    outputs = near_one(outputs)
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

    which is unbiased for outputs that are normal and linear in :math:`u`. Its noise is
    lowered by what is known: the squares of :math:`u_j` are 1 on average, and where they
    happen to be larger, so are the products, by about half the correlation times that.
    The correlation there is that of the other models, or it would not stay unbiased.

    Args:
        predicted: One prediction for each model; two or more.
        outputs: Outputs of the models. Shape ``(j, m)``.

    Returns:
        The correlations.
    """
    real = standardized(outputs)
    m = outputs.shape[1]
    count = len(predicted)
    units = [_inverse_deviation(one) for one in predicted]
    guesses = [one.own * unit for one, unit in zip(predicted, units, strict=True)]
    spread = np.mean(np.square(guesses), axis=(0, 3))
    error = float(np.mean([_spread_error(one) for one in predicted])) / sqrt(count)
    is_other = np.abs(spread - 1) > np.maximum(4 * error, 0.3)
    scale = 1 / np.sqrt(np.where(is_other & (spread > 0), spread, 1.0))[:, :, None]
    products, null = [], []
    for one, unit, guess, output in zip(predicted, units, guesses, real, strict=True):
        products.append(guess * scale * output * (count / (count - 1)))
        size = sqrt(one.variance) / m / (count - 1)
        found = np.einsum("kwvm,kwm->kwv", one.probes, unit * scale * output) * size
        null.append(found)
    squares = np.square(np.stack(guesses) * scale)
    return Correlations(
        per_target=_steadied(np.stack(products), squares).mean(axis=0),
        null=np.concatenate(null, axis=2),
        spread=float(spread[is_other].mean()) if is_other.any() else 1.0,
    )


def _steadied(
    products: Float64[np.ndarray, "j k w m"], squares: Float64[np.ndarray, "j k w m"]
) -> Float64[np.ndarray, "j k w m"]:
    """Take from products what squares that are not 1 add to them."""
    means = products.mean(axis=3, keepdims=True)
    others = (means.sum(axis=0) - means) / (len(means) - 1)
    result: np.ndarray = products - others.clip(-1.0, 1.0) / 2 * (squares - 1)
    return result


def _inverse_deviation(one: Prediction) -> Float64[np.ndarray, "k w m"]:
    """Give one over the standard deviation of predictions, 0 where they do not vary."""
    squares = np.einsum("kwvm,kwvm->kwm", one.probes, one.probes, dtype=np.float64)
    deviation = np.sqrt(one.variance * squares)
    if one.draws is not None:
        deviation *= inverse_bias(one.draws)
    inverse: np.ndarray = np.zeros_like(deviation)
    np.divide(1.0, deviation, out=inverse, where=deviation > 0)
    return inverse


def _spread_error(one: Prediction) -> float:
    """Give how much the mean square of a prediction varies between subsets.

    For normal variables its variance is twice the mean of their squared correlations.

    Returns:
        The standard deviation of that mean over targets.
    """
    units = one.probes[0, 0] * (_inverse_deviation(one)[0, 0] * sqrt(one.variance))
    v, m = units.shape
    if one.draws is None:
        small = units @ units.T if v <= m else units.T @ units
        squares = float((small**2).sum())
        return sqrt(2 * squares) / float(m)
    # The mean square of every draw is that of a subset.
    deviation = float((units**2).mean(axis=1).std())
    return deviation * one.draws


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
