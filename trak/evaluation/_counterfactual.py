"""Counterfactuals: what happens to a target without its top training examples?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from trak._options import integer, positive
from trak.errors import OptionError
from trak.evaluation._archive import Plan
from trak.evaluation._arrays import (
    check_scores_finite,
    check_targets_finite,
    generator,
    listed,
    parse_seed,
    to_numpy,
    with_repeats,
)
from trak.evaluation._bootstrap import bootstrap_interval
from trak.evaluation._retrain import Model, carry_out, derive_seeds

RANDOM = "random"
"""Name of the removals that scores are compared with."""

_DIVERGED = "check that retraining, or leave the target out of both."


@dataclass(frozen=True, slots=True, eq=False)
class CounterfactualCurve:
    """How far targets' outputs fall without their top k, for several k."""

    ks: tuple[int, ...]
    """Training examples removed."""

    mean: Float64[np.ndarray, " q"]
    """Mean fall over targets, in the units of the output, for each k. Shape ``(q,)``."""

    interval: Float64[np.ndarray, "q 2"]
    """95 % bootstrap intervals of ``mean``, resampling targets. Shape ``(q, 2)``."""

    per_target: Float64[np.ndarray, "q m"]
    """Fall of each target. Shape ``(q, m)``."""

    n_targets: int
    """Targets the mean is over."""

    n_repeats: int
    """Retrainings a removal, whose outputs were averaged."""

    def minus(
        self, other: CounterfactualCurve, *, n_bootstrap: int = 1000, seed: int = 0
    ) -> CounterfactualCurve:
        """Subtract another curve target by target, such as that of random removals.

        Targets differ in how far anything moves them, so the interval of the
        difference is narrower than the two intervals suggest.

        Args:
            other: A curve of the same targets and the same ``ks``.
            n_bootstrap: Resamples of the targets behind the intervals.
            seed: Seed of the resampling.

        Returns:
            The difference, with intervals of its own.

        Raises:
            OptionError: If the other curve is of other ``ks`` or another number of
                targets.
        """
        if other.ks != self.ks or other.n_targets != self.n_targets:
            raise OptionError(
                f"a curve of k={list(self.ks)} and {self.n_targets} targets minus one of "
                f"k={list(other.ks)} and {other.n_targets} targets; compare curves of "
                f"the same."
            )
        return _curve(
            self.per_target - other.per_target,
            self.ks,
            n_repeats=min(self.n_repeats, other.n_repeats),
            n_bootstrap=n_bootstrap,
            seed=seed,
        )

    def __str__(self) -> str:
        points = [
            f"k={k}: {mean:.3f} [{low:.3f}, {high:.3f}]"
            for k, mean, (low, high) in zip(
                self.ks, self.mean, self.interval, strict=True
            )
        ]
        return (
            f"fall without the top k, {', '.join(points)} ({self.n_targets} targets, "
            f"{self.n_repeats} retrainings)"
        )


