"""From projected gradients to scores: the 0.3.2 interface and the blocked computation.

No files, no order of calls: rows come through readers, results leave as blocks.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from trak._blocked import Block, Shape, Side, score_blocks, self_influence
from trak._exponents import PAPER, parse_exponents
from trak._gram import add_gram, gram, mirror
from trak._linalg import (
    Kernel,
    RowReader,
    damp,
    mean_eigenvalue,
    product,
    pseudo_inverse,
    spans,
)
from trak._options import Damping, parse_damping
from trak.errors import SingularKernelError

SMALLEST = 2.0**-126
"""Mean square of gradients below which their products lose digits in float32."""


class AbstractScoreComputer(ABC):
    """Computes features and scores in three steps, as in 0.3.2.

    A subclass is given to :class:`trak.TRAKer` as a class and built with ``dtype``,
    ``device``, ``logging_level`` and ``lambda_reg`` by keyword. The façade then holds
    features and scores of shape ``(n, p)`` and ``(n, m)`` in memory. A façade whose
    damping is ``"auto"`` passes 0.0, as 0.3.2 did, except to a
    :class:`BasicScoreComputer`, which knows what that means.

    Args:
        dtype: Floating-point type of the computation.
        device: Where it runs.
        logging_level: Level of its logger.
        lambda_reg: Damping, as given to the façade.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        logging_level: int = logging.INFO,
        lambda_reg: float | str = "auto",
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.logger = logging.getLogger("ScoreComputer")
        self.logger.setLevel(logging_level)
        self.lambda_reg = lambda_reg

    @abstractmethod
    def get_xtx(self, grads: Tensor) -> Tensor:
        r"""Compute :math:`X^\top X`.

        Args:
            grads: Projected gradients :math:`X`. Shape ``(n, p)``.

        Returns:
            The Gram matrix. Shape ``(p, p)``.
        """

    @abstractmethod
    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        r"""Compute the features :math:`\Phi = X (X^\top X)^{-1}`.

        Args:
            grads: Projected gradients :math:`X`. Shape ``(n, p)``.
            xtx: What :meth:`get_xtx` gave. Shape ``(p, p)``.

        Returns:
            The features. Shape ``(n, p)``.
        """

    @abstractmethod
    def get_scores(
        self, features: Tensor, target_grads: Tensor, accumulator: Tensor
    ) -> None:
        r"""Add :math:`\Phi \, G^\top` to an accumulator.

        Args:
            features: Features :math:`\Phi`. Shape ``(n, p)``.
            target_grads: Projected gradients :math:`G` of the targets. Shape ``(m, p)``.
            accumulator: Changed in place. Shape ``(n, m)``, float32, on the CPU.
        """


