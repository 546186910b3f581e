"""Options of the methods: names that are parsed, and numbers that are checked."""

from __future__ import annotations

import math
from enum import Enum
from typing import TypeVar

from trak.errors import OptionError, UnknownNameError

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


def check_above_zero(**numbers: int | float) -> None:
    """Refuse numbers that are not positive and finite.

    Raises:
        OptionError: If one is not, with its name.
    """
    for argument, value in numbers.items():
        if not 0 < value < math.inf:
            raise OptionError(f"{argument} must be positive and finite, got {value!r}.")
