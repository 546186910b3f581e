"""A tokenizer as attribution needs it: ids, the characters they cover, what cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from trak.errors import OptionError

Span: TypeAlias = tuple[int, int]
"""The first character, and the one after the last."""

_NO_LIMIT = 10**9
"""A tokenizer that knows no longest text says so with a number above this."""


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a tokenizer of ``transformers``.

    One that is fast, as its ``is_fast`` says, also takes ``return_offsets_mapping``; one
    of an encoder-decoder model also ``text_target``.
    """

    def __call__(self, *texts: Any, **options: Any) -> Mapping[str, Any]:
        """Tokenize a list of texts; ``input_ids`` is a list of ids for each."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Turn ids back into text."""


class Tokenizing:
    """Calls a tokenizer for one model, and refuses what that model cannot take.

    Args:
        model: A model of ``transformers``, or one that is called as these are.
        tokenizer: Its tokenizer.
        max_length: Tokens after which training texts are cut; None to refuse those that
            are longer than the model takes.
        add_special_tokens: Whether the tokenizer adds what it adds by default.

    Attributes:
        has_offsets: Whether the tokenizer tells which characters a token covers.

    Raises:
        OptionError: If ``max_length`` is no number from 2 to the most the model takes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> None:
        self.has_offsets = bool(getattr(tokenizer, "is_fast", True))
        self._tokenizer, self._max_length = tokenizer, max_length
        self._options: dict[str, Any] = {"add_special_tokens": add_special_tokens}
        self._vocabulary, positions = _vocabulary(model), _positions(model)
        if max_length is not None and not 1 < max_length <= (positions or _NO_LIMIT):
            raise OptionError(
                f"max_length={max_length}; pass a number of tokens from 2 to "
                f"{positions or 'what memory allows'}, the most that the model takes."
            )
        eos = getattr(tokenizer, "eos_token_id", None)
        self._special = {*getattr(tokenizer, "all_special_ids", ()), eos}
        known = getattr(tokenizer, "model_max_length", None)
        own = known if isinstance(known, int) and known < _NO_LIMIT else None
        self.limit: int | None = max_length or positions or own

    def ids(self, texts: list[str], *, is_target: bool = False) -> list[list[int]]:
        """Tokenize texts.

        Args:
            texts: The texts.
            is_target: Whether they are what an encoder-decoder model says.

        Returns:
            The ids of each.
        """
        found = self._call(texts, is_target=is_target)["input_ids"]
        return [list(row) for row in found]

    def spans(
        self, text: str, *, is_target: bool = False, **options: Any
    ) -> tuple[list[int], list[Span]]:
        """Tokenize a text, and find the characters that each token covers.

        Args:
            text: The text.
            is_target: As in :meth:`ids`.
            **options: Further ones of a tokenizer that is fast.

        Returns:
            Ids and spans; those of special tokens that were added are empty.
        """
        if not self.has_offsets:
            ids = self.ids([text], is_target=is_target)[0]
            return ids, self.decoded(ids)
        options["return_offsets_mapping"] = True
        found = self._call([text], is_target=is_target, **options)
        spans = [(int(low), int(high)) for low, high in found["offset_mapping"][0]]
        return list(found["input_ids"][0]), spans

    def continued(
        self, prompt: str, text: str, *, is_cut: bool = False
    ) -> tuple[list[int], list[Span], int]:
        """Tokenize a prompt with what follows it.

        Args:
            prompt: The prompt.
            text: What follows.
            is_cut: Whether both are shortened to ``max_length``, at the tokenizer's side.

        Returns:
            The ids of both together, the characters of ``text`` that each covers, and the
            position of the first token that covers any.
        """
        if self.has_offsets:
            options = self._cutting() if is_cut else {}
            ids, spans = self.spans(prompt + text, **options)
            if is_cut:
                ids, spans = ids[: self._max_length], spans[: self._max_length]
            start = len(prompt)
            moved = [(max(0, low - start), max(0, high - start)) for low, high in spans]
            return ids, moved, first_covering(moved)
        head = self.prompt(prompt) if prompt else []
        rest = list(self._tokenizer([text], add_special_tokens=False)["input_ids"][0])
        ids, first = head + rest, len(head)
        lack = len(ids) - (self._max_length or len(ids)) if is_cut else 0
        if lack > 0 and getattr(self._tokenizer, "truncation_side", "") == "left":
            # What begins every text is kept.
            low = next((i for i, it in enumerate(ids) if it not in self._special), 0)
            ids, first = ids[:low] + ids[low + lack :], max(low, first - lack)
        elif lack > 0:
            ids = ids[:-lack]
        return ids, [(0, 0)] * first + self.decoded(ids[first:]), first

    def prompt(self, text: str) -> list[int]:
        """Tokenize a prompt, without what is put after a whole text."""
        ids, spans = self.spans(text)
        while (
            len(ids) > 1 and ids[-1] in self._special and spans[-1][0] >= spans[-1][1]
        ):
            ids, spans = ids[:-1], spans[:-1]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text, without special tokens."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text: str = self._tokenizer.decode(ids, **options)
        return text

    def decoded(self, ids: list[int]) -> list[Span]:
        """Find which characters of the decoded text tokens stand for, one after another.

        Args:
            ids: The tokens.

        Returns:
            What decoding one token more adds. The tokens that make up a character all
            stand for it, and special tokens for what the token after them does.
        """
        # A part of a character is decoded as this mark.
        prefixes = (self.decode(ids[: i + 1]).rstrip("\ufffd") for i in range(len(ids)))
        ends = [len(prefix) for prefix in prefixes]
        spans: list[Span] = []
        after = (ends[-1], ends[-1]) if ends else (0, 0)
        for low, high in zip(reversed([0, *ends[:-1]]), reversed(ends), strict=True):
            after = (low, high) if high > low else after
            spans.append(after)
        return spans[::-1]

    def cut(self, text: str, ids: list[int], *, is_target: bool = False) -> list[int]:
        """Shorten a training text that is longer than ``max_length``.

        Args:
            text: The text.
            ids: Its tokens.
            is_target: As in :meth:`ids`.

        Returns:
            The tokens that are left.
        """
        if self._max_length is None or len(ids) <= self._max_length:
            return ids
        found = self._call([text], is_target=is_target, **self._cutting())
        return list(found["input_ids"][0])[: self._max_length]

    def _cutting(self) -> dict[str, Any]:
        """Have the tokenizer cut: it keeps what it puts at the end, and knows the side."""
        if self._max_length is None:
            return {}
        return {"truncation": True, "max_length": self._max_length}

    def check(self, name: str, ids: Sequence[int]) -> None:
        """Refuse tokens that the model does not know, or more than it takes.

        Args:
            name: What to call the text.
            ids: Its tokens.

        Raises:
            OptionError: If it has either.
        """
        top = max(ids, default=0)
        if self._vocabulary is not None and top >= self._vocabulary:
            raise OptionError(
                f"{name} has the token {top}, and the model knows {self._vocabulary} "
                f"tokens; pass the model's own tokenizer."
            )
        if self.limit is not None and len(ids) > self.limit:
            raise OptionError(
                f"{name} has {len(ids)} tokens, and the model takes {self.limit}; shorten "
                f"it, or have training texts cut by max_length={self.limit}."
            )

    def _call(
        self, texts: list[str], *, is_target: bool, **options: Any
    ) -> Mapping[str, Any]:
        if is_target:
            return self._tokenizer(text_target=texts, **self._options, **options)
        return self._tokenizer(texts, **self._options, **options)


def first_covering(spans: Sequence[Span]) -> int:
    """Find the first span that covers a character.

    Returns:
        Its position; the number of spans if none does.

    Example:
        >>> first_covering([(0, 0), (0, 2)])
        1
    """
    covering = (i for i, (low, high) in enumerate(spans) if high > low)
    return next(covering, len(spans))


def _positions(model: Any) -> int | None:
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _vocabulary(model: Any) -> int | None:
    find = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(find(), "weight", None) if find else None
    except NotImplementedError:
        return None
    return None if weight is None else len(weight)
