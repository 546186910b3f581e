"""The façade's arguments, parsed once into frozen dataclasses, with every cross-check."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from trak._params import Selection, select_parameters
from trak._types import GradWrt
from trak.errors import BatchError, OptionError


class NonFinitePolicy(str, Enum):
    """What happens to a training example whose gradient is not finite."""

    RAISE = "raise"
    """Featurizing stops with an error that names the example."""

    SKIP = "skip"
    """The example is stored as zeros, scores zero, and is counted in the report."""


@dataclass(frozen=True, slots=True)
class Damping:
    """How much is added to the diagonal of the kernel."""

    lambda_reg: float | str
    """As the user gave it: a number, ``"auto"`` or ``"pinv"``."""

    @property
    def is_pseudo_inverse(self) -> bool:
        """Whether the undamped limit was asked for by name."""
        return self.lambda_reg == "pinv"

    def ridge(self, mean_eigenvalue: float) -> float:
        """Resolve the penalty for a kernel with this mean eigenvalue."""
        if isinstance(self.lambda_reg, str):
            return mean_eigenvalue if self.lambda_reg == "auto" else 0.0
        return self.lambda_reg


def parse_damping(lambda_reg: object) -> Damping:
    """Parse ``lambda_reg``.

    Returns:
        The damping.

    Raises:
        OptionError: If it is neither a finite number >= 0, nor "auto", nor "pinv".

    Example:
        >>> parse_damping("auto").ridge(mean_eigenvalue=3.0)
        3.0
    """
    if isinstance(lambda_reg, str) and lambda_reg in {"auto", "pinv"}:
        return Damping(str(lambda_reg))
    try:
        value = float(lambda_reg)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise OptionError(
            f"lambda_reg={lambda_reg!r} is not a damping; pass a number >= 0, 'auto' (one "
            f"mean eigenvalue of the kernel) or 'pinv' (undamped, by pseudo-inverse)."
        )
    return Damping(value)


@dataclass(frozen=True, slots=True)
class Options:
    """The façade's plain arguments, each valid and agreeing with the others."""

    train_set_size: int
    """Number of training examples, ``n``."""

    save_dir: Path
    """Absolute path of the store."""

    load_from_save_dir: bool
    """Whether checkpoints that are already stored take part."""

    device: torch.device
    """Where the model is, and where gradients and scores are computed."""

    proj_dim: int | None
    """Projected entries, ``p``; None where only a projector instance says."""

    use_half_precision: bool
    """Whether features are stored in float16; sums and solves are wider."""

    proj_max_batch_size: int
    """Largest batch of a CUDA projection kernel."""

    projector_seed: int
    """Seed of the projection."""

    damping: Damping
    """Damping of the kernel."""

    non_finite: NonFinitePolicy
    """What happens to examples without finite gradients."""

    selection: Selection
    """The parameters that are differentiated."""


def parse_options(
    model: torch.nn.Module,
    *,
    train_set_size: object,
    save_dir: str | Path,
    load_from_save_dir: bool,
    device: str | torch.device | None,
    proj_dim: object,
    use_half_precision: bool,
    proj_max_batch_size: object,
    projector_seed: object,
    grad_wrt: GradWrt | None,
    lambda_reg: object,
    on_non_finite: str,
) -> Options:
    """Parse and check the façade's plain arguments.

    Returns:
        The options.

    Raises:
        OptionError: If one cannot work; the message names it and says what would.
    """
    if not isinstance(model, torch.nn.Module):
        raise OptionError(
            f"model must be a torch.nn.Module; got {type(model).__name__}."
        )
    try:
        policy = NonFinitePolicy(on_non_finite)
    except ValueError as error:
        known = [member.value for member in NonFinitePolicy]
        raise OptionError(
            f"on_non_finite={on_non_finite!r} is unknown; pass one of {known}."
        ) from error
    return Options(
        train_set_size=positive("train_set_size", train_set_size),
        save_dir=parse_save_dir(save_dir),
        load_from_save_dir=load_from_save_dir,
        device=parse_device(model, device),
        proj_dim=None if proj_dim is None else positive("proj_dim", proj_dim),
        use_half_precision=use_half_precision,
        proj_max_batch_size=positive("proj_max_batch_size", proj_max_batch_size),
        projector_seed=integer("projector_seed", projector_seed),
        damping=parse_damping(lambda_reg),
        non_finite=policy,
        selection=select_parameters(model, grad_wrt),
    )


def parse_save_dir(save_dir: object) -> Path:
    """Make the path of the store absolute.

    Returns:
        The path; nothing needs to be there.

    Raises:
        OptionError: If it cannot be a path.
    """
    try:
        return Path(save_dir).resolve()  # type: ignore[arg-type]
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise OptionError(
            f"save_dir={save_dir!r} cannot be a directory: {error}."
        ) from error


