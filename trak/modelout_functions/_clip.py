"""CLIP: image-text pairs against a simulated batch of other pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._types import Batch, Weights
from trak.errors import BatchError, OptionError, OrderError, TaskError
from trak.modelout_functions._abstract import AbstractModelOutput
from trak.modelout_functions._calls import as_batch, call_model, widen
from trak.modelout_functions._fingerprint import hash_tensor
from trak.modelout_functions._margins import check_positive

_OUTPUT_NAMES = (
    ("image_embeds", "image_features"),
    ("text_embeds", "text_features"),
    ("logit_scale",),
)


@dataclass(frozen=True, slots=True)
class _Bank:
    """Embeddings of pairs, and the simulated batch drawn from them."""

    image: Float[Tensor, "size e"]
    text: Float[Tensor, "size e"]
    drawn_image: Float[Tensor, "k e"]
    drawn_text: Float[Tensor, "k e"]


class CLIPModelOutput(AbstractModelOutput):
    r"""The margin of an image-text pair in contrastive learning.

    For the embeddings :math:`\phi` of the image and :math:`\psi` of the text, and a
    simulated batch :math:`B` of embedded pairs,

    .. math:: f = -\log \sum_{(\cdot, \psi') \in B} e^{-\phi \cdot (\psi - \psi')}
                  -\log \sum_{(\phi', \cdot) \in B} e^{-\psi \cdot (\phi - \phi')}

    (Park et al., 2023, Section 5.1), and :math:`Q` is one minus the mean of the two
    probabilities of picking the pair among itself and :math:`B`. Both depend on the
    pair and on :math:`B` only, never on how the examples are batched.

    The model is called with the keywords ``image`` and ``text``. It returns image
    embeddings, text embeddings and the factor on their products, in this order, or
    something with ``image_embeds`` (or ``image_features``), ``text_embeds`` (or
    ``text_features``) and ``logit_scale``. Batches are tuples ``(image, text)`` or
    mappings with these two keys. :meth:`get_embeddings` comes before featurizing.

    Args:
        temperature: Multiplies the products of embeddings in ``Q``. None takes
            ``logit_scale`` from each checkpoint.
        simulated_batch_size: Number of pairs in :math:`B`; fewer if
            :meth:`get_embeddings` saw fewer.
        seed: Decides which pairs they are.

    Attributes:
        temperature: The constructor's.
        simulated_batch_size: The constructor's.
        seed: The constructor's.

    Raises:
        OptionError: If an argument is out of range.
    """

    def __init__(
        self,
        temperature: float | None = None,
        simulated_batch_size: int = 300,
        seed: int = 0,
    ) -> None:
        check_positive("temperature", temperature)
        _check_count("simulated_batch_size", simulated_batch_size)
        self.temperature = temperature
        self.simulated_batch_size = simulated_batch_size
        self.seed = seed
        self._bank: _Bank | None = None

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
            model: Called as ``model(images, texts)``, without gradients.
            loader: Gives ``(images, texts)``, or mappings with the keys ``image`` and
                ``text``, in batches of any size.
            batch_size: Not needed; the batches are as large as the loader makes them.
            embedding_dim: Checked against the model where given.
            size: Embed no more pairs than this; a shorter loader gives fewer.
            preprocess_fn_img: Applied to the images first.
            preprocess_fn_txt: Applied to the texts first, for example a tokenizer.

        Raises:
            OptionError: If ``size`` is not positive or ``embedding_dim`` is wrong.
            BatchError: If the loader gives nothing, or something else than pairs.
        """
        _check_count("size", size)
        images, texts, count = [], [], 0
        device = next((parameter.device for parameter in model.parameters()), None)
        with torch.no_grad():
            for batch in loader:
                image, text = _split_pairs(batch)
                image = preprocess_fn_img(image) if preprocess_fn_img else image
                text = preprocess_fn_txt(text) if preprocess_fn_txt else text
                output = model(_to(image, device), _to(text, device))
                phi, psi, _ = _read_output(output)
                images.append(phi[: size - count].detach().clone())
                texts.append(psi[: size - count].detach().clone())
                count += len(images[-1])
                if count >= size:
                    break
        if count == 0:
            raise BatchError(
                "The loader gave no image-text pair to embed; pass one that does."
            )
        self.set_embeddings(torch.cat(images), torch.cat(texts), embedding_dim)

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
            OptionError: If ``embedding_dim`` is not ``e``.
        """
        size, dim = image_embeddings.shape
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
        )

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
        phi, psi, _ = _embed(model, weights, buffers, batch)
        by_image, by_text = _contrast(phi, psi, bank, 1.0)
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
            phi, psi, logit_scale = _embed(model, weights, buffers, batch)
            scale = logit_scale if self.temperature is None else self.temperature
            if scale is None:
                raise TaskError(
                    "The model returns no logit_scale; pass a temperature to "
                    "CLIPModelOutput."
                )
            by_image, by_text = _contrast(phi, psi, bank, scale)
            missing = torch.sigmoid(-by_image) + torch.sigmoid(-by_text)
            return (missing / 2).unsqueeze(1)

    def describe(self) -> str:
        """Identify the task by its options and the simulated batch.

        Returns:
            The same text in every process that embedded the same pairs.
        """
        drawn = self.describe_data() or "None"
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
        drawn = (self._bank.drawn_image, self._bank.drawn_text)
        return " ".join(hash_tensor(tensor) for tensor in drawn)

    def _require_bank(self) -> _Bank:
        if self._bank is None:
            raise OrderError(
                "CLIPModelOutput has no pairs to contrast with; call "
                "traker.task.get_embeddings(model, loader) before featurizing."
            )
        return self._bank


def _contrast(
    phi: Float[Tensor, "b e"],
    psi: Float[Tensor, "b e"],
    bank: _Bank,
    scale: float | Tensor,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Log-odds of each text given its image, and of each image given its text."""
    own = (phi * psi).sum(1) * scale
    other_texts = phi @ bank.drawn_text.to(phi).T * scale
    other_images = psi @ bank.drawn_image.to(psi).T * scale
    return own - other_texts.logsumexp(1), own - other_images.logsumexp(1)


def _embed(
    model: Module, weights: Weights | None, buffers: Weights | None, batch: Batch
) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b e"], Tensor | float | None]:
    image, text = _split_pairs(batch)
    inputs = {"image": image, "text": text}
    phi, psi, scale = _read_output(call_model(model, weights, buffers, (), inputs))
    return widen(phi), widen(psi), scale


def _split_pairs(batch: Batch) -> tuple[Any, Any]:
    if isinstance(batch, Mapping) and {"image", "text"} <= set(batch):
        return batch["image"], batch["text"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    kind = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch)
    raise BatchError(
        f"A CLIP batch is (image, text), or a mapping with the keys 'image' and 'text', "
        f"got {kind}; pass pairs."
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
            f"{type(output).__name__}; return (image_embeddings, text_embeddings, "
            f"logit_scale)."
        )
    return phi, psi, scale


def _named(output: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        entry = output.get(name) if isinstance(output, Mapping) else None
        entry = getattr(output, name, None) if entry is None else entry
        if entry is not None:
            return entry
    return None


def _to(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device else value


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise OptionError(f"{name} must be at least 1, got {value!r}.")
