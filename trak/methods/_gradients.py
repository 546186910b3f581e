r"""TRAK, and the methods that compare gradients as they are.

With :math:`g_c(z) = \nabla_\theta f(z; \theta_c)`, a training example's loss has the
gradient :math:`\nabla_\theta L(z_i; \theta_c) = -Q_{c,i}\, g_c(z_i)`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from trak._blocked import Shape, Side, score_blocks
from trak._linalg import RowReader, is_finite
from trak._types import Batch
from trak.errors import NonFiniteError, OptionError
from trak.methods._base import Method
from trak.methods._shared import CheckpointGradients, ProjectedGradients

T = TypeVar("T", bound="_OfGradients")


class _OfGradients(Method):
    """A method that is fitted when the gradients it shares are."""

    def __init__(self, shared: ProjectedGradients) -> None:
        self._shared = shared

    def fit(self: T, train: Iterable[Batch]) -> T:
        """Compute the gradients of the training set, unless they are there already.

        Args:
            train: Its batches.

        Returns:
            The method itself.
        """
        self._shared.fit(train)
        return self


class TRAK(_OfGradients):
    """The scores of :meth:`trak.TRAKer.finalize_scores`, from shared gradients.

    Args:
        shared: The gradients.
        lambda_reg: Damping, as :class:`trak.TRAKer` takes it.
        exponents: Those of the out-to-loss weight, as :class:`trak.TRAKer` takes them.
        **options: Further arguments of :class:`trak.TRAKer` that no gradient depends on.
    """

    name = "TRAK"

    def __init__(
        self,
        shared: ProjectedGradients,
        lambda_reg: float | str = "auto",
        exponents: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(shared)
        self._options = {"lambda_reg": lambda_reg, **options}
        if exponents is not None:
            self._options["exponents"] = exponents

    def score(self, targets: Iterable[Batch]) -> Float32[np.ndarray, "n m"]:
        """Score every training example for every target.

        Args:
            targets: Batches of targets.

        Returns:
            The scores, in memory. Shape ``(n, m)``.

        Raises:
            OrderError: If there are no gradients of a training set yet.
            BatchError: If there are no targets.
            SingularKernelError: If a kernel cannot be inverted with this damping.
        """
        name, _ = self._shared.prepare(targets)
        traker = self._shared.reopen(**self._options)
        traker.finalize_features(self._shared.model_ids)
        scores = traker.finalize_scores(name, self._shared.model_ids)
        return np.array(scores)  # others may write to the file that it is mapped from


class _Products(_OfGradients):
    """Sums over checkpoints of products of gradients, each with a learning rate."""

    def __init__(
        self,
        shared: ProjectedGradients,
        learning_rates: float | Sequence[float],
        *,
        unit: bool,
    ) -> None:
        super().__init__(shared)
        self._rates = _parse_rates(learning_rates, len(shared.model_ids))
        self._unit = unit

    def score(self, targets: Iterable[Batch]) -> Float32[np.ndarray, "n m"]:
        """Score every training example for every target, in tiles.

        Args:
            targets: Batches of targets.

        Returns:
            The scores, in memory. Shape ``(n, m)``.

        Raises:
            OrderError: If there are no gradients of a training set yet.
            BatchError: If there are no targets.
            NonFiniteError: If a score does not fit float32.
        """
        parts = self._shared.rows(targets)
        traker, (_, m) = self._shared.traker, self._shared.prepare(targets)
        n, device = traker.train_set_size, traker.device
        sides = [
            self._side(part, rate, device)
            for part, rate in zip(parts, self._rates, strict=True)
        ]
        scores = np.empty((n, m), dtype=np.float32)
        ones = torch.ones(n, 1, dtype=torch.float32, device=device)
        for block in score_blocks(sides, ones, Shape(n, m, traker.proj_dim, device)):
            if not is_finite(block.values):
                raise NonFiniteError(
                    f"{self.name} scores of training examples {block.rows[0]} to "
                    f"{block.rows[1] - 1} overflow float32; pass smaller learning rates."
                )
            scores[slice(*block.rows), slice(*block.columns)] = block.values.cpu()
        return scores

    def _side(
        self, part: CheckpointGradients, rate: float, device: torch.device
    ) -> Side:
        weights = torch.from_numpy(part.out_to_loss)
        if self._unit:
            factors = rate * weights.sign()
            train, targets = unit_rows(part.train), unit_rows(part.targets)
        else:
            factors = rate * self._shared.gain * weights
            train, targets = part.train, part.targets
        return Side(scaled_rows(train, factors.float().to(device)), targets, None)


class GradientDot(_Products):
    r"""The product of a training example's loss gradient with a target's output gradient.

    .. math::
        \tau_{ij} = \frac1C \sum_c Q_{c,i}\; g_c(z_i)^\top g_c(z_j)

    This is :class:`TracIn` with equal learning rates that sum to one (for one checkpoint
    Charpiat et al., 2019; https://arxiv.org/abs/2102.05262). Projected gradients give an
    unbiased estimate.

    Args:
        shared: The gradients.
    """

    name = "GradDot"

    def __init__(self, shared: ProjectedGradients) -> None:
        super().__init__(shared, 1 / len(shared.model_ids), unit=False)


class GradientCosine(_Products):
    r"""The cosine of a training example's loss gradient and a target's output gradient.

    .. math::
        \tau_{ij} = \frac1C \sum_c \operatorname{sign}(Q_{c,i})\,
            \frac{g_c(z_i)^\top g_c(z_j)}{\|g_c(z_i)\|\,\|g_c(z_j)\|}

    This is :class:`GAS` with equal learning rates that sum to one (for one checkpoint
    Charpiat et al., 2019; https://arxiv.org/abs/2102.05262). An example with no gradient
    scores 0.

    Args:
        shared: The gradients.
    """

    name = "GradCos"

    def __init__(self, shared: ProjectedGradients) -> None:
        super().__init__(shared, 1 / len(shared.model_ids), unit=True)


class TracIn(_Products):
    r"""TracInCP: the steps that checkpoints saw, added up.

    .. math::
        \tau_{ij} = \sum_c \eta_c\, Q_{c,i}\; g_c(z_i)^\top g_c(z_j)

    A gradient step of length :math:`\eta_c` on the loss of :math:`z_i` raises the output
    of :math:`z_j` by its term (Pruthi et al., 2020, Section 3.3;
    https://arxiv.org/abs/2002.08484). The paper takes the target's loss; here it is the
    output, as for every method. Checkpoints should be of one training run.

    Args:
        shared: The gradients.
        learning_rates: :math:`\eta_c`, one for each checkpoint, or one for all.

    Raises:
        OptionError: If learning rates are not one for each checkpoint, positive and
            finite.
    """

    name = "TracIn"

    def __init__(
        self,
        shared: ProjectedGradients,
        learning_rates: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__(shared, learning_rates, unit=False)


class GAS(_Products):
    r"""Gradient aggregated similarity: TracInCP of gradients of unit length.

    .. math::
        \tau_{ij} = \sum_c \eta_c \operatorname{sign}(Q_{c,i})\,
            \frac{g_c(z_i)^\top g_c(z_j)}{\|g_c(z_i)\|\,\|g_c(z_j)\|}

    Without their lengths, examples with large losses no longer drown the others, nor do
    early checkpoints (the renormalised TracInCP of Hammoudeh and Lowd, 2022;
    https://arxiv.org/abs/2201.10055). An example with no gradient scores 0.

    Args:
        shared: The gradients.
        learning_rates: :math:`\eta_c`, one for each checkpoint, or one for all.

    Raises:
        OptionError: If learning rates are not one for each checkpoint, positive and
            finite.
    """

    name = "GAS"

    def __init__(
        self,
        shared: ProjectedGradients,
        learning_rates: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__(shared, learning_rates, unit=True)


def unit_rows(read: RowReader) -> RowReader:
    """Divide rows by their lengths; rows of zeros stay.

    Args:
        read: Reads rows, into memory of their own.

    Returns:
        Reads them so.

    Example:
        >>> rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> unit_rows(lambda low, high: rows[low:high].clone())(0, 2)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """

    def read_unit(low: int, high: int) -> Tensor:
        rows = read(low, high)
        # In float64, where no square of a float32 over- or underflows.
        lengths = torch.linalg.vector_norm(
            rows, dim=1, keepdim=True, dtype=torch.float64
        )
        return rows.div_(torch.where(lengths > 0, lengths, 1.0))

    return read_unit


def scaled_rows(read: RowReader, factors: Float32[Tensor, " n"]) -> RowReader:
    """Multiply each row with a number.

    Args:
        read: Reads rows, into memory of their own.
        factors: The numbers. Shape ``(n,)``.

    Returns:
        Reads them so.

    Example:
        >>> rows = torch.ones(2, 2)
        >>> scaled_rows(lambda low, high: rows[low:high], torch.tensor([3.0, 2.0]))(1, 2)
        tensor([[2., 2.]])
    """

    def read_scaled(low: int, high: int) -> Tensor:
        return read(low, high).mul_(factors[low:high, None])

    return read_scaled


def _parse_rates(rates: float | Sequence[float], c: int) -> list[float]:
    given: Any = rates
    if isinstance(given, Tensor):
        given = given.cpu()
    parsed: list[float] = []
    with contextlib.suppress(TypeError, ValueError):
        # Numbers of NumPy and PyTorch are numbers too; text and truth values are none.
        found = np.asarray(given if np.ndim(given) == 0 else list(given))
        if found.dtype.kind in "iuf" and found.ndim < 2:
            found = found.astype(np.float64)
            parsed = [float(found)] * c if found.ndim == 0 else found.tolist()
    if len(parsed) != c or not all(0 < rate < math.inf for rate in parsed):
        raise OptionError(
            f"learning_rates={rates!r} do not fit {c} checkpoints; pass a positive number "
            f"for each, or one for all."
        )
    return parsed
