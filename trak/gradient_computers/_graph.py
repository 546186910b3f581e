"""What a pass needs of autograd: graphs that start midway, inputs held until they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  PyTorch's own name for it


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


class Watched(Tensor):
    """A weight of an embedding that sees the look-ups in it, whatever is around them.

    Attributes:
        seen: Gets the ids and what was looked up, and returns what to go on with.
    """

    seen: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run any function of PyTorch on the weight, and show look-ups."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        is_lookup = func is F.embedding and isinstance(args[1], Watched)
        if is_lookup and args[1].seen is not None:
            result = args[1].seen(args[0], result)
        return result


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
