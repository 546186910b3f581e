"""The speed benchmark: its arithmetic, its turns, and one run of the smallest size."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
MODULES = (
    "models",
    "plan",
    "turns",
    "cells",
    "tables",
    "scoring",
    "report",
    "plot",
    "worker",
    "saver",
)


@pytest.fixture(scope="module")
def speed():
    """The benchmark's modules; they are found as when it runs as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setenv("PYTHONPATH", str(ROOT))  # so that workers find this trak
        patch.setenv("OMP_NUM_THREADS", "1")
        modules = {name: importlib.import_module(f"speed_{name}") for name in MODULES}
        yield SimpleNamespace(main=importlib.import_module("speed"), **modules)


# -- models ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("mlp", 669_706), ("resnet9", 2_274_880), ("resnet18", 11_173_962)],
)
def test_models_have_the_stated_sizes(speed, name, size, tmp_path):
    made = speed.models.save_materials(name, 2, str(tmp_path / "materials.pt"))
    assert made == size
    loaded = torch.load(tmp_path / "materials.pt")
    model = speed.models.SUBJECTS[name].make()
    model.load_state_dict(loaded["weights"])
    speed.models.forward_backward(model.eval(), name, loaded["batches"][0])
    assert all(value.grad.abs().sum() > 0 for value in model.parameters())


def test_materials_are_the_same_every_time(speed, tmp_path):
    for path in ("one.pt", "other.pt"):
        speed.models.save_materials("mlp", 2, str(tmp_path / path))
    one, other = (torch.load(tmp_path / path) for path in ("one.pt", "other.pt"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.equal(one["batches"][0][0], one["batches"][1][0])


def test_margins_are_log_odds(speed):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 4, 2])
    p = logits.softmax(-1)[torch.arange(3), labels]
    torch.testing.assert_close(speed.models.margin(logits, labels), (p / (1 - p)).log())


def test_next_token_outputs_and_losses(speed):
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    ids = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 1]])
    p = logits.softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    losses = speed.models.next_token_losses(logits, ids)
    torch.testing.assert_close(losses, -p.log().sum(1))
    margins = speed.models.next_token_margins(logits, ids)
    torch.testing.assert_close(margins, (p / (1 - p)).log().sum(1))


def test_the_additive_mask_hides_what_the_mask_hides(speed):
    mask = torch.tensor([[1, 1, 0]])
    weights = (torch.zeros(1, 1, 3, 3) + speed.models.additive(mask)).softmax(-1)
    torch.testing.assert_close(
        weights, torch.tensor([0.5, 0.5, 0.0]).expand(1, 1, 3, 3)
    )


# -- turns ----------------------------------------------------------------------------


