"""The model's own outputs on a batch of targets, whatever computes its gradients."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float64
from torch import Tensor

from trak._batches import batch_size, describe_value
from trak._types import Batch
from trak.errors import TaskError, TrakError, TrakWarning
from trak.gradient_computers import AbstractGradientComputer

_TROUBLE = (
    TrakError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a task raises that cannot be called this way; 0.3.2 never called it so."""


def compute_outputs(
    computer: AbstractGradientComputer, batch: Batch
) -> Float64[Tensor, " b"]:
    """Compute the outputs of a batch; NaN, with a warning, if the task does not give them.

    Scores do without, and only cross-validation asks for them.

    Args:
        computer: What computes gradients.
        batch: The examples.

    Returns:
        The outputs, in float64 on the CPU. Shape ``(b,)``.
    """
    b = batch_size(batch)
    try:
        return _checked(computer.compute_outputs(batch), b)
    except _TROUBLE as error:
        task = type(computer.modelout_fn).__name__
        warnings.warn(
            f"The outputs of {task} on the targets cannot be computed without gradients "
            f"({type(error).__name__}: {error}), so they are kept as NaN, and "
            f"cross_validate cannot use them. Give the task get_outputs(model, weights, "
            f"buffers, batch), or {type(computer).__name__} compute_outputs(batch).",
            TrakWarning,
            stacklevel=2,
        )
        return torch.full((b,), torch.nan, dtype=torch.float64, device="cpu")


def _checked(outputs: object, b: int) -> Float64[Tensor, " b"]:
    if isinstance(outputs, Tensor) and outputs.shape in {(b,), (b, 1)}:
        return outputs.detach().reshape(b).cpu().double()
    raise TaskError(
        f"it gives {describe_value(outputs)} for {b} examples, not shape ({b},)"
    )
