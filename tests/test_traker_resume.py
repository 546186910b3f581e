"""Work that is interrupted, repeated, shared, shortened or finalized otherwise."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.problems import (
    PROBLEMS,
    Problem,
    assert_scores,
    classification,
    featurize,
    make,
    mlp,
    run,
    score,
    sparse,
    split,
)
from trak import TRAKer
from trak._batches import take
from trak.errors import (
    ModelIDException,
    NonFiniteError,
    SingularKernelError,
    StaleRowError,
    StoreMismatchError,
    TrakWarning,
)
from trak.gradient_computers import HookGradientComputer


def bits(scores: torch.Tensor) -> bytes:
    return scores.numpy().tobytes()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resuming_with_the_same_batches_gives_the_same_bits(
    tmp_path: Path, stop: int, half: bool
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    options = {"use_half_precision": half, "proj_dim": 5}
    whole = run(problem, tmp_path / "whole", 3, **options)
    store = tmp_path / "parts"
    first = make(problem, store, **options)
    first.load_checkpoint(problem.checkpoints[0], model_id=0)
    for batch, inds in list(split(problem.train, problem.n, 3))[:stop]:
        first.featurize(batch, inds=inds)
    second = make(problem, store, **options)
    featurize(second, problem, 3)
    make(problem, store, **options).finalize_features()
    third = make(problem, store, **options)
    third.start_scoring_checkpoint("exp", problem.checkpoints[0], 0, problem.m)
    for batch, inds in list(split(problem.targets, problem.m, 3))[:stop]:
        third.score(batch, inds=inds)
    assert bits(score(make(problem, store, **options), problem, 3)) == bits(whole)


def test_resuming_with_other_batches_agrees_to_rounding(tmp_path: Path) -> None:
    problem = PROBLEMS["residual"]()
    whole = run(problem, tmp_path / "whole", 3)
    first = make(problem, tmp_path / "parts")
    first.load_checkpoint(problem.checkpoints[0], model_id=0)
    for low, high in ((0, 4), (2, 6), (9, 11)):  # overlapping, with a hole
        batch = take(problem.train, slice(low, high))
        first.featurize(batch, inds=range(low, high))
    second = make(problem, tmp_path / "parts")
    featurize(second, problem, 5)
    second.finalize_features()
    assert_scores(score(second, problem, 2), whole, 1e-5)


def test_stored_rows_are_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = classification(mlp(), 4)
    expected = run(problem, tmp_path)

    def refuse(self: Any, batch: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(HookGradientComputer, "stream_per_sample_grads", refuse)
    assert bits(run(problem, tmp_path)) == bits(expected)


def test_a_checkpoint_gets_its_id_back_from_its_weights(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=3)
    traker = make(problem, tmp_path)
    for checkpoint in problem.checkpoints[:2]:
        traker.load_checkpoint(checkpoint)
    again = make(problem, tmp_path)
    again.load_checkpoint(problem.checkpoints[1])
    assert again.saver.current_model_id == 1
    again.load_checkpoint(problem.checkpoints[2])
    assert again.saver.current_model_id == 2
    with pytest.warns(TrakWarning, match="the same weights as model id 0, so it adds"):
        again.load_checkpoint(problem.checkpoints[0], model_id=7)
    again.load_checkpoint(problem.checkpoints[0])
    assert again.saver.current_model_id == 0


@pytest.mark.parametrize("model_id", [-3, 10**12])
def test_any_whole_number_is_a_model_id(tmp_path: Path, model_id: int) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path)
    traker.load_checkpoint(problem.checkpoints[0], model_id=model_id)
    traker.featurize(problem.train)
    traker.finalize_features()
    again = make(problem, tmp_path)
    again.start_scoring_checkpoint("exp", problem.checkpoints[0], model_id, 4)
    again.score(problem.targets)
    assert again.finalize_scores().shape == (11, 4)


@pytest.mark.parametrize("p", [5, 20])
def test_finalizing_again_with_another_damping(tmp_path: Path, p: int) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    first = make(problem, tmp_path, proj_dim=p)
    featurize(first, problem)
    first.finalize_features()
    score(first, problem)
    second = make(problem, tmp_path, proj_dim=p, lambda_reg=0.7)
    with pytest.raises(StoreMismatchError, match=r"finalized with .*'auto'.*0\.7"):
        second.finalize_scores("exp")
    second.finalize_features()
    expected = run(problem, tmp_path / "new", proj_dim=p, lambda_reg=0.7)
    torch.testing.assert_close(torch.from_numpy(second.finalize_scores()), expected)
    assert second.reports[0].ridge == 0.7
    assert_scores(expected, problem.expected(sparse(problem, p), 0.7))


@pytest.mark.parametrize("p", [5, 20])
@pytest.mark.parametrize("twice", [False, True])
def test_scoring_from_features_alone(tmp_path: Path, p: int, twice: bool) -> None:
    problem = classification(mlp(), 4)
    expected = run(problem, tmp_path / "kept", proj_dim=p)
    traker = make(problem, tmp_path / "deleted", proj_dim=p)
    featurize(traker, problem)
    if twice:
        traker.finalize_features()
    traker.finalize_features(del_grads=True)
    assert not (tmp_path / "deleted/0/grads.mmap").exists()
    assert_scores(score(traker, problem), expected, 1e-5)
    again = make(problem, tmp_path / "deleted", proj_dim=p)
    again.finalize_features(del_grads=True)
    featurize(again, problem)  # everything is there
    assert_scores(score(again, problem), expected, 1e-5)
    with pytest.raises(SingularKernelError, match="deleted by del_grads"):
        again.self_influence()
    again.load_checkpoint(problem.checkpoints[0])
    with pytest.raises(StaleRowError, match="deleted the gradient to compare with"):
        again.featurize((problem.train[0] + 1, problem.train[1]))
    other = make(problem, tmp_path / "deleted", proj_dim=p, lambda_reg=2.0)
    with pytest.raises(ModelIDException, match="another model_id"):
        other.finalize_features()


def test_features_are_made_when_asked_for(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path, exponents=(0.0, 1.0))
    featurize(traker, problem)
    with pytest.raises(KeyError, match="features"):
        traker.saver.current_store["features"]
    traker.finalize_features()
    assert not (tmp_path / "0/features.mmap").exists()
    features = torch.from_numpy(traker.saver.current_store["features"] + 0.0)
    rows, _, _ = problem.parts(sparse(problem))
    inverse = torch.linalg.inv(
        rows[0].T @ rows[0] + (rows[0] ** 2).sum() / 7 * torch.eye(7)
    )
    assert_scores(features, rows[0] @ inverse)
    assert (tmp_path / "0/features.mmap").exists()


def test_without_loading_only_what_was_named_takes_part(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    featurize(make(problem, tmp_path), problem)
    traker = make(problem, tmp_path, load_from_save_dir=False)
    assert traker.saver.model_ids == {}
    one = Problem(**{**vars(problem), "checkpoints": problem.checkpoints[:1]})
    featurize(traker, one)
    traker.finalize_features()
    assert sorted(traker.saver.model_ids) == [0]
    assert_scores(score(traker, one), one.expected(sparse(one)))


def test_other_training_data_under_the_same_index(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    expected = run(problem, tmp_path)
    traker = make(problem, tmp_path)
    traker.load_checkpoint(problem.checkpoints[0], model_id=0)
    with pytest.raises(StaleRowError, match="training example 3 is stored already"):
        traker.featurize(take(problem.train, slice(4, 5)), inds=[3])
    # Other bytes with the same gradient are the same example, padded otherwise.
    inputs = problem.train[0][:1] * (1 + 1e-12)
    traker.featurize((inputs, problem.train[1][:1]), inds=[0])
    assert bits(run(problem, tmp_path)) == bits(expected)


def test_other_targets_under_the_same_name(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    expected = run(problem, tmp_path)
    traker = make(problem, tmp_path)
    traker.start_scoring_checkpoint("exp", problem.checkpoints[0], 0, problem.m)
    with pytest.raises(StaleRowError, match="target 0 is stored already"):
        traker.score(take(problem.train, slice(0, 4)))
    assert bits(torch.from_numpy(traker.finalize_scores())) == bits(expected)


def test_a_loader_that_shuffles_is_noticed(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    traker = make(problem, tmp_path)
    traker.load_checkpoint(problem.checkpoints[0])
    traker.featurize(problem.train)
    traker.load_checkpoint(problem.checkpoints[1])
    flipped = (problem.train[0].flip(0), problem.train[1].flip(0))
    with pytest.raises(StaleRowError, match="example 0 is not the one that another"):
        traker.featurize(take(flipped, slice(0, 4)))
    augmented = (problem.train[0] + 1, problem.train[1])
    with pytest.warns(TrakWarning, match="example 0 is not the one that another"):
        traker.featurize(take(augmented, slice(0, 4)))
    traker.featurize(take(augmented, slice(4, 11)))  # told once


def test_skipped_examples_score_zero(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    problem.train[0][[2, 5], 0] = torch.nan
    for half in (False, True):
        traker = make(
            problem,
            tmp_path / str(half),
            on_non_finite="skip",
            use_half_precision=half,
        )
        featurize(traker, problem, 4)
        featurize(traker, problem, 4)  # skipped rows are done
        traker.finalize_features()
        scores = score(traker, problem)
        report = traker.reports[0]
        assert (report.skipped_rows, report.zero_rows) == (2, 0)
        assert (scores == 0).all(1).nonzero().flatten().tolist() == [2, 5]
        rest = Problem(**{**vars(problem), "n": 9})
        keep = [i for i in range(11) if i not in (2, 5)]
        rest.train = tuple(value[keep] for value in problem.train)
        assert_scores(scores[keep], rest.expected(sparse(rest)), 4 * 2.0**-11)


def test_a_target_without_a_finite_gradient_is_never_skipped(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path, on_non_finite="skip")
    featurize(traker, problem)
    traker.finalize_features()
    traker.start_scoring_checkpoint(problem.checkpoints[0], num_targets=4)
    inputs = problem.targets[0].clone()
    inputs[2, 1] = torch.inf
    with pytest.raises(NonFiniteError, match=r"^target 2 has a NaN") as caught:
        traker.score((inputs, problem.targets[1]))
    assert caught.value.index == 2


def test_scores_say_what_they_came_from(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=3)
    run(problem, tmp_path, lambda_reg=2.0)
    traker = make(problem, tmp_path, lambda_reg=2.0)
    record = traker.saver.experiments["exp"]
    assert record["model_ids"] == [0, 1, 2]
    assert record["finalized_with"] == "BasicScoreComputer, lambda_reg=2.0"
    traker.finalize_scores("exp", model_ids=[2, 0])
    again = make(problem, tmp_path, lambda_reg=2.0).saver.experiments["exp"]
    assert again == {**record, "model_ids": [2, 0]}


def test_checkpoints_that_another_traker_added_take_part(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    first, second = (make(problem, tmp_path) for _ in range(2))
    alone = make(problem, tmp_path, load_from_save_dir=False)
    for model_id, traker in enumerate((first, second)):
        traker.load_checkpoint(problem.checkpoints[model_id], model_id=model_id)
        traker.featurize(problem.train)
    alone.load_checkpoint(problem.checkpoints[0], model_id=0)
    alone.finalize_features()
    assert list(alone.reports) == [0]
    first.finalize_features()
    assert sorted(first.reports) == [0, 1]
    for model_id, checkpoint in enumerate(problem.checkpoints):
        second.start_scoring_checkpoint("exp", checkpoint, model_id, problem.m)
        second.score(problem.targets)
    with pytest.warns(TrakWarning, match=r"loaded only model ids \[0\]"):
        scores = torch.from_numpy(first.finalize_scores() + 0.0)
    assert_scores(scores, problem.expected(sparse(problem)))
    assert first.saver.experiments["exp"]["model_ids"] == [0, 1]


def test_leaving_checkpoints_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    problem = classification(mlp(), 4, checkpoints=3)
    traker = make(problem, tmp_path, logging_level=30)
    featurize(traker, problem)
    traker.finalize_features(model_ids=[0, 1])
    for model_id, count in ((0, 4), (1, 2)):
        checkpoint = problem.checkpoints[model_id]
        traker.start_scoring_checkpoint("exp", checkpoint, model_id, 4)
        traker.score(take(problem.targets, slice(0, count)))
    scores = traker.finalize_scores("exp", allow_skip=True) + 0.0
    assert "leaving out model id 1: experiment 'exp' has 2 of 4 targets" in caplog.text
    assert "leaving out model id 2: model id 2 is not finalized" in caplog.text
    one = Problem(**{**vars(problem), "checkpoints": problem.checkpoints[:1]})
    assert_scores(torch.from_numpy(scores), one.expected(sparse(one)))
    top = traker.top_k("exp", 2, allow_skip=True)
    np.testing.assert_array_equal(top.scores[:, 0], scores.max(0))


def write_part(save_dir: Path, part: int) -> None:
    """One of two writers: half of checkpoint 0, and a checkpoint of its own."""
    torch.set_num_threads(1)
    problem = classification(mlp(), 4, checkpoints=3)
    traker = make(problem, save_dir)
    for model_id in (0, part + 1):
        traker.load_checkpoint(problem.checkpoints[model_id], model_id=model_id)
        for i, (batch, inds) in enumerate(split(problem.train, problem.n, 2)):
            if model_id or i % 2 == part:
                traker.featurize(batch, inds=inds)


def test_two_processes_write_one_store(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=3)
    expected = run(problem, tmp_path / "one", 2)
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=write_part, args=(tmp_path / "two", part))
        for part in (0, 1)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    traker: TRAKer = make(problem, tmp_path / "two")
    assert sorted(traker.saver.model_ids) == [0, 1, 2]
    traker.finalize_features()
    assert_scores(score(traker, problem, 2), expected, 1e-6)


def test_checkpoints_of_another_run_are_noticed(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    first, second = problem.checkpoints
    for checkpoint in (first, second):
        traker = make(problem, tmp_path)
        traker.load_checkpoint(checkpoint)
        traker.featurize(problem.train)
        traker.finalize_features()
        traker.start_scoring_checkpoint(checkpoint, num_targets=problem.m)
        traker.score(problem.targets)
    with pytest.warns(TrakWarning, match=r"loaded only model ids \[1\]: \[0\] in"):
        both = traker.finalize_scores()
    with pytest.warns(TrakWarning, match=r"pass model_ids=\[1\]"):
        traker.self_influence()
    # Named, or in a program that only finalizes, they are meant.
    np.testing.assert_array_equal(traker.finalize_scores(model_ids=[0, 1]), both)
    np.testing.assert_array_equal(make(problem, tmp_path).finalize_scores(), both)
