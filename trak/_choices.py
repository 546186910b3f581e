"""The damping and the exponent of an experiment's scores, as its record has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trak._scoring import Tuning
from trak.errors import StoreCorruptError

DAMPING = "damping"
"""Key of an experiment's record, for the choice."""


@dataclass(frozen=True, slots=True)
class DampingChoice:
    """Which damping and exponent the scores of an experiment have, and why."""

    multiple: float | None
    """In mean eigenvalues of each checkpoint's kernel; 1 unless it was chosen. None where
    ``lambda_reg`` is a number or ``"pinv"``."""

    power: float | None
    """The exponent of the result; None where it is the score computer's."""

    reason: str
    """What chose it, or why nothing did."""

    lds: float | None
    """The expected LDS, where checkpoints were cross-validated."""

    basis: str | None = None
    """Hash of what it was chosen for; None where nothing was."""

    @property
    def tuning(self) -> Tuning:
        """What of it scores depend on."""
        return Tuning(1.0 if self.multiple is None else self.multiple, self.power)

    def __str__(self) -> str:
        if self.multiple is None:
            return f"damping as given ({self.reason})"
        power = "" if self.power is None else f", exponent {self.power:g} of the result"
        return f"damping of {self.multiple:.3g} mean eigenvalues{power} ({self.reason})"


_TYPES = {
    "multiple": (float, int, type(None)),
    "power": (float, int, type(None)),
    "reason": (str,),
    "lds": (float, int, type(None)),
    "basis": (str, type(None)),
}


def read_choice(record: Mapping[str, Any], exp_name: str) -> DampingChoice | None:
    """Read the choice on an experiment's record, if there is one.

    Args:
        record: The record.
        exp_name: The experiment, for messages.

    Returns:
        The choice, or None.

    Raises:
        StoreCorruptError: If it is not one.
    """
    found = record.get(DAMPING)
    if found is None:
        return None
    if (
        not isinstance(found, Mapping)
        or found.keys() != _TYPES.keys()
        or not all(isinstance(found[name], known) for name, known in _TYPES.items())
        or not (found["multiple"] is None or 0 < found["multiple"] < float("inf"))
    ):
        raise StoreCorruptError(
            f"the record of experiment {exp_name!r} has the {DAMPING} {found!r}, which is "
            f"none; delete that entry of the file, and it is chosen again."
        )
    return DampingChoice(**found)
