"""A small CLIP of transformers, its training, and what it says about pairs."""

from __future__ import annotations

import math

import numpy as np
import torch
from _emoji_pairs import END, LENGTH, Batch, Pairs
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 128, 3e-3, 0.1, 0.15
EPOCHS = 6
SHIFT = 2  # pixels that a batch of drawings is moved by, at most


def make_model(vocabulary: int, seed: int = 0) -> CLIPModel:
    """Build a CLIP of about half a million parameters, most of them words."""
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": vocabulary}
    special = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 1}
    config = CLIPConfig(
        projection_dim=64,
        text_config={
            **layers,
            **text,
            **special,
            "max_position_embeddings": LENGTH,
        },
        vision_config={**layers, **vision, "image_size": 32, "patch_size": 8},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config)


def train(
    pairs: Pairs,
    indices: np.ndarray,
    vocabulary: int,
    seed: int,
    epochs: int = EPOCHS,
    *,
    verbose: bool = False,
) -> CLIPModel:
    """Train a model on some pairs, by the contrastive loss of its batches.

    Args:
        pairs: The pairs.
        indices: Which of them to train on.
        vocabulary: Number of different tokens.
        seed: Of the initial weights, the order of the batches and the shifts.
        epochs: Passes over them.
        verbose: Whether to print the loss of each epoch.

    Returns:
        The model, in evaluation mode.
    """
    model = make_model(vocabulary, seed).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    a_pass = len(indices) // BATCH_SIZE
    steps, step = epochs * a_pass, 0
    rows = torch.from_numpy(indices)
    for epoch in range(epochs):
        order, total = rows[torch.randperm(len(rows), generator=generator)], 0.0
        for chosen in order[: a_pass * BATCH_SIZE].split(BATCH_SIZE):
            step += 1
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * _schedule(step / steps)
            batch = _shifted(pairs.take(chosen), generator)
            loss = model(**batch, return_loss=True).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        if verbose:
            print(f"epoch {epoch + 1}: loss {total / a_pass:.3f}", flush=True)
    return model.eval()


def _schedule(progress: float) -> float:
    """Rise from 0 to 1, then fall along half a cosine."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def _shifted(batch: Batch, generator: torch.Generator) -> Batch:
    move = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
    longest = int(batch["attention_mask"].sum(1).max())
    return {
        "pixel_values": batch["pixel_values"].roll(move, (2, 3)),
        "input_ids": batch["input_ids"][:, :longest],
        "attention_mask": batch["attention_mask"][:, :longest],
    }


@torch.no_grad()
def embed(model: CLIPModel, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Embed images and texts. (k, e) each, of unit length"""
    outputs = [model(**batch) for batch in pairs.batches(256)]
    images = torch.cat([output.image_embeds for output in outputs])
    return images, torch.cat([output.text_embeds for output in outputs])


def similarity(model: CLIPModel, targets: Pairs) -> np.ndarray:
    """Compute how much closer each target's image and text are than to others'. (m,)"""
    images, texts = embed(model, targets)
    cosines = (images @ texts.T).double()
    others = 1 - torch.eye(len(cosines), dtype=torch.double)
    means = [(cosines * others).sum(axis) / others.sum(axis) for axis in (0, 1)]
    return (cosines.diagonal() - (means[0] + means[1]) / 2).numpy()


def ranks(model: CLIPModel, targets: Pairs) -> np.ndarray:
    """Rank each target's own text among all targets' texts for its image, from 1. (m,)"""
    images, texts = embed(model, targets)
    cosines = images @ texts.T
    return 1 + (cosines > cosines.diagonal()[:, None]).sum(1).numpy()
