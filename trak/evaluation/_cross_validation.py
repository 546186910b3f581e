"""Cross-validation of checkpoints: the LDS of their scores, without retraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from trak._linalg import RowReader
from trak.evaluation._cross_validation_result import CrossValidation, Exponents

MULTIPLES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Dampings that are tried, in mean eigenvalues."""


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointData:
    """What cross-validation needs of a checkpoint."""

    train: RowReader
    """Reads projected gradients of training examples. Shape ``(n, p)``."""

    targets: RowReader
    """Reads projected gradients of targets. Shape ``(m, p)``."""

    out_to_loss: Float64[np.ndarray, " n"]
    """The out-to-loss weight of every training example, signed. Shape ``(n,)``."""

    outputs: Float64[np.ndarray, " m"]
    """The model's own output on every target. Shape ``(m,)``."""

    members: Bool[np.ndarray, " n"]
    """Which training examples it was trained on. Shape ``(n,)``."""


def cross_validate(
    checkpoints: Sequence[CheckpointData],
    n: int,
    m: int,
    p: int,
    *,
    multiples: Sequence[float] = MULTIPLES,
    exponents: Sequence[Exponents] = ((0.0, 1.0),),
    columns: Sequence[int] = (),
    max_targets: int = 1000,
    n_probes: int | None = None,
    seed: int = 0,
) -> CrossValidation:
    """Estimate the LDS."""
    raise NotImplementedError
