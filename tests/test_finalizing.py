"""Kernels, features and reports of a checkpoint's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests import reference
from tests.problems import assert_scores, draw
from trak import _memory
from trak._finalizing import (
    FeatureReport,
    check_out_to_loss,
    fit,
    read_reports,
    report,
    write_features,
)
from trak._layout import DONE, SKIPPED
from trak.errors import TaskError
from trak.score_computers import BasicScoreComputer


def rows(n: int, p: int) -> dict[str, Any]:
    return {
        "grads": draw(n, p).float().numpy(),
        "out_to_loss": np.full((n, 1), 0.5, "float32"),
        "is_featurized": np.full((n, 1), DONE, "int32"),
    }


@pytest.mark.parametrize("tile", [1, 10, 1 << 24])
@pytest.mark.parametrize(("n", "p"), [(9, 4), (4, 9), (5, 5), (1, 1)])
def test_features(monkeypatch: pytest.MonkeyPatch, n: int, p: int, tile: int) -> None:
    monkeypatch.setattr(_memory, "TILE", tile)
    store, array = rows(n, p), np.zeros((n, p), "float32")
    computer = BasicScoreComputer()
    _, kernel = fit(computer, store, n, p)
    write_features(computer, kernel, store, array, n, p)
    x = draw(n, p)
    assert_scores(torch.from_numpy(array), x @ reference.ridge_inverse(x, "auto"))


def test_a_kept_gram_matrix_is_used() -> None:
    store = {**rows(9, 4), "gram": np.eye(4)}
    gram, kernel = fit(BasicScoreComputer(lambda_reg=1.0), store, 9, 4)
    torch.testing.assert_close(gram, torch.eye(4).double())
    assert kernel.condition == pytest.approx(1.0)


def test_report() -> None:
    store = rows(6, 4)
    store["grads"][[1, 3]] = 0
    store["is_featurized"][3] = SKIPPED
    store["out_to_loss"][:3] = 1e-7
    _, kernel = fit(BasicScoreComputer(lambda_reg=2.0), store, 6, 4)
    found = report(store, kernel, 6, 4)
    assert (found.zero_rows, found.skipped_rows) == (1, 1)
    assert (found.solve, found.ridge, found.saturated) == ("primal", 2.0, 0.5)
    assert found.dtype == "float32"
    text = str(found)
    for part in ("n=6, p=4, float32 rows, primal solve; ridge 2,", "50.0 % saturated"):
        assert part in text
    assert "1 zero rows, 1 skipped" in text
    records = {0: {"report": found.as_dict()}, 1: {}, 2: {"report": None}}
    assert read_reports(records) == {0: found}
    assert FeatureReport(**found.as_dict()) == found


def test_a_report_of_a_store_without_flags() -> None:
    store = rows(3, 4)
    del store["is_featurized"]
    _, kernel = fit(BasicScoreComputer(), store, 3, 4)
    assert report(store, kernel, 3, 4).solve == "dual"


def test_no_weight_at_all() -> None:
    store = {**rows(6, 4), "out_to_loss": np.zeros((6, 1), "float32")}
    with pytest.raises(TaskError, match="all 6 training examples is exactly zero"):
        check_out_to_loss(store, 6)
