"""Which layers have Kronecker factors, and what of a pass the factors are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  PyTorch's own name for it
from jaxtyping import Float
from torch import Tensor, nn

from trak._batches import batch_size, row_leaves
from trak._types import Batch
from trak.gradient_computers._copies import Nowhere
from trak.gradient_computers._layer_rules import LayerRule, rule_for
from trak.gradient_computers._layer_rules_conv import ConvRule
from trak.gradient_computers._layer_rules_dense import (
    LinearRule,
    TransposedLinearRule,
)
from trak.gradient_computers._stations import Station
from trak.gradient_computers._tape import Tape

Take = Callable[[Float[Tensor, "b t i"], Float[Tensor, "b t o"]], None]
"""What is done with a layer's inputs and slopes."""


@dataclass(frozen=True, slots=True)
class KroneckerLayer:
    """A layer whose weight meets its inputs as one matrix."""

    station: Station
    """Where to listen."""

    weight: str
    """The model's name of its weight."""

    bias: str | None
    """The model's name of its bias; None without one, or if it is not selected."""

    transposed: bool
    """Whether the weight is ``(i, o)``."""

    def join(self, grads: dict[str, Tensor]) -> Float[Tensor, "b o i"]:
        """Make one matrix of the gradients of weight and bias.

        Args:
            grads: ``{parameter: (b, *shape)}``.

        Returns:
            The weight's gradient, the bias's as its last column.
        """
        weight = grads[self.weight]
        if self.transposed:
            weight = weight.mT
        weight = weight.flatten(2)
        if self.bias is None:
            return weight
        return torch.cat([weight, grads[self.bias].unsqueeze(2)], dim=2)

    def part(self, joined: Float[Tensor, "b o i"]) -> dict[str, Tensor]:
        """Undo :meth:`join`, up to shapes.

        Args:
            joined: The matrices.

        Returns:
            ``{parameter: (b, w)}``, each in the parameter's row-major order.
        """
        weight = joined if self.bias is None else joined[:, :, :-1]
        if self.transposed:
            weight = weight.mT
        parts = {self.weight: weight.flatten(1)}
        if self.bias is not None:
            parts[self.bias] = joined[:, :, -1]
        return parts


def find_layers(stations: list[Station]) -> list[KroneckerLayer]:
    """Choose the layers that have Kronecker factors.

    Args:
        stations: The layers that a rule serves.

    Returns:
        Linear layers and two-dimensional convolutions of one group whose weight is
        selected and no other layer's too.
    """
    uses = [name for it in stations for name in it.by_rule.values()]
    layers = []
    for it in stations:
        weight, bias = it.by_rule.get("weight"), it.by_rule.get("bias")
        alone = weight is not None and uses.count(weight) == 1
        if weight is not None and alone and _is_a_matrix(it.module, it.rule):
            transposed = isinstance(it.rule, TransposedLinearRule)
            layers.append(KroneckerLayer(it, weight, bias, transposed))
    return layers


def _is_a_matrix(module: Any, rule: LayerRule | None) -> bool:
    if isinstance(rule, ConvRule):
        return isinstance(module, nn.Conv2d) and module.groups == 1
    return isinstance(rule, LinearRule)


