"""The digits, a small CNN, and training many of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

BATCH_SIZE, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 64, 0.1, 0.9, 1e-3
AT_ONCE = 50  # models trained side by side; more gains nothing on two cores


@dataclass(frozen=True, slots=True)
class Digits:
    """Images (k, 1, 8, 8) in [0, 1] and labels (k,), split once and for all."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(n_train: int = 1297, n_test: int = 500, seed: int = 0) -> Digits:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.from_numpy(images[order]).float().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels[order])
    test = slice(n_train, n_train + n_test)
    return Digits(train=(x[:n_train], y[:n_train]), test=(x[test], y[test]))


def make_model(seed: int = 0) -> nn.Sequential:
    """Build a CNN of 21,386 parameters, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )


def train(
    data: tuple[Tensor, Tensor],
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    *,
    epochs: int = 20,
    name: str = "train",
) -> list[dict[str, Tensor]]:
    """Train one model a subset.

    Args:
        data: Training images and labels.
        subsets: Indices each model trains on, all of the same number.
        seeds: One a model, for its initial weights and the order of its batches.
        epochs: Passes over the subset.
        name: What the progress bar calls it.

    Returns:
        The weights of each model, by parameter name.
    """
    jobs = list(zip(subsets, seeds, strict=True))
    steps = epochs * (len(subsets[0]) // BATCH_SIZE)
    groups = [jobs[start : start + AT_ONCE] for start in range(0, len(jobs), AT_ONCE)]
    weights: list[dict[str, Tensor]] = []
    with tqdm(total=len(jobs), desc=name, unit="model") as bar:
        for group in groups:
            weights += _train_side_by_side(data, group, steps, bar)
    return weights


def _train_side_by_side(
    data: tuple[Tensor, Tensor],
    jobs: list[tuple[np.ndarray, int]],
    steps: int,
    bar: tqdm,
) -> list[dict[str, Tensor]]:
    """Run SGD on stacked weights: one batched step moves every model of the group."""
    images, labels = data
    subsets = torch.from_numpy(np.stack([subset for subset, _ in jobs]))
    generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
    stacked, _ = stack_module_state([make_model(seed) for _, seed in jobs])
    weights = {key: value.detach() for key, value in stacked.items()}
    velocity = {key: torch.zeros_like(value) for key, value in weights.items()}
    skeleton = make_model()

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(skeleton, w, (x,)), y)

    gradients = vmap(grad(loss))
    size = subsets.shape[1]
    a_pass = size // BATCH_SIZE
    for step in range(steps):
        if step % a_pass == 0:
            order = torch.stack([torch.randperm(size, generator=g) for g in generators])
            shuffled = subsets.gather(1, order)
        start = step % a_pass * BATCH_SIZE
        batch = shuffled[:, start : start + BATCH_SIZE]
        slopes = gradients(weights, images[batch], labels[batch])
        rate = LEARNING_RATE * _triangle((step + 1) / steps)
        for key, slope in slopes.items():
            slope.add_(weights[key], alpha=WEIGHT_DECAY)
            velocity[key].mul_(MOMENTUM).add_(slope)
            # Nesterov's momentum.
            weights[key].sub_(slope.add_(velocity[key], alpha=MOMENTUM), alpha=rate)
        bar.update(len(jobs) * (step + 1) // steps - len(jobs) * step // steps)
    return [{k: v[i].clone() for k, v in weights.items()} for i in range(len(jobs))]


def _triangle(progress: float, peak: float = 0.2) -> float:
    """Rise from 0 to 1 at ``peak``, then fall back to 0 at the end."""
    return min(progress / peak, (1 - progress) / (1 - peak))


@torch.no_grad()
def margins(
    weights: Sequence[dict[str, Tensor]], data: tuple[Tensor, Tensor]
) -> Tensor:
    """Return log p/(1-p) of the correct class, (models, k): what scores attribute."""
    images, labels = data
    skeleton = make_model()
    rows = []
    for own in weights:
        logits = functional_call(skeleton, own, (images,))
        correct = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        rows.append(correct[:, 0] - others.logsumexp(dim=1))
    return torch.stack(rows)
