"""Where an engine puts gradients piece by piece: the interface, and one that keeps them."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trak._params import Selection


@runtime_checkable
class GradientSink(Protocol):
    """Takes the per-sample gradients of a batch in pieces, in any order.

    Pieces that meet add up; what no piece covers is zero.
    """

    @property
    def block_bytes(self) -> int:
        """How many bytes of gradients it likes at once."""

    def add(
        self,
        parameter: str,
        rows: slice,
        grads: Float[Tensor, "k w"],
        offset: int = 0,
    ) -> None:
        """Add gradients of consecutive examples for some coordinates of a parameter.

        Args:
            parameter: The parameter's name.
            rows: Which examples of the batch.
            grads: Their gradients; read, never written to. Shape ``(k, w)``.
            offset: Position of the first column in the parameter's row-major flattening.
        """

    def add_segments(
        self,
        parameter: str,
        grads: Float[Tensor, "k w"],
        examples: Int64[Tensor, " k"],
        positions: Int64[Tensor, " k"],
    ) -> None:
        """Add runs of coordinates of one parameter, each of some example.

        Args:
            parameter: The parameter's name.
            grads: The runs; read, never written to. Shape ``(k, w)``.
            examples: The example that each belongs to. Shape ``(k,)``.
            positions: Where each begins in the parameter's row-major flattening. Shape
                ``(k,)``.
        """

    def clear(self) -> None:
        """Forget everything that was added."""


class GradientCollector:
    """A sink that keeps the gradients themselves.

    Args:
        selection: The parameters that gradients may come for.
        b: Number of examples.
        dtype: Type of the gradients of parameters that none come for.
        device: Where they are.
    """

    block_bytes = 1 << 26  # pieces bound temporaries here, and nothing else

    def __init__(
        self, selection: Selection, b: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shapes = dict(zip(selection.names, selection.shapes, strict=True))
        self._b, self._dtype, self._device = b, dtype, device
        self._rows: dict[str, Tensor] = {}

    def add(
        self,
        parameter: str,
        rows: slice,
        grads: Float[Tensor, "k w"],
        offset: int = 0,
    ) -> None:
        """Add gradients of consecutive examples for some coordinates of a parameter."""
        columns = slice(offset, offset + grads.shape[1])
        self._of(parameter, grads.dtype)[rows, columns] += grads

    def add_segments(
        self,
        parameter: str,
        grads: Float[Tensor, "k w"],
        examples: Int64[Tensor, " k"],
        positions: Int64[Tensor, " k"],
    ) -> None:
        """Add runs of coordinates of one parameter, each of some example."""
        total = self._of(parameter, grads.dtype)
        first = examples * total.shape[1] + positions
        add_runs(total.view(-1), grads, first)

    def clear(self) -> None:
        """Forget everything that was added."""
        self._rows.clear()

    def gradients(self) -> dict[str, Tensor]:
        """Return ``{parameter: (b, *shape)}`` for all parameters of the selection."""
        return {
            name: self._of(name, self._dtype).reshape(self._b, *shape)
            for name, shape in self._shapes.items()
        }

    def _of(self, parameter: str, dtype: torch.dtype) -> Tensor:
        if parameter not in self._rows:
            w = math.prod(self._shapes[parameter])
            zeros = torch.zeros(self._b, w, dtype=dtype, device=self._device)
            self._rows[parameter] = zeros
        return self._rows[parameter]


def add_runs(
    total: Float[Tensor, " d"], runs: Float[Tensor, "k w"], first: Int64[Tensor, " k"]
) -> None:
    """Add runs of consecutive entries to a vector, in place.

    Args:
        total: The vector. Shape ``(d,)``.
        runs: What to add. Shape ``(k, w)``.
        first: Where each run begins. Shape ``(k,)``.

    Example:
        >>> total = torch.zeros(4)
        >>> add_runs(total, torch.ones(2, 2), torch.tensor([1, 2]))
        >>> total
        tensor([0., 1., 2., 1.])
    """
    entries = first[:, None] + torch.arange(runs.shape[1], device=first.device)
    total.index_add_(0, entries.reshape(-1), runs.reshape(-1).to(total.dtype))
