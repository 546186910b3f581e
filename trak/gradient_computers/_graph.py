"""What a pass needs of autograd: graphs that start midway, inputs held until they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Saved:
    """An input of a layer, held until it is used, and only valid if not written to."""

    __slots__ = ("_value", "_version")

    def __init__(self, value: Tensor, *, copy: bool) -> None:
        kept = value.detach().clone() if copy else value.detach()
        self._value: Tensor | None = kept
        self._version = kept._version

    def take(self) -> Tensor | None:
        """Return the input and let go of it; None if it was written to."""
        value, self._value = self._value, None
        if value is None or value._version != self._version:
            return None
        return value


class Start(torch.autograd.Function):
    """A copy that a graph starts at, although nothing it came from needs gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        """Copy the value; a copy, as later layers may write to it."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        """End the graph."""
        return None, None


def start(value: Tensor, anchor: Tensor) -> Tensor:
    """Copy a value so that it needs gradients, and ``anchor`` with it."""
    started: Tensor = Start.apply(value, anchor)  # type: ignore[no-untyped-call]
    return started


def on_gradient(value: Tensor, function: Callable[[Tensor], None]) -> None:
    """Call a function with the gradient of a value as soon as it is complete."""
    value.register_hook(function)  # type: ignore[no-untyped-call]


def wide(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; leave the rest alone."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocast_of(kind: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Note the autocast state of a kind of device, to run a block under it later."""
    enabled = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if enabled else None
    return lambda: torch.autocast(kind, dtype, enabled)


@contextlib.contextmanager
def no_fast_path(model: nn.Module) -> Iterator[None]:
    """Keep attention from running as one kernel, in which no layer is called.

    It does where nothing it got needs gradients.
    """
    known = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    enabled = torch.backends.mha.get_fastpath_enabled()
    if not enabled or not any(isinstance(it, known) for it in model.modules()):
        yield
        return
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
