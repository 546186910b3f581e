"""Batches of any nesting: their size, their rows, and what their rows hash to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from trak._types import Batch
from trak.errors import BatchError


def canonical(batch: Batch) -> Batch:
    """Copy the nesting of a batch with plain containers and tensor leaves.

    Mappings of any class (a tokenizer's output, say) become dicts, NumPy arrays of numbers
    become tensors that share their memory where PyTorch can; tensors and everything else
    stay what they are.

    Returns:
        The new nesting.

    Example:
        >>> canonical([np.zeros(2), {"a": None}])
        [tensor([0., 0.], dtype=torch.float64), {'a': None}]
    """
    return _map(batch, lambda leaf: leaf)


def _map(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    if isinstance(batch, Mapping):
        return {key: _map(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_make"):  # a named tuple
        return batch._make(_map(value, function) for value in batch)
    if isinstance(batch, tuple):
        return tuple(_map(value, function) for value in batch)
    if isinstance(batch, list):
        return [_map(value, function) for value in batch]
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biufc":
        batch = _as_tensor(batch)
    return function(batch)


def _as_tensor(array: np.ndarray) -> Tensor:
    # Tensors cannot be read-only, have negative strides or another byte order.
    shareable = array.flags.writeable and min(array.strides, default=0) >= 0
    if not (shareable and array.dtype.isnative):
        array = array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
    return torch.from_numpy(array)


def row_leaves(batch: Batch) -> list[Tensor]:
    """List the tensors of a canonical batch that have a row for every example.

    Returns:
        All tensors but those without axes, which every example shares.
    """
    return list(_row_leaves(batch))


def _row_leaves(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from _row_leaves(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _row_leaves(value)
    elif isinstance(batch, Tensor) and batch.ndim > 0:
        yield batch


def batch_size(batch: Batch) -> int:
    """Infer the number of examples of a canonical batch.

    Args:
        batch: Tensors in any nesting of tuples, lists and dicts.

    Returns:
        The common length of the first axes.

    Raises:
        BatchError: If there is no tensor with a first axis, or their lengths differ.

    Example:
        >>> batch_size((torch.zeros(3, 8), torch.zeros(3)))
        3
    """
    leaves = row_leaves(batch)
    if not leaves:
        raise BatchError(
            f"The batch, a {type(batch).__name__}, holds no tensor with a first axis, so "
            f"it has no number of samples; pass tensors in tuples, lists or dicts."
            f"{_hint(batch)}"
        )
    sizes = {len(leaf) for leaf in leaves}
    if len(sizes) > 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise BatchError(
            f"The tensors of the batch have different first axes: shapes {shapes}. Every "
            f"tensor needs one row for each example.{_hint(batch)}"
        )
    return sizes.pop()


def _hint(batch: Batch) -> str:
    """Say what to do with rows of a dataset that nothing has collated yet."""
    if hasattr(batch, "with_format") and hasattr(batch, "column_names"):
        return (
            " A dataset is not a batch: pass dataset.with_format('torch')[:8], say, or go "
            "through it with a DataLoader."
        )
    rows = batch if isinstance(batch, list) else []
    if isinstance(batch, Mapping):
        rows = [key for key, value in batch.items() if _has_rows(value)]
    if rows and (isinstance(batch, Mapping) or isinstance(rows[0], Mapping)):
        return (
            " These are rows that are not collated; pad and stack them, e.g. with "
            "DataCollatorWithPadding(tokenizer) of transformers."
        )
    return ""


def _has_rows(value: object) -> bool:
    """Tell whether a value is a list of numbers, or of tensors or lists of them."""
    while isinstance(value, list) and value:
        if isinstance(value[0], Tensor | int | float):
            return True
        value = value[0]
    return False


def take(batch: Batch, rows: slice) -> Batch:
    """Select consecutive examples of a canonical batch; nothing is copied.

    Returns:
        The batch of those examples.

    Example:
        >>> take((torch.arange(4), "shared"), slice(1, 3))
        (tensor([1, 2]), 'shared')
    """

    def select(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.ndim > 0
        return leaf[rows] if has_rows else leaf

    return _map(batch, select)


def copied(batch: Batch) -> Batch:
    """Copy the tensors of a canonical batch, for models that write to their inputs.

    Returns:
        The batch, in memory of its own.

    Example:
        >>> batch = (torch.zeros(2), "shared")
        >>> copied(batch)[0].add_(1), batch
        (tensor([1., 1.]), (tensor([0., 0.]), 'shared'))
    """
    return _map(batch, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def moved(batch: Batch, device: torch.device) -> Batch:
    """Put the tensors of a canonical batch on a device.

    Returns:
        The batch there.

    Example:
        >>> moved({"x": torch.zeros(2), "y": None}, torch.device("meta"))["x"].device
        device(type='meta')
    """
    return _map(
        batch, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf
    )


def rebuild(batch: Batch, leaves: list[Tensor]) -> Batch:
    """Put new tensors in the places of :func:`row_leaves`, in its order."""
    remaining = iter(leaves)

    def replace(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.ndim > 0
        return next(remaining) if has_rows else leaf

    return _map(batch, replace)


def as_arguments(example: Batch) -> tuple[Any, ...]:
    """Spread an example the way tasks take it: sequences spread, all else one argument."""
    return tuple(example) if isinstance(example, list | tuple) else (example,)


def describe_value(value: object) -> str:
    """Name what was got where a tensor was expected, for messages.

    Example:
        >>> describe_value(torch.zeros(2, 1)), describe_value(None)
        ('shape (2, 1)', 'NoneType')

    Returns:
        A tensor's shape, or the class of anything else.
    """
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return type(value).__name__


def check_device(batch: Batch, device: torch.device) -> None:
    """Refuse a batch that lies on another device than the model.

    Raises:
        BatchError: If it does, naming both devices.
    """
    for leaf in row_leaves(batch):
        if leaf.device != device:
            raise BatchError(
                f"The batch has a tensor on {leaf.device}, the model is on {device}; "
                f"move the batch first, e.g. tensor.to({str(device)!r})."
            )


def row_digests(batch: Batch) -> Int64[np.ndarray, " b"]:
    """Hash each example's bytes, to notice another example under the same index.

    Returns:
        A 64-bit hash of every row, over all tensors of the batch. Shape ``(b,)``.
    """
    rows = []
    for leaf in row_leaves(batch):
        flat = (
            leaf.detach().cpu().to_dense().reshape(len(leaf), math.prod(leaf.shape[1:]))
        )
        rows.append(flat.contiguous().view(torch.uint8).numpy())
    digests = np.empty(len(rows[0]), dtype=np.int64)
    for i in range(len(digests)):
        digest = hashlib.blake2b(digest_size=8)
        for row in rows:
            digest.update(row[i].data)
        digests[i] = np.frombuffer(digest.digest(), dtype=np.int64)[0]
    return digests
