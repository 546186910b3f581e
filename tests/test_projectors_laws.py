"""Mean and variance of inner products of sketches, as the projectors state them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.contracts.projector_contract import gradients
from trak._signs import (
    block_sizes,
)
from trak.projectors import (
    BasicProjector,
    SparseProjector,
)


def pair_sum(x: Tensor, y: Tensor, chunk: int) -> float:
    """The sum over pairs in different chunks of ``(x_i y_j + x_j y_i)**2``."""
    square = (torch.outer(x, y) + torch.outer(y, x)).square()
    index = torch.arange(len(x)) // chunk
    return float(square[index[:, None] < index].sum())


def stated_variance(law: str, x: Tensor, y: Tensor, p: int) -> float:
    if law == "normal":
        return float((x @ x) * (y @ y) + (x @ y) ** 2) / p
    if law == "rademacher":
        return pair_sum(x, y, 1) / p
    sizes = block_sizes(p, 4)
    return sum(pair_sum(x, y, m) / m for m in sizes) / 4**2


@pytest.mark.parametrize("law", ["sparse", "rademacher", "normal"])
def test_inner_products_have_the_stated_mean_and_variance(law: str) -> None:
    d, p, draws = 60, 14, 1200
    x, y = gradients(2, d, torch.float64)
    y = y + x / 2
    batch = torch.stack((x, y))
    projector = (
        SparseProjector(d, p)
        if law == "sparse"
        else BasicProjector(d, p, 0, law, "cpu")
    )
    sketches = [projector.project(batch, model_id=i) for i in range(draws)]
    estimates = torch.stack([sketch[0] @ sketch[1] / p for sketch in sketches])
    error = estimates - x @ y
    variance = stated_variance(law, x, y, p)
    # The mean has standard deviation sqrt(variance / draws); that of the mean square
    # is estimated from the fourth powers.
    assert abs(float(error.mean())) < 5 * (variance / draws) ** 0.5
    spread = float(error.square().std()) / draws**0.5
    assert abs(float(error.square().mean()) - variance) < 5 * spread


def test_sparse_variance_is_at_most_dense() -> None:
    x, y = gradients(2, 60, torch.float64)
    assert stated_variance("sparse", x, y, 16) <= stated_variance(
        "rademacher", x, y, 16
    )
