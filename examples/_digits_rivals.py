"""What trak is compared with, through the same public seam: score computers.

The library multiplies what each of them gives by the mean 1 - p of a training example over
the checkpoints, as the paper does. So they differ only in what is done with the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trak.score_computers import AbstractScoreComputer


class _Products(AbstractScoreComputer):
    """Plain float32 matrix products; a subclass says what the features are."""

    def get_xtx(self, grads: Tensor) -> Tensor:
        return grads.float().T @ grads.float()

    def get_scores(
        self, features: Tensor, target_grads: Tensor, accumulator: Tensor
    ) -> None:
        accumulator += (features @ target_grads.float().T).to(accumulator.device)


class UndampedInverse(_Products):
    """The arithmetic of traker 0.3.2: no damping, and the inverse rescaled."""

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        inverse = torch.linalg.inv(xtx)
        return grads.float() @ (inverse / inverse.abs().mean())


class GradientDotProduct(_Products):
    """No kernel at all: examples count by how well their gradients align."""

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        return grads.float()
