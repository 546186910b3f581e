"""Batches that are gone through more than once: how many rows, and are they the same?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int64

from trak._batches import batch_size, canonical, row_digests
from trak._types import Batch
from trak.errors import BatchError

NO_EXAMPLES = "{} has no examples; pass at least one batch."
"""What is wrong with batches that hold nothing."""

_OTHER = (
    "{} gave other examples, or another order, when it was gone through again; use a "
    "loader that neither shuffles nor augments."
)


@dataclass(frozen=True, slots=True)
class Contents:
    """What batches hold, however they are cut."""

    name: str
    """Hash of all examples in order, in hexadecimal."""

    digests: Int64[np.ndarray, " n"] = field(compare=False, repr=False)
    """Hash of each example. Shape ``(n,)``."""

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.digests)


def read_contents(batches: Iterable[Batch], what: str) -> Contents:
    """Go through batches once, to count and hash their examples.

    Args:
        batches: The batches.
        what: What they are, for messages: ``"train"`` or ``"targets"``.

    Returns:
        Their contents.

    Raises:
        BatchError: If there is no example, or they could not be gone through again.
    """
    check_repeatable(batches, what)
    found = [row_digests(_sized(batch)) for batch in batches]
    digests = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    if len(digests) == 0:
        raise BatchError(NO_EXAMPLES.format(what))
    name = hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest()
    return Contents(name, digests)


def check_repeatable(batches: Iterable[Batch], what: str) -> None:
    """Refuse batches that are used up after one pass.

    Raises:
        BatchError: If they are an iterator.
    """
    if iter(batches) is batches:
        raise BatchError(
            f"{what} is a {type(batches).__name__}, which can be gone through only once; "
            f"pass a list of batches, or a DataLoader that does not shuffle."
        )


def count(batches: Iterable[Batch], what: str) -> int:
    """Count the examples of batches.

    Args:
        batches: The batches.
        what: What they are, for the message.

    Returns:
        Their number.

    Raises:
        BatchError: If there is none.

    Example:
        >>> count([(np.zeros((2, 3)), np.zeros(2)), (np.zeros((1, 3)), np.zeros(1))], "")
        3
    """
    size = sum(batch_size(canonical(batch)) for batch in batches)
    if size == 0:
        raise BatchError(NO_EXAMPLES.format(what))
    return size


def checked(batches: Iterable[Batch], contents: Contents, what: str) -> Iterator[Batch]:
    """Go through batches again.

    Args:
        batches: The batches.
        contents: What they held before.
        what: What they are, for the message.

    Yields:
        Each that is not empty, after seeing that it holds the same.

    Raises:
        BatchError: If they hold something else this time.
    """
    low = 0
    for batch in batches:
        digests = row_digests(_sized(batch))
        high = low + len(digests)
        if not np.array_equal(digests, contents.digests[low:high]):
            raise BatchError(_OTHER.format(what))
        if len(digests):
            yield batch
        low = high
    if low != contents.size:
        raise BatchError(_OTHER.format(what))


def _sized(batch: Batch) -> Batch:
    """Give the canonical form of a batch, all of whose tensors have as many rows."""
    batch = canonical(batch)
    batch_size(batch)
    return batch


class Memory:
    """Remembers the contents of batches by the identity of their container.

    A container whose length is another, and a list whose batches are other objects, is
    read again. What is changed inside a batch, or behind a loader, goes unnoticed: give
    every set of examples a container of its own.
    """

    def __init__(self) -> None:
        # The objects are held on to: no other can get the same identity.
        self._known: dict[int, tuple[Iterable[Batch], list[Any], Contents]] = {}

    def read(self, batches: Iterable[Batch], what: str) -> tuple[Contents, bool]:
        """Read the contents of batches, if they are not known.

        Args:
            batches: The batches.
            what: What they are, for messages.

        Returns:
            Their contents, and whether they were known.
        """
        inside = _inside(batches)
        known = self._known.get(id(batches))
        if known is not None and _are_same(known[1], inside):
            return known[2], True
        contents = read_contents(batches, what)
        self._known[id(batches)] = (batches, inside, contents)
        return contents, False


def _inside(batches: Iterable[Batch]) -> list[Any]:
    """List what tells that a container has changed, without going through a loader."""
    if type(batches) in {list, tuple}:  # those of other classes may load what they give
        return list(batches)
    return [None] * (len(batches) if isinstance(batches, Sized) else 0)


def _are_same(some: list[Any], others: list[Any]) -> bool:
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(one is other for one, other in pairs)
