"""Padding of sequences: on which side it is, and whether anything says where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from trak.errors import BatchError


def padded_on_the_right(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Turn rows that are padded on the left, so that they begin with their first token.

    Positions that a decoder counts by itself are then those of the text, and no token is
    predicted from padding. What it reads at a token is not changed by that.

    Args:
        batch: Tensors by name, with an ``attention_mask`` of shape ``(b, t)``.

    Returns:
        The batch, all its tensors with an entry for each token turned alike.

    Example:
        >>> ids = torch.tensor([[0, 5, 6]])
        >>> padded_on_the_right({"input_ids": ids, "attention_mask": ids.sign()})
        {'input_ids': tensor([[5, 6, 0]]), 'attention_mask': tensor([[1, 1, 0]])}
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.numel():
        return batch
    t = mask.shape[1]
    first = (mask != 0).int().argmax(1, keepdim=True)
    places = (torch.arange(t, device=mask.device) + first) % t

    def turned(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
            return value
        index = places.reshape(*places.shape, *(1 for _ in value.shape[2:]))
        return value.take_along_dim(index, 1)

    return {key: turned(value) for key, value in batch.items()}


def check_padding(
    model: Module, batch: Mapping[str, Any], *, sides: str = "both"
) -> None:
    """Refuse tokens that are padded, without a mask that says so.

    Args:
        model: The model, whose ``config`` may know the token of padding.
        batch: Tensors by name.
        sides: ``"both"``, or ``"left"`` where padding on the right does no harm.

    Raises:
        BatchError: If a row begins or ends with two such tokens; one may be that which
            ends a text.
    """
    ids = batch.get("input_ids")
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if batch.get("attention_mask") is not None or not isinstance(pad, int):
        return
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(ids):
        return  # under vmap no value can be looked at
    is_padded = (ids[:, :2] == pad).all(1)
    if sides == "both":
        is_padded |= (ids[:, -2:] == pad).all(1)
    if is_padded.any():
        row = int(is_padded.nonzero()[0])
        raise BatchError(
            f"Sequence {row} of the batch begins or ends with the model's padding, token "
            f"{pad}, and there is no attention_mask, so padding would be read as text; have "
            f"the tokenizer return the mask, and pass it."
        )
