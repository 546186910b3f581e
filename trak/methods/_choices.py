"""Options of the methods: names that are parsed, and values that are checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from numbers import Real
from typing import Any, TypeVar

from trak.errors import (
    CheckpointError,
    NoCheckpointError,
    OptionError,
    UnknownNameError,
)

_Choice = TypeVar("_Choice", bound=Enum)


def parse_name(argument: str, name: str, choices: type[_Choice]) -> _Choice:
    """Look a name up in a closed set.

    Args:
        argument: The argument's name, for the message.
        name: Its value.
        choices: The set.

    Returns:
        The choice.

    Raises:
        UnknownNameError: If the name is not in the set.
    """
    try:
        return choices(name)
    except ValueError:
        known = ", ".join(repr(it.value) for it in choices)
        raise UnknownNameError(f"{argument} is one of {known}, got {name!r}.") from None


def is_above_zero(value: object) -> bool:
    """Tell whether something is a number that is positive and finite.

    Returns:
        Whether it is.

    Example:
        >>> is_above_zero(0.5), is_above_zero(math.nan), is_above_zero("0.5")
        (True, False, False)
    """
    return isinstance(value, Real) and 0 < float(value) < math.inf


def check_above_zero(**numbers: object) -> None:
    """Refuse numbers that are not positive and finite.

    Raises:
        OptionError: If one is not, with its name.
    """
    for argument, value in numbers.items():
        if not is_above_zero(value):
            raise OptionError(f"{argument} must be positive and finite, got {value!r}.")


def check_not_negative(argument: str, value: object) -> None:
    """Refuse a number that is negative, or not finite.

    Raises:
        OptionError: If it is.
    """
    if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
        raise OptionError(f"{argument} must be at least 0 and finite, got {value!r}.")


def check_unchanged(c: int, fitted: str, weights: str) -> None:
    """Refuse a checkpoint that is another than when a method was fitted.

    Args:
        c: Its position.
        fitted: The fingerprint of its weights then.
        weights: Their fingerprint now.

    Raises:
        CheckpointError: If they differ.
    """
    if weights != fitted:
        raise CheckpointError(
            f"checkpoint {c} has other weights than when the method was fitted; pass "
            f"copies that training does not write to, and fit again."
        )


def check_checkpoints(checkpoints: Sequence[Any]) -> None:
    """Refuse what is not a sequence of state dicts.

    Raises:
        NoCheckpointError: If there is none.
        CheckpointError: If it is one state dict.
        OptionError: If it cannot be gone through again, or is no sequence.
    """
    if isinstance(checkpoints, Mapping):
        raise CheckpointError(
            "checkpoints is one state dict; pass a list of them, such as [state_dict]."
        )
    # Any sequence will do, such as one that reads its items from files.
    if not (hasattr(checkpoints, "__len__") and hasattr(checkpoints, "__getitem__")):
        raise OptionError(
            f"checkpoints must be a sequence of state dicts, got "
            f"{type(checkpoints).__name__}; pass a list."
        )
    if len(checkpoints) == 0:
        raise NoCheckpointError("checkpoints is empty; pass at least one.")
