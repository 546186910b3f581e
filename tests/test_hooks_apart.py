"""What no example has a part in, and is broadcast over the examples later."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.problems import classes, draw
from tests.test_hooks_models import (
    Module,
    assert_exact,
    compute,
    expected,
    head,
    parameter,
    randomize,
)
from trak._batches import take
from trak._params import flatten_rows
from trak.errors import TrakWarning
from trak.gradient_computers import HookGradientComputer
from trak.gradient_computers._ladder import LARGEST_FOLLOWED, Rung
from trak.gradient_computers._sinks import GradientSink
from trak.modelout_functions import resolve_task

T = 7
BATCH = draw(3, T, 4, seed=1), classes(3)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def distances(t: int = T) -> Tensor:
    places = torch.arange(t)
    return (places[:, None] - places).abs() % 4


def scores(x: Tensor) -> Tensor:
    """Of two heads: (b, 2, t, t)."""
    halves = x.unflatten(-1, (2, 2)).transpose(1, 2)
    return halves @ halves.mT


def mixed(m: Any, made: Tensor, x: Tensor) -> Tensor:
    mixed = made.softmax(-1) @ x.unflatten(-1, (2, 2)).transpose(1, 2)
    return m.head(torch.tanh(mixed.transpose(1, 2).flatten(2)).sum(1))


def biased(m: Any, x: Tensor) -> Tensor:
    """As in T5: looked up once, and used in two layers."""
    bias = m.table(distances(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
    x = x + m.layer(x)
    first = mixed(m, scores(x) + bias, x)
    return first + mixed(m, scores(torch.sin(x)) + bias, x)


def masked(m: Any, x: Tensor) -> Tensor:
    """Its batch comes in by a mask that needs no gradient."""
    bias = m.table(distances(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
    mask = x[:, :, 0].detach() > 0.5
    bias = bias + mask[:, None, None].to(x) * -5
    return mixed(m, scores(x + m.layer(x)) + bias, x)


def filled(m: Any, x: Tensor) -> Tensor:
    bias = m.table(distances(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
    mask = x[:, :, 0].detach() > 0.5
    bias = bias.masked_fill(mask[:, None, None], -5.0)
    return mixed(m, scores(x + m.layer(x)) + bias, x)


def fused(m: Any, x: Tensor) -> Tensor:
    bias = m.table(distances(x.shape[1])).permute(2, 0, 1)[None]
    x = (x + m.layer(x)).unflatten(-1, (2, 2)).transpose(1, 2)
    made = F.scaled_dot_product_attention(x, x, x, attn_mask=bias)
    return m.head(torch.tanh(made.transpose(1, 2).flatten(2)).sum(1))


def in_place(m: Any, x: Tensor) -> Tensor:
    bias = m.table(distances(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
    bias *= 2
    made = scores(x + m.layer(x)) * 1
    made += bias
    bias.add_(1)
    return mixed(m, made + bias.sin(), x)


def expanded(m: Any, x: Tensor) -> Tensor:
    bias = torch.tanh(m.table(distances(x.shape[1])).permute(2, 0, 1))
    bias = bias.expand(len(x), -1, -1, -1) * 2
    return mixed(m, scores(x + m.layer(x)) * bias, x)


def repeated(m: Any, x: Tensor) -> Tensor:
    bias = m.table(distances(x.shape[1])).permute(2, 0, 1).contiguous()
    bias = bias.repeat(len(x), 1, 1)  # as many blocks of heads as examples
    made = scores(x + m.layer(x)).flatten(0, 1)
    return mixed(m, (made + bias).unflatten(0, (len(x), 2)), x)


def stacked(m: Any, x: Tensor) -> Tensor:
    """Each example has its own before any function with two tensors."""
    bias = m.table(distances(x.shape[1])).permute(2, 0, 1)
    bias = torch.stack([bias] * len(x)) * 2
    return mixed(m, scores(x + m.layer(x)) + bias, x)


def picked(m: Any, x: Tensor) -> Tensor:
    """What is looked up differs between examples, in a table that all share."""
    made = torch.tanh(m.table(distances(x.shape[1])))[:, 0]
    chosen = made[(x[:, :, 0] > 0).long() + 1]
    return m.head(torch.tanh(chosen.sum(-1, keepdim=True) * m.layer(x)).sum(1))


def refined(m: Any, x: Tensor) -> Tensor:
    """As in DeBERTa: what was looked up goes through layers that examples go through."""
    table = m.norm(m.table.weight[:5]).unsqueeze(0)
    keys = m.layer(table)
    return m.head(torch.tanh(m.layer(x) @ torch.tanh(keys).mT).sum(1)[:, :4])


def of_a_net(m: Any, x: Tensor) -> Tensor:
    """As in Swin: the table is made by a network from coordinates."""
    coordinates = torch.linspace(-1, 1, 10)[:, None].to(x)
    table = m.outer(torch.relu(m.inner(coordinates)))
    bias = table[distances(x.shape[1])].permute(2, 0, 1)
    return mixed(m, scores(x + m.layer(x)) + 3 * bias[None].sigmoid(), x)


def in_windows(m: Any, x: Tensor) -> Tensor:
    """As in Swin: several windows an example are rows of the batch."""
    bias = m.table[distances(3)].permute(2, 0, 1)[None]
    windows = (x + m.layer(x))[:, :6].unflatten(1, (2, 3)).flatten(0, 1)
    made = (scores(windows) + bias).softmax(-1).sum(1) @ windows
    return m.head(torch.tanh(made.unflatten(0, (len(x), 2))).sum((1, 2)))


def multiplied(m: Any, x: Tensor) -> Tensor:
    """As in open_clip: the model holds a matrix itself; the other is its transpose."""
    made = torch.tanh(m.layer(torch.sin(x @ m.first.matrix)))
    made = made @ torch.tanh(m.inner.matrix)
    made = F.linear(torch.sin(made), m.outer.matrix)
    return m.head(torch.sin(made).flatten(1, -1)[:, :4])


class Held(nn.Module):
    """A matrix whose module is not called."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.matrix = parameter(*shape)


