"""Loading a checkpoint, and the modes that a model must not be in."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from tests.problems import Residual, mlp, randomized
from trak._checkpoints import check_mode, check_weights, ids_of_weights, load_weights
from trak._params import fingerprint
from trak.errors import (
    CheckpointError,
    ModelIDException,
    ModelModeError,
    NonFiniteError,
)


def test_loading() -> None:
    model = Residual().train()
    checkpoint = randomized(model, 3)
    known = load_weights(model, checkpoint)
    assert known == fingerprint(model.state_dict())
    assert not model.training
    torch.testing.assert_close(dict(model.state_dict()), checkpoint)
    assert load_weights(model, OrderedDict(checkpoint)) == known
    assert load_weights(model, randomized(model, 4)) != known


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_converted(dtype: torch.dtype) -> None:
    model = mlp()
    checkpoint = {k: v.to(dtype) for k, v in model.state_dict().items()}
    load_weights(model, checkpoint)
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {**c, "extra": torch.zeros(1)},
        lambda c: {**c, "conv.bias": torch.zeros(9)},
        lambda c: {**c, "conv.bias": None},
        lambda c: {k: v for k, v in c.items() if k != "conv.bias"},
        lambda c: {f"modules.{k}": v for k, v in c.items()},
        lambda c: {"model": c},
        lambda c: list(c.items()),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_does_not_fit_changes_nothing(change: Any) -> None:
    model = Residual().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_weights(model, change(randomized(model, 3)))
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert model.training


def test_numbers_that_are_none_change_nothing() -> None:
    model = mlp()
    before = model[0].weight.clone()
    bad = randomized(model, 3)
    bad["2.bias"][1] = torch.inf
    with pytest.raises(
        NonFiniteError, match=r"'2\.bias' has a NaN or an inf"
    ) as caught:
        load_weights(model, bad)
    assert caught.value.parameter == "2.bias"
    torch.testing.assert_close(model[0].weight, before)


def test_state_that_is_no_tensor() -> None:
    class Extra(torch.nn.Linear):
        extra: Any = "none"

        def get_extra_state(self) -> Any:
            return {"seen": 3}

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    model = Extra(2, 2)
    load_weights(model, model.state_dict())
    assert model.extra == {"seen": 3}


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (torch.nn.BatchNorm1d(2), "BatchNorm1d"),
        (torch.nn.SyncBatchNorm(2), "SyncBatchNorm"),
        (torch.nn.Dropout2d(), "Dropout2d"),
        (torch.nn.AlphaDropout(), "AlphaDropout"),
        (torch.nn.MultiheadAttention(2, 1, dropout=0.1), "MultiheadAttention"),
        (torch.nn.LSTM(2, 2, num_layers=2, dropout=0.5), "LSTM"),
    ],
)
def test_training_mode_is_refused(layer: torch.nn.Module, name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), layer)
    with pytest.raises(ModelModeError, match=rf"1 \({name}\) is in training mode"):
        check_mode(model)
    check_mode(model.eval())
    with pytest.raises(ModelModeError, match="the model"):
        check_mode(layer.train())


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.LayerNorm(2),
        torch.nn.GroupNorm(1, 2),
        torch.nn.MultiheadAttention(2, 1),
        torch.nn.LSTM(2, 2),
    ],
)
def test_training_mode_of_other_layers_is_fine(layer: torch.nn.Module) -> None:
    check_mode(layer.train())


def test_ids_and_weights() -> None:
    records: dict[int, dict[str, Any]] = {
        0: {"weights": "a"},
        3: {"weights": "b"},
        5: {},
    }
    assert ids_of_weights(records, "b") == [3]
    assert ids_of_weights(records, "c") == []
    check_weights(records, 0, "a")
    check_weights(records, 5, "anything")
    with pytest.raises(
        ModelIDException, match=r"0 belongs to other weights \(fingerpr"
    ):
        check_weights(records, 0, "b")
