"""Rules of convolutions and transposed convolutions, in one, two and three dimensions.

With ``x`` the padded input of a convolution and ``s, r`` its stride and dilation,
``weight_grad[o, i, k] = sum_t output_grad[o, t] * x[i, s * t + r * k]``. A transposed
convolution is the same with input and output's gradient exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  PyTorch's own name for it
from jaxtyping import Float
from torch import Tensor

from trak._linalg import spans
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
        """Count the weight's gradient, and copies of the arguments."""
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
        """Count as :class:`ConvRule` does, with the arguments exchanged."""
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
    """Count what :func:`weight_grads` holds for one example, in its costliest form."""
    arguments = entries(inputs) + entries(output_grad)
    if inputs.device.type == "cpu":
        # oneDNN brings everything into its own layout; the tiles of what is unfolded are
        # as large for any number of examples.
        return 2 * (weight.numel() + arguments)
    windows = weight.shape[2:].numel() * output_grad.shape[2:].numel()
    return weight.numel() + 2 * arguments + inputs.shape[1] * windows


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
    b, i, o = len(inputs), inputs.shape[1], output_grad.shape[1]
    w = o * i // at.groups * math.prod(at.kernel)
    if b == 0 or w == 0:
        return inputs.new_zeros(b, w)
    if at.before != at.after:
        inputs = _padded(inputs, at)
        at = replace(at, before=(0,) * len(at.kernel), after=(0,) * len(at.kernel))
    if prefers_convolution(inputs, output_grad, at):
        return convolved(inputs, output_grad, at).reshape(b, w)
    left = output_grad.reshape(b, at.groups, o // at.groups, -1)
    if {*at.kernel, *at.stride} == {1} and not any(at.before):
        right = inputs.reshape(b * at.groups, i // at.groups, -1)
        return torch.bmm(left.flatten(0, 1), right.mT).reshape(b, w)
    return unfolded(windows_of(inputs, output_grad.shape[2:], at), left).reshape(b, w)


def prefers_convolution(inputs: Tensor, output_grad: Tensor, at: Windows) -> bool:
    """Tell whether oneDNN's weight gradient beats a product with unfolded windows.

    Microseconds an example of ResNet's float32 layers, one thread of a Sapphire Rapids,
    slices of 8 MiB of gradients, beside the summed gradient of one plain backward:

    ==================================  =====  ========  ==========
    layer                               plain  unfolded  convolved
    ==================================  =====  ========  ==========
    16 to 16, 3x3, 32 pixels               53       129          64
    64 to 64, 3x3, 32 pixels              524       650         566
    64 to 64, 3x3, 56 pixels             1419      1900        1473
    64 to 128, 3x3, 32 pixels            1019      1093        1061
    3 to 64, 7x7, 112 pixels             2245      3147        1951
    128 to 128, 3x3, 16 pixels            461       573         664
    256 to 256, 3x3, 14 pixels           1414      1582        2101
    512 to 512, 3x3, 4 pixels             639       646        1908
    256 of 1 each, 3x3, 14 pixels          65       230          62
    ==================================  =====  ========  ==========

    oneDNN pays for each entry of the weight to bring it from its own layout, 0.55 ns;
    unfolding pays for each entry of each window, 0.25 ns. So it is a matter of output
    channels against positions. Four channels a group suit oneDNN badly: 993 for 427.

    Returns:
        True on the CPU in float32 where there are more positions than 2.2 times the
        output channels of a group.
    """
    if inputs.device.type != "cpu" or inputs.dtype != torch.float32:
        return False
    mkldnn: Any = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return False
    if math.prod(at.kernel) == 1:
        return False
    channels = output_grad.shape[1] // at.groups
    if at.groups > 1 and 1 < channels < 8:
        return False
    return output_grad.shape[2:].numel() > 2.2 * channels


def convolved(inputs: Tensor, output_grad: Tensor, at: Windows) -> Tensor:
    """Let PyTorch form the weight's gradients: of examples as groups, or one by one.

    Returns:
        The gradients. Shape ``(b * o, i / groups, *kernel)``.
    """
    b, i, o = len(inputs), inputs.shape[1], output_grad.shape[1]
    narrow = i // at.groups

    def backward(x: Tensor, g: Tensor, groups: int) -> Tensor:
        weight = x.new_empty(g.shape[1], narrow, *at.kernel)
        zeros = [0] * len(at.kernel)
        found: Tensor = torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            None,
            at.stride,
            at.before,
            at.dilation,
            False,
            zeros,
            groups,
            [False, True, False],
        )[1]
        return found

    # Groups of few inputs have no good layout in oneDNN: 3493 for 1951 in the 7x7 layer.
    if at.groups == 1 and narrow < 8:
        rows = zip(inputs[:, None], output_grad[:, None], strict=True)
        return torch.cat([backward(x, g, 1) for x, g in rows])
    x = inputs.reshape(1, b * i, *inputs.shape[2:])
    g = output_grad.reshape(1, b * o, *output_grad.shape[2:])
    return backward(x, g, b * at.groups)


TILE_BYTES = 3 << 19
"""Unfolded windows on the CPU at once, for each thread: they should stay in its cache.

In 64 to 64 channels, 3x3, 32 pixels: 657 microseconds an example with 0.5 MiB, 647 with
1 MiB, 703 with 2 MiB, 1441 with whole slices of the batch; in 128 to 128, 16 pixels, 686,
634, 573 and 711.
"""


def unfolded(
    windows: Float[Tensor, "b i ..."], output_grad: Float[Tensor, "b g o t"]
) -> Float[Tensor, "b g o k"]:
    """Multiply the gradient with a copy of the windows, which are made tile by tile.

    Args:
        windows: As :func:`windows_of` views them, ``(b, i, *kernel, *positions)``.
        output_grad: Gradient of the output, channels by groups, positions flattened.

    Returns:
        The weight's gradients.
    """
    b, groups, o = output_grad.shape[:3]
    dims = (windows.ndim - 2) // 2
    first, inner = windows.shape[-dims], windows.shape[-dims:][1:].numel()
    k = windows.shape[1:-dims].numel() // groups
    together, rows = b, first
    if windows.device.type == "cpu":
        row_bytes = groups * k * inner * windows.itemsize
        rows = min(first, max(1, TILE_BYTES // row_bytes))
        together = max(torch.get_num_threads(), TILE_BYTES // (row_bytes * first))
        together = min(b, together)
    buffer = windows.new_empty(together * groups * k * rows * inner)
    grads = windows.new_empty(b, groups, o, k)
    for low, high in spans(b, together):
        out = grads[low:high].flatten(0, 1)
        for start, stop in spans(first, rows):
            part = windows[low:high].narrow(-dims, start, stop - start)
            tile = buffer[: part.numel()].view(part.shape).copy_(part)
            right = tile.view(len(out), k, -1).mT
            left = output_grad[low:high, ..., start * inner : stop * inner].flatten(
                0, 1
            )
            torch.baddbmm(out, left, right, beta=int(start > 0), out=out)
    return grads


def windows_of(
    inputs: Float[Tensor, "b i ..."], count: torch.Size, at: Windows
) -> Float[Tensor, "b i ..."]:
    """View the inputs, padded, as the windows that a convolution multiplies.

    Returns:
        A view. Shape ``(b, i, *kernel, *count)``.

    Example:
        >>> at = Windows((2,), (1,), (1,), (0,), (0,), 1)
        >>> windows_of(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.Size([2]), at)
        tensor([[[[1., 2.],
                  [2., 3.]]]])
    """
    padded = _padded(inputs, at).contiguous()
    b, i, *strides = padded.stride()
    return padded.as_strided(
        (*padded.shape[:2], *at.kernel, *count),
        (
            b,
            i,
            *[n * r for n, r in zip(strides, at.dilation, strict=True)],
            *[n * s for n, s in zip(strides, at.stride, strict=True)],
        ),
    )


def _padded(inputs: Tensor, at: Windows) -> Tensor:
    sides = [n for pair in zip(at.after, at.before, strict=True) for n in pair]
    return F.pad(inputs, sides[::-1]) if any(sides) else inputs