class Answers:
    """A worker that answers from a script and keeps what it was asked."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[dict[str, Any]] = []

    def ask(self, do: str, limit: float = 0.0, **named: Any) -> dict[str, Any]:
        self.asked.append({"do": do, **named})
        answer = self.answers[do]
        if isinstance(answer, Exception):
            raise answer
        return answer


def a_series(speed, name: str, expected: float, order: list[str], **answers: Any):
    class Worker(Answers):
        def ask(self, do: str, limit: float = 0.0, **named: Any) -> dict[str, Any]:
            order.append(name)
            return super().ask(do, limit, **named)

    worker = Worker(turn=answers.get("turn", {"wall": expected, "cpu": expected / 2}))
    return speed.turns.Series(name, worker, {"do": "turn"}, 4, expected)


def test_turns_alternate_and_turn_round(speed):
    order: list[str] = []
    steady = [a_series(speed, name, 1.0, order) for name in "ab"]
    slow = [a_series(speed, "z", 6.0, order)]
    speed.turns.interleave(steady, slow, budget=12.0, most=9)
    assert "".join(order) in {"abzbaab", "abbazab", "abbaabz"}
    assert steady[0].turns == [(k, 250.0, 125.0) for k in range(3)]


def test_at_least_one_slow_turn_and_three_steady_ones(speed):
    order: list[str] = []
    steady = [a_series(speed, "a", 100.0, order)]
    slow = [a_series(speed, "z", 1000.0, order)]
    speed.turns.interleave(steady, slow, budget=1.0, most=9)
    assert sorted(order) == ["a", "a", "a", "z"]


def test_a_series_that_fails_stops_and_says_why(speed):
    order: list[str] = []
    error = speed.turns.WorkerError("no more")
    one = a_series(speed, "a", 1.0, order, turn=error)
    speed.turns.interleave([one], [], budget=100.0, most=3)
    assert order == ["a"]
    assert speed.cells.described(one)["how"] == "failed: no more"


@pytest.mark.parametrize(
    ("rounds", "turns", "chosen"),
    [(3, 1, {1}), (5, 5, {0, 1, 2, 3, 4}), (9, 3, {1, 4, 7}), (2, 5, {0, 1})],
)
def test_slow_turns_are_spread_over_the_rounds(speed, rounds, turns, chosen):
    assert speed.turns.spread(rounds, turns) == chosen


def test_ratios_are_taken_within_rounds(speed):
    above, below = (a_series(speed, name, 1.0, []) for name in "ab")
    above.turns = [(0, 10.0, 1.0), (1, 90.0, 1.0), (2, 30.0, 1.0)]
    below.turns = [(0, 5.0, 1.0), (2, 10.0, 1.0)]
    assert speed.turns.ratio(above, below) == {
        "median": 2.5,
        "least": 2.0,
        "greatest": 3.0,
        "rounds": 2,
    }
    below.turns = []
    assert speed.turns.ratio(above, below) == {}


def test_short_calls_are_repeated(speed):
    assert speed.turns.calls_for(0.001, 0.1, 64) == 64
    assert speed.turns.calls_for(0.01, 0.1, 64) == 10
    assert speed.turns.calls_for(7.0, 0.1, 64) == 1


def test_a_worker_that_fails_ends_or_takes_too_long(speed, tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, time\n"
        'sys.stdin.readline(); print(\'{"error": "ValueError: 3"}\', flush=True)\n'
        "sys.stdin.readline(); sys.exit(7)\n"
    )
    monkeypatch.setattr(speed.turns, "WORKER", script)
    with speed.turns.Worker(sys.executable, 1, tmp_path) as worker:
        with pytest.raises(speed.turns.WorkerError, match="ValueError: 3"):
            worker.ask("one")
        with pytest.raises(speed.turns.WorkerError, match="ended in two with status 7"):
            worker.ask("two")
        with pytest.raises(speed.turns.WorkerError, match="ended in three"):
            worker.ask("three")
    script.write_text("import sys\nsys.stdin.read()\n")
    late = pytest.raises(speed.turns.WorkerError, match="stopped after 0 s in one")
    with speed.turns.Worker(sys.executable, 1, tmp_path) as worker, late:
        worker.ask("one", limit=0.01)


# -- cells ----------------------------------------------------------------------------

PARTS = {
    name: {"wall": seconds, "cpu": 2 * seconds}
    for name, seconds in {
        "gradients": 1.0,
        "flatten": 0.5,
        "two blocks": 0.2,
        "out-to-loss": 0.05,
    }.items()
}
GRAM = [[4.0, 0.0], [0.0, 4.0]]


def test_a_whole_call_from_its_parts(speed):
    assert speed.cells.whole_call({"parts": PARTS}, 200) == pytest.approx((1.75, 3.5))
    # 512 columns are 6 blocks, 2048 are 21.
    assert speed.cells.whole_call({"parts": PARTS}, 512)[0] == pytest.approx(2.15)
    assert speed.cells.whole_call({"parts": PARTS}, 2048)[0] == pytest.approx(3.65)


def a_cell(speed, tmp_path, *, cap=1e9, real=False, d=10, theirs="python"):
    plan = speed.plan.Plan((), (), (), budget=10.0, cap=cap, rounds=3, turn=0.0)
    bench = speed.cells.Bench("python", theirs, tmp_path, plan)
    bench.made["mlp-2.pt"] = {"path": "nowhere", "d": d}
    cell = speed.plan.Featurize("mlp", 2, 512, real=real)
    return speed.cells.FeaturizeCell(bench, cell)


def traker(**answers: Any) -> Answers:
    time = {"wall": 0.1, "cpu": 0.1}
    usual = {
        "load": {"peak": 1.0, "again": time},
        "open": {"peak": 2.0, "again": time},
        "parts": {"parts": PARTS, "peak": 3.0},
        "gram": {"gram": GRAM},
    }
    return Answers(**{**usual, **answers})


def opened(worker: Answers) -> list[tuple[int, bool]]:
    asked = [one for one in worker.asked if one["do"] == "open"]
    return [(one["p"], one.get("warm", True)) for one in asked]


def test_what_is_fast_enough_is_measured_whole(speed, tmp_path):
    run, worker = a_cell(speed, tmp_path, cap=3.0), traker()
    run.prepare_theirs(worker)
    assert opened(worker) == [(200, True), (512, True)]
    assert run.steady[-1].request == {"do": "turn", "what": "featurize", "times": 1}
    assert "how" not in run.about["theirs"]
    assert run.grams == [(GRAM, 512)]


def test_what_is_too_slow_is_extrapolated_and_says_so(speed, tmp_path):
    run, worker = a_cell(speed, tmp_path, cap=2.0), traker()
    run.prepare_theirs(worker)
    assert opened(worker) == [(200, True)]
    assert run.about["theirs"] == {"how": "extrapolated", "peak": 3.0}
    run.slow[0].turn(0)
    assert run.slow[0].turns == [(0, pytest.approx(1075.0), pytest.approx(2150.0))]
    assert run.grams == [(GRAM, 200)]


def test_what_must_be_real_is_run_once_warm(speed, tmp_path):
    run, worker = a_cell(speed, tmp_path, cap=2.0, real=True), traker()
    run.prepare_theirs(worker)
    assert opened(worker) == [(200, True), (512, False)]
    assert [one.name for one in run.slow] == ["theirs"]
    assert run.slow[0].request["what"] == "featurize"


def test_what_does_not_fit_is_not_tried(speed, tmp_path):
    run, worker = a_cell(speed, tmp_path, d=10**13), traker()
    run.prepare_theirs(worker)
    assert not worker.asked
    assert run.found["theirs"]["how"].startswith("does not fit: its projection block")


def test_what_fails_says_why(speed, tmp_path):
    run = a_cell(speed, tmp_path)
    run.prepare_theirs(traker(open=speed.turns.WorkerError("RuntimeError: vmap")))
    assert run.found["theirs"] == {"how": "failed: RuntimeError: vmap", "turns": []}


def test_rows_are_bounded(speed, tmp_path):
    run = a_cell(speed, tmp_path)
    calls, n = run.rows()
    assert calls == 64
    assert n == 2 * (3 + 64 * 3)
    run.cell = speed.plan.Featurize("mlp", 128, 16384)
    calls, n = run.rows()
    assert n * 16384 * 4 <= speed.cells.STORE


def test_inner_products_of_both_sides_are_compared(speed, tmp_path):
    run = a_cell(speed, tmp_path)
    assert run.compare() == {}
    double = [[2 * x for x in row] for row in GRAM]
    run.grams = [(GRAM, 100), (double, 200)]
    assert run.compare()["difference"] == 0  # the sketches are of other sizes
    run.grams = [(GRAM, 100), (double, 100)]
    assert run.compare()["difference"] == pytest.approx(math.sqrt(2) / 2)
    assert run.compare()["chance"] == pytest.approx(0.2)


# -- report ---------------------------------------------------------------------------


def a_result(**changed: Any) -> dict[str, Any]:
    def timed(ms: float, how: str = "measured") -> dict[str, Any]:
        turns = [[k, ms, ms / 1.1] for k in range(3)]
        return {"how": how, "note": "", "peak": 10 * ms, "turns": turns}

    times = {"median": 2.0, "least": 1.5, "greatest": 2.5, "rounds": 3}
    cell = {
        "kind": "featurize",
        "model": "mlp",
        "d": 669_706,
        "b": 32,
        "p": 512,
        "threads": 1,
        "half": False,
        "series": {
            "floor": timed(1.0),
            "ours": timed(2.0),
            "theirs": timed(2345.6, "extrapolated"),
        },
        "ratios": {"ours / floor": {"wall": times, "cpu": times}},
        "grams": {"difference": 0.1, "chance": 0.1},
    }
    return {**cell, **changed}


def test_numbers_have_three_digits(speed):
    values = [0.04567, 0.9999, 1.234, 45.67, 99.94, 1234.5, math.nan]
    assert [speed.tables.number(value) for value in values] == [
        "0.046",
        "1.00",
        "1.23",
        "45.7",
        "99.9",
        "1,234",
        "-",
    ]


def test_a_table_marks_what_is_extrapolated(speed):
    line = speed.tables.featurize_table([a_result()]).splitlines()[2]
    assert "| ≈ 2,346 |" in line
    assert "| 2.00 (1.50-2.50) |" in line
    without = a_result()
    without["series"]["theirs"] = {"how": "does not fit: 9 GiB", "turns": []}
    line = speed.tables.featurize_table([without]).splitlines()[2]
    assert "| does not fit |" in line
    line = speed.tables.featurize_table([a_result()], "cpu").splitlines()[2]
    assert "| 0.909 | 1.82 | ≈ 2,132 |" in line
    line = speed.tables.memory_table([a_result()]).splitlines()[2]
    assert line.endswith("| 669,706 | 10.0 | 20.0 | 23,456 |")


def test_exponents_are_slopes(speed):
    assert speed.report.fit([(1, 5), (10, 50), (100, 500)]) == pytest.approx(1)
    cells = [a_result(), a_result(p=2048)]
    cells[1]["series"]["theirs"]["turns"] = [[0, 4 * 2345.6, 1.0]]
    found = speed.report.all_exponents(cells)
    assert [(one["along"], one["sizes"]) for one in found] == [("p", [512, 2048])]
    assert found[0]["exponents"] == pytest.approx({"floor": 0, "ours": 0, "theirs": 1})
    assert "theirs 1.00" in speed.report.exponent_table(found)


STEP = {"n": 400, "p": 64, "m": 8, "checkpoints": 1, "name": "finalize"}
STEP |= {"seconds": 3.0, "floor": 2.0, "plain": 4.0, "memory": 0.5}
SCORED = {
    "kind": "score",
    "machine": {"threads": 2},
    "steps": [{**STEP, "ratios": {"floor": [1.5], "plain": [0.75]}}],
    "exponents": {"n": {"finalize": 0.98}},
}


def test_scoring_has_the_tables_of_the_rest(speed):
    line = speed.scoring.scoring_table([SCORED]).splitlines()[2]
    assert line == ("| 400 | 64 | 8 | 1 | 2 | finalize | 3.00 | 1.50 | 0.750 | 0.500 |")
    (found,) = speed.report.all_exponents([SCORED])
    assert (found["along"], found["sizes"]) == ("n", [100, 200, 400])
    assert speed.main.outline(SCORED) == "finalize / floor 1.5"
    assert speed.report.warnings({"cells": [SCORED]}) == []


def test_scoring_that_fails_says_why(speed, monkeypatch, tmp_path):
    script = tmp_path / "scoring.py"
    script.write_text("raise SystemExit('no room')")
    monkeypatch.setattr(speed.scoring, "SCRIPT", script)
    with pytest.raises(speed.turns.WorkerError, match="failed: no room"):
        speed.scoring.run_scoring(speed.plan.Score(10), tmp_path)
    script.write_text(
        "import json, pathlib, sys\n"
        "path = sys.argv[sys.argv.index('--json') + 1]\n"
        f"step = {STEP!r}\n"
        "step['arguments'] = sys.argv[1:]\n"
        "pathlib.Path(path).write_text(json.dumps({'steps': [step]}))\n"
    )
    score = speed.plan.Score(10, exponents=True)
    found = speed.scoring.run_scoring(score, tmp_path)
    assert found["kind"] == "score"
    (step,) = found["steps"]
    assert "--exponents" in step["arguments"]
    assert step["ratios"] == {"floor": [1.5], "plain": [0.75]}


def test_rounds_of_scoring_are_put_together(speed):
    rounds = [{**STEP, "seconds": seconds} for seconds in (6.0, 2.0, 3.0)]
    step = speed.scoring.joined(rounds)
    assert (step["seconds"], step["n"]) == (3.0, STEP["n"])
    assert speed.scoring.spread(step["ratios"]["floor"]) == "1.50 (1.00-3.00)"


def test_other_work_and_failures_are_reported(speed):
    cell = a_result(grams={"difference": 1.0, "chance": 0.1})
    cell["series"]["theirs"] = {"how": "failed: vmap", "turns": []}
    cell["series"]["ours"]["turns"] = [[0, 2.0, 1.0]]
    cell["series"]["floor"]["turns"] = [[0, 2.0, 1.0]]
    found = speed.report.warnings({"cells": [cell]})
    assert [line.split(": ", 1)[1] for line in found] == [
        "inner products differ by 1 of the trace, chance is 0.1: not the same work.",
        "theirs: failed: vmap",
        "wall time was 2.0 times processor time, so other work ran beside it.",
    ]
    assert speed.report.warnings({"cells": [a_result()]}) == []


def test_a_page_is_filled_again_and_again(speed):
    results = {"machine": {"cores": "2"}, "cells": [], "exponents": []}
    page = "a\n<!-- speed:machine -->\nold\n<!-- end -->\nb\n<!-- speed:store -->\n<!-- end -->"
    once = speed.report.fill(page, results)
    assert "\n- cores: 2\n" in once
    assert "old" not in once
    assert "Not in this run." in once
    assert speed.report.fill(once, results) == once


def test_the_page_has_a_place_for_every_table(speed):
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    results = {"machine": {}, "cells": [], "exponents": []}
    for name in speed.report.sections(results):
        assert f"<!-- speed:{name} -->" in page


# -- a run ----------------------------------------------------------------------------


def test_the_smallest_run_of_ours_alone(speed, tmp_path):
    plan = speed.plan.Plan(
        featurize=(speed.plan.Featurize("mlp", 3, 64, in_memory=True),),
        project=(speed.plan.Project(50, 3, 16),),
        score=(),
        budget=0.1,
        cap=1.0,
        rounds=2,
        turn=0.0,
    )
    bench = speed.cells.Bench(sys.executable, None, tmp_path, plan)
    lines: list[str] = []
    kept: list[int] = []
    results = speed.main.measure(
        bench,
        ["featurize", "project", "score"],
        lines.append,
        lambda results: kept.append(len(results["cells"])),
    )
    assert not results["failed"], lines
    assert kept == [1, 2]
    results = json.loads(json.dumps(results))
    featurized, projected = results["cells"]
    assert featurized["series"]["theirs"] == {"how": "left out", "turns": []}
    for name in ("ours", "ours in memory", "floor"):
        series = featurized["series"][name]
        assert [turn[0] for turn in series["turns"]] == [0, 1]
        assert series["peak"] > 0
    assert featurized["ratios"]["ours / floor"]["wall"]["rounds"] == 2
    assert any(name.startswith("ours sparse") for name in projected["series"])
    results["cells"].append(SCORED)
    speed.main.write(results, tmp_path / "results")
    text = (tmp_path / "results" / "speed.md").read_text(encoding="utf-8")
    assert "| MLP 784-512-512-10 | 3 | 64 | 1 |" in text
    assert (tmp_path / "results" / "speed.svg").stat().st_size > 1000
    assert not list(tmp_path.glob("speed-*")), "a store was left behind"


def test_a_cell_that_fails_does_not_end_the_run(speed, monkeypatch):
    def tasks(bench: Any, only: list[str]) -> Any:
        def fail() -> dict[str, Any]:
            raise speed.turns.WorkerError("the process ended")

        yield "first", fail
        yield "second", a_result

    monkeypatch.setattr(speed.main, "tasks", tasks)
    monkeypatch.setattr(speed.main, "machine", lambda bench: {"cores": "2"})
    results = speed.main.measure(None, [], lambda line: None, lambda results: None)
    assert results["failed"] == ["first: the process ended"]
    assert len(results["cells"]) == 1
    assert speed.report.warnings(results) == ["failed: first: the process ended"]


def test_the_environment_must_have_the_right_version(speed, tmp_path):
    plan = speed.plan.Plan((), (), (), budget=0.1, cap=1.0, rounds=1)
    bench = speed.cells.Bench(sys.executable, sys.executable, tmp_path, plan)
    with pytest.raises(speed.turns.WorkerError, match=r"not traker 0\.3\.2"):
        speed.main.machine(bench)


def test_the_script_asks_for_the_other_environment(speed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--theirs", "/nowhere/python"])
    assert speed.main.main() == 1
    assert "run `make bench`, or pass --alone" in capsys.readouterr().out
    assert os.environ["OMP_NUM_THREADS"] == "1"
