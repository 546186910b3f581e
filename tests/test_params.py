"""Parameter selection, flattening and fingerprints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.problems import Tied, draw, mlp
from trak._params import (
    Selection,
    fingerprint,
    first_non_finite,
    flatten_rows,
    select_parameters,
)
from trak.errors import BatchError, GradientError, OptionError


class TestSelection:
    @pytest.mark.parametrize(
        ("grad_wrt", "names"),
        [
            (None, ("0.weight", "0.bias", "2.weight", "2.bias")),
            ("0.bias", ("0.bias",)),
            (["2.bias", "0.bias"], ("0.bias", "2.bias")),
            ("*.w?ight", ("0.weight", "2.weight")),
            (["2.*", "2.bias"], ("2.weight", "2.bias")),
            (iter(["[01].*"]), ("0.weight", "0.bias")),
            (lambda name, value: len(value) == 3, ("2.weight", "2.bias")),
        ],
    )
    def test_names_globs_and_predicates(
        self, grad_wrt: Any, names: tuple[str, ...]
    ) -> None:
        assert select_parameters(mlp(), grad_wrt).names == names

    def test_frozen_ones_are_never_chosen(self) -> None:
        model = mlp()
        model[0].requires_grad_(False)
        for grad_wrt in (None, "*", lambda name, value: True):
            chosen = select_parameters(model, grad_wrt)
            assert chosen.names == ("2.weight", "2.bias")
            assert chosen.shapes == ((3, 5), (3,))
            assert chosen.grad_dim == 18

    def test_tied_ones_are_chosen_once(self) -> None:
        chosen = select_parameters(Tied())
        assert chosen.names == ("first.weight", "first.bias", "second.bias")

    def test_no_parameter_is_left(self) -> None:
        with pytest.raises(OptionError, match="of the model's 0 parameters"):
            select_parameters(torch.nn.Identity())

    def test_fingerprints(self) -> None:
        one = Selection(("a",), ((2, 3),))
        assert one.fingerprint() == Selection(("a",), ((2, 3),)).fingerprint()
        others = [Selection(("b",), ((2, 3),)), Selection(("a",), ((3, 2),))]
        assert one.fingerprint() not in {other.fingerprint() for other in others}

    @pytest.mark.parametrize("b", [0, 1, 3])
    def test_splitting_undoes_flattening(self, b: int) -> None:
        grads = {"a": draw(b, 2, 3), "s": draw(b), "e": draw(b, 0)}
        chosen = Selection(("a", "s", "e"), ((2, 3), (), (0,)))
        flat = flatten_rows(grads)
        assert flat.shape == (b, chosen.grad_dim)
        torch.testing.assert_close(chosen.split(flat), grads)

    @pytest.mark.parametrize("shape", [(3, 5), (7,), (3, 7, 1)])
    def test_splitting_needs_every_entry(self, shape: tuple[int, ...]) -> None:
        chosen = Selection(("a", "b"), ((2, 3), (1,)))
        with pytest.raises(GradientError, match=r"\(b, 7\) is needed"):
            chosen.split(torch.zeros(shape))


class TestFlattening:
    @pytest.mark.parametrize("b", [0, 1, 3])
    def test_tensors_become_matrices(self, b: int) -> None:
        assert flatten_rows(draw(b, 2, 3)).shape == (b, 6)

    @pytest.mark.parametrize("grads", [{}, {"a": draw(2, 1), "b": draw(3, 1)}])
    def test_one_number_of_rows(self, grads: Any) -> None:
        with pytest.raises(BatchError, match="one common number of rows"):
            flatten_rows(grads)


class TestFingerprint:
    def test_what_counts(self) -> None:
        weights = {"a": draw(2, 3), "b": torch.zeros((), dtype=torch.int64)}
        known = fingerprint(weights)
        assert len(known) == 32
        assert fingerprint(dict(reversed(weights.items()))) == known
        assert fingerprint({**weights, "a": draw(2, 3).T.contiguous().T}) == known
        for other in (
            {**weights, "a": draw(2, 3) + 1e-15},
            {**weights, "a": draw(3, 2)},
            {**weights, "a": draw(2, 3).float()},
            {"a": weights["a"], "c": weights["b"]},
            {"a": weights["a"]},
        ):
            assert fingerprint(other) != known

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool])
    def test_types_without_numpy(self, dtype: torch.dtype) -> None:
        assert fingerprint({"a": torch.ones(2).to(dtype)})


def test_first_tensor_that_is_not_finite() -> None:
    nan, inf = torch.tensor([1.0, torch.nan]), torch.tensor(torch.inf)
    integers = torch.tensor([1])
    assert first_non_finite([("a", integers), ("b", inf), ("c", nan)]) == "b"
    assert first_non_finite([("a", integers)]) is None


def test_complex_parameters_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    model.gain = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(OptionError, match=r"'gain' is torch.complex64.*grad_wrt"):
        select_parameters(model)
    assert select_parameters(model, ["weight"]).names == ("weight",)


def test_wrapped_models_have_the_names_of_what_is_inside() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    wrapped = torch.nn.DataParallel(model)
    plain, other = select_parameters(model), select_parameters(wrapped)
    assert other.names == tuple(f"module.{name}" for name in plain.names)
    assert tuple(other.identities.values()) == plain.names
    assert other.fingerprint() == plain.fingerprint()
    assert fingerprint(wrapped.state_dict()) == fingerprint(model.state_dict())
    for chosen in (["1.*"], ["module.1.*"], ["1.weight", "1.bias"]):
        part = select_parameters(wrapped, chosen)
        assert part.names == ("module.1.weight", "module.1.bias")
        assert part.fingerprint() == select_parameters(model, ["1.*"]).fingerprint()
