"""The models that the ground truths train, and how: plain loops of torch.

No model is moved, no global random state survives: a seed decides the initial weights,
the order of the batches and dropout.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from speed_models import resnet9, with_minilm_weights
from torch import Tensor, nn

Batch = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained."""

    epochs: int
    rate: float
    batch: int = 64
    optimizer: str = "sgd"
    """``"sgd"``: Nesterov momentum 0.9; ``"adamw"``."""

    decay: float = 1e-3
    autocast: bool = False
    """Whether training computes in bfloat16, which newer CPUs do several times faster."""

    alike: bool = False
    """Whether texts of a length share a batch, which is cut to the longest of them."""

    def as_dict(self) -> dict[str, int | float | str | bool]:
        # What is stored of truths that know nothing of lengths stays theirs.
        return {k: v for k, v in asdict(self).items() if k != "alike" or v}


def train(
    make: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Batch], Tensor],
    data: Batch,
    indices: np.ndarray,
    seed: int,
    recipe: Recipe,
    keep: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Train a model on some examples.

    Args:
        make: Builds it, drawing from the global generator.
        loss: Mean loss of a batch.
        data: All training examples.
        indices: Those to train on.
        seed: Decides everything that is random.
        recipe: How.
        keep: Is shown the model after each epoch.

    Returns:
        The model, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().train()
        chosen = torch.from_numpy(np.asarray(indices))
        a_pass = max(1, len(chosen) // recipe.batch)
        steps = recipe.epochs * a_pass
        optimizer = _optimizer(model, recipe)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _triangle((step + 1) / steps)
        )
        for epoch in range(recipe.epochs):
            order = chosen[torch.randperm(len(chosen))][: a_pass * recipe.batch]
            batches = order.split(recipe.batch)
            if recipe.alike:
                batches = _alike(order, data, recipe.batch)
            for rows in batches:
                batch = tuple(part[rows] for part in data)
                if recipe.alike:
                    batch = trimmed(batch)
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
                    value = loss(model, batch)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
            if keep is not None:
                keep(epoch, model)
    return model.eval()


def _alike(order: Tensor, data: Batch, size: int, window: int = 8) -> list[Tensor]:
    """Cut an order into batches, each of neighbours by length in a window of batches."""
    lengths = data[2].sum(1)
    found: list[Tensor] = []
    for part in order.split(window * size):
        found += part[lengths[part].argsort(stable=True)].split(size)
    return [found[place] for place in torch.randperm(len(found))]


def trimmed(batch: Batch) -> Batch:
    """Leave out the columns of ids, segments and mask that no text of a batch reaches.

    Returns:
        The batch, as wide as its longest text; labels as they are.

    Example:
        >>> ids, mask = torch.tensor([[5, 0]]), torch.tensor([[1, 0]])
        >>> trimmed((ids, ids, mask, torch.tensor([1])))[0]
        tensor([[5]])
    """
    width = max(1, int(batch[2].sum(1).max()))
    return (*(part[:, :width] for part in batch[:3]), *batch[3:])


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [value for value in model.parameters() if value.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, recipe.rate, weight_decay=recipe.decay, fused=True
        )
    return torch.optim.SGD(
        parameters,
        recipe.rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe.decay,
        fused=True,
    )


def _triangle(progress: float, peak: float = 0.2) -> float:
    """Rise from 0 to 1 at ``peak``, then fall back to 0 at the end."""
    return min(progress / peak, (1 - progress) / (1 - peak))


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images).float(), labels)


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    ids, kinds, mask, labels = batch
    logits = model(input_ids=ids, token_type_ids=kinds, attention_mask=mask).logits
    return nn.functional.cross_entropy(logits.float(), labels)


