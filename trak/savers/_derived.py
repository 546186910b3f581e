"""What finalizing makes of a checkpoint's rows: its Gram matrix and features, as files.

A label at the end of such a file says what it was made with: the record that says so is
another file, and a crash may come between the two.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trak import _layout
from trak.errors import StoreCorruptError, StoreWriteError
from trak.savers._places import Place, Places


@dataclass(frozen=True, slots=True)
class Derived:
    """The derived files of one checkpoint, as its record says that they are."""

    places: Places
    model_id: int
    record: Mapping[str, Any]

    def _place(self, key: str) -> Place:
        return self.places.of(_layout.DERIVED_ARRAYS[key], self.model_id)

    @property
    def _features_label(self) -> bytes:
        return label_of(str(self.record.get("finalized_with")))

    @property
    def _gram(self) -> tuple[str, bytes]:
        """Give the array of the Gram matrix, and its label."""
        power = self.record.get(_layout.ROW_EXPONENT, 0.0)
        if power:
            return "weighted_gram", label_of(f"{_layout.ROW_EXPONENT}={power!r}")
        return "gram", b""

    def load(self, mode: str, store: dict[str, Any]) -> None:
        """Add the arrays that are there to those of the checkpoint."""
        gram, gram_label = self._gram
        for key, source, label in (
            ("gram", gram, gram_label),
            ("features", "features", self._features_label),
        ):
            place = self._place(source)
            if place[0].exists():
                array = _layout.open_array(*place, mode, label)
                if has_label(place[0], label):
                    store[key] = array

    @contextlib.contextmanager
    def new_features(self, store: dict[str, Any]) -> Iterator[np.memmap]:
        """Give an array for the features, and add it to the checkpoint's."""
        place, label = self._place("features"), self._features_label
        with _layout.new_array(*place, label) as array:
            yield array
        store["features"] = _layout.open_array(*place, label=label)

    def write_gram(self, values: np.ndarray, store: dict[str, Any]) -> None:
        """Write the Gram matrix, and drop other features and Gram matrices."""
        features, label = self._place("features")[0], self._gram[1]
        place = self._place(self._gram[0])
        # Another process may have made the same ones, and deleted the gradients since.
        is_same = has_label(features, self._features_label)
        if not (is_same and holds(place, values, label)):
            features.unlink(missing_ok=True)
            store.pop("features", None)
        # Before the new one: whoever finds none finalizes again, and nothing is left over.
        for key in ("gram", "weighted_gram"):
            if key != self._gram[0]:
                self._place(key)[0].unlink(missing_ok=True)
        with _layout.new_array(*place, label) as array:
            array[:] = values
        store["gram"] = _layout.open_array(*place, label=label)


def label_of(text: str) -> bytes:
    """Shorten what an array was made with to the 32 bytes that may follow its data."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest().encode()


def has_label(path: Path, label: bytes) -> bool:
    """Tell whether a file ends with a label; one that is not there does not."""
    try:
        with path.open("rb") as file:
            file.seek(-len(label), os.SEEK_END)
            return file.read() == label
    except OSError:  # not there, or shorter
        return False


def holds(
    place: tuple[Path, tuple[int, int], str], values: np.ndarray, label: bytes = b""
) -> bool:
    """Tell whether an array file is there, whole, with these values and this label."""
    try:
        found = np.array_equal(_layout.open_array(*place, "r", label), values)
    except (StoreCorruptError, StoreWriteError):
        return False
    return found and has_label(place[0], label)
