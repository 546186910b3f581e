"""Where the examples of a batch are in a layer's tensors, as pure tensor functions."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn


class Layout(str, Enum):
    """How the dimensions of a layer's output hold the examples of a batch.

    Shapes alone can mislead, so what is read off them is a guess that the self-check
    has to confirm.
    """

    ROWS = "one row an example"
    """``(b, ...)``."""

    SHARED = "one row for all examples"
    """``(1, ...)``, broadcast later; it is expanded to ``(b, ...)`` first."""

    SECOND = "examples in the second dimension"
    """``(t, b, ...)``, of layers that work on the last dimensions only."""

    FLAT = "several rows an example"
    """``(b * t, ...)``, the rows of an example next to each other."""

    ABSENT = "no dimension of examples"
    """``(t, w)``, broadcast later; it is expanded to ``(b, t, w)`` first."""

    APART = "no example has a part in it"
    """Any shape; followed up to where it meets the examples, and expanded there."""


EXPANDED = frozenset({Layout.SHARED, Layout.ABSENT})
"""Layouts whose outputs are replaced by larger ones, which a model may not expect."""

WITHOUT_EXAMPLES = EXPANDED | {Layout.APART}
"""Layouts of outputs that are the same for all examples."""

_POSITIONWISE = (nn.Linear, nn.LayerNorm, nn.Embedding)


def is_positionwise(module: nn.Module) -> bool:
    """Tell whether a layer treats all but its last dimensions as positions.

    Returns:
        Whether it does.

    Example:
        >>> is_positionwise(nn.Linear(1, 1)), is_positionwise(nn.Conv1d(1, 1, 1))
        (True, False)
    """
    named = type(module).__name__ in {"Conv1D", "RMSNorm"}
    return isinstance(module, _POSITIONWISE) or named


def find_layouts(shape: torch.Size, b: int, *, positionwise: bool) -> list[Layout]:
    """List where the examples may be in an output, the likeliest first.

    Args:
        shape: The output's shape.
        b: Number of examples, at least 1.
        positionwise: Whether the layer works on the last dimensions only.

    Returns:
        The layouts that fit.

    Example:
        >>> [it.name for it in find_layouts(torch.Size([6, 3]), 2, positionwise=True)]
        ['FLAT', 'ABSENT']
    """
    first = shape[0] if len(shape) else 0
    fits = {
        Layout.ROWS: first == b,
        Layout.SHARED: first == 1 and b > 1,
        Layout.SECOND: positionwise and len(shape) > 2 and shape[1] == b,
        Layout.FLAT: first > b and first % b == 0,
        Layout.ABSENT: positionwise and len(shape) == 2,
    }
    return [layout for layout, fit in fits.items() if fit]


def by_example(tensor: Tensor, layout: Layout, b: int) -> Tensor:
    """Bring the examples of a positionwise layer's tensor to the first dimension.

    Args:
        tensor: An input, or an output; or the gradient of one that was not expanded.
        layout: Where the examples are.
        b: Number of examples.

    Returns:
        A view of shape ``(b, ...)`` where the strides allow.

    Example:
        >>> by_example(torch.zeros(6, 3), Layout.FLAT, 2).shape
        torch.Size([2, 3, 3])
    """
    match layout:
        case Layout.SHARED:
            return tensor.expand(b, *tensor.shape[1:])
        case Layout.SECOND:
            return tensor.transpose(0, 1)
        case Layout.FLAT:
            return tensor.reshape(b, len(tensor) // b, *tensor.shape[1:])
        case Layout.ABSENT | Layout.APART:
            return tensor.expand(b, *tensor.shape)
        case _:
            return tensor
