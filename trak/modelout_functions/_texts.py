"""What can be wrong with a batch of texts, told before the model is called or after."""

from __future__ import annotations

import re

from torch import Tensor
from torch.nn import Embedding, Module

from trak.errors import BatchError, TaskError, TrakError
from trak.modelout_functions._calls import ModelCall
from trak.modelout_functions._padding import check_padding

_OTHER_TASKS = {"regression": "regression", "multi_label_classification": "multilabel"}
_TOO_LONG = re.compile(r"must match|out of bounds")
_NO_INTEGERS = re.compile(r"scalar types: Long, Int")


def check_problem(model: Module) -> None:
    """Refuse a model of ``transformers`` that was configured for another problem.

    Raises:
        TaskError: If it was, with the task to use.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in _OTHER_TASKS:
        raise TaskError(
            f"The model's config.problem_type is {problem!r}, and this task is a softmax "
            f"over classes; use the task {_OTHER_TASKS[problem]!r}, or set problem_type to "
            f"'single_label_classification' if the classes exclude each other."
        )


def check_texts(model: Module, call: ModelCall) -> None:
    """Refuse texts of which the model would read padding, or nothing.

    Args:
        model: The model.
        call: What it is given.

    Raises:
        BatchError: If nothing of a text may be looked at, with its place in the batch; if
            the mask is not as wide as the texts; or if there is padding and no mask.
    """
    mask = call.kwargs.get("attention_mask")
    if mask is None:
        is_causal = _reads_forwards(model)
        check_padding(model, call.kwargs, sides="left" if is_causal else "both")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    empty = ~(mask != 0).any(1)
    if empty.any():
        raise BatchError(
            f"Text {int(empty.nonzero()[0])} of the batch is empty: its attention_mask is "
            f"0 everywhere; leave it out, or have the tokenizer add its special tokens."
        )
    ids = call.kwargs.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape != mask.shape:
        raise BatchError(
            f"The attention_mask has shape {tuple(mask.shape)} and the input_ids "
            f"{tuple(ids.shape)}; pass both as the tokenizer returns them."
        )


def _reads_forwards(model: Module) -> bool:
    """Tell whether no token sees a later one, so that padding on the right is not read."""
    known = [m.is_causal for m in model.modules() if hasattr(m, "is_causal")]
    return bool(known) and all(known)


def explain(error: Exception, model: Module, call: ModelCall) -> TrakError | None:
    """Say what in a batch made the model fail, as far as its message and shapes tell.

    Args:
        error: What the model raised.
        model: The model.
        call: What it was given.

    Returns:
        The error to raise instead; None where nothing is known.
    """
    if isinstance(error, TrakError):
        return None
    text = str(error)
    if isinstance(error, IndexError):
        return no_such_token(error, call)
    if "padding token" in text:
        return TaskError(
            f"The model classifies by the last token of each text, and does not know which "
            f"tokens are padding ({text}); set model.config.pad_token_id."
        )
    return _of_widths(text, model, call)


def no_such_token(error: IndexError, call: ModelCall) -> BatchError:
    """Say that a token or a position is none of the model's.

    Returns:
        The error to raise instead.
    """
    return BatchError(
        f"The model has no such token or position ({error}); its inputs have shapes "
        f"{_shapes(call)}. Truncate texts to the longest that the model takes, and use "
        f"the model's own tokenizer."
    )


def _shapes(call: ModelCall) -> dict[str, tuple[int, ...]]:
    return {
        key: tuple(value.shape)
        for key, value in call.kwargs.items()
        if isinstance(value, Tensor)
    }


def _of_widths(text: str, model: Module, call: ModelCall) -> TrakError | None:
    tokens = call.kwargs.get("input_ids", call.kwargs.get("inputs_embeds"))
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return None
    if _NO_INTEGERS.search(text):
        return BatchError(
            f"The input_ids have dtype {tokens.dtype}; token ids are integers, so convert "
            f"them with input_ids.long(), or pass vectors as inputs_embeds."
        )
    width = tokens.shape[1]
    if width == 0:
        return BatchError(
            f"The texts of the batch have no tokens, shapes {_shapes(call)}; leave empty texts "
            f"out, or have the tokenizer add its special tokens."
        )
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(most, int) or not _TOO_LONG.search(text):
        return None
    if width + _first_position(model, most) <= most:
        return None
    return BatchError(
        f"The texts of the batch are {width} tokens wide, which is more than the model's "
        f"{most} positions hold ({text}); truncate them, e.g. "
        f"tokenizer(..., truncation=True, max_length=...)."
    )


def _first_position(model: Module, most: int) -> int:
    """Find the position of a text's first token: of RoBERTa's kind, the one after padding."""
    tables = [it for it in model.modules() if isinstance(it, Embedding)]
    paddings = [it.padding_idx for it in tables if it.num_embeddings == most]
    return max((1 + it for it in paddings if it is not None), default=0)