def token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Give the mean over all tokens of the batch, as transformers does."""
    ids, mask = (part[:, : int(batch[1].sum(1).max())] for part in batch)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    labels = ids.where(mask > 0, -100)[:, 1:]
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten()
    )


def value_loss(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return 0.5 * nn.functional.mse_loss(model(x).squeeze(-1), y)


# -- models ---------------------------------------------------------------------------


def digits_cnn() -> nn.Module:
    """21,386 parameters for 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def diabetes_mlp() -> nn.Module:
    """4,929 parameters for ten measurements of a patient."""
    return nn.Sequential(
        nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )


def mnist_mlp() -> nn.Module:
    """50,890 parameters for 28x28 images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


class _Block(nn.Module):
    """Two convolutions beside a shortcut, with a scale that starts at zero."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(i, o, 3, stride, 1)
        self.second = nn.Conv2d(o, o, 3, 1, 1)
        self.shortcut = nn.Conv2d(i, o, 1, stride) if i != o else nn.Identity()
        with torch.no_grad():
            self.second.weight.mul_(1 / math.sqrt(8))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(self.first(x).relu())
        return (self.shortcut(x) + inner).relu()


def small_resnet(classes: int = 4) -> nn.Module:
    """A residual network without normalisation; 72,676 parameters for 4 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        _Block(16, 32, 2),
        _Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def cifar2_resnet9() -> nn.Module:
    """ResNet-9 of 2.3M parameters with two outputs."""
    model = resnet9()
    model[-1] = nn.Linear(128, 2, bias=False)
    # Convolutions of CPUs read this layout half again as fast.
    return model.to(memory_format=torch.channels_last)


def minilm(labels: int = 2) -> nn.Module:
    """MiniLM-L6 (22.7M parameters) with its real weights and a new head."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=30522,
        num_labels=labels,
    )
    holder = nn.Module()
    holder.inner = BertForSequenceClassification(config)
    return with_minilm_weights(holder).inner


def head(width: int) -> nn.Module:
    """Two layers on vectors of MiniLM, to two classes."""
    return nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 2))


# -- MiniLM, its upper layers trained -------------------------------------------------


def minilm_top(layers: int = 2) -> nn.Module:
    """MiniLM of which the last layers, the pooler and a new head are trained."""
    model = copy.deepcopy(_frozen_minilm(layers))
    head = model.classifier
    nn.init.normal_(head.weight, std=model.config.initializer_range)
    nn.init.zeros_(head.bias)
    return model


@functools.cache
def _frozen_minilm(layers: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = minilm().eval().requires_grad_(False)
    for part in (*model.bert.encoder.layer[-layers:], model.bert.pooler):
        part.requires_grad_(True)
    model.classifier.requires_grad_(True)
    return model


def upper_layers(model: nn.Module) -> list[nn.Module]:
    """List the layers of an encoder that are trained."""
    layers = model.bert.encoder.layer
    return [part for part in layers if next(part.parameters()).requires_grad]


@torch.no_grad()
def below(model: nn.Module, data: Batch) -> Batch:
    """Compute, once for all trainings, what the layers that are trained are given.

    Returns:
        States in the place of the ids.
    """
    depth = len(upper_layers(model))
    order = data[2].sum(1).argsort()
    states = torch.zeros(*data[0].shape, model.config.hidden_size)
    for part in order.split(32):
        ids, kinds, mask, _ = trimmed(tuple(column[part] for column in data))
        found = model.eval().bert(
            input_ids=ids,
            token_type_ids=kinds,
            attention_mask=mask,
            output_hidden_states=True,
        )
        states[part, : ids.shape[1]] = found.hidden_states[-1 - depth]
    return (states, *data[1:])


def top_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of a batch that :func:`below` computed."""
    states, _, mask, labels = batch
    seen = mask[:, None, None, :].bool()
    for layer in upper_layers(model):
        found = layer(states, attention_mask=seen)
        states = found if isinstance(found, Tensor) else found[0]
    pooled = model.dropout(model.bert.pooler(states))
    logits = model.classifier(pooled)
    return nn.functional.cross_entropy(logits.float(), labels)
