"""Which training examples a checkpoint was trained on: parsed, packed, allowed for."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64
from torch import Tensor

from trak.errors import OptionError, StoreCorruptError, StoreMismatchError

_SMALLEST_GROUP = 10  # examples; the mean of fewer says little


def parse_train_inds(train_inds: object, n: int) -> Bool[np.ndarray, " n"]:
    """Parse indices, or a boolean mask, of the examples of a training run.

    Args:
        train_inds: Whole numbers in any order, or ``n`` booleans.
        n: Number of training examples.

    Returns:
        The mask. Shape ``(n,)``.

    Raises:
        OptionError: If there are none, one is out of range or there twice, or a mask has
            another length.

    Example:
        >>> parse_train_inds([3, 1], 4)
        array([False,  True, False,  True])
    """
    array = _as_array(train_inds)
    if array.dtype == bool:
        if len(array) != n:
            raise OptionError(
                f"train_inds is a mask of {len(array)} entries, and there are {n} "
                f"training examples; pass one for each, or the indices."
            )
        mask = array.copy()
    else:
        mask = _of_indices(array, n)
    if not mask.any():
        raise OptionError(
            "train_inds has no training example; pass those that the checkpoint was "
            "trained on, or leave it out if they are not known."
        )
    return mask


def _as_array(train_inds: object) -> np.ndarray:
    if isinstance(train_inds, Tensor):
        train_inds = train_inds.detach().cpu()
    elif isinstance(train_inds, Iterable) and not isinstance(
        train_inds, Sequence | np.ndarray
    ):
        train_inds = [*train_inds]  # NumPy takes a generator or a set for one object
    try:
        array = np.asarray(train_inds)
    except ValueError:  # rows of several lengths
        array = np.asarray(None)
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.int64)  # an empty list is one of floats
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise OptionError(
            f"train_inds must be whole numbers or booleans along one axis; got "
            f"{type(train_inds).__name__} of {array.dtype}, shape {array.shape}."
        )
    return array


def _of_indices(inds: np.ndarray, n: int) -> Bool[np.ndarray, " n"]:
    bad = inds[(inds < 0) | (inds >= n)]
    if bad.size:
        raise OptionError(
            f"train_inds has {bad[0]}, but the training examples are 0 to {n - 1}."
        )
    counts = np.bincount(inds.astype(np.int64), minlength=n)
    if counts.max(initial=0) > 1:
        raise OptionError(
            f"train_inds has {int(counts.argmax())} more than once; pass every example "
            f"that the checkpoint was trained on once."
        )
    return counts > 0


def pack_mask(mask: Bool[np.ndarray, " n"]) -> dict[str, Any]:
    """Turn a mask into what a JSON record can hold, a quarter of a byte an example.

    Args:
        mask: Which examples. Shape ``(n,)``.

    Returns:
        ``n`` and ``count``, the bits in base 64, lowest first, and their BLAKE2b hash.
    """
    bits = np.packbits(mask, bitorder="little").tobytes()
    return {
        "n": len(mask),
        "count": int(mask.sum()),
        "bits": base64.b64encode(bits).decode(),
        "hash": hashlib.blake2b(bits, digest_size=8).hexdigest(),
    }


def unpack_mask(record: Mapping[str, Any], n: int, where: str) -> np.ndarray:
    """Turn a record back into a mask.

    Args:
        record: What :func:`pack_mask` gave.
        n: Number of training examples.
        where: What holds the record, for messages.

    Returns:
        The mask. Shape ``(n,)``.

    Raises:
        StoreCorruptError: If it is not such a record, or has changed.
    """
    try:
        bits = base64.b64decode(record["bits"], validate=True)
        flags = np.frombuffer(bits, np.uint8)
        mask = np.unpackbits(flags, count=n, bitorder="little").astype(bool)
        is_whole = record == pack_mask(mask)
    except (KeyError, ValueError, TypeError):
        is_whole = False
    if not is_whole:
        raise StoreCorruptError(
            f"{where} does not say which of {n} examples a checkpoint was trained on, or "
            f"is damaged; delete it, and pass train_inds to load_checkpoint again."
        )
    return mask


def balanced(
    out_to_loss: Float64[np.ndarray, " n"], members: Bool[np.ndarray, " n"] | None
) -> Float64[np.ndarray, " n"]:
    """Bring weights of members and of other examples to the same mean size.

    A model fits the examples that it was trained on better than others, so their
    out-to-loss weights are smaller whatever they would be worth.

    Args:
        out_to_loss: A checkpoint's weights, signed. Shape ``(n,)``.
        members: Which examples it was trained on; None if that is not known. Shape
            ``(n,)``.

    Returns:
        Each group's weights, scaled so that the mean of their sizes is that of all; the
        weights as they are where a group has fewer than 10 examples or weights of 0 only.
        Shape ``(n,)``.

    Example:
        >>> balanced(np.repeat([-1.0, 3.0], 10), np.repeat([True, False], 10))[[0, -1]]
        array([-2.,  2.])
    """
    if members is None or min(members.sum(), (~members).sum()) < _SMALLEST_GROUP:
        return out_to_loss
    sizes = np.abs(out_to_loss)
    inside, outside = sizes[members].mean(), sizes[~members].mean()
    if not (inside > 0 and outside > 0):
        return out_to_loss
    factors = np.where(members, sizes.mean() / inside, sizes.mean() / outside)
    scaled: np.ndarray = out_to_loss * factors
    return scaled


def check_same_members(
    known: Bool[np.ndarray, " n"], given: Bool[np.ndarray, " n"], model_id: int
) -> None:
    """Refuse another training set for the same checkpoint.

    Raises:
        StoreMismatchError: If it is another.
    """
    differ = np.flatnonzero(known != given)
    if differ.size:
        raise StoreMismatchError(
            f"model id {model_id} was trained on {int(known.sum())} of {len(known)} "
            f"examples, as the store has it, and train_inds now has {int(given.sum())}; "
            f"{differ.size} differ, the first is {int(differ[0])}. Use the same "
            f"train_inds, or another model_id for another training run."
        )
