"""Products with the Hessian or the Gauss-Newton matrix of a mean loss over batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trak._batches import batch_size, copied, describe_value
from trak._params import Selection
from trak._types import Batch
from trak.errors import NonFiniteError, OptionError, TaskError
from trak.methods._curvature_loss import MeanLoss, TrainingLoss


class Curvature(str, Enum):
    """Which second derivative of the training loss."""

    GGN = "ggn"
    """The generalised Gauss-Newton matrix: never negative."""

    HESSIAN = "hessian"
    """The Hessian: negative along some directions, unless at a minimum."""


class CurvatureProducts:
    r"""Products with the curvature of the mean training loss.

    The Hessian is :math:`\nabla^2_\theta L`, and the Gauss-Newton matrix (Schraudolph,
    2002; Martens, 2020, Section 8)

    .. math:: G = \frac1n \sum_i J_i^\top \, \nabla^2_o \ell_i \, J_i, \qquad
        J_i = \frac{\partial o_i}{\partial \theta}

    with the model's outputs :math:`o_i`. Both are formed by differentiating twice in
    reverse mode, which every model and every layer of PyTorch allows: the forward pass
    and the first backward pass are made once for all vectors of a call, and a vector
    takes two more.

    Args:
        model: The model, its checkpoint loaded, in evaluation mode.
        selection: The parameters.
        loss: The training loss; a plain function is enough for the Hessian.
        kind: Which curvature.

    Raises:
        OptionError: If a Gauss-Newton matrix is asked for and ``loss`` is not split.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        loss: TrainingLoss | MeanLoss,
        kind: Curvature,
    ) -> None:
        if kind is Curvature.GGN and not isinstance(loss, TrainingLoss):
            raise OptionError(
                "a Gauss-Newton matrix needs the loss split at the model's outputs; "
                "pass loss=TrainingLoss(outputs, losses), or curvature='hessian'."
            )
        named = dict(model.named_parameters())
        self._model, self._loss, self._kind = model, loss, kind
        self._parameters = [named[name] for name in selection.names]
        self._sizes = [value.numel() for value in self._parameters]

    def over(
        self, batches: Iterable[Batch], rows: Float[Tensor, "k d"]
    ) -> Float[Tensor, "k d"]:
        """Multiply rows with the curvature of the mean loss over batches.

        Args:
            batches: Examples, each weighted alike.
            rows: The vectors. Shape ``(k, d)``.

        Returns:
            The products. Shape ``(k, d)``.
        """
        total, n = torch.zeros_like(rows), 0
        for batch in batches:
            b = batch_size(batch)
            if b:
                total += b * self.of_batch(batch, rows)
                n += b
        return total / max(1, n)

    def of_batch(
        self, batch: Batch, rows: Float[Tensor, "k d"]
    ) -> Float[Tensor, "k d"]:
        """Multiply rows with the curvature of the mean loss of one batch.

        Args:
            batch: At least one example.
            rows: The vectors. Shape ``(k, d)``.

        Returns:
            The products. Shape ``(k, d)``.

        Raises:
            NonFiniteError: If one is not finite, though the vectors are.
            TaskError: If the loss is not a loss of these parameters.
        """
        product = self._ggn if self._kind is Curvature.GGN else self._hessian
        batch = copied(batch)  # for models that write to their inputs
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            made = [torch.cat(list(it)) for it in product(batch, self._split(rows))]
        found = torch.stack(made) if made else torch.zeros_like(rows)
        if not torch.isfinite(found).all() and torch.isfinite(rows).all():
            raise NonFiniteError(
                "the curvature of the training loss has a NaN or an infinity, though the "
                "model's outputs are finite: a second derivative is not, or overflows. "
                "Compute in a wider type, or pass another loss."
            )
        return found

    def _split(self, rows: Tensor) -> list[list[Tensor]]:
        pieces = zip(*torch.split(rows, self._sizes, dim=1), strict=True)
        # strict=True on rows: each has one piece a parameter.
        return [list(piece) for piece in pieces] if len(rows) else []

    def _ggn(
        self, batch: Batch, vectors: list[list[Tensor]]
    ) -> Iterator[Iterator[Tensor]]:
        loss = self._loss
        if not isinstance(loss, TrainingLoss):
            return
        b = batch_size(batch)
        outputs = loss.call(self._model, batch)
        if not outputs.requires_grad:
            raise TaskError(
                "outputs of the TrainingLoss do not depend on the selected parameters; "
                "call the model, and do not detach what it returns."
            )
        leaf = outputs.detach().requires_grad_()
        mean = loss.of_outputs(leaf, batch).sum() / b
        slope = _slope(mean, leaf)
        if not slope.requires_grad:  # a loss that is linear in the outputs
            yield from (iter(map(torch.zeros_like, v)) for v in _flat(vectors))
            return
        # J'u is linear in u, so its derivative along a vector v is J v.
        u = torch.zeros_like(outputs, requires_grad=True)
        pulled = self._gradients(outputs, u, create_graph=True)
        reached = [i for i, it in enumerate(pulled) if it.requires_grad]
        for vector in vectors:
            pushed = torch.autograd.grad(
                [pulled[i] for i in reached],
                u,
                [vector[i].view_as(pulled[i]) for i in reached],
                retain_graph=True,
            )
            curved = torch.autograd.grad(
                slope, leaf, pushed, retain_graph=True, materialize_grads=True
            )
            made = self._gradients(outputs, curved[0], create_graph=False)
            yield (it.reshape(-1) for it in made)

    def _hessian(
        self, batch: Batch, vectors: list[list[Tensor]]
    ) -> Iterator[Iterator[Tensor]]:
        loss = self._loss
        mean_loss = loss.mean if isinstance(loss, TrainingLoss) else loss
        mean = _scalar(mean_loss(self._model, batch))
        slopes = self._gradients(mean, torch.ones_like(mean), create_graph=True)
        reached = [i for i, it in enumerate(slopes) if it.requires_grad]
        if not reached:  # a loss that is linear in the parameters
            yield from (iter(map(torch.zeros_like, v)) for v in _flat(vectors))
            return
        for vector in vectors:
            made = torch.autograd.grad(
                [slopes[i] for i in reached],
                self._parameters,
                [vector[i].view_as(slopes[i]) for i in reached],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            yield (it.reshape(-1) for it in made)

    def _gradients(
        self, value: Tensor, along: Tensor, *, create_graph: bool
    ) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            value,
            self._parameters,
            along,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )


def _flat(vectors: list[list[Tensor]]) -> Iterator[list[Tensor]]:
    return ([piece.reshape(-1) for piece in vector] for vector in vectors)


def _slope(mean: Tensor, outputs: Tensor) -> Tensor:
    """Differentiate a mean loss by the outputs."""
    if mean.requires_grad:
        (slope,) = torch.autograd.grad(
            mean, outputs, create_graph=True, materialize_grads=True
        )
        return slope
    raise TaskError(
        "losses of the TrainingLoss do not depend on the outputs; compute them from "
        "their first argument, and do not detach it."
    )


def _scalar(value: object) -> Float[Tensor, ""]:
    """Refuse a mean loss that is none."""
    if not isinstance(value, Tensor) or value.ndim:
        raise TaskError(
            f"loss gave {describe_value(value)}; return the mean over the batch, one "
            f"number of shape (), for a loss of PyTorch with reduction='mean'."
        )
    if not value.requires_grad:
        raise TaskError(
            "loss does not depend on the selected parameters; call the model, and do not "
            "detach what it returns."
        )
    if not torch.isfinite(value):
        raise NonFiniteError(
            f"the mean loss of a training batch is {float(value.detach())}; leave such examples "
            f"out, or compute in a wider type."
        )
    return value
