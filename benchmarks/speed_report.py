"""From results to what is read: fitted exponents, a document, the tables of a page."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from speed_models import SUBJECTS
from speed_scoring import scoring_exponents, scoring_table
from speed_tables import (
    FOOTNOTE,
    Cell,
    featurize_table,
    median,
    memory_table,
    project_table,
    store_table,
    table,
)

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
        *scoring_exponents(kinds["score"]),
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
    head = ("what", "along", "from", "exponent")
    return table(head, rows) if rows else ""


# -- everything -----------------------------------------------------------------------


def warnings(results: dict[str, Any]) -> list[str]:
    """Say what a reader of the figures must know."""
    found = [f"failed: {line}" for line in results.get("failed", [])]
    for cell in results["cells"]:
        if cell["kind"] == "score":
            continue
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
            found.append(
                f"{where}: wall time was {busy(cell):.1f} times processor time, so "
                f"other work ran beside it."
            )
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
        Markdown by the names in `TITLES`; empty where there is nothing.
    """
    kinds: dict[str, list[Cell]] = defaultdict(list)
    for cell in results["cells"]:
        kinds[cell["kind"]].append(cell)
    machine = "\n".join(f"- {name}: {v}" for name, v in results["machine"].items())
    f, p = kinds["featurize"], kinds["project"]
    return {
        "machine": machine,
        "featurize": f"{featurize_table(f)}\n\n{FOOTNOTE}" if f else "",
        "processor": featurize_table(f, "cpu") if f else "",
        "memory": memory_table(f) if f else "",
        "store": store_table(f),
        "project": f"{project_table(p)}\n\n{FOOTNOTE}" if p else "",
        "scoring": scoring_table(kinds["score"]),
        "exponents": exponent_table(results["exponents"]),
        "warnings": "\n".join(f"- {line}" for line in warnings(results)),
    }


TITLES = {
    "machine": "Machine",
    "featurize": "Featurizing, ms an example",
    "processor": "Featurizing, ms of processor time an example",
    "memory": "Featurizing, peak memory in MiB",
    "store": "What the store costs",
    "project": "Projection alone, ms an example",
    "scoring": "Finalizing and scoring",
    "exponents": "How cost grows",
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