class Listener(LayerRule):
    """A rule that forms nothing, and hands on what gradients would be formed of.

    What a layer got in several calls of one pass is handed on together, as positions of
    one call: its gradient is the sum over them.

    Args:
        layer: The layer.
        b: Number of examples.
        take: Gets the inputs, a column of ones added for a bias, and the slopes.
    """

    def __init__(self, layer: KroneckerLayer, b: int, take: Take) -> None:
        self._layer, self._b, self._take = layer, b, take
        rule = rule_for(layer.station.module)
        self._rule: Any = rule
        self._calls = 0
        self._held: list[tuple[Tensor, Tensor]] = []

    def count_call(self, *_: Any) -> None:
        """Take note that the layer was called; a forward hook of it."""
        self._calls += 1

    def hand_on(self) -> None:
        """Hand on what is held, if anything is."""
        if self._held:
            rows, slopes = (
                torch.cat(parts, 1) for parts in zip(*self._held, strict=True)
            )
            self._held.clear()
            self._take(rows, slopes)

    def refusal(self, module: Any, inputs: Tensor, output_grad: Tensor) -> str | None:
        """Say what the layer's own rule says."""
        reason: str | None = self._rule.refusal(module, inputs, output_grad)
        return reason

    def per_sample(
        self,
        module: Any,
        inputs: Tensor,
        output_grad: Float[Tensor, "b ..."],
        wanted: frozenset[str],
    ) -> Iterator[tuple[str, Float[Tensor, "b w"]]]:
        """Hand on the inputs and slopes, a row for each position."""
        dtype = torch.promote_types(output_grad.dtype, torch.float32)
        rows, slopes = positions(module, inputs.to(dtype), output_grad.to(dtype))
        # Several rows an example where a model made its positions rows of the batch.
        rows = rows.reshape(self._b, -1, rows.shape[-1])
        slopes = slopes.reshape(self._b, -1, slopes.shape[-1])
        if self._layer.bias is not None:
            rows = F.pad(rows, (0, 1), value=1.0)
        self._held.append((rows, slopes))
        if len(self._held) == self._calls:
            self.hand_on()
        return iter(())

    def bytes_per_example(
        self, module: Any, inputs: Tensor, output_grad: Tensor
    ) -> int:
        """Ask for the whole batch at once."""
        return 1

    def _least_ndim(self, module: Any) -> int:
        return 1

    def _form(self, *_: Any) -> Tensor:
        raise NotImplementedError


def positions(
    module: nn.Module, inputs: Tensor, slopes: Tensor
) -> tuple[Float[Tensor, "b t i"], Float[Tensor, "b t o"]]:
    """Give a layer's inputs and slopes a row for each position.

    Args:
        module: A linear layer, or a convolution of one group.
        inputs: What it was called with. Shape ``(b, ..., i)`` or ``(b, i, h, w)``.
        slopes: Gradient of its output. Shape ``(b, ..., o)`` or ``(b, o, h, w)``.

    Returns:
        The inputs that each position meets, and the slopes.

    Example:
        >>> conv = nn.Conv2d(1, 1, 2)
        >>> positions(conv, torch.ones(1, 1, 2, 3), torch.ones(1, 1, 1, 2))[0].shape
        torch.Size([1, 2, 4])
    """
    if not isinstance(module, nn.Conv2d):
        b = len(inputs)
        return (
            inputs.reshape(b, -1, inputs.shape[-1]),
            slopes.reshape(b, -1, slopes.shape[-1]),
        )
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    height, width = module.kernel_size
    windows = F.unfold(
        inputs, (height, width), dilation=module.dilation, stride=module.stride
    )
    return windows.mT, slopes.flatten(2).mT


class _All(Nowhere):
    """A sink that takes whole batches."""

    block_bytes = 1 << 62


@contextlib.contextmanager
def listening(
    model: nn.Module,
    layers: list[KroneckerLayer],
    batch: Batch,
    take: Callable[[KroneckerLayer], Take],
) -> Iterator[Tape]:
    """Listen to a forward and a backward pass of one batch.

    Args:
        model: The model, in evaluation mode.
        layers: Where to listen.
        batch: The examples.
        take: Gives what each layer's inputs and slopes are handed to.

    Yields:
        The pass, with its findings.
    """
    b = batch_size(batch)
    listeners = [Listener(it, b, take(it)) for it in layers]
    stations = [
        Station(
            it.station.name,
            it.station.module,
            listener,
            {"weight": it.weight},
            excluded=set(it.station.excluded),
            copies_inputs=it.station.copies_inputs,
            copies_outputs=it.station.copies_outputs,
        )
        for it, listener in zip(layers, listeners, strict=True)
    ]
    tape = Tape(stations, b, _All(), tuple(x.shape[1:] for x in row_leaves(batch)))
    with contextlib.ExitStack() as stack:
        for it, listener in zip(layers, listeners, strict=True):
            hook = it.station.module.register_forward_hook(listener.count_call)
            stack.callback(hook.remove)
        stack.enter_context(tape.listening(model))
        yield tape
        tape.finish()
        for listener in listeners:  # of which some calls have no gradient
            listener.hand_on()
