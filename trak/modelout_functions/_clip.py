"""CLIP: image-text pairs against a simulated batch of other pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._params import fingerprint
from trak._types import Batch, Weights
from trak.errors import (
    BatchError,
    NonFiniteError,
    OptionError,
    OrderError,
    TaskError,
    TrakWarning,
)
from trak.modelout_functions._abstract import AbstractModelOutput
from trak.modelout_functions._calls import as_batch, evaluating
from trak.modelout_functions._clip_calls import (
    Embedded,
    embed_pairs,
    split_pairs,
    to_device,
)
from trak.modelout_functions._fingerprint import hash_tensor
from trak.modelout_functions._margins import check_positive


@dataclass(frozen=True, slots=True)
class _Bank:
    """Embeddings of pairs, and the simulated batch drawn from them."""

    image: Float[Tensor, "size e"]
    text: Float[Tensor, "size e"]
    drawn_image: Float[Tensor, "k e"]
    drawn_text: Float[Tensor, "k e"]
    weights: str | None
    """Fingerprint of the weights that made them; None where that is not known."""


class CLIPModelOutput(AbstractModelOutput):
    r"""The margin of an image-text pair in contrastive learning.

    For the embeddings :math:`\phi` of the image and :math:`\psi` of the text, and a
    simulated batch :math:`B` of embedded pairs,

    .. math:: f = -\log \sum_{(\cdot, \psi') \in B} e^{-\phi \cdot (\psi - \psi')}
                  -\log \sum_{(\phi', \cdot) \in B} e^{-\psi \cdot (\phi - \phi')}

    (Park et al., 2023, Section 5.1), and :math:`Q` is one minus the mean of the two
    probabilities of picking the pair among itself and :math:`B`. Both depend on the
    pair and on :math:`B` only, never on how the examples are batched.

    Models of ``open_clip`` and ``transformers`` are taken as they are, and any other
    that is called with the keywords ``image`` and ``text``, or ``pixel_values`` and
    ``input_ids``, and returns image embeddings, text embeddings and the factor on their
    products, in this order, or something with ``image_embeds`` (or ``image_features``),
    ``text_embeds`` (or ``text_features``) and ``logit_scale``. Batches are tuples
    ``(images, texts)``, or mappings with the keys ``image`` and ``text``, or
    ``pixel_values``, ``input_ids`` and what else the model takes.

    Every checkpoint has its own embeddings: pass ``pairs``, or call
    :meth:`get_embeddings` after loading each.

    Args:
        temperature: Multiplies the products of embeddings in ``Q``. None takes
            ``logit_scale`` from each checkpoint.
        simulated_batch_size: Number of pairs in :math:`B`; fewer if
            :meth:`get_embeddings` saw fewer.
        seed: Decides which pairs they are.
        pairs: Batches of pairs that are embedded whenever a checkpoint is loaded, always
            the same in the same order; a few times ``simulated_batch_size`` are enough.
            None leaves it to :meth:`get_embeddings`.

    Attributes:
        temperature: The constructor's.
        simulated_batch_size: The constructor's.
        seed: The constructor's.
        pairs: The constructor's.

    Raises:
        OptionError: If an argument is out of range, or ``pairs`` can be gone through
            only once.
    """

    def __init__(
        self,
        temperature: float | None = None,
        simulated_batch_size: int = 300,
        seed: int = 0,
        *,
        pairs: Iterable[Any] | None = None,
    ) -> None:
        check_positive("temperature", temperature)
        _check_count("simulated_batch_size", simulated_batch_size)
        if isinstance(pairs, Iterator):
            raise OptionError(
                f"pairs is a {type(pairs).__name__}, which can be gone through only once, "
                f"and every checkpoint embeds them; pass a list of batches, or a loader."
            )
        self.temperature = temperature
        self.simulated_batch_size = simulated_batch_size
        self.seed = seed
        self.pairs = pairs
        self._bank: _Bank | None = None
        self._checkpoint: str | None = None

    @property
    def image_embeddings(self) -> Float[Tensor, "size e"] | None:
        """Embeddings of the images in the bank, or None before there is one."""
        return None if self._bank is None else self._bank.image

    @property
    def text_embeddings(self) -> Float[Tensor, "size e"] | None:
        """Embeddings of the texts in the bank, or None before there is one."""
        return None if self._bank is None else self._bank.text

    @property
    def num_computed_embeddings(self) -> int:
        """Number of pairs in the bank."""
        return 0 if self._bank is None else len(self._bank.image)

    def get_embeddings(
        self,
        model: Module,
        loader: Iterable[Any],
        batch_size: int | None = None,
        embedding_dim: int | None = None,
        size: int = 50_000,
        preprocess_fn_img: Callable[[Any], Any] | None = None,
        preprocess_fn_txt: Callable[[Any], Any] | None = None,
    ) -> None:
        """Embed pairs to contrast with, and draw the simulated batch from them.

        Args:
            model: Embeds them, in evaluation mode and without gradients; its mode stays.
            loader: Gives batches of pairs, of any size.
            batch_size: Not needed; the batches are as large as the loader makes them.
            embedding_dim: Checked against the model where given.
            size: Embed no more pairs than this; a shorter loader gives fewer.
            preprocess_fn_img: Applied to the images first.
            preprocess_fn_txt: Applied to the texts first, for example a tokenizer.

        Raises:
            OptionError: If ``size`` is not positive or ``embedding_dim`` is wrong.
            BatchError: If the loader gives nothing, or something else than pairs.
            TaskError: If the model takes no pairs, or gives no embeddings of them.
            NonFiniteError: If an embedding is NaN or infinite.
        """
        _check_count("size", size)
        images, texts, count = [], [], 0
        device = next((parameter.device for parameter in model.parameters()), None)
        with torch.no_grad(), evaluating(model):
            for batch in loader:
                image, text = split_pairs(batch)
                image = preprocess_fn_img(image) if preprocess_fn_img else image
                text = preprocess_fn_txt(text) if preprocess_fn_txt else text
                image, text = to_device(image, device), to_device(text, device)
                found = embed_pairs(model, None, None, image, text)
                images.append(found.image[: size - count].detach().clone())
                texts.append(found.text[: size - count].detach().clone())
                count += len(images[-1])
                if count >= size:
                    break
        if count == 0:
            raise BatchError(
                "The loader gave no image-text pair to embed; pass one that does."
            )
        self.set_embeddings(torch.cat(images), torch.cat(texts), embedding_dim)
        self._mark(fingerprint(model.state_dict()))

    def set_embeddings(
        self,
        image_embeddings: Float[Tensor, "size e"],
        text_embeddings: Float[Tensor, "size e"],
        embedding_dim: int | None = None,
    ) -> None:
        """Use embeddings computed elsewhere, and draw the simulated batch from them.

        Args:
            image_embeddings: One image a row. Shape ``(size, e)``.
            text_embeddings: The text of each. Shape ``(size, e)``.
            embedding_dim: Checked against ``e`` where given.

        Raises:
            OptionError: If ``embedding_dim`` is not ``e``, or the shapes are not equal.
            BatchError: If there is no pair.
            NonFiniteError: If an embedding is NaN or infinite.
        """
        shapes = [tuple(side.shape) for side in (image_embeddings, text_embeddings)]
        if shapes[0] != shapes[1] or len(shapes[0]) != 2:
            raise OptionError(
                f"image_embeddings have shape {shapes[0]} and text_embeddings "
                f"{shapes[1]}; pass one row for each image and one for its text, (size, e)."
            )
        size, dim = shapes[0]
        if size == 0:
            raise BatchError("There are no embeddings of pairs; pass at least one.")
        _check_finite(image_embeddings, text_embeddings)
        if embedding_dim not in {None, dim}:
            raise OptionError(
                f"embedding_dim is {embedding_dim}, but the model's embeddings have "
                f"{dim} entries; pass {dim}, or leave it out."
            )
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(size, generator=generator)[: self.simulated_batch_size]
        rows = rows.to(image_embeddings.device)
        self._bank = _Bank(
            image_embeddings,
            text_embeddings,
            image_embeddings[rows],
            text_embeddings[rows.to(text_embeddings.device)],
            self._checkpoint,
        )

    def start_checkpoint(self, model: Module) -> None:
        """Embed ``pairs`` with a checkpoint that was loaded, if the task has them.

        Args:
            model: The model that holds it.
        """
        self._checkpoint = fingerprint(model.state_dict())
        if self.pairs is not None:
            self.get_embeddings(model, self.pairs)
        elif self._bank is not None and self._bank.weights is None:
            self._mark(self._checkpoint)

    def _mark(self, weights: str) -> None:
        """Note whose embeddings the bank has."""
        if self._bank is not None:
            self._bank = replace(self._bank, weights=weights)

    def get_output(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        *example: Any,
    ) -> Float[Tensor, ""]:
        """Compute the margin of one pair.

        Args:
            model: The model.
            weights: Its parameters by name, or None for those it holds.
            buffers: Its buffers by name.
            *example: Image and text without batch axis, or one mapping with both.

        Returns:
            The margin. Shape ``()``.
        """
        return self.get_outputs(model, weights, buffers, as_batch(example))[0]

    def get_outputs(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, " b"]:
        """Compute the margins of a batch of pairs.

        Returns:
            The margins, differentiable. Shape ``(b,)``.
        """
        bank = self._require_bank()
        found = embed_pairs(model, weights, buffers, *split_pairs(batch))
        by_image, by_text = _contrast(found, bank, 1.0)
        return by_image + by_text

    def get_out_to_loss_grad(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, "b 1"]:
        """Compute one minus the mean probability of picking each pair.

        Returns:
            The weights, detached. Shape ``(b, 1)``.

        Raises:
            TaskError: If there is no temperature, neither given nor in the model.
        """
        bank = self._require_bank()
        with torch.no_grad():
            found = embed_pairs(model, weights, buffers, *split_pairs(batch))
            scale = found.scale if self.temperature is None else self.temperature
            if scale is None:
                raise TaskError(
                    "The model returns no logit_scale; pass a temperature to "
                    "CLIPModelOutput."
                )
            by_image, by_text = _contrast(found, bank, scale)
            missing = torch.sigmoid(-by_image) + torch.sigmoid(-by_text)
            return (missing / 2).unsqueeze(1)

    def describe(self) -> str:
        """Identify the task by its options and the simulated batch.

        Returns:
            The same text in every process that embedded the same pairs.
        """
        # Those of pairs are of one checkpoint after another; describe_data tells which.
        drawn = "of pairs" if self.pairs is not None else self.describe_data() or "None"
        options = (
            f"temperature={self.temperature!r}, "
            f"simulated_batch_size={self.simulated_batch_size!r}, seed={self.seed!r}"
        )
        return f"{type(self).__qualname__}({options}, embeddings={drawn})"

    def describe_data(self) -> str:
        """Identify the simulated batch.

        Returns:
            A hash of its embeddings; empty before there are any.
        """
        if self._bank is None:
            return ""
        if self._checkpoint not in {None, self._bank.weights}:
            warnings.warn(
                "The embeddings that CLIPModelOutput contrasts with are of other weights "
                "than the checkpoint's. Call traker.task.get_embeddings(model, loader) "
                "after loading each checkpoint, or pass pairs to CLIPModelOutput.",
                TrakWarning,
                stacklevel=2,
            )
        drawn = (self._bank.drawn_image, self._bank.drawn_text)
        return " ".join(hash_tensor(tensor) for tensor in drawn)

    def _require_bank(self) -> _Bank:
        if self._bank is None:
            raise OrderError(
                "CLIPModelOutput has no pairs to contrast with; call "
                "traker.task.get_embeddings(model, loader) before featurizing, or pass "
                "pairs."
            )
        return self._bank


def _contrast(
    found: Embedded, bank: _Bank, scale: float | Tensor
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Log-odds of each text given its image, and of each image given its text."""
    phi, psi = found.image, found.text
    dims = phi.shape[1], bank.drawn_image.shape[1]
    if dims[0] != dims[1]:
        raise TaskError(
            f"The model's embeddings have {dims[0]} entries, and those to contrast with "
            f"{dims[1]}; make them with the same model."
        )
    own = (phi * psi).sum(1) * scale
    other_texts = phi @ bank.drawn_text.to(phi).T * scale
    other_images = psi @ bank.drawn_image.to(psi).T * scale
    return own - other_texts.logsumexp(1), own - other_images.logsumexp(1)


def _check_finite(image: Tensor, text: Tensor) -> None:
    for name, rows in (("image", image), ("text", text)):
        bad = (~torch.isfinite(rows).all(dim=1)).nonzero()
        if len(bad):
            index = int(bad[0])
            raise NonFiniteError(
                f"The {name} embedding of pair {index} is not finite; look at that pair, "
                f"or at the model's weights.",
                index=index,
            )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise OptionError(f"{name} must be at least 1, got {value!r}.")
