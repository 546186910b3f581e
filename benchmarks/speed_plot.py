"""A picture of a run: milliseconds an example, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_models import SUBJECTS
from speed_tables import Cell, median, number

OURS, THEIRS, FLOOR = "#1f5fa8", "#c8501e", "#777777"


def label(cell: Cell) -> str:
    if cell["kind"] == "featurize":
        title = SUBJECTS[cell["model"]].title.split(",")[0]
        half = ", half" if cell["half"] else ""
        threads = f", {cell['threads']} threads" if cell["threads"] > 1 else ""
        return f"{title}  b={cell['b']} p={cell['p']}{threads}{half}"
    return f"d={cell['d']:,}  b={cell['b']} p={cell['p']}"


def points(cell: Cell) -> list[tuple[str, str, str, str]]:
    """List what a row shows: series, legend, colour, marker."""
    if cell["kind"] == "featurize":
        return [
            ("floor", "forward and backward", FLOOR, "|"),
            ("ours", "trak", OURS, "o"),
            ("theirs", "traker 0.3.2", THEIRS, "s"),
        ]
    found = [("read once", "reading the gradients", FLOOR, "|")]
    for law, marker, title in (("sparse", "o", "sparse"), ("rademacher", "D", "dense")):
        for backend in ("native", "auto", "torch"):
            name = f"ours {law} {backend}"
            if name in cell["series"]:
                found.append((name, f"trak, {title}", OURS, marker))
                break
    found.append(("theirs normal", "traker 0.3.2, normal", THEIRS, "s"))
    return found


def panel(axes: Any, cells: Sequence[Cell], title: str) -> None:
    """Draw one row of dots for each cell."""
    shown = set()
    for row, cell in enumerate(cells):
        ends = []
        for name, legend, colour, marker in points(cell):
            value = median(cell, name)
            if not math.isfinite(value):
                continue
            whole = cell["series"][name]["how"] == "measured"
            axes.plot(
                value,
                row,
                marker,
                color=colour,
                markersize=11 if marker == "|" else 7,
                markeredgewidth=2 if marker == "|" else 1.5,
                markerfacecolor=colour if whole else "white",
            )
            if legend not in shown:
                shown.add(legend)
                dot = {"color": colour, "markersize": 7, "markeredgewidth": 1.5}
                axes.plot([], [], marker, label=legend, **dot)
            ends.append(value)
        if ends:
            axes.plot(
                [min(ends), max(ends)], [row, row], color="#dddddd", lw=2, zorder=0
            )
        faster(axes, row, cell)
    axes.set_yticks(range(len(cells)), [label(cell) for cell in cells])
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel("ms an example (hollow: extrapolated from one block)")
    place = ("figure fraction", "axes fraction")
    axes.annotate(title, (0.01, 1.0), xycoords=place, fontsize=11, fontweight="bold")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=4,
        frameon=False,
        fontsize=9,
        columnspacing=1.2,
    )


def faster(axes: Any, row: int, cell: Cell) -> None:
    """Write how many times faster ours is, at the right of its row."""
    names = ["theirs / ours"]
    for backend in ("native", "auto", "torch"):
        names.append(f"theirs normal / ours sparse {backend}")
    for name in names:
        found = cell["ratios"].get(name, {}).get("wall")
        if found:
            axes.annotate(
                f"{number(found['median'])}x",
                (1.01, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
                color=OURS,
            )
            return


def plot(results: dict[str, Any], paths: Sequence[Path]) -> None:
    """Draw a run and save it.

    Args:
        results: The run.
        paths: Files, their names say which format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "speed"  # the same file from the same figures
    from matplotlib import pyplot as plt

    kinds = [
        ("featurize", "Featurize"),
        ("project", "Projection alone"),
    ]
    groups = [
        ([cell for cell in results["cells"] if cell["kind"] == kind], title)
        for kind, title in kinds
    ]
    groups = [group for group in groups if group[0]]
    heights = [1.3 + 0.3 * len(cells) for cells, _ in groups]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(9.5, sum(heights) + 0.3),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (cells, title) in zip(axes[:, 0], groups, strict=True):
        panel(axis, cells, title)
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=130, metadata=metadata)
    plt.close(figure)
