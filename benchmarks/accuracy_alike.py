"""Scores that know no model: how much alike inputs are, and whether labels agree."""

from __future__ import annotations

from collections.abc import Callable

import facts_models
import numpy as np
import torch
from accuracy_setting import Setting


def alike(setting: Setting) -> np.ndarray:
    """Compare inputs by cosine; labels say with which sign. Shape ``(n, m)``."""
    if setting.truth.task == "causal_lm":
        return _bm25(setting)
    options, split = setting.line.options, setting.truth.split
    embed = _embedder(setting, options.get("of", "inputs"))
    left, right = embed(split.train, split.targets)
    found = _unit(left) @ _unit(right).T
    if "power" in options:  # the nearer, the more
        found = np.sign(found) * np.abs(found) ** options["power"]
    labels, wanted = split.train[-1], split.targets[-1]
    if labels.is_floating_point():
        found = found * labels[:, None].numpy()
    else:
        same = (labels[:, None] == wanted).numpy()
        other = -1 / int(labels.max()) if options["by"] == "signed" else 0
        found = np.where(same, found, found * other)
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)


def _bm25(setting: Setting) -> np.ndarray:
    """Compare texts by the words they share, as a search engine does."""
    import bm25s

    pieces = facts_models.Pieces(setting.truth.root / facts_models.PIECES)
    texts, targets = (
        [
            pieces.decode(row[mask > 0][1:-1].tolist())
            for row, mask in zip(*part, strict=True)
        ]
        for part in (setting.truth.split.train, setting.truth.split.targets)
    )
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    words = bm25s.tokenize(targets, return_ids=False, show_progress=False)
    return np.stack([index.get_scores(part) for part in words], axis=1)


def _embedder(setting: Setting, of: str) -> Callable[..., tuple]:
    if of == "pairs":
        return lambda *parts: tuple(_mean_of_pair(part[0]).numpy() for part in parts)
    if setting.truth.task != "text_classification":
        return lambda *parts: tuple(part[0].flatten(1).numpy() for part in parts)
    return _word_counts if of == "words" else lambda *parts: _sentences(setting, *parts)


def _mean_of_pair(rows: torch.Tensor) -> torch.Tensor:
    """Add the vectors of the two texts of a pair, which rows begin with."""
    u, v, *_ = rows.chunk(4, dim=1)
    return u + v


def _word_counts(*parts: tuple) -> tuple:
    """Weigh words by how rare they are."""
    counts = []
    for ids, _, mask, _ in parts:
        rows = torch.zeros(len(ids), 30522)
        counts.append(rows.scatter_add_(1, ids, mask.float())[:, 1000:].numpy())
    rare = np.log(len(counts[0]) / (1 + (counts[0] > 0).sum(axis=0)))
    return tuple(part * rare.clip(0) for part in counts)


@torch.no_grad()
def _sentences(setting: Setting, *parts: tuple) -> tuple:
    """Average the last states of the encoder as it comes, without any training."""
    encoder, found = setting.truth.build().eval().bert, []
    for part in parts:
        rows = []
        for ids, kinds, mask, _ in zip(*(p.split(64) for p in part), strict=True):
            states = encoder(ids, token_type_ids=kinds, attention_mask=mask)
            weights = mask[..., None].float()
            states = states.last_hidden_state * weights
            rows.append(states.sum(1) / weights.sum(1))
        found.append(torch.cat(rows).numpy())
    return tuple(found)
