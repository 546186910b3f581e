"""Estimates against what then happens, and that making one changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import problems
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trak
from trak._blocked import Shape, Side, score_blocks
from trak._estimate import _stage
from trak._estimate_table import Estimate, Stage
from trak._gram import gram
from trak._linalg import damp
from trak._probes import Activations, BatchTime, measure_activations, untouched
from trak._score_costs import finalize_cost, scores_cost
from trak.errors import BatchError, OptionError, UnknownTaskError
from trak.gradient_computers import (
    AbstractGradientComputer,
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
    working_bytes,
)
from trak.modelout_functions import AbstractModelOutput, resolve_task
from trak.projectors import BasicProjector, NoOpProjector, SparseProjector
from trak.savers import AbstractSaver, MmapSaver
from trak.score_computers import BasicScoreComputer


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def assert_within(actual: int, estimated: int, share: float = 0.15) -> None:
    assert abs(estimated - actual) <= share * actual, (estimated, actual)


# -- disk -------------------------------------------------------------------------------

DISK: list[dict[str, Any]] = [
    {"n": 11, "m": 4, "p": 7, "c": 1, "half": False},
    {"n": 40, "m": 3, "p": 64, "c": 2, "half": True},
    {"n": 300, "m": 50, "p": 16, "c": 3, "half": True},
    {"n": 64, "m": 1, "p": 64, "c": 1, "half": False},
    {"n": 200, "m": 120, "p": 256, "c": 1, "half": True},
]


@pytest.mark.parametrize("size", DISK, ids=lambda s: "-".join(map(str, s.values())))
def test_disk_of_every_stage(size: dict[str, Any], tmp_path: Path) -> None:
    problem = problems.PROBLEMS["mlp"](n=size["n"], m=size["m"], checkpoints=size["c"])
    options = {"proj_dim": size["p"], "use_half_precision": size["half"]}
    traker = problems.make(problem, tmp_path / "store", **options)
    sizes = {"num_targets": size["m"], "num_checkpoints": size["c"]}
    args = (problem.model, problem.task, size["n"])
    expected = traker.estimate(**sizes)
    without = trak.estimate(*args, **sizes, **options)
    # The name of the directory is written too, and is another.
    assert_within(without.total.disk, expected.total.disk, 0.1)
    found = [0]

    def stage() -> int:
        found.append(on_disk(tmp_path))
        return found[-1] - found[-2]

    problems.featurize(traker, problem)
    assert_within(stage(), expected.featurize.disk)
    traker.finalize_features()
    assert_within(stage(), expected.finalize_features.disk)
    problems.score(traker, problem)
    both = expected.score.disk + expected.finalize_scores.disk
    assert_within(stage(), both)
    assert_within(found[-1], expected.total.disk, 0.02)


def test_top_k_writes_nothing(tmp_path: Path) -> None:
    problem = problems.PROBLEMS["mlp"](n=200, m=150)
    traker = problems.make(problem, tmp_path / "store", proj_dim=8)
    expected = traker.estimate(num_targets=150)
    problems.featurize(traker, problem)
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", problem.checkpoints[0], 0, 150)
    traker.score(problem.targets)
    before = on_disk(tmp_path)
    traker.top_k("exp")
    assert on_disk(tmp_path) == before
    assert expected.top_k.disk == 0
    assert_within(before, expected.total_top_k.disk, 0.02)
    assert expected.total.disk > expected.total_top_k.disk + 4 * 200 * 150


class Stepwise(BasicScoreComputer):
    """Replaces a step, so that features are made and kept, and the Gram matrix is not."""

    def get_xtx(self, grads: Tensor) -> Tensor:
        return super().get_xtx(grads)


def test_disk_of_a_score_computer_that_keeps_features(tmp_path: Path) -> None:
    problem = problems.PROBLEMS["mlp"](n=100, m=20)
    options: dict[str, Any] = {"score_computer": Stepwise, "lambda_reg": 0.5}
    traker = problems.make(problem, tmp_path / "store", proj_dim=32, **options)
    expected = traker.estimate(num_targets=20)
    problems.featurize(traker, problem)
    traker.finalize_features()
    before = expected.featurize.disk + expected.finalize_features.disk
    assert_within(before, on_disk(tmp_path), 0.02)
    problems.score(traker, problem)
    assert_within(expected.total.disk, on_disk(tmp_path), 0.02)


def test_what_a_custom_saver_writes_is_not_known(tmp_path: Path) -> None:
    class Saver(MmapSaver):
        pass

    stubs = dict.fromkeys(AbstractSaver.__abstractmethods__, lambda *_, **__: None)
    memory = type("Memory", (AbstractSaver,), stubs)
    problem = problems.PROBLEMS["mlp"]()
    theirs = problems.make(problem, tmp_path / "a", saver=memory).estimate(4)
    assert theirs.total.disk == 0
    assert "custom" in theirs.notes[-1]
    ours = problems.make(problem, tmp_path / "b", saver=Saver).estimate(4)
    assert ours.total.disk > 0
    assert "custom" not in ours.notes[-1]


# -- operations -------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the operations of products of matrices, those in place among them."""

    operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in {torch.ops.aten.mm.default, torch.ops.aten.addmm_.default}:
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("n", "p"), [(900, 300), (2000, 600), (300, 900), (9000, 64)])
def test_operations_of_the_gram_matrix(n: int, p: int) -> None:
    rows = torch.zeros(n, p)
    with Products() as counter:
        gram(lambda low, high: rows[low:high], n, p)
    cost = finalize_cost(n, p)
    assert counter.operations == cost.float32
    assert cost.float32 <= 2 * n * p * min(n, p)


