"""The default engine against a loop over examples, on models of many kinds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from tests import reference
from tests.problems import classes, draw
from trak._batches import batch_size, take
from trak._params import flatten_rows
from trak.gradient_computers import HookGradientComputer
from trak.gradient_computers._ladder import Rung
from trak.modelout_functions import resolve_task


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random float64 weights, in evaluation mode."""
    model = model.double().eval()
    for i, value in enumerate(model.parameters()):
        value.data = draw(*value.shape, seed=1000 * seed + i) / 2
    return model


def expected(model: nn.Module, task: Any, batch: Any, **selected: Any) -> Tensor:
    """Gradients by the oracle: one example, one backward pass: (b, d)."""
    chosen = [
        value
        for name, value in model.named_parameters()
        if value.requires_grad and selected.get("only", name) == name
    ]

    def output(i: int) -> Tensor:
        return task.get_outputs(model, None, None, take(batch, slice(i, i + 1)))[0]

    return reference.loop_gradients(output, batch_size(batch), chosen)


def compute(
    model: nn.Module, batch: Any, kind: str = "image_classification"
) -> tuple[Tensor, Tensor, HookGradientComputer]:
    task = resolve_task(kind)
    computer = HookGradientComputer(model, task)
    found = flatten_rows(computer.compute_per_sample_grad(batch))
    return found, expected(model, task, batch), computer


def assert_exact(found: Tensor, known: Tensor) -> None:
    scale = float(known.abs().max())
    torch.testing.assert_close(found, known, rtol=1e-8, atol=1e-10 * scale)


