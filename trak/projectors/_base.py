"""The projector seam: what every projector is, and what the additive ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trak._kernels.choice import Backend, Kernels, choose, parse_backend
from trak._signs import SCHEME, Key, stream_key
from trak._types import Gradients
from trak.errors import BatchError, OptionError, UnknownNameError
from trak.projectors._gradients import check_device, check_segments, named_columns

# Entries are made once for all rows of a piece, and small launches leave most of a GPU
# idle, so pieces should have many rows.
BLOCK_BYTES: Final = 256 * 2**20


class ProjectionType(str, Enum):
    """The law of a random projection's entries."""

    normal = "normal"
    """Independent standard normal entries."""

    rademacher = "rademacher"
    """Independent signs."""

    sparse = "sparse"
    """A few nonzero entries a coordinate: random signs at randomly rotated places."""


class AbstractProjector(ABC):
    """A linear map from gradients to fewer numbers, drawn anew for each checkpoint.

    Subclass it and implement `project`; the constructor only stores its arguments.

    Args:
        grad_dim: Gradient entries :math:`d` of one example.
        proj_dim: Projected entries :math:`p` of one example.
        seed: What the random entries are drawn from, together with the model id.
        proj_type: Law of the entries.
        device: Where the gradients will be.

    Attributes:
        grad_dim: As given.
        proj_dim: As given.
        seed: As given.
        proj_type: As given.
        device: As a `torch.device`.
    """

    by_parameter: ClassVar[bool] = False
    """Whether entries depend on parameters' names, so gradients should come by name."""

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
    ) -> None:
        self.grad_dim = grad_dim
        self.proj_dim = proj_dim
        self.seed = seed
        self.proj_type = proj_type
        self.device = torch.device(device)

    @abstractmethod
    def project(self, grads: Gradients, model_id: int) -> Tensor:
        """Project a batch of gradients.

        Args:
            grads: ``{parameter: (b, *shape)}``, or one ``(b, d)`` tensor.
            model_id: The checkpoint the gradients are of.

        Returns:
            The projected gradients. Shape ``(b, p)``.
        """

    def free_memory(self) -> None:  # noqa: B027  most projectors hold nothing
        """Release what a later `project` can make again."""

    def working_bytes(self, batch_size: int) -> int:
        """Estimate the most bytes that projecting a batch needs; here, for the result.

        Args:
            batch_size: Number of examples, ``b``.

        Returns:
            The bytes, without the gradients.
        """
        return 4 * batch_size * self.proj_dim

    def describe(self) -> str:
        """Say which numbers this projector makes.

        Returns:
            A line that is the same for projectors whose sketches can be compared, and
            that a store keeps to refuse any other.
        """
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        law = getattr(self.proj_type, "value", self.proj_type)
        return f"{kind} proj_type={law} proj_dim={self.proj_dim} seed={self.seed}"