def integer(name: str, value: object) -> int:
    """Parse a whole number.

    Returns:
        The number as an int.

    Raises:
        OptionError: If it is none; a bool is none.
    """
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        with contextlib.suppress(TypeError):  # tensors and arrays of something else
            return operator.index(value)
    raise OptionError(f"{name} must be a whole number; got {value!r}.")


def positive(name: str, value: object) -> int:
    """Parse a whole number of at least one.

    Returns:
        The number as an int.

    Raises:
        OptionError: If it is not.
    """
    number = integer(name, value)
    if number < 1:
        raise OptionError(f"{name} must be at least 1; got {number}.")
    return number


def parse_device(
    model: torch.nn.Module, device: str | torch.device | None
) -> torch.device:
    """Find where the model is, and check that this is where it was asked to run.

    Returns:
        The device of the model's parameters.

    Raises:
        OptionError: If the model has no parameters or no values, or is on another
            device.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise OptionError(
            "model has no parameters, so there is nothing to attribute to."
        )
    if parameter.is_meta:
        raise OptionError(
            "model is on the meta device, where no checkpoint can be loaded into it; "
            "move it first, e.g. with model.to_empty(device='cpu')."
        )
    if device is None:
        return parameter.device
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(
            f"device={device!r} is not a device; the model is on {parameter.device}."
        ) from error
    same_index = asked.index in (None, parameter.device.index)
    if asked.type != parameter.device.type or not same_index:
        raise OptionError(
            f"device={str(asked)!r}, but the model is on {parameter.device}; move the "
            f"model with model.to({str(asked)!r}), or leave device out."
        )
    return parameter.device


def parse_rows(
    inds: object, num_samples: object, size: int, cursor: int, total: int, what: str
) -> Int64[np.ndarray, " b"]:
    """Find which rows of the store a batch is for.

    Args:
        inds: Row numbers, one for each example, in any order; or None.
        num_samples: Number of examples, for the next rows in order; or None.
        size: Number of examples found in the batch.
        cursor: The next row in order.
        total: Number of rows there are.
        what: What the rows are, for messages.

    Returns:
        The row of each example of the batch. Shape ``(b,)``.

    Raises:
        BatchError: If they do not fit the batch or the store.
    """
    if inds is not None and num_samples is not None:
        raise BatchError(
            "Exactly one of num_samples and inds should be given; both were. With inds, "
            "the number of samples is their number."
        )
    if size == 0:
        raise BatchError("The batch is empty; pass at least one example, or skip it.")
    if inds is None:
        count = size if num_samples is None else integer("num_samples", num_samples)
        if count != size:
            raise BatchError(f"num_samples={count}, but the batch has {size} examples.")
        if cursor + size > total:
            raise BatchError(
                f"This batch of {size} would be {what}s {cursor} to {cursor + size - 1}, "
                f"but there are only {total}. Was a loader gone through twice? Load the "
                f"checkpoint again to start over, or pass inds."
            )
        return np.arange(cursor, cursor + size, dtype=np.int64)
    return _check_inds(inds, size, total, what)


def _check_inds(
    inds: object, size: int, total: int, what: str
) -> Int64[np.ndarray, " b"]:
    if isinstance(inds, Tensor):
        inds = inds.cpu()
    elif isinstance(inds, Iterable) and not isinstance(inds, Sequence | np.ndarray):
        inds = list(inds)  # NumPy takes a generator or a set for one object
    try:
        array = np.asarray(inds)
    except ValueError as error:
        raise BatchError(f"inds must be whole numbers; got {inds!r}.") from error
    if array.size != size:
        raise BatchError(
            f"inds has {array.size} entries, but the batch has {size} examples."
        )
    if array.dtype.kind not in "iu":
        raise BatchError(f"inds must be whole numbers; got {array.dtype}.")
    rows = array.reshape(-1).astype(np.int64)
    if rows.min() < 0 or rows.max() >= total:
        bad = rows[(rows < 0) | (rows >= total)][0]
        raise BatchError(f"inds has {bad}, but the {what}s are 0 to {total - 1}.")
    values, counts = np.unique(rows, return_counts=True)
    if counts.max() > 1:
        raise BatchError(
            f"inds has {values[counts > 1][0]} more than once in one batch; each row can "
            f"be written only once."
        )
    return rows


def parse_model_ids(model_ids: Iterable[int] | None, known: Iterable[int]) -> list[int]:
    """Turn the façade's ``model_ids`` into a list without repetitions.

    Returns:
        The ids asked for, or all known ones in order.
    """
    if model_ids is None:
        return sorted(known)
    if isinstance(model_ids, SupportsIndex):
        model_ids = [operator.index(model_ids)]
    return list(dict.fromkeys(integer("model_ids", i) for i in model_ids))
