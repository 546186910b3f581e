"""Estimates against what then happens, and that making one changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import problems
import pytest
import torch

import trak
from trak._estimate_table import Estimate, Stage
from trak._probes import untouched
from trak.errors import BatchError, OptionError, UnknownTaskError


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
    assert_within(without.total.disk, expected.total.disk, 0.02)  # another save_dir
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
