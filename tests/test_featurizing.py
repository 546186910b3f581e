"""From a batch to rows of a store: shapes, flags, repeats and blame."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.problems import draw, mlp
from trak._featurizing import (
    Pipeline,
    check_same_rows,
    finite_rows,
    first_difference,
    pending_rows,
    store_batch,
    write_rows,
)
from trak._layout import DONE, PENDING, SKIPPED
from trak._params import select_parameters
from trak._reading import read_array, read_rows
from trak.errors import NonFiniteError, StaleRowError, StoreWriteError
from trak.gradient_computers import IterativeGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import NoOpProjector

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 2, 1])


def pipeline(**changed: Any) -> Pipeline:
    model = mlp()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = draw(*parameter.shape, seed=i).float()
    computer = IterativeGradientComputer(model, ImageClassificationModelOutput())
    made = Pipeline(
        computer=computer,
        projector=NoOpProjector(),
        selection=select_parameters(model),
        model_id=3,
        proj_dim=43,
        scale=2.0,
        what="training example",
        weighted=True,
    )
    return dataclasses.replace(made, **changed)


def empty(n: int = 5, p: int = 43, **changed: Any) -> dict[str, Any]:
    store = {
        "grads": np.zeros((n, p), "float32"),
        "out_to_loss": np.zeros((n, 1), "float32"),
        "row_digest": np.zeros((n, 1), "int64"),
        "is_featurized": np.zeros((n, 1), "int32"),
        **changed,
    }
    return {key: value for key, value in store.items() if value is not None}


def put(store: dict[str, Any], inds: list[int], **changed: Any) -> None:
    images = changed.pop("images", draw(3, 4).float())
    digests = changed.pop("digests", inds)
    skip = changed.pop("skip", False)
    store_batch(
        pipeline(**changed),
        store,
        None,
        (images[: len(inds)], LABELS[: len(inds)]),
        np.array(inds),
        np.array(digests) + 100,
        skip=skip,
    )


def test_rows_are_gradients_over_the_scale() -> None:
    made, store = pipeline(), empty()
    put(store, [4, 0, 2])
    batch = (draw(3, 4).float(), LABELS)
    rows = made.computer.compute_per_sample_grad(batch) / 2
    torch.testing.assert_close(torch.from_numpy(store["grads"][[4, 0, 2]]), rows)
    weights = made.computer.compute_loss_grad(batch).numpy()
    np.testing.assert_allclose(store["out_to_loss"][[4, 0, 2]], weights, rtol=1e-6)
    assert store["is_featurized"][:, 0].tolist() == [DONE, 0, DONE, 0, DONE]
    assert store["row_digest"][:, 0].tolist() == [100, 0, 102, 0, 104]


@pytest.mark.parametrize("shape", [(5, 1), (5,)])
def test_flags_of_either_shape(shape: tuple[int, ...]) -> None:
    store = empty(is_featurized=np.zeros(shape, "int32"))
    put(store, [1, 3])
    assert store["is_featurized"].reshape(-1).tolist() == [0, 1, 0, 1, 0]
    assert pending_rows(store, "is_featurized", np.array([0, 1])).tolist() == [
        True,
        False,
    ]


def test_stores_without_some_arrays() -> None:
    store = empty(row_digest=None, is_featurized=None, out_to_loss=None)
    put(store, [1, 3])
    put(store, [3, 1], images=draw(3, 4, seed=9).float())  # nothing tells them apart
    assert store["grads"][[1, 3]].any()
    assert pending_rows(store, "is_featurized", np.array([1])).tolist() == [True]


def test_only_missing_rows_are_written() -> None:
    store = empty()
    put(store, [1])
    store["grads"][1] = 7
    put(store, [1, 2])
    np.testing.assert_array_equal(store["grads"][1], 7)
    assert store["grads"][2].any()


def test_nothing_to_do_computes_nothing() -> None:
    store = empty()
    put(store, [1, 2])
    nothing = NoOpProjector()
    del nothing.proj_dim  # projecting would fail
    put(store, [1, 2], projector=nothing)


@pytest.mark.parametrize("half", [True, False])
def test_other_bytes_of_the_same_example(half: bool) -> None:
    exponents = {"grads_exponent": np.zeros((5, 1), "int16")} if half else {}
    store = empty(
        grads=np.zeros((5, 43), "float16" if half else "float32"), **exponents
    )
    put(store, [1, 2])
    before = store["grads"].copy()
    put(store, [1, 2], digests=[8, 9])
    np.testing.assert_array_equal(store["grads"], before)
    with pytest.raises(StaleRowError, match="training example 1 is stored already"):
        put(store, [1, 2], digests=[8, 9], images=draw(3, 4, seed=9).float())


def test_rows_without_gradients_to_compare_with() -> None:
    store = empty()
    put(store, [1, 2])
    del store["grads"]
    put(store, [1, 2])
    with pytest.raises(StaleRowError, match="deleted the gradient to compare with"):
        put(store, [1, 2], digests=[1, 9])


def test_a_zero_row_is_only_itself() -> None:
    store = empty(n=1, p=2, is_featurized=np.ones((1, 1), "int32"))
    arguments = (store, "", "is_featurized", np.array([0]))
    check_same_rows(*arguments, torch.zeros(1, 2), np.array([True]), "target")
    with pytest.raises(StaleRowError, match="target 0 is stored already"):
        check_same_rows(*arguments, torch.ones(1, 2), np.array([True]), "target")
    with pytest.raises(StaleRowError, match="target 0"):
        check_same_rows(
            *arguments, torch.full((1, 2), torch.nan), np.array([True]), "target"
        )


@pytest.mark.parametrize("half", [True, False])
def test_skipped_rows_are_zeros(half: bool) -> None:
    exponents = {"grads_exponent": np.ones((5, 1), "int16")} if half else {}
    store = empty(grads=np.ones((5, 43), "float16" if half else "float32"), **exponents)
    images = draw(3, 4).float()
    images[1, 0] = torch.inf
    for _ in range(2):
        put(store, [0, 1, 2], images=images, skip=True)
        assert store["is_featurized"][:, 0].tolist() == [DONE, SKIPPED, DONE, 0, 0]
        assert not store["grads"][1].any()
        assert store["out_to_loss"][1, 0] == 0
        assert store["row_digest"][:3, 0].tolist() == [100, 101, 102]
    put(store, [1], images=draw(3, 4).float(), digests=[9], skip=True)  # stays out
    assert store["is_featurized"][1, 0] == SKIPPED


class TestBlame:
    def blame(self, images: Tensor, **changed: Any) -> NonFiniteError:
        store = empty()
        with pytest.raises(NonFiniteError) as caught:
            put(store, [4, 0, 2], images=images, **changed)
        assert (store["is_featurized"] == PENDING).all()
        assert not store["grads"].any()
        return caught.value

    def test_the_input(self) -> None:
        images = draw(3, 4).float()
        images[1, 2] = torch.nan
        error = self.blame(images)
        assert (error.index, error.model_id) == (0, 3)
        assert "its out-to-loss gradient" in str(error)

    def test_the_parameter(self) -> None:
        images = draw(3, 4).float()
        images[2, 2] = torch.nan
        error = self.blame(images, weighted=False)
        assert (error.index, error.parameter) == (2, "0.weight")
        assert "first for the parameter '0.weight'" in str(error)

    def test_the_projection(self) -> None:
        class Overflow(NoOpProjector):
            def project(self, grads: Any, model_id: int) -> Tensor:
                return super().project(grads, model_id) * 1e38 * 1e38

        error = self.blame(draw(3, 4).float(), projector=Overflow(), what="target")
        assert (error.index, error.parameter) == (4, None)
        assert "in its projected gradient (model id 3)" in str(error)
        assert "on_non_finite" not in str(error)

    def test_gradients_of_a_shape_of_their_own(self) -> None:
        class Wide(IterativeGradientComputer):
            def compute_per_sample_grad(self, batch: Any) -> Tensor:
                return torch.full((len(batch[0]), 7), torch.nan)

        computer = Wide(mlp(), ImageClassificationModelOutput())
        error = self.blame(draw(3, 4).float(), computer=computer, proj_dim=7)
        assert "in its projected gradient" in str(error)


def test_a_type_that_is_too_narrow() -> None:
    store = empty(p=2, grads=np.zeros((5, 2), "float16"))
    rows, finite = torch.tensor([[1.0, 1e6]]), np.array([True])
    with pytest.raises(
        StoreWriteError, match=r"does not fit float16.*half_precision=Fal"
    ):
        write_rows(store, "", "is_featurized", np.array([0]), rows, {}, finite)
    assert not store["is_featurized"].any()


def test_which_rows_are_finite() -> None:
    rows = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [1.0, 1.0]])
    assert finite_rows(rows, None).tolist() == [True, False, True]
    weights = torch.tensor([[1.0], [1.0], [torch.inf]])
    assert finite_rows(rows, weights).tolist() == [True, False, False]


def test_readers_copy() -> None:
    for array in (np.ones((3, 2), "float32"), torch.ones(3, 2)):
        assert read_rows({"grads": array}, "", CPU)(1, 3).shape == (2, 2)
    array = np.ones((3, 2), "float16")
    read_array(array, CPU)(0, 2)[:] = 5
    np.testing.assert_array_equal(array, 1)


def test_differences_between_checkpoints() -> None:
    inds, digests = np.array([3, 1]), np.array([7, 8])
    assert first_difference(None, inds, digests) == (None, False)
    other = empty()
    assert first_difference(other, inds, digests) == (None, False)
    other["is_featurized"][[1, 3]] = DONE
    other["row_digest"][3], other["row_digest"][1] = 7, 9
    assert first_difference(other, inds, digests) == (1, False)
    other["row_digest"][0] = 8  # where the other checkpoint has the same example
    assert first_difference(other, inds, digests) == (1, True)
    assert first_difference(other, inds, np.array([6, 8])) == (3, False)
