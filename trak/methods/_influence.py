"""Influence functions with exact curvature: conjugate gradients and LiSSA."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from trak._batches import batch_size, canonical
from trak._options import integer, positive
from trak._types import Batch, GradWrt
from trak.errors import OptionError, TrakWarning
from trak.methods._choices import check_above_zero, parse_name
from trak.methods._curvature import Curvature, CurvatureProducts
from trak.methods._curvature_loss import MeanLoss, TrainingLoss, loss_of_task
from trak.methods._curvature_method import CurvatureMethod, Members
from trak.methods._solvers import Operator, conjugate_gradients, lissa
from trak.modelout_functions import AbstractModelOutput

_PROBES = 8  # of the trace: the spread is a few per cent of it for thousands of entries
_POWER_STEPS = 12  # they find the largest eigenvalue to a few per cent
_SLACK = 1.1  # solutions that just converge are off by a last digit
_HEADROOM = 2.0  # a batch's largest eigenvalue beside the whole set's


class Solver(str, Enum):
    """How inverse products are computed."""

    CG = "cg"
    """Conjugate gradients over the whole training set: exact."""

    LISSA = "lissa"
    """A series of products with one batch each: a noisy estimate."""


@dataclass(frozen=True, slots=True)
class Convergence:
    """How one tile of targets was solved for, with one checkpoint."""

    checkpoint: int
    """Position of the checkpoint."""

    damping: float
    """The penalty that was added to the curvature."""

    iterations: int
    """Steps of the solver; with conjugate gradients each is one pass."""

    residual: float
    """Largest ``|(H + λI) x - b| / |b|`` of a target; NaN for LiSSA, which has none."""


class InfluenceFunction(CurvatureMethod):
    r"""Influence functions (Koh & Liang, 2017), without projection.

    .. math:: \tau_i(z) = Q_i \, \nabla f(z_i)^\top (H + \lambda I)^{-1} \nabla f(z)

    with the curvature :math:`H` of the mean training loss, averaged over checkpoints:
    :math:`n` times the change of :math:`f(z)` that the training example makes
    (Section 2.1; https://arxiv.org/abs/1703.04730).

    Args:
        model: The model. Checkpoints are loaded into it.
        task: What is attributed: a name, or a task.
        checkpoints: State dicts.
        solver: ``"cg"`` or ``"lissa"``.
        damping: :math:`\lambda`, in the units of the mean loss's curvature. None for
            ``multiple`` times :math:`\operatorname{trace}(H) / \min(n, d)`.
        multiple: Damping in those units, where ``damping`` is None.
        curvature: ``"ggn"``, the Gauss-Newton matrix, or ``"hessian"``.
        loss: The training loss, where the task does not tell: a :class:`TrainingLoss`;
            for the Hessian a function ``(model, batch) -> mean loss`` is enough.
        grad_wrt: Names, globs or a predicate; None for all parameters.
        train_inds: The examples each checkpoint was trained on, indices or booleans;
            None for all. The curvature is of those.
        tolerance: Residual of conjugate gradients, as a share of the right side.
        max_iterations: Iterations after which conjugate gradients stop, with a warning.
        depth: Terms of LiSSA's series.
        scale: LiSSA's divisor; None for twice the largest eigenvalue.
        repeats: Series of LiSSA that are averaged.
        max_bytes: Memory for a tile of target gradients; solvers hold four such tiles.
        seed: Of the probes and of the order of LiSSA's batches.

    Attributes:
        convergence: How each tile of the last ``score`` was solved for.

    Raises:
        UnknownNameError: If ``solver`` or ``curvature`` is not one of the two.
        OptionError: If an option has a value that cannot work, or the task's loss is
            not known.
    """

    name = "Influence functions"

    def __init__(
        self,
        model: nn.Module,
        task: str | AbstractModelOutput | type[AbstractModelOutput] | object,
        checkpoints: Sequence[Mapping[str, Tensor]],
        *,
        solver: str = "cg",
        damping: float | None = None,
        multiple: float = 1.0,
        curvature: str = "ggn",
        loss: TrainingLoss | MeanLoss | None = None,
        grad_wrt: GradWrt | None = None,
        train_inds: Sequence[Members | None] | None = None,
        tolerance: float = 1e-3,
        max_iterations: int = 200,
        depth: int = 1000,
        scale: float | None = None,
        repeats: int = 1,
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
        self._solver = parse_name("solver", solver, Solver)
        kind = parse_name("curvature", curvature, Curvature)
        check_above_zero(tolerance=tolerance, scale=1.0 if scale is None else scale)
        loss = loss_of_task(self.task) if loss is None else loss
        self._curvature = CurvatureProducts(model, self._computer.selection, loss, kind)
        self._tolerance = tolerance
        self._max_iterations = positive("max_iterations", max_iterations)
        self._depth, self._repeats = (
            positive("depth", depth),
            positive("repeats", repeats),
        )
        self._scale, self._seed = scale, integer("seed", seed)
        self._dampings: dict[int, float] = {}
        self._scales: dict[int, float] = {}
        self.convergence: list[Convergence] = []

    def _begin(self) -> None:
        self._dampings, self._scales, self.convergence = {}, {}, []

    def score(self, targets: Iterable[Batch]) -> Float32[np.ndarray, "n m"]:
        """Score every training example for every target.

        Args:
            targets: Batches of targets.

        Returns:
            The scores, in memory. Shape ``(n, m)``.
        """
        self.convergence = []
        return super().score(targets)

    def _fit_checkpoint(self, c: int) -> None:
        """Choose the damping and the scale."""
        whole = self._operator(c)
        self._dampings[c] = (
            self._multiple * self._mean_eigenvalue(c, whole)
            if self._damping is None
            else self._damping
        )
        if self._solver is Solver.LISSA:
            top = 0.0 if self._scale else largest_eigenvalue(whole, self._start(c))
            self._scales[c] = self._scale or _HEADROOM * (top + self._dampings[c])

    def _products(self, c: int, rows: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        if self._solver is Solver.CG:
            solved = self._conjugate(c, rows)
        else:
            solved = self._series(c, rows)
        return self._train_products(solved)

    def _conjugate(self, c: int, rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        whole, damping = self._operator(c), self._dampings[c]
        found = conjugate_gradients(
            lambda them: whole(them) + damping * them,
            rows,
            tolerance=self._tolerance,
            max_iterations=self._max_iterations,
        )
        worst = float(found.residuals.max())
        self.convergence.append(Convergence(c, damping, found.iterations, worst))
        most = _SLACK * self._tolerance
        if worst > most:
            late = int((found.residuals > most).sum())
            warnings.warn(
                f"conjugate gradients stopped after {found.iterations} iterations with "
                f"a relative residual of {worst:.2g}, above {self._tolerance:g} for "
                f"{late} of {len(rows)} targets; pass a larger damping, max_iterations "
                f"or tolerance, or compute in a wider type.",
                TrakWarning,
                stacklevel=4,
            )
        return found.rows

    def _series(self, c: int, rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        generator = torch.Generator().manual_seed(self._seed + c)
        total = torch.zeros_like(rows)
        for _ in range(self._repeats):
            total += lissa(
                self._noisy_operators(c, generator),
                rows,
                damping=self._dampings[c],
                scale=self._scales[c],
                depth=self._depth,
            )
        terms = self._depth * self._repeats
        found = Convergence(c, self._dampings[c], terms, float("nan"))
        self.convergence.append(found)
        return total / self._repeats

    def _operator(self, c: int) -> Operator:
        return lambda rows: self._curvature.over(self._member_batches(c), rows)

    def _noisy_operators(
        self, c: int, generator: torch.Generator
    ) -> Iterator[Operator]:
        """Draw batches, each as often as any other in a pass, weighted by their sizes."""
        batches = list(self._member_batches(c))
        a_batch = self._member_count(c) / len(batches)
        while True:
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield self._operator_of(batches[i], batch_size(batches[i]) / a_batch)

    def _operator_of(self, batch: Batch, weight: float) -> Operator:
        return lambda rows: weight * self._curvature.of_batch(canonical(batch), rows)

    def _start(self, c: int) -> Float[Tensor, "k d"]:
        return self._signs(1, self._seed + c)

    def _mean_eigenvalue(self, c: int, whole: Operator) -> float:
        """Estimate trace(H) / min(n, d) with random signs (Hutchinson, 1990)."""
        probes = self._signs(_PROBES, self._seed + c)
        trace = float((probes * whole(probes)).sum()) / _PROBES
        if trace <= 0:
            raise OptionError(
                f"the trace of the curvature at checkpoint {c} is {trace:.2g}, so it "
                f"gives no unit of damping; pass damping, or curvature='ggn'."
            )
        return trace / min(self._member_count(c), probes.shape[1])


def largest_eigenvalue(operator: Operator, start: Float[Tensor, "1 d"]) -> float:
    """Estimate the largest magnitude of an eigenvalue by the power method.

    Args:
        operator: The products.
        start: A vector, not zero. Shape ``(1, d)``.

    Returns:
        The estimate, from below.

    Example:
        >>> largest_eigenvalue(lambda rows: -3 * rows, torch.ones(1, 4))
        3.0
    """
    size = 0.0
    for _ in range(_POWER_STEPS):
        start = operator(start / start.norm())
        size = float(start.norm())
        if size == 0.0:
            break
    return size
