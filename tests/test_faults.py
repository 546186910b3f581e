"""Killed, stopped and concurrent processes: a small run of the benchmark, and its parts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.bench import Bench
from trak import _layout
from trak.errors import ModelIDException
from trak.score_computers import BasicScoreComputer

ROOT = Path(__file__).parents[1]
DEAD = 2**22 + 1
"""Above the largest process number that Linux gives."""


def faults(*arguments: str) -> str:
    """Run the benchmark in a process without threads, which this one may have."""
    done = subprocess.run(
        [sys.executable, "benchmarks/faults.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"(\d+) of +(\d+)", done.stdout)
    assert counts, done.stdout
    assert all(good == runs != "0" for good, runs in counts)
    return done.stdout


def test_processes_killed_at_three_moments_and_stopped_before_some_events() -> None:
    few = ("--kills", "3", "--every", "90", "--only", "moments", "events", "stopped")
    assert "3 of    3" in faults(*few)


@pytest.mark.slow
def test_processes_killed_at_fifty_moments() -> None:
    assert "50 of   50" in faults("--only", "moments", "batch_sizes")


@pytest.mark.slow
def test_processes_killed_stopped_and_raced() -> None:
    faults("--kills", "12", "--every", "5")


# -- half-made files ------------------------------------------------------------------


def leave(directory: Path, name: str, age: float = 0.0) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.touch()
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    return path


@pytest.mark.parametrize("place", ["", "0", "scores", "experiments"])
def test_half_made_files_of_dead_processes_go(tmp_path: Path, place: str) -> None:
    bench = Bench(tmp_path, "loaded")
    machine = _layout._machine()
    directory = bench.store / place
    dead = leave(directory, f".trak-{machine}-{DEAD}-abcd_012")
    live = leave(directory, f".trak-{machine}-{os.getpid()}-abcd_012")
    # Of a host whose name begins with this one's and a number.
    other = leave(directory, f".trak-{machine}-{DEAD}-1-{os.getpid()}-abcd_012")
    elsewhere = leave(directory, f".trak-elsewhere-0-{DEAD}-abcd_012", age=6 * 86400)
    forgotten = leave(directory, f".trak-elsewhere-0-{DEAD}-dcba_012", age=8 * 86400)
    foreign = leave(directory, ".trak-notes")
    bench.open()
    assert not dead.exists()
    assert not forgotten.exists()
    assert all(path.exists() for path in (live, other, elsewhere, foreign))


def test_without_process_tables_only_age_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists, stat = Path.exists, Path.stat

    def hidden(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(path)
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(Path, "stat", hidden)
    monkeypatch.setattr(
        Path, "exists", lambda path: path.parts[:2] != ("/", "proc") and exists(path)
    )
    assert _layout._machine().endswith("-0")
    fresh = leave(tmp_path, f".trak-{_layout._machine()}-{DEAD}-abcd_012")
    old = leave(tmp_path, f".trak-{_layout._machine()}-{DEAD}-dcba_012", 8 * 86400)
    _layout.remove_dead_temporaries(tmp_path)
    assert fresh.exists()
    assert not old.exists()


# -- records that two processes write -------------------------------------------------


def test_an_id_pinned_by_a_killed_process_is_not_taken_over(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "loaded")
    (bench.store / "id_0.json").unlink()  # as if killed before it was written
    traker = bench.open()
    other = {name: value * 1.5 for name, value in bench.ckpt.items()}
    with pytest.raises(ModelIDException, match="taken by another process for other"):
        traker.load_checkpoint(other, model_id=0)
    assert 0 not in traker.saver.model_ids
    traker.load_checkpoint(other, model_id=1)
    traker.load_checkpoint(bench.ckpt, model_id=0)


def test_a_lost_race_for_an_id_leaves_the_winners_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    loser = bench.open()
    init_store = loser.saver.init_store

    def overtaken(model_id: int) -> None:
        bench.traker.load_checkpoint(bench.ckpt, model_id=0)
        init_store(model_id)

    monkeypatch.setattr(loser.saver, "init_store", overtaken)
    other = {name: value * 1.5 for name, value in bench.ckpt.items()}
    with pytest.raises(ModelIDException, match="taken by another process for other"):
        loser.load_checkpoint(other, model_id=0)
    weights = bench.traker.saver.model_ids[0]["weights"]
    assert loser.saver.model_ids[0]["weights"] == weights


def test_what_finalizing_recorded_stands(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "featurized")
    early = (bench.store / "id_0.json").read_bytes()
    bench.traker.finalize_features()
    late = (bench.store / "id_0.json").read_bytes()
    (bench.store / "id_0.json").write_bytes(early)  # by a process that was overtaken
    traker = bench.open()
    assert traker.saver.model_ids[0]["is_finalized"]
    traker.finalize_features()
    assert (bench.store / "id_0.json").read_bytes() == late


def test_the_summary_of_experiments_has_those_of_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, "finalized")
    other = bench.open()
    write_record = _layout.write_record

    def overtaken(path: Path, record: Any, *, replace: bool = True) -> bool:
        if path.name == "experiments.json" and list(record) == ["mine"]:
            monkeypatch.undo()
            other.saver.init_experiment("theirs", 4, 0)
        return write_record(path, record, replace=replace)

    monkeypatch.setattr(_layout, "write_record", overtaken)
    bench.traker.saver.init_experiment("mine", 4, 0)
    summary = _layout.read_record(bench.store / "experiments.json")
    assert set(summary) == {"mine", "theirs"}


# -- features and gradients -----------------------------------------------------------


class Plain(BasicScoreComputer):
    def get_xtx(self, grads: torch.Tensor) -> torch.Tensor:
        return super().get_xtx(grads)


def interrupt(traker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finalize up to where the record would be written."""

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(traker.saver, "serialize_current_model_id_metadata", stop)
        with pytest.raises(KeyboardInterrupt):
            traker.finalize_features(del_grads=True)


