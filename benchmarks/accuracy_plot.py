"""A picture of a run: LDS over minutes of processor time, a panel a truth."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy_judging import best_variants

COLOURS = {
    "TRAK": "#1f5fa8",
    "TRAK, p=8192": "#62a0e0",
    "traker 0.3.2": "#c8501e",
    "traker 0.3.2, float32, p chosen": "#e58a5b",
    "traker's arithmetic": "#e8b79b",
    "EK-FAC": "#2c8a4b",
    "Arnoldi": "#79b98b",
    "influence, CG": "#0f5c3a",
    "influence, LiSSA": "#a4d4ae",
    "datamodels": "#7a3fa0",
    "empirical influence": "#b58fce",
    "TracIn": "#8c6d1f",
    "GAS": "#c9a93f",
    "gradient dot": "#555555",
    "gradient cosine": "#999999",
    "representations": "#d04a8a",
    "similarity of inputs": "#000000",
    "similarity of words": "#444444",
}
FLAT = ("similarity of inputs", "similarity of words")
"""What trains nothing and takes no time: a level, not a line."""

BY_EYE = 1e-3
"""Fewest minutes on the axis."""


def series(results: dict[str, Any], truth: str) -> dict[str, list[dict[str, Any]]]:
    """Collect what a panel shows, by name, in the order of costs."""
    found = defaultdict(list)
    for row in best_variants([row for row in results["rows"] if row["truth"] == truth]):
        if row["name"] in COLOURS:
            found[row["name"]].append(row)
    return {
        name: sorted(found[name], key=lambda row: row["minutes"])
        for name in COLOURS
        if name in found
    }


def panel(axes: Any, results: dict[str, Any], truth: str) -> None:
    """Draw a truth."""
    for name, rows in series(results, truth).items():
        colour = COLOURS[name]
        y = [row["lds"] for row in rows]
        if name in FLAT:
            axes.axhline(max(y), color=colour, lw=0.8, ls=":", label=name)
            continue
        x = [max(row["minutes"], BY_EYE) for row in rows]
        low, high = zip(*(row["interval"] for row in rows), strict=True)
        whole = name != "traker's arithmetic"
        main = name.startswith("TRAK")
        style = {"color": colour, "lw": 2.2 if main else 1, "zorder": 3 if main else 2}
        face = colour if whole else "white"
        axes.plot(x, y, "o-", ms=4, markerfacecolor=face, label=name, **style)
        if len(x) > 1:
            axes.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)
        else:
            axes.plot([x[0], x[0]], [low[0], high[0]], color=colour, lw=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.minorticks_off()
    axes.axhline(0, color="#cccccc", lw=0.8, zorder=0)
    about = results["truths"][truth]
    axes.set_title(about["title"], fontsize=10)


def plot(results: dict[str, Any], paths: Sequence[Path]) -> None:
    """Draw a run and save it.

    Args:
        results: The run.
        paths: Files, their names say which format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "accuracy"  # the same file from the same figures
    from matplotlib import pyplot as plt

    truths = list(results["truths"])
    columns = min(2, len(truths))
    rows = math.ceil(len(truths) / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(5.2 * columns, 3.6 * rows + 1.2),
        squeeze=False,
        layout="constrained",
    )
    legend: dict[str, Any] = {}
    for axis, truth in zip(axes.flat, truths, strict=False):
        panel(axis, results, truth)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    for axis in list(axes.flat)[len(truths) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("minutes of one core, training included")
    for axis in axes[:, 0]:
        axis.set_ylabel("LDS, 95 % band over targets")
    ordered = [name for name in COLOURS if name in legend]
    figure.legend(
        [legend[name] for name in ordered],
        ordered,
        loc="outside lower center",
        ncols=3,
        fontsize=8,
    )
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=130, metadata=metadata)
    plt.close(figure)
