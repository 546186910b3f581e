"""Percentile bootstrap of a mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from trak.errors import NonFiniteError, OptionError

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
        OptionError: If there is no value, or no resample is asked for.
        NonFiniteError: If a value is NaN or infinite.

    Example:
        >>> bootstrap_interval(np.array([0.25, 0.25, 0.25]))
        (0.25, 0.25)
    """
    if len(values) == 0:
        raise OptionError("values is empty; an interval needs at least one value.")
    if not np.isfinite(values).all():
        worst = int(np.flatnonzero(~np.isfinite(values))[0])
        raise NonFiniteError(
            f"values[{worst}] is {values[worst]}; drop it or find its cause before "
            f"asking for an interval.",
            index=worst,
        )
    rng = np.random.default_rng(seed)
    size = len(values)
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
    if n_bootstrap < 1:
        raise OptionError(f"n_bootstrap={n_bootstrap}; pass at least 1 resample.")
    lower, upper = np.percentile([resampled() for _ in range(n_bootstrap)], _COVERAGE)
    return float(lower), float(upper)
