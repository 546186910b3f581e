"""Per-sample gradients multiplied with a matrix as they are formed, and never kept."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trak._batches import batch_size
from trak._linalg import spans
from trak._params import Selection
from trak._types import Batch
from trak.gradient_computers import HookGradientComputer

_RUNS = 1 << 24  # entries of the matrix that are gathered at once for runs


class ProductSink:
    """A sink that multiplies gradients with the rows of a matrix.

    Args:
        matrix: One vector a row, in the selection's order. Shape ``(k, d)``.
        selection: The parameters.
        b: Number of examples.

    Attributes:
        products: The products, complete when all gradients are there. Shape ``(b, k)``.
    """

    block_bytes = 1 << 24

    def __init__(
        self, matrix: Float[Tensor, "k d"], selection: Selection, b: int
    ) -> None:
        sizes = [math.prod(shape) for shape in selection.shapes]
        pieces = torch.split(matrix, sizes, dim=1)
        self._pieces = dict(zip(selection.names, pieces, strict=True))
        self.products = matrix.new_zeros(b, len(matrix))

    def add(
        self,
        parameter: str,
        rows: slice,
        grads: Float[Tensor, "k w"],
        offset: int = 0,
    ) -> None:
        """Add gradients of consecutive examples for some coordinates of a parameter."""
        piece = self._pieces[parameter][:, offset : offset + grads.shape[1]]
        self.products[rows] += grads.to(piece.dtype) @ piece.T

    def add_segments(
        self,
        parameter: str,
        grads: Float[Tensor, "k w"],
        examples: Int64[Tensor, " k"],
        positions: Int64[Tensor, " k"],
    ) -> None:
        """Add runs of coordinates of one parameter, each of some example."""
        piece = self._pieces[parameter]
        w = grads.shape[1]
        within = torch.arange(w, device=positions.device)
        step = max(1, _RUNS // max(1, w * len(piece)))
        for low, high in spans(len(grads), step):
            met = piece[:, positions[low:high, None] + within]
            made = torch.einsum("kw,mkw->km", grads[low:high].to(piece.dtype), met)
            self.products.index_add_(0, examples[low:high], made)

    def clear(self) -> None:
        """Forget everything that was added."""
        self.products.zero_()


def gradient_products(
    computer: HookGradientComputer, batch: Batch, matrix: Float[Tensor, "k d"]
) -> Float[Tensor, "b k"]:
    """Multiply the gradients of a batch with the rows of a matrix.

    Args:
        computer: Computes the gradients.
        batch: The examples.
        matrix: One vector a row. Shape ``(k, d)``.

    Returns:
        The products, NaN for an example whose output is not finite. Shape ``(b, k)``.
    """
    sink = ProductSink(matrix, computer.selection, batch_size(batch))
    outputs = computer.stream_per_sample_grads(batch, sink)
    sink.products[~torch.isfinite(outputs)] = torch.nan
    return sink.products
