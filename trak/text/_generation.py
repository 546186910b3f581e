"""Greedy generation by the model itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from trak.errors import OptionError


def generate(
    model: Any,
    tokenizer: Any,
    name: str,
    prompt: list[int],
    limit: int | None,
    options: dict[str, Any],
) -> list[int]:
    """Have a model go on with a prompt, choosing the likeliest token each time.

    Args:
        model: The model, with ``generate`` as in ``transformers``.
        tokenizer: Its tokenizer.
        name: What to call the prompt in messages.
        prompt: The prompt's tokens, or the source's.
        limit: The most tokens that the model takes; None if that is not known.
        options: Options of ``model.generate``.

    Returns:
        The new tokens, up to the one that ends a text.

    Raises:
        OptionError: If the model cannot generate, an option would make it choose other
            tokens, there is no prompt, no room for an answer, or the answer is empty.
    """
    if not callable(getattr(model, "generate", None)):
        raise OptionError(
            f"{type(model).__name__} has no generate(); pass generation, what it said."
        )
    fixed = sorted({"do_sample", "num_beams", "input_ids"} & set(options))
    if fixed:
        raise OptionError(
            f"{', '.join(fixed)} cannot be chosen: the likeliest token is taken each time. "
            f"Pass generation, what the model said, to explain an answer made otherwise."
        )
    if not prompt:
        raise OptionError(f"{name} has no tokens, so there is nothing to go on with.")
    config = getattr(model, "config", None)
    is_seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    if limit is not None and not is_seq2seq:
        if len(prompt) >= limit:
            raise OptionError(
                f"{name} has {len(prompt)} tokens, and the model takes {limit}, so there "
                f"is no room for an answer; shorten it."
            )
        room = limit - len(prompt)
        options = {**options, "max_new_tokens": min(options["max_new_tokens"], room)}
    ends = _ends(model, tokenizer)
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = next(iter(ends), None) if pad is None else pad
    padding = {} if pad is None else {"pad_token_id": pad}
    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    model.eval()
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            **padding,
            **options,
        )
    # A decoder repeats the prompt; an encoder-decoder begins with a start token.
    new: list[int] = made[0, 1 if is_seq2seq else len(prompt) :].tolist()
    length = next((i for i, token in enumerate(new) if token in ends), len(new))
    if not length:
        raise OptionError(
            f"the model says nothing to {name}: its first token ends the text. Pass "
            f"generation to explain something else, or another prompt."
        )
    return new[:length]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """List the tokens that end a text."""
    config = getattr(model, "generation_config", None)
    found: list[int] = []
    for owner in (config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        several = value if isinstance(value, Iterable) else [value]
        found += [token for token in several if isinstance(token, int)]
    return list(dict.fromkeys(found))
