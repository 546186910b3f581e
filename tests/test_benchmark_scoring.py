"""The benchmark of scoring measures what it says, on stores that are whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scoring

    monkeypatch.setattr(scoring, "ROWS", 16)
    return scoring


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("n", [40, 6])
def test_steps_of_a_small_job(scoring: Any, tmp_path: Path, n: int, half: bool) -> None:
    size = scoring.Size(n, p=8, m=3, checkpoints=2, k=4, half=half, scale=1e-5)
    steps = scoring.measure(size, tmp_path)
    names = [step.name for step in steps]
    assert names == ["finalize", "top-k", "self-influence", "finalize + top-k"]
    assert all(np.isfinite(step.ratio) for step in steps)
    # The store is one that can be scored: its best are those of the whole matrix.
    traker = scoring.open_traker(size, tmp_path)
    scores = traker.finalize_scores("bench")
    top = traker.top_k("bench", 4)
    np.testing.assert_array_equal(np.sort(scores, axis=0)[::-1][:4].T, top.scores)
    assert traker.reports[0].zero_rows == 0


def test_the_command_prints_a_table_and_writes_figures(
    scoring: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, threads = tmp_path / "figures.json", str(torch.get_num_threads())
    sizes = ["--n", "20", "40", "--p", "8", "--m", "8", "--k", "2"]
    options = ["--exponents", "--threads", threads, "--json", str(path)]
    monkeypatch.setattr(
        sys, "argv", ["scoring.py", *sizes, *options, "--dir", str(tmp_path)]
    )
    scoring.main()
    printed = capsys.readouterr().out
    assert printed.count("| self-influence |") == 2
    assert "growth with m: finalize" in printed
    figures = json.loads(path.read_text())
    assert figures["machine"]["threads"] == int(threads)
    assert len(figures["steps"]) == 8
    assert {*figures["exponents"]} == {"n", "p", "m"}
    assert [*tmp_path.iterdir()] == [path]
