"""What a model said to a prompt, and which of its tokens are to be explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trak.errors import OptionError
from trak.text._encoding import Encoded
from trak.text._tokenizing import Span, Tokenizing, first_covering

_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, what a model said to it, and where each token of that stands."""

    prompt: str
    """The prompt, or the source."""

    text: str
    """The answer."""

    whole: Encoded
    """Both."""

    places: tuple[int, ...]
    """Positions of the answer's tokens among the labels."""

    spans: tuple[Span, ...]
    """The characters of the answer that each of these tokens stands for; they tile it."""

    def tokens(self) -> list[str]:
        """Cut the answer into what each token stands for."""
        return [self.text[low:high] for low, high in self.spans]

    def part(self, low: int, high: int) -> Answer:
        """Take some of the answer's tokens.

        Args:
            low: The first.
            high: The one after the last.

        Returns:
            The same answer, with only these places.
        """
        return Answer(
            self.prompt,
            self.text,
            self.whole,
            self.places[low:high],
            self.spans[low:high],
        )


def read_answer(
    tokenizing: Tokenizing,
    name: str,
    prompt: str,
    answer: str | list[int],
    *,
    is_seq2seq: bool,
) -> Answer:
    """Encode a prompt and what was said to it.

    Args:
        tokenizing: What tokenizes.
        name: What to call the prompt in messages.
        prompt: The prompt, or the source.
        answer: The answer as text, which of a decoder goes on where the prompt ends; or
            the tokens that the model made, without the one that ends them.
        is_seq2seq: Whether the prompt is a source, and the answer a target.

    Returns:
        The answer.

    Raises:
        OptionError: If no token of the answer is predicted, both are too long, or the
            tokenizer is another model's.
    """
    text = answer if isinstance(answer, str) else tokenizing.decode(answer)
    target: list[int] | None = None
    if is_seq2seq:
        ids, first = tokenizing.prompt(prompt), 0
        if isinstance(answer, str):
            target, spans = tokenizing.spans(text, is_target=True)
        else:
            target, spans = answer, tokenizing.decoded(answer)
        tokenizing.check(f"the answer to {name}", target)
    elif isinstance(answer, str):
        ids, spans, first = tokenizing.continued(prompt, text)
    else:
        head = tokenizing.prompt(prompt)
        ids, first = head + answer, len(head)
        spans = [(0, 0)] * first + tokenizing.decoded(answer)
    if isinstance(answer, str) and not tokenizing.has_offsets:
        # Spans are of what the tokens say, which may lack a space.
        text = tokenizing.decode((target or ids)[first:])
    tokenizing.check(name if is_seq2seq else f"{name} with its answer", ids)
    if isinstance(answer, str):
        # What the tokenizer puts around a text stands for no characters.
        first = max(first, first_covering(spans))
        last = len(spans) - first_covering(spans[::-1])
    else:
        last = len(spans)
    tiles = _tiled(spans[first:last])
    # A decoder predicts its first token from nothing.
    low = first if is_seq2seq else max(1, first)
    places = range(low, last)
    if not places:
        raise OptionError(
            f"the answer to {name}, {_short(text)!r}, has no token that the model "
            f"predicts; pass a longer one, or a prompt before it."
        )
    whole = Encoded(tuple(ids), (), None if target is None else tuple(target))
    return Answer(prompt, text, whole, tuple(places), tuple(tiles[low - first :]))


def select(name: str, answer: Answer, span: object) -> Answer:
    """Take the tokens of an answer that stand for some of its characters.

    Args:
        name: What to call the span in messages.
        answer: The answer.
        span: A part of its text that occurs once, or a pair of its first character and
            the one after its last; None for all.

    Returns:
        The answer with the places of all tokens that have to do with the span.

    Raises:
        OptionError: If it is not a part of the answer, or not one part.
    """
    if span is None:
        return answer
    low, high = _characters(name, answer.text, span)
    chosen = [i for i, (a, b) in enumerate(answer.spans) if a < high and b > low]
    if not chosen:
        raise OptionError(
            f"{name}={span!r}: no token that the model predicts stands for "
            f"{answer.text[low:high]!r}; pass a larger span."
        )
    return answer.part(chosen[0], chosen[-1] + 1)


def _characters(name: str, text: str, span: object) -> Span:
    if isinstance(span, str):
        count = sum(text.startswith(span, i) for i in range(len(text))) if span else 0
        if count != 1:
            found = f"occurs {count} times in" if count else "is no part of"
            raise OptionError(
                f"{name}={span!r} {found} the answer {_short(text)!r}; pass a part that "
                f"occurs once, or a pair (start, end) of characters."
            )
        return text.index(span), text.index(span) + len(span)
    pair = tuple(span) if isinstance(span, tuple | list) else ()
    is_pair = len(pair) == 2 and all(type(at) is int for at in pair)
    if not is_pair or not 0 <= pair[0] < pair[1] <= len(text):
        raise OptionError(
            f"{name}={span!r}; pass a part of the answer {_short(text)!r}, or a pair (start, "
            f"end) with 0 <= start < end <= {len(text)}, its number of characters."
        )
    return pair[0], pair[1]


def _tiled(spans: Sequence[Span]) -> list[Span]:
    """Give the spaces between tokens to the token after them."""
    found, end = [], 0
    for low, high in spans:
        # Several tokens may stand for one character.
        found.append((end, high) if high > end else (min(low, high), high))
        end = max(high, end)
    return found


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
