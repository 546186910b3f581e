"""From a batch to rows of the store: checks, writing, reading."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from trak._layout import DONE, PENDING, SKIPPED
from trak._linalg import encode_half
from trak._pipeline import Pipeline
from trak._reading import read_rows
from trak._types import Batch
from trak.errors import StaleRowError, StoreWriteError

Store = MutableMapping[str, Any]

SAME_ROW = 0.05
"""Relative difference above which two gradients are not of the same example.

Other batch sizes differ by 1e-5 or so, half-precision storage by 5e-4."""


def store_batch(
    pipeline: Pipeline,
    store: Store,
    exp_name: str | None,
    batch: Batch,
    inds: Int64[np.ndarray, " b"],
    digests: Int64[np.ndarray, " b"],
    *,
    skip: bool,
) -> None:
    """Compute the rows of a batch and store those that are not stored yet.

    The whole batch is computed if any row of it is missing, so that work resumed with
    the same batches gives the same bits.

    Args:
        pipeline: What computes.
        store: The saver's current arrays.
        exp_name: The experiment whose targets these are; None for training examples.
        batch: The examples.
        inds: Their row numbers.
        digests: Their hashes.
        skip: Whether training examples that are not finite are left out.

    Raises:
        NonFiniteError: If a row is not finite, and may not be left out.
    """
    prefix = "" if exp_name is None else f"{exp_name}_"
    flag = "is_featurized" if exp_name is None else f"{prefix}is_scored"
    pending = pending_rows(store, flag, inds)
    changed = changed_rows(store, prefix, inds, digests, ~pending)
    if not (pending.any() or changed.any()):
        return
    rows, weights, outputs = pipeline.compute(batch, len(inds))
    check_same_rows(store, prefix, flag, inds, rows, changed, pipeline.what)
    if not pending.any():
        return
    finite = finite_rows(rows, weights)
    bad = np.flatnonzero(pending & ~finite)
    if len(bad) and not skip:
        position = int(bad[0])
        weight = None if weights is None else weights[position]
        raise pipeline.non_finite(batch, position, int(inds[position]), weight)
    extras = {f"{prefix}row_digest": digests[pending][:, None]}
    if weights is not None and exp_name is None:
        known = np.where(finite[:, None], weights.cpu().numpy(), np.float32(0))
        extras["out_to_loss"] = known[pending]
    if outputs is not None:
        extras[f"{prefix}outputs"] = outputs.numpy()[pending][:, None]
    chosen = torch.from_numpy(pending)
    write_rows(
        store, prefix, flag, inds[pending], rows.cpu()[chosen], extras, finite[pending]
    )


def finite_rows(
    rows: Float[Tensor, "b p"], weights: Float[Tensor, "b 1"] | None
) -> Bool[np.ndarray, " b"]:
    """Tell for every example whether its row and weight are finite."""
    finite = torch.isfinite(rows).all(dim=1)
    if weights is not None:
        finite &= torch.isfinite(weights).all(dim=1)
    result: np.ndarray = finite.cpu().numpy()
    return result


def write_rows(
    store: Store,
    prefix: str,
    flag: str,
    inds: Int64[np.ndarray, " k"],
    rows: Float32[Tensor, "k p"],
    extras: dict[str, np.ndarray],
    finite: Bool[np.ndarray, " k"],
) -> None:
    """Write rows, and when they are on disk, the flags that say so.

    Args:
        store: The saver's current arrays.
        prefix: ``""`` for training rows, ``"{exp}_"`` for targets.
        flag: Name of the array of flags.
        inds: Row numbers.
        rows: Projected gradients. Shape ``(k, p)``.
        extras: Further arrays by name, each with ``k`` rows; those that the store does
            not have are left out.
        finite: Which rows are finite; the others become zeros and are marked.

    Raises:
        StoreWriteError: If a value does not survive in the store's own type.
    """
    mask = torch.from_numpy(finite)[:, None]
    rows = rows.cpu().where(mask, 0.0)
    values: dict[str, np.ndarray] = dict(extras)
    if f"{prefix}grads_exponent" in store:
        half, exponent = encode_half(rows)
        values[f"{prefix}grads"] = half.numpy()
        values[f"{prefix}grads_exponent"] = exponent[:, None].numpy()
    else:
        with np.errstate(over="ignore"):
            stored = rows.numpy().astype(store[f"{prefix}grads"].dtype)
        if not np.isfinite(stored).all():
            raise StoreWriteError(
                f"A projected gradient does not fit {stored.dtype}, the type that this "
                f"saver stores; pass use_half_precision=False."
            )
        values[f"{prefix}grads"] = stored
    for name, value in values.items():
        if name in store:
            store[name][inds] = value.reshape(len(inds), -1)
            _flush(store[name])
    if flag in store:
        flags = store[flag]
        flags[inds] = np.where(finite, DONE, SKIPPED).reshape(-1, *flags.shape[1:])
        _flush(flags)


def _flush(array: Any) -> None:
    if isinstance(array, np.memmap):
        array.flush()


def pending_rows(
    store: Store, flag: str, inds: Int64[np.ndarray, " b"]
) -> Bool[np.ndarray, " b"]:
    """Tell which rows are not in the store yet."""
    if flag not in store:
        return np.ones(len(inds), dtype=bool)
    states: np.ndarray = np.asarray(store[flag][inds]).reshape(-1)
    pending: np.ndarray = states == PENDING
    return pending


def changed_rows(
    store: Store,
    prefix: str,
    inds: Int64[np.ndarray, " b"],
    digests: Int64[np.ndarray, " b"],
    done: Bool[np.ndarray, " b"],
) -> Bool[np.ndarray, " b"]:
    """Tell which stored rows came from other bytes than the batch now has for them."""
    key = f"{prefix}row_digest"
    if key not in store:
        return np.zeros(len(inds), dtype=bool)
    stored: np.ndarray = np.asarray(store[key][inds]).reshape(-1)
    changed: np.ndarray = done & (stored != digests)
    return changed


def first_difference(
    other: Store | None,
    inds: Int64[np.ndarray, " b"],
    digests: Int64[np.ndarray, " b"],
) -> tuple[int | None, bool]:
    """Find a training example whose bytes were others for another checkpoint.

    Args:
        other: The other checkpoint's arrays.
        inds: Row numbers of the batch.
        digests: The hashes of its examples.

    Returns:
        The first such example's index, or None; and whether the bytes of all such
        examples stand under other indices there, so that the order is another.
    """
    if other is None:
        return None, False
    done = ~pending_rows(other, "is_featurized", inds)
    changed = changed_rows(other, "", inds, digests, done)
    if not changed.any():
        return None, False
    moved = np.isin(digests[changed], np.asarray(other["row_digest"])).all()
    return int(inds[changed][0]), bool(moved)


def check_same_rows(
    store: Store,
    prefix: str,
    flag: str,
    inds: Int64[np.ndarray, " b"],
    rows: Float32[Tensor, "b p"],
    changed: Bool[np.ndarray, " b"],
    what: str,
) -> None:
    """Refuse other examples under stored indices.

    The bytes of an example may change and its gradient not, when only padding differs.

    Args:
        store: The saver's current arrays.
        prefix: ``""`` for training rows, ``"{exp}_"`` for targets.
        flag: Name of the array of flags.
        inds: Row numbers of the batch.
        rows: Their projected gradients, computed now. Shape ``(b, p)``.
        changed: Which of them to compare with the stored ones.
        what: What the rows are, for messages.

    Raises:
        StaleRowError: If one differs by more than rounding.
    """
    for position in np.flatnonzero(changed):
        index = int(inds[position])
        if int(np.asarray(store[flag][index]).reshape(-1)[0]) == SKIPPED:
            continue
        if f"{prefix}grads" not in store:
            raise StaleRowError(
                f"{what} {index} is stored already, but from other data, and del_grads "
                f"deleted the gradient to compare with; use another save_dir."
            )
        old = read_rows(store, prefix, torch.device("cpu"))(index, index + 1)[0]
        new = rows[position].cpu()
        if not torch.linalg.norm(new - old) <= SAME_ROW * torch.linalg.norm(old):
            raise StaleRowError(
                f"{what} {index} is stored already, but from other data: the same index "
                f"now gives another gradient. Does the loader shuffle or augment? Go "
                f"through the data in a fixed order and without augmentation, or pass "
                f"inds; for other data use another save_dir or exp_name."
            )