@pytest.mark.parametrize(("n", "p"), [(700, 300), (200, 500)])
def test_operations_of_scores(n: int, p: int) -> None:
    m = 40
    rows, targets = torch.zeros(n, p), torch.zeros(m, p)
    kernel = damp(torch.eye(min(n, p), dtype=torch.float64), 1.0)
    side = Side(
        lambda low, high: rows[low:high],
        lambda low, high: targets[low:high],
        lambda: kernel,
    )
    shape = Shape(n, m, p, torch.device("cpu"))
    with Products() as counter:
        for _ in score_blocks([side, side], torch.ones(n, 1), shape):
            pass
    assert counter.operations == scores_cost(n, m, p, 2).float32


def test_costs_grow_with_every_size() -> None:
    base = scores_cost(1000, 100, 200, 1)
    for sizes in [(2000, 100, 200, 1), (1000, 200, 200, 1), (1000, 100, 400, 1)]:
        more = scores_cost(*sizes)
        assert more.float32 == 2 * base.float32
        assert more.device > base.device
    assert scores_cost(1000, 100, 200, 3).float32 == 3 * base.float32
    best = scores_cost(1000, 100, 200, 1, k=5)
    assert (best.float32, best.float64) == (base.float32, base.float64)
    assert best.host > base.host == 0


# -- memory -----------------------------------------------------------------------------


def computer(kind: type[AbstractGradientComputer]) -> AbstractGradientComputer:
    model = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.Linear(5, 3))
    return kind(model=model, task=resolve_task("image_classification"))


def test_memory_of_gradients() -> None:
    d, largest, act = 68, 4 * 45, 1000
    whole = computer(FunctionalGradientComputer)
    assert working_bytes(whole, 10, act) == 10 * (4 * d + act)
    whole.max_block_bytes = 4 * 4 * d  # type: ignore[attr-defined]
    assert working_bytes(whole, 10, act) == 4 * (4 * d + act) + 4 * 4 * d
    hooks = computer(HookGradientComputer)
    # Nothing streams: whole gradients; a projector that takes pieces: two of those, ...
    assert working_bytes(hooks, 10, act) == 10 * (4 * d + act)
    assert working_bytes(hooks, 10, act, largest) == 10 * act + 2 * largest
    assert working_bytes(hooks, 10, act, 1) == 10 * act + 2 * largest
    assert working_bytes(hooks, 10, act, 1 << 20) == 10 * (act + largest)  # ... or all
    # A small batch, without activations: the comparison with autograd is the most.
    assert working_bytes(hooks, 1) == 4 * d
    assert working_bytes(hooks, 1, 0, 1) == 4 * d + largest


def test_memory_of_a_foreign_computer_is_that_of_all_gradients() -> None:
    class Foreign(AbstractGradientComputer):
        load_model_params = compute_per_sample_grad = compute_loss_grad = None  # type: ignore[assignment]

    found = computer(Foreign)
    found.grad_dim = 7
    assert working_bytes(found, 3, 100) == 3 * (4 * 7 + 100)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_memory_of_projections(backend: str) -> None:
    projector = SparseProjector(1000, 64, backend=backend)
    found = projector.working_bytes(8)
    assert found >= 4 * 8 * 64
    if projector.running_backend().value == "torch":
        assert found == 2 * 4 * 8 * 64 + 2 * 8 * 4 * 1000 + 4 * 8 * 1000
    assert NoOpProjector(1000).working_bytes(8) == 4 * 8 * 1000


