"""What a line hands over: the scores of one number of models, and what they took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Step:
    """The scores of one number of models."""

    count: int
    scores: Callable[[], np.ndarray] | None = None
    """Shape ``(n, m)``; None where nothing is scored."""

    spent: dict[str, float] = field(default_factory=dict)
    """Seconds, ``wall`` and ``cpu``, of work for this number that an earlier line did."""

    label: str = ""
    """Under which the predictions are kept, after the count."""

    notes: dict[str, Any] = field(default_factory=dict)

    trained: int | None = None
    """Models that had to be trained; None for ``count``."""


Lines = Iterator[Step]
