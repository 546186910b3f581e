"""Batches and models that are not as they were when they were checked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.problems import classes, draw
from tests.test_hooks_models import (
    Module,
    assert_exact,
    expected,
    head,
    parameter,
    randomize,
)
from trak._params import flatten_rows
from trak.errors import GradientError, TrakWarning
from trak.gradient_computers import HookGradientComputer
from trak.modelout_functions import resolve_task


class Wide(nn.Module):
    """Too large a parameter to be copied for each example; only a corner is used."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = parameter(200, 200)

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        made = torch.tanh(x @ self.matrix[:4, :4])
        if places is not None:
            made = made + torch.tanh(places @ self.matrix[:4, 4:8])
        return made


class Scale(nn.Module):
    """A parameter that is copied for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = parameter(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.gamma)


def ramp(t: int) -> Tensor:
    return torch.arange(1, t + 1, dtype=torch.float64)[None, :, None]


def positions_first(m: Any, x: Tensor) -> Tensor:
    made = m.layer(x.transpose(0, 1)).transpose(0, 1)
    return m.head((made * ramp(x.shape[1])).sum(1))


def shared_places(m: Any, x: Tensor) -> Tensor:
    places = torch.sin(ramp(4 * x.shape[1]).reshape(-1, 4))
    return m.head(m.layer(x, places).square().sum(1))


def both_ways(m: Any, x: Tensor) -> Tensor:
    other = torch.tanh(m.layer(x.transpose(0, 1))).transpose(0, 1)
    weights = ramp(x.shape[1])
    made = torch.tanh(m.layer(x)) * weights + other * weights.square()
    return m.head(made.sum(1))


def rows_or_sequences(m: Any, x: Tensor) -> Tensor:
    made = m.layer(x)
    return m.head((made * ramp(x.shape[1])).sum(1) if made.ndim == 3 else made)


def positions_flat(m: Any, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    made = torch.tanh(m.layer(x.transpose(0, 1).reshape(t * b, 4)))
    return m.head((made.reshape(t, b, 4).transpose(0, 1) * ramp(t)).sum(1))


SQUARE = [(4, 6, 4), (5, 5, 4), (6, 3, 4), (6, 6, 4), (1, 4, 4)]
MODELS: dict[str, tuple[Any, Any, list[tuple[int, ...]]]] = {
    "module, positions first": (positions_first, Wide, SQUARE),
    "layer, positions first": (positions_first, lambda: nn.Linear(4, 4), SQUARE),
    "an input for all examples": (shared_places, Wide, SQUARE),
    "a layer in two layouts": (both_ways, lambda: nn.Linear(4, 4), SQUARE),
    "flat, positions first": (positions_flat, lambda: nn.Linear(4, 4), SQUARE),
    "flat, one position": (
        positions_flat,
        lambda: nn.Linear(4, 4),
        [(6, 1, 4), (6, 6, 4), (6, 4, 4)],
    ),
    "copies for rows, then sequences": (
        rows_or_sequences,
        Scale,
        [(4, 4), (5, 5, 4), (6, 4), (6, 3, 4)],
    ),
    "a layer for rows, then sequences": (
        rows_or_sequences,
        lambda: nn.Linear(4, 4),
        [(4, 4), (5, 5, 4), (6, 3, 4), (4, 4)],
    ),
}


def follow(model: nn.Module, batches: list[Any]) -> None:
    task = resolve_task("image_classification")
    computer = HookGradientComputer(model, task)
    for batch in batches:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrakWarning)
            found = flatten_rows(computer.compute_per_sample_grad(batch))
        assert_exact(found, expected(model, task, batch))


@pytest.mark.parametrize("name", MODELS)
def test_shapes_that_are_read_in_another_way_are_checked_again(name: str) -> None:
    function, layer, shapes = MODELS[name]
    parts = head(layer=layer(), rest=nn.Linear(400, 400))  # a small part may run again
    model = randomize(Module(function, **parts))
    follow(model, [(draw(*shape, seed=3), classes(shape[0])) for shape in shapes])


def packed(m: Any, x: Tensor) -> Tensor:
    kept = x[:, :, -1] > -50
    made = torch.tanh(m.layer(x[kept]))
    back = made.new_zeros(*kept.shape, 4).index_put(kept.nonzero(as_tuple=True), made)
    return m.head(back.sum(1))


def test_rows_without_padding_that_are_as_many_by_chance() -> None:
    def batch(t: int, *lengths: int) -> tuple[Tensor, Tensor]:
        x = draw(len(lengths), t, 4, seed=t)
        for row, length in zip(x, lengths, strict=True):
            row[length:, -1] = -100
        return x, classes(len(lengths))

    model = randomize(Module(packed, **head(layer=nn.Linear(4, 4))))
    follow(model, [batch(5, 5, 5, 5, 5), batch(8, 3, 5, 6, 6), batch(8, 2, 6, 4, 8)])


def test_weights_from_outputs_that_a_hook_of_the_user_replaces() -> None:
    model = randomize(nn.Sequential(nn.Linear(4, 3)))
    model.register_forward_hook(lambda module, args, output: 2 * output)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    computer = HookGradientComputer(model, resolve_task("image_classification"))
    x, labels = draw(5, 4, seed=3), classes(5)
    for _ in range(2):
        computer.compute_per_sample_grad((x, labels))
        found = computer.compute_loss_grad((x, labels))
        chances = (2 * model[0](x + 1)).softmax(1)[torch.arange(5), labels]
        torch.testing.assert_close(found, 1 - chances[:, None])


def test_a_module_that_was_replaced_between_batches() -> None:
    model = randomize(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    task = resolve_task("image_classification")
    computer = HookGradientComputer(model, task)
    batch = draw(5, 4, seed=3), classes(5)
    for _ in range(2):
        found = flatten_rows(computer.compute_per_sample_grad(batch))
        assert_exact(found, expected(model, task, batch))
        model[0] = randomize(nn.Linear(4, 4), seed=1)


def test_a_mode_that_was_switched_between_batches() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0) if self.training else x

    model = randomize(nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 3)))
    computer = HookGradientComputer(model, resolve_task("image_classification"))
    batch = draw(5, 4, seed=3), classes(5)
    computer.compute_per_sample_grad(batch)
    model[1].train()
    with pytest.raises(GradientError, match="depends on the others"):
        computer.compute_per_sample_grad(batch)


@pytest.mark.parametrize("shapes", [[(5, 5, 4)], [(4, 6, 4), (5, 5, 4)]])
def test_a_bad_example_does_not_change_how_the_others_are_read(shapes: Any) -> None:
    model = randomize(Module(positions_first, **head(layer=nn.Linear(4, 4))))
    task = resolve_task("image_classification")
    computer = HookGradientComputer(model, task)
    rows = torch.tensor([0, 1, 3])
    for shape in shapes:
        x, labels = draw(*shape, seed=3), classes(shape[0])
        x[2] = torch.nan
        found = flatten_rows(computer.compute_per_sample_grad((x, labels)))
        assert_exact(found[rows], expected(model, task, (x[rows], labels[rows])))
        assert found[2].isnan().all()


class Sorted(nn.Module):
    """Runs its examples from the smallest to the largest, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x.sum(1).argsort()
        made = torch.tanh(self.layer(x[order]))
        return self.head(made[order.argsort()])


def test_a_model_that_sorts_is_noticed_on_a_later_batch() -> None:
    model = randomize(Sorted()).float()
    task = resolve_task("image_classification")
    engine = HookGradientComputer(model, task)
    x, y = draw(6, 4).float(), classes(6)
    in_order = x[x.sum(1).argsort()]
    for _ in range(7):
        engine.compute_per_sample_grad((in_order, y))
    message = r"'layer.*agreed with autograd on the first batch.* sort or pack"
    with pytest.raises(GradientError, match=message):
        engine.compute_per_sample_grad((in_order.flip(0), y))


def test_later_checks_leave_a_right_engine_alone() -> None:
    model = randomize(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    ).float()
    engine = HookGradientComputer(model, resolve_task("image_classification"))
    for seed in range(40):
        x, y = draw(9, 4, seed=seed).float(), classes(9, seed=seed)
        if seed % 5 == 0:
            x[3] = torch.inf
        engine.compute_per_sample_grad((x, y))
    assert "vmap" not in str(engine.coverage)
