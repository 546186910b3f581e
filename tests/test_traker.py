"""The scores of every kind of model and option, against the float64 oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import problems
from tests.problems import (
    AUTO,
    PROBLEMS,
    Pair,
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
from trak import _memory
from trak._batches import take
from trak.errors import OptionError, SingularKernelError
from trak.gradient_computers import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import BasicProjector, NoOpProjector, SparseProjector
from trak.score_computers import BasicScoreComputer, BasicSingleBlockScoreComputer

COMPUTERS = [
    HookGradientComputer,
    FunctionalGradientComputer,
    IterativeGradientComputer,
]


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_the_oracle(tmp_path: Path, name: str, computer: type) -> None:
    problem = PROBLEMS[name](checkpoints=2)
    text = {"task": "text_classification"} if name == "named" else {}
    scores = run(problem, tmp_path, 5, gradient_computer=computer, **text)
    assert_scores(scores, problem.expected(sparse(problem)))


@pytest.mark.parametrize("lambda_reg", ["auto", 0.3, "pinv"])
@pytest.mark.parametrize("p", [1, 6, 11, 13, 90])
def test_dual_and_primal_agree_with_the_explicit_formula(
    tmp_path: Path, p: int, lambda_reg: float | str
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    if p == problem.n and lambda_reg == "pinv":
        pytest.skip("a square undamped kernel is too badly conditioned for float32")
    scores = run(problem, tmp_path, proj_dim=p, lambda_reg=lambda_reg)
    rtol = 1e-3 if lambda_reg == "pinv" else 1e-4
    assert_scores(scores, problem.expected(sparse(problem, p), lambda_reg), rtol)


@pytest.mark.parametrize(
    ("projector", "p"),
    [
        (lambda d: SparseProjector(d, 5, seed=3), 5),
        (lambda d: BasicProjector(d, 5, 1, "rademacher", "cpu"), 5),
        (lambda d: BasicProjector(d, 9, 1, "normal", "cpu"), 9),
        (lambda d: NoOpProjector(), 43),
        (lambda d: NoOpProjector, 43),
        (lambda d: BasicProjector, 6),
        (lambda d: SparseProjector, 6),
    ],
)
def test_projector_given_as_class_or_instance(
    tmp_path: Path, projector: Any, p: int
) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path, projector=projector(43), proj_dim=6)
    assert traker.proj_dim == p
    featurize(traker, problem)
    traker.finalize_features()
    assert_scores(score(traker, problem), problem.expected(traker.projector))


def test_batches_splits_and_orders_do_not_matter(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    expected = run(problem, tmp_path / "whole")
    for step in (1, 3, 4):
        assert_scores(run(problem, tmp_path / str(step), step), expected, 1e-5)
    traker = make(problem, tmp_path / "shuffled")
    traker.load_checkpoint(problem.checkpoints[0])
    order = [7, 2, 10, 0, 3, 1, 9, 4, 8, 5, 6]
    kinds = [list, np.array, torch.tensor, tuple, iter, lambda x: np.array(x)[:, None]]
    images, labels = problem.train
    for i, low in enumerate(range(0, 11, 2)):
        inds = order[low : low + 2]
        traker.featurize((images[inds], labels[inds]), inds=kinds[i](inds))
    traker.finalize_features()
    assert_scores(score(traker, problem, 3), expected, 1e-5)


@pytest.mark.parametrize(
    "convert",
    [
        list,
        lambda batch: Pair(*batch),
        lambda batch: {"images": batch[0], "labels": batch[1]},
        lambda batch: tuple(value.numpy() for value in batch),
        lambda batch: [batch[0].numpy()[::1], batch[1]],
        lambda batch: (batch[0].flip(0).flip(0).T.contiguous().T, batch[1]),
    ],
)
def test_batches_of_any_container(tmp_path: Path, convert: Any) -> None:
    class Keyword(torch.nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images)

    problem = classification(Keyword(*mlp()), 4)
    expected = run(problem, tmp_path / "tuple")
    problem.train, problem.targets = convert(problem.train), convert(problem.targets)
    problem.labels = lambda batch: batch["labels"]
    traker = make(problem, tmp_path / "other")
    traker.load_checkpoint(problem.checkpoints[0])
    traker.featurize(problem.train)
    traker.finalize_features()
    traker.start_scoring_checkpoint(problem.checkpoints[0], num_targets=4)
    traker.score(problem.targets)
    assert_scores(torch.from_numpy(traker.finalize_scores() + 0.0), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_inputs(tmp_path: Path, dtype: torch.dtype) -> None:
    class Bytes(torch.nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images.double())

    problem = classification(Bytes(*mlp()), 4)
    for batch in ("train", "targets"):
        images, labels = getattr(problem, batch)
        setattr(problem, batch, ((images > 0).to(dtype), labels))
    assert_scores(run(problem, tmp_path, 4), problem.expected(sparse(problem)))


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_switched_gradients_off(
    tmp_path: Path, computer: type, guard: Any
) -> None:
    problem = classification(mlp(), 4)
    expected = run(problem, tmp_path / "enabled", gradient_computer=computer)
    with guard():
        problem.train = (problem.train[0] * 1, problem.train[1])
        scores = run(problem, tmp_path / "off", gradient_computer=computer)
    torch.testing.assert_close(scores, expected)


def test_half_precision_storage(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    exact = run(problem, tmp_path / "single", proj_dim=5)
    half = run(problem, tmp_path / "half", proj_dim=5, use_half_precision=True)
    # Rows are off by 2^-11 each; two of them and a damped inverse, whose own error is
    # at most twice theirs, enter a score.
    assert_scores(half, exact, 4 * 2.0**-11)
    stored = np.load(tmp_path / "half" / "0" / "grads.mmap")
    assert stored.dtype == np.float16


def test_half_precision_has_the_range_of_single(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    problem.train = (problem.train[0] * 1e9, problem.train[1])
    exact = run(problem, tmp_path / "single", proj_dim=5)
    half = run(problem, tmp_path / "half", proj_dim=5, use_half_precision=True)
    assert_scores(half, exact, 4 * 2.0**-11)


@pytest.mark.parametrize("tile", [1, 7, 40])
@pytest.mark.parametrize("p", [5, 11, 20])
def test_tile_size_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, p: int, tile: int
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    whole = make(problem, tmp_path / "whole", proj_dim=p)
    tiled = make(problem, tmp_path / "tiled", proj_dim=p)
    results = []
    for traker in (whole, tiled):
        featurize(traker, problem)
        traker.finalize_features()
        scores = score(traker, problem)
        influence = torch.from_numpy(traker.self_influence())
        top = torch.from_numpy(traker.top_k("exp", k=3).scores)
        features = torch.from_numpy(traker.saver.current_store["features"] + 0.0)
        results.append((scores, influence, top, features))
        monkeypatch.setattr(_memory, "TILE", tile)
    for ours, theirs in zip(*results, strict=True):
        assert_scores(ours, theirs, 1e-5)


def test_gradient_blocks_bound_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = classification(mlp(), 4)
    options = {"gradient_computer": FunctionalGradientComputer}
    expected = run(problem, tmp_path / "whole", **options)
    sizes = []
    compute = FunctionalGradientComputer.compute_per_sample_grad

    def record(self: Any, batch: Any) -> Any:
        sizes.append(len(batch[1]))
        return compute(self, batch)

    monkeypatch.setattr(FunctionalGradientComputer, "compute_per_sample_grad", record)
    monkeypatch.setattr(FunctionalGradientComputer, "max_block_bytes", 4 * 43 * 3)
    scores = run(problem, tmp_path / "blocks", **options)
    assert sizes == [3, 3, 3, 2, 3, 1]
    assert_scores(scores, expected, 1e-5)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("p", [5, 20])
def test_top_k_is_the_sorted_matrix(
    tmp_path: Path, p: int, k: int, largest: bool
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    traker = make(problem, tmp_path, proj_dim=p)
    featurize(traker, problem)
    traker.finalize_features()
    scores = score(traker, problem).numpy()
    top = traker.top_k("exp", k, largest=largest)
    order = np.argsort(-scores if largest else scores, axis=0, kind="stable")[:k].T
    np.testing.assert_array_equal(top.indices, order)
    np.testing.assert_allclose(
        top.scores, np.take_along_axis(scores.T, order, 1), rtol=1e-6
    )


@pytest.mark.parametrize("k", [0, 12])
def test_top_k_needs_a_k_that_exists(tmp_path: Path, k: int) -> None:
    traker = make(classification(mlp(), 4), tmp_path)
    with pytest.raises(OptionError, match="k"):
        traker.top_k("exp", k)


@pytest.mark.parametrize("lambda_reg", ["auto", 0.3, "pinv"])
@pytest.mark.parametrize("p", [5, 11, 20])
def test_self_influence_is_the_diagonal(
    tmp_path: Path, p: int, lambda_reg: float | str
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    problem.targets, problem.m = problem.train, problem.n
    traker = make(problem, tmp_path, proj_dim=p, lambda_reg=lambda_reg)
    featurize(traker, problem)
    traker.finalize_features()
    influence = torch.from_numpy(traker.self_influence())
    assert_scores(influence, score(traker, problem).diagonal(), 1e-4)


def test_self_influence_of_one_checkpoint(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    traker = make(problem, tmp_path)
    featurize(traker, problem)
    traker.finalize_features()
    features, _, weights = problem.parts(sparse(problem))
    rows = features[1] * weights[1][:, None] ** AUTO[0]
    inverse = problems.reference.ridge_inverse(rows, "auto")
    expected = (rows @ inverse * features[1]).sum(1) * weights[1] ** AUTO[1]
    assert_scores(torch.from_numpy(traker.self_influence([1])), expected)


@pytest.mark.parametrize("p", [5, 20])
def test_a_score_computer_of_three_methods_gives_the_same(
    tmp_path: Path, p: int
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    blocked = run(problem, tmp_path / "blocked", proj_dim=p, exponents=(0.0, 1.0))
    single = run(
        problem,
        tmp_path / "single",
        proj_dim=p,
        score_computer=BasicSingleBlockScoreComputer,
    )
    assert_scores(single, blocked, 1e-4)


def test_a_subset_of_checkpoints(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=3)
    traker = make(problem, tmp_path)
    featurize(traker, problem)
    traker.finalize_features()
    score(traker, problem)
    features, targets, weights = problem.parts(sparse(problem))
    for ids in ([0], [2, 0], [1, 1]):
        scores = torch.from_numpy(traker.finalize_scores("exp", model_ids=ids) + 0.0)
        chosen = [[part[i] for i in ids] for part in (features, targets, weights)]
        assert_scores(scores, problems.reference.trak(*chosen, "auto", AUTO))


def test_ids_names_and_counts_may_be_left_out(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    traker = make(problem, tmp_path)
    for checkpoint in problem.checkpoints:
        traker.load_checkpoint(checkpoint)
        for batch, inds in split(problem.train, problem.n, 4):
            traker.featurize(batch=batch, num_samples=len(inds))
    traker.finalize_features()
    for checkpoint in problem.checkpoints:
        traker.start_scoring_checkpoint(checkpoint, num_targets=problem.m)
        for batch, _ in split(problem.targets, problem.m, 3):
            traker.score(batch=batch)
    scores = torch.from_numpy(traker.finalize_scores() + 0.0)
    assert_scores(scores, problem.expected(sparse(problem)))
    assert list(traker.saver.model_ids) == [0, 1]
    assert list(traker.saver.experiments) == ["default"]


def test_scores_stay_in_memory_when_changed(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path)
    featurize(traker, problem)
    traker.finalize_features()
    expected = score(traker, problem)
    traker.scores[:] = 0
    again = torch.from_numpy(traker.finalize_scores("exp") + 0.0)
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize(
    ("grad_wrt", "names"),
    [
        (["2.weight", "0.bias"], ["0.bias", "2.weight"]),
        ("2.*", ["2.weight", "2.bias"]),
        ({"*.bias"}, ["0.bias", "2.bias"]),
        (lambda name, value: value.ndim == 1, ["0.bias", "2.bias"]),
    ],
)
@pytest.mark.parametrize("computer", COMPUTERS)
def test_only_selected_parameters_count(
    tmp_path: Path, grad_wrt: Any, names: list[str], computer: type
) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path, gradient_computer=computer, grad_wrt=grad_wrt)
    featurize(traker, problem)
    traker.finalize_features()
    scores = score(traker, problem)
    problem.model.requires_grad_(False)
    for name in names:
        problem.model.get_parameter(name).requires_grad_()
    assert traker.num_params_for_grad == sum(
        value.numel() for value in problem.parameters().values()
    )
    assert_scores(scores, problem.expected(sparse(problem)))


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("freeze", [True, False])
def test_unselected_parameters_are_not_differentiated(
    tmp_path: Path, computer: type, freeze: bool
) -> None:
    problem = classification(problems.Guarded(), 4)
    problem.model.frozen.requires_grad_(not freeze)
    chosen = {} if freeze else {"grad_wrt": ["head.*"]}
    scores = run(problem, tmp_path, gradient_computer=computer, **chosen)
    assert scores.abs().max() > 0


def test_repeated_finalizing_changes_nothing(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path)
    featurize(traker, problem)
    traker.finalize_features()
    before = score(traker, problem)
    traker.finalize_features()
    torch.testing.assert_close(torch.from_numpy(traker.finalize_scores("exp")), before)


def test_progress_bars_by_logging_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = classification(mlp(), 4)
    run(problem, tmp_path / "quiet", logging_level=30)
    assert capsys.readouterr().err == ""
    run(problem, tmp_path / "told", logging_level=20)
    assert "Scoring" in capsys.readouterr().err


def test_take_leaves_shared_entries_alone() -> None:
    batch = {"rows": torch.arange(3), "shared": torch.tensor(1.0)}
    assert take(batch, slice(1, 2))["shared"] is batch["shared"]


@pytest.mark.parametrize("p", [7, 30])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("power", [-60, -40, 40, 55])
def test_the_scale_of_the_gradients_does_not_matter(
    tmp_path: Path, power: int, half: bool, p: int
) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    options = {"use_half_precision": half, "proj_dim": p}
    plain = run(problem, tmp_path / "plain", **options)
    problem.task = Scaled(2.0**power)
    scaled = run(problem, tmp_path / "scaled", **options)
    assert_scores(scaled, plain, 1e-5)


@pytest.mark.parametrize("power", [-70, 75])
def test_a_scale_that_float32_products_cannot_hold(tmp_path: Path, power: int) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path, task=Scaled(2.0**power))
    featurize(traker, problem)
    with pytest.raises(SingularKernelError, match="nearer to 1"):
        traker.finalize_features()


class Scaled(ImageClassificationModelOutput):
    """Margins times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def get_output(self, model: Any, weights: Any, buffers: Any, *example: Any) -> Any:
        return self.factor * super().get_output(model, weights, buffers, *example)


