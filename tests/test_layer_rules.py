"""Every layer's rule against autograd of one example at a time, in float64."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trak.errors import GradientError
from trak.gradient_computers import _layer_rules_conv
from trak.gradient_computers._layer_rules import LayerRule, SegmentRule, rule_for

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def perturbed(module: nn.Module) -> nn.Module:
    """The module in eval mode and float64, none of its numbers a special one."""
    module = module.double().eval()
    for i, value in enumerate(module.parameters()):
        value.data = draw(*value.shape, seed=100 + i)
    for name, value in module.named_buffers():
        if name == "running_mean":
            value.copy_(draw(*value.shape, seed=200))
        if name == "running_var":
            value.copy_(draw(*value.shape, seed=201).abs() + 0.1)
    return module


def rule_of(module: nn.Module) -> LayerRule:
    rule = rule_for(module)
    assert isinstance(rule, LayerRule), rule
    return rule


def reference(
    module: nn.Module, inputs: Tensor, output_grad: Tensor
) -> dict[str, Tensor]:
    # Contiguous: torch 2.13 gives wrong gradients of batch and instance normalisation
    # for one example where the input or the output's gradient has its channels last.
    inputs, output_grad = inputs.contiguous(), output_grad.contiguous()
    names, values = zip(*module.named_parameters(recurse=False), strict=True)
    rows = [
        torch.autograd.grad(module(x[None]), values, g[None])
        for x, g in zip(inputs, output_grad, strict=True)
    ]
    return {
        name: torch.stack([row[i].flatten() for row in rows])
        for i, name in enumerate(names)
    }


def formed(
    module: nn.Module,
    inputs: Tensor,
    output_grad: Tensor,
    wanted: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    rule = rule_of(module)
    if wanted is None:
        wanted = tuple(name for name, _ in module.named_parameters(recurse=False))
    return dict(rule.per_sample(module, inputs, output_grad, frozenset(wanted)))


def strange(values: Tensor) -> Tensor:
    """The same values, laid out so that no two dimensions are contiguous."""
    wide = torch.zeros(*values.shape, 2, dtype=values.dtype)
    wide = wide.transpose(0, -2) if values.ndim > 1 else wide
    wide = wide.contiguous()
    wide = wide.transpose(0, -2) if values.ndim > 1 else wide
    wide[..., 1] = values
    return wide[..., 1]


def laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "strange":
        return strange(values)
    if layout == "channels last" and values.ndim in {4, 5}:
        kind = torch.channels_last if values.ndim == 4 else torch.channels_last_3d
        return values.contiguous(memory_format=kind)
    if layout == "expanded":
        return values[:1].expand_as(values)
    return values


def check(
    module: nn.Module, inputs: Tensor, layout: str = "plain", low: bool = True
) -> None:
    module = perturbed(module)
    inputs = laid_out(inputs, layout)
    outputs: Tensor = module(inputs).detach()
    output_grad = laid_out(draw(*outputs.shape, seed=7), layout)
    expected = reference(module, inputs, output_grad)
    before = inputs.clone(), output_grad.clone()
    found = formed(module, inputs, output_grad)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close((inputs, output_grad), before, rtol=0, atol=0)
    if low:  # the forms of float32 are chosen otherwise
        narrow = copy.deepcopy(module).float()
        x = inputs.float() if inputs.is_floating_point() else inputs
        for name, grads in formed(narrow, x, output_grad.float()).items():
            atol = 2e-5 * float(expected[name].abs().max())
            torch.testing.assert_close(
                grads, expected[name].float(), rtol=1e-4, atol=atol
            )


def ids(*shape: int, rows: int) -> Tensor:
    return torch.randint(rows, shape, generator=generator())


LAYERS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "linear": lambda b: (nn.Linear(5, 3), draw(b, 5)),
    "linear without bias": lambda b: (nn.Linear(5, 3, bias=False), draw(b, 4, 5)),
    "linear of tokens": lambda b: (nn.Linear(5, 3), draw(b, 4, 5)),
    "linear of many dimensions": lambda b: (nn.Linear(1, 3), draw(b, 2, 3, 4, 1)),
    "conv1d": lambda b: (nn.Conv1d(2, 3, 4, 2, 3, 2), draw(b, 2, 11)),
    "conv1d same": lambda b: (nn.Conv1d(2, 3, 4, padding="same"), draw(b, 2, 9)),
    "conv1d valid": lambda b: (nn.Conv1d(2, 3, 4, padding="valid"), draw(b, 2, 9)),
    "conv1d of one position": lambda b: (nn.Conv1d(2, 3, 4), draw(b, 2, 4)),
    "conv2d": lambda b: (nn.Conv2d(3, 4, 3, padding=1), draw(b, 3, 6, 5)),
    "conv2d 1x1": lambda b: (nn.Conv2d(3, 4, 1), draw(b, 3, 6, 5)),
    "conv2d 1x1 in groups": lambda b: (nn.Conv2d(4, 6, 1, groups=2), draw(b, 4, 6, 5)),
    "conv2d 1x1 strided": lambda b: (nn.Conv2d(3, 4, 1, 2), draw(b, 3, 6, 5)),
    "conv2d 1x1 padded": lambda b: (nn.Conv2d(3, 4, 1, padding=1), draw(b, 3, 6, 5)),
    "conv2d patches": lambda b: (nn.Conv2d(3, 40, 4, 4), draw(b, 3, 9, 8)),
    "conv2d narrow": lambda b: (nn.Conv2d(3, 2, 3, padding=1), draw(b, 3, 16, 16)),
    "conv2d of eight": lambda b: (nn.Conv2d(8, 9, 3, (2, 1)), draw(b, 8, 16, 16)),
    "conv2d wide": lambda b: (nn.Conv2d(4, 30, 3, padding=1), draw(b, 4, 5, 5)),
    "conv2d in groups": lambda b: (
        nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2),
        draw(b, 4, 7, 6),
    ),
    "conv2d depthwise": lambda b: (nn.Conv2d(9, 9, 3, groups=9), draw(b, 9, 9, 9)),
    "conv2d multiplied": lambda b: (nn.Conv2d(3, 6, 3, groups=3), draw(b, 3, 9, 9)),
    "conv2d groups of eight": lambda b: (
        nn.Conv2d(16, 16, 3, groups=2),
        draw(b, 16, 9, 9),
    ),
    "conv2d same": lambda b: (
        nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)),
        draw(b, 2, 9, 8),
    ),
    "conv2d reflect": lambda b: (
        nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"),
        draw(b, 2, 7, 6),
    ),
    "conv2d replicate": lambda b: (
        nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="replicate"),
        draw(b, 2, 7, 6),
    ),
    "conv2d circular same": lambda b: (
        nn.Conv2d(2, 3, (4, 3), padding="same", padding_mode="circular"),
        draw(b, 2, 7, 6),
    ),
    "conv3d": lambda b: (
        nn.Conv3d(2, 3, (1, 2, 3), (1, 2, 1), (0, 1, 2)),
        draw(b, 2, 3, 4, 5),
    ),
    "conv3d in groups": lambda b: (
        nn.Conv3d(4, 8, 2, groups=4, dilation=(1, 2, 1)),
        draw(b, 4, 3, 4, 5),
    ),
    "conv_transpose1d": lambda b: (
        nn.ConvTranspose1d(2, 3, 3, 2, 2, 1),
        draw(b, 2, 6),
    ),
    "conv_transpose1d dilated": lambda b: (
        nn.ConvTranspose1d(2, 3, 3, 1, 1, 2, dilation=3),
        draw(b, 2, 6),
    ),
    "conv_transpose2d": lambda b: (
        nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2),
        draw(b, 4, 4, 5),
    ),
    "conv_transpose2d 1x1": lambda b: (nn.ConvTranspose2d(4, 6, 1), draw(b, 4, 4, 5)),
    "conv_transpose3d": lambda b: (
        nn.ConvTranspose3d(2, 3, 2, 2, 1, 1, bias=False),
        draw(b, 2, 3, 3, 2),
    ),
    "layer_norm": lambda b: (nn.LayerNorm(6), draw(b, 6)),
    "layer_norm of tokens": lambda b: (nn.LayerNorm(6), draw(b, 4, 6)),
    "layer_norm of two dimensions": lambda b: (nn.LayerNorm((4, 6)), draw(b, 3, 4, 6)),
    "layer_norm without bias": lambda b: (nn.LayerNorm(6, bias=False), draw(b, 4, 6)),
    "rms_norm": lambda b: (nn.RMSNorm(6), draw(b, 4, 6)),
    "rms_norm with eps": lambda b: (nn.RMSNorm((2, 3), eps=0.1), draw(b, 4, 2, 3)),
    "group_norm": lambda b: (nn.GroupNorm(2, 6), draw(b, 6, 4, 3)),
    "group_norm of features": lambda b: (nn.GroupNorm(2, 6), draw(b, 6)),
    "instance_norm1d": lambda b: (
        nn.InstanceNorm1d(3, affine=True),
        draw(b, 3, 5),
    ),
    "instance_norm2d": lambda b: (
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        draw(b, 3, 5, 4),
    ),
    "instance_norm3d": lambda b: (
        nn.InstanceNorm3d(3, affine=True),
        draw(b, 3, 5, 4, 2),
    ),
    "batch_norm1d": lambda b: (nn.BatchNorm1d(3), draw(b, 3)),
    "batch_norm1d of positions": lambda b: (nn.BatchNorm1d(3), draw(b, 3, 5)),
    "batch_norm2d": lambda b: (nn.BatchNorm2d(3), draw(b, 3, 5, 4)),
    "batch_norm3d": lambda b: (nn.BatchNorm3d(3), draw(b, 3, 5, 4, 2)),
    "prelu": lambda b: (nn.PReLU(), draw(b, 3, 5)),
    "prelu of one number": lambda b: (nn.PReLU(), draw(b)),
    "prelu of channels": lambda b: (nn.PReLU(3), draw(b, 3, 5)),
    "prelu of features": lambda b: (nn.PReLU(3), draw(b, 3)),
    "embedding": lambda b: (nn.Embedding(5, 3), ids(b, 4, rows=5)),
    "embedding of one id": lambda b: (nn.Embedding(5, 3), ids(b, rows=5)),
    "embedding with padding": lambda b: (
        nn.Embedding(3, 2, padding_idx=1),
        ids(b, 2, 5, rows=3),
    ),
}

LAYOUTS = ["plain", "channels last", "strange", "expanded"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_each_example(name: str, b: int, layout: str) -> None:
    module, inputs = LAYERS[name](b)
    check(module, inputs, layout)


@pytest.mark.parametrize("name", LAYERS)
def test_no_examples(name: str) -> None:
    module, inputs = LAYERS[name](2)
    module = perturbed(module)
    outputs = module(inputs).detach()
    found = formed(module, inputs[:0], outputs[:0])
    for key, value in module.named_parameters():
        assert found[key].shape == (0, value.numel())
        assert found[key].dtype == torch.float64


@pytest.mark.parametrize("name", LAYERS)
def test_slices_and_single_parameters_are_the_same(name: str) -> None:
    module, inputs = LAYERS[name](5)
    module = perturbed(module)
    output_grad = draw(*module(inputs).shape, seed=3)
    whole = formed(module, inputs, output_grad)
    for key, value in whole.items():
        parts = [
            formed(module, inputs[low:high], output_grad[low:high], (key,))
            for low, high in [(0, 2), (2, 5)]
        ]
        assert [list(part) for part in parts] == [[key], [key]]
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), value)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_wanted_forms_nothing(name: str) -> None:
    module, inputs = LAYERS[name](2)
    module = perturbed(module)
    assert formed(module, inputs, module(inputs), ()) == {}


@pytest.mark.parametrize("name", LAYERS)
def test_an_example_of_nan_spoils_only_its_own_row(name: str) -> None:
    module, inputs = LAYERS[name](3)
    module = perturbed(module).float()
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    output_grad = draw(*module(inputs).shape).float()
    clean = formed(module, inputs, output_grad)
    spoiled = output_grad.clone()
    spoiled[1] = torch.nan
    if inputs.is_floating_point():
        inputs = inputs.clone()
        inputs[1] = torch.nan
    for key, found in formed(module, inputs, spoiled).items():
        torch.testing.assert_close(found[[0, 2]], clean[key][[0, 2]])
        if "padding" not in name:
            assert found[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "rms_norm"])
def test_narrow_types_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    module, inputs = LAYERS[name](3)
    module = perturbed(module)
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    wide = inputs.double() if inputs.is_floating_point() else inputs
    outputs = module(wide)
    output_grad = (100 * draw(*outputs.shape)).to(dtype)
    expected = reference(module, wide, output_grad.double())
    low = copy.deepcopy(module).to(dtype)
    for key, found in formed(low, inputs, output_grad).items():
        assert found.dtype == torch.float32
        if (
            key == "weight"
            and "norm" in name
            and "running" in dict(low.named_buffers())
        ):
            continue
        scale = float(expected[key].abs().max())
        # The running statistics themselves are rounded to the type.
        close = 2e-5 if not list(low.buffers()) else 0.02
        torch.testing.assert_close(
            found, expected[key].float(), rtol=1e-4, atol=close * scale
        )


def test_float16_does_not_overflow() -> None:
    inputs = torch.full((1, 100, 2), 200.0, dtype=torch.float16)
    found = formed(nn.Linear(2, 1), inputs, torch.full_like(inputs[..., :1], 100))
    torch.testing.assert_close(found["weight"], torch.full((1, 2), 2e6))
    torch.testing.assert_close(found["bias"], torch.full((1, 1), 1e4))


@pytest.mark.parametrize("name", LAYERS)
def test_types_may_differ_and_autocast_is_left_out(name: str) -> None:
    module, inputs = LAYERS[name](3)
    module = perturbed(module).float()
    if inputs.is_floating_point():
        inputs = inputs.float()
    output_grad = draw(*module(inputs).shape).bfloat16()
    expected = formed(module, inputs, output_grad.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = formed(module, inputs, output_grad)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    double = formed(module, inputs, output_grad.double())
    assert {value.dtype for value in double.values()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_has_the_epsilon_of_the_forward_pass(dtype: torch.dtype) -> None:
    module, inputs = nn.RMSNorm(4).to(dtype), (1e-3 * draw(3, 4)).to(dtype)
    output_grad = torch.ones(3, 4, dtype=dtype)
    with torch.no_grad():
        expected = module(inputs).float()  # its weight is one
    found = formed(module, inputs, output_grad)["weight"]
    torch.testing.assert_close(found, expected)


def test_a_global_device_reaches_nothing() -> None:
    for name in ("conv2d", "conv2d narrow", "embedding", "linear"):
        module, inputs = LAYERS[name](2)
        module = perturbed(module)
        output_grad = draw(*module(inputs).shape)
        with torch.device("meta"):
            found = formed(module, inputs, output_grad)
        assert {value.device.type for value in found.values()} == {"cpu"}


CONVOLUTIONS = [name for name in LAYERS if name.startswith("conv")]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tile", [1, 3000, 1 << 30])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_tiles_and_threads_do_not_matter(
    name: str, tile: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_layer_rules_conv, "TILE_BYTES", tile)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check(*LAYERS[name](3), low=False)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("convolves", [True, False])
def test_both_forms_of_a_convolution_agree(
    name: str, *, convolves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        _layer_rules_conv, "prefers_convolution", lambda *_args: convolves
    )
    check(*LAYERS[name](3))


def test_each_form_of_a_convolution_is_chosen_somewhere() -> None:
    taken = []
    for name in CONVOLUTIONS:
        module, inputs = LAYERS[name](2)
        inputs = inputs.float()
        with torch.no_grad():
            outputs = module(inputs)
        at = _layer_rules_conv.Windows(module.weight.shape[2:], (), (), (), (), 1)
        at = _layer_rules_conv.replace(at, groups=module.groups)
        taken.append(_layer_rules_conv.prefers_convolution(inputs, outputs, at))
    assert {*taken} == {True, False}


def test_float64_and_absence_of_onednn_unfold(monkeypatch: pytest.MonkeyPatch) -> None:
    at = _layer_rules_conv.Windows((3,), (1,), (1,), (0,), (0,), 1)
    inputs, outputs = torch.ones(1, 2, 99), torch.ones(1, 2, 97)
    assert _layer_rules_conv.prefers_convolution(inputs, outputs, at)
    assert not _layer_rules_conv.prefers_convolution(inputs.double(), outputs, at)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not _layer_rules_conv.prefers_convolution(inputs, outputs, at)


def test_settings_changed_after_construction_hold() -> None:
    module = nn.Conv2d(2, 3, 3)
    module.padding, module.dilation, module.stride = (2, 1), (2, 1), 2  # type: ignore[assignment]
    check(module, draw(2, 2, 8, 7))


def test_output_size_of_a_transposed_convolution() -> None:
    module = perturbed(nn.ConvTranspose2d(2, 3, 3, stride=3, padding=1))
    inputs = draw(2, 2, 4, 5)
    outputs = module(inputs, output_size=(12, 14))
    output_grad = draw(*outputs.shape)
    rows = [
        torch.autograd.grad(
            module(x[None], output_size=(12, 14)), module.weight, g[None]
        )[0].flatten()
        for x, g in zip(inputs, output_grad, strict=True)
    ]
    found = formed(module, inputs, output_grad)["weight"]
    torch.testing.assert_close(found, torch.stack(rows))


def random_convolution(seed: int) -> tuple[nn.Module, Tensor]:
    source = generator(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=source))

    dims, groups = pick(1, 3), pick(1, 3)
    kernel = tuple(pick(1, 4) for _ in range(dims))
    stride = tuple(pick(1, 3) for _ in range(dims))
    dilation = tuple(pick(1, 3) for _ in range(dims))
    padding: Any = tuple(pick(0, 3) for _ in range(dims))
    i, o, transposed = groups * pick(1, 9), groups * pick(1, 9), pick(0, 2) == 0
    options: dict[str, Any] = {"dilation": dilation, "groups": groups}
    if transposed:
        options["output_padding"] = tuple(
            pick(0, max(s, r) - 1) for s, r in zip(stride, dilation, strict=True)
        )
    elif pick(0, 2) == 0:
        padding, stride = "same", (1,) * dims
    if not transposed and pick(0, 1):
        options["padding_mode"] = ["zeros", "replicate", "circular"][pick(0, 2)]
    shape = [r * (k - 1) + pick(4, 8) for r, k in zip(dilation, kernel, strict=True)]
    if transposed:  # as much again as padding takes away
        shape = [n + 6 for n in shape]
    kind = f"Conv{'Transpose' * transposed}{dims}d"
    make = getattr(nn, kind)
    return make(i, o, kernel, stride, padding, **options), draw(pick(1, 3), i, *shape)


@pytest.mark.parametrize("seed", range(80))
def test_random_convolutions(seed: int) -> None:
    module, inputs = random_convolution(seed)
    check(module, inputs, LAYOUTS[seed % len(LAYOUTS)])


@pytest.mark.parametrize("name", [name for name in LAYERS if "embedding" in name])
@pytest.mark.parametrize("b", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_segments_add_up_to_the_gradient(name: str, b: int, dtype: torch.dtype) -> None:
    module, inputs = LAYERS[name](b)
    module = perturbed(module)
    rule = rule_of(module)
    assert isinstance(rule, SegmentRule)
    output_grad = strange(draw(*inputs.shape, module.embedding_dim).to(dtype))
    grads, examples, positions = rule.segments(module, strange(inputs), output_grad)
    assert grads.dtype == torch.promote_types(dtype, torch.float32)
    if module.padding_idx is not None:
        padding = module.padding_idx * module.embedding_dim
        assert not (positions == padding).any()
    dense = torch.zeros(b, module.weight.numel(), dtype=grads.dtype)
    for row, i, at in zip(grads, examples.tolist(), positions.tolist(), strict=True):
        dense[i, at : at + len(row)] += row
    expected = formed(module, inputs, output_grad)["weight"]
    torch.testing.assert_close(dense, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_integer_type(dtype: torch.dtype) -> None:
    module, inputs = LAYERS["embedding"](3)
    check(module, inputs.to(dtype))


@pytest.mark.parametrize("name", LAYERS)
def test_bytes_cover_what_is_formed(name: str) -> None:
    module, inputs = LAYERS[name](3)
    module = perturbed(module)
    output_grad = module(inputs)
    largest = max(value.numel() for value in module.parameters())
    rule = rule_of(module)
    double = rule.bytes_per_example(module, inputs, output_grad)
    assert double >= 8 * largest
    if inputs.is_floating_point():
        inputs = inputs.bfloat16()
    single = rule.bytes_per_example(module, inputs, output_grad.bfloat16())
    assert 2 * single == double


class Kept(nn.Conv2d):
    """A subclass that computes the same."""

    def extra(self) -> int:
        return 1


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  PyTorch's name
        return 2 * super().forward(input)


class OwnConvolution(nn.Conv2d):
    def _conv_forward(
        self,
        input: Tensor,  # noqa: A002  PyTorch's name
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        return super()._conv_forward(input, weight.abs(), bias)


class OwnParameter(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scale = nn.Parameter(torch.ones(2))


def patched() -> nn.Module:
    module = nn.Linear(2, 2)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


REFUSED: list[tuple[nn.Module, str]] = [
    (nn.LSTM(2, 2), "LSTM has no layer rule"),
    (nn.Bilinear(2, 2, 2), "Bilinear has no layer rule"),
    (nn.EmbeddingBag(2, 2), "EmbeddingBag has no layer rule"),
    (OwnForward(2, 2), "OwnForward has a forward of its own"),
    (OwnConvolution(2, 2, 1), "OwnConvolution has a _conv_forward of its own"),
    (patched(), "Linear has a forward of its own"),
    (OwnParameter(), "OwnParameter has a parameter of its own, scale"),
    (nn.BatchNorm2d(2).train(), "BatchNorm2d in training mode mixes examples"),
    (
        nn.BatchNorm1d(2, track_running_stats=False).eval(),
        "BatchNorm1d without running statistics mixes examples",
    ),
    (nn.Embedding(2, 2, max_norm=1), "the max_norm of Embedding changes its weight"),
    (
        nn.Embedding(2, 2, scale_grad_by_freq=True),
        "the scale_grad_by_freq of Embedding mixes examples",
    ),
    (nn.Linear(2, 2, dtype=torch.complex64), "the weight of Linear is torch.complex64"),
]


@pytest.mark.parametrize(("module", "reason"), REFUSED)
def test_the_reason_why_there_is_no_rule(module: nn.Module, reason: str) -> None:
    assert rule_for(module) == reason


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_have_a_rule_once_they_are_made() -> None:
    module = nn.LazyLinear(3)
    assert rule_for(module) == "the parameters of LazyLinear are made by its first call"
    module(torch.ones(1, 2))
    assert isinstance(rule_for(module), LayerRule)


def test_subclasses_that_compute_the_same_have_the_rule() -> None:
    check(Kept(2, 3, 2), draw(2, 2, 4, 4))
    attention = nn.MultiheadAttention(4, 2)
    assert type(attention.out_proj) is not nn.Linear
    assert isinstance(rule_for(attention.out_proj), LayerRule)


def test_a_parametrised_layer_keeps_the_rule_for_its_bias() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2).double())
    inputs, output_grad = draw(2, 4, 3), draw(2, 4, 2)
    found = formed(module, inputs, output_grad, ("bias",))
    torch.testing.assert_close(found, {"bias": output_grad.sum(1)})


def test_instance_norm_in_training_mode_treats_examples_one_by_one() -> None:
    module = perturbed(nn.InstanceNorm1d(3, affine=True)).train()
    inputs, output_grad = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    expected = reference(module, inputs, output_grad)
    torch.testing.assert_close(formed(module, inputs, output_grad), expected)


def test_running_statistics_far_from_zero_lose_nothing() -> None:
    module = perturbed(nn.BatchNorm1d(2))
    module.running_mean.fill_(1e4)
    inputs, output_grad = 1e4 + draw(3, 2, 50), draw(3, 2, 50, seed=1)
    inputs = inputs.float().double()
    expected = reference(module, inputs, output_grad)["weight"]
    found = formed(module.float(), inputs.float(), output_grad.float())["weight"]
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_conv1d_of_gpt2() -> None:
    """The class is known by its name: transformers is not imported."""
    module = types.ModuleType("transformers.pytorch_utils")
    before = sys.modules.get(module.__name__)  # other tests may import the real one

    class Conv1D(nn.Module):
        __module__ = module.__name__

        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(nx, nf))
            self.bias = nn.Parameter(torch.empty(nf))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    check(Conv1D(3, 5), draw(3, 4, 5))
    check(Conv1D(3, 5), draw(3, 5))
    assert sys.modules.get(module.__name__) is before


@pytest.mark.parametrize(
    ("module", "shape", "lowest"),
    [
        (nn.Linear(3, 2), (3,), 2),
        (nn.Conv2d(1, 2, 1), (1, 3, 3), 4),
        (nn.ConvTranspose1d(1, 2, 1), (1, 3), 3),
        (nn.LayerNorm((2, 3)), (2, 3), 3),
        (nn.InstanceNorm1d(1, affine=True), (1, 3), 3),
        (nn.PReLU(3), (3,), 2),
    ],
)
def test_inputs_without_a_batch_are_refused(
    module: nn.Module, shape: tuple[int, ...], lowest: int
) -> None:
    inputs = torch.zeros(shape)
    with torch.no_grad():
        outputs = module(inputs[None])[0]
    reason = (
        f"its input of shape {shape} has no batch dimension; {lowest} dimensions are "
        f"needed"
    )
    assert rule_of(module).refusal(module, inputs, outputs) == reason
    with pytest.raises(GradientError) as caught:
        formed(module, inputs, outputs)
    assert str(caught.value) == (
        f"{type(module).__name__} has no layer rule for this call: {reason}. Use a "
        f"generic per-sample gradient for it."
    )


def test_other_refused_inputs() -> None:
    linear, table = nn.Linear(2, 2), nn.Embedding(2, 2)
    reason = rule_of(linear).refusal(linear, torch.ones(3, 2), torch.ones(6, 2))
    assert reason == "it makes 6 rows of 3"
    whole = torch.ones(3, 2, dtype=torch.int64)
    reason = rule_of(linear).refusal(linear, whole, torch.ones(3, 2))
    assert reason == "its input is torch.int64"
    reason = rule_of(table).refusal(table, torch.ones(3), torch.ones(3, 2))
    assert reason == "its input is torch.float32"
    assert rule_of(table).refusal(table, whole, torch.ones(3, 2, 2)) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LAYERS)
def test_cuda_agrees(name: str) -> None:
    module, inputs = LAYERS[name](3)
    module = perturbed(module)
    output_grad = draw(*module(inputs).shape)
    expected = formed(module, inputs, output_grad)
    found = formed(module.cuda(), inputs.cuda(), output_grad.cuda())
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu(), value)