class BasicScoreComputer(AbstractScoreComputer):
    r"""The exact estimator, in float32 products, float64 sums and float64 solves.

    .. math:: \tau = X (X^\top X + \lambda I)^{-1} \phi

    is Park et al. (2023), Section 3, with a ridge penalty. Where there are no more
    examples than projected entries it is computed in the dual,
    :math:`(X X^\top + \lambda I)^{-1} X \phi`, so a solve costs ``min(n, p)**3``. The
    solve is on the side of the targets, and no ``(n, p)`` features are made.

    The out-to-loss weight enters twice, by :class:`Exponents <trak._exponents.Exponents>`:
    the façade multiplies the rows of :math:`X` with :math:`|Q|^a` before they come here,
    and :meth:`score_blocks` the result with :math:`\operatorname{sign}(\bar Q)
    |\bar Q|^b`.

    Args:
        dtype: Floating-point type of the products; float32 or wider.
        device: Where they run.
        CUDA_MAX_DIM_SIZE: Largest number of rows of a product in the three 0.3.2
            methods.
        logging_level: Level of its logger.
        lambda_reg: Damping: a number added to the diagonal, ``"auto"`` for one mean
            eigenvalue, ``"pinv"`` for the undamped limit.
        exponents: The powers ``(a, b)``; ``(0, 1)`` are the paper's.

    Attributes:
        exponents: The constructor's.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        CUDA_MAX_DIM_SIZE: int = 20_000,  # noqa: N803  0.3.2's name
        logging_level: int = logging.INFO,
        lambda_reg: float | str = "auto",
        *,
        exponents: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(dtype, device, logging_level, lambda_reg)
        self.exponents = parse_exponents(exponents)
        self.CUDA_MAX_DIM_SIZE = CUDA_MAX_DIM_SIZE
        self._damping = parse_damping(lambda_reg)
        self.lambda_reg = self._damping.lambda_reg  # so that 1 and 1.0 are one setting

    def get_xtx(self, grads: Tensor) -> Tensor:
        r"""Compute :math:`X^\top X` in blocks of rows.

        Args:
            grads: Projected gradients :math:`X`. Shape ``(n, p)``.

        Returns:
            The Gram matrix, in float64. Shape ``(p, p)``.
        """
        p = grads.shape[1]
        total = torch.zeros(p, p, dtype=torch.float64, device=self.device)
        for low, high in spans(len(grads), self.CUDA_MAX_DIM_SIZE):
            add_gram(total, grads[low:high].to(self.device, torch.float32))
        mirror(total)
        return total

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        r"""Compute :math:`\Phi = X (X^\top X + \lambda I)^{-1}` in blocks of rows.

        Args:
            grads: Projected gradients :math:`X`. Shape ``(n, p)``.
            xtx: Their Gram matrix. Shape ``(p, p)``.

        Returns:
            The features, in float32. Shape ``(n, p)``.

        Raises:
            SingularKernelError: If the damped kernel cannot be inverted.
        """
        n, p = grads.shape
        kernel = self.kernel(xtx.double(), n, p)
        features = torch.empty(n, p, dtype=torch.float32, device=self.device)
        for low, high in spans(n, self.CUDA_MAX_DIM_SIZE):
            rows = grads[low:high].to(self.device, torch.float32)
            features[low:high] = kernel.solve(rows.T).T
        return features

    def get_scores(
        self, features: Tensor, target_grads: Tensor, accumulator: Tensor
    ) -> None:
        r"""Add :math:`\Phi \, G^\top` to an accumulator, in blocks of rows.

        Args:
            features: Features :math:`\Phi`. Shape ``(n, p)``.
            target_grads: Projected gradients :math:`G` of the targets. Shape ``(m, p)``.
            accumulator: Changed in place. Shape ``(n, m)``.
        """
        targets = target_grads.to(self.device, torch.float32).T
        for low, high in spans(len(features), self.CUDA_MAX_DIM_SIZE):
            rows = features[low:high].to(self.device, torch.float32)
            accumulator[low:high] += product(rows, targets).to(accumulator.device)

    def kernel(
        self, xtx: Float64[Tensor, "q q"], n: int, p: int, multiple: float = 1.0
    ) -> Kernel:
        """Damp and factor a Gram matrix of the features.

        Args:
            xtx: The smaller of the two Gram matrices, or the ``(p, p)`` one.
            n: Number of training examples.
            p: Projected entries.
            multiple: How many mean eigenvalues ``"auto"`` stands for.

        Returns:
            What solves with it.

        Raises:
            SingularKernelError: If all gradients are zero, or there are fewer examples
                than projected entries and no damping, or the conditioning is too bad.
        """
        average = mean_eigenvalue(xtx) * len(xtx) / min(n, p)
        _check_range(average * min(n, p) / (n * p), n)
        if self._damping.is_pseudo_inverse:
            return pseudo_inverse(xtx)
        if n < p and self._damping.lambda_reg == 0:
            raise SingularKernelError(
                f"lambda_reg=0 with {n} training examples and proj_dim={p}: the kernel "
                f"has no inverse, and its scores would be noise. Use lambda_reg='auto', "
                f"a number > 0, a proj_dim below {n}, or lambda_reg='pinv' if the "
                f"undamped limit is what you want."
            )
        return damp(xtx, self._damping.ridge(average * multiple))

    def gram(self, train: RowReader, n: int, p: int) -> Float64[Tensor, "q q"]:
        """Sum the smaller Gram matrix of the training gradients."""
        return gram(train, n, p, self.device)

    @property
    def damping(self) -> Damping:
        """The damping, parsed."""
        return self._damping

    def score_blocks(
        self, sides: Sequence[Side], weight: Float[Tensor, " n"], n: int, m: int, p: int
    ) -> Iterator[Block]:
        r"""Compute the scores in rectangles, summing the checkpoints inside each.

        .. math:: \tau = \operatorname{sign}(\bar Q) |\bar Q|^b \cdot \frac{1}{C}
                  \sum_c X_c (X_c^\top X_c + \lambda_c I)^{-1} \phi_c

        (Park et al., 2023, equation 17 without its soft threshold, where ``b`` is 1).

        Args:
            sides: The checkpoints, whose rows are weighted already.
            weight: Mean out-to-loss of every training example. Shape ``(n,)``.
            n: Number of training examples.
            m: Number of targets.
            p: Projected entries.

        Returns:
            Blocks that cover the matrix: all rows of some columns, then all rows of the
            next.
        """
        mean = self.exponents.result_weights(weight.double().cpu().numpy())
        scale = torch.from_numpy(mean / len(sides)).float().to(self.device)[:, None]
        return score_blocks(sides, scale, Shape(n, m, p, self.device))

    def self_influence(
        self,
        side: Side,
        n: int,
        p: int,
        row_weights: Float32[np.ndarray, " n"] | None = None,
    ) -> Float64[Tensor, " n"]:
        r"""Compute :math:`w_i \phi_i^\top (X^\top X + \lambda I)^{-1} \phi_i` for all rows.

        Args:
            side: A checkpoint with a kernel, whose targets are the rows before weighting.
            n: Number of training examples.
            p: Projected entries.
            row_weights: What each row was multiplied with, :math:`w_i`; None for 1.
                Shape ``(n,)``.

        Returns:
            Each training example's score on itself, before the weight on the result.
            Memory is ``min(n, p)**2``. Shape ``(n,)``.

        Raises:
            SingularKernelError: If the training gradients were deleted.
        """
        if side.kernel is None:
            raise SingularKernelError(
                "Self-influence needs the training gradients, which were deleted by "
                "del_grads=True; featurize again without it."
            )
        weights = None
        if row_weights is not None:
            weights = torch.from_numpy(row_weights).double().to(self.device)
        shape = Shape(n, n, p, self.device)
        return self_influence(side, side.kernel(), shape, weights)


class BasicSingleBlockScoreComputer(BasicScoreComputer):
    """The same scores by the three 0.3.2 methods, each in a single product."""

    def get_scores(
        self, features: Tensor, target_grads: Tensor, accumulator: Tensor
    ) -> None:
        r"""Add :math:`\Phi \, G^\top` to an accumulator, in one product.

        Args:
            features: Features :math:`\Phi`. Shape ``(n, p)``.
            target_grads: Projected gradients :math:`G` of the targets. Shape ``(m, p)``.
            accumulator: Changed in place. Shape ``(n, m)``.
        """
        targets = target_grads.to(self.device, torch.float32).T
        products = product(features.to(self.device, torch.float32), targets)
        accumulator += products.to(accumulator.device)


def _check_range(mean_square: float, n: int) -> None:
    if mean_square == 0:
        raise SingularKernelError(
            f"All gradients of the {n} training examples are zero, or below 1e-22, so "
            f"there is nothing to attribute to. Are the right parameters selected, and is "
            f"the model output not constant?"
        )
    if not SMALLEST <= mean_square < math.inf:
        raise SingularKernelError(
            f"The projected gradients of the {n} training examples have a mean square of "
            f"{mean_square:.0e}, and float32 sums hold squares from {SMALLEST:.0e} to "
            f"3e+38. Multiply the task's output by a constant that brings the gradients "
            f"nearer to 1, and its out-to-loss by the inverse."
        )


def as_blocked(computer: AbstractScoreComputer) -> BasicScoreComputer | None:
    """Tell whether the façade may use the blocked methods of a score computer.

    Returns:
        The computer; None if it replaces one of the three 0.3.2 methods, which are then
        called.
    """
    if isinstance(computer, BasicScoreComputer) and is_blocked(type(computer)):
        return computer
    return None


def is_blocked(kind: type) -> bool:
    """Tell whether a class has all three 0.3.2 methods of BasicScoreComputer."""
    steps = ("get_xtx", "get_x_xtx_inv", "get_scores")
    return issubclass(kind, BasicScoreComputer) and all(
        getattr(kind, step) is getattr(BasicScoreComputer, step) for step in steps
    )


def describe(computer: AbstractScoreComputer, *, scores: bool = False) -> str:
    """Identify what a score computer makes of a checkpoint's rows, or of all of them.

    Args:
        computer: The score computer.
        scores: Whether what only the scores depend on, and no stored array does, counts.

    Returns:
        Its class, its damping, and exponents other than the paper's.
    """
    text = f"{type(computer).__qualname__}, lambda_reg={computer.lambda_reg!r}"
    blocked = as_blocked(computer)
    a, b = PAPER if blocked is None else blocked.exponents
    if scores and (a, b) != PAPER:
        return f"{text}, exponents=({a!r}, {b!r})"
    return f"{text}, exponents=({a!r}, ...)" if a else text
