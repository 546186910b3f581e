"""Percentile bootstrap of a mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from trak._options import integer
from trak.errors import NonFiniteError, OptionError
from trak.evaluation._arrays import generator, to_numpy

_COVERAGE = (2.5, 97.5)  # percentiles that bound a 95 % interval


def bootstrap_interval(
    values: Float[np.ndarray, " k"], *, n_bootstrap: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Bound the mean of ``values`` by a 95 % percentile bootstrap.

    Args:
        values: Independent measurements, such as one LDS a target. Shape ``(k,)``.
        n_bootstrap: Number of resamples, each of ``k`` values with replacement.
        seed: Seed of the resampling.

    Returns:
        The lower and the upper end of the interval, in the units of ``values``.

    Raises:
        OptionError: If ``values`` is not one axis of at least one number, no resample is
            asked for, or ``seed`` is negative.
        NonFiniteError: If a value is NaN or infinite, or their sum may be.

    Example:
        >>> bootstrap_interval(np.array([0.25, 0.25, 0.25]))
        (0.25, 0.25)
    """
    values = to_numpy("values", values)
    if values.ndim != 1:
        raise OptionError(f"values has {values.ndim} axes; pass one, (k,).")
    if len(values) == 0:
        raise OptionError("values is empty; an interval needs at least one value.")
    if not np.isfinite(values).all():
        worst = int(np.flatnonzero(~np.isfinite(values))[0])
        raise NonFiniteError(
            f"values[{worst}] is {values[worst]}; drop it or find its cause before "
            f"asking for an interval.",
            index=worst,
        )
    size = len(values)
    if not np.isfinite(size * float(np.abs(values).max())):
        raise NonFiniteError(
            f"values are up to {np.abs(values).max():.3g}, and a sum of them overflows "
            f"float64; scale them down."
        )
    rng = generator(seed)
    # One resample at a time: (n_bootstrap, k) indices would not fit for many targets.
    return percentile_interval(
        lambda: float(values[rng.integers(size, size=size)].mean()),
        n_bootstrap=n_bootstrap,
    )


def percentile_interval(
    resampled: Callable[[], float], *, n_bootstrap: int
) -> tuple[float, float]:
    """Bound a statistic by the middle 95 % of its resamples.

    Args:
        resampled: Draws one resample and gives the statistic of it.
        n_bootstrap: How many resamples to draw.

    Returns:
        The lower and the upper end of the interval.

    Raises:
        OptionError: If no resample is asked for.
    """
    if integer("n_bootstrap", n_bootstrap) < 1:
        raise OptionError(f"n_bootstrap={n_bootstrap}; pass at least 1 resample.")
    lower, upper = np.percentile([resampled() for _ in range(n_bootstrap)], _COVERAGE)
    return float(lower), float(upper)
