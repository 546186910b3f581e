"""From results to what is read: tables, fitted exponents, and the tables of a page."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
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


def time_of(cell: Cell, name: str) -> str:
    one = cell["series"].get(name)
    if one is None:
        return "-"
    if not one["turns"]:
        return one["how"].split(":")[0]
    return NOTE.get(one["how"], "") + number(median(cell, name))


def ratio_of(cell: Cell, name: str) -> str:
    found = cell["ratios"].get(name, {}).get("wall")
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


def featurize_table(cells: Iterable[Cell]) -> str:
    head = (
        "model",
        "`d`",
        "`b`",
        "`p`",
        "threads",
        "floor, ms",
        "trak, ms",
        "trak / floor",
        "traker, ms",
        "traker / trak",
        "MiB: floor",
        "trak",
        "traker",
    )
    rows = []
    for cell in cells:
        half = ", half precision" if cell["half"] else ""
        rows.append((
            SUBJECTS[cell["model"]].title + half,
            f"{cell['d']:,}",
            str(cell["b"]),
            str(cell["p"]),
            str(cell["threads"]),
            time_of(cell, "floor"),
            time_of(cell, "ours"),
            ratio_of(cell, "ours / floor"),
            time_of(cell, "theirs"),
            ratio_of(cell, "theirs / ours"),
            memory_of(cell, "floor"),
            memory_of(cell, "ours"),
            memory_of(cell, "theirs"),
        ))
    return table(head, rows)


def store_table(cells: Iterable[Cell]) -> str:
    head = ("model", "`b`", "`p`", "with a store / floor", "without / floor")
    rows = [
        (
            SUBJECTS[cell["model"]].title,
            str(cell["b"]),
            str(cell["p"]),
            ratio_of(cell, "ours / floor"),
            ratio_of(cell, "ours in memory / floor"),
        )
        for cell in cells
        if "ours in memory" in cell["series"]
    ]
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


# -- exponents ------------------------------------------------------------------------


def fit(points: Sequence[tuple[float, float]]) -> float:
    """Fit ``y = c x^a`` by least squares of logarithms.

    Returns:
        The exponent ``a``.

    Example:
        >>> fit([(1, 3), (10, 300)])
        2.0
    """
    xs = [math.log(x) for x, _ in points]
    ys = [math.log(y) for _, y in points]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def exponents(
    cells: Iterable[Cell],
    along: str,
    fixed: Sequence[str],
    title: Callable[[Cell], str],
) -> list[dict[str, Any]]:
    """Fit how the time of every series grows along one size, the others being fixed.

    Args:
        cells: Results of one kind.
        along: The size that varies.
        fixed: What must agree.
        title: Names a group by any of its cells.

    Returns:
        For each group with two sizes or more: what, along what, over which sizes, and
        the exponents by series.
    """
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[tuple(cell[name] for name in fixed)].append(cell)
    found = []
    for group in groups.values():
        group.sort(key=lambda cell: cell[along])
        sizes = sorted({cell[along] for cell in group})
        if len(sizes) < 2:
            continue
        by_series: dict[str, float] = {}
        for name in group[0]["series"]:
            points = [(cell[along], median(cell, name)) for cell in group]
            points = [point for point in points if math.isfinite(point[1])]
            if len(points) >= 2:
                by_series[name] = fit(points)
        found.append({
            "what": title(group[0]),
            "along": along,
            "sizes": sizes,
            "exponents": by_series,
        })
    return found


def all_exponents(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Fit what the cells of a run allow: ms an example against p, b and d."""
    kinds: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        kinds[cell["kind"]].append(cell)

    def featurizing(cell: Cell) -> str:
        return f"featurize, {SUBJECTS[cell['model']].title}, {cell['threads']} threads"

    def projecting(cell: Cell) -> str:
        return f"project, {cell['threads']} threads"

    f, p = kinds["featurize"], kinds["project"]
    return [
        *exponents(f, "p", ("model", "b", "threads", "half"), featurizing),
        *exponents(f, "b", ("model", "p", "threads", "half"), featurizing),
        *exponents(p, "p", ("d", "b", "threads"), projecting),
        *exponents(p, "d", ("p", "b", "threads"), projecting),
        *exponents(p, "b", ("d", "p", "threads"), projecting),
    ]