class Doubling(torch.nn.Module):
    """A model that may write to its input before anything else."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.layers = mlp()
        self.inplace = inplace

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.inplace:
            inputs *= 2
        else:
            inputs = inputs * 2
        logits: torch.Tensor = self.layers(inputs)
        return logits


@pytest.mark.parametrize("computer", COMPUTERS)
def test_models_that_write_to_their_inputs(tmp_path: Path, computer: type) -> None:
    writing, plain = (
        classification(Doubling(inplace=inplace), 4) for inplace in (True, False)
    )
    options = {"gradient_computer": computer}
    scores = run(writing, tmp_path / "writing", 4, **options)
    assert torch.equal(scores, run(plain, tmp_path / "plain", 4, **options))
    assert torch.equal(writing.train[0], plain.train[0])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_score_computer_on_another_device(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    expected = problem.expected(sparse(problem))
    problem.model.cuda()
    problem.train, problem.targets = (
        tuple(tensor.cuda() for tensor in batch)
        for batch in (problem.train, problem.targets)
    )
    scores = run(problem, tmp_path, score_computer=BasicScoreComputer(device="cpu"))
    assert_scores(scores, expected)


@pytest.mark.parametrize("name", ["gradient_computer", "score_computer", "saver"])
def test_parts_that_are_in_use_cannot_be_replaced(tmp_path: Path, name: str) -> None:
    traker = make(classification(mlp(), 4), tmp_path)
    with pytest.raises(OptionError, match=f"{name} cannot be replaced"):
        setattr(traker, name, getattr(traker, name))
