"""From results to tables, a document, and the tables of a page."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import accuracy_choosing
from accuracy_judging import best_variants, ratio
from speed_tables import number, table

Row = dict[str, Any]
FIRST = (1, 2, 5, 10)


def with_interval(row: Row) -> str:
    low, high = row["interval"]
    return f"{row['lds']:.3f} [{low:.3f}, {high:.3f}]"


def truths_table(results: Row) -> str:
    rows = [
        (
            about["title"],
            f"{about['n']:,}",
            f"{about['m']:,}",
            f"{about['subsets']} x {about['repeats']}",
            number(about["training"]),
        )
        for about in results["truths"].values()
    ]
    head = ("truth", "`n`", "`m`", "judging retrainings", "minutes a training")
    return table(head, rows)


def _find(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def _upstream(rows: Sequence[Row], count: int) -> tuple[Row | None, Row | None]:
    """Find the LDS of 0.3.2's default and of its best setting, by itself or its formula."""
    default = _find(rows, name="traker 0.3.2", count=count)
    found = _find(rows, name="traker 0.3.2, float32, p chosen", count=count)
    found += _find(rows, name="traker's arithmetic", count=count)
    best = max(found + default, key=lambda row: row["lds"], default=None)
    if not default:
        default = [
            row
            for row in _find(rows, name="traker's arithmetic", count=count)
            if row["is_default"]
        ]
    return (default[0] if default else None), best


def versus_table(results: Row) -> str:
    """Lay out ours beside 0.3.2 at equal numbers of checkpoints."""
    lines = []
    for truth, about in results["truths"].items():
        rows = _find(results["rows"], truth=truth, label="")
        for count in FIRST:
            ours = _find(rows, name="TRAK", count=count)
            default, best = _upstream(rows, count)
            if not ours or best is None or default is None:
                continue
            one = ours[0]
            middle, low, high = ratio(one["per_target"], best["per_target"])
            label = best["variant"] or "default"
            by = "" if best["method"] == "theirs" else "*"
            lines.append((
                about["title"],
                str(count),
                with_interval(one),
                f"{best['lds']:.3f} ({label}){by}",
                f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                f"{default['lds']:.3f}{'' if default['method'] == 'theirs' else '*'}",
            ))
    if not lines:
        return ""
    head = ("truth", "checkpoints", "TRAK", "0.3.2 at its best `p`", "ratio", "default")
    note = (
        "\\* computed by the formula of 0.3.2 (undamped, float32, its rescaled inverse, "
        "dense signs) from our gradients, where 0.3.2 itself was not run."
    )
    return f"{table(head, lines)}\n\n{note}"


def methods_table(results: Row, truth: str) -> str:
    """Lay out every method at its largest number of models, and what it took."""
    rows = _find(results["rows"], truth=truth, label="")
    # What cross-validation chooses is what TRAK does by itself.
    rows = [row for row in rows if row["method"] != "grid"]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in best_variants(rows):
        groups[row["name"]].append(row)
    lines = []
    for name, group in groups.items():
        for row in _some(sorted(group, key=lambda row: row["count"])):
            chosen = f", {row['variant']} chosen on the truth" if row["chosen"] else ""
            part = f" (first {row['targets']} targets)" * (
                row["targets"] < results["truths"][truth]["m"]
            )
            lines.append((
                f"{name}{chosen}{part}",
                str(row["count"] or "-"),
                with_interval(row),
                number(row["minutes"]),
                number(row["scoring"]),
            ))
    head = ("method", "models", "LDS", "minutes", "of them not training")
    return table(head, lines)


def _some(rows: list[Row]) -> list[Row]:
    """Keep the first and the last, and the one of 5 checkpoints."""
    kept = {0, len(rows) - 1} | {i for i, row in enumerate(rows) if row["count"] == 5}
    return [rows[i] for i in sorted(kept)]