def test_memory_is_that_of_the_device_where_the_model_is(tmp_path: Path) -> None:
    traker = problems.make(problems.PROBLEMS["mlp"](), tmp_path)
    there = replace(traker.options, device=torch.device("cuda"))
    parts = replace(traker._parts, options=there)
    assert _stage(parts, 1, 20, 300, 4.0) == Stage(1, 300, 20, 4.0)
    assert _stage(traker._parts, 1, 20, 300, 4.0) == Stage(1, 320, 0, 4.0)


def activations(context: Any = contextlib.nullcontext, size: int = 6) -> Activations:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3)
    )
    batch = torch.randn(size, 4), torch.zeros(size, dtype=torch.long)
    task = resolve_task("image_classification")
    with context():
        return measure_activations(model.eval(), task, batch, size)


def test_activations_are_counted_for_each_example() -> None:
    found = activations()
    # The input of the layer and the output of the activation; then what the margin keeps.
    assert 4 * (4 + 50) <= found.each <= 4 * (4 + 50) + 200
    assert found.fixed <= 64
    assert activations(size=1).each == found.each + found.fixed


def test_weights_in_another_type_are_counted_once() -> None:
    narrow = activations(lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert 2 * 50 * 3 <= narrow.fixed <= 2 * 50 * 3 + 64


class PerExample(AbstractModelOutput):
    """A task that knows nothing of batches."""

    def get_output(
        self, model: Any, weights: Any, buffers: Any, *example: Any
    ) -> Tensor:
        image, label = example
        logits = torch.func.functional_call(model, (weights, buffers), (image[None],))
        return logits[0].gather(0, label[None])[0]

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Tensor:
        return torch.ones(len(batch[1]), 1)


def test_a_task_without_a_batched_form() -> None:
    batch = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    without = call(task=PerExample, batch_size=6)
    assert call(task=PerExample, batch=batch).featurize.ram > without.featurize.ram


# -- time -------------------------------------------------------------------------------


def test_the_first_batch_counts_once() -> None:
    assert BatchTime(first=5.0, others=2.0).total(1.0) == 5.0
    assert BatchTime(first=5.0, others=2.0).total(10.0) == 23.0
    assert BatchTime(first=1.0, others=2.0).total(10.0) == 20.0


def test_time_grows_with_the_work() -> None:
    """With the same probes; no time is measured here."""
    few, many = (
        call(num_targets=m, train_set_size=n) for m, n in [(9, 90), (900, 9000)]
    )
    assert few.featurize.seconds < many.featurize.seconds
    assert few.score.seconds < many.score.seconds


@pytest.mark.parametrize("projector", [BasicProjector, NoOpProjector, SparseProjector])
@pytest.mark.parametrize("kind", [HookGradientComputer, IterativeGradientComputer])
def test_any_parts(projector: Any, kind: Any) -> None:
    batch = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    options = {"projector": projector, "gradient_computer": kind, "proj_dim": 8}
    for some in (None, batch):
        found = call(task="image_classification", batch=some, **options)
        assert found.total.seconds > 0
        assert found.featurize.ram > 0


def test_the_batch_need_not_be_as_large_as_those_to_come() -> None:
    batch = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    options = {"task": "image_classification", "batch": batch}
    some, more = call(**options), call(batch_size=600, **options)
    assert "batches of 600" in more.sizes
    assert more.featurize.ram > some.featurize.ram


# -- memory, measured -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("job", ["rows", "dual", "resnet9"])
def test_memory_of_a_process(job: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "estimate.py"
    result = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, str(script), job, "--threads", "1", "--json", str(result)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
    )
    for row in json.loads(result.read_text()):
        if row["ram"] > 5e7:  # less is not dominated by what is estimated
            assert_within(row["ram"], row["estimate"]["ram"])
        assert_within(row["disk"], row["estimate"]["disk"], 0.02)


# -- nothing changes --------------------------------------------------------------------


def state(model: torch.nn.Module) -> list[Any]:
    """All that an estimate could change about a model."""
    return [
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [value.requires_grad for value in model.parameters()],
        [
            None if value.grad is None else value.grad.clone()
            for value in model.parameters()
        ],
        [value._version for value in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    ]


@pytest.fixture(params=["mlp", "residual", "named"])
def problem(request: pytest.FixtureRequest) -> problems.Problem:
    return problems.PROBLEMS[request.param]()


def test_nothing_changes(
    problem: problems.Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = problem.model.train()
    next(model.children()).eval()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = state(model)
    found = trak.estimate(
        model, problem.task, problem.n, num_targets=problem.m, batch=problem.train
    )
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert found.total.seconds > 0
    assert not list(tmp_path.iterdir())


def test_everything_is_restored_after_an_error() -> None:
    model = problems.mlp().train()
    before = state(model)

    def fail() -> None:
        with untouched(model):
            assert not model.training
            torch.rand(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)


def test_a_buffer_that_the_forward_pass_writes_is_restored() -> None:
    norm = torch.nn.BatchNorm1d(3)
    with untouched(norm):
        norm.train()
        norm(torch.randn(5, 3))
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, torch.zeros(3), rtol=0, atol=0)


def test_an_estimate_amid_the_work_changes_no_score(tmp_path: Path) -> None:
    problem = problems.PROBLEMS["mlp"](checkpoints=2)
    expected = problems.run(problem, tmp_path / "plain")
    traker = problems.make(problem, tmp_path / "store")
    for model_id, checkpoint in enumerate(problem.checkpoints):
        traker.load_checkpoint(checkpoint, model_id)
        for batch, inds in problems.split(problem.train, problem.n, 4):
            traker.estimate(3, 2, batch=problem.targets)
            traker.featurize(batch, inds=inds)
    traker.finalize_features()
    traker.estimate(3, 2)
    torch.testing.assert_close(
        problems.score(traker, problem), expected, rtol=1e-5, atol=1e-6
    )


# -- arguments --------------------------------------------------------------------------


def call(**changes: Any) -> Estimate:
    options = {"train_set_size": 10, "num_targets": 3, **changes}
    model, task = (
        options.pop("model", problems.mlp()),
        options.pop("task", "regression"),
    )
    return trak.estimate(model, task, options.pop("train_set_size"), **options)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"train_set_size": 0}, OptionError, "train_set_size must be at least 1; got 0"),
    ({"num_targets": 0}, OptionError, "num_targets must be at least 1; got 0"),
    ({"num_checkpoints": 0}, OptionError, "num_checkpoints must be at least 1; got 0"),
    ({"batch_size": 0}, OptionError, "batch_size must be at least 1; got 0"),
    ({"proj_dim": -1}, OptionError, "proj_dim must be at least 1; got -1"),
    ({"task": "clasification"}, UnknownTaskError, "Unknown task 'clasification'"),
    (
        {"grad_wrt": "head.*"},
        OptionError,
        "grad_wrt names 'head.*', which matches none",
    ),
    ({"lambda_reg": "lots"}, OptionError, "lambda_reg='lots' is not a damping"),
    ({"device": "cuda:7"}, OptionError, "the model is on cpu"),
    (
        {"projector": 3},
        OptionError,
        "projector must be a subclass of AbstractProjector",
    ),
    ({"batch": "rows"}, BatchError, "holds no tensor with a first axis"),
    ({"batch": torch.zeros(0, 4)}, BatchError, "The batch is empty"),
    ({"batch": torch.zeros(2, 4, device="meta")}, BatchError, "tensor on meta"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_wrong_arguments(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        call(**changes)
    assert message in str(caught.value)


# -- the table --------------------------------------------------------------------------


def test_table() -> None:
    stages = [
        Stage(disk=disk, ram=ram, gpu=0, seconds=seconds)
        for disk, ram, seconds in [
            (2_000_000, 3_000_000_000, 90.0),
            (1_000, 4_000_000_000, 0.5),
            (500_000, 3_000_000_000, 10.0),
            (40_000_000_000, 1_000_000_000, 7200.0),
            (0, 1_000_000_000, 60.0),
        ]
    ]
    found = Estimate(*stages, sizes="3 of those", notes=("rough",))
    assert str(found).splitlines() == [
        "3 of those",
        "                        disk       RAM       GPU        time",
        "featurize               2 MB      3 GB         -     1.5 min",
        "finalize_features       1 kB      4 GB         -      500 ms",
        "score                 500 kB      3 GB         -        10 s",
        "finalize_scores        40 GB      1 GB         -       2.0 h",
        "or top_k                   -      1 GB         -     1.0 min",
        "total                  40 GB      4 GB         -       2.0 h",
        "total with top_k      2.5 MB      4 GB         -     2.7 min",
        "rough",
    ]
    assert found.total == Stage(40_002_501_000, 4_000_000_000, 0, 7300.5)
    assert found.total_top_k == Stage(2_501_000, 4_000_000_000, 0, 160.5)


def test_notes_say_what_was_measured() -> None:
    rough, timed = (
        call(task="image_classification"),
        call(
            task="image_classification",
            batch=(torch.randn(6, 4), torch.zeros(6, dtype=torch.long)),
        ),
    )
    assert "No batch was given" in rough.notes[0]
    assert "timed with a batch of 6" in timed.notes[0]
    assert "batches of 32 on cpu" in rough.sizes
    assert "batches of 6 on cpu" in timed.sizes
