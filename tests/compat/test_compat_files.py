"""Files on disk: 0.3.2's names, readable by plain NumPy and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.format import open_memmap

from tests.compat.problem import CHECKPOINTS, TRAIN, M, N, featurize, make, score
from trak.errors import StoreMismatchError
from trak.projectors import BasicProjector

P = 16


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    traker = make(tmp_path)
    featurize(traker)
    score(traker)
    for model_id in range(len(CHECKPOINTS)):
        traker.saver.load_current_store(model_id)
        traker.saver.current_store["features"]  # written when first asked for
    return tmp_path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("half", [False, True])
def test_arrays(half: bool, tmp_path: Path) -> None:
    traker = make(tmp_path, use_half_precision=half)
    featurize(traker)
    scores = np.array(score(traker))
    dtype = np.float16 if half else np.float32
    for model_id in range(len(CHECKPOINTS)):
        traker.saver.load_current_store(model_id)
        traker.saver.current_store["features"]
        folder = tmp_path / str(model_id)
        shapes = {
            "grads": ((N, P), dtype),
            "features": ((N, P), np.float32),
            "out_to_loss": ((N, 1), np.float32),
            "_is_featurized": ((N, 1), np.int32),
            "exp_grads": ((M, P), dtype),
        }
        for name, (shape, kind) in shapes.items():
            array = open_memmap(folder / f"{name}.mmap", mode="r")
            assert array.shape == shape
            assert array.dtype == kind
            assert np.any(array != 0)
        assert open_memmap(folder / "_is_featurized.mmap", mode="r").sum() == N
    stored = open_memmap(tmp_path / "scores" / "exp.mmap", mode="r")
    np.testing.assert_array_equal(stored, scores)


def test_metadata(finished: Path) -> None:
    metadata = read(finished / "metadata.json")
    assert metadata["JL dimension"] == P
    assert metadata["JL matrix type"] == "sparse"
    assert metadata["train set size"] == N


@pytest.mark.parametrize("law", ["normal", "rademacher"])
def test_the_matrix_type_is_the_projections_name(law: str, tmp_path: Path) -> None:
    make(tmp_path, projector=BasicProjector(43, P, 0, law, "cpu"))
    assert read(tmp_path / "metadata.json")["JL matrix type"] == law


def test_records_of_checkpoints(finished: Path) -> None:
    found = {}
    for path in finished.rglob("id_*.json"):  # as 0.3.2 looks for them
        for key, record in read(path).items():
            assert path.name == f"id_{key}.json"
            found[int(key)] = record["is_featurized"], record["is_finalized"]
    assert found == {0: (1, 1), 1: (1, 1)}


def test_the_record_of_a_checkpoint_grows(tmp_path: Path) -> None:
    traker = make(tmp_path)

    def flags() -> tuple[int, int]:
        record = read(tmp_path / "id_3.json")["3"]
        return record["is_featurized"], record["is_finalized"]

    traker.load_checkpoint(CHECKPOINTS[0], model_id=3)
    assert flags() == (0, 0)
    traker.featurize((TRAIN[0][:5], TRAIN[1][:5]), num_samples=5)
    assert flags() == (0, 0)
    traker.featurize((TRAIN[0][5:], TRAIN[1][5:]), num_samples=N - 5)
    assert flags() == (1, 0)
    traker.finalize_features()
    assert flags() == (1, 1)


def test_experiments(finished: Path) -> None:
    experiments = read(finished / "experiments.json")
    assert list(experiments) == ["exp"]
    old = {
        "num_targets": M,
        "scores_path": str(finished.resolve() / "scores" / "exp.mmap"),
        "scores_finalized": 1,
    }
    assert {key: experiments["exp"][key] for key in old} == old


def test_an_experiment_is_not_finalized_before_its_scores(tmp_path: Path) -> None:
    traker = make(tmp_path)
    featurize(traker)
    traker.start_scoring_checkpoint("exp", CHECKPOINTS[0], 0, M)
    assert read(tmp_path / "experiments.json")["exp"]["scores_finalized"] == 0


def test_a_directory_that_0_3_2_wrote_is_refused(tmp_path: Path) -> None:
    """Its numbers were projected otherwise."""
    record = {
        "JL dimension": P,
        "JL matrix type": "normal",
        "train set size": N,
    }
    (tmp_path / "metadata.json").write_text(json.dumps(record))
    with pytest.raises(StoreMismatchError, match=r"0\.3\.2"):
        make(tmp_path)
    assert read(tmp_path / "metadata.json") == record


def test_the_directory_of_0_3_2_s_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    traker = make("./trak_results")
    assert (tmp_path / "trak_results" / "metadata.json").exists()
    assert traker.save_dir == (tmp_path / "trak_results").resolve()
