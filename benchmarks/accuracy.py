"""Attribution against retraining: every method, several truths, what each costs.

``python benchmarks/accuracy.py [--plan quick|default|full] [--truths ...] [--data DIR]``
trains the truths, or reads them, runs every method in a process of its own, and writes
``accuracy.json``, ``accuracy.md``, ``accuracy.svg`` and ``accuracy.png``. What is done is
not done again: a run may be killed and goes on. ``make accuracy`` installs both
environments first. ``--render FILE [--page PAGE]`` draws an earlier run again, and puts
its tables into a page and its picture beside it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accuracy_choosing
import torch
from accuracy_banks import MissingBankError, given, judges, ship
from accuracy_cells import CellError, Runner
from accuracy_counterfactual import counterfactual
from accuracy_data import FILES
from accuracy_judging import rows_of, validation
from accuracy_plan import MINUTES, Line, lines
from accuracy_plot import plot
from accuracy_report import fill, markdown, sections
from accuracy_truths import TRUTHS, Truth
from speed import proc_field, revision

import trak
from trak.evaluation import GroundTruth
from trak.modelout_functions import TASK_TO_MODELOUT

HERE = Path(__file__).parent
UPSTREAM = HERE.parent / ".venv-upstream" / "bin" / "python"
DEFAULT_TRUTHS = ("digits", "diabetes")
"""Those whose data come with scikit-learn."""


ON_REQUEST = ("rte", "sst2_top", "qnli_top", "rte_top")
"""Those that take hours, and are run where ``--truths`` names them."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", choices=MINUTES, default="default")
    parser.add_argument(
        "--truths",
        help="names with commas; else those that take no hours and whose data are there",
    )
    parser.add_argument("--data", type=Path, help="directory of data; see FILES")
    parser.add_argument("--work", type=Path, default=HERE / "results" / "accuracy")
    parser.add_argument("--banks", type=Path, help="checkpoints and retrainings")
    parser.add_argument("--as-stored", action="store_true", help="retrain nothing more")
    parser.add_argument("--retrain", action="store_true", help="train judges as well")
    parser.add_argument("--ship", action="store_true", help="only write small banks")
    parser.add_argument("--theirs", type=Path, default=UPSTREAM)
    parser.add_argument("--alone", action="store_true", help="leave traker out")
    parser.add_argument("--methods", help="of the methods, only these, with commas")
    parser.add_argument("--minutes", type=float, help="longest that a line may take")
    parser.add_argument("--judge", action="store_true", help="run nothing, judge again")
    parser.add_argument("--render", type=Path, help="results of an earlier run")
    parser.add_argument("--page", type=Path, help="page that takes their tables")
    return parser.parse_args(arguments)


def file_of(truth: str) -> str | None:
    """Name the file that a truth's data are in.

    Returns:
        Its name; None where they come with scikit-learn.

    Example:
        >>> file_of("cifar4"), file_of("digits")
        ('cifar10_jpeg60k.tar.xz', None)
    """
    data = truth.removesuffix("_top").removesuffix("_head")
    return FILES.get(data.rstrip("0123456789") if data.startswith("cifar") else data)


def choose(given: argparse.Namespace) -> Iterator[Truth]:
    """List the truths of a run, and say which are left out and why."""
    usual = [name for name in TRUTHS if name not in ON_REQUEST]
    names = given.truths.split(",") if given.truths else usual
    for name in names:
        wanted = file_of(name)
        if wanted and given.data is None:
            print(f"{name} is left out: pass --data, a directory with {wanted}")
            continue
        truth = replace(TRUTHS[name], root=given.data or Path())
        try:
            _ = truth.split
        except (FileNotFoundError, ImportError) as error:
            print(f"{name} is left out: it wants {wanted} ({error})")
            continue
        yield truth


def prepared(truth: Truth, runner: Runner, plan: str) -> Truth:
    """Train what is missing of a truth, less of it for the quick plan."""
    if plan == "quick":
        truth = replace(truth, n_checkpoints=5)
        truth = replace(truth, n_given=min(truth.n_given, 100))
    if runner.as_stored:
        if truth.n_given:
            try:
                bank = given(truth, runner.folder, as_stored=True)
                truth = replace(truth, n_given=bank.n_subsets)
            except MissingBankError:
                truth = replace(truth, n_given=0)
        return truth
    for _ in truth.checkpoints(runner.folder):
        pass
    if truth.n_given:
        given(truth, runner.folder, as_stored=False)
    return truth


def machine_of(plan: str) -> dict[str, str]:
    """Say what the figures were measured on and with."""
    return {
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
        "revision": revision(),
        "plan": plan,
        "processor": f"{proc_field('/proc/cpuinfo', 'model name')}, one thread of "
        f"{os.cpu_count()} cores",
        "load average": f"{os.getloadavg()[0]:.2f}",
        "trak": f"{trak.__version__}, torch {torch.__version__}",
    }


