"""What cross-validation refuses, and what it notes about the data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import sqrt
from typing import SupportsFloat

import numpy as np
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from trak._exponents import parse_exponents
from trak._options import integer
from trak.errors import NonFiniteError, OptionError
from trak.evaluation._arrays import check_booleans, listed, parse_seed

_DAMPINGS = 1e-12, 1e12  # mean eigenvalues; float64 has 16 digits
_SAME = 0.999  # of two masks' correlation: one subset, or one and all others


def check_options(
    p: int,
    multiples: Sequence[float],
    exponents: Sequence[tuple[float, float]],
    columns: Sequence[int],
    max_targets: int,
    n_probes: int | None,
    seed: int,
) -> None:
    """Refuse options that cannot work.

    Raises:
        OptionError: If one cannot.
    """
    dampings = listed("multiples", multiples)
    low, high = _DAMPINGS
    if not dampings or not all(
        isinstance(one, SupportsFloat) and low <= float(one) <= high for one in dampings
    ):
        raise OptionError(
            f"multiples={dampings}; pass dampings above 0, in mean eigenvalues: from "
            f"{low:g} to {high:g}, or rounding is all that is left."
        )
    pairs = listed("exponents", exponents)
    if not pairs or not all(_is_pair(one) for one in pairs):
        raise OptionError(
            f"exponents={pairs}; pass a list of pairs of numbers >= 0, such as [(0, 1)]."
        )
    widths = [integer("an entry of columns", one) for one in listed("columns", columns)]
    if not all(1 <= one <= p for one in widths):
        raise OptionError(
            f"columns={widths}; pass numbers from 1 to p={p}, such as p // 2."
        )
    if integer("max_targets", max_targets) < 1:
        raise OptionError(f"max_targets={max_targets}; pass at least 1.")
    if n_probes is not None and integer("n_probes", n_probes) < 8:
        raise OptionError(
            f"n_probes={n_probes} cannot measure a variance; pass at least 8."
        )
    parse_seed(seed)


def _is_pair(value: object) -> bool:
    try:
        parse_exponents(value)
    except OptionError:
        return False
    return True


def check_arrays(
    out_to_loss: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    members: Sequence[np.ndarray],
    n: int,
    m: int,
) -> None:
    """Refuse arrays of the wrong shape, type or content.

    Raises:
        OptionError: If there are fewer than 2 checkpoints or no examples or targets,
            or a shape or a type is wrong.
        NonFiniteError: If a number is NaN or infinite.
    """
    if len(members) < 2:
        raise OptionError(
            f"{len(members)} checkpoints cannot be cross-validated: one is held out and "
            f"another scores. Train at least 2, better 5, each on a random half of the "
            f"training set."
        )
    if n < 2 or m < 1:
        raise OptionError(
            f"n={n} training examples and m={m} targets; pass 2 and 1 at least."
        )
    for index in range(len(members)):
        three = out_to_loss[index], outputs[index], members[index]
        if not all(isinstance(one, np.ndarray) for one in three):
            raise OptionError(
                f"checkpoint {index} has out_to_loss, outputs and members that are "
                f"{', '.join(type(one).__name__ for one in three)}; pass NumPy arrays."
            )
        shapes = (out_to_loss[index].shape, outputs[index].shape, members[index].shape)
        if shapes != ((n,), (m,), (n,)):
            raise OptionError(
                f"checkpoint {index} has out_to_loss, outputs and members of shapes "
                f"{shapes[0]}, {shapes[1]} and {shapes[2]}; pass (n,)=({n},), "
                f"(m,)=({m},) and (n,)."
            )
        check_booleans(f"members of checkpoint {index}", members[index])
        _check_finite("out_to_loss", index, out_to_loss[index], "training example")
        _check_finite("the model output", index, outputs[index], "target")


def check_width(checkpoint: int, train: Tensor, targets: Tensor, p: int) -> None:
    """Refuse rows of another number of projected entries.

    Raises:
        OptionError: If they are.
    """
    for name, row in (("train", train), ("targets", targets)):
        if row.ndim != 2 or row.shape[1] != p:
            raise OptionError(
                f"checkpoint {checkpoint} has rows of shape {tuple(row.shape)} in "
                f"{name}(0, 1), and p={p}; pass readers of rows with p entries."
            )


def _check_finite(name: str, checkpoint: int, values: np.ndarray, what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise NonFiniteError(
            f"{name} of checkpoint {checkpoint} is {values[bad[0]]} for {what} {bad[0]}; "
            f"leave the checkpoint out, or find out why its training diverged.",
            index=int(bad[0]),
        )


def held_out(members: Sequence[np.ndarray]) -> tuple[list[int], list[str]]:
    """Find the checkpoints whose outputs can be predicted.

    Args:
        members: Which examples each was trained on.

    Returns:
        Their positions, and notes about the others.

    Raises:
        OptionError: If there are fewer than 2.
    """
    held = [index for index, mask in enumerate(members) if 0 < mask.sum() < len(mask)]
    whole = [index for index in range(len(members)) if index not in held]
    if len(held) < 2:
        raise OptionError(
            f"{len(held)} of {len(members)} checkpoints were trained on a part of the "
            f"training set; those trained on all of it, or none, differ in nothing that "
            f"scores could predict. Train at least 2 on random halves, and say which "
            f"with train_inds."
        )
    if not whole:
        return held, []
    names = ", ".join(map(str, whole))
    return held, [
        (
            f"checkpoints {names} saw all examples or none; they score, but cannot be "
            f"predicted."
        )
    ]


def check_subsets(members: Sequence[np.ndarray], held: Sequence[int]) -> list[str]:
    """Refuse subsets that are one, or each other's complement, and note other designs.

    Args:
        members: Which examples each checkpoint was trained on.
        held: Positions of those that are held out.

    Returns:
        Notes.

    Raises:
        OptionError: If two subsets are the same, or complementary.
    """
    found = {
        (i, j): float(np.corrcoef(members[i], members[j])[0, 1])
        for i, j in combinations(held, 2)
    }
    for (i, j), value in found.items():
        if abs(value) > _SAME:
            how = "the same" if value > 0 else "complementary"
            raise OptionError(
                f"checkpoints {i} and {j} were trained on {how} subsets; cross-validation "
                f"needs subsets drawn independently, such as those of random_subsets. "
                f"Leave one of the two out."
            )
    (i, j), value = max(found.items(), key=lambda pair: abs(pair[1]))
    if abs(value) > max(5 / sqrt(len(members[0])), 0.05):
        return [
            (
                f"the subsets of checkpoints {i} and {j} have a correlation of {value:.2f}; "
                f"the estimate is for subsets drawn independently."
            )
        ]
    return []


def varying(
    outputs: Float64[np.ndarray, "j m"], max_targets: int
) -> tuple[Int64[np.ndarray, " k"], list[str]]:
    """Find the targets to use: whose outputs vary, and not more than wanted.

    Args:
        outputs: Outputs of the models that are predicted. Shape ``(j, m)``.
        max_targets: How many to use at most; evenly spaced if there are more.

    Returns:
        The targets, and notes about the others.

    Raises:
        OptionError: If the outputs of no target vary.
    """
    varies: Bool[np.ndarray, " m"] = np.ptp(outputs, axis=0) > 0
    chosen = np.flatnonzero(varies)
    if len(chosen) == 0:
        raise OptionError(
            f"the {len(outputs)} checkpoints' outputs are the same on each of the "
            f"{outputs.shape[1]} targets, so there is nothing to predict; check that "
            f"each checkpoint's own outputs were stored."
        )
    notes = []
    if len(chosen) < len(varies):
        notes.append(
            f"{len(varies) - len(chosen)} targets are left out: their outputs are the "
            f"same for all checkpoints."
        )
    if len(chosen) > max_targets:
        notes.append(f"{max_targets} of {len(chosen)} targets are used.")
        places = np.linspace(0, len(chosen) - 1, max_targets).round().astype(np.int64)
        chosen = chosen[places]
    return chosen.astype(np.int64), notes
