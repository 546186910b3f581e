"""What is found for a query: training texts in order of their scores, to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from trak.text._encoding import Text

_WIDTH = 72


class Ranking(NamedTuple):
    """Training texts in order, the one with the strongest effect first."""

    texts: list[Text]
    """The texts, as they were given."""

    scores: Float32[np.ndarray, " k"]
    """Their scores."""

    indices: Int64[np.ndarray, " k"]
    """Where they stand among the training texts."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The training texts that made a model say something, and those that spoke against."""

    prompt: str
    """The prompt, or the source."""

    generation: str
    """What the model said to it."""

    span: str
    """The part of that which is explained, in whole tokens."""

    tokens: tuple[str, ...]
    """The tokens of that part."""

    proponents: Ranking
    """The texts that raised it most."""

    opponents: Ranking
    """The texts that lowered it most; those that raised it least, if none did."""

    train_scores: Float32[np.ndarray, " n"]
    """The scores of all training texts, in their order."""

    token_scores: Float32[np.ndarray, "n t"] | None = None
    """How much each training text raised each of the tokens, if that was asked for."""

    @property
    def texts(self) -> list[Text]:
        """The texts of :attr:`proponents`."""
        return self.proponents.texts

    @property
    def scores(self) -> Float32[np.ndarray, " k"]:
        """The scores of :attr:`proponents`."""
        return self.proponents.scores

    @property
    def indices(self) -> Int64[np.ndarray, " k"]:
        """The indices of :attr:`proponents`."""
        return self.proponents.indices

    def __str__(self) -> str:
        lines = [f"{shorten(self.prompt)!r} -> {shorten(self.generation)!r}"]
        if self.span != self.generation:
            lines.append(f"explained: {shorten(self.span)!r}")
        for title, ranking in (
            ("raised by", self.proponents),
            ("lowered by", self.opponents),
        ):
            lines.append(title)
            for text, score, index in zip(*ranking, strict=True):
                lines.append(f"{score:+11.4g}  [{index}] {_shown(text)}")
                if self.token_scores is not None:
                    lines.append(f"{'':13}{self._strongest(int(index))}")
        return "\n".join(lines)

    def _strongest(self, index: int) -> str:
        scores = np.zeros(0) if self.token_scores is None else self.token_scores[index]
        order = np.argsort(-np.abs(scores), kind="stable")[:4]
        found = (f"{self.tokens[t]!r} {scores[t]:+.3g}" for t in order)
        return "most: " + ", ".join(found)


def rank(
    texts: Sequence[Text], scores: Float32[np.ndarray, " n"], k: int, *, largest: bool
) -> Ranking:
    """Find the texts with the largest, or the smallest, scores.

    Args:
        texts: All texts.
        scores: Their scores. Shape ``(n,)``.
        k: How many at most.
        largest: Whether the largest.

    Returns:
        The texts, ties in their order.

    Example:
        >>> rank(["a", "b", "c"], np.float32([1, 3, 2]), 2, largest=True).texts
        ['b', 'c']
    """
    order = np.argsort(-scores if largest else scores, kind="stable")[:k]
    found = [texts[int(i)] for i in order]
    return Ranking(found, scores[order], order.astype(np.int64))


def _shown(text: Text) -> str:
    return shorten(text if isinstance(text, str) else f"{text[0]} -> {text[1]}")


def shorten(text: str) -> str:
    r"""Put a text on one line of limited length.

    Example:
        >>> shorten("a\nb"), len(shorten(100 * "a"))
        ('a b', 72)

    Returns:
        The line; what is left out is marked by dots.
    """
    line = " ".join(text.split("\n"))
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."