def validation_table(results: Row) -> str:
    lines = []
    for row in results.get("validation", []):
        low, high = row["interval"]
        a, b = row["exponents"]
        x, y, multiple = row["best"].split("_")
        lines.append((
            results["truths"][row["truth"]]["title"],
            str(row["count"]),
            f"{row['estimate']:.3f} [{low:.3f}, {high:.3f}]",
            f"{row['single']:.3f}",
            f"{row['lds']:.3f}",
            f"{row['multiple']:.3g}, ({a:g}, {b:g})",
            f"{multiple}, ({x}, {y})",
            f"{row['best_lds']:.3f}",
            f"{100 * row['lost']:.1f} %",
        ))
    head = (
        "truth",
        "checkpoints",
        "estimate",
        "LDS, one retraining",
        "LDS",
        "chosen",
        "best on the truth",
        "its LDS",
        "lost",
    )
    return table(head, lines) if lines else ""


def counterfactual_table(results: Row) -> str:
    lines = []
    known = [row for row in results["counterfactual"] if "wrong" not in row]
    for row in known:
        cells = [
            f"{mean:.2f} [{low:.2f}, {high:.2f}]"
            for mean, (low, high) in zip(row["mean"], row["interval"], strict=True)
        ]
        title = results["truths"][row["truth"]]["title"]
        lines.append((title, row["name"], *cells))
    head = ("truth", "removed by", "1 %", "2 %", "5 %", "10 %")
    if not lines:
        return ""
    row = known[0]
    note = (
        f"Fall of the margin; {row['targets']} targets, each removal retrained "
        f"{row['repeats']} times."
    )
    return f"{table(head, lines)}\n\n{note}"


def wrong_table(results: Row) -> str:
    """Lay out what removals do to targets of two classes, margins and labels."""
    rows = [row for row in results["counterfactual"] if "wrong" in row]
    lines = []
    for row in sorted(rows, key=lambda row: (row["truth"], row["ks"])):
        fall, low, high = row["mean"][0], *row["interval"][0]
        share = row["ks"][0] / row["n"]
        lines.append((
            row["title"],
            f"{share:.0%}",
            row["name"],
            f"{fall:.2f} [{low:.2f}, {high:.2f}]",
            *(
                "{:.0%} [{:.0%}, {:.0%}]".format(*row[part])
                for part in ("wrong", "before")
            ),
        ))
    if not lines:
        return ""
    head = ("truth", "removed", "by", "fall of the margin", "wrong label", "before")
    row = rows[0]
    note = (
        f"{row['targets']} targets, each removal retrained {row['repeats']} times. "
        f"*Wrong label* is the share of retrained models that give a target the other "
        f"label, *before* that of models from which nothing was removed."
    )
    return f"{table(head, lines)}\n\n{note}"


def sections(results: Row) -> dict[str, str]:
    """Write the parts of a run.

    Returns:
        Markdown by name; empty where there is nothing.
    """
    machine = "\n".join(f"- {name}: {v}" for name, v in results["machine"].items())
    found = {
        "machine": machine,
        "truths": truths_table(results),
        "versus": versus_table(results),
        "validation": validation_table(results),
        "counterfactual": counterfactual_table(results),
        "wrong": wrong_table(results),
    }
    for truth in results["truths"]:
        found[truth] = methods_table(results, truth)
    found |= accuracy_choosing.sections(results)
    found["failed"] = "\n".join(f"- {line}" for line in results["failed"])
    return found


def markdown(results: Row) -> str:
    """Write a run down.

    Returns:
        A Markdown document.
    """
    parts = ["# Accuracy"]
    for name, text in sections(results).items():
        if text:
            parts += [f"## {name.capitalize()}", text]
    return "\n\n".join(parts) + "\n"


def fill(page: str, results: Row) -> str:
    """Put tables between a page's marks ``<!-- accuracy:NAME -->`` and ``<!-- end -->``.

    Args:
        page: The page.
        results: A run.

    Returns:
        The page with the tables of the run.
    """
    found = sections(results)
    texts = {
        **found,
        "picture": "![LDS over minutes](accuracy.svg)",
        "curves": "![LDS over checkpoints, projected entries, damping](choosing.svg)",
    }
    methods = [
        f"### {about['title']}\n\n{found[truth]}"
        for truth, about in results["truths"].items()
    ]
    texts["methods"] = "\n\n".join(methods)

    def put(match: re.Match[str]) -> str:
        text = texts.get(match[2]) or "Not in this run."
        return f"{match[1]}\n\n{text}\n\n{match[3]}"

    pattern = r"(<!-- accuracy:(\w+) -->).*?(<!-- end -->)"
    return re.sub(pattern, put, page, flags=re.DOTALL)
