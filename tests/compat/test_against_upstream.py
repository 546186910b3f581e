"""The scores of 0.3.2 by its own formula, and their relation to this library's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.compat.problem import (
    CHECKPOINTS,
    TARGETS,
    TRAIN,
    D,
    M,
    N,
    assert_scores,
    make,
    margin,
    miss,
    network,
)
from tests.compat.problem import gradients as explicit_gradients
from trak.projectors import BasicProjector


def scores_of_0_3_2(
    rows: Tensor, targets: Tensor, out_to_loss: Tensor, lambda_reg: float
) -> tuple[Tensor, float]:
    """Compute one checkpoint's scores as 0.3.2 does, in float64.

    Args:
        rows: Projected gradients over the square root of ``d``. Shape ``(n, p)``.
        targets: The same of the targets. Shape ``(m, p)``.
        out_to_loss: Shape ``(n, 1)``.
        lambda_reg: Added to the diagonal.

    Returns:
        The scores, and the mean magnitude that 0.3.2 divides the inverse by.
    """
    kernel = rows.T @ rows + lambda_reg * torch.eye(rows.shape[1]).double()
    inverse = torch.linalg.inv(kernel)
    scale = float(inverse.abs().mean())
    return rows @ (inverse / scale) @ targets.T * out_to_loss, scale


@pytest.mark.parametrize("lambda_reg", [0.0, 0.1, 3.0])
def test_one_checkpoint_is_equal_up_to_the_scale(
    lambda_reg: float, tmp_path: Path
) -> None:
    projector = BasicProjector(D, 12, 0, "normal", "cpu")
    traker = make(tmp_path, projector=projector, lambda_reg=lambda_reg)
    traker.load_checkpoint(CHECKPOINTS[0], model_id=0)
    traker.featurize(TRAIN, num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", CHECKPOINTS[0], 0, M)
    traker.score(TARGETS, num_samples=M)
    store = traker.saver.current_store
    names = ("grads", "exp_grads", "out_to_loss")
    rows, targets, weight = (
        torch.from_numpy(np.array(store[name])).double() for name in names
    )
    theirs, scale = scores_of_0_3_2(rows, targets, weight, lambda_reg)
    assert_scores(traker.finalize_scores("exp"), theirs * scale)


def test_the_stored_rows_are_those_of_0_3_2(tmp_path: Path) -> None:
    """Projected gradients over the square root of ``d``, and one minus ``p``."""
    projector = BasicProjector(D, 12, 0, "normal", "cpu")
    traker = make(tmp_path, projector=projector)
    traker.load_checkpoint(CHECKPOINTS[0], model_id=0)
    traker.featurize(TRAIN, num_samples=N)
    flat = explicit_gradients(CHECKPOINTS[0], TRAIN, margin)
    shapes = {name: value.shape for name, value in network().named_parameters()}
    pieces = flat.split([shape.numel() for shape in shapes.values()], dim=1)
    named = {
        name: piece.reshape(N, *shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }
    expected = projector.project(named, model_id=0) / D**0.5
    store = traker.saver.current_store
    found = torch.from_numpy(np.array(store["grads"])).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    double = {name: value.double() for name, value in CHECKPOINTS[0].items()}
    weight = miss(network().double(), double, TRAIN[0].double(), TRAIN[1])
    stored = torch.from_numpy(np.array(store["out_to_loss"])).double()
    torch.testing.assert_close(stored, weight[:, None], rtol=1e-5, atol=1e-6)
