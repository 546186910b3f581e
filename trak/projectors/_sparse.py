"""The default projection: rotated sparse Johnson-Lindenstrauss sketches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trak._kernels.choice import Backend
from trak._kernels.plans import PlanCache
from trak._kernels.torch_segments import sparse_segments_into
from trak._signs import Key, block_sizes, sparse_rotations, sparse_signs
from trak.errors import OptionError
from trak.projectors._base import (
    BLOCK_BYTES,
    AdditiveProjector,
    ProjectionType,
    parse_projection_type,
)

DEFAULT_NONZEROS: Final = 4

# Coordinates sketched together: enough to hide the fixed cost of drawing their signs
# (it is half of the cost at 2**14), few enough that 32 transposed rows stay in a cache.
_PIECE: Final = 2**16
# Transposing is fastest at 32 rows on a CPU; elsewhere rows only bound memory.
_ROWS: Final = {"cpu": 32}
_ROWS_ELSEWHERE: Final = 256
_CACHE_BYTES: Final = 128 * 2**20
# What drawing the plan of a piece takes for a moment.
_DRAWING_BYTES: Final = 24 * 2**20
# Native kernels read gradients once, while they are still in a cache.
_NATIVE_BLOCK_BYTES: Final = 8 * 2**20


class SparseProjector(AdditiveProjector):
    r"""A sparse projection, with ``nonzeros`` entries a coordinate.

    The outputs are cut into :math:`s` blocks of :math:`m_r` outputs. Block :math:`r`
    adds every chunk of :math:`m_r` consecutive coordinates, each coordinate with a
    random sign and each chunk cyclically rotated by a random amount; entries are
    :math:`\pm\sqrt{p/s}`. This is Kane and Nelson's (2014) sparse sketch, except that
    two coordinates of one chunk never collide.

    :math:`⟨Px, Py⟩/p` estimates :math:`⟨x, y⟩` without bias, with variance

    .. math:: \sum_r \frac{1}{s^2 m_r} \sum_{i<j} (x_i y_j + x_j y_i)^2

    over pairs :math:`(i, j)` of coordinates in different chunks of block :math:`r`;
    a dense Rademacher projection has :math:`1/p` times the sum over all pairs. Time
    does not depend on :math:`p`; nothing of size :math:`d p` is made.

    Args:
        grad_dim: Gradient entries of one example.
        proj_dim: Projected entries of one example.
        seed: Any integer.
        proj_type: Sparse.
        device: Where the gradients will be.
        nonzeros: Blocks :math:`s`; ``proj_dim`` if that is smaller. More of them make
            large errors rarer where a few coordinates dominate, at a cost in
            proportion.
        dtype: float64 to sum float32 gradients in float64.
        backend: What sums: ``"auto"``, ``"torch"``, ``"native"`` or ``"triton"``. It
            changes rounding only.

    Raises:
        OptionError: If a dimension or ``nonzeros`` is below 1, or ``proj_type`` is not
            sparse.
        UnknownNameError: If there is no back end of that name.
        BackendError: If one is asked for by name and cannot run.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int = 0,
        proj_type: str | ProjectionType = ProjectionType.sparse,
        device: str | torch.device = "cpu",
        *,
        nonzeros: int = DEFAULT_NONZEROS,
        dtype: torch.dtype = torch.float32,
        backend: str | Backend = Backend.auto,
    ) -> None:
        law = parse_projection_type(proj_type, (ProjectionType.sparse,))
        super().__init__(grad_dim, proj_dim, seed, law, device, dtype, backend=backend)
        if nonzeros < 1:
            raise OptionError(f"nonzeros must be at least 1, got {nonzeros}")
        self.nonzeros = min(nonzeros, proj_dim)
        self._sizes = block_sizes(proj_dim, self.nonzeros)
        self._plans = PlanCache(_CACHE_BYTES)

    @property
    def block_bytes(self) -> int:
        """Bytes of gradients that `project_into` does best with at a time, about."""
        if self.running_backend() is Backend.native:
            return _NATIVE_BLOCK_BYTES
        return BLOCK_BYTES

    def free_memory(self) -> None:
        """Drop the cached signs and rotations; `project` draws them again."""
        self._plans.clear()

    def working_bytes(self, batch_size: int) -> int:
        """Estimate the most bytes that projecting a batch needs: result, cache, piece.

        Args:
            batch_size: Number of examples, ``b``.

        Returns:
            The bytes, without the gradients.
        """
        result = super().working_bytes(batch_size)
        backend = self.running_backend()
        if backend is Backend.native:
            outputs = self._sizes[0]
            chunks = self.nonzeros * -(-self.grad_dim // outputs)
            # Of a chunk, a bit for each sign, in pairs of words, and one for a rotation.
            return result + min(_CACHE_BYTES, 4 * chunks * (-(-outputs // 64) * 2 + 1))
        if backend is not Backend.torch:
            return result
        rows = min(batch_size, _ROWS.get(self.device.type, _ROWS_ELSEWHERE))
        plans = 8 * self.nonzeros * self.grad_dim  # a source and a sign for each
        piece = 4 * rows * min(self.grad_dim, max(_PIECE, self.proj_dim))
        drawn = min(plans, _CACHE_BYTES) + min(plans, _DRAWING_BYTES)
        return 2 * result + drawn + piece

    def _law(self) -> str:
        return f"{ProjectionType.sparse.value} nonzeros={self.nonzeros}"

    def _add(
        self,
        out: Float[Tensor, "b p"],
        x: Float[Tensor, "b k"],
        key: Key,
        offset: int,
    ) -> None:
        kernels = self._kernels(out.device)
        if kernels is None:
            sparse_into(out, x, key, offset, self._sizes, self._plans)
        else:
            kernels.sparse_into(out, x, key, offset, self._sizes, self._plans)

    def _add_segments(
        self,
        out: Float[Tensor, "b p"],
        x: Float[Tensor, "k w"],
        examples: Int[Tensor, " k"],
        positions: Int[Tensor, " k"],
        key: Key,
    ) -> None:
        kernels = self._kernels(out.device)
        add = sparse_segments_into if kernels is None else kernels.sparse_segments_into
        add(out, x, examples, positions, key, self._sizes)


def default_projector(
    grad_dim: int, proj_dim: int, seed: int = 0, device: str | torch.device = "cpu"
) -> SparseProjector:
    """Make the projector that is used where none is asked for.

    Args:
        grad_dim: Gradient entries of one example.
        proj_dim: Projected entries of one example.
        seed: Any integer.
        device: Where the gradients will be.

    Returns:
        A sparse projector with the default number of nonzeros.

    Raises:
        OptionError: If a dimension is below 1.
    """
    return SparseProjector(grad_dim, proj_dim, seed, device=device)


@dataclass(frozen=True, slots=True)
class _BlockPlan:
    """How one block of the outputs gathers its share of a piece of coordinates."""

    outputs: slice
    """The block's outputs."""

    sources: Int[Tensor, "m c"]
    """Which coordinate each output takes of each chunk, int32; the piece's length where
    the chunk's coordinate is outside the piece."""

    signs: Float[Tensor, "m c"]
    """Its sign, float32; 0 outside the piece."""


def sparse_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "b k"],
    key: Key,
    offset: int,
    sizes: tuple[int, ...],
    plans: PlanCache,
) -> None:
    """Add the sparse sketch of some coordinates of one parameter.

    Every output gathers its coordinates in a fixed order, so the result is the same on
    every run; there are no atomic additions.

    Args:
        out: Sketch to add to; sums run in its dtype. Shape ``(b, p)``.
        x: Gradients of the coordinates, upcast a piece at a time. Shape ``(b, k)``.
        key: The stream's key.
        offset: Position of the first column in the parameter.
        sizes: Outputs of each block.
        plans: Where the plans of pieces are kept.
    """
    b, k = x.shape
    rows = _ROWS.get(x.device.type, _ROWS_ELSEWHERE)
    total = out.new_zeros((out.shape[1], b))
    for start, stop in _pieces(offset, offset + k, max(_PIECE, sizes[0])):
        blocks = _kept_plan(plans, key, start, stop, sizes, x.device)
        # One row of zeros, for the sources outside the piece: a product with a zero
        # sign alone would turn an infinite gradient elsewhere into NaN.
        piece = out.new_zeros((stop - start + 1, min(rows, b)))
        for lo in range(0, b, rows):
            hi = min(lo + rows, b)
            columns = piece[:, : hi - lo]
            columns[:-1].copy_(x[lo:hi, start - offset : stop - offset].T)
            for block in blocks:
                total[block.outputs, lo:hi] += torch.nn.functional.embedding_bag(
                    block.sources,
                    columns,
                    mode="sum",
                    per_sample_weights=block.signs.to(out.dtype),
                )
    out.add_(total.T, alpha=math.sqrt(out.shape[1] / len(sizes)))


def _pieces(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a range of coordinates at multiples of a length.

    Yields:
        The first coordinate of a piece, and one past its last.
    """
    while start < stop:
        end = min(stop, (start // length + 1) * length)
        yield start, end
        start = end


def _kept_plan(
    plans: PlanCache,
    key: Key,
    start: int,
    stop: int,
    sizes: tuple[int, ...],
    device: torch.device,
) -> tuple[_BlockPlan, ...]:
    """Return the plan of a piece, drawn if it is not held.

    Drawing it costs a fifth of applying it to 32 gradients, and most of the time for a
    piece as small as a bias.
    """
    address = (key, start, stop, sizes, device)
    held: tuple[_BlockPlan, ...] | None = plans.get(address)
    if held is None:
        held = _plan(key, start, stop, sizes, device)
        plans.keep(address, held, _bytes(held))
    return held


def _bytes(plan: tuple[_BlockPlan, ...]) -> int:
    return sum(block.sources.nbytes + block.signs.nbytes for block in plan)


def _plan(
    key: Key, start: int, stop: int, sizes: tuple[int, ...], device: torch.device
) -> tuple[_BlockPlan, ...]:
    """Return how each block gathers the coordinates ``start..stop``."""
    signs = sparse_signs(key, start, stop, len(sizes), device)
    blocks: list[_BlockPlan] = []
    for size in sorted(set(sizes), reverse=True):
        same = range(sizes.index(size), sizes.index(size) + sizes.count(size))
        first, last = start // size, -(-stop // size)
        rotations = sparse_rotations(key, first, last, same, size, device).int()
        begins = torch.arange(
            first * size - start, stop - start, size, device=device, dtype=torch.int32
        )
        outputs = torch.arange(size, device=device, dtype=torch.int32)
        for r in same:
            sources = outputs[:, None] - rotations[r - same.start]
            # Add the size where negative, and then the position of the chunk.
            sources += (sources >> 31) & size
            sources += begins
            row = signs[r]
            if (first * size, last * size) != (start, stop):
                outside = (sources < 0) | (sources >= stop - start)
                sources.masked_fill_(outside, stop - start)
                row = torch.nn.functional.pad(row, (0, 1))
            taken = row.index_select(0, sources.flatten()).view(sources.shape)
            at = sum(sizes[:r])
            blocks.append(_BlockPlan(slice(at, at + size), sources, taken))
    return tuple(blocks)
