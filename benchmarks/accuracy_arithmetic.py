"""Scores from projected gradients by formula: TRAK at any damping, and 0.3.2's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Spectrum:
    r"""One eigendecomposition, for the products with every damping.

    Args:
        rows: Projected gradients :math:`X`. Shape ``(n, p)``.
        targets: Those of the targets. Shape ``(m, p)``.
        weights: The out-to-loss weights. Shape ``(n,)``.
        power: That of the weights on the rows.
    """

    def __init__(
        self, rows: Tensor, targets: Tensor, weights: np.ndarray, power: float
    ) -> None:
        rows = rows.double() * torch.from_numpy(np.abs(weights) ** power)[:, None]
        targets = targets.double()
        n, p = rows.shape
        self.is_dual = n <= p
        gram = rows @ rows.T if self.is_dual else rows.T @ rows
        values, self.vectors = torch.linalg.eigh(gram)
        self.values = values.clamp(min=0)
        self.unit = float(gram.trace()) / min(n, p)
        if self.is_dual:
            self.left, right = self.vectors, rows @ targets.T
        else:
            self.left, right = rows @ self.vectors, targets.T
        self.right = self.vectors.T @ right

    def kernel(self, multiple: float) -> Tensor:
        r"""Compute :math:`X (X^\top X + \lambda I)^{-1} \phi^\top`.

        Args:
            multiple: :math:`\lambda` in mean eigenvalues.

        Returns:
            The products. Shape ``(n, m)``.
        """
        damped = self.values + multiple * self.unit
        return self.left @ (self.right / damped[:, None])


def weighted(total: Tensor, weights: Sequence[np.ndarray], power: float) -> np.ndarray:
    """Multiply a sum of kernels over checkpoints with the mean weights to a power."""
    mean = np.mean(weights, axis=0)
    factors = np.sign(mean) * np.abs(mean) ** power
    return total.numpy() * factors[:, None] / len(weights)


def undamped(rows: Tensor, targets: Tensor) -> Tensor:
    """Do as 0.3.2 does: no damping, float32, and the inverse divided by its mean size."""
    rows, targets = rows.float(), targets.float()
    inverse = torch.linalg.inv(rows.T @ rows)
    return rows @ (inverse / inverse.abs().mean()) @ targets.T
