"""Test digits beside the training digits that help and harm them most."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from _digits_model import Digits
from torch import Tensor

mpl.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HELPS, HARMS, INK = "#1b7f79", "#c8553d", "#2b2b2b"  # apart for the colour-blind too
SHOWN = 5
TOP, BOTTOM = 1.5, 0.4  # margins in inches


def draw(
    path: Path, data: Digits, scores: np.ndarray, read_right: np.ndarray, count: int
) -> Path:
    """Draw one row a test digit.

    Args:
        path: The file to write.
        data: The digits.
        scores: Shape ``(n, m)``.
        read_right: Share of the models that read each test digit correctly. ``(m,)``
        count: Number of rows.

    Returns:
        ``path``.
    """
    targets = pick_targets(data.test[1].numpy(), scores, count)
    columns = [1.3, 0.45, *[1] * SHOWN, 0.3, *[1] * SHOWN]
    figure, grid = plt.subplots(
        len(targets),
        len(columns),
        figsize=(0.92 * sum(columns), 1.36 * len(targets) + TOP + BOTTOM),
        gridspec_kw={"width_ratios": columns, "wspace": 0.16, "hspace": 0.46},
        squeeze=False,
    )
    for row, target in zip(grid, targets, strict=True):
        for axes in row:
            axes.set_axis_off()
        _draw_row(row, data, scores[:, target], target, read_right[target])
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


def _draw_row(
    row: np.ndarray, data: Digits, scores: np.ndarray, target: int, right: float
) -> None:
    images, labels = data.test
    order = np.argsort(-scores)
    caption = f"a {labels[target]}, read by {right:.0%}"
    _draw_digit(row[0], images[target], INK, caption, size=9.5)
    helpful, harmful = order[:SHOWN], order[::-1][:SHOWN]
    for axes, example in zip(row[2 : 2 + SHOWN], helpful, strict=True):
        _draw_example(axes, data.train, example, scores[example], HELPS)
    for axes, example in zip(row[3 + SHOWN :], harmful, strict=True):
        _draw_example(axes, data.train, example, scores[example], HARMS)


def _draw_example(
    axes: Axes, train: tuple[Tensor, Tensor], example: int, score: float, colour: str
) -> None:
    images, labels = train
    caption = f"{labels[example]}   {100 * score:+.1f}".replace("-", "\N{MINUS SIGN}")
    _draw_digit(axes, images[example], colour, caption, size=9.5)


def _draw_digit(
    axes: Axes, image: Tensor, colour: str, caption: str, size: float
) -> None:
    axes.set_axis_on()
    axes.imshow(
        image[0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=colour, linewidth=2)
    axes.set_xlabel(caption, fontsize=size, color=colour, labelpad=3)


def _write_headings(figure: Figure, grid: np.ndarray) -> None:
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.03, right=0.985, bottom=BOTTOM / height, top=1 - TOP / height
    )

    def write(column: int, inches: float, text: str, **style: object) -> None:
        left = grid[0, column].get_position().x0
        figure.text(left, 1 - inches / height, text, va="top", **style)

    title = "Which training digits taught the model to read these?"
    write(0, 0.3, title, fontsize=17, color=INK, fontweight="bold")
    subtitle = (
        "Under a test digit: its label, and how many retrained models read it right. "
        "Under a training digit: its label, and its score x 100."
    )
    write(0, 0.72, subtitle.replace(" x ", " \N{MULTIPLICATION SIGN} "), color=INK)
    write(0, 1.2, "Test digit", fontsize=11.5, color=INK)
    write(2, 1.2, "What helped it most", fontsize=11.5, color=HELPS)
    write(3 + SHOWN, 1.2, "What harmed it most", fontsize=11.5, color=HARMS)