def exponent_table(found: Iterable[dict[str, Any]]) -> str:
    rows = [
        (
            one["what"],
            f"`{one['along']}`",
            ", ".join(f"{size:,}" for size in one["sizes"]),
            ", ".join(
                f"{name} {value:.2f}" for name, value in one["exponents"].items()
            ),
        )
        for one in found
    ]
    head = ("cost of an example", "along", "from", "exponent")
    return table(head, rows) if rows else ""


# -- everything -----------------------------------------------------------------------


def warnings(results: dict[str, Any]) -> list[str]:
    """Say what a reader of the figures must know."""
    found = [f"failed: {line}" for line in results.get("failed", [])]
    for cell in results["cells"]:
        where = ", ".join(
            f"{key}={cell[key]}"
            for key in ("model", "d", "b", "p", "threads")
            if key in cell
        )
        grams = cell.get("grams")
        if grams and not grams["difference"] < 6 * grams["chance"]:
            found.append(
                f"{where}: inner products differ by {grams['difference']:.2g} of the "
                f"trace, chance is {grams['chance']:.2g}: not the same work."
            )
        for name, one in cell["series"].items():
            if one["how"] not in {"measured", "extrapolated"}:
                found.append(f"{where}: {name}: {one['how']}")
            elif one["note"]:
                found.append(f"{where}: {name}: {one['note']}")
        if cell["series"] and busy(cell) > 1.2:
            found.append(f"{where}: other work took {busy(cell) - 1:.0%} of the time.")
    return found


def busy(cell: Cell) -> float:
    """Compare wall with processor time of ours, on one thread; 1 when undisturbed."""
    if cell["threads"] > 1:
        return 1.0
    shares = [
        median(cell, name) / median(cell, name, 2)
        for name in cell["series"]
        if median(cell, name, 2) > 0
    ]
    return statistics.median(shares) if shares else 1.0


def sections(results: dict[str, Any]) -> dict[str, str]:
    """Write every table of a run.

    Returns:
        Markdown by name: ``machine``, ``featurize``, ``store``, ``project``,
        ``exponents``, ``scoring``, ``warnings``; empty where there is nothing.
    """
    kinds: dict[str, list[Cell]] = defaultdict(list)
    for cell in results["cells"]:
        kinds[cell["kind"]].append(cell)
    machine = "\n".join(f"- {name}: {v}" for name, v in results["machine"].items())
    featurize = featurize_table(kinds["featurize"]) if kinds["featurize"] else ""
    project = project_table(kinds["project"]) if kinds["project"] else ""
    return {
        "machine": machine,
        "featurize": f"{featurize}\n\n{FOOTNOTE}" if featurize else "",
        "store": store_table(kinds["featurize"]),
        "project": f"{project}\n\n{FOOTNOTE}" if project else "",
        "exponents": exponent_table(results["exponents"]),
        "scoring": results["scoring"].get("table", ""),
        "warnings": "\n".join(f"- {line}" for line in warnings(results)),
    }


TITLES = {
    "machine": "Machine",
    "featurize": "Featurize, one example",
    "store": "What the store costs",
    "project": "Projection alone, ms an example",
    "exponents": "How cost grows",
    "scoring": "Finalize and score",
    "warnings": "To know",
}


def markdown(results: dict[str, Any]) -> str:
    """Write a run down.

    Returns:
        A Markdown document.
    """
    parts = ["# Speed"]
    for name, text in sections(results).items():
        if text:
            parts += [f"## {TITLES[name]}", text]
    return "\n\n".join(parts) + "\n"


def fill(page: str, results: dict[str, Any]) -> str:
    """Put tables between a page's marks ``<!-- speed:NAME -->`` and ``<!-- end -->``.

    Args:
        page: The page.
        results: A run.

    Returns:
        The page with the tables of the run.
    """
    texts = {
        **sections(results),
        "picture": "![Milliseconds an example](speed.svg)",
    }

    def put(match: re.Match[str]) -> str:
        text = texts[match[2]] or "Not in this run."
        return f"{match[1]}\n\n{text}\n\n{match[3]}"

    pattern = r"(<!-- speed:(\w+) -->).*?(<!-- end -->)"
    return re.sub(pattern, put, page, flags=re.DOTALL)
