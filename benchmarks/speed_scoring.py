"""Finalizing and scoring, measured by ``scoring.py`` in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from speed_plan import Score
from speed_tables import number, table
from speed_turns import WorkerError

SCRIPT = Path(__file__).with_name("scoring.py")


def run_scoring(cell: Score, directory: Path) -> dict[str, Any]:
    """Measure one size.

    Args:
        cell: The size.
        directory: For the store and the figures.

    Returns:
        What ``scoring.py`` found.

    Raises:
        WorkerError: If it fails.
    """
    found = [measured(cell, directory) for _ in range(cell.rounds)]
    steps = [joined(same) for same in zip(*(it["steps"] for it in found), strict=True)]
    return {"kind": "score", **found[0], "steps": steps}


def measured(cell: Score, directory: Path) -> dict[str, Any]:
    """Measure a size once; the arguments and errors are those of `run_scoring`."""
    path = directory / "scoring.json"
    command = [sys.executable, str(SCRIPT), "--n", str(cell.n), "--p", str(cell.p)]
    command += ["--m", str(cell.m), "--k", str(cell.k)]
    command += ["--checkpoints", str(cell.checkpoints)]
    command += ["--dir", str(directory), "--json", str(path)]
    command += ["--exponents"] * cell.exponents
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        raise WorkerError(f"{SCRIPT.name} failed: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def joined(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the rounds of a step together: medians, and the ratios of every round."""
    middle = {
        name: statistics.median(it[name] for it in rounds)
        for name in ("seconds", "floor", "plain")
    }
    memory = max(it["memory"] for it in rounds)
    ratios = {
        name: sorted(it["seconds"] / it[name] for it in rounds)
        for name in ("floor", "plain")
    }
    return {**rounds[0], **middle, "memory": memory, "ratios": ratios}


def spread(ratios: Sequence[float]) -> str:
    """Give the median of sorted ratios, with the least and the greatest if several."""
    text = number(statistics.median(ratios))
    if len(ratios) > 1:
        text += f" ({number(ratios[0])}-{number(ratios[-1])})"
    return text


def scoring_table(cells: Iterable[dict[str, Any]]) -> str:
    """Lay out the steps of all sizes.

    Returns:
        A table; empty where there are none.
    """
    rows = [
        (
            f"{step['n']:,}",
            str(step["p"]),
            f"{step['m']:,}",
            str(step["checkpoints"]),
            str(cell["machine"]["threads"]),
            step["name"],
            number(step["seconds"]),
            spread(step["ratios"]["floor"]),
            spread(step["ratios"]["plain"]),
            number(step["memory"]),
        )
        for cell in cells
        for step in cell["steps"]
    ]
    head = ("`n`", "`p`", "`m`", "checkpoints", "threads", "step", "seconds")
    head += ("/ least products", "/ full products", "GB")
    return table(head, rows) if rows else ""


def scoring_exponents(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the fits of ``scoring.py`` the form of the others.

    Returns:
        As `speed_report.exponents`.
    """
    found = []
    for cell in cells:
        for along, by_step in cell.get("exponents", {}).items():
            largest = cell["steps"][0]
            others = [f"{k}={largest[k]:,}" for k in ("n", "p", "m") if k != along]
            sizes = [largest[along] // part for part in (4, 2, 1)]
            what = f"finalize and score, {' '.join(others)}"
            found.append({
                "what": what,
                "along": along,
                "sizes": sizes,
                "exponents": by_step,
            })
    return found
