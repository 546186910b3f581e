"""Retraining on subsets: the caller's training, in an order that may be interrupted."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from tqdm import tqdm

from trak._options import integer, positive
from trak.errors import OptionError, TrakWarning
from trak.evaluation._archive import Archive, Plan
from trak.evaluation._arrays import check_booleans, listed, parse_seed, to_numpy
from trak.evaluation._bank import GroundTruth

Model = TypeVar("Model")


def retrain_subsets(
    train: Callable[[Int64[np.ndarray, " k"], int], Model],
    outputs: Callable[[Model], np.ndarray | Tensor],
    masks: np.ndarray | Tensor,
    path: str | os.PathLike[str] | None = None,
    *,
    n_repeats: int = 1,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    metadata: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> GroundTruth:
    """Retrain on subsets of the training set, and keep the outputs on the targets.

    With a ``path``, each retraining is stored once it is done, and none is done again:
    call it again after a kill, or for more subsets or repeats, and it does the rest. The
    retraining of a subset and a repeat has the same seed whatever else is asked for.

    Args:
        train: Trains on the examples at the indices, which ascend, with a seed from 0 to
            2**31 - 1, and returns whatever ``outputs`` takes. It should draw all its
            randomness from the seed.
        outputs: Gives the output on each target, in the same order for every model: for
            classification the margin ``log p/(1-p)`` of the correct class, which
            scores are about. Shape ``(m,)``.
        masks: Which training examples each subset holds, boolean, as from
            :func:`random_subsets`. Shape ``(s, n)``.
        path: File of the bank, and what the names of the files until then begin with.
            None keeps retrainings in memory alone.
        n_repeats: Retrainings a subset, which differ in their seed.
        seed: What the seeds are derived from.
        shard: ``(index, count)``: retrain only every ``count``-th subset from ``index``
            on, for ``count`` processes or machines that share ``path``.
        metadata: What else the numbers depend on, such as the number of epochs; JSON.
            Another ``path``'s retrainings are refused if theirs is other.
        progress: Whether to show a bar.

    Returns:
        The retrainings. While other shards are still at work, those of the subsets that
        are whole; a warning then says so.

    Raises:
        OptionError: If an argument does not fit, or ``outputs`` gives no ``(m,)`` array.
        StoreMismatchError: If other retrainings are stored at ``path``.
        StoreCorruptError: If a file there is damaged.
        StoreWriteError: If the file system refuses.

    Example:
        A "model" is the mean of the examples that it is trained on.

        >>> values = np.array([0.0, 2.0, 4.0])
        >>> bank = retrain_subsets(
        ...     train=lambda indices, seed: values[indices].mean(),
        ...     outputs=lambda model: np.array([model]),
        ...     masks=np.array([[True, True, False], [False, True, True]]),
        ...     progress=False,
        ... )
        >>> bank.outputs[:, 0]
        array([[1.],
               [3.]])
    """
    mask_array = to_numpy("masks", masks)
    _check_masks(mask_array)
    seeds = derive_seeds(
        len(mask_array), positive("n_repeats", n_repeats), parse_seed(seed)
    )
    _check_shard(shard, len(mask_array), path)
    plan = Plan(mask_array, seeds, {} if metadata is None else metadata)
    return carry_out(train, outputs, plan, path, shard=shard, progress=progress)


def carry_out(
    train: Callable[[Int64[np.ndarray, " k"], int], Model],
    outputs: Callable[[Model], np.ndarray | Tensor],
    plan: Plan,
    path: str | os.PathLike[str] | None,
    *,
    n_targets: int | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> GroundTruth:
    """Do what is left of one shard of a plan.

    Args:
        train: As of :func:`retrain_subsets`.
        outputs: As of :func:`retrain_subsets`.
        plan: What is to be retrained.
        path: Where retrainings are stored, or None.
        n_targets: How many numbers ``outputs`` must give; None for any, the same always.
        shard: ``(index, count)``.
        progress: Whether to show a bar.

    Returns:
        The subsets of which every retraining is done.
    """
    archive = None if path is None else Archive(Path(path), plan)
    done = archive.read() if archive else {}
    n_targets = len(next(iter(done.values()))) if done else n_targets
    jobs = plan.jobs(*shard)
    if archive and not done.keys() >= {*jobs}:
        archive.prepare()
    with tqdm(total=len(jobs), desc="Retraining", disable=not progress) as bar:
        bar.update(sum(job in done for job in jobs))
        for job in jobs:
            if job not in done:
                indices = np.flatnonzero(plan.masks[job[0]])
                measured = outputs(train(indices, int(plan.seeds[job])))
                done[job] = _as_outputs(measured, n_targets)
                n_targets = len(done[job])
                if archive:
                    archive.add(job, done[job])
                bar.update()
    if archive and len(done) < plan.seeds.size:
        done = archive.read()  # other shards may have finished
    bank = plan.bank(done)
    if archive and len(done) == plan.seeds.size:
        archive.finish(bank)
    _warn(bank, plan, path)
    return bank


def derive_seeds(s: int, r: int, seed: int) -> Int64[np.ndarray, "s r"]:
    """Derive a seed for each retraining, which depends on nothing but its place.

    Returns:
        Seeds from 0 to 2**31 - 1, which every library takes. Shape ``(s, r)``.
    """
    seeds = np.empty((s, r), dtype=np.int64)
    for place in np.ndindex(s, r):
        sequence = np.random.SeedSequence(seed, spawn_key=place)
        seeds[place] = sequence.generate_state(1)[0] >> 1
    return seeds


def _as_outputs(
    measured: np.ndarray | Tensor, m: int | None
) -> Float64[np.ndarray, " m"]:
    values = to_numpy("outputs(model)", measured)
    if values.ndim != 1:
        raise OptionError(
            f"outputs(model) gave an array of shape {values.shape} and dtype "
            f"{values.dtype}; give one number a target, of shape (m,)."
        )
    if m is not None and len(values) != m:
        raise OptionError(
            f"outputs(model) gave {len(values)} numbers where {m} targets were "
            f"expected; give those of the same targets every time."
        )
    return values.astype(np.float64)


def _warn(bank: GroundTruth, plan: Plan, path: str | os.PathLike[str] | None) -> None:
    if bank.n_subsets < len(plan.masks):
        warnings.warn(
            f"{path}: {bank.n_subsets} of {len(plan.masks)} subsets are retrained, and "
            f"the result holds those. Once every shard is done, the same call gives all.",
            TrakWarning,
            stacklevel=4,
        )
    bad = bank.non_finite()
    if len(bad):
        subset, repeat = (int(index) for index in bad[0])
        warnings.warn(
            f"{len(bad)} of {bank.n_subsets * bank.n_repeats} retrainings gave an output "
            f"that is not finite, the first one subset {subset}, repeat {repeat}. Find "
            f"out why, or go on with finite() of the result, which leaves their subsets "
            f"out.",
            TrakWarning,
            stacklevel=4,
        )


def _check_masks(masks: Bool[np.ndarray, "s n"] | np.ndarray) -> None:
    check_booleans("masks", masks)
    if masks.ndim != 2 or len(masks) == 0:
        raise OptionError(
            f"masks has shape {masks.shape}; pass (s, n) with at least one subset."
        )
    empty = np.flatnonzero(~masks.any(axis=1))
    if len(empty):
        raise OptionError(
            f"masks[{empty[0]}] holds no training example to train on; leave it out."
        )


def _check_shard(
    shard: tuple[int, int], s: int, path: str | os.PathLike[str] | None
) -> None:
    pair = listed("shard", shard)
    if len(pair) != 2:
        raise OptionError(f"shard={shard!r}; pass (index, count).")
    index, count = (integer("an entry of shard", one) for one in pair)
    if not 0 <= index < count <= s:
        raise OptionError(
            f"shard={shard} of {s} subsets; pass (index, count) with index from 0 to "
            f"count - 1, and no more shards than subsets."
        )
    if path is None and count > 1:
        raise OptionError(
            f"shard={shard} without a path: the shards could not be put together. Pass "
            f"the same path to each."
        )
