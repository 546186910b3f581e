"""Small attribution problems in float64, each with its answer from the oracle."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests import reference
from trak import TRAKer
from trak._batches import take
from trak.projectors import AbstractProjector, SparseProjector

Checkpoint = dict[str, Tensor]

AUTO = (0.25, 0.5)
"""Exponents of classification where the damping is chosen by the library."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def classes(n: int, k: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, k, (n,), generator=generator)


@dataclass
class Problem:
    """A model, its checkpoints, and batches of (everything the model takes, labels)."""

    model: torch.nn.Module
    train: Any
    targets: Any
    n: int
    m: int
    checkpoints: list[Checkpoint] = field(default_factory=list)
    task: Any = "image_classification"
    call: Callable[[torch.nn.Module, Any], Tensor] = lambda model, batch: model(
        batch[0]
    )
    """Logits of a batch."""
    labels: Callable[[Any], Tensor] = lambda batch: batch[1]

    def parameters(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: value for name, value in named if value.requires_grad}

    def gradients(self, checkpoint: Checkpoint, batch: Any, size: int) -> Tensor:
        """Gradients of the margins of a batch, by the oracle: (b, d)."""
        self.model.load_state_dict(checkpoint)
        self.model.eval()
        labels = self.labels(batch)

        def output(i: int) -> Tensor:
            logits = self.call(self.model, take(batch, slice(i, i + 1)))
            return reference.margin(logits[0], labels[i])

        parameters = list(self.parameters().values())
        return reference.loop_gradients(output, size, parameters)

    def out_to_loss(self, checkpoint: Checkpoint) -> Tensor:
        self.model.load_state_dict(checkpoint)
        self.model.eval()
        with torch.no_grad():
            chances = self.call(self.model, self.train).softmax(1)
        return 1 - chances[torch.arange(self.n), self.labels(self.train)]

    def expected(
        self,
        projector: AbstractProjector,
        lambda_reg: float | str = "auto",
        exponents: tuple[float, float] | None = None,
        members: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The scores, by the oracle: (n, m)."""
        if exponents is None:
            exponents = AUTO if lambda_reg == "auto" else (0.0, 1.0)
        parts = self.parts(projector)
        return reference.trak(*parts, lambda_reg, exponents, members)

    def parts(
        self, projector: AbstractProjector
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        features, targets = [], []
        for model_id, checkpoint in enumerate(self.checkpoints):
            matrix = reference.projection_matrix(
                projector, self.parameters(), model_id
            ) / math.sqrt(sum(v.numel() for v in self.parameters().values()))
            features.append(self.gradients(checkpoint, self.train, self.n) @ matrix)
            targets.append(self.gradients(checkpoint, self.targets, self.m) @ matrix)
        weights = [self.out_to_loss(checkpoint) for checkpoint in self.checkpoints]
        return features, targets, weights


def randomized(model: torch.nn.Module, seed: int) -> Checkpoint:
    """A state dict of random numbers, running variances positive."""
    checkpoint = {}
    for i, (name, value) in enumerate(model.state_dict().items()):
        numbers = draw(*value.shape, seed=100 * seed + i) / 2
        if "running_var" in name:
            numbers = numbers.abs() + 0.5
        checkpoint[name] = numbers.to(value.dtype)
    for name, value in model.named_parameters(remove_duplicate=False):
        first = next(k for k, v in model.named_parameters() if v is value)
        checkpoint[name] = checkpoint[first]
    return checkpoint


def classification(
    model: torch.nn.Module, *shape: int, n: int = 11, m: int = 4, checkpoints: int = 1
) -> Problem:
    """Random inputs of a shape, three classes, random checkpoints."""
    model = model.double()
    return Problem(
        model,
        (draw(n, *shape, seed=1), classes(n, seed=1)),
        (draw(m, *shape, seed=2), classes(m, seed=2)),
        n,
        m,
        [randomized(model, seed) for seed in range(checkpoints)],
    )


# -- models ---------------------------------------------------------------------------


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    )


class Residual(torch.nn.Module):
    """Convolution, batch normalisation, in-place ReLU and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(2)
        self.head = torch.nn.Linear(2, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.nn.functional.relu(self.norm(self.conv(images)), inplace=True)
        hidden = hidden + images
        hidden += 1
        return self.head(hidden.mean((2, 3)))


class Tied(torch.nn.Module):
    """Two layers that share one weight, whose first name is ``first.weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


class Strided(torch.nn.Module):
    """A parameter that is not contiguous, and one that the output does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 4).t())
        self.unused = torch.nn.Parameter(torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.sin(inputs @ self.weight)


class NotDifferentiable(torch.autograd.Function):
    """Identity that refuses to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise AssertionError("an unselected parameter was differentiated")


class Guarded(torch.nn.Module):
    """A model whose ``frozen`` weight must not be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Parameter(torch.zeros(4, 4))
        self.head = torch.nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(inputs @ NotDifferentiable.apply(self.frozen)))


