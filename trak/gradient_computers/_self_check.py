"""The proof on a batch that an engine's gradients are those of autograd.

A weighted sum of the engine's per-sample gradients must be the gradient of the weighted sum
of the outputs. The weights differ, so an example's gradient in another's place is noticed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trak.errors import GradientError
from trak.gradient_computers._sinks import add_runs

BLAMABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model or a task may raise when it is run in a way it does not expect."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a parameter's gradient may be off."""

    own: float
    """Share of its own norm."""

    noise: float
    """Share of the norm of all: a parameter whose gradient is zero in exact arithmetic,
    as a key's bias in attention, has rounding errors of the others' size."""


_TOLERANCES = {
    # Some models compute parts in float32 whatever they were loaded in.
    torch.float64: Tolerance(5e-3, 1e-6),
    # TensorFloat-32 has 11 bits.
    torch.float32: Tolerance(5e-3, 1e-5),
    torch.float16: Tolerance(0.1, 0.01),
    torch.bfloat16: Tolerance(0.25, 0.05),
}


def tolerance(dtypes: set[torch.dtype]) -> Tolerance:
    """Choose the tolerance of a computation in several types: the narrowest's.

    Returns:
        The tolerance.

    Example:
        >>> tolerance({torch.float32, torch.bfloat16}).own
        0.25
    """
    known = [_TOLERANCES.get(dtype, _TOLERANCES[torch.float32]) for dtype in dtypes]
    return max(known, key=lambda it: it.own)


def check_weights(b: int) -> Float[Tensor, " b"]:
    """Draw the weights of the outputs, always the same: signs times 0.5 to 1.5."""
    generator = torch.Generator("cpu").manual_seed(20230324)
    drawn = torch.rand(b, generator=generator, dtype=torch.float64, device="cpu")
    drawn = 2 * drawn - 1
    return drawn + 0.5 * drawn.sign()


def is_close(found: Float[Tensor, " b"], expected: Float[Tensor, " b"]) -> bool:
    """Tell whether outputs are the same but for rounding; NaN equals NaN."""
    return bool(torch.isclose(found, expected, 0.02, 1e-4, equal_nan=True).all())


class Residual:
    """A sink that takes the weighted sum of what comes from a gradient, in place.

    Args:
        gradient: The gradient of the weighted sum of outputs; overwritten.
        weights: The weights. Shape ``(b,)``.
    """

    block_bytes = 1 << 24

    def __init__(
        self, gradient: Mapping[str, Tensor], weights: Float[Tensor, " b"]
    ) -> None:
        self._left = {name: value.view(-1) for name, value in gradient.items()}
        self._weights = weights
        self._came: set[str] = set()
        self.norms = {name: _norm(value) for name, value in gradient.items()}

    def add(
        self,
        parameter: str,
        rows: slice,
        grads: Float[Tensor, "k w"],
        offset: int = 0,
    ) -> None:
        """Subtract the weighted gradients of some examples."""
        self._came.add(parameter)
        left = self._left[parameter][offset : offset + grads.shape[1]]
        left -= self._weights[rows].to(left.dtype) @ grads.to(left.dtype)

    def add_segments(
        self,
        parameter: str,
        grads: Float[Tensor, "k w"],
        examples: Int64[Tensor, " k"],
        positions: Int64[Tensor, " k"],
    ) -> None:
        """Subtract weighted runs of coordinates."""
        self._came.add(parameter)
        left = self._left[parameter]
        weights = self._weights[examples].to(left.dtype)[:, None]
        add_runs(left, -weights * grads.to(left.dtype), positions)

    def clear(self) -> None:
        """Do nothing: what has to be made again is checked again as a whole."""

    def wrong(self, allowed: Tolerance) -> dict[str, float]:
        """Find the parameters that differ from autograd.

        One that no gradients came for is wrong if autograd has any: in half precision
        they could all be within the tolerance.

        Returns:
            Their relative difference, by parameter.
        """
        whole = math.hypot(*self.norms.values())
        found = {}
        for name, left in self._left.items():
            difference, own = _norm(left), self.norms[name]
            near = difference <= allowed.own * own + allowed.noise * whole
            if not near or (own and name not in self._came):
                found[name] = difference / own if own else math.inf
        return found

    def distance(self) -> float:
        """Return the norm of what is left, as a share of the gradient's."""
        whole = math.hypot(*self.norms.values())
        left = math.hypot(*map(_norm, self._left.values()))
        return left / whole if whole else (math.inf if left else 0.0)


