"""What a metric of every target comes to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from trak.errors import OptionError
from trak.evaluation._bootstrap import bootstrap_interval


@dataclass(frozen=True, slots=True, eq=False)
class TargetMean:
    """The mean of a metric over targets, with what it rests on."""

    name: str
    """The metric."""

    mean: float
    """Mean over targets."""

    interval: tuple[float, float]
    """95 % bootstrap interval of ``mean``, resampling targets."""

    per_target: Float64[np.ndarray, " m"]
    """The metric of each target. Shape ``(m,)``."""

    n_targets: int
    """Targets the mean is over."""

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.name} {self.mean:.3f} [{low:.3f}, {high:.3f}] "
            f"({self.n_targets} targets)"
        )


def target_mean(
    name: str, per_target: Float64[np.ndarray, " m"], *, n_bootstrap: int, seed: int
) -> TargetMean:
    """Average a metric over targets, and bound the mean.

    Args:
        name: The metric.
        per_target: Its values. Shape ``(m,)``.
        n_bootstrap: Resamples of the targets behind the interval.
        seed: Seed of the resampling.

    Returns:
        The mean.

    Raises:
        OptionError: If there is no target.
    """
    if len(per_target) == 0:
        raise OptionError(f"there are no targets (m=0) to average {name} over.")
    return TargetMean(
        name=name,
        mean=float(per_target.mean()),
        interval=bootstrap_interval(per_target, n_bootstrap=n_bootstrap, seed=seed),
        per_target=per_target,
        n_targets=len(per_target),
    )
