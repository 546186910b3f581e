"""The projectors that keep every entry, and the dense ones that run on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trak._kernels.choice import Backend, Kernels
from trak._kernels.torch_segments import dense_segments_into
from trak._signs import (
    NORMALS_PER_DRAW,
    SIGNS_PER_DRAW,
    Key,
    dense_normals,
    dense_signs,
    stream_key,
)
from trak._types import Gradients
from trak.errors import BackendError, OptionError
from trak.projectors._base import (
    AbstractProjector,
    AdditiveProjector,
    ProjectionType,
    parse_projection_type,
)
from trak.projectors._gradients import named_columns, vectorized

_DENSE = (ProjectionType.normal, ProjectionType.rademacher)
# Tiles that stay in a core's share of the cache with what they are made from, which
# for normals is eight times the tile. Measured on two CPU cores: a factor of 4 either
# way costs 20 to 50 %.
_TILE_ENTRIES = {"rademacher": 2**20, "normal": 2**18}
_PER_DRAW = {"rademacher": SIGNS_PER_DRAW, "normal": NORMALS_PER_DRAW}


class NoOpProjector(AbstractProjector):
    """A projector that leaves gradients as they are, as one ``(b, d)`` tensor.

    Args:
        grad_dim: Gradient entries of one example; 0 if not known.
        proj_dim: 0, or ``grad_dim``.
        seed: Not used.
        proj_type: Not used.
        device: Not used; the gradients stay where they are.
        dtype: Not used; the gradients keep their dtype.
        block_size: Not used.
        max_batch_size: Not used.
        model_id: Not used.

    Raises:
        OptionError: If a dimension is negative, or both are given and differ.
    """

    def __init__(
        self,
        grad_dim: int = 0,
        proj_dim: int = 0,
        seed: int = 0,
        proj_type: str | ProjectionType = "na",
        device: str | torch.device = "cuda",
        *,
        dtype: torch.dtype | None = None,
        block_size: int | None = None,
        max_batch_size: int | None = None,
        model_id: int = 0,
    ) -> None:
        if min(grad_dim, proj_dim) < 0 or (grad_dim and proj_dim not in {0, grad_dim}):
            raise OptionError(
                f"NoOpProjector keeps every gradient entry, so proj_dim must be 0 or "
                f"grad_dim={grad_dim}, and neither negative; got proj_dim={proj_dim}"
            )
        super().__init__(grad_dim, proj_dim or grad_dim, seed, proj_type, device)

    def project(self, grads: Gradients, model_id: int) -> Tensor:
        """Return the gradients as one tensor.

        Args:
            grads: ``{parameter: (b, *shape)}``, or one ``(b, d)`` tensor.
            model_id: Not used.

        Returns:
            The gradients, in their dtype and on their device. Shape ``(b, d)``.

        Raises:
            BatchError: If the gradients do not fit each other or the dimension given.
        """
        return vectorized(named_columns(grads, self.proj_dim))

    def describe(self) -> str:
        """Say which numbers this projector makes.

        Returns:
            The same line for every instance.
        """
        return "identity"


class _DenseProjector(AdditiveProjector):
    """What the dense projectors share; `outputs` is how many are made at a time."""

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        dtype: torch.dtype,
        backend: str | Backend,
        *,
        outputs: int,
    ) -> None:
        law = parse_projection_type(proj_type, _DENSE)
        super().__init__(grad_dim, proj_dim, seed, law, device, dtype, backend=backend)
        self._outputs = min(outputs, proj_dim)

    def _law(self) -> str:
        return ProjectionType(self.proj_type).value

    def _choose(self, device: torch.device) -> tuple[Backend, Kernels | None]:
        if self.proj_type == ProjectionType.rademacher:
            return super()._choose(device)
        if self.backend not in {Backend.auto, Backend.torch}:
            raise BackendError(
                f"the {self.backend.value} kernels cannot sum normal entries; use "
                f"backend='auto' or 'torch', or proj_type='rademacher'"
            )
        return Backend.torch, None

    def _add(
        self,
        out: Float[Tensor, "b p"],
        x: Float[Tensor, "b k"],
        key: Key,
        offset: int,
    ) -> None:
        kernels = self._kernels(out.device)
        if kernels is None:
            dense_into(out, x, key, offset, self._law(), self._outputs)
        else:
            kernels.dense_into(out, x, key, offset)

    def _add_segments(
        self,
        out: Float[Tensor, "b p"],
        x: Float[Tensor, "k w"],
        examples: Int[Tensor, " k"],
        positions: Int[Tensor, " k"],
        key: Key,
    ) -> None:
        kernels = self._kernels(out.device)
        if kernels is None:
            dense_segments_into(out, x, examples, positions, key, self._law())
        else:
            kernels.dense_segments_into(out, x, examples, positions, key)


class BasicSingleBlockProjector(_DenseProjector):
    """The dense projection, all outputs at a time.

    The same entries as `BasicProjector`'s. Kept for 0.3.2's callers.

    Args:
        grad_dim: Gradient entries of one example.
        proj_dim: Projected entries of one example.
        seed: Any integer.
        proj_type: Standard normal or Rademacher.
        device: Where the gradients will be.
        dtype: float64 to sum float32 gradients in float64.
        model_id: The checkpoint whose matrix `generate_sketch_matrix` returns.
        block_size: Not used.
        max_batch_size: Not used; a batch may have any size.
        backend: What sums: ``"auto"``, ``"torch"``, ``"native"`` or ``"triton"``; signs
            only, but for torch operations. It changes rounding only.

    Raises:
        OptionError: If a dimension is below 1, or ``proj_type`` is not dense.
        UnknownNameError: If there is no back end of that name.
        BackendError: If one is asked for by name and cannot run.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
        model_id: int = 0,
        *,
        block_size: int | None = None,
        max_batch_size: int | None = None,
        backend: str | Backend = Backend.auto,
    ) -> None:
        super().__init__(
            grad_dim,
            proj_dim,
            seed,
            proj_type,
            device,
            dtype,
            backend,
            outputs=proj_dim,
        )
        self.model_id = model_id

    def generate_sketch_matrix(self) -> Float[Tensor, "d p"]:
        """Make the whole matrix that projects gradients given as one tensor.

        Returns:
            The entries for ``model_id``, float32. Shape ``(grad_dim, proj_dim)``.
        """
        key = stream_key(self.seed, self.model_id)
        outputs = range(self.proj_dim)
        return _entries(self._law(), key, 0, self.grad_dim, outputs, self.device)