class FiniteRows:
    """A sink that tells which examples have finite gradients.

    Args:
        b: Number of examples.
    """

    block_bytes = 1 << 24

    def __init__(self, b: int, device: torch.device) -> None:
        self.finite = torch.ones(b, dtype=torch.bool, device=device)

    def add(
        self,
        parameter: str,
        rows: slice,
        grads: Float[Tensor, "k w"],
        offset: int = 0,
    ) -> None:
        """Note the examples with a NaN or an infinity."""
        self.finite[rows] &= torch.isfinite(grads).all(1)

    def add_segments(
        self,
        parameter: str,
        grads: Float[Tensor, "k w"],
        examples: Int64[Tensor, " k"],
        positions: Int64[Tensor, " k"],
    ) -> None:
        """Note the examples with a NaN or an infinity."""
        self.finite[examples[~torch.isfinite(grads).all(1)]] = False

    def clear(self) -> None:
        """Forget all examples."""
        self.finite[:] = True


def differentiate(
    outputs: Callable[[], Tensor],
    weights: Float[Tensor, " b"],
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Differentiate a weighted sum of outputs by parameters, with autograd.

    Args:
        outputs: Computes the outputs, of shape ``(b,)``.
        weights: Their weights. Shape ``(b,)``.
        parameters: What to differentiate by.

    Returns:
        Gradients by name, in float32 or wider, in memory of their own.

    Raises:
        RuntimeError: Whatever autograd or the model raises.
    """
    chosen = list(parameters.values())
    values = outputs()
    along = weights.to(values)
    try:
        grads = torch.autograd.grad(
            values, chosen, along, allow_unused=True, materialize_grads=True
        )
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        grads = _accumulated(outputs(), along, chosen)
    left = list(reversed(grads))
    del grads
    found = {}
    # Copied, as gradients may share memory; one by one, so that few are there twice.
    for name in parameters:
        grad = left.pop().to_dense()
        wide = torch.promote_types(grad.dtype, torch.float32)
        found[name] = grad.to(wide, copy=True).contiguous()
    return found


def _accumulated(
    values: Tensor, along: Tensor, chosen: list[Tensor]
) -> tuple[Tensor, ...]:
    """Differentiate by ``backward``: checkpoints of the older kind know no other way."""
    before = [value.grad for value in chosen]
    try:
        for value in chosen:
            value.grad = None
        torch.autograd.backward(values, along)
        return tuple(
            torch.zeros_like(value) if value.grad is None else value.grad
            for value in chosen
        )
    finally:
        for value, grad in zip(chosen, before, strict=True):
            value.grad = grad


@contextlib.contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters require gradients until the block is left, frozen or not."""
    frozen = [value for value in parameters if not value.requires_grad]
    try:
        for value in frozen:
            value.requires_grad_()
        yield
    finally:
        for value in frozen:
            value.requires_grad_(False)


def check_alone(task: object, alone: Tensor, in_batch: Tensor) -> None:
    """Refuse a task that gives an example another output in a batch than alone.

    Args:
        task: The task, for the message.
        alone: The example's output as a batch of its own.
        in_batch: Its output in a batch of several.

    Raises:
        GradientError: If they differ by more than rounding.
    """
    found, first = float(alone.detach().reshape(-1)[0]), float(in_batch.detach())
    # Another batch size rounds otherwise, by 1e-3 where products are TensorFloat-32.
    if abs(found - first) > 0.02 * max(1.0, abs(first)):
        raise GradientError(
            f"{type(task).__name__} gives an example {found:.6g} alone and {first:.6g} in "
            f"a batch: its output depends on the others, or on chance, and has no gradient "
            f"of its own. Use a task and a model that treat examples one by one."
        )


def trimmed(example: Any, *, is_seq2seq: bool = False) -> Any | None:
    """Cut the padding off an example that is a mapping with an ``attention_mask``.

    Args:
        example: A batch of one.
        is_seq2seq: Whether the mask is that of a source only, and not of the labels.

    Returns:
        The columns that the mask keeps, of every tensor of the mask's shape but those of
        a decoder; None where there is no padding, or it is not on one side.

    Example:
        >>> ids = torch.tensor([[5, 6, 0]])
        >>> trimmed({"input_ids": ids, "attention_mask": (ids > 0).long()})["input_ids"]
        tensor([[5, 6]])
    """
    mask = example.get("attention_mask") if isinstance(example, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    kept = (mask[0] != 0).nonzero()[:, 0]
    if not 0 < len(kept) < mask.shape[1]:
        return None
    low, high = int(kept[0]), int(kept[-1]) + 1
    if high - low != len(kept):
        return None
    others = ("decoder_", "label") if is_seq2seq else ("decoder_",)
    return {
        key: value[:, low:high]
        if isinstance(value, Tensor)
        and value.shape == mask.shape
        and not str(key).startswith(others)
        else value
        for key, value in example.items()
    }


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value))
