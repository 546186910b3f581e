"""From correlations to a table of candidates, and the one to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
from jaxtyping import Float64

from trak.evaluation._cross_validation_maths import (
    peak_of_parabola,
    spearman_of,
    spearman_slope,
)
from trak.evaluation._cross_validation_result import Candidate, Exponents

MARGIN = 1.0
"""Standard errors by which another candidate must be above the default."""

_Z95 = 1.96  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A way to score, and what its cross-validation gave."""

    exponents: Exponents
    """Powers of the out-to-loss weight."""

    multiple: float
    """The damping, in mean eigenvalues."""

    per_target: Float64[np.ndarray, " m"]
    """Correlations, for scores of all checkpoints. Shape ``(m,)``."""

    null: Float64[np.ndarray, " q"]
    """Numbers whose squares sum to the variance of their mean; paired between trials."""

    reliability: float
    """Agreement of the scores of two halves of the checkpoints."""

    @property
    def mean(self) -> float:
        """The mean correlation."""
        return float(self.per_target.mean())

    def standard_error(self, n_held_out: int) -> float:
        r"""Tell how far other subsets, retrainings and targets would move the mean.

        The variance without any correlation, known from probes, is multiplied with
        :math:`1 - r^2 (k-1)/k`. For normal variables and many models ``k`` it would be
        :math:`(1 - r^2)^2`; with few, ``r`` is too uncertain to count on that.

        Args:
            n_held_out: Models whose outputs were predicted.

        Returns:
            The standard error of the mean correlation.
        """
        noise = 1 / (n_held_out - 1)
        between = 0.0
        if len(self.per_target) > 1:
            between = max(0.0, float(self.per_target.var(ddof=1)) - noise)
        shrunk = 1 - min(1.0, self.mean**2) * (1 - 1 / n_held_out)
        null = shrunk * float(self.null @ self.null)
        return sqrt(null + between / len(self.per_target))

    def interval(self, n_held_out: int) -> tuple[float, float]:
        """Give the 95 % interval of the LDS."""
        reach = _Z95 * self.standard_error(n_held_out)
        return spearman_of(self.mean - reach), spearman_of(self.mean + reach)


def tabulate(trials: Sequence[Trial], n_held_out: int) -> tuple[Candidate, ...]:
    """Compare trials with the first, which is the default.

    Args:
        trials: What was tried.
        n_held_out: Models whose outputs were predicted.

    Returns:
        A line for each.
    """
    default = trials[0]
    return tuple(
        Candidate(
            exponents=trial.exponents,
            multiple=trial.multiple,
            lds=spearman_of(trial.mean),
            standard_error=trial.standard_error(n_held_out)
            * spearman_slope(trial.mean),
            gain=spearman_of(trial.mean) - spearman_of(default.mean),
            gain_error=float(np.linalg.norm(trial.null - default.null))
            * spearman_slope(trial.mean),
        )
        for trial in trials
    )


def choose(candidates: Sequence[Candidate], *, margin: float = MARGIN) -> int:
    """Find the candidate whose gain is largest even if it is less by its error.

    Args:
        candidates: The default first.
        margin: Standard errors that a gain is lessened by.

    Returns:
        The index; 0, the default, if no gain is then left.

    Example:
        >>> choose([
        ...     Candidate((0.0, 1.0), 1.0, 0.3, 0.1, 0.0, 0.0),
        ...     Candidate((0.0, 1.0), 0.3, 0.4, 0.1, 0.10, 0.05),
        ...     Candidate((0.0, 1.0), 0.1, 0.45, 0.1, 0.15, 0.14),
        ... ])
        1
    """
    sure = [found.gain - margin * found.gain_error for found in candidates]
    best = max(range(len(sure)), key=sure.__getitem__)
    return best if sure[best] > 0 else 0


def refine(candidates: Sequence[Candidate], index: int) -> float:
    """Find the best damping around a candidate, by a parabola in its logarithm.

    Args:
        candidates: What was tried.
        index: One of them.

    Returns:
        The damping, in mean eigenvalues; that of the candidate where it is at the end of
        the grid, or a neighbour is better.
    """
    chosen = candidates[index]
    near = sorted(
        (found.multiple, found.lds)
        for found in candidates
        if found.exponents == chosen.exponents
    )
    place = [multiple for multiple, _ in near].index(chosen.multiple)
    three = near[max(0, place - 1) : place + 2]
    values = [value for _, value in three]
    if len(three) < 3 or chosen.lds < max(values):
        return chosen.multiple
    logs = [log(multiple) for multiple, _ in three]
    return exp(peak_of_parabola(logs, values))
