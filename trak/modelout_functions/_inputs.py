"""What of a mapping a model is given: what it takes, and no columns of text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module

from trak.errors import BatchError


def forward_parameters(model: Module) -> Mapping[str, inspect.Parameter]:
    """List what a model's ``forward`` takes, inside wrappers that pass on anything.

    Returns:
        Its parameters by name.
    """
    while True:
        inner = getattr(model, "get_base_model", None)  # of a PEFT model
        found = inner() if callable(inner) else None
        if found is None:
            names = [it for it in ("module", "_orig_mod") if it in model._modules]
            found = model._modules[names[0]] if names else None
        own = inspect.signature(model.forward).parameters
        passes_on = any(it.kind is it.VAR_KEYWORD for it in own.values())
        if not isinstance(found, Module) or found is model or not passes_on:
            return own
        model = found


def model_inputs(model: Module, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the entries of a mapping that go to a model.

    Entries of strings are left out unless the model names them: columns such as the text
    that the tokens are from.

    Args:
        model: The model.
        entries: Those of a batch, without labels.

    Returns:
        The rest.

    Raises:
        BatchError: If there is an entry that the model does not take, or one of Python
            numbers.
    """
    known = forward_parameters(model)
    takes_any = any(it.kind is it.VAR_KEYWORD for it in known.values())
    chosen = {
        key: value
        for key, value in entries.items()
        if key in known or not _leaf_is(value, str)
    }
    unknown = [key for key in chosen if key not in known and not takes_any]
    if unknown:
        named = [it.name for it in known.values() if it.kind is not it.VAR_POSITIONAL]
        raise BatchError(
            f"The batch has {', '.join(map(repr, unknown))}, which the model does not "
            f"take: its forward takes {', '.join(named)}. Leave it out, e.g. with "
            f"dataset.remove_columns({unknown})."
        )
    sizes = {len(it) for it in chosen.values() if isinstance(it, Tensor) and it.ndim}
    for key, value in chosen.items():
        if not (isinstance(value, list | tuple) and _leaf_is(value, int | float)):
            continue
        if isinstance(value[0], list | tuple) or not sizes or len(value) in sizes:
            raise BatchError(
                f"{key!r} holds Python numbers, not a tensor. Pad and stack the rows, "
                f"e.g. with DataCollatorWithPadding(tokenizer) of transformers; or use "
                f"dataset.with_format('torch') where all have one length."
            )
    return chosen


def _leaf_is(value: Any, kind: Any) -> bool:
    """Tell whether the first thing in nested lists is of a kind."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, kind)
