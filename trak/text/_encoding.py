"""From training texts to what a model gets, and from that to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from trak.errors import OptionError
from trak.modelout_functions._token_labels import IGNORED
from trak.text._tokenizing import Tokenizing

Text: TypeAlias = str | tuple[str, str]
"""A training text: whole, or a prompt and its completion."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a model gets of a text, and which tokens it is to predict."""

    ids: tuple[int, ...]
    """The text's tokens; of an encoder-decoder model, the source's."""

    labels: tuple[int, ...]
    """The tokens to predict where they stand, and -100 elsewhere; of an encoder-decoder
    model, the target's."""

    target: tuple[int, ...] | None = None
    """All tokens of an encoder-decoder model's target; None for a decoder."""

    def labelled(self, places: Sequence[int]) -> Encoded:
        """Label the tokens at some positions, and no others.

        Args:
            places: Positions among the labels.

        Returns:
            The same text with these labels.
        """
        known = self.ids if self.target is None else self.target
        chosen = set(places)
        labels = tuple(
            token if i in chosen else IGNORED for i, token in enumerate(known)
        )
        return Encoded(self.ids, labels, self.target)


def encode_texts(
    tokenizing: Tokenizing, texts: Sequence[Text], *, is_seq2seq: bool
) -> list[Encoded]:
    """Encode training texts.

    Args:
        tokenizing: What tokenizes them.
        texts: Whole texts, or pairs of a prompt and a completion.
        is_seq2seq: Whether they are pairs of a source and a target.

    Returns:
        Each text's ids and labels, in order.

    Raises:
        OptionError: If there are none, one is empty, too long or has no token to
            predict, or the tokenizer is another model's.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise OptionError(
            f"texts is a {type(texts).__name__}; pass a list of texts, or of (prompt, "
            f"completion) pairs."
        )
    if not texts:
        raise OptionError("texts is empty; pass what the model was trained on.")
    pairs = [_as_pair(f"texts[{i}]", text) for i, text in enumerate(texts)]
    if is_seq2seq:
        return _encode_sources(tokenizing, pairs)
    whole = [i for i, (prompt, _) in enumerate(pairs) if not prompt]
    rows = dict(
        zip(whole, tokenizing.ids([pairs[i][1] for i in whole]), strict=True)
        if whole
        else ()
    )
    found = []
    for i, (prompt, completion) in enumerate(pairs):
        name, first = f"texts[{i}]", 0
        if i in rows:
            ids = tokenizing.cut(completion, rows[i])
        else:
            ids, _, first = tokenizing.continued(prompt, completion, is_cut=True)
        tokenizing.check(name, ids)
        places = range(max(1, first), len(ids))
        if not places:
            raise OptionError(_nothing(name, len(ids), first))
        found.append(Encoded(tuple(ids), ()).labelled(range(first, len(ids))))
    return found


def _encode_sources(
    tokenizing: Tokenizing, pairs: list[tuple[str, str]]
) -> list[Encoded]:
    sources = tokenizing.ids([source for source, _ in pairs])
    targets = tokenizing.ids([target for _, target in pairs], is_target=True)
    found = []
    for i, ((source, target), ids, labels) in enumerate(
        zip(pairs, sources, targets, strict=True)
    ):
        if not source:
            raise OptionError(
                f"texts[{i}] has no source; an encoder-decoder model was trained on pairs "
                f"(source, target)."
            )
        ids = tokenizing.cut(source, ids)
        labels = tokenizing.cut(target, labels, is_target=True)
        tokenizing.check(f"the source of texts[{i}]", ids)
        tokenizing.check(f"the target of texts[{i}]", labels)
        if not ids or not labels:
            raise OptionError(_nothing(f"texts[{i}]", 0, 0))
        found.append(Encoded(tuple(ids), tuple(labels), tuple(labels)))
    return found


def _as_pair(name: str, text: Any) -> tuple[str, str]:
    """Give a whole text an empty prompt."""
    pair = ("", text) if isinstance(text, str) else text
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if not is_pair or not all(isinstance(part, str) for part in pair):
        raise OptionError(
            f"{name} is a {type(text).__name__}; pass a str, or a pair of them (prompt, "
            f"completion)."
        )
    prompt, completion = pair
    if not completion:
        what = "has no completion" if prompt else "is empty"
        raise OptionError(f"{name} {what}, so nothing is predicted; leave it out.")
    return prompt, completion


def _nothing(name: str, tokens: int, first: int) -> str:
    if first >= tokens > 1:
        return (
            f"{name} has no token of its completion among {tokens}: it was cut off, or the "
            f"tokenizer drops it. Pass a larger max_length, or leave it out."
        )
    return (
        f"{name} has {tokens} token{'s' * (tokens != 1)}, so nothing is predicted; leave "
        f"it out, or use a tokenizer that puts a token at its beginning."
    )


def batched(
    encoded: Sequence[Encoded], batch_size: int
) -> Iterator[tuple[list[int], list[Encoded]]]:
    """Group texts of similar length, longest first: what fits at all fits at once.

    Args:
        encoded: The texts.
        batch_size: The most in a group.

    Yields:
        The positions of a group's texts among all, and the texts. The same for the same
        texts, so that work may be gone on with.
    """
    sizes = [(len(text.ids), len(text.labels)) for text in encoded]
    order = sorted(range(len(encoded)), key=lambda i: (-sum(sizes[i]), i))
    for low in range(0, len(order), batch_size):
        inds = order[low : low + batch_size]
        yield inds, [encoded[i] for i in inds]


def collate(
    encoded: Sequence[Encoded], model: Any, device: torch.device, *, has_mask: bool
) -> dict[str, Tensor]:
    """Pad texts on the right to a batch.

    Padding has the id 0, which every vocabulary has: the attention mask and the labels
    leave it out, whatever it is.

    Args:
        encoded: The texts.
        model: The model, which of an encoder and a decoder makes the decoder's inputs.
        device: Where the batch goes.
        has_mask: Whether the model takes ``attention_mask``.

    Returns:
        The batch, a row for each text.
    """
    batch = {"input_ids": _padded([text.ids for text in encoded], 0, device)}
    if has_mask:
        ones = [(1,) * len(text.ids) for text in encoded]
        batch["attention_mask"] = _padded(ones, 0, device)
    batch["labels"] = _padded([text.labels for text in encoded], IGNORED, device)
    targets = [text.target for text in encoded if text.target is not None]
    if targets:
        batch["decoder_input_ids"] = _shifted(model, _padded(targets, IGNORED, device))
    return batch


def _padded(
    rows: Sequence[tuple[int, ...]], value: int, device: torch.device
) -> Tensor:
    width = max(map(len, rows))
    filled = [row + (value,) * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.long, device=device)


def _shifted(model: Any, targets: Tensor) -> Tensor:
    """Make a decoder's inputs of all tokens of the targets, whichever are labelled."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        made: Tensor = own(labels=targets)
        return made
    start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    if start is None:
        raise OptionError(
            f"{type(model).__name__} does not say what its decoder starts with; set "
            f"config.decoder_start_token_id, or define "
            f"prepare_decoder_input_ids_from_labels(labels)."
        )
    known = targets.where(targets != IGNORED, 0)
    return torch.nn.functional.pad(known[:, :-1], (1, 0), value=start)
