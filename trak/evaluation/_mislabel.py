"""Do scores put mislabelled training examples first?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from torch import Tensor

from trak.errors import NonFiniteError, OptionError
from trak.evaluation._arrays import check_booleans, generator, to_numpy
from trak.evaluation._bootstrap import percentile_interval


@dataclass(frozen=True, slots=True, eq=False)
class MislabelResult:
    """An area under the ROC curve, with what it rests on."""

    mean: float
    """The area: how likely a random mislabelled example is above a random clean one."""

    interval: tuple[float, float]
    """95 % bootstrap interval of ``mean``, resampling both kinds of example."""

    per_flipped: Float64[np.ndarray, " k"]
    """Share of the clean examples below each mislabelled one, in its order in the
    training set; ``mean`` is their mean. Shape ``(n_flipped,)``."""

    n_flipped: int
    """Mislabelled examples."""

    n_clean: int
    """Others."""

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"AUC {self.mean:.3f} [{low:.3f}, {high:.3f}] ({self.n_flipped} mislabelled, "
            f"{self.n_clean} clean)"
        )


def mislabel_auc(
    suspicion: np.ndarray | Tensor,
    flipped: np.ndarray | Tensor,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> MislabelResult:
    r"""Measure how well a number an example tells mislabelled examples from clean ones.

    The area under the ROC curve, with ties counting one half,

    .. math::
        \mathrm{AUC} = \frac{1}{|F|\,|F^c|} \sum_{i \in F} \sum_{j \notin F}
            \Big( [v_i > v_j] + \tfrac12 [v_i = v_j] \Big)

    for suspicions :math:`v` and the flipped examples :math:`F`. A constant comes to 0.5.

    Args:
        suspicion: Larger where the label is more suspect, such as
            :meth:`~trak.TRAKer.self_influence`, or minus the mean score over targets.
            Shape ``(n,)``.
        flipped: Which labels were flipped, boolean. Shape ``(n,)``.
        n_bootstrap: Resamples behind the interval; each draws as many flipped and as
            many clean examples as there are.
        seed: Seed of the resampling.

    Returns:
        The area, its interval, and the share of clean examples below each flipped one.

    Raises:
        OptionError: If the shapes are not those, ``flipped`` is not boolean, no or
            every example is flipped, or no resample is asked for.
        NonFiniteError: If a suspicion is NaN or infinite.

    Example:
        The first flipped example is above both clean ones, the second above one and
        level with the other.

        >>> flipped = np.array([True, True, False, False])
        >>> mislabel_auc(np.array([3.0, 2.0, 2.0, 1.0]), flipped).mean
        0.875
    """
    values, flags = to_numpy("suspicion", suspicion), to_numpy("flipped", flipped)
    _check(values, flags)
    # Whole numbers in the order of the suspicions, equal where those are.
    levels = np.unique(values, return_inverse=True)[1].astype(np.int64)
    bad, good = levels[flags], levels[~flags]
    shares = _shares_below(good, int(levels.max()) + 1)
    rng = generator(seed)
    interval = percentile_interval(
        lambda: _resampled(bad, good, rng), n_bootstrap=n_bootstrap
    )
    return MislabelResult(
        mean=float(shares[bad].mean()),
        interval=interval,
        per_flipped=shares[bad],
        n_flipped=len(bad),
        n_clean=len(good),
    )


def _shares_below(
    levels: Int64[np.ndarray, " k"], count: int
) -> Float64[np.ndarray, " l"]:
    """Return the share of ``levels`` below each level, half of those that are equal."""
    counts = np.bincount(levels, minlength=count)
    shares: np.ndarray = (np.cumsum(counts) - counts / 2) / len(levels)
    return shares


def _resampled(
    bad: Int64[np.ndarray, " k"],
    good: Int64[np.ndarray, " j"],
    rng: np.random.Generator,
) -> float:
    count = int(max(bad.max(), good.max())) + 1
    drawn = good[rng.integers(len(good), size=len(good))]
    shares = _shares_below(drawn, count)
    return float(shares[bad[rng.integers(len(bad), size=len(bad))]].mean())


def _check(values: np.ndarray, flags: np.ndarray) -> None:
    if values.ndim != 1 or values.shape != flags.shape:
        raise OptionError(
            f"suspicion has shape {values.shape} and flipped {flags.shape}; pass one "
            f"number and one boolean a training example, (n,) each."
        )
    check_booleans("flipped", flags)
    if flags.all() or not flags.any():
        raise OptionError(
            f"{int(flags.sum())} of {len(flags)} examples are flipped; the AUC compares "
            f"flipped with clean ones and needs at least one of each."
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise NonFiniteError(
            f"suspicion[{bad[0]}] is {values[bad[0]]}; recompute it, or leave the "
            f"example out of suspicion and flipped.",
            index=int(bad[0]),
        )
