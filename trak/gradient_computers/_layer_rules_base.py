"""What a layer rule is: the interface, and the types its products are made in.

The letters of the einsum equations: ``b`` examples, ``t`` positions, ``i`` and ``o``
inputs and outputs of a layer, ``g`` groups, ``k`` entries of a kernel's window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trak.errors import GradientError


class LayerRule(ABC):
    """Forms a layer's per-sample gradients from its input and its output's gradient.

    A rule has no state and touches neither hooks nor autograd. It holds for any slice
    of the batch, so its caller decides how much memory a call takes.
    """

    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """Names of the layer's own parameters that the rule covers."""

    takes_ids: ClassVar[bool] = False
    """Whether the layer's input is a tensor of integers."""

    def refusal(self, module: Any, inputs: Tensor, output_grad: Tensor) -> str | None:
        """Say why these inputs have no gradients by example.

        Args:
            module: The layer.
            inputs: What it was called with. Shape ``(b, ...)``.
            output_grad: Gradient of its output. Shape ``(b, ...)``.

        Returns:
            The reason, or None if the rule holds.
        """
        if self.takes_ids == inputs.is_floating_point():
            return f"its input is {inputs.dtype}"
        lowest = self._least_ndim(module)
        if inputs.ndim < lowest:
            return (
                f"its input of shape {tuple(inputs.shape)} has no batch dimension; "
                f"{lowest} dimensions are needed"
            )
        if len(inputs) != len(output_grad):
            return f"it makes {len(output_grad)} rows of {len(inputs)}"
        return None

    def per_sample(
        self,
        module: Any,
        inputs: Tensor,
        output_grad: Float[Tensor, "b ..."],
        wanted: frozenset[str],
    ) -> Iterator[tuple[str, Float[Tensor, "b w"]]]:
        """Form the gradients of every example, one parameter at a time.

        Args:
            module: The layer.
            inputs: What it was called with. Shape ``(b, ...)``.
            output_grad: Gradient of its output, in any floating type. Shape
                ``(b, ...)``.
            wanted: The layer's own names of the parameters to form.

        Yields:
            A parameter's name and its gradients, entries in the parameter's row-major
            order, in float64 if the inputs or the gradient are, else in float32. Shape
            ``(b, w)``. They may share memory with the arguments: read, do not write.
            Drop them before asking for more, and their memory is used again.

        Raises:
            GradientError: If these inputs have no gradients by example.
        """
        reason = self.refusal(module, inputs, output_grad)
        if reason is not None:
            raise GradientError(
                f"{type(module).__name__} has no layer rule for this call: {reason}. "
                f"Use a generic per-sample gradient for it."
            )
        inputs, output_grad = inputs.detach(), output_grad.detach()
        for name in self.parameters:
            if name in wanted:
                yield name, self._form_exactly(module, name, inputs, output_grad)

    def _form_exactly(
        self, module: Any, name: str, inputs: Tensor, output_grad: Tensor
    ) -> Tensor:
        dtype = wide_dtype(inputs, output_grad)
        kind = inputs.device.type
        if not torch.is_autocast_enabled(kind):
            return self._form(module, name, inputs, output_grad, dtype)
        with torch.autocast(kind, enabled=False):
            return self._form(module, name, inputs, output_grad, dtype)

    @abstractmethod
    def _least_ndim(self, module: Any) -> int:
        """Return the least number of dimensions of an input that has a batch."""

    @abstractmethod
    def _form(
        self,
        module: Any,
        name: str,
        inputs: Tensor,
        output_grad: Tensor,
        dtype: torch.dtype,
    ) -> Float[Tensor, "b w"]:
        """Form one parameter's gradients, computed and returned in ``dtype``."""

    @abstractmethod
    def bytes_per_example(
        self, module: Any, inputs: Tensor, output_grad: Tensor
    ) -> int:
        """Count the bytes that :meth:`per_sample` takes for each example.

        Args:
            module: The layer.
            inputs: What it was called with; only its type and shape matter.
            output_grad: Gradient of its output; likewise.

        Returns:
            Bytes of the largest parameter's gradients and of their temporaries.
        """


class SegmentRule(LayerRule):
    """A rule whose gradients are zero but for a few runs of coordinates."""

    @abstractmethod
    def segments(
        self, module: Any, inputs: Tensor, output_grad: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "k w"], Int64[Tensor, " k"], Int64[Tensor, " k"]]:
        """Form the runs of the weight's gradients that are not zero.

        Args:
            module: The layer.
            inputs: What it was called with. Shape ``(b, ...)``.
            output_grad: Gradient of its output. Shape ``(b, ...)``.

        Returns:
            The runs, float32 or float64; the example each belongs to; and the first
            coordinate each covers. Runs that meet add up. Shapes ``(k, w)``, ``(k,)``,
            ``(k,)``.
        """


def wide_dtype(inputs: Tensor, output_grad: Tensor) -> torch.dtype:
    """Choose the type to form gradients in: float32 or float64, never narrower.

    A product of two float16 or bfloat16 numbers is exact in float32, and cannot overflow
    there; in its own type it would.

    Returns:
        ``torch.float64`` if either is, else ``torch.float32``.

    Example:
        >>> wide_dtype(torch.ones(1).half(), torch.ones(1).bfloat16())
        torch.float32
    """
    double = torch.float64 in {inputs.dtype, output_grad.dtype}
    return torch.float64 if double else torch.float32


def itemsize(inputs: Tensor, output_grad: Tensor) -> int:
    """Count the bytes of an entry in :func:`wide_dtype`."""
    return wide_dtype(inputs, output_grad).itemsize


def entries(values: Tensor) -> int:
    """Count the entries of one example."""
    return values.shape[1:].numel()


def sum_positions(values: Tensor, dtype: torch.dtype) -> Float[Tensor, "b c"]:
    """Sum ``(b, c, *positions)`` over positions.

    Returns:
        The sums, in ``dtype``. Shape ``(b, c)``.

    Example:
        >>> sum_positions(torch.ones(1, 2, 3, 4), torch.float64)
        tensor([[12., 12.]], dtype=torch.float64)
    """
    if values.ndim == 2:
        return values.to(dtype)
    return values.sum(tuple(range(2, values.ndim)), dtype=dtype)


def sum_leading(values: Tensor, trailing: int, dtype: torch.dtype) -> Tensor:
    """Sum all dimensions between the first and the last ``trailing``; flatten those.

    Returns:
        The sums, in ``dtype``. Shape ``(b, w)``.

    Example:
        >>> sum_leading(torch.ones(1, 3, 4, 2), 1, torch.float64)
        tensor([[12., 12.]], dtype=torch.float64)
    """
    middle = tuple(range(1, values.ndim - trailing))
    total = values.sum(middle, dtype=dtype) if middle else values.to(dtype)
    return total.reshape(len(values), values.shape[-trailing:].numel())
