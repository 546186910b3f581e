"""From predictions to figures: LDS, choices that the truth makes, ratios."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from trak.evaluation import GroundTruth, lds

Row = dict[str, Any]


def judge(predictions: np.ndarray, bank: GroundTruth) -> Row:
    """Compute the LDS of what scores predict for subsets.

    Args:
        predictions: Sums of scores over the judging subsets. Shape ``(s, m)``.
        bank: Some of those subsets, the first ones, and all targets or more.

    Returns:
        ``lds``, ``interval`` and ``per_target``.
    """
    s, m = bank.n_subsets, predictions.shape[1]
    # With a subset for each, the scores of lds() are the predictions themselves.
    found = lds(predictions[:s], np.eye(s, dtype=bool), bank.outputs[:, :, :m])
    return {
        "lds": found.mean,
        "interval": list(found.interval),
        "per_target": [round(float(value), 4) for value in found.per_target],
    }


def against_one(predictions: np.ndarray, bank: GroundTruth) -> float:
    """Compute the LDS against single retrainings, which is what checkpoints estimate.

    A mean of retrainings has less noise, and so a higher LDS.

    Returns:
        The mean over the retrainings of each subset.
    """
    found = [
        judge(predictions, GroundTruth(bank.masks, bank.outputs[:, [r]]))["lds"]
        for r in range(bank.n_repeats)
    ]
    return float(np.mean(found))


def ratio(
    ours: Sequence[float], theirs: Sequence[float], n_bootstrap: int = 2000
) -> tuple[float, float, float]:
    """Divide two mean LDS of the same targets, which are resampled together.

    Args:
        ours: Of each target.
        theirs: Of each target, in the same order.
        n_bootstrap: Resamples.

    Returns:
        The ratio of means and its 95 % interval.

    Example:
        >>> ratio([0.4, 0.2], [0.2, 0.1])
        (2.0, 2.0, 2.0)
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (ours, theirs))
    m = min(len(first), len(second))
    first, second = first[:m], second[:m]
    chosen = np.random.default_rng(0).integers(0, m, (n_bootstrap, m))
    means = first[chosen].mean(axis=1), second[chosen].mean(axis=1)
    # Where the lower one may be 0 or less, a ratio says nothing from above.
    ratios = np.where(
        means[1] > 0, means[0] / np.where(means[1] > 0, means[1], 1), np.inf
    )
    low, high = np.quantile(ratios, [0.025, 0.975], method="nearest")
    middle = first.mean() / second.mean() if second.mean() > 0 else np.inf
    return float(middle), float(low), float(high)


def rows_of(
    truth: str, line: Any, found: Row, bank: GroundTruth, a_training: Row
) -> list[Row]:
    """Judge every step of a line.

    Args:
        truth: The truth's name.
        line: The line.
        found: What its process wrote, with the predictions.
        bank: What judges it.
        a_training: Seconds that training one model takes.

    Returns:
        A row a step: who, how many models, LDS, and minutes of processor time with and
        without training.
    """
    rows = []
    m = bank.outputs.shape[2]
    for step in found["steps"].values():
        if "predictions" not in step:
            continue
        scale = m / found["m"]
        own = step["seconds"]["cpu"] * scale / 60
        trained = step["trained"] * a_training["cpu"] / 60
        rows.append({
            "truth": truth,
            "name": line.name,
            "method": line.method,
            "variant": line.variant,
            "is_default": line.is_default,
            "count": step["count"],
            "label": step["label"],
            "targets": found["m"],
            "minutes": own + trained,
            "scoring": own,
            "training": trained,
            "wall": step["seconds"]["wall"] * scale / 60,
            "notes": step["notes"],
            **judge(step["predictions"], bank),
        })
        if step["notes"]:
            rows[-1]["single"] = against_one(step["predictions"], bank)
    return rows


def best_variants(rows: Sequence[Row]) -> list[Row]:
    """Keep, of the variants of a name, the one with the highest LDS on the truth.

    Returns:
        For every truth, name and count a row; ``chosen`` says whether there was a choice.
    """
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if not row["label"]:
            groups[row["truth"], row["name"], row["count"]].append(row)
    found = []
    for group in groups.values():
        best = max(group, key=lambda row: row["lds"])
        found.append({**best, "chosen": len({row["variant"] for row in group}) > 1})
    return found


def validation(rows: Sequence[Row]) -> list[Row]:
    """Put beside each other what cross-validation said and what the truth says.

    Returns:
        For every truth and count: the estimate with its interval, the LDS of what it
        chose, the best on the truth of everything that was tried, and the LDS lost.
    """
    found = []
    for chosen in rows:
        if chosen["method"] != "grid" or chosen["label"] or not chosen["notes"]:
            continue
        tried = [
            row
            for row in rows
            if row["truth"] == chosen["truth"]
            and row["count"] == chosen["count"]
            and row["method"] == "grid"
            and row["label"]
        ]
        best = max(tried, key=lambda row: row["lds"])
        notes = chosen["notes"]
        found.append({
            "truth": chosen["truth"],
            "count": chosen["count"],
            "estimate": notes["lds"],
            "interval": notes["interval"],
            "multiple": notes["multiple"],
            "exponents": notes["exponents"],
            "single": chosen["single"],
            "lds": chosen["lds"],
            "lds_interval": chosen["interval"],
            "best": best["label"],
            "best_lds": best["lds"],
            "lost": 1 - chosen["lds"] / best["lds"] if best["lds"] > 0 else 0.0,
        })
    return found
