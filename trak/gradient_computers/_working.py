"""How many bytes a gradient computer holds at once, before it holds any."""

from __future__ import annotations

import math

from trak.gradient_computers._abstract import (
    AbstractGradientComputer,
    SelectiveGradientComputer,
)
from trak.gradient_computers._hooks import HookGradientComputer
from trak.gradient_computers._ladder import HOOKED
from trak.gradient_computers._proof import EXAMPLES

_FLOAT = 4


def working_bytes(
    computer: AbstractGradientComputer,
    batch_size: int,
    activations: int = 0,
    block_bytes: int = 0,
) -> int:
    """Estimate the most bytes that the gradients of a batch take at once.

    Args:
        computer: What computes them.
        batch_size: Number of examples, ``b``.
        activations: Bytes that one example's forward pass keeps for its backward pass.
        block_bytes: Bytes of gradients that the projector likes at once; 0 if it takes
            only whole gradients.

    Returns:
        The bytes, without parameters and sketches.
    """
    if not isinstance(computer, SelectiveGradientComputer):
        return batch_size * (_FLOAT * (computer.grad_dim or 0) + activations)
    shapes = dict(zip(computer.selection.names, computer.selection.shapes, strict=True))
    sizes = {name: _FLOAT * math.prod(shape) for name, shape in shapes.items()}
    whole = set(sizes)
    if block_bytes and isinstance(computer, HookGradientComputer):
        whole = {n for n, rung in computer.coverage.rungs.items() if rung not in HOOKED}
    rest = sum(sizes[name] for name in whole)
    rows = min(batch_size, max(1, computer.max_block_bytes // max(rest, 1)))
    found = rows * (rest + activations)
    if not block_bytes:
        # The block before it is still there while the next one is computed.
        return found + (rest * rows if rows < batch_size else 0)
    largest = max(
        (size for name, size in sizes.items() if name not in whole), default=0
    )
    if largest:
        # All of a parameter's gradients; or a piece of them, and what it is made from.
        pieces = min(batch_size * largest, 2 * max(block_bytes, largest))
        # Some examples are first compared with autograd: one gradient of all parameters,
        # copied one by one, and then a batch of these examples.
        few = min(batch_size, EXAMPLES) * activations + pieces
        proof = sum(sizes.values()) + max(*sizes.values(), few)
        found = max(found, batch_size * activations + pieces, proof)
    return found
