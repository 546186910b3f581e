"""What cross-validation of checkpoints found, and how it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

_PLAIN = (
    "lds",
    "multiple",
    "is_default",
    "target_error",
    "n_checkpoints",
    "n_held_out",
)

Exponents = tuple[float, float]
"""Powers of the out-to-loss weight: of the rows, and of the scores."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """The expected LDS of one way to score."""

    exponents: Exponents
    """Powers of the out-to-loss weight, of the rows and of the scores."""

    multiple: float
    """The damping, in mean eigenvalues."""

    lds: float
    """Expected LDS of the scores of all checkpoints."""

    standard_error: float
    """Its standard error."""

    gain: float
    """How much it is above that of the default."""

    gain_error: float
    """The standard error of that difference; 0 for the default."""


@dataclass(frozen=True, slots=True, eq=False)
class CrossValidation:
    """How well the checkpoints' scores predict the outputs of checkpoints left out.

    It is an estimate of the LDS against models that are retrained once a subset, for
    subsets of the same size as the checkpoints', without retraining any.
    """

    lds: float
    """Expected LDS of the scores of all checkpoints, as they are chosen here."""

    interval: tuple[float, float]
    """95 % interval of ``lds``: other subsets, other retrainings and other targets."""

    exponents: Exponents
    """The chosen powers of the out-to-loss weight."""

    multiple: float
    """The chosen damping, in mean eigenvalues: between points of the grid if so best."""

    is_default: bool
    """Whether that is the default, because nothing else is clearly better."""

    candidates: tuple[Candidate, ...]
    """Everything that was tried, the default first."""

    per_target: Float64[np.ndarray, " k"]
    """Estimate of each target, which one alone is noisy: see ``target_error``."""

    target_error: float
    """The standard error of an entry of ``per_target``."""

    targets: Int64[np.ndarray, " k"]
    """The targets that were used, in increasing order."""

    over_checkpoints: Mapping[float, float]
    """Expected LDS with so many checkpoints; with infinitely many under ``inf``."""

    over_columns: Mapping[int, float]
    """Expected LDS with so many projected entries; empty if it was not asked for."""

    n_checkpoints: int
    """Checkpoints that score."""

    n_held_out: int
    """Checkpoints whose outputs were predicted."""

    notes: tuple[str, ...] = ()
    """What a reader should know about the data."""

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            (
                f"expected LDS {self.lds:.3f} [{low:.3f}, {high:.3f}] "
                f"({self.n_checkpoints} checkpoints, {self.n_held_out} held out in turn, "
                f"{len(self.targets)} targets)"
            )
        ]
        lines += self._damping()
        known = sorted(self.over_checkpoints.items())
        lines += _row("checkpoints", [_count(count) for count, _ in known])
        lines += _row("LDS", [f"{value:.3f}" for _, value in known])
        if self.over_columns:
            columns = sorted(self.over_columns.items())
            lines += _row("proj_dim", [str(p) for p, _ in columns])
            lines += _row("LDS", [f"{value:.3f}" for _, value in columns])
        lines += [f"note: {note}" for note in self.notes]
        lines.append(self.advice)
        return "\n".join(lines)

    def _damping(self) -> list[str]:
        near = [found for found in self.candidates if found.exponents == self.exponents]
        near.sort(key=lambda found: found.multiple)
        chosen = "default" if self.is_default else "chosen"
        a, b = self.exponents
        return [
            *_row("damping", [f"{found.multiple:g}" for found in near]),
            *_row("LDS", [f"{found.lds:.3f}" for found in near]),
            (
                f"{chosen}: damping {self.multiple:.3g} mean eigenvalues, exponents "
                f"({a:g}, {b:g})"
            ),
        ]

    @property
    def advice(self) -> str:
        """One line about what to do."""
        low, _ = self.interval
        if low <= 0:
            return (
                f"advice: the interval reaches {low:.2f}; train more checkpoints on "
                f"random halves before these scores are used."
            )
        c = self.n_checkpoints
        more = self.over_checkpoints.get(2 * c, self.lds) - self.lds
        if more >= 0.01:
            return f"advice: {c} more checkpoints would add about {more:.2f}."
        return f"advice: more checkpoints would add little ({more:.3f} for {c} more)."

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON can hold it; infinity is the string ``"inf"``.

        Returns:
            A dictionary of numbers, strings, lists and dictionaries.
        """
        found = {name: getattr(self, name) for name in _PLAIN}
        return found | {
            "interval": list(self.interval),
            "exponents": list(self.exponents),
            "candidates": [
                asdict(one) | {"exponents": list(one.exponents)}
                for one in self.candidates
            ],
            "per_target": self.per_target.tolist(),
            "targets": self.targets.tolist(),
            "over_checkpoints": {
                _count(count): value for count, value in self.over_checkpoints.items()
            },
            "over_columns": {str(p): value for p, value in self.over_columns.items()},
            "notes": list(self.notes),
        }


def _count(count: float) -> str:
    return f"{count:g}"


def _row(name: str, cells: list[str]) -> list[str]:
    return [f"{name:>11} " + " ".join(f"{cell:>7}" for cell in cells)]