def counterfactual_curve(
    full: np.ndarray | Tensor,
    removed: np.ndarray | Tensor,
    ks: Sequence[int],
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> CounterfactualCurve:
    r"""Measure how far each target's output falls when its top k are removed.

    For a target :math:`z` whose top :math:`k` training examples are
    :math:`T_k(z) \subset S`,

    .. math::
        \Delta_k(z) = f(z; \theta^*(S)) - f(z; \theta^*(S \setminus T_k(z)))

    Each side is a mean over retrainings.

    Args:
        full: Outputs on the targets of models trained on everything. Shape ``(m,)``, or
            ``(r, m)`` with ``r`` retrainings, which are averaged.
        removed: Output on each target of the model retrained without *its* top k, for
            each of ``ks``. Shape ``(q, m)``, or ``(q, r, m)``.
        ks: How many were removed, ascending. Length q.
        n_bootstrap: Resamples of the targets behind the intervals.
        seed: Seed of the resampling.

    Returns:
        The mean fall for each k, its interval and the fall of each target. Positive
        where removal lowers the output.

    Raises:
        OptionError: If the shapes do not fit each other, or ``ks`` do not ascend from
            at least 1.
        NonFiniteError: If an output is NaN or infinite.

    Example:
        >>> full = np.array([3.0, 2.0])
        >>> removed = np.array([[2.0, 2.0], [1.0, 1.0]])
        >>> counterfactual_curve(full, removed, ks=[5, 10]).mean
        array([0.5, 1.5])
    """
    whole = np.atleast_2d(to_numpy("full", full))
    less = with_repeats(to_numpy("removed", removed))
    ks = _parse_ks(ks)
    if whole.ndim != 2 or less.ndim != 3 or 0 in whole.shape + less.shape:
        raise OptionError(
            f"full has shape {np.shape(full)} and removed {np.shape(removed)}; pass (m,) "
            f"or (r, m), and (q, m) or (q, r, m), none of them 0."
        )
    if less.shape[0] != len(ks) or less.shape[2] != whole.shape[1]:
        raise OptionError(
            f"full is for m={whole.shape[1]} targets, removed for {less.shape[2]} and "
            f"for {less.shape[0]} values of k, and ks has {len(ks)}; make them agree."
        )
    check_targets_finite("full", whole, _DIVERGED)
    check_targets_finite("removed", less, _DIVERGED)
    fall = whole.astype(np.float64).mean(axis=0) - less.astype(np.float64).mean(axis=1)
    return _curve(fall, ks, n_repeats=less.shape[1], n_bootstrap=n_bootstrap, seed=seed)


def removal_masks(
    scores: np.ndarray | Tensor, ks: Sequence[int]
) -> Bool[np.ndarray, "q m n"]:
    """List the training sets that are left without each target's top k.

    Args:
        scores: Attribution scores, larger where the training example raises the
            output; of equal ones, the first goes first. Shape ``(n, m)``.
        ks: How many to remove, ascending. Length q.

    Returns:
        Which training examples are left, for each k and target. Shape ``(q, m, n)``.

    Raises:
        OptionError: If ``scores`` has not two axes, ``ks`` do not ascend from at least
            1, or nothing would be left.
        NonFiniteError: If a score is NaN or infinite.

    Example:
        >>> removal_masks(np.array([[0.1], [0.9], [0.5]]), ks=[1, 2])[:, 0]
        array([[ True, False,  True],
               [ True, False, False]])
    """
    array, ks = to_numpy("scores", scores), _parse_ks(ks)
    if array.ndim != 2:
        raise OptionError(f"scores has {array.ndim} axes; pass scores (n, m).")
    n, m = array.shape
    if ks[-1] >= n:
        raise OptionError(
            f"without the top {ks[-1]} of n={n} training examples nothing is left to "
            f"train on; pass smaller ks."
        )
    masks = np.ones((len(ks), m, n), dtype=np.bool_)
    for target in range(m):
        column = array[:, target]
        check_scores_finite(column[:, None], first_target=target)
        order = np.argsort(-column.astype(np.float64), kind="stable")
        for row, k in enumerate(ks):
            masks[row, target, order[:k]] = False
    return masks


def remove_and_retrain(
    train: Callable[[Int64[np.ndarray, " k"], int], Model],
    outputs: Callable[[Model], np.ndarray | Tensor],
    scores: Mapping[str, np.ndarray | Tensor],
    ks: Sequence[int],
    path: str | os.PathLike[str] | None = None,
    *,
    n_random: int = 10,
    n_repeats: int = 1,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    n_bootstrap: int = 1000,
    progress: bool = True,
) -> dict[str, CounterfactualCurve]:
    """Retrain without the top k of every target, by several scores and at random.

    That is one retraining a repeat for every k, target and method, so a few dozen
    targets are what one can afford. All share their seeds, so that what differs between
    two models is the data. Random removals harm no target in particular, and serve all
    of them.

    Args:
        train: As of :func:`retrain_subsets`.
        outputs: As of :func:`retrain_subsets`; of the targets that scores are for, and
            of no others.
        scores: Attribution scores of each method, such as trak's beside similarities.
            Shape ``(n, m)`` each.
        ks: How many to remove, ascending. Length q.
        path: File that retrainings are stored in, so that an interrupted call can be
            repeated and goes on; None keeps them in memory alone.
        n_random: Random removals of each size.
        n_repeats: Retrainings a removal, and of everything, which differ in their seed.
        seed: What seeds, random removals and resampling are derived from.
        metadata: What else the numbers depend on; JSON.
        n_bootstrap: Resamples of the targets behind the intervals.
        progress: Whether to show a bar.

    Returns:
        The curve of each method, and that of ``"random"`` removals.

    Raises:
        OptionError: If an argument does not fit, there are no scores, a method is
            called ``"random"``, or ``outputs`` gives no ``(m,)`` array.
        NonFiniteError: If a score or an output is NaN or infinite.
        StoreMismatchError: If other retrainings are stored at ``path``.
        StoreCorruptError: If a file there is damaged.
        StoreWriteError: If the file system refuses.
    """
    arrays = _parse_methods(scores)
    n, m = next(iter(arrays.values())).shape
    n_random = positive("n_random", n_random)
    n_repeats = positive("n_repeats", n_repeats)
    positive("n_bootstrap", n_bootstrap)  # before anything is trained
    seed = parse_seed(seed)
    # Each column of random scores removes at random, the smaller sets in the larger.
    arrays[RANDOM] = generator(seed).random((n, n_random))
    masks = {name: removal_masks(array, ks) for name, array in arrays.items()}
    rows = [
        np.ones((1, n), dtype=np.bool_),
        *(x.reshape(-1, n) for x in masks.values()),
    ]
    everything = np.concatenate(rows)
    seeds = np.tile(derive_seeds(1, n_repeats, seed), (len(everything), 1))
    plan = Plan(everything, seeds, metadata or {})
    bank = carry_out(train, outputs, plan, path, n_targets=m, progress=progress)
    found = bank.outputs
    full, curves, start = found[0], {}, 1
    for name, mask in masks.items():
        q, removals, _ = mask.shape
        taken = found[start : start + q * removals].reshape(q, removals, n_repeats, m)
        start += q * removals
        if name == RANDOM:
            own = taken.reshape(q, removals * n_repeats, m)
        else:  # of the models retrained without a target's top, its own output
            own = taken.diagonal(axis1=1, axis2=3)
        curves[name] = counterfactual_curve(
            full, own, ks, n_bootstrap=n_bootstrap, seed=seed
        )
    return curves


def _curve(
    fall: Float64[np.ndarray, "q m"],
    ks: tuple[int, ...],
    *,
    n_repeats: int,
    n_bootstrap: int,
    seed: int,
) -> CounterfactualCurve:
    bounds = [bootstrap_interval(x, n_bootstrap=n_bootstrap, seed=seed) for x in fall]
    return CounterfactualCurve(
        ks=ks,
        mean=fall.mean(axis=1),
        interval=np.array(bounds),
        per_target=fall,
        n_targets=fall.shape[1],
        n_repeats=n_repeats,
    )


def _parse_ks(ks: Sequence[int]) -> tuple[int, ...]:
    known = tuple(integer("an entry of ks", k) for k in listed("ks", ks))
    if not known or known[0] < 1 or any(np.diff(known) <= 0):
        raise OptionError(
            f"ks={list(known)}; pass numbers that ascend from at least 1."
        )
    return known


def _parse_methods(
    scores: Mapping[str, np.ndarray | Tensor],
) -> dict[str, np.ndarray]:
    if not isinstance(scores, Mapping):
        raise OptionError(
            f"scores is a {type(scores).__name__}; pass a dict of each method's scores, "
            f"such as {{'trak': scores}}."
        )
    arrays = {name: to_numpy(f"scores[{name!r}]", x) for name, x in scores.items()}
    if not arrays or RANDOM in arrays:
        raise OptionError(
            f"scores has the methods {sorted(arrays)}; pass at least one, and none that "
            f"is called {RANDOM!r}, which is always measured."
        )
    shapes = {name: array.shape for name, array in arrays.items()}
    first = next(iter(shapes.values()))
    if len(first) != 2 or 0 in first or set(shapes.values()) != {first}:
        raise OptionError(
            f"scores has shapes {shapes}; pass the same (n, m) for every method, neither "
            f"of them 0."
        )
    return arrays
