"""Estimates against what then happens, and that making one changes nothing."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import problems
import pytest
import torch

import trak
from trak import TRAKer
from trak._estimate_table import Estimate, Stage
from trak._probes import measure_activations, untouched
from trak.errors import BatchError, OptionError, UnknownTaskError
from trak.gradient_computers import IterativeGradientComputer
from trak.modelout_functions import resolve_task
from trak.projectors import BasicProjector, NoOpProjector


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def assert_within(actual: int, estimated: int, share: float = 0.15) -> None:
    assert abs(estimated - actual) <= share * actual, (estimated, actual)


# -- disk -------------------------------------------------------------------------------

DISK: list[dict[str, Any]] = [
    {"n": 11, "m": 4, "p": 7, "c": 1, "half": False},
    {"n": 40, "m": 3, "p": 64, "c": 2, "half": True},
    {"n": 300, "m": 50, "p": 16, "c": 3, "half": True},
    {"n": 64, "m": 1, "p": 64, "c": 1, "half": False},
    {"n": 200, "m": 120, "p": 256, "c": 1, "half": True},
]


@pytest.mark.parametrize("size", DISK, ids=lambda s: "-".join(map(str, s.values())))
def test_disk_of_every_stage(size: dict[str, Any], tmp_path: Path) -> None:
    problem = problems.PROBLEMS["mlp"](n=size["n"], m=size["m"], checkpoints=size["c"])
    options = {"proj_dim": size["p"], "use_half_precision": size["half"]}
    traker = problems.make(problem, tmp_path / "store", **options)
    sizes = {"num_targets": size["m"], "num_checkpoints": size["c"]}
    args = (problem.model, problem.task, size["n"])
    expected = traker.estimate(**sizes)
    without = trak.estimate(*args, **sizes, **options)
    assert_within(without.total.disk, expected.total.disk, 0.02)  # another save_dir
    found = [0]

    def stage() -> int:
        found.append(on_disk(tmp_path))
        return found[-1] - found[-2]

    problems.featurize(traker, problem)
    assert_within(stage(), expected.featurize.disk)
    traker.finalize_features()
    assert_within(stage(), expected.finalize_features.disk)
    problems.score(traker, problem)
    both = expected.score.disk + expected.finalize_scores.disk
    assert_within(stage(), both)
    assert_within(found[-1], expected.total.disk, 0.02)


def test_top_k_writes_nothing(tmp_path: Path) -> None:
    problem = problems.PROBLEMS["mlp"](n=200, m=150)
    traker = problems.make(problem, tmp_path / "store", proj_dim=8)
    expected = traker.estimate(num_targets=150)
    problems.featurize(traker, problem)
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", problem.checkpoints[0], 0, 150)
    traker.score(problem.targets)
    before = on_disk(tmp_path)
    traker.top_k("exp")
    assert on_disk(tmp_path) == before
    assert expected.top_k.disk == 0
    assert_within(before, expected.total_top_k.disk, 0.02)
    assert expected.total.disk > expected.total_top_k.disk + 4 * 200 * 150
