"""From a batch of image-text pairs to their embeddings, whatever library made the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._types import Batch, Weights
from trak.errors import BatchError, TaskError
from trak.modelout_functions._calls import call_model, map_tensors, widen

_OUTPUT_NAMES = (
    ("image_embeds", "image_features"),
    ("text_embeds", "text_features"),
    ("logit_scale",),
)
_SCALE = "logit_scale"
# Collators of transformers ask for the loss of the batch this way; nothing needs it here.
_NOT_PASSED = frozenset({"return_loss"})


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a model makes of a batch of pairs."""

    image: Float[Tensor, "b e"]
    """Embeddings of the images."""

    text: Float[Tensor, "b e"]
    """Embeddings of the texts."""

    scale: Tensor | float | None
    """The factor on their products; None where the model does not say."""


def split_pairs(batch: Batch) -> tuple[Any, Any]:
    """Take a batch of pairs apart.

    Args:
        batch: A tuple or list ``(images, texts)``; or a mapping with the keys ``image``
            and ``text``, or with ``pixel_values``, ``input_ids`` and what else the
            model takes.

    Returns:
        The images, and the texts: the remaining mapping if there is ``pixel_values``.

    Raises:
        BatchError: If it is none of these, or there are not as many texts as images.

    Example:
        >>> split_pairs({"pixel_values": 1, "input_ids": 2, "return_loss": True})
        (1, {'input_ids': 2})
    """
    if isinstance(batch, Mapping) and {"image", "text"} <= set(batch):
        image, text = batch["image"], batch["text"]
    elif isinstance(batch, Mapping) and {"pixel_values", "input_ids"} <= set(batch):
        kept = {k: v for k, v in batch.items() if k not in _NOT_PASSED}
        image = kept.pop("pixel_values")
        text = kept
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        image, text = batch
    else:
        kind = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch)
        raise BatchError(
            f"A CLIP batch is (image, text), or a mapping with the keys 'image' and "
            f"'text' or 'pixel_values' and 'input_ids', got {kind}; pass pairs."
        )
    images, texts = _count(image), _count(text)
    if None not in {images, texts} and images != texts:
        raise BatchError(
            f"The batch has {images} images and {texts} texts; pass one text for each "
            f"image."
        )
    return image, text


def _count(side: Any) -> int | None:
    """Count the examples of one side of a batch; None if that cannot be told."""
    if isinstance(side, Mapping):
        side = side.get("input_ids")
    if isinstance(side, Tensor):
        return len(side) if side.ndim else None
    return len(side) if isinstance(side, tuple | list) else None


def embed_pairs(
    model: Module,
    weights: Weights | None,
    buffers: Weights | None,
    image: Any,
    text: Any,
) -> Embedded:
    """Embed a batch of pairs.

    Args:
        model: The model.
        weights: Its parameters by name, or None for those it holds.
        buffers: Its buffers by name.
        image: What it takes for images.
        text: What it takes for texts: a tensor, or a mapping of several.

    Returns:
        The embeddings in float32 or wider, and the factor on their products.

    Raises:
        TaskError: If the model takes no images and texts, or gives no embeddings.
    """
    kwargs = _keywords(model, image, text)
    output = call_model(model, weights, buffers, (), kwargs)
    phi, psi, scale = _read_output(output)
    if scale is None and _named(output, ("logits_per_image",)) is not None:
        scale = _kept_scale(model, weights)
    return Embedded(widen(phi), widen(psi), scale)


def _keywords(model: Module, image: Any, text: Any) -> dict[str, Any]:
    """Name the inputs as the model does."""
    names = inspect.signature(model.forward).parameters
    is_open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
    if {"image", "text"} <= set(names):
        return {"image": image, "text": text}
    # A wrapper that passes on whatever it gets does not say; the batch then does.
    is_tokenized = isinstance(text, Mapping) and "input_ids" in text
    if "pixel_values" in names or (is_open and is_tokenized):
        texts = dict(text) if isinstance(text, Mapping) else {"input_ids": text}
        return {"pixel_values": image, **texts}
    if is_open:
        return {"image": image, "text": text}
    raise TaskError(
        f"{type(model).__name__}.forward takes {[*names]}; the task 'clip' needs a model "
        f"that takes 'image' and 'text', or 'pixel_values' and 'input_ids'."
    )


def _read_output(output: Any) -> tuple[Tensor, Tensor, Tensor | float | None]:
    entries: list[Any] = [_named(output, names) for names in _OUTPUT_NAMES]
    if isinstance(output, tuple | list) and entries[0] is None:
        entries = [*output, None, None, None][:3]
    phi, psi, scale = entries
    good = isinstance(phi, Tensor) and isinstance(psi, Tensor)
    if not good or phi.ndim != 2 or phi.shape != psi.shape:
        raise TaskError(
            f"No image and text embeddings of one shape (b, e) in the model's output, a "
            f"{type(output).__name__}{_shapes(phi, psi)}; return (image_embeddings, "
            f"text_embeddings, logit_scale)."
        )
    return phi, psi, scale


def _shapes(phi: Any, psi: Any) -> str:
    if not (isinstance(phi, Tensor) and isinstance(psi, Tensor)):
        return ""
    return f" with shapes {tuple(phi.shape)} and {tuple(psi.shape)}"


def _named(output: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        entry = output.get(name) if isinstance(output, Mapping) else None
        entry = getattr(output, name, None) if entry is None else entry
        if entry is not None:
            return entry
    return None


def _kept_scale(model: Module, weights: Weights | None) -> Tensor | None:
    """Find the factor that models of transformers use, and do not return."""
    for named in (weights or {}, dict(model.named_parameters())):
        for name, value in named.items():
            if name.rpartition(".")[2] == _SCALE:  # they keep its logarithm
                return value.detach().exp()
    return None


def to_device(value: Any, device: torch.device | None) -> Any:
    """Move the tensors of a nesting.

    Returns:
        The same nesting on the device; unchanged where that is None.
    """
    return map_tensors(value, lambda x: x.to(device)) if device else value