class AdditiveProjector(AbstractProjector):
    """A projector whose random entries are addressed, so that sketches add up.

    The sketch of a set of parameters is the sum of the sketches of any partition of
    their coordinates, whatever the order, the batch or the device; so an engine may
    sketch gradients piece by piece with `project_into` and never hold a ``(b, d)``
    tensor. Entries have unit variance, so :math:`E⟨Px, Py⟩ = p⟨x, y⟩`.

    Sums run in float32, or in float64 where the gradients or ``dtype`` are float64.

    Args:
        grad_dim: Gradient entries :math:`d` of one example, at least 1.
        proj_dim: Projected entries :math:`p` of one example, at least 1.
        seed: Any integer.
        proj_type: Law of the entries.
        device: Where the gradients will be; it does not change the entries.
        dtype: float64 to sum float32 gradients in float64; a narrower dtype than
            float32 is accepted and changes nothing.
        backend: What sums: ``"auto"``, ``"torch"``, ``"native"`` or ``"triton"``. It
            changes rounding only.

    Attributes:
        backend: As given, as a `Backend`; `running_backend` tells which one runs.

    Raises:
        OptionError: If a dimension is below 1, or ``dtype`` is not floating-point.
        UnknownNameError: If there is no back end of that name.
        BackendError: If one is asked for by name and cannot run.
    """

    by_parameter: ClassVar[bool] = True

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: ProjectionType,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        backend: str | Backend = Backend.auto,
    ) -> None:
        check_dimensions(grad_dim, proj_dim)
        if not dtype.is_floating_point:
            raise OptionError(f"dtype must be floating-point, got {dtype}")
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)
        self.dtype = dtype
        self.backend = parse_backend(backend)
        if self.backend is not Backend.auto:
            self._kernels(self.device)

    @property
    def block_bytes(self) -> int:
        """Bytes of gradients that `project_into` does best with at a time, about."""
        return BLOCK_BYTES

    def running_backend(self, device: str | torch.device | None = None) -> Backend:
        """Tell which back end sums sketches.

        Args:
            device: Where the gradients are; None for the projector's device.

        Returns:
            The back end; never ``auto``.

        Raises:
            BackendError: If one was asked for by name and cannot run there.
            UnknownNameError: If the environment variable ``TRAK_BACKEND`` names none.
        """
        return self._choose(torch.device(self.device if device is None else device))[0]

    def project(self, grads: Gradients, model_id: int) -> Float[Tensor, "b p"]:
        """Project a batch of gradients.

        Args:
            grads: ``{parameter: (b, *shape)}``, or one ``(b, d)`` tensor. The columns
                must be ``grad_dim`` in all.
            model_id: The checkpoint the gradients are of.

        Returns:
            The sketch, float32, or float64 where the gradients or ``dtype`` are; on the
            device of ``grads``. Shape ``(b, p)``.

        Raises:
            BatchError: If the gradients do not fit each other or ``grad_dim``.
            OptionError: If they are not on the projector's device.
        """
        columns = named_columns(grads, self.grad_dim)
        check_device(self.device, columns)
        dtype = torch.promote_types(torch.float32, self.dtype)
        for _, x in columns:
            dtype = torch.promote_types(dtype, x.dtype)
        first = columns[0][1]
        out = first.new_zeros((len(first), self.proj_dim), dtype=dtype)
        for name, x in columns:
            self.project_into(out, x, model_id, name)
        return out

    def project_into(
        self,
        out: Tensor,
        grads: Tensor,
        model_id: int,
        parameter: str = "",
        offset: int = 0,
    ) -> None:
        """Add the contribution of some coordinates of one parameter to a sketch.

        Args:
            out: The sketch to add to, float32 or float64; sums run in its dtype. Shape
                ``(b, p)``.
            grads: Gradients of the coordinates ``offset..offset + k`` of the
                parameter's row-major flattening, on the device of ``out``. Shape
                ``(b, k)``.
            model_id: The checkpoint the gradients are of.
            parameter: The parameter's name.
            offset: Position of the first column in the parameter.

        Raises:
            BatchError: If the shapes do not fit, or ``out`` is narrower than float32.
            OptionError: If ``offset`` is negative.
        """
        self._check_sketch(out)
        if grads.ndim != 2 or len(out) != len(grads):
            raise BatchError(
                f"out must have shape (b, {self.proj_dim}) for gradients of shape "
                f"(b, k), got {tuple(out.shape)} for {tuple(grads.shape)}"
            )
        if offset < 0:
            raise OptionError(f"offset must be at least 0, got {offset}")
        if grads.numel() > 0:
            key = stream_key(self.seed, model_id, parameter)
            self._add(out, grads.detach(), key, offset)

    def project_segments_into(
        self,
        out: Tensor,
        grads: Tensor,
        examples: Tensor,
        positions: Tensor,
        model_id: int,
        parameter: str = "",
    ) -> None:
        """Add the contribution of scattered runs of coordinates of one parameter.

        For gradients that are zero nearly everywhere, as those of an embedding are: a
        segment is one example's gradient of a run of consecutive coordinates. Segments
        may repeat and overlap, and are added.

        Args:
            out: The sketch to add to, float32 or float64; sums run in its dtype. Shape
                ``(b, p)``.
            grads: Gradients of each segment's coordinates, on the device of ``out``.
                Shape ``(k, w)``.
            examples: The row of ``out`` that each segment belongs to, int64, on the
                same device. Shape ``(k,)``.
            positions: Where each segment begins in the parameter's row-major
                flattening, int64, on the same device. Shape ``(k,)``.
            model_id: The checkpoint the gradients are of.
            parameter: The parameter's name.

        Raises:
            BatchError: If the shapes do not fit, an index is not int64 or out of range,
                or ``out`` is narrower than float32.
        """
        self._check_sketch(out)
        check_segments(out, grads, examples, positions)
        if grads.numel() > 0:
            key = stream_key(self.seed, model_id, parameter)
            self._add_segments(out, grads.detach(), examples, positions, key)

    def describe(self) -> str:
        """Say which numbers this projector makes.

        Returns:
            Scheme, law, size and seed; not the device, block size or dtype, which
            change rounding only.
        """
        return f"{SCHEME}/{self._law()} proj_dim={self.proj_dim} seed={self.seed}"

    def _choose(self, device: torch.device) -> tuple[Backend, Kernels | None]:
        """Return what sums this projector's sketches on a device."""
        return choose(self.backend, device)

    def _kernels(self, device: torch.device) -> Kernels | None:
        """Return the kernels to use on a device; None for torch operations."""
        return self._choose(device)[1]

    @abstractmethod
    def _law(self) -> str:
        """Name the law of the entries, with every option that changes them."""

    @abstractmethod
    def _add(
        self,
        out: Float[Tensor, "b p"],
        x: Float[Tensor, "b k"],
        key: Key,
        offset: int,
    ) -> None:
        """Add the sketch of coordinates ``offset..offset + k`` to ``out``; none empty."""

    @abstractmethod
    def _add_segments(
        self,
        out: Float[Tensor, "b p"],
        x: Float[Tensor, "k w"],
        examples: Int[Tensor, " k"],
        positions: Int[Tensor, " k"],
        key: Key,
    ) -> None:
        """Add the sketch of segments to ``out``; there is one at least."""

    def _check_sketch(self, out: Tensor) -> None:
        """Check that sums can run in ``out``.

        Raises:
            BatchError: If it is narrower than float32, or not ``proj_dim`` wide.
        """
        if out.dtype not in {torch.float32, torch.float64}:
            raise BatchError(
                f"out has dtype {out.dtype}; sums need float32 or float64, so pass "
                f"such a tensor and convert it afterwards"
            )
        if out.ndim != 2 or out.shape[1] != self.proj_dim:
            raise BatchError(
                f"out must have shape (b, {self.proj_dim}), got {tuple(out.shape)}"
            )


def check_dimensions(grad_dim: int, proj_dim: int) -> None:
    """Check that there is something to project, and something to project to.

    Args:
        grad_dim: Gradient entries.
        proj_dim: Projected entries.

    Raises:
        OptionError: If either is below 1.
    """
    for name, value in (("grad_dim", grad_dim), ("proj_dim", proj_dim)):
        if value < 1:
            raise OptionError(f"{name} must be at least 1, got {value}")


def parse_projection_type(
    value: str | ProjectionType, known: tuple[ProjectionType, ...]
) -> ProjectionType:
    """Parse a projection type that a projector implements.

    Args:
        value: The type or its name.
        known: The types that the projector implements.

    Returns:
        The type.

    Raises:
        UnknownNameError: If it is none of ``known``.
    """
    for member in known:
        if value == member.value:
            return member
    names = ", ".join(repr(member.value) for member in known)
    got = repr(getattr(value, "value", value))
    raise UnknownNameError(f"proj_type must be one of {names} here, got {got}")
