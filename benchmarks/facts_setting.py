"""A model of facts: how it is trained, asked and compared, whichever model it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import accuracy_models as models
import facts_data
import facts_models
import numpy as np
import torch
from accuracy_models import Recipe
from facts_data import Facts
from torch import Tensor, nn

from trak.modelout_functions import TASK_TO_MODELOUT

TOKENS = 64
"""Longest text, in pieces of the Llama."""

IGNORED = -100
BATCH = 64

Mapping = dict[str, Tensor]


@dataclass(frozen=True)
class FactModel(ABC):
    """A language model, the texts that it is trained on, and the facts it is asked."""

    root: Path
    """Directory of the data."""

    recipe: Recipe
    name: str = ""
    title: str = ""
    task: str = ""
    checkpoints: int = 5
    group: int = 8
    """Facts whose texts are removed together: a retraining answers for all of them."""

    groups: int = 3

    repeats: int = 2
    """Retrainings of each group."""

    @cached_property
    def facts(self) -> Facts:
        """The same texts and queries for every model."""
        pieces = facts_models.Pieces(self.root / facts_models.PIECES)
        return facts_data.read(
            self.root, is_short=lambda text: pieces.fits(text, TOKENS)
        )

    @abstractmethod
    def build(self) -> nn.Module:
        """Make a model to be trained."""

    @property
    @abstractmethod
    def texts(self) -> tuple[Tensor, ...]:
        """What it is trained on. Shapes ``(n, ...)``."""

    @property
    @abstractmethod
    def queries(self) -> Mapping:
        """What it is asked, with labels of the answers alone. Shapes ``(m, ...)``."""

    @abstractmethod
    def as_batch(self, columns: tuple[Tensor, ...]) -> Mapping:
        """Give training texts as the model and the task take them."""

    @abstractmethod
    def states(self, model: nn.Module, batch: Mapping) -> Tensor:
        """Average the last states of a text. Shape ``(b, k)``."""

    @property
    def n(self) -> int:
        return len(self.facts.texts)

    @property
    def m(self) -> int:
        return len(self.facts.queries)

    @cached_property
    def train_batches(self) -> list[Mapping]:
        parts = zip(*(part.split(BATCH) for part in self.texts), strict=True)
        return [self.as_batch(columns) for columns in parts]

    @cached_property
    def query_batches(self) -> list[Mapping]:
        parts = {k: v.split(BATCH) for k, v in self.queries.items()}
        count = len(next(iter(parts.values())))
        return [{k: v[i] for k, v in parts.items()} for i in range(count)]

    def loss(self, model: nn.Module, columns: tuple[Tensor, ...]) -> Tensor:
        """Compute the mean over the tokens of a batch, as transformers does."""
        return model(**self.as_batch(columns), use_cache=False).loss

    def train(
        self,
        indices: np.ndarray,
        seed: int,
        keep: Callable[[int, nn.Module], None] | None = None,
    ) -> nn.Module:
        return models.train(
            self.build, self.loss, self.texts, indices, seed, self.recipe, keep
        )

    @torch.no_grad()
    def answers(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """Ask every fact.

        Returns:
            Mean margins of the tokens of the answers, and whether each token is the most
            likely one after those before it. Shape ``(m,)`` each.
        """
        task = TASK_TO_MODELOUT[self.task]()
        margins = task.get_outputs(model, None, None, self.queries)
        logits, labels = task.logits_and_labels(model, None, None, self.queries)
        right = (logits.argmax(-1) == labels) | (labels == IGNORED)
        return margins.numpy(), right.all(1).numpy()


def averaged(states: Tensor, mask: Tensor) -> Tensor:
    """Average the states of a text's tokens. Shape ``(b, k)``."""
    weights = mask[..., None].float()
    return (states * weights).sum(1) / weights.sum(1)


_LLAMA = Recipe(12, 4e-3, batch=16, optimizer="adamw", decay=0.01)
_SMOLLM2 = Recipe(3, 1e-4, 16, optimizer="adamw", decay=0.01, autocast=True)
_T5 = Recipe(30, 2e-3, batch=32, optimizer="adamw", decay=0.01)