class Scaled(nn.Embedding):
    """As in Gemma: it does more than look up."""

    def forward(self, ids: Tensor) -> Tensor:
        found = super().forward(ids) * torch.tensor(3.0).to(self.weight.dtype)
        return torch.sin(found)


class Places(nn.Embedding):
    """As in BART: it makes the ids itself, for all examples together."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[1]) + 2)


class Router(nn.Module):
    """As in a mixture of experts: rows are tokens, and one output is made of another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        shares, which = logits.softmax(-1).topk(2, -1)
        shares /= shares.sum(-1, keepdim=True)
        return logits, shares, which


class Experts(nn.Module):
    """Only the experts that are chosen run, so ``vmap`` cannot run it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = parameter(3, 4, 4)

    def forward(self, x: Tensor, shares: Tensor, which: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        for k in which.unique().tolist():
            rows, places = torch.where(which == k)
            found = torch.tanh(x[rows] @ self.weights[k]) * shares[rows, places, None]
            made = made.index_add(0, rows, found)
        return made


def routed(m: Any, x: Tensor) -> Tensor:
    rows = m.layer(x).flatten(0, 1)
    logits, shares, which = m.router(rows)
    made = m.experts(rows, shares, which).unflatten(0, x.shape[:2])
    return m.head(made.sum(1)) + logits.unflatten(0, x.shape[:2]).sin().sum(1)


def table(**parts: Any) -> dict[str, Any]:
    return head(table=nn.Embedding(4, 2), layer=nn.Linear(4, 4), **parts)


MODELS: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Any]], Rung]] = {
    **{
        function.__name__: (function, table, Rung.LAYER)
        for function in (
            biased,
            masked,
            filled,
            fused,
            in_place,
            expanded,
            repeated,
            stacked,
            picked,
        )
    },
    "refined": (
        refined,
        lambda: head(
            table=nn.Embedding(9, 4), norm=nn.LayerNorm(4), layer=nn.Linear(4, 4)
        ),
        Rung.FOLLOWED,
    ),
    "of a net": (
        of_a_net,
        lambda: head(
            inner=nn.Linear(1, 5), outer=nn.Linear(5, 2), layer=nn.Linear(4, 4)
        ),
        Rung.LAYER,
    ),
    "in windows": (
        in_windows,
        lambda: head(table=parameter(4, 2), layer=nn.Linear(4, 4)),
        Rung.FOLLOWED,
    ),
    "multiplied": (
        multiplied,
        lambda: head(
            first=Held(4, 4),
            layer=nn.Linear(4, 4),
            inner=Held(4, 6),
            outer=Held(2, 6),
        ),
        Rung.FOLLOWED,
    ),
    "scaled": (
        lambda m, x: m.head(m.scaled((x * 2).long().abs()).flatten(2).sum(1)),
        lambda: {"scaled": Scaled(9, 4), "head": nn.Linear(16, 3)},
        Rung.LAYER,
    ),
    "places": (
        lambda m, x: m.head(torch.tanh(m.layer(x) + m.places(x)).sum(1)),
        lambda: head(places=Places(12, 4), layer=nn.Linear(4, 4)),
        Rung.LAYER,
    ),
    "routed": (
        routed,
        lambda: head(router=Router(), experts=Experts(), layer=nn.Linear(4, 4)),
        Rung.MODULE,
    ),
}


def made(name: str) -> tuple[nn.Module, Rung]:
    function, parts, rung = MODELS[name]
    return randomize(Module(function, **parts())), rung


@pytest.mark.parametrize("name", MODELS)
def test_apart_from_the_examples(name: str) -> None:
    model, rung = made(name)
    found, known, computer = compute(model, BATCH)
    assert_exact(found, known)
    assert set(computer.coverage.rungs.values()) <= {rung, Rung.LAYER}
    assert rung in computer.coverage.rungs.values()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("b", [1, 2, 7])
def test_batches_of_other_sizes(name: str, b: int) -> None:
    """As many as heads, as many as positions, and a single one."""
    model, _ = made(name)
    computer = HookGradientComputer(model, task := resolve_task("image_classification"))
    batch = draw(b, T, 4, seed=2), classes(b)
    for given in (batch, BATCH, take(batch, slice(0, 1)), batch):
        found = flatten_rows(computer.compute_per_sample_grad(given))
        assert_exact(found, expected(model, task, given))
    assert Rung.LOOP not in computer.coverage.rungs.values()


def test_nothing_stays_on_the_model() -> None:
    for name in ("refined", "scaled", "in windows"):
        model, _ = made(name)
        before = {id(value) for value in model.parameters()}
        compute(model, BATCH)
        assert {id(value) for value in model.parameters()} == before
        assert all(value.requires_grad for value in model.parameters())
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_nothing_stays_on_the_model_after_an_error() -> None:
    def failing(m: Any, x: Tensor) -> Tensor:
        found = in_windows(m, x)
        if len(x) == 2:
            raise ZeroDivisionError
        return found

    model = randomize(Module(failing, **MODELS["in windows"][1]()))
    task = resolve_task("image_classification")
    computer = HookGradientComputer(model, task)
    computer.compute_per_sample_grad(BATCH)
    with pytest.raises(ZeroDivisionError):
        computer.compute_per_sample_grad(take(BATCH, slice(0, 2)))
    assert isinstance(model.table, nn.Parameter)
    found = flatten_rows(computer.compute_per_sample_grad(BATCH))
    assert_exact(found, expected(model, task, BATCH))


def test_what_meets_the_examples_in_another_way() -> None:
    """An einsum takes no copies, and the table is for vmap; the layers are not."""

    def relative(m: Any, x: Tensor) -> Tensor:
        table = m.table(distances(x.shape[1]))
        made = torch.einsum("bqi,qki->bk", m.layer(x)[..., :2], table)
        return m.head(torch.tanh(made)[:, :4])

    model = randomize(Module(relative, **table()))
    with pytest.warns(TrakWarning, match=r"table\.weight by vmap .*in no known way"):
        found, known, computer = compute(model, BATCH)
    assert_exact(found, known)
    ways = computer.coverage.rungs
    assert [name for name, way in ways.items() if way is Rung.VMAP] == ["table.weight"]


def test_inputs_of_a_matrix_that_are_written_to() -> None:
    """Autograd refuses the model as it is, and so does the engine, in its words."""

    def overwritten(m: Any, x: Tensor) -> Tensor:
        inner = torch.tanh(x)
        made = inner @ m.inner.matrix
        inner += 1
        return m.head(torch.sin(made).sum(1))

    parts = head(inner=Held(4, 4))
    model = randomize(Module(overwritten, **parts))
    for value in model.head.parameters():
        value.requires_grad_(False)
    task = resolve_task("image_classification")
    computer = HookGradientComputer(model, task)
    for call in (
        lambda: expected(model, task, BATCH),
        lambda: computer.compute_per_sample_grad(BATCH),
    ):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            call()


def test_a_large_table_is_not_followed() -> None:
    rows = LARGEST_FOLLOWED // 4 + 1
    parts = head(
        table=nn.Embedding(rows, 4), norm=nn.LayerNorm(4), layer=nn.Linear(4, 4)
    )
    model = Module(refined, **parts)
    computer = HookGradientComputer(model, resolve_task("image_classification"))
    ladder = computer._made().ladder
    assert Rung.FOLLOWED not in ladder._ways["table.weight"]


def test_half_precision_does_not_hide_what_is_missing() -> None:
    """A table of little weight, used outside of its layer, is found all the same."""
    model, _ = made("refined")
    model.norm.weight.data *= 1e-3
    model = model.to(torch.bfloat16)
    batch = BATCH[0].to(torch.bfloat16), BATCH[1]
    task = resolve_task("image_classification")
    exact, wide = copy.deepcopy(model).double(), (batch[0].double(), batch[1])
    known = expected(exact, task, wide, only="table.weight")
    computer = HookGradientComputer(model, task)
    found = computer.compute_per_sample_grad(batch)["table.weight"]
    assert computer.coverage.rungs["table.weight"] is Rung.FOLLOWED
    errors = (found.flatten(1).double() - known).norm(dim=1) / known.norm(dim=1)
    assert (errors < 0.05).all()  # bfloat16 has 8 bits


def test_a_table_that_is_not_used() -> None:
    """It meets nobody, and its gradient is zero."""

    def idle(m: Any, x: Tensor) -> Tensor:
        m.table(distances(x.shape[1])).sin()
        return m.head(m.layer(x).sum(1))

    model = randomize(Module(idle, **table()))
    found, known, computer = compute(model, BATCH)
    assert_exact(found, known)
    assert set(computer.coverage.rungs.values()) == {Rung.LAYER}


def test_values_that_are_not_finite() -> None:
    """One example's are its own."""
    model, _ = made("biased")
    task = resolve_task("image_classification")
    computer = HookGradientComputer(model, task)
    x, y = BATCH
    computer.compute_per_sample_grad(BATCH)
    spoilt = x.clone()
    spoilt[1] = torch.nan
    found = flatten_rows(computer.compute_per_sample_grad((spoilt, y)))
    known = expected(model, task, BATCH)
    assert_exact(found[[0, 2]], known[[0, 2]])
    assert found[1].isnan().all()


class Counting:
    """A sink that counts what comes for one parameter."""

    block_bytes = 1 << 20

    def __init__(self, name: str) -> None:
        self.name, self.whole, self.runs = name, 0, 0

    def add(self, parameter: str, rows: slice, grads: Tensor, offset: int = 0) -> None:
        self.whole += (parameter == self.name) * grads.numel()

    def add_segments(
        self, parameter: str, grads: Tensor, examples: Tensor, positions: Tensor
    ) -> None:
        self.runs += (parameter == self.name) * grads.numel()

    def clear(self) -> None:
        self.whole = self.runs = 0


def test_a_small_table_is_handed_over_whole() -> None:
    model, _ = made("biased")
    computer = HookGradientComputer(model, resolve_task("image_classification"))
    sink: GradientSink = Counting("table.weight")
    computer.stream_per_sample_grads(BATCH, sink)
    assert (sink.whole, sink.runs) == (3 * 4 * 2, 0)
