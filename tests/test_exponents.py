"""The exponents of the out-to-loss weight: parsing, the formula, stores of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.problems import (
    AUTO,
    Problem,
    assert_scores,
    classification,
    featurize,
    make,
    mlp,
    run,
    score,
    sparse,
)
from trak import TRAKer, estimate
from trak._exponents import Exponents, parse_exponents
from trak.errors import ModelIDException, OptionError, StoreMismatchError, TaskError
from trak.modelout_functions import (
    TASK_TO_MODELOUT,
    AbstractModelOutput,
    BinaryClassificationModelOutput,
    CLIPModelOutput,
    FunctionTask,
    ImageClassificationModelOutput,
    RegressionModelOutput,
    TextClassificationModelOutput,
)
from trak.score_computers import (
    AbstractScoreComputer,
    BasicScoreComputer,
    BasicSingleBlockScoreComputer,
)

PAIRS = [(0.25, 0.25), (1.0, 0.0), (0.0, 0.0), (0.5, 2.0)]


def signed(checkpoints: int = 2) -> Problem:
    """A regression, whose weights have both signs; 0 for the first example."""
    problem = classification(torch.nn.Linear(4, 1), 4, checkpoints=checkpoints)
    problem.task = "regression"

    def weigh(checkpoint: dict[str, Tensor]) -> Tensor:
        problem.model.load_state_dict(checkpoint)
        with torch.no_grad():
            return problem.train[1] - problem.model(problem.train[0])[:, 0]

    problem.train = problem.train[0], problem.train[1].double()
    problem.targets = problem.targets[0], problem.targets[1].double()
    with torch.no_grad():
        problem.model.load_state_dict(problem.checkpoints[0])
        problem.train[1][0] = problem.model(problem.train[0])[0, 0]
    problem.out_to_loss = weigh  # type: ignore[method-assign]
    problem.gradients = gradients  # type: ignore[method-assign]
    return problem


def gradients(checkpoint: Any, batch: Any, size: int) -> Tensor:
    return torch.cat([batch[0], torch.ones(size, 1)], dim=1)


@pytest.mark.parametrize("exponents", PAIRS)
@pytest.mark.parametrize(
    ("p", "lambda_reg"),
    [(1, "auto"), (6, 0.3), (6, "pinv"), (11, "auto"), (20, "pinv")],
)
def test_scores_are_the_explicit_formula(
    tmp_path: Path, p: int, lambda_reg: float | str, exponents: tuple[float, float]
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    options = {"proj_dim": p, "lambda_reg": lambda_reg, "exponents": exponents}
    scores = run(problem, tmp_path, **options)
    expected = problem.expected(sparse(problem, p), lambda_reg, exponents)
    assert_scores(scores, expected, 1e-3 if lambda_reg == "pinv" else 1e-4)


@pytest.mark.parametrize("exponents", PAIRS)
@pytest.mark.parametrize("p", [3, 20])
def test_signs_and_zeros(
    tmp_path: Path, p: int, exponents: tuple[float, float]
) -> None:
    problem = signed(1)
    scores = run(problem, tmp_path, proj_dim=p, exponents=exponents)
    assert_scores(scores, problem.expected(sparse(problem, p), "auto", exponents))
    assert bool((scores[0] == 0).all()) == (exponents != (0.0, 0.0))


@pytest.mark.parametrize("exponents", PAIRS)
def test_the_sign_is_that_of_the_mean(
    tmp_path: Path, exponents: tuple[float, float]
) -> None:
    problem = signed(3)
    weights = torch.stack([problem.out_to_loss(c) for c in problem.checkpoints])
    assert ((weights > 0).any(0) & (weights < 0).any(0)).any()
    scores = run(problem, tmp_path, exponents=exponents)
    assert_scores(scores, problem.expected(sparse(problem), "auto", exponents))


@pytest.mark.parametrize("exponents", [(0.25, 0.25), (1.0, 0.0)])
@pytest.mark.parametrize("p", [5, 20])
def test_half_precision_rows(
    tmp_path: Path, p: int, exponents: tuple[float, float]
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    options = {"proj_dim": p, "exponents": exponents, "use_half_precision": True}
    expected = problem.expected(sparse(problem, p), "auto", exponents)
    assert_scores(run(problem, tmp_path, **options), expected, 4 * 2.0**-11)


@pytest.mark.parametrize("exponents", PAIRS[:2])
@pytest.mark.parametrize("p", [5, 20])
def test_features_alone_are_enough(
    tmp_path: Path, p: int, exponents: tuple[float, float]
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    traker = make(problem, tmp_path, proj_dim=p, exponents=exponents)
    featurize(traker, problem)
    traker.finalize_features(del_grads=True)
    expected = problem.expected(sparse(problem, p), "auto", exponents)
    assert_scores(score(traker, problem), expected)
    # The exponent of the result is no part of what is stored.
    other = make(problem, tmp_path, proj_dim=p, exponents=(exponents[0], 3.0))
    other.finalize_features()
    expected = problem.expected(sparse(problem, p), "auto", (exponents[0], 3.0))
    assert_scores(torch.from_numpy(other.finalize_scores("exp") + 0.0), expected)
    with pytest.raises(ModelIDException, match="gradients were deleted"):
        make(problem, tmp_path, proj_dim=p, exponents=(0.3, 1.0)).finalize_features()


@pytest.mark.parametrize("exponents", PAIRS[:2])
@pytest.mark.parametrize("lambda_reg", ["auto", "pinv"])
@pytest.mark.parametrize("p", [5, 20])
def test_self_influence_is_the_diagonal(
    tmp_path: Path, p: int, lambda_reg: str, exponents: tuple[float, float]
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    problem.targets, problem.m = problem.train, problem.n
    options = {"proj_dim": p, "lambda_reg": lambda_reg, "exponents": exponents}
    traker = make(problem, tmp_path, **options)
    featurize(traker, problem)
    traker.finalize_features()
    influence = torch.from_numpy(traker.self_influence())
    assert_scores(influence, score(traker, problem).diagonal(), 1e-3)


@pytest.mark.parametrize("weight", [0.0, 1e-14, 1e-4])
@pytest.mark.parametrize("p", [5, 20])
def test_self_influence_of_next_to_no_weight(
    tmp_path: Path, p: int, weight: float
) -> None:
    """In the dual it is a difference from one, divided by the weight."""
    problem = classification(mlp(), 4)
    problem.targets, problem.m = problem.train, problem.n
    traker = make(problem, tmp_path, proj_dim=p, exponents=(1.0, 0.0))
    featurize(traker, problem)
    traker.saver.current_store["out_to_loss"][3:6] = weight
    traker.finalize_features()
    influence = torch.from_numpy(traker.self_influence())
    found = score(traker, problem).diagonal()
    torch.testing.assert_close(influence[3:6], found[3:6], rtol=1e-3, atol=0)


def test_top_k_is_the_sorted_matrix(tmp_path: Path) -> None:
    problem = signed(2)
    traker = make(problem, tmp_path, exponents=(0.5, 0.5))
    featurize(traker, problem)
    traker.finalize_features()
    scores = score(traker, problem).numpy()
    top = traker.top_k("exp", 5)
    order = np.argsort(-scores, axis=0, kind="stable")[:5].T
    np.testing.assert_array_equal(top.indices, order)


def test_a_store_finalized_with_others_says_so(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    paper = make(problem, tmp_path, exponents=(0.0, 1.0))
    featurize(paper, problem)
    paper.finalize_features()
    first = score(paper, problem)
    other = make(problem, tmp_path)
    message = (
        r"lambda_reg='auto', and .*exponents=\(0.25, ...\); call finalize_features"
    )
    with pytest.raises(StoreMismatchError, match=message):
        other.finalize_scores("exp")
    other.finalize_features()
    assert not (tmp_path / "0" / "gram.mmap").exists()
    expected = problem.expected(sparse(problem), "auto", AUTO)
    for traker in (other, make(problem, tmp_path)):
        assert_scores(torch.from_numpy(traker.finalize_scores("exp") + 0.0), expected)
    record = traker.saver.experiments["exp"]
    assert record["finalized_with"].endswith("exponents=(0.25, 0.5)")
    back = make(problem, tmp_path, exponents=(0.0, 1.0))
    back.finalize_features()
    assert not (tmp_path / "0" / "weighted_gram.mmap").exists()
    again = torch.from_numpy(back.finalize_scores("exp") + 0.0)
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_a_gram_matrix_of_other_exponents_is_not_used(tmp_path: Path) -> None:
    """The matrix is written before the record that says what it is of."""
    problem = classification(mlp(), 4, checkpoints=1)
    traker = make(problem, tmp_path)
    featurize(traker, problem)
    traker.finalize_features()
    expected = score(traker, problem)
    grams = {}
    for a in (0.0, 0.5):
        other = make(problem, tmp_path / str(a), exponents=(a, 1.0))
        featurize(other, problem)
        other.finalize_features()
        name = "weighted_gram.mmap" if a else "gram.mmap"
        grams[name] = (tmp_path / str(a) / "0" / name).read_bytes()
    for name, content in grams.items():
        (tmp_path / "0" / "weighted_gram.mmap").unlink()
        (tmp_path / "0" / name).write_bytes(content)
        again = make(problem, tmp_path).finalize_scores("exp")
        torch.testing.assert_close(torch.from_numpy(again + 0.0), expected)
        (tmp_path / "0" / "weighted_gram.mmap").touch()


def test_features_are_those_of_weighted_rows(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    for p in (5, 20):
        traker = make(problem, tmp_path / str(p), proj_dim=p)
        featurize(traker, problem)
        traker.finalize_features()
        scores = score(traker, problem).double()
        store = traker.saver.current_store
        weights = store["out_to_loss"].astype("float64") ** AUTO[1]
        found = weights * (store["features"] @ store["exp_grads"].T)
        assert_scores(torch.from_numpy(found), scores)


def test_zero_rows_are_those_of_the_store(tmp_path: Path) -> None:
    problem = signed(1)
    traker = make(problem, tmp_path, exponents=(1.0, 0.0))
    featurize(traker, problem)
    traker.finalize_features()
    assert traker.reports[0].zero_rows == 0
    assert traker.reports[0].saturated == pytest.approx(1 / 11)


def test_no_weight_at_all(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path)
    featurize(traker, problem)
    traker.saver.current_store["out_to_loss"][:] = 0
    with pytest.raises(TaskError, match="all 11 training examples is exactly zero"):
        traker.finalize_features()


@pytest.mark.parametrize(
    "exponents",
    [(-0.1, 1), (0, float("nan")), (0, float("inf")), (1,), (1, 2, 3), "01", 1.0, ()],
)
@pytest.mark.usefixtures("untyped")
def test_bad_pairs(tmp_path: Path, exponents: Any) -> None:
    problem = classification(mlp(), 4)
    message = r"is not a pair of numbers >= 0; pass \(a, b\)"
    with pytest.raises(OptionError, match=message):
        parse_exponents(exponents)
    with pytest.raises(OptionError, match=message):
        make(problem, tmp_path, exponents=exponents)
    with pytest.raises(OptionError, match=message):
        BasicScoreComputer(exponents=exponents)
    assert not tmp_path.joinpath("metadata.json").exists()


def test_pairs_of_any_kind() -> None:
    for pair in ([0, 1], (np.float32(0), torch.tensor(1.0)), np.array([0, 1])):
        assert parse_exponents(pair) == Exponents()


@pytest.mark.parametrize(
    ("lambda_reg", "given", "expected"),
    [
        ("auto", None, AUTO),
        (0.3, None, (0, 1)),
        ("pinv", None, (0, 1)),
        (0.3, (1.0, 0.0), (1, 0)),
    ],
)
def test_what_is_used_if_none_is_given(
    tmp_path: Path, lambda_reg: Any, given: Any, expected: Any
) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path, lambda_reg=lambda_reg, exponents=given)
    assert traker.exponents == expected


def test_tasks_have_them() -> None:
    classifiers = {
        ImageClassificationModelOutput,
        TextClassificationModelOutput,
        BinaryClassificationModelOutput,
        TASK_TO_MODELOUT["iterative_image_classification"],
    }
    for task in classifiers:
        assert task.exponents == AUTO
    for task in (RegressionModelOutput, CLIPModelOutput, FunctionTask):
        assert task.exponents == AbstractModelOutput.exponents == (0, 1)


def test_those_of_a_task_are_no_part_of_what_it_computes(tmp_path: Path) -> None:
    class Own(ImageClassificationModelOutput):
        exponents = (1.0, 0.5)

    text = Own().describe()
    Own.exponents = (0.0, 0.5)
    assert Own().describe() == text
    assert make(classification(mlp(), 4), tmp_path, task=Own).exponents == (0, 0.5)


class Older(BasicScoreComputer):
    """A class of before there were exponents."""

    def __init__(
        self, dtype: Any, device: Any, logging_level: int, lambda_reg: Any
    ) -> None:
        super().__init__(dtype, device, logging_level=logging_level, lambda_reg=0.4)


class Keywords(BasicScoreComputer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)


class Own(AbstractScoreComputer):
    def get_xtx(self, grads: Tensor) -> Tensor:
        return grads.T @ grads

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        return grads @ torch.linalg.inv(xtx + 0.4 * torch.eye(len(xtx)))

    def get_scores(self, features: Tensor, target_grads: Tensor, accumulator: Tensor):
        accumulator += features @ target_grads.T


@pytest.mark.parametrize("kind", [Older, Own, BasicSingleBlockScoreComputer])
def test_score_computers_without_them(tmp_path: Path, kind: type) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    traker = make(problem, tmp_path, score_computer=kind)
    assert traker.exponents == (0, 1)
    message = (
        rf"exponents=\(0.25, 0.25\), but {kind.__name__} computes with \(0.0, 1.0\)"
    )
    with pytest.raises(OptionError, match=message):
        make(problem, tmp_path, score_computer=kind, exponents=(0.25, 0.25))
    scores = run(problem, tmp_path, score_computer=kind, exponents=(0.0, 1.0))
    lambda_reg = "auto" if kind is BasicSingleBlockScoreComputer else 0.4
    expected = problem.expected(sparse(problem), lambda_reg, (0.0, 1.0))
    assert_scores(scores, expected)


def test_score_computers_with_them(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    assert make(problem, tmp_path, score_computer=Keywords).exponents == AUTO
    given = BasicScoreComputer(exponents=(0.5, 0.0))
    traker = make(problem, tmp_path, score_computer=given)
    assert traker.exponents == (0.5, 0)
    with pytest.raises(OptionError, match=r"computes with \(0.5, 0.0\)"):
        make(problem, tmp_path, score_computer=given, exponents=(0.25, 0.0))


@pytest.mark.parametrize("exponents", [None, (0.5, 0.5), (0.0, 1.0), (0.0, 0.5)])
def test_the_estimate_knows_them(tmp_path: Path, exponents: Any) -> None:
    problem = classification(mlp(), 4)
    traker: TRAKer = make(problem, tmp_path, exponents=exponents, proj_dim=64)
    featurize(traker, problem)
    traker.finalize_features()
    score(traker, problem)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    expected = estimate(
        problem.model,
        problem.task,
        problem.n,
        num_targets=problem.m,
        proj_dim=64,
        use_half_precision=False,
        exponents=exponents,
    )
    stages = (
        expected.featurize,
        expected.finalize_features,
        expected.score,
        expected.finalize_scores,
    )
    found = sum(path.stat().st_size for path in files)
    assert sum(stage.disk for stage in stages) == pytest.approx(found, rel=0.02)
