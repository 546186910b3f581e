"""What other libraries read of a TRAKer, and do with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compat import plugins
from tests.compat.problem import (
    CHECKPOINTS,
    TARGETS,
    TRAIN,
    D,
    M,
    N,
    assert_scores,
    batches,
    featurize,
    make,
    network,
    score,
    textbook,
)
from trak.errors import StoreMismatchError
from trak.gradient_computers import HookGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import (
    BasicProjector,
    BasicSingleBlockProjector,
    NoOpProjector,
    ProjectionType,
    SparseProjector,
)
from trak.savers import MmapSaver
from trak.score_computers import BasicScoreComputer


def test_attributes_of_the_façade(tmp_path: Path) -> None:
    model = network()
    traker = make(tmp_path, model=model, projector_seed=4, lambda_reg=0.25)
    assert traker.model is model
    assert isinstance(traker.task, ImageClassificationModelOutput)
    assert isinstance(traker.gradient_computer, HookGradientComputer)
    assert isinstance(traker.score_computer, BasicScoreComputer)
    assert isinstance(traker.saver, MmapSaver)
    assert isinstance(traker.logger, logging.Logger)
    assert traker.train_set_size == N
    assert traker.save_dir == tmp_path.resolve()
    assert traker.load_from_save_dir is True
    assert traker.device == torch.device("cpu")
    assert traker.grad_wrt is None
    assert traker.lambda_reg == 0.25
    assert traker.num_params == traker.num_params_for_grad == D
    assert traker.proj_dim == traker.projector.proj_dim == 16
    assert traker.proj_seed == traker.projector.seed == 4
    torch.testing.assert_close(traker.normalize_factor, torch.tensor(D**0.5))


@pytest.mark.parametrize(
    ("half", "dtype"), [(True, torch.float16), (False, torch.float32)]
)
def test_dtype_is_that_of_the_store(
    half: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    traker = make(tmp_path, use_half_precision=half)
    assert traker.dtype is dtype
    traker.load_checkpoint(CHECKPOINTS[0], model_id=0)
    stored = traker.saver.current_store["grads"].dtype
    assert stored == str(dtype).removeprefix("torch.")


def test_grad_wrt_counts_in_num_params_for_grad_only(tmp_path: Path) -> None:
    traker = make(tmp_path, grad_wrt=["2.weight", "2.bias"])
    assert traker.num_params == D
    assert traker.num_params_for_grad == 15
    torch.testing.assert_close(traker.normalize_factor, torch.tensor(15**0.5))


def test_proj_dim_without_projection_is_the_number_of_gradients(tmp_path: Path) -> None:
    assert make(tmp_path, projector=NoOpProjector()).proj_dim == D


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_a_device_of_every_kind(device: Any, tmp_path: Path) -> None:
    assert make(tmp_path, device=device).device == torch.device("cpu")


def test_attributes_of_the_saver(tmp_path: Path) -> None:
    traker = make(tmp_path, projector=NoOpProjector())
    assert traker.saver.model_ids == {}
    assert traker.saver.experiments == {}
    assert traker.saver.current_model_id is None
    featurize(traker)
    assert sorted(traker.saver.model_ids) == [0, 1]
    for record in traker.saver.model_ids.values():
        assert record["is_featurized"] == record["is_finalized"] == 1
    found = score(traker)
    assert found is traker.scores
    assert traker.saver.experiments["exp"]["num_targets"] == M
    assert traker.saver.experiments["exp"]["scores_finalized"] == 1
    assert traker.saver.current_model_id == 1
    assert traker.saver.save_dir == tmp_path.resolve()
    assert traker.saver.metadata["JL dimension"] == D
    assert traker.saver.train_set_size == N
    assert traker.saver.proj_dim == D


def test_arrays_of_the_saver(tmp_path: Path) -> None:
    traker = make(tmp_path, projector=NoOpProjector())
    traker.load_checkpoint(CHECKPOINTS[0], model_id=0)
    store = traker.saver.current_store
    assert store["grads"].shape == (N, D)
    assert store["out_to_loss"].shape == store["is_featurized"].shape == (N, 1)
    traker.featurize(TRAIN, num_samples=N)
    assert store["is_featurized"].sum() == N
    traker.finalize_features()
    assert traker.saver.current_store["features"].shape == (N, D)
    traker.start_scoring_checkpoint("exp", CHECKPOINTS[0], 0, M)
    traker.score(TARGETS, num_samples=M)
    assert traker.saver.current_store["exp_grads"].shape == (M, D)
    scores = traker.finalize_scores("exp")
    np.testing.assert_array_equal(traker.saver.current_store["exp_scores"], scores)
    assert scores.shape == (N, M)
    assert isinstance(scores, np.ndarray)


@pytest.mark.parametrize("load", [True, False])
@pytest.mark.parametrize("kind", ["basic", "normal", "none"])
def test_a_wrapper_that_scores_by_itself(kind: str, load: bool, tmp_path: Path) -> None:
    """As quanda does: features, projector and task are used without ``score``."""

    def projector() -> Any:
        if kind == "basic":
            return BasicProjector(
                grad_dim=D,
                proj_dim=16,
                seed=1,
                proj_type=ProjectionType.normal,
                max_batch_size=8,
                device="cpu",
            )
        if kind == "normal":
            return plugins.NormalProjector(D, 16, 1, "normal", "cpu")
        return NoOpProjector(device="cpu")

    traker = make(
        tmp_path,
        projector=projector(),
        projector_seed=1,
        load_from_save_dir=load,
        device="cpu",
    )
    traker.load_checkpoint(CHECKPOINTS[0], model_id=0)
    for index, batch in enumerate(batches(TRAIN, 7)):
        inds = torch.tensor([7 * index + j for j in range(len(batch[0]))])
        traker.featurize(batch=batch, inds=inds)
    traker.finalize_features()
    traker.projector = projector()  # 0.3.2's cannot be used again

    grads = traker.gradient_computer.compute_per_sample_grad(batch=TARGETS)
    targets = traker.projector.project(
        grads, model_id=traker.saver.current_model_id
    ).clone()
    targets /= traker.normalize_factor
    features = torch.as_tensor(
        traker.saver.current_store["features"], device=traker.device
    )
    weights = torch.as_tensor(traker.saver.current_store["out_to_loss"])
    theirs = torch.matmul(features, targets.T) * weights

    traker.start_scoring_checkpoint("exp", CHECKPOINTS[0], 0, M)
    traker.score(TARGETS, num_samples=M)
    assert_scores(traker.finalize_scores("exp"), theirs.double())


@pytest.mark.parametrize(
    "other",
    [
        BasicProjector(D, 16, 1, "rademacher", "cpu", block_size=3),
        BasicProjector(D, 16, 1, ProjectionType.rademacher, torch.device("cpu")),
        BasicProjector(D, 16, 1, "rademacher", "cpu", dtype=torch.float64),
        BasicSingleBlockProjector(D, 16, 1, "rademacher", "cpu"),
    ],
    ids=["block_size", "types", "dtype", "one-block"],
)
def test_a_projector_that_makes_the_same_numbers_can_be_set(
    other: Any, tmp_path: Path
) -> None:
    first = BasicProjector(D, 16, 1, "rademacher", "cpu")
    traker = make(tmp_path, projector=first)
    featurize(traker)
    traker.projector = other
    assert traker.projector is other
    matrices = []
    for model_id in range(len(CHECKPOINTS)):
        eye = {
            name: torch.eye(D)[:, start:stop].reshape(D, *shape)
            for name, (start, stop, shape) in LAYOUT.items()
        }
        matrices.append(first.project(eye, model_id))
    assert_scores(score(traker), textbook(matrices))


LAYOUT = {
    "0.weight": (0, 24, (4, 6)),
    "0.bias": (24, 28, (4,)),
    "2.weight": (28, 40, (3, 4)),
    "2.bias": (40, 43, (3,)),
}
"""Where each parameter's entries are among the columns."""


