"""Influence functions with eigenvalue-corrected Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trak._batches import batch_size, copied, take
from trak._options import integer
from trak._types import Batch, GradWrt
from trak.errors import GradientError, OptionError
from trak.gradient_computers import HookGradientComputer
from trak.gradient_computers._copies import Nowhere
from trak.methods._choices import parse_name
from trak.methods._curvature_loss import TrainingLoss, loss_of_task
from trak.methods._curvature_method import CurvatureMethod, Members
from trak.methods._kronecker import (
    covariance,
    eigenbasis,
    precondition,
    squared_rotated,
)
from trak.methods._kronecker_layers import (
    KroneckerLayer,
    Take,
    find_layers,
    listening,
)
from trak.modelout_functions import AbstractModelOutput


class Fisher(str, Enum):
    """Whose gradients the factors are made of."""

    SAMPLED = "sampled"
    """The loss at labels drawn from the model: the Gauss-Newton matrix on average."""

    EXACT = "exact"
    """All labels, weighted: the Gauss-Newton matrix, for a backward pass a class."""

    EMPIRICAL = "empirical"
    """The loss at the data's own labels."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The eigen-decomposition of one layer's curvature."""

    left: Float[Tensor, "o o"]
    """Eigenvectors of the slopes' covariance, one a column."""

    right: Float[Tensor, "i i"]
    """Eigenvectors of the inputs' covariance, one a column."""

    eigenvalues: Float[Tensor, "o i"]
    """Mean squared gradients along them."""


