"""How copies of a parameter, one for each example, fit where the parameter is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trak._batches import batch_size
from trak._types import Batch
from trak.gradient_computers._self_check import BLAMABLE, is_close
from trak.gradient_computers._stations import Station
from trak.gradient_computers._tape import Tape


def arrangements(
    model: nn.Module,
    outputs: Callable[[Batch], Tensor],
    station: Station,
    local: str,
    batch: Batch,
    plain: Tensor,
) -> list[int]:
    """Drop the arrangements that change a model's outputs, up to the first that does not.

    Args:
        model: The model.
        outputs: Computes the outputs of a batch.
        station: The module that holds the parameter.
        local: The parameter's name there.
        batch: Several examples.
        plain: Their outputs without copies. Shape ``(b,)``.

    Returns:
        The ranks that are left, the one that fits first; none if none fits.

    Raises:
        torch.OutOfMemoryError: If memory runs out, which says nothing about the copies.
    """
    ranks = list(station.arrangements(local))
    for place, rank in enumerate(ranks):
        alone = Station(station.name, station.module, copied={local: local})
        alone.ranks[local] = [rank]
        try:
            with Tape([alone], batch_size(batch), Nowhere()).listening(model):
                found = outputs(batch)
        except torch.OutOfMemoryError:
            raise
        except BLAMABLE:
            continue
        if is_close(found, plain):
            return ranks[place:]
    return []


class Nowhere:
    """A sink for gradients that nobody wants."""

    block_bytes = 1

    def add(self, parameter: str, rows: slice, grads: Tensor, offset: int = 0) -> None:
        """Do nothing."""

    def add_segments(
        self, parameter: str, grads: Tensor, examples: Tensor, positions: Tensor
    ) -> None:
        """Do nothing."""

    def clear(self) -> None:
        """Do nothing."""


def shortened(message: str) -> str:
    r"""Take the first line of a message, as far as it fits a warning.

    Returns:
        The line, or its beginning.

    Example:
        >>> shortened("A first line.\nA second one.")
        'A first line.'
    """
    line = message.split("\n", 1)[0]
    return line if len(line) <= 160 else line[:157] + "..."
