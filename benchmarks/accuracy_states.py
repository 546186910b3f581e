"""Sentences as what MiniLM makes of them, without any training: vectors for small heads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from accuracy_data import Split
from accuracy_models import minilm, trimmed
from torch import Tensor, nn

STORED = Path(__file__).parent / "results" / "states"
"""Vectors are computed once."""


def vectors(split: Split) -> Split:
    """Give each text one vector, and each pair ``u, v, |u - v|, u * v``.

    Args:
        split: Ids, segments, masks and labels of texts or pairs.

    Returns:
        Vectors and labels. Of ``u`` and ``v`` each is the mean of MiniLM's last states over
        the tokens of its text, of length 1.
    """
    encoder = None
    parts = []
    for *columns, labels in (split.train, split.targets):
        digest = hashlib.blake2b(digest_size=8)
        for column in columns:
            digest.update(column.numpy().tobytes())
        path = STORED / f"{digest.hexdigest()}.npy"
        if not path.exists():
            encoder = encoder or minilm().eval().bert
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.with_suffix(".part.npy"), _embed(encoder, columns).numpy())
            path.with_suffix(".part.npy").replace(path)
        parts.append((torch.from_numpy(np.load(path)), labels))
    return Split(*parts, rows=split.rows)


def _embed(encoder: nn.Module, columns: list[Tensor]) -> Tensor:
    ids, kinds, mask = columns
    if not kinds.any():
        return _means(encoder, ids, mask)
    u = _means(encoder, *_left((kinds == 0) & (mask > 0), ids))
    v = _means(encoder, *_left((kinds == 1) & (mask > 0), ids, first=ids[:, :1]))
    return torch.cat([u, v, (u - v).abs(), u * v], dim=1)


def _left(
    chosen: Tensor, ids: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Move the chosen tokens of each row to its start, behind ``first``."""
    order = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)
    mask = chosen.gather(1, order).long()
    found = ids.gather(1, order) * mask
    if first is None:
        return found, mask
    return torch.cat([first, found], 1), torch.cat([torch.ones_like(first), mask], 1)


@torch.no_grad()
def _means(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    found = torch.empty(len(ids), encoder.config.hidden_size)
    for rows in mask.sum(1).argsort().split(32):
        zeros = torch.zeros_like(ids[rows])
        part, kinds, seen = trimmed((ids[rows], zeros, mask[rows]))
        states = encoder(part, token_type_ids=kinds, attention_mask=seen)
        weights = seen[..., None].float()
        found[rows] = (states.last_hidden_state * weights).sum(1) / weights.sum(1)
    return nn.functional.normalize(found)
