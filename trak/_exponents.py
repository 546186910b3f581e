"""The powers that the out-to-loss weight is taken to, on rows and on the result."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from trak.errors import OptionError


class Exponents(NamedTuple):
    r"""The exponents :math:`a` and :math:`b` of the estimator.

    .. math:: \tau = \operatorname{sign}(\bar Q) |\bar Q|^b \cdot \frac{1}{C}
              \sum_c \tilde X_c (\tilde X_c^\top \tilde X_c + \lambda_c I)^{-1} \phi_c
              \qquad \tilde X_c = |Q_c|^a X_c
    """

    rows: float = 0.0
    """``a``: on the rows of every checkpoint, with that checkpoint's weights."""

    result: float = 1.0
    """``b``: on the sum, with the mean weights."""

    def row_weights(self, out_to_loss: np.ndarray) -> Float32[np.ndarray, " n"] | None:
        """Compute what the rows of a checkpoint are multiplied with.

        Args:
            out_to_loss: The checkpoint's weights ``Q``. Shape ``(n, 1)`` or ``(n,)``.

        Returns:
            Their sizes to the power ``a``; None where that is 0, so all are 1. Shape
            ``(n,)``.

        Example:
            >>> Exponents(0.5, 0.5).row_weights(np.array([[-4.0], [0.0]]))
            array([2., 0.], dtype=float32)
        """
        if self.rows == 0:
            return None
        sizes = np.abs(np.asarray(out_to_loss, dtype=np.float64).reshape(-1))
        weights: np.ndarray = sizes**self.rows
        return weights.astype(np.float32)

    def result_weights(
        self, mean_out_to_loss: Float64[np.ndarray, " n"]
    ) -> Float64[np.ndarray, " n"]:
        """Compute what the mean over checkpoints is multiplied with.

        Args:
            mean_out_to_loss: The mean of ``Q``. Shape ``(n,)``.

        Returns:
            Its sizes to the power ``b``, with its signs; 1 for a weight of 0 where
            ``b`` is 0. Shape ``(n,)``.

        Example:
            >>> Exponents(0.5, 0.5).result_weights(np.array([-4.0, 0.0]))
            array([-2.,  0.])
        """
        sizes: np.ndarray = np.abs(mean_out_to_loss) ** self.result
        return np.where(mean_out_to_loss < 0, -sizes, sizes)


PAPER = Exponents(0.0, 1.0)
"""Those of Park et al. (2023), and of 0.3.2."""


def parse_exponents(exponents: object) -> Exponents:
    """Parse a pair of exponents.

    Returns:
        The pair.

    Raises:
        OptionError: If it is not two finite numbers of at least 0.

    Example:
        >>> parse_exponents((0, 1)) == PAPER
        True
    """
    try:
        pair = [*exponents] if isinstance(exponents, Iterable) else []
        values = [] if isinstance(exponents, str) else [float(value) for value in pair]
    except (TypeError, ValueError):
        values = []
    if len(values) != 2 or not all(0 <= value < math.inf for value in values):
        raise OptionError(
            f"exponents={exponents!r} is not a pair of numbers >= 0; pass (a, b), the "
            f"powers of the out-to-loss weight on rows and on the result: (0, 1) are the "
            f"paper's."
        )
    return Exponents(*values)
