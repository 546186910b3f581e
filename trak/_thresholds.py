"""What happens to small scores before they are kept: the soft threshold, on whole files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trak._linalg import spans
from trak._memory import TILE
from trak.errors import OptionError
from trak.evaluation import soft_threshold, threshold_keeping


@dataclass(frozen=True, slots=True)
class SoftThreshold:
    """How far scores are shrunk towards 0; by default not at all."""

    level: float = 0.0
    """By this much, on every target; ..."""

    share: float = 1.0
    """... or by as much as leaves this share of each target's scores."""

    def describe(self) -> str | float | None:
        """Say what was done, for the record."""
        if self.share < 1:
            return f"share {self.share:g}"
        return self.level or None

    def apply(self, array: Any, n: int, m: int) -> None:
        """Shrink scores in place, some targets at a time.

        Args:
            array: The scores. Shape ``(n, m)``.
            n: Training examples.
            m: Targets.
        """
        if self.describe() is None:
            return
        for low, high in spans(m, max(1, TILE // n)):
            part = array[:, low:high]
            level: Any = self.level
            if self.share < 1:
                level = threshold_keeping(part, self.share)
            array[:, low:high] = soft_threshold(part, level)


def parse_threshold(given: object) -> SoftThreshold | None:
    """Parse the façade's ``soft_threshold``.

    Returns:
        The threshold; None where cross-validation is to choose it.

    Raises:
        OptionError: If it is neither None, nor "auto", nor a number >= 0.

    Example:
        >>> parse_threshold(0.5)
        SoftThreshold(level=0.5, share=1.0)
    """
    if given is None:
        return SoftThreshold()
    if isinstance(given, str) and given == "auto":
        return None
    try:
        # True would be a level of 1, and not "auto".
        level = math.nan if isinstance(given, bool) else float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        level = math.nan
    if not 0 <= level < math.inf:
        raise OptionError(
            f"soft_threshold={given!r} is not a threshold; pass None, a number >= 0 in the "
            f"units of the scores, or 'auto'."
        )
    return SoftThreshold(level)
