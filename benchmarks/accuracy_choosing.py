"""What helps to choose: LDS over checkpoints, projected entries, damping and exponents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy_variants import BASE
from speed_tables import table

Row = dict[str, Any]
AT = 5
"""Checkpoints that sizes, dampings and exponents are compared at."""


def over_checkpoints(results: Row, truth: str) -> dict[int, Row]:
    """Collect TRAK as it comes, by number of checkpoints."""
    rows = _of(results, truth, name="TRAK", label="")
    return {row["count"]: row for row in sorted(rows, key=lambda row: row["count"])}


def over_sizes(results: Row, truth: str) -> dict[int, Row]:
    """Collect projected entries, at one mean eigenvalue; 0 stands for no projection."""
    rows = _of(results, truth, method="sizes", count=AT)
    found = {int(row["label"].removeprefix("p=")): row for row in rows}
    return dict(sorted(found.items(), key=lambda item: item[0] or float("inf")))


def over_dampings(results: Row, truth: str) -> dict[float, Row]:
    """Collect dampings in mean eigenvalues, with the default exponents."""
    default = tuple(results["truths"][truth]["exponents"])
    return {
        multiple: row
        for (a, b, multiple), row in _grid(results, truth).items()
        if (a, b) == default
    }


def over_exponents(results: Row, truth: str) -> dict[tuple[float, float], Row]:
    """Collect exponents, at one mean eigenvalue."""
    found = _grid(results, truth)
    return {(a, b): row for (a, b, multiple), row in found.items() if multiple == 1}


def _of(results: Row, truth: str, **wanted: Any) -> list[Row]:
    wanted["truth"] = truth
    return [
        row for row in results["rows"] if all(row[k] == v for k, v in wanted.items())
    ]


def _grid(results: Row, truth: str) -> dict[tuple[float, float, float], Row]:
    found = {}
    for row in _of(results, truth, method="grid", count=AT):
        if row["label"]:
            a, b, multiple = (float(part) for part in row["label"].split("_"))
            found[a, b, multiple] = row
    return dict(sorted(found.items()))


# -- tables ---------------------------------------------------------------------------


def _table(
    results: Row, collect: Callable[[Row, str], Mapping[Any, Row]], name: Any
) -> str:
    """Lay out a row a truth; the best of each is bold."""
    found = {truth: collect(results, truth) for truth in results["truths"]}
    keys = list(dict.fromkeys(key for one in found.values() for key in one))
    lines = []
    for truth, one in found.items():
        if one:
            best = max(round(row["lds"], 3) for row in one.values())
            cells = [_cell(one.get(key), best) for key in keys]
            lines.append((results["truths"][truth]["title"], *cells))
    return table(("truth", *map(name, keys)), lines) if lines else ""


def _cell(row: Row | None, best: float) -> str:
    if row is None:
        return ""
    text = f"{row['lds']:.3f}"
    return f"**{text}**" if round(row["lds"], 3) == best else text


def tried(results: Row) -> str:
    """Lay out what else was tried: LDS of the default, and how much others differ."""
    rows = [row for row in results["rows"] if row["method"] == "variants"]
    found = {(row["label"], row["truth"], row["count"]): row["lds"] for row in rows}
    columns = list(dict.fromkeys((row["truth"], row["count"]) for row in rows))
    lines = []
    for name in dict.fromkeys(row["label"] for row in rows):
        cells = []
        for column in columns:
            own, base = found.get((name, *column)), found[(BASE, *column)]
            if own is None:
                cells.append("")
            else:
                cells.append(f"{own:.3f}" if name == BASE else f"{own - base:+.3f}")
        lines.append((name, *cells))
    head = ("", *(f"{truth}, {count}" for truth, count in columns))
    return table(head, lines) if lines else ""


def sections(results: Row) -> dict[str, str]:
    """Write the tables.

    Returns:
        Markdown by name; empty where there is nothing.
    """
    return {
        "checkpoints": _table(results, over_checkpoints, str),
        "sizes": _table(results, over_sizes, lambda p: f"{p:,}" if p else "all"),
        "dampings": _table(results, over_dampings, lambda multiple: f"{multiple:g}"),
        "exponents": _table(
            results, over_exponents, lambda ab: "{:g}, {:g}".format(*ab)
        ),
        "tried": tried(results),
    }


# -- picture --------------------------------------------------------------------------


def _line(axes: Any, name: str, points: Iterable[tuple[float, Row]]) -> None:
    places, rows = zip(*points, strict=True)
    low, high = zip(*(row["interval"] for row in rows), strict=True)
    (drawn,) = axes.plot(places, [row["lds"] for row in rows], "o-", ms=4, label=name)
    axes.fill_between(places, low, high, color=drawn.get_color(), alpha=0.13, lw=0)


def plot(results: Row, paths: Sequence[Path]) -> None:
    """Draw LDS over checkpoints, projected entries and damping.

    Args:
        results: The run.
        paths: Files, their names say which format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "choosing"  # the same file from the same figures
    from matplotlib import pyplot as plt

    panels = (
        ("checkpoints", over_checkpoints),
        (f"projected entries, {AT} checkpoints", over_sizes),
        (f"damping in mean eigenvalues, {AT} checkpoints", over_dampings),
    )
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 4.2), sharey=True, layout="constrained"
    )
    for axis, (title, collect) in zip(axes, panels, strict=True):
        for truth, about in results["truths"].items():
            points = [(key, row) for key, row in collect(results, truth).items() if key]
            if points:
                _line(axis, about["title"], points)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.minorticks_off()
        axis.set_xlabel(title)
    axes[0].set_ylabel("LDS, 95 % band over targets")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=130, metadata=metadata)
    plt.close(figure)
