"""Checks on per-sample gradients, and their flattening into columns."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from trak._types import Gradients
from trak.errors import BatchError, OptionError


def named_columns(grads: Gradients, grad_dim: int = 0) -> list[tuple[str, Tensor]]:
    """Flatten each parameter's gradients to ``(b, columns)``.

    Args:
        grads: Gradients by parameter, each ``(b, *shape)``, or one ``(b, d)`` tensor,
            which counts as one parameter without a name.
        grad_dim: Columns there must be in all; 0 for any number.

    Returns:
        Names and row-major ``(b, columns)`` tensors, detached from any graph, in the
        order given; views where the strides allow.

    Raises:
        BatchError: If there is no tensor, one has no batch axis or is not real
            floating-point, the batch sizes differ, or the columns are not ``grad_dim``.
    """
    named = dict(grads) if isinstance(grads, Mapping) else {"": grads}
    if not named:
        raise BatchError(
            "the gradients are an empty dict; pass at least one parameter's gradients"
        )
    if isinstance(grads, Tensor) and grads.ndim != 2:
        raise BatchError(
            f"gradients given as one tensor must have shape (b, d), got "
            f"{tuple(grads.shape)}"
        )
    columns = [(name, _flat(name, g)) for name, g in named.items()]
    sizes = {name: len(x) for name, x in columns}
    if len(set(sizes.values())) > 1:
        raise BatchError(
            f"the parameters' gradients must share one batch size, got {sizes}"
        )
    total = sum(x.shape[1] for _, x in columns)
    if grad_dim > 0 and total != grad_dim:
        raise BatchError(
            f"the gradients have {total} columns in {len(columns)} parameters, but "
            f"the projector was made for grad_dim={grad_dim}; make it with "
            f"grad_dim={total}, or pass the gradients it was made for"
        )
    return columns


def vectorized(
    columns: list[tuple[str, Tensor]],
) -> Shaped[Tensor, "b d"]:
    """Put the columns of all parameters side by side.

    Args:
        columns: What `named_columns` returned.

    Returns:
        One tensor; the only parameter's own where there is just one. Shape ``(b, d)``.
    """
    if len(columns) == 1:
        return columns[0][1]
    return torch.cat([x for _, x in columns], dim=1)


def check_device(device: torch.device, columns: list[tuple[str, Tensor]]) -> None:
    """Check that the gradients are where the projector was told it would run.

    Args:
        device: The projector's device; without an index it means any of its type.
        columns: What `named_columns` returned.

    Raises:
        OptionError: If a parameter's gradients are elsewhere.
    """
    for name, x in columns:
        # There is one CPU, with or without an index.
        same_index = device.type == "cpu" or device.index in {None, x.device.index}
        if x.device.type != device.type or not same_index:
            raise OptionError(
                f"the gradients{_of(name)} are on {x.device}, but the projector's "
                f"device is {device}; make the projector with device={str(x.device)!r}"
            )


def check_segments(
    out: Tensor, grads: Tensor, examples: Tensor, positions: Tensor
) -> None:
    """Check that segments fit each other and the sketch they are added to.

    Args:
        out: The sketch. Shape ``(b, p)``.
        grads: Gradients of each segment's coordinates. Shape ``(k, w)``.
        examples: The row of ``out`` that each segment belongs to. Shape ``(k,)``.
        positions: Where each segment begins. Shape ``(k,)``.

    Raises:
        BatchError: If they do not fit.
    """
    k = len(grads)
    if grads.ndim != 2 or examples.shape != (k,) or positions.shape != (k,):
        raise BatchError(
            f"segments need gradients of shape (k, w), and examples and positions of "
            f"shape (k,), got {tuple(grads.shape)}, {tuple(examples.shape)} and "
            f"{tuple(positions.shape)}"
        )
    for name, index in (("examples", examples), ("positions", positions)):
        if index.dtype != torch.int64:
            raise BatchError(f"{name} must be int64, got {index.dtype}")
    if k == 0:
        return
    ends = torch.stack([*examples.aminmax(), positions.amin()])
    low, high, position = ends.tolist()  # one transfer from another device
    if low < 0 or high >= len(out):
        raise BatchError(
            f"examples must be rows of out, 0 to {len(out) - 1}, got {low} to {high}"
        )
    if position < 0:
        raise BatchError(f"positions must be at least 0, got {position}")


def _flat(name: str, g: Tensor) -> Tensor:
    """Return one parameter's gradients flattened to ``(b, columns)``.

    Raises:
        BatchError: If they have no batch axis, or are not real floating-point.
    """
    if g.ndim == 0:
        raise BatchError(
            f"the gradients{_of(name)} have no batch axis; expected shape (b, ...)"
        )
    if not g.is_floating_point():
        raise BatchError(
            f"the gradients{_of(name)} have dtype {g.dtype}; expected a real "
            f"floating-point dtype"
        )
    return g.detach().reshape(len(g), math.prod(g.shape[1:]))


def _of(name: str) -> str:
    return f" of {name!r}" if name else ""
