"""The projectors that use the ``fast_jl`` extension, on CUDA only."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from trak._signs import stream_key
from trak._types import Gradients
from trak.errors import BackendError, OptionError
from trak.projectors._base import (
    AbstractProjector,
    ProjectionType,
    check_dimensions,
    parse_projection_type,
)
from trak.projectors._gradients import check_device, named_columns, vectorized

_LAWS: Final = (ProjectionType.normal, ProjectionType.rademacher)
_WIDTHS: Final = (8, 16, 32)
# Outputs of one thread block of fast_jl's kernel; other numbers are not filled.
_OUTPUTS: Final = 512
# Enough columns for every feature tile of the kernel, and not a multiple of its tiles.
_PROBE_COLUMNS: Final = 4099


class CudaProjector(AbstractProjector):
    """The dense projection by ``fast_jl``, on a CUDA device.

    Its random entries depend on the number of multiprocessors of the GPU, so its
    sketches are comparable only within one GPU model; those of `SparseProjector` and
    `BasicProjector` are the same everywhere. Constructing one projects a small random batch, because
    ``fast_jl`` built for another GPU returns zeros.

    Args:
        grad_dim: Gradient entries of one example.
        proj_dim: Projected entries of one example, a multiple of 512.
        seed: Any integer.
        proj_type: Standard normal or Rademacher.
        device: A CUDA device.
        max_batch_size: Most rows of one kernel launch, at least 8; a batch may have any
            size.
        dtype: Not used; the kernel sums in float32.
        block_size: Not used.
        model_id: Not used; `project` is told.

    Raises:
        BackendError: If the device is not CUDA, or ``fast_jl`` is missing or wrong.
        OptionError: If a dimension, ``proj_type`` or ``max_batch_size`` cannot work.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        max_batch_size: int = 32,
        *,
        dtype: torch.dtype | None = None,
        block_size: int | None = None,
        model_id: int = 0,
    ) -> None:
        check_dimensions(grad_dim, proj_dim)
        law = parse_projection_type(proj_type, _LAWS)
        if proj_dim % _OUTPUTS:
            raise OptionError(
                f"CudaProjector needs a proj_dim that is a multiple of {_OUTPUTS}, got "
                f"{proj_dim}; use the nearest multiple, or SparseProjector"
            )
        if max_batch_size < _WIDTHS[0]:
            raise OptionError(
                f"max_batch_size must be at least {_WIDTHS[0]}, got {max_batch_size}"
            )
        super().__init__(grad_dim, proj_dim, seed, law, _require_cuda(device))
        self.max_batch_size = max_batch_size
        self.num_sms = _multiprocessors(self.device)
        self._kernel = _Kernel(
            _load_fast_jl(), law.value, proj_dim, max_batch_size, self.num_sms
        )
        _prove(self._kernel, self.device)

    def project(self, grads: Gradients, model_id: int) -> Float[Tensor, "b p"]:
        """Project a batch of gradients.

        Args:
            grads: ``{parameter: (b, *shape)}``, or one ``(b, d)`` tensor.
            model_id: The checkpoint the gradients are of.

        Returns:
            The sketch, float32. Shape ``(b, p)``.

        Raises:
            BatchError: If the gradients do not fit each other or ``grad_dim``.
            OptionError: If they are not on the projector's device.
            BackendError: If the kernel cannot be launched.
        """
        columns = named_columns(grads, self.grad_dim)
        check_device(self.device, columns)
        return self._kernel(vectorized(columns), stream_key(self.seed, model_id).low)

    def describe(self) -> str:
        """Say which numbers this projector makes.

        Returns:
            Law, size, seed, and the multiprocessors that the entries depend on.
        """
        law = ProjectionType(self.proj_type).value
        return (
            f"fast_jl/{law} proj_dim={self.proj_dim} seed={self.seed} "
            f"multiprocessors={self.num_sms}"
        )


