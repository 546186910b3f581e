"""Time trak against traker 0.3.2 and against a plain forward and backward pass.

``python benchmarks/speed.py [--plan quick|default|full] [--theirs PYTHON] [--only ...]``
makes a process for each library, lets them take turns on the same weights and batches,
and writes ``speed.json``, ``speed.md``, ``speed.svg`` and ``speed.png``. ``make bench``
installs both environments first. ``--render FILE [--page PAGE]`` draws an earlier run
again, and puts its tables into a page and its picture beside it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from speed_cells import Bench, FeaturizeCell, run_project
from speed_plan import PLANS
from speed_plot import plot
from speed_report import all_exponents, fill, markdown, sections
from speed_scoring import run_scoring
from speed_turns import WorkerError

HERE = Path(__file__).parent
ROOT = HERE.parent
PARTS = ("featurize", "project", "score")
UPSTREAM = ROOT / ".venv-upstream" / "bin" / "python"


def revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def proc_field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return "unknown"


def machine(bench: Bench) -> dict[str, str]:
    """Say what the figures were measured on and with."""
    memory = int(proc_field("/proc/meminfo", "MemTotal").split()[0]) / 2**20
    with bench.workers(1) as pair:
        hellos = [worker.ask("hello") for worker in pair if worker is not None]
    return {
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
        "revision": revision(),
        "processor": f"{proc_field('/proc/cpuinfo', 'model name')}, "
        f"{os.cpu_count()} cores, {memory:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}, Python "
        f"{platform.python_version()}",
        "load average at the start": f"{os.getloadavg()[0]:.2f}",
        **{
            one["library"]: f"{one['version']}, torch {one['torch']}"
            + (f", back ends {', '.join(one['backends'])}" if one["backends"] else "")
            for one in hellos
        },
    }


def tasks(
    bench: Bench, only: list[str]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """List the cells of a plan.

    Yields:
        What is run, and how.
    """
    if "featurize" in only:
        for cell in bench.plan.featurize:
            yield str(cell), lambda cell=cell: FeaturizeCell(bench, cell).run()
    if "project" in only:
        for cell in bench.plan.project:
            yield str(cell), lambda cell=cell: run_project(bench, cell)
    if "score" in only:
        for cell in bench.plan.score:
            yield str(cell), lambda cell=cell: run_scoring(cell, bench.directory)


def measure(
    bench: Bench,
    only: list[str],
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run a plan.

    Args:
        bench: Where and how long.
        only: Which parts.
        say: Takes a line about what is going on.
        keep: Takes what is there after every cell, so that a run can be cut short.

    Returns:
        Everything that was found, as plain data.
    """
    results: dict[str, Any] = {"machine": machine(bench), "failed": []}
    results |= {"cells": [], "exponents": []}
    for line in results["machine"].items():
        say("{}: {}".format(*line))
    begin = time.perf_counter()
    for title, run in tasks(bench, only):
        started = time.perf_counter()
        say(title)
        try:
            found = run()
        except WorkerError as error:
            say(f"  failed: {error}")
            results["failed"].append(f"{title}: {error}")
            continue
        results["cells"].append(found)
        results["exponents"] = all_exponents(results["cells"])
        say(f"  {outline(found)}")
        now = time.perf_counter()
        say(f"  [{now - started:.0f} s]")
        results["machine"]["seconds"] = f"{now - begin:.0f}"
        keep(results)
    return results


def outline(cell: dict[str, Any]) -> str:
    if cell["kind"] == "score":
        found = [
            f"{step['name']} / floor {step['seconds'] / step['floor']:.3g}"
            for step in cell["steps"]
        ]
        return "; ".join(found)
    found = []
    for name, one in cell["ratios"].items():
        if one["wall"]:
            wall, cpu = one["wall"]["median"], one["cpu"]["median"]
            found.append(f"{name} {wall:.3g} ({cpu:.3g} by processor time)")
    return "; ".join(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", choices=PLANS, default="default")
    for name in ("quick", "full"):
        parser.add_argument(f"--{name}", dest="plan", action="store_const", const=name)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", help="of the models, only these")
    parser.add_argument("--theirs", default=str(UPSTREAM), help="Python with traker")
    parser.add_argument("--alone", action="store_true", help="leave traker out")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--show", action="store_true", help="show workers' messages")
    parser.add_argument("--render", type=Path, help="results of an earlier run")
    parser.add_argument("--page", type=Path, help="page that takes their tables")
    return parser.parse_args()


def write(results: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "speed.md").write_text(markdown(results), encoding="utf-8")
    if results["cells"]:
        plot(results, [output / "speed.svg", output / "speed.png"])


def main() -> int:
    given = parse()
    if given.render:
        results = json.loads(given.render.read_text())
        if given.page:
            page = given.page.read_text(encoding="utf-8")
            given.page.write_text(fill(page, results), encoding="utf-8")
            plot(results, [given.page.with_name("speed.svg")])
        write(results, given.output)
        return 0
    theirs = None if given.alone else given.theirs
    if theirs and not Path(theirs).exists():
        print(f"{theirs} does not exist; run `make bench`, or pass --alone.")
        return 1
    plan = PLANS[given.plan]
    if given.models:
        kept = tuple(cell for cell in plan.featurize if cell.model in given.models)
        plan = replace(plan, featurize=kept)
    with tempfile.TemporaryDirectory(prefix="speed-") as directory:
        bench = Bench(sys.executable, theirs, Path(directory), plan, given.show)
        results = measure(
            bench,
            given.only,
            lambda line: print(line, flush=True),
            lambda results: write(results, given.output),
        )
    print("\n".join(f"\n{text}" for text in sections(results).values() if text))
    print(f"\nWritten to {given.output}/speed.json, .md, .svg and .png")
    return int(bool(results["failed"]))


if __name__ == "__main__":
    sys.exit(main())
