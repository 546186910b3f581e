"""Rules of the layers whose weight is a matrix that inputs meet row by row."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trak.gradient_computers._layer_rules_base import (
    LayerRule,
    SegmentRule,
    entries,
    itemsize,
    sum_leading,
    sum_positions,
)


class LinearRule(LayerRule):
    """``weight: (o, i)``, any number of positions between batch and features."""

    def bytes_per_example(
        self, module: Any, inputs: Tensor, output_grad: Tensor
    ) -> int:
        """Count the weight's gradient, and copies of what is not in its type."""
        weight = inputs.shape[-1] * output_grad.shape[-1]
        size = itemsize(inputs, output_grad)
        return size * (weight + entries(inputs) + entries(output_grad))

    def _least_ndim(self, module: Any) -> int:
        return 2

    def _form(
        self,
        module: Any,
        name: str,
        inputs: Tensor,
        output_grad: Tensor,
        dtype: torch.dtype,
    ) -> Float[Tensor, "b w"]:
        if name == "bias":
            return sum_leading(output_grad, 1, dtype)
        return outer_products(output_grad, inputs, dtype)


class TransposedLinearRule(LinearRule):
    """``weight: (i, o)``, as in the Conv1D layers of GPT-2."""

    def _form(
        self,
        module: Any,
        name: str,
        inputs: Tensor,
        output_grad: Tensor,
        dtype: torch.dtype,
    ) -> Float[Tensor, "b w"]:
        if name == "bias":
            return sum_leading(output_grad, 1, dtype)
        return outer_products(inputs, output_grad, dtype)


class EmbeddingRule(SegmentRule):
    """``weight: (rows, w)``; each id touches its own row."""

    parameters = ("weight",)
    takes_ids = True

    def segments(
        self, module: Any, inputs: Tensor, output_grad: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "k w"], Int64[Tensor, " k"], Int64[Tensor, " k"]]:
        """Pair every id that is not the padding's with its row of ``output_grad``.

        Args:
            module: The layer.
            inputs: Ids. Shape ``(b, ...)``.
            output_grad: Gradient of its output. Shape ``(b, ..., w)``.

        Returns:
            The rows, the example each belongs to, and the first coordinate each covers.
            Shapes ``(k, w)``, ``(k,)``, ``(k,)``.
        """
        w = output_grad.shape[-1]
        ids = inputs.detach().reshape(-1).to(torch.int64)
        dtype = torch.promote_types(output_grad.dtype, torch.float32)
        rows = output_grad.detach().reshape(len(ids), w).to(dtype)
        examples = torch.arange(len(inputs), device=ids.device)
        examples = examples.repeat_interleave(entries(inputs))
        if module.padding_idx is not None:
            kept = ids != module.padding_idx
            ids, rows, examples = ids[kept], rows[kept], examples[kept]
        return rows, examples, ids * w

    def bytes_per_example(
        self, module: Any, inputs: Tensor, output_grad: Tensor
    ) -> int:
        """Count the whole gradient, and the touched rows."""
        rows = len(module.weight) + 2 * entries(inputs)
        return itemsize(inputs, output_grad) * rows * output_grad.shape[-1]

    def _least_ndim(self, module: Any) -> int:
        return 1

    def _form(
        self,
        module: Any,
        name: str,
        inputs: Tensor,
        output_grad: Tensor,
        dtype: torch.dtype,
    ) -> Float[Tensor, "b w"]:
        b, w, count = len(inputs), output_grad.shape[-1], len(module.weight)
        rows, examples, positions = self.segments(module, inputs, output_grad)
        grads = rows.new_zeros(b * count, w)
        grads.index_add_(0, examples * count + positions // w, rows)
        return grads.reshape(b, count * w)


class PReLURule(LayerRule):
    """``weight: (1,)`` or ``(c,)``, the slope below zero, of all or of each channel."""

    parameters = ("weight",)

    def bytes_per_example(
        self, module: Any, inputs: Tensor, output_grad: Tensor
    ) -> int:
        """Count what is below zero, and its product with the gradient."""
        return 3 * itemsize(inputs, output_grad) * entries(inputs)

    def _least_ndim(self, module: Any) -> int:
        return 1 if module.weight.numel() == 1 else 2

    def _form(
        self,
        module: Any,
        name: str,
        inputs: Tensor,
        output_grad: Tensor,
        dtype: torch.dtype,
    ) -> Float[Tensor, "b w"]:
        slopes = inputs.to(dtype).clamp(max=0) * output_grad.to(dtype)
        if module.weight.numel() == 1:
            return slopes.reshape(len(slopes), entries(slopes)).sum(1, keepdim=True)
        return sum_positions(slopes, dtype)


def outer_products(
    left: Float[Tensor, "b ..."], right: Float[Tensor, "b ..."], dtype: torch.dtype
) -> Float[Tensor, "b w"]:
    """Compute ``b...o,b...i->boi``, flattened to one row for each example.

    Returns:
        The sums of outer products, in ``dtype``. Shape ``(b, o * i)``.

    Example:
        >>> outer_products(torch.ones(1, 2, 1), torch.ones(1, 2, 3), torch.float32)
        tensor([[2., 2., 2.]])
    """
    b, o, i = len(left), left.shape[-1], right.shape[-1]
    left, right = left.to(dtype), right.to(dtype)
    if left.ndim == 2:
        return (left[:, :, None] * right[:, None, :]).reshape(b, o * i)
    t = left.shape[1:-1].numel()
    left, right = left.reshape(b, t, o), right.reshape(b, t, i)
    return torch.bmm(left.mT, right).reshape(b, o * i)