class ChunkedCudaProjector(AbstractProjector):
    """A projector of many columns as the sum of projectors of fewer.

    Columns are cut where the chunks end, within a parameter if need be.

    Args:
        projector_per_chunk: A projector for each chunk, all with the same number of
            outputs and each with its own seed.
        max_chunk_size: Most columns of a chunk.
        params_per_chunk: Columns of each chunk.
        feat_bs: Most rows projected together; a batch may have any size.
        device: Where the gradients will be.
        dtype: Dtype the gradients are converted to for the chunks' projectors.

    Raises:
        OptionError: If the chunks do not fit together.
    """

    def __init__(
        self,
        projector_per_chunk: Sequence[AbstractProjector],
        max_chunk_size: int,
        params_per_chunk: Sequence[int],
        feat_bs: int,
        device: str | torch.device,
        dtype: torch.dtype,
    ) -> None:
        sizes = list(params_per_chunk)
        _check_chunks(projector_per_chunk, sizes, max_chunk_size)
        if feat_bs < 1:
            raise OptionError(f"feat_bs must be at least 1, got {feat_bs}")
        first = projector_per_chunk[0]
        super().__init__(
            sum(sizes), first.proj_dim, first.seed, first.proj_type, device
        )
        self.projector_per_chunk = list(projector_per_chunk)
        self.max_chunk_size = max_chunk_size
        self.params_per_chunk = sizes
        self.feat_bs = feat_bs
        self.dtype = dtype

    def project(self, grads: Gradients, model_id: int) -> Float[Tensor, "b p"]:
        """Project a batch of gradients.

        Args:
            grads: ``{parameter: (b, *shape)}``, or one ``(b, d)`` tensor.
            model_id: The checkpoint the gradients are of.

        Returns:
            The sum of the chunks' sketches. Shape ``(b, p)``.

        Raises:
            BatchError: If the gradients do not fit each other or the chunks.
            OptionError: If they are not on the projector's device.
        """
        columns = named_columns(grads, self.grad_dim)
        check_device(self.device, columns)
        b = len(columns[0][1])
        # An empty batch still asks the chunks for the dtype of their sketch.
        starts = range(0, max(b, 1), self.feat_bs)
        return torch.cat([self._rows(columns, lo, model_id) for lo in starts])

    def free_memory(self) -> None:
        """Release what the chunks' projectors hold."""
        for projector in self.projector_per_chunk:
            projector.free_memory()

    def describe(self) -> str:
        """Say which numbers this projector makes.

        Returns:
            Every chunk's size and its projector's line.
        """
        chunks = zip(self.params_per_chunk, self.projector_per_chunk, strict=True)
        return "chunks: " + "; ".join(f"{k} of {p.describe()}" for k, p in chunks)

    def _rows(
        self, columns: list[tuple[str, Tensor]], lo: int, model_id: int
    ) -> Float[Tensor, "b p"]:
        """Return the sketch of the rows from ``lo``, ``feat_bs`` of them at most."""
        rows = [x[lo : lo + self.feat_bs] for _, x in columns]
        sketches: list[Tensor] = []
        start = 0
        for size, projector in zip(
            self.params_per_chunk, self.projector_per_chunk, strict=True
        ):
            chunk = _slice_columns(rows, start, start + size).to(self.dtype)
            sketches.append(projector.project(chunk, model_id=model_id))
            start += size
        total = sketches[0]
        for sketch in sketches[1:]:
            total = total + sketch
        return total


@dataclass(frozen=True, slots=True)
class _Kernel:
    """The functions of ``fast_jl`` as one that takes any batch and any scale."""

    module: Any
    law: str
    proj_dim: int
    max_rows: int
    multiprocessors: int

    def __call__(self, x: Float[Tensor, "b d"], seed: int) -> Float[Tensor, "b p"]:
        x = x.float()
        # The kernel rounds to float16, where gradients below 6e-8 vanish and above
        # 65504 overflow; a power of two a row is exact to apply and to undo.
        peak = x.abs().amax(dim=1, keepdim=True)
        exponent = torch.frexp(torch.where(peak.isfinite(), peak, 1.0)).exponent
        # Releases of torch whose ldexp multiplies by 2**exponent need that finite.
        exponent = exponent.clamp(-120, 120)
        scaled = torch.ldexp(x, -exponent)
        sketch = x.new_zeros((len(x), self.proj_dim))
        width = max(w for w in _WIDTHS if w <= self.max_rows)
        for lo in range(0, len(x), width):
            sketch[lo : lo + width] = self._launch(scaled[lo : lo + width], seed)
        return torch.ldexp(sketch, exponent)

    def _launch(self, x: Float[Tensor, "r d"], seed: int) -> Float[Tensor, "r p"]:
        width = min(w for w in _WIDTHS if w >= len(x))
        # Some versions read past the end of a batch that does not fill the launch.
        padded = torch.nn.functional.pad(x, (0, 0, 0, width - len(x))).contiguous()
        launch = getattr(self.module, f"project_{self.law}_{width}")
        try:
            sketch = launch(padded, self.proj_dim, seed, self.multiprocessors)
        except RuntimeError as error:
            if "too many resources requested" not in str(error):
                raise
            raise BackendError(
                f"fast_jl cannot launch its kernel for {width} rows on this GPU; pass "
                f"a max_batch_size below {width}, or use SparseProjector"
            ) from error
        rows: Tensor = sketch[: len(x)].float()
        return rows


