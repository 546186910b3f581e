"""Formulas of cross-validation and of uncertainty that need no rows and no scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import asin, exp, lgamma, pi, sqrt
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64

from trak.errors import OptionError


def near_one(values: Float64[np.ndarray, "k m"]) -> Float64[np.ndarray, "k m"]:
    """Scale columns by powers of two, so that the largest of each is near 1.

    That rounds nothing, and then neither squares nor float32 over- or underflow.

    Args:
        values: Numbers, of which only ratios within a column matter. Shape ``(k, m)``.

    Returns:
        As many numbers; a column of zeros stays one.

    Example:
        >>> near_one(np.array([[3e-300], [-6e-300]])).round(3)
        array([[ 0.251],
               [-0.502]])
    """
    scaled: np.ndarray = np.ldexp(values, -np.frexp(np.abs(values).max(axis=0))[1])
    return scaled


def spearman_of(pearson: float) -> float:
    r"""Give the rank correlation of two normal variables, from their correlation.

    :math:`\rho_S = \frac{6}{\pi} \arcsin \frac{r}{2}` (Pearson, 1907).

    Args:
        pearson: Correlation; what is beyond 1 counts as 1.

    Returns:
        The rank correlation.

    Example:
        >>> spearman_of(0.0), spearman_of(1.0), round(spearman_of(0.5), 4)
        (0.0, 1.0, 0.4826)
    """
    bounded = min(1.0, max(-1.0, pearson))
    # asin(1/2) is pi/6 up to the last bit.
    return min(1.0, max(-1.0, 6 / pi * asin(bounded / 2)))


def spearman_slope(pearson: float) -> float:
    """Give how much :func:`spearman_of` changes with its argument.

    Args:
        pearson: Correlation; what is beyond 1 counts as 1.

    Returns:
        The derivative.

    Example:
        >>> round(spearman_slope(0.0), 4)
        0.9549
    """
    bounded = min(1.0, max(-1.0, pearson))
    return 3 / pi / sqrt(1 - bounded**2 / 4)


def deviation_bias(count: int) -> float:
    r"""Give by what factor a sample's standard deviation falls short on average.

    :math:`c_4 = \sqrt{2/(k-1)}\; \Gamma(k/2) / \Gamma((k-1)/2)` for ``k`` normal values.

    Args:
        count: Values in the sample, 2 or more.

    Returns:
        The factor, below 1.

    Example:
        >>> round(deviation_bias(2), 4), round(deviation_bias(3), 4)
        (0.7979, 0.8862)
    """
    return sqrt(2 / (count - 1)) * exp(lgamma(count / 2) - lgamma((count - 1) / 2))


def inverse_bias(count: int) -> float:
    r"""Give by what factor one over a standard deviation is too large on average.

    Of ``k`` normal values with a known mean of 0:
    :math:`\sqrt{k/2}\; \Gamma((k-1)/2) / \Gamma(k/2)`.

    Args:
        count: Values in the sample, 2 or more.

    Returns:
        The factor, above 1.

    Example:
        >>> round(inverse_bias(64), 4)
        1.0119
    """
    return sqrt(count / 2) * exp(lgamma((count - 1) / 2) - lgamma(count / 2))


def project_reliability(reliability: float, factor: float | int) -> float:
    r"""Give the agreement of two averages over more, from that over fewer.

    :math:`\frac{k\, r}{1 + (k - 1)\, r}` (Spearman, 1910; Brown, 1910).

    Args:
        reliability: Correlation of two averages; below 0 counts as 0.
        factor: How many times as many are averaged, above 0; may be infinite.

    Returns:
        The correlation, in [0, 1].

    Raises:
        OptionError: If the factor is not above 0.

    Example:
        >>> round(project_reliability(0.5, 2), 4), project_reliability(0.5, float("inf"))
        (0.6667, 1.0)
    """
    if not factor > 0:
        raise OptionError(f"factor={factor} does not make sense; pass one above 0.")
    bounded = min(1.0, max(0.0, reliability))
    if factor == float("inf"):
        return 1.0 if bounded > 0 else 0.0
    return factor * bounded / (1 + (factor - 1) * bounded)


def noise_with_more(
    fewer: int, more: int, with_fewer: float, with_more: float, *, wanted: int
) -> float:
    r"""Extrapolate noise :math:`\alpha + \beta / p` to more projected entries.

    Args:
        fewer: A number of entries.
        more: A larger one.
        with_fewer: The noise with the first.
        with_more: The noise with the second; if it is larger, more do not help.
        wanted: A number that is larger still.

    Returns:
        The noise, not below 0.

    Example:
        >>> noise_with_more(8, 16, 3.0, 2.0, wanted=32)
        1.5
    """
    slope = max(0.0, with_fewer - with_more) / (1 / fewer - 1 / more)
    return max(0.0, with_more - slope * (1 / more - 1 / wanted))


def peak_of_parabola(positions: Sequence[float], values: Sequence[float]) -> float:
    """Find where the parabola through three points is largest.

    Args:
        positions: Three positions that increase.
        values: Values there, of which none is above the middle one.

    Returns:
        The position, between the outer ones; the middle one if all are equal.

    Example:
        >>> peak_of_parabola([0.0, 1.0, 2.0], [0.0, 1.0, 1.0])
        1.5
    """
    (left, middle, right), (low, top, high) = positions, values
    before, after = (top - low) / (middle - left), (high - top) / (right - middle)
    if before == after:
        return middle
    # The slope is `before` and `after` in the middle of the two intervals.
    start, stop = (left + middle) / 2, (middle + right) / 2
    return start + before / (before - after) * (stop - start)


def overlap_of_normals(correlation: float, share: float) -> float:
    r"""Give the expected overlap of the largest values of two correlated normals.

    :math:`P(Y > h \mid X > h)` with :math:`P(X > h) =` ``share``, by Plackett's integral
    :math:`P(X>h, Y>h) = s^2 + \frac{1}{2\pi}\int_0^{\arcsin r} e^{-h^2/(1+\sin t)} dt`.

    Args:
        correlation: Of the two, in [-1, 1].
        share: Of all values, how many are called the largest; in (0, 1).

    Returns:
        The share of the largest of one that are also of the other.

    Example:
        >>> round(overlap_of_normals(0.0, 0.25), 6), round(overlap_of_normals(1.0, 0.25), 6)
        (0.25, 1.0)
    """
    height = NormalDist().inv_cdf(share)  # its sign does not matter
    nodes, weights = _nodes()
    top = asin(min(1.0, max(-1.0, correlation)))
    angles = top * (nodes + 1) / 2
    values = np.exp(-(height**2) / (1 + np.sin(angles)))
    return share + float(weights @ values) * top / 2 / (2 * pi) / share


def correlation_of_overlap(overlap: float, share: float) -> float:
    """Undo :func:`overlap_of_normals`.

    Args:
        overlap: The share of the largest of one that are also of the other.
        share: Of all values, how many are called the largest; in (0, 1).

    Returns:
        The correlation, in [0, 1].

    Example:
        >>> round(correlation_of_overlap(overlap_of_normals(0.3, 0.1), 0.1), 6)
        0.3
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if overlap_of_normals(middle, share) < overlap:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Give the nodes and weights of an integral over [-1, 1]."""
    return np.polynomial.legendre.leggauss(96)
