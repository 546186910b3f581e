"""A task from plain functions, its out-to-loss derived by differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._batches import batch_size, canonical
from trak._types import Batch, Weights
from trak.errors import TaskError
from trak.modelout_functions._abstract import AbstractModelOutput
from trak.modelout_functions._calls import (
    LABEL_KEYS,
    as_batch,
    call_model,
    map_tensors,
    widen,
)

Measure = Callable[[Any, Batch], Tensor]
"""``(model_out, batch) -> (b,)``."""


class FunctionTask(AbstractModelOutput):
    r"""A task written as two functions of what the model returns.

    ``output`` gives :math:`f` and ``loss`` the training loss :math:`L`, one number an
    example, each from ``(model_out, batch)``. The out-to-loss weight follows from both
    by differentiating with respect to ``model_out`` :math:`= o`,

    .. math:: Q = -\frac{\langle \nabla_o L, \nabla_o f \rangle}
                        {\langle \nabla_o f, \nabla_o f \rangle},

    the slope of the loss along the direction in which :math:`o` moves :math:`f`. Where
    :math:`L` is a function of :math:`f` this is :math:`-\partial L / \partial f`
    exactly; elsewhere it is the best single number. Row ``i`` of either function must
    depend on row ``i`` of ``model_out`` only.

    Example:
        >>> task = FunctionTask(
        ...     output=lambda out, batch: out[:, 0],
        ...     loss=lambda out, batch: (out[:, 0] - batch[1]) ** 2 / 2,
        ... )
        >>> batch = torch.tensor([[2.0]]), torch.tensor([5.0])
        >>> task.get_out_to_loss_grad(torch.nn.Identity(), None, None, batch)
        tensor([[3.]])

    Args:
        output: The output to attribute.
        loss: The loss the model was trained with, unreduced.
        forward: ``(model, batch) -> model_out``, tensors in any nesting of tuples,
            lists and mappings. It may only call ``model``, which then runs with the
            weights at hand; it sees no attributes of it. By default the model gets all
            entries of a tuple batch but the last (a tuple of one whole), or of a
            mapping all but ``labels`` and ``label``.

    Attributes:
        output: The constructor's.
        loss: The constructor's.
        forward: The constructor's, or None for the default.
    """

    def __init__(
        self,
        output: Measure,
        loss: Measure,
        forward: Callable[[Callable[..., Any], Batch], Any] | None = None,
    ) -> None:
        self.output = output
        self.loss = loss
        self.forward = forward

    def get_output(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        *example: Any,
    ) -> Float[Tensor, ""]:
        """Compute ``output`` of one example.

        Returns:
            The output, differentiable. Shape ``()``.
        """
        return self.get_outputs(model, weights, buffers, as_batch(example))[0]

    def get_outputs(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, " b"]:
        """Compute ``output`` of a batch.

        Returns:
            The outputs, differentiable. Shape ``(b,)``.
        """
        batch = _containers(batch)
        model_out = self._call(model, weights, buffers, batch)
        return _measure("output", self.output, model_out, batch)

    def get_out_to_loss_grad(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, "b 1"]:
        """Derive the out-to-loss weights from ``output`` and ``loss``.

        Returns:
            The weights, detached, in float32 or wider; 0 where neither function
            changes with the model's output. Shape ``(b, 1)``.
        """
        batch = _containers(batch)
        with torch.no_grad():
            model_out = self._call(model, weights, buffers, batch)
        leaves: list[Tensor] = []

        def restart(tensor: Tensor) -> Tensor:
            leaf = tensor.detach()
            if leaf.is_floating_point():
                leaves.append(leaf.requires_grad_())
            return leaf

        with torch.enable_grad():
            model_out = map_tensors(model_out, restart)
            output = _measure("output", self.output, model_out, batch)
            loss = _measure("loss", self.loss, model_out, batch)
        return _out_to_loss(output, loss, leaves).unsqueeze(1)

    def _call(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Any:
        def functional(*args: Any, **kwargs: Any) -> Any:
            return call_model(model, weights, buffers, args, kwargs)

        forward = _default_forward if self.forward is None else self.forward
        return forward(functional, batch)


def _containers(batch: Batch) -> Batch:
    """Make the batch what one example with a batch axis would be."""
    batch = canonical(batch)
    return batch if isinstance(batch, list | tuple | dict) else (batch,)


def _default_forward(model: Callable[..., Any], batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        return model(**{k: v for k, v in batch.items() if k not in LABEL_KEYS})
    return model(*batch[:-1]) if len(batch) > 1 else model(*batch)


def _measure(
    name: str, function: Measure, model_out: Any, batch: Batch
) -> Float[Tensor, " b"]:
    values: Any = function(model_out, batch)
    b = batch_size(batch)
    if isinstance(values, Tensor) and values.shape == (b,):
        return values
    got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    raise TaskError(
        f"The {name} function of this FunctionTask returned {got} for {b} examples, not "
        f"shape ({b},); return one number an example, for a loss with reduction='none'."
    )


def _out_to_loss(
    output: Float[Tensor, " b"], loss: Float[Tensor, " b"], leaves: list[Tensor]
) -> Float[Tensor, " b"]:
    """Compute the displayed ``Q`` from graphs that start at ``leaves``."""
    along = torch.zeros_like(widen(output))  # <grad L, grad f>
    steepness = along.clone()  # <grad f, grad f>
    pulled = torch.zeros_like(along, dtype=torch.bool)
    gradients = _differentiate(output, leaves), _differentiate(loss, leaves)
    for leaf, by_output, by_loss in zip(leaves, *gradients, strict=True):
        if by_output is None and by_loss is None:
            continue
        f_rows = _rows(by_output, leaf, len(output))
        loss_rows = _rows(by_loss, leaf, len(output))
        along += (loss_rows * f_rows).sum(1)
        steepness += (f_rows * f_rows).sum(1)
        pulled |= (loss_rows != 0).any(1)
    flat = steepness == 0
    if (flat & pulled).any():
        raise TaskError(
            f"At position {int((flat & pulled).nonzero()[0])} of the batch the loss "
            f"changes with the model's output but `output` does not, so the loss is no "
            f"function of it; choose an output whose gradient does not vanish."
        )
    return torch.where(flat, 0.0, -along / torch.where(flat, 1.0, steepness))


def _differentiate(
    values: Float[Tensor, " b"], leaves: list[Tensor]
) -> list[Tensor | None]:
    """Differentiate every value by its own row of each tensor, None where unused."""
    if not leaves or not values.requires_grad:
        return [None] * len(leaves)
    ones = torch.ones_like(values)  # not values.sum(): that needs gradients enabled
    return list(torch.autograd.grad(values, leaves, ones, allow_unused=True))


def _rows(gradient: Tensor | None, leaf: Tensor, b: int) -> Float[Tensor, "b o"]:
    if leaf.ndim == 0 or len(leaf) != b:
        raise TaskError(
            f"A FunctionTask depends on a model output of shape {tuple(leaf.shape)}, "
            f"which is not one row for each of {b} examples; return batched tensors "
            f"from forward."
        )
    rows = torch.zeros_like(leaf) if gradient is None else gradient
    return widen(rows.reshape(b, math.prod(leaf.shape[1:])))