def _prove(kernel: _Kernel, device: torch.device) -> None:
    """Check the kernel on a small random batch.

    Args:
        kernel: What to check.
        device: Where to run it.

    Raises:
        BackendError: If the result is not finite, of the right size, or repeatable.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, _PROBE_COLUMNS, generator=generator).to(device)
    first, again, alone = kernel(x, 1), kernel(x, 1), kernel(x[:1], 1)
    ratio = first.square().sum(1) / (kernel.proj_dim * x.square().sum(1))
    failure = None
    if not bool(first.isfinite().all()):
        failure = "returned values that are not finite"
    elif not bool(first.any()):
        failure = "returned only zeros"
    # A squared norm is off by sqrt(2 / 512) = 6 % in the mean.
    elif bool(((ratio - 1).abs() > 0.5).any()):
        failure = "returned projections of the wrong norm"
    elif not torch.equal(first, again):
        failure = "returned two results for one input"
    elif not torch.allclose(first[:1], alone, rtol=1e-3, atol=1e-2):
        failure = "returned a result that depends on the batch"
    if failure is not None:
        raise BackendError(
            f"fast_jl {failure} on a random batch; it may have been built for another "
            f"GPU or CUDA version. Rebuild it, or use SparseProjector, which needs no "
            f"extension"
        )


def _require_cuda(device: str | torch.device) -> torch.device:
    """Return a device parsed, if it is a CUDA device that can be used.

    Raises:
        BackendError: If it is not CUDA, or CUDA is not available.
    """
    parsed = torch.device(device)
    if parsed.type != "cuda":
        raise BackendError(
            f"CudaProjector needs a CUDA device, got {str(parsed)!r}; use "
            f"SparseProjector or BasicProjector there"
        )
    if not torch.cuda.is_available():
        raise BackendError(
            "CudaProjector needs CUDA, which this torch cannot use here; use "
            "SparseProjector or BasicProjector"
        )
    return parsed


def _multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _load_fast_jl() -> Any:
    """Return the ``fast_jl`` module.

    Raises:
        BackendError: If it cannot be imported.
    """
    try:
        return importlib.import_module("fast_jl")
    except ImportError as error:
        raise BackendError(
            f"CudaProjector needs the fast_jl extension, which cannot be imported "
            f"({error}); install it with `pip install fast_jl`, or use "
            f"SparseProjector, which needs no extension"
        ) from error


def _check_chunks(
    projectors: Sequence[AbstractProjector], sizes: list[int], max_chunk_size: int
) -> None:
    """Check that the chunks of a projection fit together.

    Raises:
        OptionError: If they do not.
    """
    if not sizes or len(projectors) != len(sizes):
        raise OptionError(
            f"there must be one projector per chunk and at least one chunk, got "
            f"{len(projectors)} projectors for {len(sizes)} chunks"
        )
    if max(sizes) > max_chunk_size or min(sizes) < 1:
        raise OptionError(
            f"every chunk must have between 1 and max_chunk_size={max_chunk_size} "
            f"columns, got {sizes}"
        )
    widths = {projector.proj_dim for projector in projectors}
    if len(widths) > 1:
        raise OptionError(
            f"the chunks' projectors must share one proj_dim, got {sorted(widths)}"
        )
    seeds = [projector.seed for projector in projectors]
    if len(set(seeds)) < len(seeds):
        raise OptionError(
            f"the chunks' projectors must have different seeds, or chunks share random "
            f"entries and their sketches do not add up; got {seeds}"
        )


def _slice_columns(rows: list[Tensor], start: int, stop: int) -> Float[Tensor, "b k"]:
    """Return columns ``start..stop`` of tensors side by side, without joining all."""
    parts: list[Tensor] = []
    at = 0
    for x in rows:
        lo, hi = max(start - at, 0), min(stop - at, x.shape[1])
        if lo < hi:
            parts.append(x[:, lo:hi])
        at += x.shape[1]
    return torch.cat(parts, dim=1)