class Decoder(FactModel):
    """Reads a text from its beginning; is given the text up to the answer."""

    @property
    @abstractmethod
    def pieces(self) -> facts_models.Pieces | facts_models.SmolLM2Pieces:
        """What texts are cut into."""

    @cached_property
    def texts(self) -> tuple[Tensor, ...]:
        return self.pieces.batch([text.text for text in self.facts.texts], TOKENS)

    @cached_property
    def queries(self) -> Mapping:
        found = self.pieces.batch([q.text for q in self.facts.queries], TOKENS)
        ids, mask = (part[:, : int(found[1].sum(1).max())] for part in found)
        labels = torch.full_like(ids, IGNORED)
        for row, query in enumerate(self.facts.queries):
            start = 1 + len(self.pieces.encode(query.prompt))
            stop = start + len(self.pieces.encode(query.answer))
            labels[row, start:stop] = ids[row, start:stop]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def as_batch(self, columns: tuple[Tensor, ...]) -> Mapping:
        ids, mask = (part[:, : int(columns[1].sum(1).max())] for part in columns)
        labels = ids.where(mask > 0, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def states(self, model: nn.Module, batch: Mapping) -> Tensor:
        mask = batch["attention_mask"]
        found = model.model(batch["input_ids"], attention_mask=mask, use_cache=False)
        return averaged(found.last_hidden_state, mask)


@dataclass(frozen=True)
class Llama(Decoder):
    """Small enough to be trained hundreds of times; has read children's stories."""

    recipe: Recipe = _LLAMA
    name: str = "llama"
    title: str = "Llama (260k), fine-tuned"
    task: str = "causal_lm"

    @cached_property
    def pieces(self) -> facts_models.Pieces:
        return facts_models.Pieces(self.root / facts_models.PIECES)

    def build(self) -> nn.Module:
        return facts_models.llama(self.root)


@dataclass(frozen=True)
class SmolLM2(Decoder):
    """Has read much of the web, and knows some of the facts from there."""

    recipe: Recipe = _SMOLLM2
    name: str = "smollm2"
    title: str = "SmolLM2 (135M), fine-tuned"
    task: str = "causal_lm"
    checkpoints: int = 2
    group: int = 16
    groups: int = 1
    repeats: int = 1

    @cached_property
    def pieces(self) -> facts_models.SmolLM2Pieces:
        return facts_models.SmolLM2Pieces()

    def build(self) -> nn.Module:
        return facts_models.smollm2()


@dataclass(frozen=True)
class T5(FactModel):
    """Fills the hole of a text where a name was."""

    recipe: Recipe = _T5
    name: str = "t5"
    title: str = "T5 (1.0M), from scratch"
    task: str = "seq2seq_lm"
    groups: int = 2
    repeats: int = 1

    @cached_property
    def _words(self) -> facts_models.Words:
        return facts_models.Words([text.text for text in self.facts.texts])

    def build(self) -> nn.Module:
        return facts_models.t5(len(self._words))

    @cached_property
    def texts(self) -> tuple[Tensor, ...]:
        pairs = [facts_data.with_hole(text) for text in self.facts.texts]
        return tuple(self._words.batch(part) for part in zip(*pairs, strict=True))

    @cached_property
    def queries(self) -> Mapping:
        asked = [f"{q.prompt} {facts_data.HOLE}." for q in self.facts.queries]
        said = [q.answer for q in self.facts.queries]
        return self.as_batch((self._words.batch(asked), self._words.batch(said)))

    def as_batch(self, columns: tuple[Tensor, ...]) -> Mapping:
        source, target = (part[:, : int((part > 0).sum(1).max())] for part in columns)
        return {
            "input_ids": source,
            "attention_mask": (source > 0).long(),
            "labels": target.where(target > 0, IGNORED),
        }

    def states(self, model: nn.Module, batch: Mapping) -> Tensor:
        mask = batch["attention_mask"]
        found = model.encoder(batch["input_ids"], attention_mask=mask)
        return averaged(found.last_hidden_state, mask)


KINDS: dict[str, Callable[..., FactModel]] = {
    "llama": Llama,
    "t5": T5,
    "smollm2": SmolLM2,
}
