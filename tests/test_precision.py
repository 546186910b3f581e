"""Rows and scores of models and stores in narrow types, against float64 throughout."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import problems
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from trak import TRAKer
from trak._featurizing import read_rows
from trak.gradient_computers import (
    FunctionalGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import RegressionModelOutput

N, M = 24, 5

Context = Callable[[], AbstractContextManager[Any]]


class Network(torch.nn.Module):
    """A convolution, two norms and two linear layers, over one channel of 6 x 6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.hidden = torch.nn.Linear(144, 16)
        self.scale = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.nn.functional.gelu(self.norm(self.conv(images)))
        return self.head(torch.tanh(self.scale(self.hidden(x.flatten(1)))))


def network(dtype: torch.dtype) -> torch.nn.Module:
    """The same weights, rounded to a type: those that bfloat16 and float16 both hold."""
    model = Network()
    weights = problems.randomized(model, seed=3)
    rounded = {
        k: v.bfloat16().half().to(v.dtype) if v.is_floating_point() else v
        for k, v in weights.items()
    }
    model.load_state_dict(rounded)
    return model.to(dtype)


def data(size: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images = problems.draw(size, 1, 6, 6, seed=seed).bfloat16().half()
    return images.to(dtype), problems.classes(size, seed=seed)


def attribute(
    dtype: torch.dtype,
    save_dir: Path,
    context: Context = contextlib.nullcontext,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Go from a model of a type to its rows ``(n, p)`` and scores ``(n, m)``."""
    model = network(dtype)
    options = {"proj_dim": 64, "logging_level": 100, **options}
    traker = TRAKer(model, "image_classification", N, save_dir, **options)
    traker.load_checkpoint(copy.deepcopy(model.state_dict()))
    with context():
        traker.featurize(data(N, 1, dtype))
    rows = read_rows(traker.saver.current_store, "", torch.device("cpu"))(0, N)
    traker.finalize_features()
    traker.start_scoring_checkpoint(model.state_dict(), num_targets=M)
    with context():
        traker.score(data(M, 2, dtype))
    return rows, torch.from_numpy(traker.finalize_scores() + 0.0)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    directory = tmp_path_factory.mktemp("exact")
    return attribute(torch.float64, directory, use_half_precision=False)


def cosines(
    left: Float[Tensor, "n p"], right: Float[Tensor, "n p"]
) -> Float[Tensor, " n"]:
    return torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=1)


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


COMPUTERS = [None, FunctionalGradientComputer, IterativeGradientComputer]

# Some ten roundings lie between an example and its gradient; each turns it by half the
# spacing of the type, 2**-9 for bfloat16 and 2**-12 for float16, or less.
NARROW = {
    "float32": (torch.float32, contextlib.nullcontext, 1e-11),
    "float16": (torch.float16, contextlib.nullcontext, 5e-6),
    "bfloat16": (torch.bfloat16, contextlib.nullcontext, 3e-4),
    "autocast": (torch.float32, autocast, 3e-4),
}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("computer", COMPUTERS, ids=["default", "vmap", "loop"])
def test_rows_of_narrow_models(
    name: str, computer: Any, tmp_path: Path, exact: tuple[Tensor, Tensor]
) -> None:
    if name == "autocast" and computer is FunctionalGradientComputer:
        pytest.skip("torch.func has no layer norm under autocast (torch 2.13)")
    dtype, context, tolerance = NARROW[name]
    options = {} if computer is None else {"gradient_computer": computer}
    rows, scores = attribute(
        dtype, tmp_path, context, use_half_precision=False, **options
    )
    assert rows.dtype == torch.float32
    found = 1 - cosines(rows, exact[0])
    assert float(found.max()) < tolerance, found
    together = 1 - cosines(scores.T, exact[1].T)
    assert float(together.max()) < 10 * tolerance, together


@pytest.mark.parametrize("name", NARROW)
def test_half_storage_adds_its_own_rounding_only(name: str, tmp_path: Path) -> None:
    dtype, context, _ = NARROW[name]
    wide, _ = attribute(dtype, tmp_path / "wide", context, use_half_precision=False)
    half, _ = attribute(dtype, tmp_path / "half", context, use_half_precision=True)
    peak = wide.abs().amax(dim=1, keepdim=True)
    # 11 bits; below 2**-14 of the row's power of two the spacing stays what it is there.
    torch.testing.assert_close(half, wide, rtol=2.0**-11, atol=2.0**-24)
    assert float((peak * 2.0**-11 - (half - wide).abs()).min()) >= 0


@pytest.mark.parametrize("exponent", [-90, -30, -12, 0, 12, 30, 50])
def test_half_storage_at_any_scale(exponent: int, tmp_path: Path) -> None:
    """A task in other units gives the same rows, and the same scores, in half."""

    class Scaled(RegressionModelOutput):
        def get_output(self, *args: Any) -> Tensor:  # type: ignore[override]
            return super().get_output(*args) * 2.0**exponent

    def run(name: str, task: Any) -> Tensor:
        model = torch.nn.Linear(6, 1)
        model.load_state_dict(problems.randomized(model, seed=1))
        traker = TRAKer(model, task, N, tmp_path / name, proj_dim=5, logging_level=100)
        traker.load_checkpoint(model.state_dict())
        x, y = problems.draw(N, 6, seed=1).float(), problems.draw(N, seed=2).float()
        traker.featurize((x, y))
        return read_rows(traker.saver.current_store, "", torch.device("cpu"))(0, N)

    plain, scaled = run("plain", "regression"), run("scaled", Scaled())
    torch.testing.assert_close(
        scaled.double() * 2.0**-exponent, plain.double(), rtol=2.0**-10, atol=2.0**-14
    )


def test_rows_of_very_different_sizes_keep_their_bits(tmp_path: Path) -> None:
    """One exponent for all would flush the small rows to zero, or the large to infinity."""
    model = torch.nn.Linear(6, 1, bias=False)
    model.load_state_dict(problems.randomized(model, seed=1))
    powers = torch.arange(N) * 10 - 120
    x = (
        problems.draw(N, 6, seed=1).float()
        * torch.ldexp(torch.ones(N), powers)[:, None]
    )
    batch = x, problems.draw(N, seed=2).float()

    def run(*, half: bool) -> Tensor:
        traker = TRAKer(
            model,
            "regression",
            N,
            tmp_path / str(half),
            proj_dim=5,
            logging_level=100,
            use_half_precision=half,
        )
        traker.load_checkpoint(model.state_dict())
        traker.featurize(batch)
        return read_rows(traker.saver.current_store, "", torch.device("cpu"))(0, N)

    half, wide = run(half=True).double(), run(half=False).double()
    peak = wide.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(half / peak, wide / peak, rtol=0, atol=2.0**-11)