class Module(nn.Module):
    """A module from its parts and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class RMSNorm(nn.Module):
    """A norm as language models write it themselves."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Projection(nn.Module):
    """A matrix that only this class knows how to use."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = parameter(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,ij->...j", x, self.matrix)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def head(**parts: Any) -> dict[str, Any]:
    return {**parts, "head": nn.Linear(4, 3)}


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, **options)


def reused(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.tanh(m.layer(x))
    return m.head(x)


def written_to(m: Any, x: Tensor) -> Tensor:
    inner = torch.sin(m.layer(x)) + 0
    result = m.head(inner)
    inner += 1  # what the head got; its weight is frozen, so autograd does not need it
    return result


def frozen_head(model: nn.Module) -> nn.Module:
    model.head.weight.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    return model


TOKENS = (5, 6, 4)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[Rung]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4), {Rung.LAYER}),
    "class token": (
        lambda: Module(
            lambda m, x: m.head(
                torch.cat([m.token.expand(len(x), -1, -1), x], 1).relu().mean(1)
            ),
            **head(token=parameter(1, 1, 4)),
        ),
        TOKENS,
        {Rung.LAYER, Rung.COPIES},
    ),
    "positions in a buffer": (
        lambda: Module(
            lambda m, x: m.head(torch.tanh(x + m.where(torch.arange(6)[None])).sum(1)),
            **head(where=nn.Embedding(9, 4)),
        ),
        TOKENS,
        {Rung.LAYER},
    ),
    "positions without batch": (
        lambda: Module(
            lambda m, x: m.head(torch.tanh(x + m.where(torch.arange(10))).sum(1)),
            **head(where=nn.Embedding(11, 4)),
        ),
        (5, 10, 4),
        {Rung.LAYER},
    ),
    "as many positions as examples": (
        lambda: Module(
            lambda m, x: m.head(torch.tanh(x + m.where(torch.arange(5))).sum(1)),
            **head(where=nn.Embedding(9, 4)),
        ),
        (5, 5, 4),
        {Rung.LAYER},
    ),
    "flattened tokens": (
        lambda: Module(
            lambda m, x: m.head(
                m.norm(torch.tanh(m.layer(x.reshape(-1, 4)))).reshape(x.shape).sum(1)
            ),
            **head(layer=nn.Linear(4, 4), norm=nn.LayerNorm(4)),
        ),
        TOKENS,
        {Rung.LAYER},
    ),
    "flattened frames": (
        lambda: Module(
            lambda m, x: m.head(
                torch.tanh(m.layer(x.reshape(-1, 1, 4))).reshape(len(x), 6, 4).sum(1)
            ),
            **head(layer=nn.Conv1d(1, 1, 3, padding=1)),
        ),
        TOKENS,
        {Rung.LAYER},
    ),
    "examples second": (
        lambda: Module(
            lambda m, x: m.head(torch.tanh(m.layer(x.transpose(0, 1))).sum(0)),
            **head(layer=nn.Linear(4, 4)),
        ),
        TOKENS,
        {Rung.LAYER},
    ),
    "examples second, as many": (
        lambda: Module(
            lambda m, x: m.head(torch.tanh(m.layer(x.transpose(0, 1))).sum(0)),
            **head(layer=nn.Linear(4, 4)),
        ),
        (5, 5, 4),
        {Rung.LAYER},
    ),
    "attention": (
        lambda: Module(
            lambda m, x: m.head(m.layer(x).sum(1)),
            **head(layer=encoder(batch_first=True)),
        ),
        TOKENS,
        {Rung.LAYER, Rung.MODULE},
    ),
    "attention, examples second": (
        lambda: Module(
            lambda m, x: m.head(m.layer(x.transpose(0, 1)).sum(0)),
            **head(layer=encoder(norm_first=True)),
        ),
        TOKENS,
        {Rung.LAYER, Rung.MODULE},
    ),
    "masked attention": (
        lambda: Module(
            lambda m, x: m.head(
                m.layer(
                    x,
                    src_mask=torch.ones(6, 6).tril() == 0,
                    src_key_padding_mask=(torch.arange(6) > 4).expand(len(x), 6),
                ).sum(1)
            ),
            **head(layer=encoder(batch_first=True)),
        ),
        TOKENS,
        {Rung.LAYER, Rung.MODULE},
    ),
    "attention alone": (
        lambda: Module(
            lambda m, x: m.layer(x, x, x)[0].sum(1)[:, :3],
            layer=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        TOKENS,
        {Rung.MODULE},
    ),
    "recurrent": (
        lambda: Module(
            lambda m, x: m.head(m.layer(x)[1][0][-1]),
            **head(layer=nn.LSTM(4, 4, num_layers=2, batch_first=True)),
        ),
        TOKENS,
        {Rung.LAYER, Rung.MODULE},
    ),
    "recurrent, examples second": (
        lambda: Module(
            lambda m, x: m.head(m.layer(x.transpose(0, 1))[0][-1]),
            **head(layer=nn.GRU(4, 4)),
        ),
        TOKENS,
        {Rung.LAYER, Rung.MODULE},
    ),
    "norm of its own": (
        lambda: Module(
            lambda m, x: m.head(m.norm(m.layer(x)).sum(1)),
            **head(layer=nn.Linear(4, 4), norm=RMSNorm(4)),
        ),
        TOKENS,
        {Rung.LAYER, Rung.COPIES},
    ),
    "matrix of its own": (
        lambda: Module(
            lambda m, x: m.head(torch.tanh(m.layer(x)).sum(1)),
            **head(layer=Projection()),
        ),
        TOKENS,
        {Rung.LAYER, Rung.MODULE},
    ),
    "scales": (
        lambda: Module(
            lambda m, x: m.head((m.gamma * torch.tanh(m.layer(x)) + x * m.beta).sum(1)),
            **head(layer=nn.Linear(4, 4), gamma=parameter(4), beta=parameter()),
        ),
        TOKENS,
        {Rung.LAYER, Rung.COPIES},
    ),
    "used three times": (
        lambda: Module(reused, **head(layer=nn.Linear(4, 4))),
        (5, 4),
        {Rung.LAYER},
    ),
    "input written to": (
        lambda: frozen_head(Module(written_to, **head(layer=nn.Linear(4, 4)))),
        (5, 4),
        {Rung.LAYER},
    ),
    "view written to": (
        lambda: nn.Sequential(
            nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), Mean()
        ),
        TOKENS,
        {Rung.LAYER},
    ),
    "in place": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 3, 3, groups=3),
            nn.SiLU(inplace=True),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (5, 2, 4, 4),
        {Rung.LAYER},
    ),
    "checkpointed": (
        lambda: Module(
            lambda m, x: m.head(
                checkpoint(
                    lambda y: torch.tanh(m.layer(y)), m.first(x), use_reentrant=False
                )
            ),
            **head(first=nn.Linear(4, 4), layer=nn.Linear(4, 4)),
        ),
        (5, 4),
        {Rung.LAYER},
    ),
    "checkpointed, the older kind": (
        lambda: Module(
            lambda m, x: m.head(
                checkpoint(
                    lambda y: torch.tanh(m.layer(y)), m.first(x), use_reentrant=True
                )
            ),
            **head(first=nn.Linear(4, 4), layer=nn.Linear(4, 4)),
        ),
        (5, 4),
        {Rung.LAYER},
    ),
    "weight norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            nn.Tanh(),
            nn.Linear(4, 3),
        ),
        (5, 4),
        set(),
    ),
}


@pytest.fixture
def backward_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the oracle differentiate checkpoints of the older kind, which need backward."""

    def loop(output: Any, n: int, parameters: Any) -> Tensor:
        rows = []
        for i in range(n):
            for value in parameters:
                value.grad = None
            output(i).backward()
            rows.append(torch.cat([value.grad.reshape(-1) for value in parameters]))
        for value in parameters:
            value.grad = None
        return torch.stack(rows)

    monkeypatch.setattr(reference, "loop_gradients", loop)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("b", [1, 2, 5])