def features(traker: Any) -> np.ndarray:
    traker.saver.load_current_store(0)
    return np.array(traker.saver.current_store["features"])


def test_features_of_an_interrupted_change_of_damping_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, "finalized")
    expected = features(bench.traker)
    interrupt(bench.open(lambda_reg=7.0), monkeypatch)
    np.testing.assert_array_equal(features(bench.open()), expected)


def test_features_that_cannot_be_made_on_demand_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, "scored", score_computer=Plain)
    expected = np.array(bench.traker.scores)
    interrupt(bench.open(score_computer=Plain, lambda_reg=7.0), monkeypatch)
    traker = bench.open(score_computer=Plain)
    with pytest.raises(ModelIDException, match="its features are not there"):
        traker.finalize_scores("exp")
    traker.finalize_features()
    np.testing.assert_array_equal(traker.finalize_scores("exp"), expected)


def test_features_that_were_removed_with_the_gradients(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "scored")
    bench.traker.finalize_features(del_grads=True)
    (bench.store / "0/features.mmap").unlink()
    for call in ("finalize_scores", "self_influence"):
        with pytest.raises(ModelIDException, match="its features are not there"):
            getattr(bench.open(), call)()
    with pytest.raises(ModelIDException, match="its gradients were deleted"):
        bench.open().finalize_features()


def test_gradients_that_another_process_deletes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "featurized")
    other = bench.open()
    other.load_checkpoint(bench.ckpt)
    bench.traker.finalize_features(del_grads=True)
    other.finalize_features(del_grads=True)
    assert "grads" not in other.saver.current_store
    assert bench.complete(other).shape == (11, 4)


def test_gradients_of_a_process_killed_while_deleting_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "featurized")
    whole = (bench.store / "0/grads.mmap").read_bytes()
    bench.traker.finalize_features(del_grads=True)
    (bench.store / "0/grads.mmap").write_bytes(whole)
    bench.open().finalize_features()
    assert not (bench.store / "0/grads.mmap").exists()
