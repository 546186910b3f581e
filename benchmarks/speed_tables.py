"""Tables of what was timed: featurizing, memory, projections."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from speed_models import SUBJECTS

Cell = dict[str, Any]
NOTE = {"extrapolated": "\N{ALMOST EQUAL TO} "}
"""What stands before a figure that is not measured whole."""

FOOTNOTE = (
    "\N{ALMOST EQUAL TO} extrapolated from one block of the projection: traker draws and "
    "multiplies 100 columns at a time, so its whole call was timed with two blocks and "
    "the time of a block added for each of the others."
)


def number(value: float) -> str:
    """Give three digits, without an exponent.

    Returns:
        The number as it stands in a table.
    """
    if not math.isfinite(value):
        return "-"
    if value >= 99.95:
        return f"{value:,.0f}"
    digits = 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{digits}f}"


def median(cell: Cell, name: str, clock: int = 1) -> float:
    """Take the median of a series' turns, in ms an example; NaN where it has none."""
    turns = cell["series"].get(name, {}).get("turns", [])
    return statistics.median(turn[clock] for turn in turns) if turns else math.nan


def time_of(cell: Cell, name: str, clock: int = 1) -> str:
    one = cell["series"].get(name)
    if one is None:
        return "-"
    if not one["turns"]:
        return one["how"].split(":")[0]
    return NOTE.get(one["how"], "") + number(median(cell, name, clock))


def ratio_of(cell: Cell, name: str, clock: str = "wall") -> str:
    found = cell["ratios"].get(name, {}).get(clock)
    if not found:
        return "-"
    text = number(found["median"])
    if found["rounds"] > 1:
        text += f" ({number(found['least'])}-{number(found['greatest'])})"
    return text


def memory_of(cell: Cell, name: str) -> str:
    peak = cell["series"].get(name, {}).get("peak", math.nan)
    return number(peak) if peak < 99.95 else f"{peak:,.0f}" if peak == peak else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table.

    Returns:
        Its lines.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- tables ---------------------------------------------------------------------------


def sizes_of(cell: Cell) -> tuple[str, ...]:
    half = ", half precision" if cell["half"] else ""
    title = SUBJECTS[cell["model"]].title + half
    return title, str(cell["b"]), str(cell["p"]), str(cell["threads"])


SIZES = ("model", "`b`", "`p`", "threads")


def featurize_table(cells: Iterable[Cell], clock: str = "wall") -> str:
    """Lay out the times of both sides and of the floor, on one of the clocks.

    Returns:
        Its lines.
    """
    times, ratios = ("floor", "ours", "theirs"), ("ours / floor", "theirs / ours")
    at = 2 if clock == "cpu" else 1
    rows = [
        (
            *sizes_of(cell),
            *(time_of(cell, name, at) for name in times),
            *(ratio_of(cell, name, clock) for name in ratios),
        )
        for cell in cells
    ]
    head = (*SIZES, "floor", "trak", "traker", "trak / floor", "traker / trak")
    return table(head, rows)


def memory_table(cells: Iterable[Cell]) -> str:
    rows = [
        (
            *sizes_of(cell),
            f"{cell['d']:,}",
            *(memory_of(cell, name) for name in ("floor", "ours", "theirs")),
        )
        for cell in cells
    ]
    return table((*SIZES, "`d`", "floor", "trak", "traker"), rows)


def store_table(cells: Iterable[Cell]) -> str:
    rows = [
        (
            *sizes_of(cell),
            ratio_of(cell, "ours / floor"),
            ratio_of(cell, "ours in memory / floor"),
        )
        for cell in cells
        if "ours in memory" in cell["series"]
    ]
    head = (*SIZES, "with a store / floor", "without / floor")
    return table(head, rows) if rows else ""


def project_table(cells: Sequence[Cell]) -> str:
    names = list(dict.fromkeys(name for cell in cells for name in cell["series"]))
    names = [name for name in names if name != "read once"]
    titles = [
        name.replace("theirs", "traker").replace("ours", "trak") for name in names
    ]
    head = ("`d`", "`b`", "`p`", "threads", "reading, ms", *titles)
    rows = []
    for cell in cells:
        row = [f"{cell['d']:,}", str(cell["b"]), str(cell["p"]), str(cell["threads"])]
        row.append(time_of(cell, "read once"))
        for name in names:
            text = time_of(cell, name)
            faster = cell["ratios"].get(f"theirs normal / {name}", {}).get("wall")
            if faster and name.startswith("ours"):
                text += f" ({number(faster['median'])}x)"
            row.append(text)
        rows.append(row)
    return table(head, rows)