@pytest.mark.parametrize(
    "other",
    [
        BasicProjector(D, 16, 2, "rademacher", "cpu"),
        BasicProjector(D, 16, 1, "normal", "cpu"),
        BasicProjector(D, 17, 1, "rademacher", "cpu"),
        SparseProjector(D, 16, 1),
        NoOpProjector(D),
        plugins.NormalProjector(D, 16, 1, "rademacher", "cpu"),
    ],
    ids=["seed", "law", "proj_dim", "sparse", "none", "foreign"],
)
def test_a_projector_that_makes_other_numbers_is_refused(
    other: Any, tmp_path: Path
) -> None:
    first = BasicProjector(D, 16, 1, "rademacher", "cpu")
    traker = make(tmp_path, projector=first)
    with pytest.raises(StoreMismatchError, match="do not mix"):
        traker.projector = other
    assert traker.projector is first


def test_the_model_is_left_with_the_last_checkpoint_in_evaluation_mode(
    tmp_path: Path,
) -> None:
    traker = make(tmp_path)
    traker.model.train()
    traker.load_checkpoint(CHECKPOINTS[1], model_id=0)
    assert not traker.model.training
    for name, value in traker.model.state_dict().items():
        torch.testing.assert_close(value, CHECKPOINTS[1][name], rtol=0, atol=0)
