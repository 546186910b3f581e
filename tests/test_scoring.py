"""Scores of plug-in score computers, and what stops scores from being given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bench import Bench
from tests.problems import assert_scores, score
from trak._scoring import TopScores
from trak.errors import (
    ExperimentError,
    ModelIDException,
    NonFiniteError,
    SingularKernelError,
    StoreMismatchError,
)
from trak.score_computers import AbstractScoreComputer, BasicScoreComputer


class Dot(AbstractScoreComputer):
    """The dot product of gradients."""

    def get_xtx(self, grads: Tensor) -> Tensor:
        return grads.T @ grads

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        return grads

    def get_scores(
        self, features: Tensor, targets: Tensor, accumulator: Tensor
    ) -> None:
        accumulator += features @ targets.T


class Broken(Dot):
    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        return grads * torch.nan


class Relative(BasicScoreComputer):
    """A computer of another name that uses the blocked methods."""


def test_a_computer_of_ones_own(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    traker = bench.open(score_computer=Dot)
    scores = bench.complete(traker)
    traker.saver.load_current_store(0, "exp")
    store = traker.saver.current_store
    expected = store["grads"] @ store["exp_grads"].T * store["out_to_loss"]
    assert_scores(scores, torch.from_numpy(expected), 1e-6)
    top = traker.top_k("exp", 2)
    assert isinstance(top, TopScores)
    np.testing.assert_allclose(top.scores[:, 0], scores.numpy().max(0), rtol=1e-6)
    with pytest.raises(SingularKernelError, match="needs the kernel of BasicScoreComp"):
        traker.self_influence()


def test_computers_do_not_mix(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "scored")
    expected = torch.from_numpy(bench.traker.scores + 0.0)
    other = bench.open(score_computer=Dot)
    with pytest.raises(
        StoreMismatchError, match=r"finalized with Basic.* has Dot, lam"
    ):
        other.finalize_scores("exp")
    other.finalize_features()
    other.finalize_scores("exp")
    again = bench.open()
    with pytest.raises(StoreMismatchError, match="call finalize_features"):
        again.self_influence()
    again.finalize_features()
    torch.testing.assert_close(torch.from_numpy(again.finalize_scores("exp")), expected)
    relative = bench.open(score_computer=Relative)
    relative.finalize_features()
    found = torch.from_numpy(relative.finalize_scores("exp") + 0.0)
    torch.testing.assert_close(found, expected)


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "featurized")
    with pytest.raises(SingularKernelError, match="Broken gave features that are not"):
        bench.open(score_computer=Broken).finalize_features()
    assert not bench.open().saver.model_ids[0]["is_finalized"]


def test_features_of_other_computers_are_not_made_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "featurized")
    traker = bench.open(score_computer=Dot)
    traker.finalize_features()
    (bench.store / "0" / "features.mmap").unlink()
    traker.saver.load_current_store(0)
    with pytest.raises(KeyError, match="features"):
        traker.saver.current_store["features"]
    assert not (bench.store / "0" / "features.mmap").exists()


def test_features_of_another_damping_are_not_made(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "finalized")
    other = bench.open(lambda_reg=3.0)
    other.saver.load_current_store(0)
    with pytest.raises(StoreMismatchError, match="finalized with"):
        other.saver.current_store["features"]


def test_scores_that_are_not_finite(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "scored")
    before = (bench.store / "scores/exp.mmap").read_bytes()
    grads = np.lib.format.open_memmap(bench.store / "0/exp_grads.mmap", mode="r+")
    grads[2] = np.inf
    grads.flush()
    with pytest.raises(NonFiniteError, match="0 to 10 on experiment 'exp' are not fin"):
        bench.open().finalize_scores("exp")
    assert (bench.store / "scores/exp.mmap").read_bytes() == before


def test_an_experiment_without_arrays_on_a_checkpoint(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "scored")
    bench.problem.checkpoints.append({k: v + 1 for k, v in bench.ckpt.items()})
    traker = bench.open()
    traker.load_checkpoint(bench.problem.checkpoints[1])
    traker.featurize(bench.problem.train)
    with pytest.raises(ModelIDException, match="1 is not finalized"):
        traker.finalize_scores("exp", [0, 1])
    traker.finalize_features()
    with pytest.raises(ExperimentError, match="has no targets on model id 1; score"):
        traker.finalize_scores("exp", [0, 1])
    assert score(traker, bench.problem).shape == (11, 4)


@pytest.mark.parametrize("half", [True, False])
def test_scores_are_mapped_from_their_file(tmp_path: Path, half: bool) -> None:
    bench = Bench(tmp_path, "scored", use_half_precision=half)
    scores = bench.traker.scores
    assert isinstance(scores, np.memmap)
    assert scores.dtype == np.float32
