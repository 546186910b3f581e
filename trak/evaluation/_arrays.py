"""Arrays as callers have them, as the metrics need them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trak.errors import NonFiniteError, OptionError


def to_numpy(array: np.ndarray | Tensor) -> np.ndarray:
    """Give an array as NumPy has it, in its own precision if NumPy knows it."""
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        # NumPy has no bfloat16.
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    return array


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


def check_booleans(name: str, values: np.ndarray) -> None:
    """Refuse flags that are not of boolean type.

    Raises:
        OptionError: If they are not; indices would otherwise pass for flags.
    """
    if values.dtype != np.bool_:
        raise OptionError(
            f"{name} has dtype {values.dtype}; pass booleans, such as {name} == 1."
        )
