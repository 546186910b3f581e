"""Pluggable parts given as class, instance or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import Bench
from trak._seams import check_same_projector, describe_projector, has_batched_form
from trak.errors import OptionError, StoreMismatchError
from trak.gradient_computers import FunctionalGradientComputer, HookGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import (
    AbstractProjector,
    BasicProjector,
    NoOpProjector,
    SparseProjector,
)
from trak.savers import MmapSaver
from trak.score_computers import BasicScoreComputer


class Plain(AbstractProjector):
    """A projector written without any of this library's extras."""

    def project(self, grads: Any, model_id: int) -> torch.Tensor:
        return torch.cat([grad.flatten(1) for grad in grads.values()], 1)[:, :7]


def test_defaults(tmp_path: Path) -> None:
    traker = Bench(tmp_path).traker
    assert type(traker.projector) is SparseProjector
    assert type(traker.gradient_computer) is HookGradientComputer
    assert type(traker.score_computer) is BasicScoreComputer
    assert type(traker.saver) is MmapSaver


def test_instances_are_taken_as_they_are(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    model, task = bench.problem.model, ImageClassificationModelOutput()
    parts = {
        "projector": BasicProjector(53, 5, 0, "normal", "cpu"),
        "gradient_computer": FunctionalGradientComputer(model, task),
        "score_computer": BasicScoreComputer(),
    }
    traker = bench.fresh(**parts)
    assert all(getattr(traker, name) is part for name, part in parts.items())
    scores = bench.complete(bench.fresh(saver=traker.saver, **parts))
    assert scores.shape == (11, 4)


@pytest.mark.parametrize(
    "kind", [BasicProjector, SparseProjector, NoOpProjector, Plain]
)
def test_projector_classes(tmp_path: Path, kind: type) -> None:
    bench = Bench(tmp_path)
    traker = bench.fresh(projector=kind)
    assert type(traker.projector) is kind
    assert traker.proj_dim == (53 if kind is NoOpProjector else 7)
    assert bench.complete(traker).isfinite().all()


def test_projectors_that_agree_may_be_exchanged(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "finalized")
    expected = Bench(tmp_path / "other").complete()
    other = SparseProjector(53, 7, 0)
    bench.traker.projector = other
    assert bench.traker.projector is other
    torch.testing.assert_close(bench.complete(), expected)
    with pytest.raises(StoreMismatchError, match=r"seed=0.*seed=1.*do not mix"):
        bench.traker.projector = SparseProjector(53, 7, 1)
    assert bench.traker.projector is other


def test_descriptions() -> None:
    plain = Plain(53, 7, 0, "normal", "cpu")
    assert "Plain" in describe_projector(plain)
    check_same_projector(plain, Plain(53, 7, 0, "normal", "cpu"))
    with pytest.raises(StoreMismatchError):
        check_same_projector(plain, NoOpProjector())


@pytest.mark.usefixtures("untyped")
def test_descriptions_of_foreign_projectors() -> None:
    class Bare:
        proj_dim = 7

    assert describe_projector(Bare()).endswith("Bare")  # type: ignore[arg-type]


def test_a_constructor_that_takes_other_arguments(tmp_path: Path) -> None:
    class Greedy(MmapSaver):
        def __init__(self, directory: Path) -> None:
            super().__init__(directory, {})

    with pytest.raises(
        OptionError, match=r"saver=Greedy cannot be built .*or pass an ins"
    ):
        Bench(tmp_path).fresh(saver=Greedy)


def test_which_tasks_have_the_batched_form() -> None:
    class Own(ImageClassificationModelOutput):
        @staticmethod
        def get_output(*arguments: Any) -> Any:
            return ImageClassificationModelOutput.get_output(*arguments)

    assert has_batched_form(ImageClassificationModelOutput())
    assert not has_batched_form(Own())
