"""Test digits beside the training digits that help and harm them most."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HELPS, HARMS, INK = "#1b7f79", "#c8553d", "#2b2b2b"  # apart for the colour-blind too
SHOWN = 5


def draw(path: Path, data, scores: np.ndarray, n_pictured: int) -> Path:
    """Draw one row a test digit, and return ``path``."""
    targets = pick_targets(data.test[1].numpy(), scores, n_pictured)
    columns = [1.35, 0.35, *[1] * SHOWN, 0.35, *[1] * SHOWN]
    figure, grid = plt.subplots(
        len(targets),
        len(columns),
        figsize=(0.92 * sum(columns), 1.32 * len(targets) + 1.5),
        gridspec_kw={"width_ratios": columns, "wspace": 0.16, "hspace": 0.42},
        squeeze=False,
    )
    for row, target in zip(grid, targets, strict=True):
        for axes in row:
            axes.set_axis_off()
        _draw_row(row, data, scores[:, target], target)
    _write_headings(figure, grid)
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)
    return path


def pick_targets(labels: np.ndarray, scores: np.ndarray, count: int) -> list[int]:
    """Pick the digit of each class whose scores are largest, strongest classes first."""
    strength = np.abs(scores).max(axis=0)
    best = [
        max(np.flatnonzero(labels == label), key=strength.__getitem__)
        for label in np.unique(labels)
    ]
    strongest = sorted(best, key=lambda target: -strength[target])[:count]
    return sorted(strongest, key=lambda target: labels[target])


def _draw_row(row: np.ndarray, data, scores: np.ndarray, target: int) -> None:
    images, labels = data.test
    order = np.argsort(-scores)
    _draw_digit(row[0], images[target], INK, f"a {labels[target]}", size=13)
    helpful, harmful = order[:SHOWN], order[::-1][:SHOWN]
    for axes, example in zip(row[2 : 2 + SHOWN], helpful, strict=True):
        _draw_example(axes, data.train, example, scores[example], HELPS)
    for axes, example in zip(row[3 + SHOWN :], harmful, strict=True):
        _draw_example(axes, data.train, example, scores[example], HARMS)


def _draw_example(
    axes: Axes, train: tuple[Tensor, Tensor], example: int, score: float, colour: str
) -> None:
    images, labels = train
    caption = f"{labels[example]}  {score:+.2f}".replace("-", "\N{MINUS SIGN}")
    _draw_digit(axes, images[example], colour, caption, size=9.5)


def _draw_digit(
    axes: Axes, image: Tensor, colour: str, caption: str, size: float
) -> None:
    axes.set_axis_on()
    axes.imshow(image[0], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=colour, linewidth=2)
    axes.set_xlabel(caption, fontsize=size, color=colour, labelpad=3)


def _write_headings(figure: plt.Figure, grid: np.ndarray) -> None:
    figure.subplots_adjust(left=0.03, right=0.985, bottom=0.05, top=0.87)
    figure.suptitle(
        "Which training digits made the model read it so?",
        x=0.03,
        y=0.965,
        ha="left",
        fontsize=17,
        color=INK,
        fontweight="bold",
    )
    headings = (
        (0, INK, "test digit"),
        (2, HELPS, "most helpful training digits: label, score"),
        (3 + SHOWN, HARMS, "most harmful training digits: label, score"),
    )
    for column, colour, text in headings:
        left = grid[0, column].get_position().x0
        figure.text(left, 0.895, text, fontsize=11.5, color=colour)
