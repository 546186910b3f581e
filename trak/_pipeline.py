"""From a batch to projected gradients and out-to-loss weights, and who is to blame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from trak._batches import copied, describe_value, row_leaves, take
from trak._outputs import compute_outputs
from trak._params import Selection, first_non_finite
from trak._types import Batch
from trak.errors import GradientError, NonFiniteError, TaskError
from trak.gradient_computers import AbstractGradientComputer
from trak.projectors import AbstractProjector, AdditiveProjector


class Computed(NamedTuple):
    """What a batch came to."""

    rows: Float32[Tensor, "b p"]
    """The projected gradients; NaN where one is not finite."""

    weights: Float32[Tensor, "b 1"] | None
    """The out-to-loss weights, if they were wanted."""

    outputs: Float64[Tensor, " b"] | None
    """The model's outputs, if they were wanted."""


class ProjectingSink:
    """Projects the gradients of a batch as they come, and keeps the sketch.

    Args:
        projector: A projector whose sketches add up.
        model_id: The checkpoint the gradients are of.
        names: What the projector knows each parameter by.
        b: Number of examples.
        dtype: Type to sum in, float32 or float64.
        device: Where the gradients are.

    Attributes:
        rows: The sketch so far. Shape ``(b, p)``.
    """

    def __init__(
        self,
        projector: AdditiveProjector,
        model_id: int,
        names: Mapping[str, str],
        b: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._projector, self._model_id, self._names = projector, model_id, names
        dtype = torch.promote_types(
            dtype, torch.promote_types(projector.dtype, torch.float32)
        )
        self.rows = torch.zeros(b, projector.proj_dim, dtype=dtype, device=device)

    @property
    def block_bytes(self) -> int:
        """How many bytes of gradients the projector likes at once."""
        return self._projector.block_bytes

    def add(
        self,
        parameter: str,
        rows: slice,
        grads: Float[Tensor, "k w"],
        offset: int = 0,
    ) -> None:
        """Add the sketch of some coordinates of a parameter, for some examples."""
        self._projector.project_into(
            self.rows[rows], grads, self._model_id, self._names[parameter], offset
        )

    def add_segments(
        self,
        parameter: str,
        grads: Float[Tensor, "k w"],
        examples: Int64[Tensor, " k"],
        positions: Int64[Tensor, " k"],
    ) -> None:
        """Add the sketch of runs of coordinates of a parameter."""
        name = self._names[parameter]
        self._projector.project_segments_into(
            self.rows, grads, examples, positions, self._model_id, name
        )

    def clear(self) -> None:
        """Forget what was added."""
        self.rows.zero_()


def _adds_up(projector: AdditiveProjector) -> bool:
    """Tell whether a projector's sums of pieces are its sketches of whole gradients.

    With a ``project`` of its own it wants to see whole gradients, and with a
    ``project_into`` of its own it does not know of runs.

    Returns:
        Whether they are.
    """
    names = ("project", "project_into", "project_segments_into")
    project, into, runs = (
        name in vars(projector)
        or getattr(type(projector), name) is not getattr(AdditiveProjector, name)
        for name in names
    )
    return not project and (runs or not into)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What turns an example into a row, for one checkpoint."""

    computer: AbstractGradientComputer
    projector: AbstractProjector
    selection: Selection
    model_id: int
    proj_dim: int
    scale: float
    """What projected gradients are divided by: the square root of ``d``."""

    what: str
    """``"training example"`` or ``"target"``, for messages."""

    weighted: bool
    """Whether to ask the task for out-to-loss weights, which checks the labels too."""

    measured: bool = False
    """Whether the model's outputs are wanted."""

    def compute(self, batch: Batch, size: int) -> Computed:
        """Compute the rows of a batch, and what else is wanted of it.

        Args:
            batch: The examples.
            size: Their number, ``b``.

        Returns:
            The rows of shape ``(b, p)``; the weights of shape ``(b, 1)`` and the outputs
            of shape ``(b,)``, or None.
        """
        # An engine that streams knows the model's output after the gradients; for the
        # others the weights come first, as they check the labels.
        if isinstance(self.projector, AdditiveProjector) and self.streams:
            rows, outputs = self._streamed(batch, size, self.projector)
            weights = self.out_to_loss(batch, size) if self.weighted else None
            found = outputs.detach().cpu().double() if self.measured else None
            return Computed(rows, weights, found)
        weights = self.out_to_loss(batch, size) if self.weighted else None
        rows = self.rows(batch, size)
        return Computed(rows, weights, self._outputs(batch) if self.measured else None)

    def _outputs(self, batch: Batch) -> Float64[Tensor, " b"]:
        return compute_outputs(self.computer, copied(batch))

    def rows(self, batch: Batch, size: int) -> Float32[Tensor, "b p"]:
        r"""Compute :math:`P^\top \nabla f(z_i) / \sqrt{d}` for every example of a batch.

        Args:
            batch: The examples.
            size: Their number, ``b``.

        Returns:
            The rows; NaN where a gradient is not finite. Shape ``(b, p)``.

        Raises:
            GradientError: If gradients or projections do not have the right shape.
        """
        if isinstance(self.projector, AdditiveProjector) and self.streams:
            return self._streamed(batch, size, self.projector)[0]
        blocks = getattr(self.computer, "per_sample_grad_blocks", None)
        whole = self.computer.compute_per_sample_grad
        batch = copied(batch)
        grads = blocks(batch) if blocks else [whole(batch=batch)]
        pieces = []
        by_parameter = getattr(self.projector, "by_parameter", False)
        for block in grads:
            if by_parameter and isinstance(block, Tensor):
                block = self.selection.split(block)
            if isinstance(block, Mapping) and self.selection.canonical:
                names = self.selection.identities
                block = {names.get(key, key): grad for key, grad in block.items()}
            pieces.append(self.projector.project(block, model_id=self.model_id))
        rows = torch.cat(pieces).detach()
        if rows.shape != (size, self.proj_dim):
            raise GradientError(
                f"{type(self.projector).__name__} gave rows of shape {tuple(rows.shape)} "
                f"for a batch of {size}; ({size}, {self.proj_dim}) is needed."
            )
        return rows.float() / self.scale

    def _streamed(
        self, batch: Batch, size: int, projector: AdditiveProjector
    ) -> tuple[Float32[Tensor, "b p"], Float[Tensor, " b"]]:
        """Project gradients piece by piece, without ever holding one example's."""
        computer: Any = self.computer
        # What is made in inference mode cannot be added to outside of it.
        with torch.inference_mode(mode=False):
            device = row_leaves(batch)[0].device
            dtype = computer.sum_dtype
            names = self.selection.identities
            sink = ProjectingSink(projector, self.model_id, names, size, dtype, device)
            outputs = computer.stream_per_sample_grads(batch, sink)
            sink.rows[~torch.isfinite(outputs)] = torch.nan
        return sink.rows.float() / self.scale, outputs

    @property
    def streams(self) -> bool:
        """Whether gradients can go to the projector piece by piece."""
        projector = self.projector
        return (
            getattr(self.computer, "stream_per_sample_grads", None) is not None
            and isinstance(projector, AdditiveProjector)
            and _adds_up(projector)
            and projector.grad_dim == self.selection.grad_dim
            and projector.proj_dim == self.proj_dim
            and projector.device.type
            == next(self.computer.model.parameters()).device.type
        )

    def out_to_loss(self, batch: Batch, size: int) -> Float32[Tensor, "b 1"]:
        """Compute the out-to-loss weight of every example of a batch.

        Args:
            batch: The examples.
            size: Their number, ``b``.

        Returns:
            The weights. Shape ``(b, 1)``.

        Raises:
            TaskError: If the task gives another number of them.
        """
        weights: object = self.computer.compute_loss_grad(copied(batch))
        if isinstance(weights, Tensor) and weights.shape in {(size,), (size, 1)}:
            return weights.detach().reshape(size, 1).float()
        raise TaskError(
            f"{type(self.computer.modelout_fn).__name__}.get_out_to_loss_grad gave "
            f"{describe_value(weights)} for a batch of {size}; a tensor of shape "
            f"({size}, 1) is needed."
        )

    def non_finite(
        self, batch: Batch, position: int, index: int, weight: Tensor | None
    ) -> NonFiniteError:
        """Say which example of a batch has a NaN or an infinity, and where.

        Args:
            batch: The examples.
            position: The example's position in it.
            index: Its row in the store.
            weight: Its out-to-loss weight, where there is one.

        Returns:
            The error to raise.
        """
        where, parameter = "its projected gradient", None
        if weight is not None and not torch.isfinite(weight).all():
            where = "its out-to-loss gradient"
        else:
            example = copied(take(batch, slice(position, position + 1)))
            grads = self.computer.compute_per_sample_grad(batch=example)
            if isinstance(grads, Tensor) and grads.shape[-1] == self.selection.grad_dim:
                grads = self.selection.split(grads)
            if not isinstance(grads, Tensor):
                parameter = first_non_finite(grads.items())
            if parameter:
                where = f"its gradient, first for the parameter {parameter!r}"
        remedy = "Check the example and the model's output for it"
        if self.what == "training example":
            remedy += ", or pass on_non_finite='skip' to leave such examples out"
        return NonFiniteError(
            f"{self.what} {index} has a NaN or an infinity in {where} (model id "
            f"{self.model_id}). {remedy}. Nothing of this batch was stored.",
            index=index,
            model_id=self.model_id,
            parameter=parameter,
        )
