"""Influence functions in the space of the curvature's largest eigenvectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trak._options import integer, positive
from trak._types import GradWrt
from trak.errors import OptionError, SingularKernelError
from trak.methods._choices import parse_name
from trak.methods._curvature import Curvature, CurvatureProducts
from trak.methods._curvature_loss import MeanLoss, TrainingLoss, loss_of_task
from trak.methods._curvature_method import CurvatureMethod, Members
from trak.methods._solvers import lanczos
from trak.modelout_functions import AbstractModelOutput

_ROUNDING = 100
"""Of the largest eigenvalue, in units of its type: what rounding makes of zero."""


class Arnoldi(CurvatureMethod):
    r"""Influence functions by Arnoldi's iteration (Schioppa et al., 2022).

    With the eigenpairs :math:`(\mu_j, u_j)` of the curvature that are largest in
    magnitude, found in a Krylov space, gradients are projected on the eigenvectors once
    and the inverse is diagonal:

    .. math:: \tau_i(z) = Q_i \sum_j
        \frac{(u_j^\top \nabla f(z_i)) (u_j^\top \nabla f(z))}{\mu_j + \lambda}

    (Section 3.2; https://arxiv.org/abs/2112.03052). What gradients have outside the
    eigenvectors' space is left out. A target costs one gradient; memory is that of
    ``rank`` gradients.

    Args:
        model: The model. Checkpoints are loaded into it.
        task: What is attributed: a name, or a task.
        checkpoints: State dicts.
        rank: Dimension of the Krylov space.
        keep: Eigenpairs to keep; None for half of the rank, as the others have not
            converged.
        damping: :math:`\lambda`, in the units of the mean loss's curvature. None for
            ``multiple`` times the mean of the kept eigenvalues' magnitudes.
        multiple: Damping in those units, where ``damping`` is None.
        curvature: ``"ggn"``, the Gauss-Newton matrix, or ``"hessian"``.
        loss: The training loss, where the task does not tell: a :class:`TrainingLoss`;
            for the Hessian a function ``(model, batch) -> mean loss`` is enough.
        grad_wrt: Names, globs or a predicate; None for all parameters.
        train_inds: The examples each checkpoint was trained on, indices or booleans;
            None for all. The curvature is of those.
        max_bytes: Memory for a tile of target gradients.
        seed: Of the vector that the Krylov space begins with.

    Attributes:
        eigenvalues: The kept eigenvalues of each checkpoint, after ``fit``.

    Raises:
        UnknownNameError: If ``curvature`` is not one of the two.
        OptionError: If an option has a value that cannot work, or the task's loss is
            not known.
    """

    name = "Arnoldi"

    def __init__(
        self,
        model: nn.Module,
        task: str | AbstractModelOutput | type[AbstractModelOutput] | object,
        checkpoints: Sequence[Mapping[str, Tensor]],
        *,
        rank: int = 200,
        keep: int | None = None,
        damping: float | None = None,
        multiple: float = 0.1,
        curvature: str = "ggn",
        loss: TrainingLoss | MeanLoss | None = None,
        grad_wrt: GradWrt | None = None,
        train_inds: Sequence[Members | None] | None = None,
        max_bytes: int = 1 << 28,
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
        kind = parse_name("curvature", curvature, Curvature)
        rank = positive("rank", rank)
        keep = max(1, rank // 2) if keep is None else positive("keep", keep)
        if keep > rank:
            raise OptionError(
                f"keep={keep} eigenpairs cannot come of rank={rank}; pass a larger rank."
            )
        loss = loss_of_task(self.task) if loss is None else loss
        self._curvature = CurvatureProducts(model, self._computer.selection, loss, kind)
        self._rank, self._keep, self._seed = rank, keep, integer("seed", seed)
        self.eigenvalues: list[Float[Tensor, " k"]] = []
        self._vectors: list[Float[Tensor, "k d"]] = []
        self._train_rows: list[Float[Tensor, "n k"]] = []

    def _begin(self) -> None:
        self.eigenvalues, self._vectors, self._train_rows = [], [], []

    def _fit_checkpoint(self, c: int) -> None:
        """Find the eigenpairs, and project the training gradients."""
        values, vectors = lanczos(
            lambda rows: self._curvature.over(self._member_batches(c), rows),
            self._signs(1, self._seed + c)[0],
            self._rank,
            self._keep,
        )
        self.eigenvalues.append(values)
        # A copy where the basis is larger, to let go of the rest.
        self._vectors.append(vectors.clone())
        self._train_rows.append(self._train_products(self._vectors[c]))

    def _products(self, c: int, rows: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        values = self.eigenvalues[c]
        damping = self._damping
        if damping is None:
            damping = self._multiple * float(values.abs().mean())
        damped = values + damping
        closest = int(damped.abs().argmin())
        rounding = _ROUNDING * torch.finfo(values.dtype).eps
        if float(damped[closest].abs()) <= rounding * float(values.abs().max()):
            raise SingularKernelError(
                f"the eigenvalue {float(values[closest]):.2g} at checkpoint {c} and the "
                f"damping {damping:.2g} sum to zero, which has no inverse; pass a larger "
                f"damping, or a smaller keep."
            )
        projected = rows @ self._vectors[c].T / damped
        return self._train_rows[c] @ projected.T