class BasicProjector(_DenseProjector):
    """The dense projection, a block of outputs at a time.

    Its entries are made where they are used, a tile at a time, and dropped; so memory
    does not grow with ``grad_dim``. The cost is the generation of ``d * p`` entries a
    batch plus ``b * d * p`` multiply-adds; `SparseProjector` needs neither.

    Args:
        grad_dim: Gradient entries of one example.
        proj_dim: Projected entries of one example.
        seed: Any integer.
        proj_type: Standard normal or Rademacher.
        device: Where the gradients will be.
        block_size: Outputs whose entries are made together; rounding apart, it does
            not change the result.
        dtype: float64 to sum float32 gradients in float64.
        model_id: Not used; `project` is told.
        max_batch_size: Not used; a batch may have any size.
        backend: What sums: ``"auto"``, ``"torch"``, ``"native"`` or ``"triton"``; signs
            only, but for torch operations. It changes rounding only.

    Raises:
        OptionError: If a dimension or ``block_size`` is below 1, or ``proj_type`` is
            not dense.
        UnknownNameError: If there is no back end of that name.
        BackendError: If one is asked for by name and cannot run.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        block_size: int = 100,
        dtype: torch.dtype = torch.float32,
        model_id: int = 0,
        *,
        max_batch_size: int | None = None,
        backend: str | Backend = Backend.auto,
    ) -> None:
        if block_size < 1:
            raise OptionError(f"block_size must be at least 1, got {block_size}")
        super().__init__(
            grad_dim,
            proj_dim,
            seed,
            proj_type,
            device,
            dtype,
            backend,
            outputs=block_size,
        )
        self.block_size = self._outputs


def dense_into(
    out: Float[Tensor, "b p"],
    x: Float[Tensor, "b k"],
    key: Key,
    offset: int,
    law: str,
    block_size: int,
) -> None:
    """Add the dense sketch of some coordinates of one parameter.

    Computes ``out += x @ P[offset : offset + k]``, a tile of the matrix at a time.

    Args:
        out: Sketch to add to; sums run in its dtype. Shape ``(b, p)``.
        x: Gradients of the coordinates, upcast a tile at a time. Shape ``(b, k)``.
        key: The stream's key.
        offset: Position of the first column in the parameter.
        law: ``"normal"`` or ``"rademacher"``.
        block_size: Most outputs of a tile.
    """
    p = out.shape[1]
    stop = offset + x.shape[1]
    for first in range(0, p, block_size):
        outputs = range(first, min(first + block_size, p))
        block = out[:, first : outputs.stop]
        for lo, hi in _tiles(offset, stop, len(outputs), law):
            tile = _entries(law, key, lo, hi, outputs, out.device).to(out.dtype)
            block.addmm_(x[:, lo - offset : hi - offset].to(out.dtype), tile)


def _tiles(start: int, stop: int, width: int, law: str) -> Iterator[tuple[int, int]]:
    """Cut a range at multiples of whole draws, into tiles of bounded size.

    Yields:
        The first coordinate of a tile, and one past its last.
    """
    draws = max(1, _TILE_ENTRIES[law] // (width * _PER_DRAW[law]))
    length = draws * _PER_DRAW[law]
    while start < stop:
        end = min(stop, (start // length + 1) * length)
        yield start, end
        start = end


def _entries(
    law: str, key: Key, start: int, stop: int, outputs: range, device: torch.device
) -> Float[Tensor, "k j"]:
    """Return a tile of the dense matrix, float32."""
    make = dense_normals if law == "normal" else dense_signs
    return make(key, start, stop, outputs, device)