def test_models(name: str, b: int, request: pytest.FixtureRequest) -> None:
    if "older" in name:
        request.getfixturevalue("backward_oracle")
    make, shape, rungs = MODELS[name]
    model = randomize(make())
    batch = draw(b, *shape[1:], seed=3), classes(b)
    with warnings.catch_warnings():
        if not rungs or "older" in name:  # the latter warns without gradients
            warnings.simplefilter("ignore")
        found, known, computer = compute(model, batch)
    assert_exact(found, known)
    if rungs:
        assert set(computer.coverage.rungs.values()) == rungs
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_batches_of_other_sizes_follow(
    name: str, request: pytest.FixtureRequest
) -> None:
    """A guess that held for one batch is not trusted for another kind of batch."""
    if "older" in name:
        request.getfixturevalue("backward_oracle")
    make, shape, _ = MODELS[name]
    model, task = randomize(make()), resolve_task("image_classification")
    computer = HookGradientComputer(model, task)
    for b in (1, 5, 2, shape[1], 1):
        batch = draw(b, *shape[1:], seed=b), classes(b)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = flatten_rows(computer.compute_per_sample_grad(batch))
        assert_exact(found, expected(model, task, batch))


# -- random architectures -------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner, self.gamma = inner, parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.inner(x)


class Attend(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


def random_tokens(generator: torch.Generator, size: int) -> Iterator[nn.Module]:
    """Blocks of ``(b, t, size)``, some of them used twice or tied."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    shared = nn.Linear(size, size)
    blocks: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(size, size),
        lambda: nn.Sequential(
            nn.Linear(size, 2 * size), nn.ReLU(True), nn.Linear(2 * size, size)
        ),
        lambda: nn.LayerNorm(size, elementwise_affine=bool(pick(2))),
        lambda: RMSNorm(size),
        lambda: Attend(size),
        lambda: Scaled(nn.Linear(size, size), size),
        lambda: shared,
        nn.GELU,
        lambda: nn.MultiheadAttention(size, 2, batch_first=True),
    ]
    for _ in range(2 + pick(4)):
        block = blocks[pick(len(blocks))]()
        if isinstance(block, nn.MultiheadAttention):
            block = Module(
                lambda m, x: m.layer(x, x, x, need_weights=False)[0], layer=block
            )
        if isinstance(block, nn.Linear) and pick(3) == 0 and block is not shared:
            block.weight = shared.weight
        yield Residual(block) if pick(2) else block
        yield [nn.Identity(), nn.SiLU(inplace=True), nn.Tanh()][pick(3)]


def random_images(generator: torch.Generator, c: int) -> Iterator[nn.Module]:
    """Blocks of ``(b, c, h, w)``."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    blocks: list[Callable[[], nn.Module]] = [
        lambda: nn.Conv2d(c, c, 3, padding=1, bias=bool(pick(2))),
        lambda: nn.Conv2d(c, c, 1 + 2 * pick(2), padding="same", groups=c),
        lambda: nn.BatchNorm2d(c),
        lambda: nn.GroupNorm(2, c),
        lambda: nn.PReLU(c),
        lambda: nn.ConvTranspose2d(c, c, 3, padding=1),
    ]
    for _ in range(2 + pick(4)):
        block = blocks[pick(len(blocks))]()
        yield Residual(block) if pick(2) else block
        yield [nn.Identity(), nn.ReLU(inplace=True), nn.Tanh()][pick(3)]


