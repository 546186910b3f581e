"""Random training subsets to retrain on."""

from __future__ import annotations

from math import isfinite

import numpy as np
from jaxtyping import Bool

from trak._options import integer
from trak.errors import OptionError
from trak.evaluation._arrays import generator


def random_subsets(
    n: int, s: int, fraction: float = 0.5, seed: int = 0
) -> Bool[np.ndarray, "s n"]:
    """Draw subsets of the training set, each of exactly the same size.

    Args:
        n: Number of training examples.
        s: Number of subsets.
        fraction: Share of the examples in each subset, rounded down to whole
            examples.
        seed: Seed of the draw. The same seed draws the same subsets everywhere, and a
            larger ``s`` appends to them.

    Returns:
        Which training examples each subset holds. Shape ``(s, n)``.

    Raises:
        OptionError: If ``s`` or ``seed`` is negative, or a subset would hold none or all
            of the examples.

    Example:
        >>> random_subsets(6, 2).sum(axis=1)
        array([3, 3])
    """
    n, s, rng = integer("n", n), integer("s", s), generator(seed)
    # Of 100 examples 0.29 are 29, and 0.29 * 100 is a rounding error less.
    size = int(fraction * n * (1 + 1e-12)) if isfinite(fraction) else 0
    if not 0 < size < n:
        raise OptionError(
            f"fraction={fraction} of n={n} training examples is a subset of {size}; a "
            f"subset needs at least one example and must leave one out."
        )
    if s < 0:
        raise OptionError(f"s={s} subsets cannot be drawn; pass s >= 0.")
    masks = np.zeros((s, n), dtype=np.bool_)
    for mask in masks:
        mask[rng.permutation(n)[:size]] = True
    return masks