def measure(given: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    """Run what is missing and judge everything that is there."""
    results: dict[str, Any] = {"machine": machine_of(given.plan), "truths": {}}
    results |= {"rows": [], "failed": [], "counterfactual": []}
    for truth in choose(given):
        truth = prepared(truth, runner, given.plan)
        chosen = lines(truth.name, truth.n_checkpoints, truth.n_given, given.plan)
        if given.methods:
            kept = {"training", *given.methods.split(",")}
            chosen = [line for line in chosen if line.method in kept]
        one_truth(truth, chosen, runner, results, only_judge=given.judge)
        if not given.judge and (not given.methods or "counterfactual" in given.methods):
            counterfactual(truth, runner, given.plan)
        path = runner.cells / f"{truth.name}_counterfactual.json"
        if path.exists():
            results["counterfactual"] += json.loads(path.read_text())
        results["validation"] = validation(results["rows"])
        write(results, runner.work)
    return results


def judged_by(truth: Truth, runner: Runner) -> GroundTruth:
    """Read what judges a truth; train it where nothing else is there, or is wanted."""
    if runner.retrain:
        return judges(truth, runner.folder, as_stored=False)
    try:
        return judges(truth, runner.folder, as_stored=True)
    except MissingBankError:
        if runner.as_stored:
            raise
        return judges(truth, runner.folder, as_stored=False)


def one_truth(
    truth: Truth,
    chosen: list[Line],
    runner: Runner,
    results: dict[str, Any],
    *,
    only_judge: bool,
) -> None:
    """Run and judge the lines of a truth."""
    bank = judged_by(truth, runner)
    done = []
    for line in chosen:
        try:
            if not only_judge:
                runner.run(truth, line)
        except CellError as error:
            runner.say(f"  failed: {error}")
            text = f"{truth.name}, {line.name} {line.variant}".strip()
            results["failed"].append(f"{text}: {error}")
            continue
        if runner.is_done(truth, line):
            done.append(line)
        else:
            text = f"{truth.name}, {line.name} {line.variant}".strip()
            results["failed"].append(f"{text}: not run")
    training = runner.read(truth, Line("training", "training"))
    one, two = (training["steps"][count]["seconds"] for count in ("1", "2"))
    a_training = {kind: two[kind] - one[kind] for kind in one}
    for line in done:
        found = runner.read(truth, line)
        rows = rows_of(truth.name, line, found, bank, a_training)
        results["rows"] += rows
    results["truths"][truth.name] = {
        "title": truth.title,
        "n": truth.split.n,
        "m": truth.split.m,
        "subsets": bank.n_subsets,
        "repeats": bank.n_repeats,
        "training": a_training["cpu"] / 60,
        "exponents": list(TASK_TO_MODELOUT[truth.task].exponents),
        "checkpoints": truth.n_checkpoints,
    }


def write(results: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=None, separators=(",", ":"))
    (output / "accuracy.json").write_text(text + "\n")
    (output / "accuracy.md").write_text(markdown(results), encoding="utf-8")
    if results["rows"]:
        plot(results, [output / "accuracy.svg", output / "accuracy.png"])


def render(given: argparse.Namespace) -> None:
    results = json.loads(given.render.read_text())
    if given.page:
        page = given.page.read_text(encoding="utf-8")
        given.page.write_text(fill(page, results), encoding="utf-8")
        if "accuracy:picture" in page:
            plot(results, [given.page.with_name("accuracy.svg")])
        if "accuracy:curves" in page:
            accuracy_choosing.plot(results, [given.page.with_name("choosing.svg")])
    else:
        write(results, given.work)


def main() -> int:
    given = parse()
    if given.render:
        render(given)
        return 0
    theirs = None if given.alone or not given.theirs.exists() else given.theirs
    if theirs is None:
        print("traker 0.3.2 is left out; run `make accuracy`, or pass --theirs PYTHON")
    runner = Runner(
        data=given.data or Path(),
        folder=given.banks or given.work / "banks",
        work=given.work,
        theirs=theirs,
        limit=60 * (given.minutes or MINUTES[given.plan]),
        as_stored=given.as_stored,
        retrain=given.retrain,
        say=lambda line: print(line, flush=True),
    )
    if given.ship:
        for truth in choose(given):
            ship(judged_by(truth, runner), truth)
        return 0
    results = measure(given, runner)
    print("\n".join(f"\n{text}" for text in sections(results).values() if text))
    print(f"\nWritten to {given.work}/accuracy.json, .md, .svg and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
