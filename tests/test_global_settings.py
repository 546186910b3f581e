"""What a program sets globally does not reach the scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.problems import classification, featurize, make, mlp
from trak.score_computers import BasicSingleBlockScoreComputer


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "another device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("p", [7, 30])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_global_settings_do_not_reach_the_scores(
    tmp_path: Path, setting: type[AbstractContextManager[None]], p: int, single: bool
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    computer = BasicSingleBlockScoreComputer if single else None
    results = []
    for name in ("plain", "set"):
        traker = make(problem, tmp_path / name, proj_dim=p, score_computer=computer)
        featurize(traker, problem)
        with setting() if name == "set" else torch.no_grad():
            traker.finalize_features()
        for model_id, checkpoint in enumerate(problem.checkpoints):
            traker.start_scoring_checkpoint("exp", checkpoint, model_id, problem.m)
            traker.score(problem.targets)
        with setting() if name == "set" else torch.no_grad():
            scores = traker.finalize_scores("exp")
            top = traker.top_k("exp", 3)
            own = np.zeros(0) if single else traker.self_influence()
        results.append((np.array(scores), top.scores, top.indices, own))
    for plain, other in zip(*results, strict=True):
        np.testing.assert_array_equal(plain, other)
        assert plain.dtype == other.dtype


@pytest.mark.parametrize("name", ["bfloat16", "another device"])
def test_a_whole_job_under_a_global_setting(tmp_path: Path, name: str) -> None:
    problem = classification(mlp(), 4, n=3, m=1)
    results = []
    for directory in ("plain", "set"):
        with SETTINGS[name]() if directory == "set" else torch.no_grad():
            traker = make(problem, tmp_path / directory)
            featurize(traker, problem)
            traker.finalize_features()
            traker.start_scoring_checkpoint("exp", problem.checkpoints[0], 0, 1)
            traker.score(problem.targets)
            results.append(np.array(traker.finalize_scores("exp")))
    np.testing.assert_array_equal(*results)
