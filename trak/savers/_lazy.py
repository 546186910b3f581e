"""The current arrays of a checkpoint, with features that are made on demand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

FeatureMaker: TypeAlias = Callable[[int, dict[str, Any], np.memmap], None]
"""``make(model_id, store, array)`` writes a checkpoint's features into an array."""


@runtime_checkable
class FeatureFiles(Protocol):
    """The part of a saver that features on demand need."""

    model_ids: dict[int, dict[str, Any]]
    """Every checkpoint's record."""

    make_features: FeatureMaker | None
    """What computes features, where somebody can."""

    def new_features(
        self, model_id: int, store: dict[str, Any]
    ) -> AbstractContextManager[np.memmap]:
        """Give an array for the features of a checkpoint, and add it to its arrays."""


class LazyStore(dict[str, Any]):
    """The current arrays; the features among them are computed when first asked for.

    Scores do not need the features, but readers of 0.3.2 stores do.

    Args:
        saver: The saver whose arrays these are.
        model_id: The checkpoint they belong to.
    """

    def __init__(self, saver: FeatureFiles, model_id: int) -> None:
        super().__init__()
        self._saver = saver
        self._model_id = model_id

    def __missing__(self, key: str) -> Any:
        make = self._saver.make_features
        is_finalized = self._saver.model_ids[self._model_id]["is_finalized"]
        if key != "features" or make is None or not is_finalized:
            raise KeyError(key)
        with self._saver.new_features(self._model_id, self) as array:
            make(self._model_id, self, array)
        return self[key]
