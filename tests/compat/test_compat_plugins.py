"""Plug-ins written for 0.3.2, each used end to end, as a class and as an instance."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compat import plugins
from tests.compat.problem import (
    C,
    D,
    M,
    N,
    assert_scores,
    featurize,
    logits_of,
    make,
    miss,
    network,
    run,
    score,
    textbook,
)
from trak.errors import OptionError
from trak.gradient_computers import IterativeGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import NoOpProjector

P = 16


def matrices(projector: plugins.NormalProjector) -> list[Tensor]:
    return [projector.matrix(model_id) for model_id in range(C)]


def normal_projector(grad_dim: int = D, seed: int = 0) -> plugins.NormalProjector:
    return plugins.NormalProjector(grad_dim, P, seed, "normal", "cpu")


# -- tasks --------------------------------------------------------------------------


def scaled_logit(model: Any, weights: Any, images: Tensor, labels: Tensor) -> Tensor:
    return 2 * logits_of(model, weights, images).gather(1, labels[:, None])[:, 0]


def half_miss(model: Any, weights: Any, images: Tensor, labels: Tensor) -> Tensor:
    return miss(model, weights, images, labels) / 2


@pytest.mark.parametrize(
    "task",
    [
        plugins.LogitTask,
        plugins.LogitTask(scale=2.0),
        plugins.StaticLogitTask,
        plugins.StaticLogitTask(),
    ],
    ids=["class", "instance", "static-class", "static-instance"],
)
def test_a_task(task: Any, tmp_path: Path) -> None:
    found = run(tmp_path, task=task, projector=NoOpProjector())
    assert_scores(found, textbook(output=scaled_logit, out_to_loss=half_miss))


def test_a_task_for_whole_batches(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        task=plugins.WholeBatchTask(),
        gradient_computer=IterativeGradientComputer,
        projector=NoOpProjector(),
    )
    assert_scores(found, textbook(output=scaled_logit, out_to_loss=half_miss))


def test_an_instance_of_a_shipped_task(tmp_path: Path) -> None:
    task = ImageClassificationModelOutput(temperature=2.0)

    def softer(model: Any, weights: Any, images: Tensor, labels: Tensor) -> Tensor:
        p = (logits_of(model, weights, images) / 2).softmax(1)
        return 1 - p.gather(1, labels[:, None])[:, 0]

    found = run(tmp_path, task=task, projector=NoOpProjector())
    assert_scores(found, textbook(out_to_loss=softer))


# -- gradient computers -------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [plugins.LoopGradientComputer, plugins.FlatGradientComputer]
)
def test_a_gradient_computer_class(kind: Any, tmp_path: Path) -> None:
    found = run(tmp_path, gradient_computer=kind, projector=NoOpProjector())
    assert_scores(found, textbook())


def test_a_gradient_computer_instance(tmp_path: Path) -> None:
    model = network()
    computer = plugins.LoopGradientComputer(
        model, ImageClassificationModelOutput(), D, torch.float32, "cpu"
    )
    found = run(
        tmp_path, model=model, gradient_computer=computer, projector=NoOpProjector()
    )
    assert_scores(found, textbook())


@pytest.mark.parametrize(
    "kind", [plugins.LoopGradientComputer, plugins.FlatGradientComputer]
)
def test_gradient_computers_work_with_the_default_projection(
    kind: Any, tmp_path: Path
) -> None:
    ours = run(tmp_path / "ours")
    theirs = run(tmp_path / "theirs", gradient_computer=kind)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_gradient_computer_gets_the_names_of_grad_wrt(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        gradient_computer=plugins.LoopGradientComputer,
        grad_wrt=["2.weight", "2.bias"],
        projector=NoOpProjector(),
    )
    assert_scores(found, textbook(columns=slice(28, D)))


def test_a_gradient_computer_gets_the_names_of_what_is_not_frozen(
    tmp_path: Path,
) -> None:
    model = network()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    found = run(
        tmp_path,
        model=model,
        gradient_computer=plugins.LoopGradientComputer,
        projector=NoOpProjector(),
    )
    assert_scores(found, textbook(columns=slice(28, D)))


def test_the_keywords_a_gradient_computer_is_built_with(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Recorder(plugins.LoopGradientComputer):
        def __init__(self, **options: Any) -> None:
            seen.update(options)
            super().__init__(**options)

    traker = make(tmp_path, gradient_computer=Recorder)
    assert list(seen) == ["model", "task", "grad_dim", "dtype", "device", "grad_wrt"]
    assert seen["model"] is traker.model
    assert seen["task"] is traker.task
    assert seen["grad_dim"] == D
    assert seen["grad_wrt"] is None


# -- projectors ---------------------------------------------------------------------


@pytest.mark.parametrize("proj_dim", [None, 2048])
def test_a_projector_instance(proj_dim: int | None, tmp_path: Path) -> None:
    projector = normal_projector()
    # 0.3.2's documentation says to leave proj_dim as None beside a projector.
    found = run(tmp_path, projector=projector, proj_dim=proj_dim)
    assert_scores(found, textbook(matrices(projector)))


def test_a_projector_class(tmp_path: Path) -> None:
    found = run(
        tmp_path, projector=plugins.NormalProjector, proj_dim=P, projector_seed=3
    )
    assert_scores(found, textbook(matrices(normal_projector(seed=3))))


def test_proj_dim_none_needs_a_projector(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="proj_dim"):
        make(tmp_path, proj_dim=None)
    with pytest.raises(OptionError, match="proj_dim"):
        make(tmp_path, proj_dim=None, projector=plugins.NormalProjector)


def test_a_projector_gets_what_the_gradient_computer_gives(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Recorder(plugins.NormalProjector):
        def project(self, grads: Any, model_id: int) -> Tensor:
            seen.append(grads)
            return super().project(grads, model_id)

    projector = Recorder(D, P, 0, "normal", "cpu")
    featurize(make(tmp_path / "dict", projector=projector))
    assert all(isinstance(grads, dict) for grads in seen)
    assert list(seen[0]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert seen[0]["0.weight"].shape == (7, 4, 6)
    seen.clear()
    computer = plugins.FlatGradientComputer
    traker = make(tmp_path / "flat", projector=projector, gradient_computer=computer)
    featurize(traker)
    assert seen[0].shape == (7, D)


# -- score computers ----------------------------------------------------------------


@pytest.mark.parametrize("lambda_reg", [0.5, 0.0])
def test_a_score_computer_class(lambda_reg: float, tmp_path: Path) -> None:
    projector = normal_projector()
    found = run(
        tmp_path,
        projector=projector,
        score_computer=plugins.RidgeScoreComputer,
        lambda_reg=lambda_reg,
    )
    expected = textbook(matrices(projector), ridge=lambda_reg)
    # Undamped, the condition number of the kernel multiplies float32's rounding.
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)


def test_a_score_computer_gets_0_3_2s_default_number(tmp_path: Path) -> None:
    projector = normal_projector()
    traker = make(
        tmp_path,
        projector=projector,
        score_computer=plugins.RidgeScoreComputer,
        lambda_reg="auto",
    )
    assert traker.score_computer.lambda_reg == 0.0
    featurize(traker)
    expected = textbook(matrices(projector), ridge=0.0)
    found = torch.from_numpy(score(traker) + 0.0).double()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_a_score_computer_instance(tmp_path: Path) -> None:
    projector = normal_projector()
    computer = plugins.RidgeScoreComputer(torch.float32, "cpu", lambda_reg=2.0)
    found = run(tmp_path, projector=projector, score_computer=computer)
    assert_scores(found, textbook(matrices(projector), ridge=2.0))


def test_one_step_of_the_shipped_score_computer_replaced(tmp_path: Path) -> None:
    projector = normal_projector()
    found = run(
        tmp_path, projector=projector, score_computer=plugins.HalvedScoreComputer
    )
    assert_scores(found, textbook(matrices(projector)) / 2)


def test_the_keywords_a_score_computer_is_built_with(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Recorder(plugins.RidgeScoreComputer):
        def __init__(self, **options: Any) -> None:
            seen.update(options)
            super().__init__(**options)

    make(tmp_path, score_computer=Recorder)
    assert list(seen) == ["dtype", "device", "logging_level", "lambda_reg"]


def test_del_grads_keeps_a_score_computers_features(tmp_path: Path) -> None:
    projector = normal_projector()
    traker = make(
        tmp_path, projector=projector, score_computer=plugins.RidgeScoreComputer
    )
    featurize(traker, finalize=False)
    traker.finalize_features(del_grads=True)
    assert_scores(score(traker), textbook(matrices(projector)))


# -- savers -------------------------------------------------------------------------


def saver_options(save_dir: Path) -> dict[str, Any]:
    return {
        "save_dir": save_dir,
        "metadata": {},
        "train_set_size": N,
        "proj_dim": P,
        "load_from_save_dir": True,
        "logging_level": 100,
        "use_half_precision": False,
    }


@pytest.mark.parametrize("score_computer", [None, plugins.RidgeScoreComputer])
@pytest.mark.parametrize("as_instance", [False, True])
def test_a_saver_in_memory(
    as_instance: bool, score_computer: Any, tmp_path: Path
) -> None:
    projector = normal_projector()
    saver: Any = plugins.RamSaver
    if as_instance:
        saver = saver(**saver_options(tmp_path))
    found = run(
        tmp_path, projector=projector, saver=saver, score_computer=score_computer
    )
    assert_scores(found, textbook(matrices(projector)))


def test_a_saver_in_memory_in_half_precision(tmp_path: Path) -> None:
    projector = normal_projector()
    found = run(
        tmp_path, projector=projector, saver=plugins.RamSaver, use_half_precision=True
    )
    expected = textbook(matrices(projector))
    # Rows are rounded by one part in 2048.
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("score_computer", [None, plugins.RidgeScoreComputer])
def test_a_saver_that_deletes_gradients(score_computer: Any, tmp_path: Path) -> None:
    projector = normal_projector()
    traker = make(
        tmp_path,
        projector=projector,
        saver=plugins.RamSaver,
        score_computer=score_computer,
    )
    featurize(traker, finalize=False)
    traker.finalize_features(del_grads=True)
    assert_scores(score(traker), textbook(matrices(projector)))


def test_a_saver_holds_the_features(tmp_path: Path) -> None:
    traker = make(tmp_path, projector=normal_projector(), saver=plugins.RamSaver)
    featurize(traker)
    traker.saver.load_current_store(1)
    rows = torch.from_numpy(traker.saver.current_store["grads"]).double()
    features = torch.from_numpy(traker.saver.current_store["features"]).double()
    kernel = rows.T @ rows + 0.5 * torch.eye(P).double()
    torch.testing.assert_close(features @ kernel, rows, rtol=1e-4, atol=1e-4)


def test_the_keywords_a_saver_is_built_with(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Recorder(plugins.RamSaver):
        def __init__(self, **options: Any) -> None:
            seen.update(options)
            super().__init__(**options)

    traker = make(tmp_path, saver=Recorder)
    assert list(seen) == list(saver_options(tmp_path))
    keys = ("JL dimension", "JL matrix type", "train set size")
    assert [seen["metadata"][key] for key in keys] == [P, "sparse", N]
    assert json.loads(json.dumps(seen["metadata"])) == seen["metadata"]
    assert traker.saver.save_dir == tmp_path.resolve()


def test_plugins_say_what_the_façade_passes() -> None:
    """The classes above take 0.3.2's arguments by name and no others."""
    for cls in (plugins.RamSaver, plugins.LoopGradientComputer):
        kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert M < N
