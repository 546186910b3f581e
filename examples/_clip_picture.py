"""Held-out drawings beside the training pairs that taught their match with words."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib as mpl
import numpy as np
from _emoji_pairs import Pairs, Question

mpl.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

INK, TWIN, OTHER = "#2b2b2b", "#1b7f79", "#c9c9c9"
SHOWN = 6
TOP, BOTTOM = 1.05, 0.6  # margins in inches


def draw(
    path: Path, question: Question, scores: np.ndarray, targets: list[int]
) -> Path:
    """Draw one row a target.

    Args:
        path: The file to write.
        question: Training pairs and targets.
        scores: Shape ``(n, m)``.
        targets: Which to draw.

    Returns:
        ``path``.
    """
    columns = [1.0, 0.25, *[1.0] * SHOWN]
    figure, grid = plt.subplots(
        len(targets),
        len(columns),
        figsize=(1.36 * sum(columns), 1.6 * len(targets) + TOP + BOTTOM),
        gridspec_kw={"width_ratios": columns, "wspace": 0.24, "hspace": 0.55},
        squeeze=False,
    )
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.03, right=0.97, bottom=BOTTOM / height, top=1 - TOP / height
    )
    for row, target in zip(grid, targets, strict=True):
        for axes in row:
            axes.set_axis_off()
        _draw_pair(row[0], question.targets, target, INK, "")
        best = np.argsort(-scores[:, target])[:SHOWN]
        for axes, example in zip(row[2:], best, strict=True):
            is_twin = example == question.twins[target]
            score = f"{1000 * scores[example, target]:+.0f}"
            _draw_pair(axes, question.train, example, TWIN if is_twin else OTHER, score)

    def write(column: int, inches: float, text: str, **style: object) -> None:
        left = grid[0, column].get_position().x0
        figure.text(left, 1 - inches / height, text, va="top", **style)

    title = "Which pairs taught CLIP to match these drawings with their words?"
    write(0, 0.2, title, fontsize=16, color=INK, fontweight="bold")
    write(0, 0.66, "Held out", fontsize=10.5, color=INK)
    heading = (
        "Top training pairs, with 1000 \N{MULTIPLICATION SIGN} score; framed: the same "
        "emoji, by the other vendor"
    )
    write(2, 0.66, heading, fontsize=10.5, color=TWIN)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)
    return path


def _draw_pair(axes: Axes, pairs: Pairs, index: int, colour: str, score: str) -> None:
    image = pairs.inputs["pixel_values"][index]
    axes.set_axis_on()
    axes.imshow(((image + 1) / 2).permute(1, 2, 0).numpy(), interpolation="lanczos")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=colour, linewidth=2.4)
    words = textwrap.wrap(
        pairs.captions[index], 21, max_lines=2, placeholder=" \N{HORIZONTAL ELLIPSIS}"
    )
    style = {"fontsize": 7.5, "color": INK, "va": "top"}
    axes.set_xlabel("\n".join(words), labelpad=3, **style)
    if score:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
        axes.text(
            0.96, 0.95, score, ha="right", transform=axes.transAxes, bbox=box, **style
        )
