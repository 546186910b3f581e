"""Arrays as callers have them, as the metrics need them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak._options import integer
from trak.errors import NonFiniteError, OptionError


def to_numpy(name: str, array: object) -> np.ndarray:
    """Give an array as NumPy has it, in its own precision if NumPy knows it.

    Args:
        name: The argument's name, for messages.
        array: A NumPy array, a tensor, or numbers in lists.

    Returns:
        The array, of booleans, whole numbers or floating-point numbers.

    Raises:
        OptionError: If it is none of those.
    """
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        # NumPy has no bfloat16.
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    try:
        found = np.asarray(array)
    except ValueError:  # rows of several lengths
        found = np.asarray(None)
    if found.dtype.kind not in "biuf":
        raise OptionError(
            f"{name} is a {type(array).__name__} of {found.dtype}; pass an array of real "
            f"numbers or booleans."
        )
    return found


def with_repeats(outputs: np.ndarray) -> np.ndarray:
    """Give outputs of one retraining each, ``(s, m)``, an axis of repeats."""
    return outputs[:, None] if outputs.ndim == 2 else outputs


def check_targets_finite(name: str, values: np.ndarray, advice: str) -> None:
    """Refuse values that are not finite; their last axis is that of targets.

    Raises:
        NonFiniteError: If a value is NaN or infinite; it has the target's index.
    """
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        place = tuple(int(index) for index in bad[0])
        shown = ", ".join(map(str, place))
        raise NonFiniteError(
            f"{name}[{shown}] is {values[place]}, for target {place[-1]}; {advice}",
            index=place[-1],
        )


def check_scores_finite(
    scores: np.ndarray, first_row: int = 0, first_target: int = 0
) -> None:
    """Refuse scores that are not finite.

    Args:
        scores: A rectangle of them. Shape ``(k, w)``.
        first_row: The training example of its first row.
        first_target: The target of its first column.

    Raises:
        NonFiniteError: If a score is NaN or infinite; it has the example's index.
    """
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        row, target = (int(index) for index in bad[0])
        raise NonFiniteError(
            f"scores is not finite for training example {first_row + row} and target "
            f"{first_target + target}; recompute the scores before evaluating them.",
            index=first_row + row,
        )


def listed(name: str, values: object) -> list[Any]:
    """List what is in an argument that takes several values.

    Returns:
        The values.

    Raises:
        OptionError: If it is one value, or a string.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise OptionError(f"{name}={values!r}; pass a list.")
    return [*values]


def generator(seed: int) -> np.random.Generator:
    """Make a generator of random numbers.

    Returns:
        A generator of its own for every call.

    Raises:
        OptionError: If the seed is not a whole number of at least 0.
    """
    return np.random.default_rng(parse_seed(seed))


def parse_seed(seed: object) -> int:
    """Parse a seed.

    Returns:
        The seed as an int.

    Raises:
        OptionError: If it is not a whole number of at least 0.
    """
    number = integer("seed", seed)
    if number < 0:
        raise OptionError(f"seed={number}; pass a whole number of at least 0.")
    return number


def check_booleans(name: str, values: np.ndarray) -> None:
    """Refuse flags that are not of boolean type.

    Raises:
        OptionError: If they are not; indices would otherwise pass for flags.
    """
    if values.dtype != np.bool_:
        raise OptionError(
            f"{name} has dtype {values.dtype}; pass booleans, such as {name} == 1."
        )
