"""Retrieval metrics: are the training examples that are known to matter on top?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float64
from torch import Tensor

from trak._options import integer
from trak.errors import OptionError
from trak.evaluation._arrays import (
    check_booleans,
    check_scores_finite,
    listed,
    to_numpy,
)
from trak.evaluation._result import TargetMean, target_mean

Relevant: TypeAlias = np.ndarray | Tensor | Sequence[Iterable[int]]
"""Relevant training examples: booleans ``(n, m)``, or the indices of each target's."""

_ENTRIES_AT_ONCE = 2**22  # scores may be memory-mapped; 32 MiB in float64


def recall_at_k(
    scores: np.ndarray | Tensor,
    relevant: Relevant,
    k: int,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> TargetMean:
    r"""Measure which share of a target's relevant examples is among its k best.

    .. math::
        \mathrm{recall@}k(z) = \frac{|\mathrm{top}_k(\tau(z)) \cap R(z)|}{|R(z)|}

    Where examples tie for the last places, it is the expectation over all orders of
    those that tie. So scores that are all the same come to ``k / n``, what chance does,
    and neither the order of the examples nor the sorting algorithm matters. It cannot
    exceed ``k / |R(z)|``.

    Args:
        scores: Attribution scores, larger is earlier. Shape ``(n, m)``.
        relevant: Which training examples are relevant to each target: booleans of
            shape ``(n, m)``, or a sequence with the indices of each target's, in which
            duplicates count once.
        k: Length of the list, from 1 to n.
        n_bootstrap: Resamples of the targets behind the interval.
        seed: Seed of the resampling.

    Returns:
        The mean over targets, its interval and the recall of each target.

    Raises:
        OptionError: If the shapes do not fit each other, ``k`` is not in 1 to n, a
            target has no relevant example, or there are no targets.
        NonFiniteError: If a score is NaN or infinite.

    Example:
        Of examples 0 and 3, 3 is on top; 0 shares the second place with 1.

        >>> scores = np.array([[0.5], [0.5], [0.1], [0.9]])
        >>> recall_at_k(scores, [[0, 3]], k=2).per_target
        array([0.75])
    """
    array = _two_axes(scores)
    if not 1 <= integer("k", k) <= len(array):
        raise OptionError(
            f"k={k} of n={len(array)} training examples; pass k from 1 to n."
        )
    blocks = [
        _block_recall(columns, flags, k) for columns, flags in _blocks(array, relevant)
    ]
    per_target = np.concatenate([np.zeros(0), *blocks])
    return target_mean(f"recall@{k}", per_target, n_bootstrap=n_bootstrap, seed=seed)


def mean_reciprocal_rank(
    scores: np.ndarray | Tensor,
    relevant: Relevant,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> TargetMean:
    r"""Measure how early a target's first relevant example comes.

    .. math::
        \mathrm{RR}(z) = \frac{1}{\min_{i \in R(z)} \mathrm{rank}_i(\tau(z))}

    Where examples tie with the first relevant one, it is the expectation over all
    orders of those that tie.

    Args:
        scores: Attribution scores, larger is earlier. Shape ``(n, m)``.
        relevant: Which training examples are relevant to each target: booleans of
            shape ``(n, m)``, or a sequence with the indices of each target's, in which
            duplicates count once.
        n_bootstrap: Resamples of the targets behind the interval.
        seed: Seed of the resampling.

    Returns:
        The mean over targets, its interval and the reciprocal rank of each target.

    Raises:
        OptionError: If the shapes do not fit each other, a target has no relevant
            example, or there are no targets.
        NonFiniteError: If a score is NaN or infinite.

    Example:
        The relevant example is third of three, or shares the first two places.

        >>> scores = np.array([[0.1, 0.7], [0.2, 0.7], [0.3, 0.0]])
        >>> mean_reciprocal_rank(scores, [[0], [0]]).per_target.round(3)
        array([0.333, 0.75 ])
    """
    found = []
    for columns, flags in _blocks(_two_axes(scores), relevant):
        best = np.where(flags, columns, -np.inf).max(axis=0)
        above = (columns > best).sum(axis=0)
        tied = columns == best
        hits = (tied & flags).sum(axis=0)
        counts = zip(above, tied.sum(axis=0), hits, strict=True)
        found += [_expected_reciprocal(*map(int, count)) for count in counts]
    per_target = np.array(found, dtype=np.float64)
    return target_mean("MRR", per_target, n_bootstrap=n_bootstrap, seed=seed)


def _block_recall(
    columns: Float64[np.ndarray, "n w"], flags: Bool[np.ndarray, "n w"], k: int
) -> Float64[np.ndarray, " w"]:
    last = len(columns) - k
    threshold = np.partition(columns, last, axis=0)[last]
    above, tied = columns > threshold, columns == threshold
    # Each of those that tie is in one of the places left with the same probability.
    probability = (k - above.sum(axis=0)) / tied.sum(axis=0)
    hits = (above & flags).sum(axis=0) + probability * (tied & flags).sum(axis=0)
    recall: np.ndarray = hits / flags.sum(axis=0)
    return recall


def _expected_reciprocal(above: int, tied: int, hits: int) -> float:
    """Average 1 / rank of the first of ``hits`` among ``tied`` in random order."""
    misses = tied - hits
    drawn = np.arange(misses)
    # Probability that the first so many drawn are all misses.
    survive = np.concatenate([[1.0], np.cumprod((misses - drawn) / (tied - drawn))])
    drawn = np.arange(misses + 1)
    return float((survive * hits / (tied - drawn) / (above + 1 + drawn)).sum())


def _two_axes(scores: np.ndarray | Tensor) -> np.ndarray:
    array = to_numpy("scores", scores)
    if array.ndim != 2:
        raise OptionError(f"scores has {array.ndim} axes; pass scores (n, m).")
    return array


def _blocks(
    scores: np.ndarray, relevant: Relevant
) -> Iterator[tuple[Float64[np.ndarray, "n w"], Bool[np.ndarray, "n w"]]]:
    """Yield the scores and the flags of some targets at a time."""
    n, m = scores.shape
    flags = _dense_flags(relevant) if _is_dense(relevant) else None
    given = (n, len(relevant)) if flags is None else flags.shape
    if given != (n, m):
        raise OptionError(
            f"scores are for n={n} training examples and m={m} targets, and relevant "
            f"for {given}; make the two agree."
        )
    width = max(1, _ENTRIES_AT_ONCE // max(1, n))
    for start in range(0, m, width):
        columns = scores[:, start : start + width].astype(np.float64)
        check_scores_finite(columns, first_target=start)
        stop = start + columns.shape[1]
        some = (
            _flags_of(relevant, n, start, stop)
            if flags is None
            else flags[:, start:stop]
        )
        _check_relevant(some, start)
        yield columns, some


def _is_dense(relevant: object) -> bool:
    if isinstance(relevant, np.ndarray | Tensor):
        return True
    if isinstance(relevant, str) or not hasattr(relevant, "__getitem__"):
        raise OptionError(
            f"relevant is a {type(relevant).__name__}; pass booleans (n, m), or a list "
            f"with the indices of each target's examples."
        )
    return False


def _dense_flags(relevant: Relevant) -> np.ndarray:
    flags = to_numpy("relevant", relevant)
    check_booleans("relevant", flags)
    return flags


def _flags_of(
    relevant: Relevant, n: int, start: int, stop: int
) -> Bool[np.ndarray, "n w"]:
    flags = np.zeros((n, stop - start), dtype=np.bool_)
    for target in range(start, stop):
        name = f"relevant[{target}]"
        some = relevant[target]
        # Entries of a tensor of booleans would pass for indices.
        entries = some.tolist() if isinstance(some, Tensor) else some
        for given in listed(name, entries):
            index = integer(f"an index in {name}", given)
            if not 0 <= index < n:
                raise OptionError(
                    f"{name} has the index {index}, and there are n={n} training "
                    f"examples; indices are 0 to {n - 1}."
                )
            flags[index, target - start] = True
    return flags


def _check_relevant(flags: Bool[np.ndarray, "n w"], start: int) -> None:
    none = np.flatnonzero(~flags.any(axis=0))
    if len(none):
        raise OptionError(
            f"target {start + int(none[0])} has no relevant training example, so there "
            f"is nothing to retrieve; leave such targets out of scores and relevant."
        )
