"""Image-text pairs of emoji: what is trained on, and what is asked about.

Each emoji's name and keywords are dealt at random to its two drawings, so no phrase is said of
both (unless it is the only one). A target is Twitter's drawing, which no model is trained on; Google's drawing of the
same emoji, with other words, is in the training set: the *twin*.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from _emoji import Emoji
from torch import Tensor

LENGTH = 16  # tokens of a text; longer ones are cut
END, FIRST_WORD = 1, 2  # 0 is padding
_WORD = re.compile(r"[^\W_]+|[^\w\s-]")

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Drawings and their captions, as the model takes them."""

    inputs: Batch
    """``pixel_values`` (k, 3, 32, 32) in [-1, 1], ``input_ids`` and ``attention_mask``
    (k, t)"""
    captions: list[str]
    emoji: np.ndarray
    """Which emoji each is. (k,)"""
    vendors: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: np.ndarray | Tensor | slice) -> Batch:
        """Select pairs."""
        return {name: value[rows] for name, value in self.inputs.items()}

    def batches(self, size: int = 128) -> list[Batch]:
        """Go through all pairs in order."""
        return [
            self.take(slice(start, start + size)) for start in range(0, len(self), size)
        ]


@dataclass(frozen=True, slots=True)
class Question:
    """The training set, the targets, and which training pair is each target's twin."""

    train: Pairs
    targets: Pairs
    twins: np.ndarray
    """Google's drawing of each target's emoji: its place in the training set. (m,)"""
    vocabulary: int
    """Number of different tokens."""


def words(text: str) -> list[str]:
    """Split a text into lower-case words and signs."""
    return _WORD.findall(text.lower())


def ask(emoji: Emoji, n_targets: int = 300, seed: int = 0) -> Question:
    """Deal the captions, and hold Twitter's drawings of some emoji back.

    Args:
        emoji: The emoji.
        n_targets: How many to hold back.
        seed: Decides what is dealt and held back.

    Returns:
        Training pairs, targets, and where their twins are.
    """
    rng = np.random.default_rng(seed)
    dealt = [_deal(entry, rng) for entry in emoji.meta]
    google, twitter = ([pair[side] for pair in dealt] for side in (0, 1))
    said = {word for caption in google for word in words(caption)}
    # A target's caption should hold words that are in the training set whoever is held back.
    known = [sum(word in said for word in words(caption)) for caption in twitter]
    order = rng.permutation(np.flatnonzero(np.array(known) >= 2))
    held, everyone = np.sort(order[:n_targets]), np.arange(len(emoji.meta))
    shown = np.setdiff1d(everyone, held)
    captions = google + [twitter[i] for i in shown]
    vocabulary = sorted({word for caption in captions for word in words(caption)})
    tokens = {word: FIRST_WORD + i for i, word in enumerate(vocabulary)}
    train = Pairs(
        _inputs(np.concatenate([emoji.google, emoji.twitter[shown]]), captions, tokens),
        captions,
        np.concatenate([everyone, shown]),
        ["google"] * len(everyone) + ["twitter"] * len(shown),
    )
    asked = [twitter[i] for i in held]
    targets = Pairs(
        _inputs(emoji.twitter[held], asked, tokens),
        asked,
        held,
        ["twitter"] * len(held),
    )
    return Question(train, targets, held, FIRST_WORD + len(tokens))


def _deal(entry: dict, rng: np.random.Generator) -> tuple[str, str]:
    phrases = {
        " ".join(words(text)): None for text in (entry["name"], *entry["keywords"])
    }
    phrases.pop("", None)
    shuffled = [[*phrases][i] for i in rng.permutation(len(phrases))]
    google, twitter = shuffled[::2], shuffled[1::2] or shuffled
    return " ".join(google), " ".join(twitter)


def _inputs(drawings: np.ndarray, captions: list[str], tokens: dict[str, int]) -> Batch:
    ids = torch.zeros(len(captions), LENGTH, dtype=torch.long)
    for row, caption in zip(ids, captions, strict=True):
        # Words of targets that the training set lacks are passed over.
        known = [tokens[word] for word in words(caption) if word in tokens]
        known = [*known[: LENGTH - 1], END]
        row[: len(known)] = torch.tensor(known)
    images = torch.from_numpy(drawings).permute(0, 3, 1, 2).float() / 127.5 - 1
    mask = (ids > 0).long()
    return {"pixel_values": images, "input_ids": ids, "attention_mask": mask}
