"""Which rows the next batch is for: cursors, experiments and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.bench import Bench
from tests.problems import assert_scores, randomized, score
from trak._batches import take
from trak.errors import ModelIDException, OrderError, TrakWarning
from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput


def flags(traker: Any, key: str = "is_featurized") -> list[int]:
    return np.asarray(traker.saver.current_store[key]).reshape(-1).tolist()


def test_loading_again_starts_over(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "loaded")
    bench.feed()
    assert flags(bench.traker) == [1] * 7 + [0] * 4
    bench.traker.load_checkpoint(bench.ckpt)
    bench.feed(images=bench.images[:4], labels=bench.labels[:4])
    bench.feed()
    bench.feed(images=bench.images[7:], labels=bench.labels[7:])
    assert flags(bench.traker) == [1] * 11


def test_inds_do_not_move_the_cursor(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "loaded")
    bench.feed(images=bench.images[9:], labels=bench.labels[9:], inds=[9, 10])
    bench.feed()
    assert flags(bench.traker) == [1] * 7 + [0, 0, 1, 1]


def test_an_error_does_not_move_the_cursor(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "loaded")
    with pytest.raises(Exception, match="NaN"):
        bench.feed(images=bench.with_images(0, torch.nan))
    bench.feed()
    assert flags(bench.traker) == [1] * 7 + [0] * 4


def test_the_record_is_written_when_rows_are_complete(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "loaded")
    assert bench.open().saver.model_ids[0]["is_featurized"] == 0
    bench.feed(images=bench.images[4:], labels=bench.labels[4:])
    assert bench.open().saver.model_ids[0]["is_featurized"] == 1


def test_experiments_have_cursors_of_their_own(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "finalized")
    halves = [take(bench.problem.targets, slice(i, i + 2)) for i in (0, 2)]
    for name in ("a", "b"):
        bench.start(name)
        bench.traker.score(halves[0])
    bench.start("a")
    for half in halves:
        bench.traker.score(half)
    assert flags(bench.traker, "a_is_scored") == [1, 1, 1, 1]
    bench.traker.saver.load_current_store(0, "b")
    assert flags(bench.traker, "b_is_scored") == [1, 1, 0, 0]
    assert bench.traker.finalize_scores("a").shape == (11, 4)


def test_the_experiment_that_was_started_last(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "finalized")
    for name, targets in (("a", 4), ("b", 2)):
        bench.start(name, num_targets=targets)
        bench.traker.score(take(bench.problem.targets, slice(0, targets)))
    assert bench.traker.finalize_scores().shape == (11, 2)
    assert bench.traker.top_k("a", 1).scores.shape == (4, 1)
    with pytest.raises(
        Exception, match=r"no experiment None; the store has \['a', 'b'\]"
    ):
        bench.open().finalize_scores()


def test_the_only_experiment(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "scored")
    expected = bench.traker.scores + 0.0
    np.testing.assert_array_equal(bench.open().finalize_scores(), expected)


def test_equal_weights_under_two_ids(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "featurized")
    with pytest.warns(TrakWarning, match="6 has the same weights as model id 0"):
        bench.traker.load_checkpoint(bench.ckpt, model_id=6)
    bench.traker.featurize(bench.problem.train)
    bench.traker.finalize_features()
    bench.start(model_id=None)
    assert bench.traker.saver.current_model_id == 0
    rows = [np.load(bench.store / i / "grads.mmap") for i in ("0", "6")]
    assert not np.allclose(*rows)  # another id, another projection


def test_a_failed_load_takes_no_batches(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "loaded")
    with pytest.raises(Exception, match="missing"):
        bench.traker.load_checkpoint({})
    with pytest.raises(OrderError, match="call load_checkpoint first"):
        bench.feed()


def test_a_failed_registration_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, "featurized")
    other = randomized(bench.problem.model, 5)

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", refuse)
        with pytest.raises(OSError, match="No space left"):
            bench.traker.load_checkpoint(other)
    assert list(bench.traker.saver.model_ids) == [0]
    bench.traker.load_checkpoint(other)
    assert list(bench.traker.saver.model_ids) == [0, 1]


def test_an_id_that_another_process_took(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    slow = bench.open()
    bench.traker.load_checkpoint(bench.ckpt)
    with pytest.raises(ModelIDException, match="0 belongs to other weights"):
        slow.load_checkpoint(randomized(bench.problem.model, 5), model_id=0)
    slow.load_checkpoint(bench.ckpt)
    slow.featurize(bench.problem.train)
    assert flags(bench.traker) == [1] * 11


def test_labels_of_targets_are_checked_where_a_task_can(tmp_path: Path) -> None:
    class PerExample(ImageClassificationModelOutput):
        @staticmethod
        def get_output(*arguments: Any) -> torch.Tensor:
            return ImageClassificationModelOutput.get_output(*arguments)

    bench = Bench(tmp_path)
    traker = bench.job(task=PerExample)
    assert PerExample.get_outputs is AbstractModelOutput.get_outputs
    traker.start_scoring_checkpoint(bench.ckpt, num_targets=4)
    traker.score(bench.problem.targets)  # without their out-to-loss
    expected = Bench(tmp_path / "other").complete()
    assert_scores(torch.from_numpy(traker.finalize_scores() + 0.0), expected, 1e-5)


def test_no_warning_where_data_agree(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "featurized")
    bench.problem.checkpoints.append(randomized(bench.problem.model, 5))
    bench.traker.load_checkpoint(bench.problem.checkpoints[1])
    bench.traker.featurize(bench.problem.train)
    bench.traker.finalize_features()
    assert score(bench.traker, bench.problem).shape == (11, 4)


def test_the_warning_names_the_first_other_example(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "featurized")
    bench.traker.load_checkpoint(randomized(bench.problem.model, 5))
    with pytest.warns(TrakWarning, match="example 1 is not the one") as caught:
        bench.traker.featurize(
            (-bench.images[[0, 2]], bench.labels[[0, 2]]), inds=[1, 2]
        )
    assert len(caught) == 1