class Named(torch.nn.Module):
    """A model that takes its inputs by keyword, one of them without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 3)
        self.head = torch.nn.Linear(3, 3)

    def forward(self, *, ids: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        hidden = self.embed(ids.long()) * mask.unsqueeze(-1)
        return self.head(torch.tanh(scale * hidden.sum(1)))


class Reader(torch.nn.Module):
    """Predicts a token from the one before, its position and the mean of those before it."""

    def __init__(self, tokens: int, positions: int) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(tokens, 4, dtype=torch.float64)
        self.places = torch.nn.Embedding(positions, 4, dtype=torch.float64)
        self.head = torch.nn.Linear(4, tokens, dtype=torch.float64)
        for i, value in enumerate(self.parameters()):
            value.data = draw(*value.shape, seed=i)

    def read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        if mask is not None:
            hidden = hidden * mask[..., None]
        counts = torch.arange(1, ids.shape[1] + 1)[:, None]
        return torch.tanh(hidden + hidden.cumsum(1) / counts)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.read(input_ids, attention_mask)))


def keywords(n: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, 6, (n, 5), generator=generator, dtype=torch.uint8),
        "mask": torch.randint(0, 2, (n, 5), generator=generator),
        "scale": torch.tensor(0.5, dtype=torch.float64),
        "labels": classes(n, seed=seed),
    }


def named(checkpoints: int = 1) -> Problem:
    model = Named().double()
    return Problem(
        model,
        keywords(11, 1),
        keywords(4, 2),
        11,
        4,
        [randomized(model, seed) for seed in range(checkpoints)],
        call=lambda model, batch: model(**{
            name: value for name, value in batch.items() if name != "labels"
        }),
        labels=lambda batch: batch["labels"],
    )


def frozen() -> torch.nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "mlp": lambda **k: classification(mlp(), 4, **k),
    "residual": lambda **k: classification(Residual(), 2, 4, 4, **k),
    "tied": lambda **k: classification(Tied(), 3, **k),
    "strided": lambda **k: classification(Strided(), 4, **k),
    "frozen": lambda **k: classification(frozen(), 4, **k),
    "named": lambda **k: named(**k),
}

# -- runs -----------------------------------------------------------------------------

Pair = namedtuple("Pair", ["images", "labels"])


def split(batch: Any, size: int, step: int) -> Iterable[tuple[Any, list[int]]]:
    """Cut a batch into consecutive ones, with their indices."""
    for low in range(0, size, step):
        high = min(low + step, size)
        yield take(batch, slice(low, high)), list(range(low, high))


def make(problem: Problem, save_dir: Path, **options: Any) -> TRAKer:
    options = {
        "proj_dim": 7,
        "logging_level": 100,
        "use_half_precision": False,
        **options,
    }
    return TRAKer(
        problem.model,
        options.pop("task", problem.task),
        options.pop("train_set_size", problem.n),
        save_dir=save_dir,
        **options,
    )


def featurize(traker: TRAKer, problem: Problem, step: int = 100) -> None:
    for model_id, checkpoint in enumerate(problem.checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for batch, inds in split(problem.train, problem.n, step):
            traker.featurize(batch, inds=inds)


def score(traker: TRAKer, problem: Problem, step: int = 100) -> Tensor:
    for model_id, checkpoint in enumerate(problem.checkpoints):
        traker.start_scoring_checkpoint("exp", checkpoint, model_id, problem.m)
        for batch, inds in split(problem.targets, problem.m, step):
            traker.score(batch, inds=inds)
    return torch.from_numpy(traker.finalize_scores("exp") + 0.0)


def run(problem: Problem, save_dir: Path, step: int = 100, **options: Any) -> Tensor:
    """All three loops; the scores, in memory: (n, m)."""
    traker = make(problem, save_dir, **options)
    featurize(traker, problem, step)
    traker.finalize_features()
    return score(traker, problem, step)


def sparse(problem: Problem, proj_dim: int = 7, seed: int = 0) -> SparseProjector:
    """The default projector of a problem, summing in float64."""
    d = sum(value.numel() for value in problem.parameters().values())
    return SparseProjector(d, proj_dim, seed, device="cpu")


def assert_scores(actual: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """Equal within a share of the largest score, as float32 sums are."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=rtol * scale
    )
