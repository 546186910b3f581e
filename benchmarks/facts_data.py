"""WebNLG as facts to trace: training texts, and held-out paraphrases that ask for one.

WebNLG (Gardent et al., 2017) has texts beside the triples, ``subject | relation | object``,
that they state. A query is a text of one triple that ends with its object and is not
trained on; its proponents are the training texts that state the same triple.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FILE = "webnlg_v1.6_en.jsonl.gz"
CATEGORIES = ("Airport", "Monument", "University")
MOST_TRIPLES = 2
LEAST_PROPONENTS = 2
HOLE = "<hole>"
"""What stands in a text where a name was."""


@dataclass(frozen=True, slots=True)
class Text:
    """What is trained on."""

    text: str
    triples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """A fact that is asked for."""

    prompt: str
    """The paraphrase up to its object."""

    answer: str
    """The object, as the paraphrase has it."""

    triple: str

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}."


@dataclass(frozen=True)
class Facts:
    """Training texts and queries."""

    texts: tuple[Text, ...]
    queries: tuple[Query, ...]

    @cached_property
    def proponents(self) -> np.ndarray:
        """Whether a text states the fact of a query. Shape ``(n, m)``."""
        return np.array([
            [q.triple in t.triples for q in self.queries] for t in self.texts
        ])


def surface(triple: str) -> str:
    """Give the object of a triple as a text would write it.

    Returns:
        The object's name.

    Example:
        >>> surface("Alan_Bean | birthPlace | Wheeler,_Texas")
        'Wheeler, Texas'
    """
    name = triple.split(" | ")[2].strip('"').replace("_", " ")
    return re.sub(r"\s*\([^)]*\)", "", name).strip()


def with_hole(text: Text) -> tuple[str, str]:
    """Take the object of a text's first triple that it has word for word.

    Where it has none, its last word is taken.

    Returns:
        The text with a hole, and what was there.

    Example:
        >>> with_hole(Text("Rome is in Italy.", ("Rome | country | Italy",)))
        ('Rome is in <hole>.', 'Italy')
    """
    for triple in text.triples:
        name = surface(triple)
        if name and name in text.text:
            return text.text.replace(name, HOLE), name
    *words, last = text.text.rstrip(".").split(" ")
    return " ".join([*words, f"{HOLE}."]), last


def read(
    root: Path,
    m: int = 150,
    seed: int = 0,
    is_short: Callable[[str], bool] | None = None,
) -> Facts:
    """Read the texts, and draw the queries.

    Args:
        root: Directory with the file.
        m: Number of queries, each of another fact.
        seed: Of the draw.
        is_short: Says of a text whether it is taken; None to take all.

    Returns:
        The texts, in the file's order without those that became queries, each once.
    """
    with gzip.open(root / FILE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [
        Text(row["text"].strip(), tuple(row["triples"]))
        for row in rows
        if row["category"] in CATEGORIES and len(row["triples"]) <= MOST_TRIPLES
    ]
    texts = [t for t in dict.fromkeys(texts) if is_short is None or is_short(t.text)]
    stated = Counter(triple for text in texts for triple in text.triples)
    found = {}
    for i in np.random.default_rng(seed).permutation(len(texts)):
        query = _query(texts[i])
        if query is None or stated[query.triple] <= LEAST_PROPONENTS:
            continue
        if query.triple not in {q.triple for q in found.values()}:
            found[i] = query
        if len(found) == m:
            break
    kept = tuple(text for i, text in enumerate(texts) if i not in found)
    return Facts(kept, tuple(found.values()))


def _query(text: Text) -> Query | None:
    if len(text.triples) != 1:
        return None
    answer, words = surface(text.triples[0]), text.text.rstrip(".")
    if len(answer) < 3 or not words.endswith(" " + answer):
        return None
    return Query(words[: -len(answer) - 1], answer, text.triples[0])