class EKFAC(CurvatureMethod):
    r"""Influence functions with EK-FAC (George et al., 2018; Grosse et al., 2023).

    A layer's curvature is taken for :math:`(Q_S \otimes Q_A) \operatorname{diag}(\Lambda)
    (Q_S \otimes Q_A)^\top` with the eigenvectors of the covariances of its slopes and
    inputs, and the mean squared gradients along them; layers do not interact
    (Grosse et al., 2023, Section 2.4; https://arxiv.org/abs/2308.03296).

    Linear layers and two-dimensional convolutions of one group have factors, a bias
    with its weight. All other parameters (norms, embeddings, tied weights) are left out
    of the scores; :attr:`coverage` says how much that is.

    Args:
        model: The model. Checkpoints are loaded into it.
        task: What is attributed: a name, or a task.
        checkpoints: State dicts.
        damping: :math:`\lambda`, in the units of the mean loss's curvature. None for
            ``multiple`` times the mean of each layer's :math:`\Lambda`.
        multiple: Damping in those units, where ``damping`` is None.
        fisher: ``"sampled"``, ``"exact"`` or ``"empirical"``.
        loss: The training loss, where the task does not tell.
        grad_wrt: Names, globs or a predicate; None for all parameters.
        train_inds: The examples each checkpoint was trained on, indices or booleans;
            None for all. The curvature is of those.
        max_bytes: Memory for a tile of target gradients; twice that is held.
        seed: Of the drawn labels.

    Attributes:
        coverage: Share of the selected gradient entries that have factors, after
            ``fit``.

    Raises:
        UnknownNameError: If ``fisher`` is not one of the three.
        OptionError: If an option has a value that cannot work, or the task's loss is
            not known.
    """

    name = "EK-FAC"

    def __init__(
        self,
        model: nn.Module,
        task: str | AbstractModelOutput | type[AbstractModelOutput] | object,
        checkpoints: Sequence[Mapping[str, Tensor]],
        *,
        damping: float | None = None,
        multiple: float = 0.1,
        fisher: str = "sampled",
        loss: TrainingLoss | None = None,
        grad_wrt: GradWrt | None = None,
        train_inds: Sequence[Members | None] | None = None,
        max_bytes: int = 1 << 31,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            task,
            checkpoints,
            damping=damping,
            multiple=multiple,
            grad_wrt=grad_wrt,
            train_inds=train_inds,
            max_bytes=max_bytes,
        )
        self._fisher = parse_name("fisher", fisher, Fisher)
        loss = loss_of_task(self.task) if loss is None else loss
        if not isinstance(loss, TrainingLoss):
            raise OptionError(
                "factors need the loss split at the model's outputs; pass "
                "loss=TrainingLoss(outputs, losses, likelihood)."
            )
        self._loss = loss
        if self._loss.likelihood is None and self._fisher is not Fisher.EMPIRICAL:
            raise OptionError(
                f"labels for fisher={fisher!r} cannot be drawn: the loss has no "
                f"likelihood. Pass fisher='empirical', or loss=TrainingLoss(outputs, "
                f"losses, likelihood)."
            )
        self._seed = integer("seed", seed)
        self._selected = self._computer
        self.coverage = 0.0
        self._begin()

    def _begin(self) -> None:
        self._computer = self._selected
        self._layers: list[KroneckerLayer] = []
        self._factors: list[dict[str, Factors]] = []

    # -- fitting ----------------------------------------------------------------------

    def _fit_checkpoint(self, c: int) -> None:
        """Make the factors of every layer."""
        if not self._layers:
            self._choose_layers()
        generator = torch.Generator().manual_seed(self._seed + c)
        inputs, slopes = dict[str, Tensor](), dict[str, Tensor]()

        def add_covariances(layer: KroneckerLayer) -> Take:
            def add(rows: Tensor, slope: Tensor) -> None:
                _accumulate(inputs, layer.weight, covariance(rows))
                _accumulate(slopes, layer.weight, covariance(slope))

            return add

        self._pass(c, generator, add_covariances)
        # Without the layers that no output depends on: no gradient has entries there.
        names = [it.weight for it in self._layers if it.weight in slopes]
        dtype = self._computer.sum_dtype
        left = {name: eigenbasis(slopes.pop(name)).to(dtype) for name in names}
        right = {name: eigenbasis(inputs.pop(name)).to(dtype) for name in names}
        squares = dict[str, Tensor]()

        def add_squares(layer: KroneckerLayer) -> Take:
            name = layer.weight

            def add(rows: Tensor, slope: Tensor) -> None:
                made = squared_rotated(
                    rows.to(dtype), slope.to(dtype), left[name], right[name]
                )
                _accumulate(squares, name, made)

            return add

        self._pass(c, generator, add_squares)
        count = self._member_count(c)
        self._factors.append({
            name: Factors(left[name], right[name], (squares[name] / count).to(dtype))
            for name in names
        })

    def _choose_layers(self) -> None:
        """Find the layers with factors, after a batch that proves their rules."""
        first = next(it for it in self._batches() if batch_size(it))
        few = take(first, slice(0, 4))
        self._selected.stream_per_sample_grads(few, Nowhere())
        self._layers = find_layers(self._selected.layer_stations())
        covered = {name for it in self._layers for name in (it.weight, it.bias) if name}
        if not covered:
            raise OptionError(
                f"no selected layer of {type(self._model).__name__} has Kronecker "
                f"factors: they are for linear layers and 2d convolutions of one group "
                f"whose weight is not shared. Use InfluenceFunction, or another grad_wrt."
            )
        every = self._selected.selection
        names = [name for name in every.names if name in covered]
        self._computer = HookGradientComputer(self._model, self.task, grad_wrt=names)
        self.coverage = self._computer.selection.grad_dim / every.grad_dim

    def _pass(
        self,
        c: int,
        generator: torch.Generator,
        take_of: Callable[[KroneckerLayer], Take],
    ) -> None:
        """Hand every layer's inputs and slopes of the training examples on."""
        for batch in self._member_batches(c):
            for k in range(self._passes(batch)):
                self._listen(batch, generator, take_of, k)

    def _passes(self, batch: Batch) -> int:
        """Count the backward passes a batch needs."""
        if self._fisher is not Fisher.EXACT or self._loss.likelihood is None:
            return 1
        with torch.no_grad():
            outputs = self._loss.call(self._model, copied(take(batch, slice(0, 1))))
        return len(self._loss.likelihood.roots(outputs))

    def _listen(
        self,
        batch: Batch,
        generator: torch.Generator,
        take_of: Callable[[KroneckerLayer], Take],
        k: int,
    ) -> None:
        with (
            torch.enable_grad(),
            listening(self._model, self._layers, batch, take_of) as tape,
        ):
            outputs = self._loss.call(self._model, copied(batch))
            slope = self._slope(outputs, batch, generator, k)
            torch.autograd.backward(outputs, slope)
        if tape.findings:
            reason = tape.findings[0].reason or "its input is written to"
            raise GradientError(
                f"a layer's factors cannot be formed: {reason}; leave it out with "
                f"grad_wrt."
            )

    def _slope(
        self, outputs: Tensor, batch: Batch, generator: torch.Generator, k: int
    ) -> Tensor:
        likelihood, detached = self._loss.likelihood, outputs.detach()
        if likelihood is None or self._fisher is Fisher.EMPIRICAL:
            leaf = detached.requires_grad_()
            losses = self._loss.of_outputs(leaf, batch)
            return torch.autograd.grad(losses.sum(), leaf)[0]
        if self._fisher is Fisher.EXACT:
            return likelihood.roots(detached)[k]
        return likelihood.sample(detached, generator)

    # -- scoring ----------------------------------------------------------------------

    def _products(self, c: int, rows: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        self._precondition(c, rows)
        return self._train_products(rows)

    def _precondition(self, c: int, rows: Float[Tensor, "k d"]) -> None:
        """Multiply gradients with the inverse curvature, in place: memory is theirs."""
        grads = self._computer.selection.split(rows)
        for layer in self._layers:
            factors = self._factors[c].get(layer.weight)
            if factors is None:  # its curvature is zero, and only the damping is left
                for name in filter(None, (layer.weight, layer.bias)):
                    grads[name].mul_(1 / self._damping if self._damping else 0.0)
                continue
            damping = self._damping
            if damping is None:
                damping = self._multiple * float(factors.eigenvalues.mean())
            joined = precondition(
                layer.join(grads),
                factors.left,
                factors.right,
                factors.eigenvalues,
                damping,
            )
            for name, part in layer.part(joined).items():
                grads[name].copy_(part.view_as(grads[name]))


def _accumulate(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name] + value if name in totals else value
