"""What projectors refuse, and what they say then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trak._types import Gradients
from trak.errors import BatchError, OptionError
from trak.projectors import (
    AbstractProjector,
    BasicProjector,
    BasicSingleBlockProjector,
    CudaProjector,
    NoOpProjector,
    ProjectionType,
    SparseProjector,
)

Make = Callable[..., AbstractProjector]


def single_block(d: int, p: int) -> AbstractProjector:
    return BasicSingleBlockProjector(d, p, 0, "normal", "cpu")


@pytest.mark.parametrize(
    "make",
    [
        SparseProjector,
        single_block,
        lambda d, p: BasicProjector(d, p, 0, "normal", "cpu"),
    ],
)
def test_dimensions_below_one(make: Make) -> None:
    with pytest.raises(OptionError, match="proj_dim must be at least 1, got 0"):
        make(5, 0)
    with pytest.raises(OptionError, match="grad_dim must be at least 1, got -1"):
        make(-1, 5)


def test_unknown_projection_types() -> None:
    with pytest.raises(
        OptionError, match="one of 'normal', 'rademacher' here, got 'gaussian'"
    ):
        BasicProjector(5, 5, 0, "gaussian", "cpu")
    with pytest.raises(OptionError, match="one of 'normal', 'rademacher' here, got"):
        BasicSingleBlockProjector(5, 5, 0, ProjectionType.sparse, "cpu")
    with pytest.raises(OptionError, match="one of 'sparse' here, got 'normal'"):
        SparseProjector(5, 5, proj_type=ProjectionType.normal)


def test_options_that_cannot_work() -> None:
    with pytest.raises(OptionError, match="nonzeros must be at least 1, got 0"):
        SparseProjector(5, 5, nonzeros=0)
    with pytest.raises(OptionError, match="block_size must be at least 1, got 0"):
        BasicProjector(5, 5, 0, "normal", "cpu", block_size=0)
    with pytest.raises(OptionError, match=r"floating-point, got torch\.int32"):
        SparseProjector(5, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    "cls",
    [
        NoOpProjector,
        SparseProjector,
        BasicProjector,
        BasicSingleBlockProjector,
        CudaProjector,
    ],
)
def test_misspelt_options_are_refused(cls: Make) -> None:
    with pytest.raises(TypeError, match="blocksize"):
        cls(5, 5, 0, "normal", "cpu", blocksize=3)


@pytest.mark.parametrize(
    ("grads", "match"),
    [
        ({}, "empty dict"),
        (torch.ones(6), r"must have shape \(b, d\), got \(6,\)"),
        ({"a": torch.ones(2, 3), "b": torch.ones(3, 3)}, "got {'a': 2, 'b': 3}"),
        ({"a": torch.ones(2, 5)}, "have 5 columns in 1 parameters.*make it with"),
        ({"a": torch.ones(())}, "gradients of 'a' have no batch axis"),
        ({"a": torch.ones(2, 6).long()}, r"gradients of 'a' have dtype torch\.int64"),
        (torch.ones(2, 6).bool(), r"the gradients have dtype torch\.bool"),
    ],
)
def test_gradients_that_do_not_fit(grads: Gradients, match: str) -> None:
    with pytest.raises(BatchError, match=match):
        SparseProjector(6, 5).project(grads, model_id=0)


def test_gradients_on_another_device() -> None:
    grads = {"a": torch.ones(2, 6, device="meta")}
    with pytest.raises(
        OptionError, match="of 'a' are on meta, but the projector's device is cpu"
    ):
        SparseProjector(6, 5).project(grads, model_id=0)
    with pytest.raises(OptionError, match=r"are on cpu, .* is cuda:1"):
        SparseProjector(6, 5, device="cuda:1").project(torch.ones(2, 6), model_id=0)


def test_sketches_that_cannot_be_added_to() -> None:
    projector = SparseProjector(6, 5)
    x = torch.ones(2, 6)
    with pytest.raises(BatchError, match=r"out has dtype torch\.float16"):
        projector.project_into(torch.zeros(2, 5).half(), x, model_id=0)
    with pytest.raises(BatchError, match=r"shape \(b, 5\), got \(2, 6\)"):
        projector.project_into(torch.zeros(2, 6), x, model_id=0)
    with pytest.raises(BatchError, match=r"got \(1, 5\) for \(2, 6\)"):
        projector.project_into(torch.zeros(1, 5), x, model_id=0)
    with pytest.raises(OptionError, match="offset must be at least 0, got -1"):
        projector.project_into(torch.zeros(2, 5), x, model_id=0, offset=-1)
