"""A small problem, and its scores by the textbook formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from trak import TRAKer

N, M, C = 60, 5, 2
"""Training examples, targets, checkpoints."""

D = 43
"""Parameters of the model."""

Weights = Mapping[str, Tensor]
Measure = Callable[[torch.nn.Module, Weights, Tensor, Tensor], Tensor]
"""``(model, weights, images, labels) -> (b,)``."""


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    )


def checkpoint(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator)
        for name, value in network().state_dict().items()
    }


CHECKPOINTS = [checkpoint(seed) for seed in range(C)]


def examples(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 6, generator=generator)
    return images, torch.randint(0, 3, (size,), generator=generator)


TRAIN = examples(N, 100)
TARGETS = examples(M, 101)


def batches(data: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = data
    return list(zip(images.split(size), labels.split(size), strict=True))


# -- the code under test ------------------------------------------------------------


def make(save_dir: Path | str, **options: Any) -> TRAKer:
    """A TRAKer of the problem, in float32 and with a plain number as damping."""
    defaults: dict[str, Any] = {
        "task": "image_classification",
        "train_set_size": N,
        "save_dir": save_dir,
        "device": "cpu",
        "proj_dim": 16,
        "logging_level": 100,
        "use_half_precision": False,
        "lambda_reg": 0.5,
    }
    if "model" not in options:
        options["model"] = network()
    return TRAKer(**{**defaults, **options})


def featurize(traker: TRAKer, *, finalize: bool = True) -> None:
    """The first of the two loops of 0.3.2's documentation."""
    for model_id, state in enumerate(CHECKPOINTS):
        traker.load_checkpoint(state, model_id=model_id)
        for batch in batches(TRAIN, 7):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    if finalize:
        traker.finalize_features()


def score(traker: TRAKer) -> np.ndarray:
    """The second."""
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint(
            exp_name="exp", checkpoint=state, model_id=model_id, num_targets=M
        )
        for batch in batches(TARGETS, 3):
            traker.score(batch=batch, num_samples=len(batch[0]))
    return traker.finalize_scores(exp_name="exp")


def run(save_dir: Path | str, **options: Any) -> Tensor:
    traker = make(save_dir, **options)
    featurize(traker)
    return torch.from_numpy(np.array(score(traker)))


# -- the reference ------------------------------------------------------------------


def logits_of(model: torch.nn.Module, weights: Weights, images: Tensor) -> Tensor:
    return functional_call(model, dict(weights), images)


def margin(
    model: torch.nn.Module, weights: Weights, images: Tensor, labels: Tensor
) -> Tensor:
    p = logits_of(model, weights, images).softmax(1).gather(1, labels[:, None])[:, 0]
    return torch.log(p / (1 - p))


def miss(
    model: torch.nn.Module, weights: Weights, images: Tensor, labels: Tensor
) -> Tensor:
    p = logits_of(model, weights, images).softmax(1)
    return 1 - p.gather(1, labels[:, None])[:, 0]


def gradients(
    weights: Weights, data: tuple[Tensor, Tensor], output: Measure = margin
) -> Tensor:
    """Gradients of every parameter, an example at a time. Shape ``(b, d)``, float64."""
    model = network().double()
    leaves = {k: v.double().requires_grad_() for k, v in weights.items()}
    values = output(model, leaves, data[0].double(), data[1])
    rows = [
        torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
        for value in values
    ]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def textbook(
    matrices: list[Tensor] | None = None,
    *,
    output: Measure = margin,
    out_to_loss: Measure = miss,
    ridge: float | None = 0.5,
    columns: slice = slice(None),
) -> Tensor:
    """Scores by explicit matrices.

    Args:
        matrices: A projection ``(d, p)`` for each checkpoint; None for no projection.
        output: What is differentiated.
        out_to_loss: Its weight.
        ridge: Added to the diagonal; None for one mean eigenvalue.
        columns: The gradient entries that are used.

    Returns:
        The scores. Shape ``(n, m)``, float64.
    """
    total, weight = torch.zeros(N, M).double(), torch.zeros(N, 1).double()
    for index, weights in enumerate(CHECKPOINTS):
        rows = gradients(weights, TRAIN, output)[:, columns]
        targets = gradients(weights, TARGETS, output)[:, columns]
        d = rows.shape[1]
        if matrices is not None:
            rows, targets = (x @ matrices[index].double() for x in (rows, targets))
        rows, targets = rows / d**0.5, targets / d**0.5
        kernel = rows.T @ rows
        added = kernel.trace() / min(rows.shape) if ridge is None else ridge
        damped = kernel + added * torch.eye(len(kernel)).double()
        total += rows @ torch.linalg.solve(damped, targets.T)
        double = {name: value.double() for name, value in weights.items()}
        weight += out_to_loss(
            network().double(), double, TRAIN[0].double(), TRAIN[1]
        ).reshape(N, 1)
    return total / C * (weight / C)


def assert_scores(found: Any, expected: Tensor) -> None:
    """Compare with float64; float32 rounding of a small problem is 1e-5 at most."""
    found = torch.as_tensor(found).double()
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)
