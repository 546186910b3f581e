"""From a batch to a model's output: splitting, functional calls, reading logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._types import Batch, Weights
from trak.errors import BatchError, TaskError
from trak.modelout_functions._inputs import model_inputs

LABEL_KEYS = ("labels", "label")


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A batch taken apart: what the model gets, and what it is compared with."""

    args: tuple[Any, ...]
    """Positional arguments of the model."""

    kwargs: dict[str, Any]
    """Keyword arguments of the model."""

    labels: Tensor
    """What the output is compared with, one row an example."""


def split_labels(batch: Batch) -> ModelCall:
    """Take the labels out of a batch; the model gets everything else.

    Args:
        batch: A tuple or list that ends with the labels, or a mapping with the key
            ``labels`` or ``label``.

    Returns:
        The model's arguments and the labels.

    Raises:
        BatchError: If there are no labels, two of them, or nothing else.

    Example:
        >>> split_labels({"x": 1, "label": torch.tensor([2])})
        ModelCall(args=(), kwargs={'x': 1}, labels=tensor([2]))
    """
    if isinstance(batch, Mapping):
        keys = [key for key in LABEL_KEYS if key in batch]
        if len(keys) != 1:
            raise BatchError(
                f"A mapping batch needs exactly one of the keys 'labels' and 'label', "
                f"got {sorted(map(str, batch))}; name the labels one of the two."
            )
        inputs = {key: value for key, value in batch.items() if key != keys[0]}
        return ModelCall((), inputs, _as_labels(batch[keys[0]]))
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise BatchError(
            f"A batch with labels is a tuple or list of inputs and labels, or a mapping, "
            f"got {_kind(batch)}; put the labels last."
        )
    return ModelCall(tuple(batch[:-1]), {}, _as_labels(batch[-1]))


def _as_labels(labels: Any) -> Tensor:
    if isinstance(labels, Tensor):
        if labels.ndim == 0:
            raise BatchError(
                "The labels have no axis of examples. A batch of one example needs one: "
                "a slice such as dataset[3:4], or tensor.unsqueeze(0)."
            )
        return labels
    raise BatchError(
        f"The labels are a {type(labels).__name__}, not a tensor; convert them, e.g. "
        f"with torch.as_tensor."
    )


def _kind(batch: Any) -> str:
    size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    return f"a {type(batch).__name__}{size}"


def call_model(
    model: Module,
    weights: Weights | None,
    buffers: Weights | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a model with the given tensors, or as it stands where ``weights`` is None.

    Returns:
        Whatever the model returns.
    """
    if weights is None:
        return model(*args, **kwargs)
    tensors = (dict(weights), dict(buffers or {}))
    return torch.func.functional_call(model, tensors, args, kwargs)


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Switch dropout and the like off while the context lasts."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call_for_logits(
    model: Module, weights: Weights | None, buffers: Weights | None, call: ModelCall
) -> Float[Tensor, "*shape"]:
    """Call a model and read the logits off its output, in float32 or wider.

    Returns:
        What :func:`call_for_raw_logits` does. Half precision is widened: a margin of
        thousands has no digits left in it.

    Raises:
        TaskError: If there are no logits.
    """
    return widen(call_for_raw_logits(model, weights, buffers, call))


def call_for_raw_logits(
    model: Module, weights: Weights | None, buffers: Weights | None, call: ModelCall
) -> Float[Tensor, "*shape"]:
    """Call a model and read the logits off its output, in whatever type they have.

    Returns:
        The output itself if it is a tensor, else its ``logits`` attribute or entry, or
        the first entry of a tuple.

    Raises:
        TaskError: If none of these is a floating-point tensor.
        BatchError: If the model does not take an entry of the batch.
    """
    kwargs = model_inputs(model, call.kwargs) if call.kwargs else {}
    output = call_model(model, weights, buffers, call.args, kwargs)
    if isinstance(output, Tensor):
        logits: Any = output
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list) and not hasattr(output, "logits"):
        logits = output[0] if output else None
    else:
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TaskError(
            f"No logits in the model's output, a {type(output).__name__}; return a "
            f"floating-point tensor, a tuple that starts with one, or something with "
            f"`logits`."
        )
    return logits


def widen(tensor: Tensor) -> Tensor:
    """Convert half precision and integers to float32; leave the rest alone.

    Returns:
        The same numbers in float32 or float64.

    Example:
        >>> widen(torch.ones(2, dtype=torch.float16)).dtype
        torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_batch(example: tuple[Any, ...]) -> Batch:
    """Give one example, as ``get_output`` receives it, a batch axis of length one.

    Returns:
        A mapping if the example is a single mapping, else a tuple.
    """
    batch = map_tensors(example, lambda tensor: tensor.unsqueeze(0))
    return batch[0] if len(batch) == 1 and isinstance(batch[0], Mapping) else batch


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in tuples, lists and mappings.

    Returns:
        The same nesting, its containers of the same classes.

    Example:
        >>> map_tensors({"a": (torch.zeros(2), "b")}, len)
        {'a': (2, 'b')}
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_make"):  # a named tuple
        return tree._make(map_tensors(entry, function) for entry in tree)
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(entry, function) for entry in tree)
    if isinstance(tree, Mapping):
        # A copy that is written to keeps the class, and with it attribute access.
        mapped: Any = copy.copy(tree) if hasattr(tree, "__setitem__") else dict(tree)
        for key, entry in tree.items():
            mapped[key] = map_tensors(entry, function)
        return mapped
    return tree
