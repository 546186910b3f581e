"""Rules of convolutions and transposed convolutions, in one, two and three dimensions.

With ``x`` the padded input of a convolution and ``s, r`` its stride and dilation,
``weight_grad[o, i, k] = sum_t output_grad[o, t] * x[i, s * t + r * k]``. A transposed
convolution is the same with input and output's gradient exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  PyTorch's own name for it
from jaxtyping import Float
from torch import Tensor

from trak.gradient_computers._layer_rules_base import (
    LayerRule,
    entries,
    itemsize,
    sum_positions,
)


@dataclass(frozen=True, slots=True)
class Windows:
    """Where a convolution's windows lie; every tuple has one entry a dimension."""

    kernel: tuple[int, ...]
    """Entries of a window."""
    stride: tuple[int, ...]
    """Distance of neighbouring windows."""
    dilation: tuple[int, ...]
    """Distance of neighbouring entries in a window."""
    before: tuple[int, ...]
    """Zeros in front of the input."""
    after: tuple[int, ...]
    """Zeros behind it; entries to leave out where negative."""
    groups: int
    """Groups of channels that do not meet."""


class ConvRule(LayerRule):
    """``weight: (o, i / groups, *kernel)``."""

    def bytes_per_example(
        self, module: Any, inputs: Tensor, output_grad: Tensor
    ) -> int:
        """Count the weight's gradient, and the input padded and unfolded."""
        return itemsize(inputs, output_grad) * _weight_grad_entries(
            module.weight, inputs, output_grad
        )

    def _least_ndim(self, module: Any) -> int:
        return int(module.weight.ndim)

    def _form(
        self,
        module: Any,
        name: str,
        inputs: Tensor,
        output_grad: Tensor,
        dtype: torch.dtype,
    ) -> Float[Tensor, "b w"]:
        if name == "bias":
            return sum_positions(output_grad, dtype)
        inputs, output_grad = inputs.to(dtype), output_grad.to(dtype)
        kernel, dilation = tuple(module.weight.shape[2:]), _per_dim(module, "dilation")
        if module.padding_mode != "zeros":
            sides = module._reversed_padding_repeated_twice
            inputs = F.pad(inputs, sides, mode=module.padding_mode)
            before = after = (0,) * len(kernel)
        elif module.padding == "same":
            both = [r * (k - 1) for k, r in zip(kernel, dilation, strict=True)]
            before = tuple(n // 2 for n in both)
            after = tuple(n - n // 2 for n in both)
        elif module.padding == "valid":
            before = after = (0,) * len(kernel)
        else:
            before = after = _per_dim(module, "padding")
        stride = _per_dim(module, "stride")
        windows = Windows(kernel, stride, dilation, before, after, module.groups)
        return weight_grads(inputs, output_grad, windows)


class ConvTransposeRule(LayerRule):
    """``weight: (i, o / groups, *kernel)``."""

    def bytes_per_example(
        self, module: Any, inputs: Tensor, output_grad: Tensor
    ) -> int:
        """Count the weight's gradient, and the output's padded and unfolded."""
        return itemsize(inputs, output_grad) * _weight_grad_entries(
            module.weight, output_grad, inputs
        )

    def _least_ndim(self, module: Any) -> int:
        return int(module.weight.ndim)

    def _form(
        self,
        module: Any,
        name: str,
        inputs: Tensor,
        output_grad: Tensor,
        dtype: torch.dtype,
    ) -> Float[Tensor, "b w"]:
        if name == "bias":
            return sum_positions(output_grad, dtype)
        kernel, dilation = tuple(module.weight.shape[2:]), _per_dim(module, "dilation")
        stride, before = _per_dim(module, "stride"), _per_dim(module, "padding")
        # So that the windows are as many as the inputs: output_padding and output_size
        # lengthen the output behind the last one, or in what padding took away.
        after = tuple(
            (t - 1) * s + r * (k - 1) + 1 - cut - size
            for t, s, r, k, cut, size in zip(
                inputs.shape[2:],
                stride,
                dilation,
                kernel,
                before,
                output_grad.shape[2:],
                strict=True,
            )
        )
        windows = Windows(kernel, stride, dilation, before, after, module.groups)
        return weight_grads(output_grad.to(dtype), inputs.to(dtype), windows)


def _per_dim(module: Any, name: str) -> tuple[int, ...]:
    value, dims = getattr(module, name), module.weight.ndim - 2
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _weight_grad_entries(weight: Tensor, inputs: Tensor, output_grad: Tensor) -> int:
    """Count what :func:`weight_grads` forms for one example, of whichever way."""
    windows = weight.shape[2:].numel() * output_grad.shape[2:].numel()
    unfolded = inputs.shape[1] * windows
    return weight.numel() + unfolded + 2 * entries(inputs) + entries(output_grad)


def weight_grads(
    inputs: Float[Tensor, "b i ..."], output_grad: Float[Tensor, "b o ..."], at: Windows
) -> Float[Tensor, "b w"]:
    """Compute ``bgit,bgot->bgoi`` with the windows of the inputs as ``i``.

    Args:
        inputs: A convolution's input.
        output_grad: Gradient of its output, of the same type.
        at: Where its windows lie.

    Returns:
        Gradients of its weight, ``(o, i / groups, *kernel)`` flattened.

    Example:
        >>> at = Windows((2,), (1,), (1,), (0,), (0,), 1)
        >>> weight_grads(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 2), at)
        tensor([[3., 5.]])
    """
    b, groups = len(inputs), at.groups
    left = output_grad.reshape(b * groups, output_grad.shape[1] // groups, -1)
    right = unfold(inputs, output_grad.shape[2:], at)
    right = right.reshape(b * groups, right.shape[1] // groups, -1)
    return torch.bmm(left, right.mT).reshape(b, left.shape[1] * groups * right.shape[1])


def unfold(
    inputs: Float[Tensor, "b i ..."], count: torch.Size, at: Windows
) -> Float[Tensor, "b k t"]:
    """Lay out the windows of the inputs, ``(i, *kernel)`` of each against positions.

    Returns:
        A copy. Shape ``(b, i * kernel, count)``, dimensions flattened.

    Example:
        >>> at = Windows((2,), (1,), (1,), (0,), (0,), 1)
        >>> unfold(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.Size([2]), at)
        tensor([[[1., 2.],
                 [2., 3.]]])
    """
    sides = [n for pair in zip(at.before, at.after, strict=True) for n in pair[::-1]]
    padded = F.pad(inputs, sides[::-1]) if any(sides) else inputs
    b, i, *strides = padded.stride()
    view = padded.as_strided(
        (*padded.shape[:2], *at.kernel, *count),
        (
            b,
            i,
            *[n * r for n, r in zip(strides, at.dilation, strict=True)],
            *[n * s for n, s in zip(strides, at.stride, strict=True)],
        ),
    )
    k = padded.shape[1] * torch.Size(at.kernel).numel()
    return view.reshape(len(padded), k, count.numel())
