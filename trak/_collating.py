"""Batches of a dataset by a data collator: in order, the same ones every time."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak._batches import canonical, moved, row_leaves
from trak._types import Batch
from trak.errors import BatchError, OptionError
from trak.modelout_functions._token_labels import IGNORED

_ATTEMPTS = 100  # at 15 % of 2 tokens, one in 10 million texts has none masked

_DRAWS = 4  # of one batch, to notice that it is not always the same


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Make everything drawn from global generators on the CPU depend on a seed alone.

    Afterwards they go on where they were.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  collators draw from it
    words = np.random.SeedSequence(seed).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[0])  # noqa: NPY002
    torch.default_generator.manual_seed(int(words[1]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


@dataclass(frozen=True, slots=True)
class Collating:
    """What makes batches of the examples of a dataset."""

    collate: Callable[[list[Any]], Any]
    """The data collator."""

    columns: frozenset[str] | None
    """The columns it gets; None for all."""

    batch_size: int
    """Number of examples at a time."""

    device: torch.device
    """Where batches go."""

    seed: int
    """What random masks depend on, beside the example's index."""

    def batches(self, dataset: Any) -> Iterator[Batch]:
        """Go through a dataset in order.

        Args:
            dataset: Something with a length, and examples by index.

        Yields:
            Canonical batches, on the device.
        """
        n = len(dataset)
        collate = self.collate_masked if self._is_random(dataset) else self._collate
        dataset = self._without_columns(dataset)
        for start in range(0, n, self.batch_size):
            inds = range(start, min(start + self.batch_size, n))
            batch = collate(dataset, inds)
            if isinstance(batch, dict) and "labels" in batch:
                batch.pop("label", None)  # a column that the collator labelled anew
            yield moved(batch, self.device)

    def _without_columns(self, dataset: Any) -> Any:
        """Take unused columns off before they are decoded, where a dataset can."""
        names = getattr(dataset, "column_names", None)
        if self.columns is None or not isinstance(names, list):
            return dataset
        unused = [name for name in names if name not in self.columns]
        self._check_any(names, len(unused) < len(names))
        return dataset.remove_columns(unused) if unused else dataset

    def _rows(self, dataset: Any, inds: Sequence[int]) -> list[Any]:
        several = getattr(dataset, "__getitems__", None)
        rows = list(several(list(inds)) if several else map(dataset.__getitem__, inds))
        if self.columns is None or not all(isinstance(row, Mapping) for row in rows):
            return rows
        kept = [{k: v for k, v in row.items() if k in self.columns} for row in rows]
        for row, left in zip(rows, kept, strict=True):
            self._check_any(row, bool(left))
        return kept

    def _check_any(self, names: Any, is_any: bool) -> None:  # noqa: FBT001
        if not is_any:
            raise OptionError(
                f"the model takes none of the dataset's columns {sorted(names)}; it takes "
                f"{sorted(self.columns or ())}. Tokenize the dataset, or use "
                f"remove_unused_columns=False where the data collator does."
            )

    def _collate(self, dataset: Any, inds: Sequence[int]) -> Batch:
        with seeded(self.seed, inds[0]):
            batch = canonical(self.collate(self._rows(dataset, inds)))
        leaves = row_leaves(batch)
        if leaves and len(leaves[0]) != len(inds):
            raise BatchError(
                f"the data collator made {len(leaves[0])} rows of {len(inds)} examples; "
                f"one that packs or splits texts leaves no rows to attribute to. Pass "
                f"data_collator=... with one row for each."
            )
        return batch

    def _is_random(self, dataset: Any) -> bool:
        """Tell whether the collator masks tokens at random.

        Returns:
            Whether it does.

        Raises:
            OptionError: If it is random in another way, or the dataset in any.
        """
        inds = range(min(self.batch_size, len(dataset)))
        masks = bool(getattr(self.collate, "mlm", False))
        made = []
        for seed in range(_DRAWS):
            with seeded(self.seed, seed):
                rows = self._rows(dataset, inds)
            # Masks may differ; all else may not.
            with seeded(self.seed, 0 if masks else seed):
                batch = self._unseeded()(rows)
            made.append(row_leaves(canonical(batch)))
        first, *others = made
        differs = any(
            len(first) != len(other) or not all(map(torch.equal, first, other))
            for other in others
        )
        if differs:
            raise OptionError(
                f"the data collator ({type(self.collate).__name__}), or the dataset, makes "
                f"something else of the same examples each time, so there is nothing to "
                f"attribute to; pass data_collator=... (and train_dataset=...) without "
                f"random changes."
            )
        return masks

    def _unseeded(self) -> Callable[[list[Any]], Any]:
        """Copy the collator without a generator of its own."""
        collate = self.collate
        if getattr(collate, "seed", None) is None:
            return collate
        collate = copy.copy(collate)
        for name in ("seed", "generator"):
            if hasattr(collate, name):
                setattr(collate, name, None)
        return collate

    def collate_masked(self, dataset: Any, inds: Sequence[int]) -> Batch:
        """Mask each example by itself, as its index says, and pad them together.

        Whatever the batch, an example has the same tokens masked. Where chance masks none
        it is tried again.

        Args:
            dataset: The dataset.
            inds: Which examples of it.

        Returns:
            The batch.
        """
        collate, made = self._unseeded(), []
        for i, row in zip(inds, self._rows(dataset, inds), strict=True):
            for attempt in range(_ATTEMPTS):
                with seeded(self.seed, i, attempt):
                    one = canonical(collate([copy.copy(row)]))
                if bool((one["labels"] != IGNORED).any()):
                    break
            made.append(one)
        return pad_together(made, getattr(collate, "tokenizer", None))


def pad_together(made: Sequence[Mapping[str, Tensor]], tokenizer: Any) -> Batch:
    """Join batches of one text each.

    Args:
        made: Tensors of shape ``(1, t)``, or ``(1,)``, by name.
        tokenizer: Says what padding is, and on which side.

    Returns:
        Tensors of shape ``(b, max(t))``.

    Example:
        >>> texts = [{"labels": torch.tensor([[4, 5]])}, {"labels": torch.tensor([[6]])}]
        >>> pad_together(texts, None)["labels"].tolist()
        [[4, 5], [6, -100]]
    """
    on_left = getattr(tokenizer, "padding_side", "right") == "left"
    fill = {
        "labels": IGNORED,
        "input_ids": getattr(tokenizer, "pad_token_id", None) or 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", None) or 0,
    }
    batch = {}
    for key in made[0]:
        if made[0][key].ndim < 2:
            batch[key] = torch.cat([one[key] for one in made])
            continue
        longest = max(one[key].shape[1] for one in made)
        rows = []
        for one in made:
            lack = longest - one[key].shape[1]
            sides = (lack, 0) if on_left else (0, lack)
            value = fill.get(key, 0)
            rows.append(torch.nn.functional.pad(one[key], sides, value=value))
        batch[key] = torch.cat(rows)
    return batch