@pytest.mark.parametrize("seed", range(16))
def test_random_architectures(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b = int(torch.randint(1, 6, (), generator=generator))
    if seed % 2:
        size, shape = 4, (b, 3 + seed % 3, 4)
        body = nn.Sequential(*random_tokens(generator, size))
        model = Module(
            lambda m, x: m.head(m.body(m.first(x)).mean(1)),
            first=nn.Linear(4, size),
            body=body,
            head=nn.Linear(size, 3),
        )
    else:
        size, shape = 4, (b, 2, 5, 5)
        body = nn.Sequential(*random_images(generator, size))
        model = Module(
            lambda m, x: m.head(m.body(m.first(x)).mean((2, 3))),
            first=nn.Conv2d(2, size, 3, stride=2),
            body=body,
            head=nn.Linear(size, 3),
        )
    model = randomize(model, seed)
    for value in model.parameters():
        if torch.rand((), generator=generator) < 0.2:
            value.requires_grad_(False)
    model.head.bias.requires_grad_()
    batch = draw(*shape, seed=seed), classes(b, seed=seed)
    found, known, computer = compute(model, batch)
    assert_exact(found, known)
    assert not computer.coverage.share(Rung.VMAP) + computer.coverage.share(Rung.LOOP)


# -- weights that are computed from parameters ------------------------------------------

DERIVED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "weight_norm before parametrizations": nn.utils.weight_norm,
    "spectral_norm before parametrizations": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("b", [1, 12])
def test_weights_that_are_computed_from_parameters(name: str, b: int) -> None:
    """Copies of them for each example would end the process in weight_norm's kernel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of them are deprecated; the rung is slow
        layer = DERIVED[name](nn.Linear(5, 3))
        model = randomize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), layer))
        found, known, computer = compute(model, (draw(b, 4), classes(b)))
    assert_exact(found, known)
    served = computer.coverage.rungs
    own = [way for key, way in served.items() if not key.endswith(("bias", "0.weight"))]
    assert own
    assert set(own) == {Rung.VMAP}


# -- models of transformers -----------------------------------------------------------

SIZES = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_labels": 3,
}
T5 = {
    "vocab_size": 30,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "gpt2": (
        "GPT2ForSequenceClassification",
        "GPT2Config",
        {
            "vocab_size": 30,
            "n_embd": 8,
            "n_layer": 2,
            "n_head": 2,
            "num_labels": 3,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
    ),
    "llama": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**SIZES, "num_key_value_heads": 1, "pad_token_id": 0},
    ),
    "t5": (
        "T5ForSequenceClassification",
        "T5Config",
        {
            **T5,
            "num_labels": 3,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**SIZES, "image_size": 8, "patch_size": 4},
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, config, options = TRANSFORMERS[name]
    config = getattr(transformers, config)(**{
        k: v for k, v in options.items() if name != "vit" or k != "vocab_size"
    })
    model = randomize(getattr(transformers, kind)(config))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 30, (5, 7), generator=generator)
    ids[torch.arange(5), torch.tensor([6, 5, 6, 3, 4])] = 1  # the end of the text
    ids[(torch.cumsum(ids == 1, 1) - (ids == 1).long()) > 0] = 0
    batch: dict[str, Tensor] = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if name == "vit":
        batch = {"pixel_values": draw(5, 3, 8, 8)}
    batch["labels"] = classes(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, known, computer = compute(model, batch, "text_classification")
    scale = float(known.abs().max())
    torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-6 * scale)
    slow = computer.coverage.share(Rung.VMAP) + computer.coverage.share(Rung.LOOP)
    assert slow == 0
