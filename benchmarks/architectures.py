"""The matrix of architectures: which way serves each model's gradients, and how exactly.

Small models with random weights, of the classes that large ones have, on padded texts, with
their default attention. The gradients of the default engine are compared with those of a
loop over the examples in float64.

    python benchmarks/architectures.py
    python benchmarks/architectures.py --only T5 BART --page docs/architectures.md

It writes ``architectures.json`` into ``--results``, and the table between the marks of
``--page``. Models whose library is not installed are left out, and said to be.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from architectures_models import (
    ARCHITECTURES,
    Architecture,
    engine_gradients,
    loop_gradients,
)

from trak.errors import TrakWarning
from trak.gradient_computers._ladder import HOOKED, Rung

ROOT = Path(__file__).parents[1]
COLUMNS = {
    Rung.LAYER: "layer rules",
    Rung.COPIES: "copies",
    Rung.MODULE: "run again",
    Rung.FOLLOWED: "followed",
    Rung.VMAP: "vmap",
    Rung.LOOP: "loop",
}
"""The ways, as the table's columns name them."""


def measured(it: Architecture) -> dict[str, Any]:
    """Compute a line of the table."""
    known, widest = loop_gradients(it)
    dtype = it.dtype if widest == torch.float64 else widest
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, computer = engine_gradients(it, dtype)
    coverage = computer.coverage
    return {
        "title": it.title,
        "class": it.kind,
        "task": it.task,
        "engine": type(computer).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "d": known.shape[1],
        "error": float((found - known).abs().max() / known.abs().max()),
        "shares": {rung.name: coverage.share(rung) for rung in Rung},
        "slow": sorted(n for n, r in coverage.rungs.items() if r not in HOOKED),
        "warnings": [
            str(it.message) for it in caught if issubclass(it.category, TrakWarning)
        ],
    }


def versions() -> dict[str, str]:
    """Say what the figures were made with."""
    found = {"python": platform.python_version(), "processor": processor()}
    for name in ("torch", "transformers", "open_clip_torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor() -> str:
    """Name the processor, if the system does."""
    info = Path("/proc/cpuinfo")
    names = (
        re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    )
    return names[0] if names else platform.processor()


def line_of(row: dict[str, Any]) -> str:
    """Format a line of the table."""
    cells = [row["title"], f"`{row['class']}`", f"`{row['task']}`"]
    if "absent" in row:
        return "| " + " | ".join([*cells, *["" for _ in COLUMNS], row["absent"]]) + " |"
    for rung in COLUMNS:
        share = 100 * row["shares"][rung.name]
        said = f"{share:.1f} %" if share >= 0.1 else "< 0.1 %"
        cells.append(said if share else "")
    error = f"{row['error']:.0e}" if row["error"] else "0"
    cells.append(f"{error} ({row['dtype']})")
    return "| " + " | ".join(cells) + " |"


def table_of(rows: list[dict[str, Any]]) -> str:
    """Format the table."""
    head = ["family", "class", "task", *COLUMNS.values(), "greatest error"]
    rule = "| " + " | ".join("---" for _ in head) + " |"
    return "\n".join(["| " + " | ".join(head) + " |", rule, *map(line_of, rows)])


def put(page: Path, name: str, text: str) -> None:
    """Put a text between a page's marks."""
    pattern = rf"(<!-- architectures:{name} -->).*?(<!-- end -->)"
    found, count = re.subn(
        pattern,
        lambda match: f"{match[1]}\n\n{text}\n\n{match[2]}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{page} has {count} places for {name}")
    page.write_text(found)


def rows_of(only: list[str]) -> list[dict[str, Any]]:
    """Compute the lines whose titles begin with one of some words, or all."""
    rows = []
    for it in ARCHITECTURES:
        if only and not it.title.startswith(tuple(only)):
            continue
        if absent := it.absence():
            row = {"title": it.title, "class": it.kind, "task": it.task}
            rows.append({**row, "absent": absent})
        else:
            rows.append(measured(it))
        print(line_of(rows[-1]), flush=True)
        for warning in rows[-1].get("warnings", []):
            print("   ", warning)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of families")
    parser.add_argument("--page", type=Path, help="a page to put the table in")
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--results", type=Path, default=results)
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = versions()
    said = ", ".join(f"{name} {version}" for name, version in made.items())
    print(said)
    rows = rows_of(options.only)
    options.results.mkdir(parents=True, exist_ok=True)
    written = json.dumps({"versions": made, "rows": rows}, indent=1)
    (options.results / "architectures.json").write_text(written + "\n")
    if options.page:
        put(options.page, "table", table_of(rows))
        put(options.page, "versions", said)


if __name__ == "__main__":
    main()
