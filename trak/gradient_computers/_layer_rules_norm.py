"""Rules of the normalisations: their weight scales a normalised input, entry by entry.

So a weight's gradient is the output's gradient times the normalised input, summed over
positions, and a bias's is the sum alone. The normalised input is computed again from the
saved one, in float32 or wider.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  PyTorch's own name for it
from jaxtyping import Float
from torch import Tensor

from trak.gradient_computers._layer_rules_base import (
    LayerRule,
    entries,
    itemsize,
    sum_leading,
    sum_positions,
)


class _FeatureNormRule(LayerRule):
    """``weight: normalized_shape``, the last dimensions of the input."""

    def bytes_per_example(
        self, module: Any, inputs: Tensor, output_grad: Tensor
    ) -> int:
        """Count the inputs in their wider type, normalised, and the product."""
        return 4 * itemsize(inputs, output_grad) * entries(inputs)

    def _least_ndim(self, module: Any) -> int:
        return len(module.normalized_shape) + 1

    def _form(
        self,
        module: Any,
        name: str,
        inputs: Tensor,
        output_grad: Tensor,
        dtype: torch.dtype,
    ) -> Float[Tensor, "b w"]:
        trailing = len(module.normalized_shape)
        if name == "bias":
            return sum_leading(output_grad, trailing, dtype)
        scaled = self._normalised(module, inputs, dtype).mul_(output_grad)
        return sum_leading(scaled, trailing, dtype)

    @abstractmethod
    def _normalised(self, module: Any, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a new tensor: the inputs as the layer scales them."""


class LayerNormRule(_FeatureNormRule):
    """``weight, bias: normalized_shape``."""

    def _normalised(self, module: Any, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        shape = module.normalized_shape
        return F.layer_norm(inputs.to(dtype), shape, None, None, module.eps)


class RMSNormRule(_FeatureNormRule):
    """``weight: normalized_shape``."""

    parameters = ("weight",)

    def _normalised(self, module: Any, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        if module.eps is None:  # PyTorch's choice of it depends on the inputs' type
            return F.rms_norm(inputs, module.normalized_shape).to(dtype)
        return F.rms_norm(inputs.to(dtype), module.normalized_shape, None, module.eps)


class _ChannelNormRule(LayerRule):
    """``weight, bias: (c,)``, the input's second dimension."""

    def bytes_per_example(
        self, module: Any, inputs: Tensor, output_grad: Tensor
    ) -> int:
        """Count the inputs in their wider type, normalised, and the product."""
        return 4 * itemsize(inputs, output_grad) * entries(inputs)

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
            return sum_positions(output_grad, dtype)
        normalised = self._normalised(module, inputs.to(dtype))
        return sum_positions(normalised.mul_(output_grad), dtype)

    @abstractmethod
    def _normalised(self, module: Any, inputs: Tensor) -> Tensor:
        """Return a new tensor: the inputs as the layer scales them."""


class GroupNormRule(_ChannelNormRule):
    """``weight, bias: (c,)``; statistics of each example and group of channels."""

    def _normalised(self, module: Any, inputs: Tensor) -> Tensor:
        if len(inputs) == 0:  # PyTorch refuses to normalise nothing
            return inputs.clone()
        return F.group_norm(inputs, module.num_groups, None, None, module.eps)


class BatchNormRule(_ChannelNormRule):
    """``weight, bias: (c,)``; the running statistics are constants."""

    def _normalised(self, module: Any, inputs: Tensor) -> Tensor:
        return _by_running_statistics(module, inputs)


class InstanceNormRule(_ChannelNormRule):
    """``weight, bias: (c,)``; statistics of each example and channel, or running."""

    def _least_ndim(self, module: Any) -> int:
        unbatched: int = module._get_no_batch_dim()
        return unbatched + 1

    def _normalised(self, module: Any, inputs: Tensor) -> Tensor:
        if module.training or not module.track_running_stats:
            return F.instance_norm(inputs, eps=module.eps)
        return _by_running_statistics(module, inputs)


def _by_running_statistics(module: Any, inputs: Tensor) -> Tensor:
    # The difference first: a mean far above the deviation would leave nothing but
    # rounding of the two sums' difference.
    shape = (1, -1, *[1] * (inputs.ndim - 2))
    mean = module.running_mean.to(inputs.dtype).reshape(shape)
    variance = module.running_var.to(inputs.dtype).reshape(shape)
    difference: Tensor = inputs - mean
    return difference.mul_(torch.rsqrt(variance + module.eps))
