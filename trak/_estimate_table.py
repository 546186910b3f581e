"""What an estimate says: space and time by stage, and a table of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage takes, for all checkpoints together."""

    disk: int
    """Bytes that it adds to the store."""

    ram: int
    """Most bytes of main memory at once: the model, if it is there, a checkpoint to load,
    and what the stage makes; without Python and PyTorch themselves, and without the cache
    of files."""

    gpu: int
    """Most bytes at once on the model's device, the model included; 0 where that is the
    CPU."""

    seconds: float
    """How long it takes."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What every stage would take; print it for a table.

    Scores are had either by ``finalize_scores`` or by ``top_k``, so there are two totals.
    """

    featurize: Stage
    """``load_checkpoint`` and ``featurize``."""

    finalize_features: Stage
    """``finalize_features``."""

    score: Stage
    """``start_scoring_checkpoint`` and ``score``."""

    finalize_scores: Stage
    """``finalize_scores``: all scores, in a file."""

    top_k: Stage
    """``top_k`` instead of that: the best of each target, in memory."""

    sizes: str
    """What it is an estimate for."""

    notes: tuple[str, ...]
    """How times were found, and what is not included."""

    @property
    def total(self) -> Stage:
        """All stages with ``finalize_scores``: sums, and for memory the largest."""
        return _total((*self._before_scores, self.finalize_scores))

    @property
    def total_top_k(self) -> Stage:
        """All stages with ``top_k``."""
        return _total((*self._before_scores, self.top_k))

    @property
    def _before_scores(self) -> tuple[Stage, ...]:
        return self.featurize, self.finalize_features, self.score

    def __str__(self) -> str:
        rows = {
            "featurize": self.featurize,
            "finalize_features": self.finalize_features,
            "score": self.score,
            "finalize_scores": self.finalize_scores,
            "or top_k": self.top_k,
            "total": self.total,
            "total with top_k": self.total_top_k,
        }
        lines = [self.sizes, f"{'':18}{'disk':>10}{'RAM':>10}{'GPU':>10}{'time':>12}"]
        for name, stage in rows.items():
            cells = [format_bytes(x) for x in (stage.disk, stage.ram, stage.gpu)]
            columns = "".join(f"{cell:>10}" for cell in cells)
            lines.append(f"{name:18}{columns}{format_seconds(stage.seconds):>12}")
        return "\n".join([*lines, *self.notes])


def _total(stages: tuple[Stage, ...]) -> Stage:
    return Stage(
        sum(stage.disk for stage in stages),
        max(stage.ram for stage in stages),
        max(stage.gpu for stage in stages),
        sum(stage.seconds for stage in stages),
    )


def format_bytes(number: int) -> str:
    """Write a number of bytes in three digits, with the unit.

    Example:
        >>> format_bytes(0), format_bytes(999), format_bytes(1_234_000)
        ('-', '999 B', '1.23 MB')

    Returns:
        The text, in powers of 1000; a dash for nothing.
    """
    if number <= 0:
        return "-"
    value, units = float(number), ["B", "kB", "MB", "GB", "TB", "PB"]
    while float(f"{value:.3g}") >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def format_seconds(seconds: float) -> str:
    """Write a time in two or three digits, with the unit.

    Example:
        >>> format_seconds(0.0123), format_seconds(75.0), format_seconds(7500.0)
        ('12 ms', '1.2 min', '2.1 h')

    Returns:
        The text.
    """
    size, unit = 3600.0, "h"
    for limit, factor, name in ((1, 1e-3, "ms"), (60, 1.0, "s"), (3600, 60.0, "min")):
        if seconds < limit:
            size, unit = factor, name
            break
    value = seconds / size
    return f"{value:,.{1 if value < 10 else 0}f} {unit}"
