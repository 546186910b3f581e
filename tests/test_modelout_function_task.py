"""FunctionTask: its derived out-to-loss, and the fingerprint of its functions."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections import UserDict, namedtuple
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.contracts.task_contract import TaskCase, TaskContract
from trak.errors import TaskError
from trak.modelout_functions import (
    FunctionTask,
    ImageClassificationModelOutput,
    MultilabelModelOutput,
)
from trak.modelout_functions._fingerprint import fingerprint

Embedded = namedtuple("Embedded", ["hidden", "logits"])

ROOT = Path(__file__).parents[1]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear(fan_in: int, fan_out: int) -> torch.nn.Linear:
    model = torch.nn.Linear(fan_in, fan_out, dtype=torch.float64)
    model.weight.data, model.bias.data = draw(fan_out, fan_in), draw(fan_out)
    return model


INPUTS, LABELS = draw(3, 6), torch.tensor([2, 0, 1])


def margin(logits: Tensor, batch: Any) -> Tensor:
    p = logits.softmax(1).gather(1, batch[-1][:, None])[:, 0]
    return (p / (1 - p)).log()


def loss(logits: Tensor, batch: Any) -> Tensor:
    return cross_entropy(logits, batch[-1], reduction="none")


def run(task: FunctionTask, batch: Any, model: torch.nn.Module | None = None):
    model = model or torch.nn.Identity()
    f = task.get_outputs(model, None, None, batch)
    return f, task.get_out_to_loss_grad(model, None, None, batch)[:, 0]


class TestTuple(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        return TaskCase(FunctionTask(margin, loss), linear(6, 4), (INPUTS, LABELS))


class TestMapping(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        task = FunctionTask(
            output=lambda out, batch: margin(out, (batch["labels"],)),
            loss=lambda out, batch: loss(out, (batch["labels"],)),
        )
        batch = UserDict(input=INPUTS, labels=LABELS)
        return TaskCase(task, linear(6, 4), batch)


class TestForward(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        task = FunctionTask(
            output=lambda out, batch: margin(out["views"][1].logits, batch),
            loss=lambda out, batch: loss(out["views"][1].logits, batch),
            forward=lambda model, batch: {
                "views": [None, Embedded(batch[0], model(-batch[0]))],
                "steps": torch.tensor(3),
            },
        )
        return TaskCase(task, linear(6, 4), (INPUTS, LABELS))


class TestDerivedWeight:
    def test_margin_and_cross_entropy(self) -> None:
        logits = draw(3, 4)
        shipped = ImageClassificationModelOutput()
        f, q = run(FunctionTask(margin, loss), (logits, LABELS))
        identity = torch.nn.Identity()
        batch = (logits, LABELS)
        torch.testing.assert_close(f, shipped.get_outputs(identity, None, None, batch))
        torch.testing.assert_close(
            q, shipped.get_out_to_loss_grad(identity, None, None, batch)[:, 0]
        )

    def test_regression_of_one_tensor_batches(self) -> None:
        task = FunctionTask(
            output=lambda out, batch: out[:, 0],
            loss=lambda out, batch: (out[:, 0] - 2 * batch[0][:, 0]) ** 2 / 2,
        )
        x = draw(3, 1)
        for batch in (x, (x,), [x]):
            f, q = run(task, batch)
            torch.testing.assert_close(f, x[:, 0])
            torch.testing.assert_close(q, x[:, 0])

    def test_multilabel(self) -> None:
        def signs(batch: Any) -> Tensor:
            return 2 * batch[1] - 1

        task = FunctionTask(
            output=lambda z, batch: (signs(batch) * z).sum(1),
            loss=lambda z, batch: (1 + (-signs(batch) * z).exp()).log().sum(1),
        )
        batch = draw(3, 4), (draw(3, 4, seed=1) > 0).double()
        _, q = run(task, batch)
        shipped = MultilabelModelOutput()
        expected = shipped.get_out_to_loss_grad(torch.nn.Identity(), None, None, batch)
        torch.testing.assert_close(q, expected[:, 0])

    def test_several_tensors_of_which_each_function_uses_some(self) -> None:
        task = FunctionTask(
            output=lambda out, batch: out[0] + out[1].sum(1),
            loss=lambda out, batch: out[1].square().sum(1) + out[2].sum((1, 2)),
            forward=lambda model, batch: (model(batch[0]), batch[1], batch[2]),
        )
        batch = draw(3), draw(3, 2), draw(3, 2, 2)
        _, q = run(task, batch)
        torch.testing.assert_close(q, -2 * batch[1].sum(1) / 3)

    def test_half_precision_is_summed_in_float32(self) -> None:
        task = FunctionTask(
            output=lambda out, batch: out.sum(1) * 300,
            loss=lambda out, batch: out.sum(1) * 600,
        )
        batch = torch.ones(1, 4, dtype=torch.float16), torch.zeros(1)
        _, q = run(task, batch)
        torch.testing.assert_close(q, torch.tensor([-2.0]))

    def test_a_loss_without_gradient_weighs_nothing(self) -> None:
        task = FunctionTask(
            output=lambda out, batch: out[:, 0],
            loss=lambda out, batch: batch[1],
        )
        _, q = run(task, (draw(3, 1), draw(3)))
        torch.testing.assert_close(q, torch.zeros(3, dtype=torch.float64))

    def test_a_row_where_both_are_flat_weighs_nothing(self) -> None:
        task = FunctionTask(
            output=lambda out, batch: out[:, 0].relu(),
            loss=lambda out, batch: out[:, 0].relu() ** 2,
        )
        _, q = run(task, (torch.tensor([[-1.0], [2.0]]), torch.zeros(2)))
        torch.testing.assert_close(q, torch.tensor([0.0, -4.0]))

    def test_infinite_output_of_one_row_leaves_the_others_alone(self) -> None:
        task = FunctionTask(
            output=lambda out, batch: out[:, 0] / batch[1],
            loss=lambda out, batch: out[:, 0],
        )
        _, q = run(task, (torch.ones(2, 1), torch.tensor([1.0, 0.0])))
        torch.testing.assert_close(q[0], torch.tensor(-1.0))

    def test_model_and_batch_are_left_alone(self) -> None:
        x = draw(3, 4)
        run(FunctionTask(margin, loss), (x, LABELS))
        assert not x.requires_grad
        assert x.grad is None


class TestErrors:
    def test_a_loss_that_moves_where_the_output_does_not(self) -> None:
        task = FunctionTask(
            output=lambda out, batch: out[:, 0].relu(),
            loss=lambda out, batch: out[:, 0] ** 2,
        )
        batch = torch.tensor([[2.0], [-1.0]]), torch.zeros(2)
        with pytest.raises(TaskError, match=r"At position 1 .* is no function of it"):
            run(task, batch)

    @pytest.mark.parametrize("name", ["output", "loss"])
    @pytest.mark.parametrize(
        ("bad", "got"),
        [
            (lambda out, batch: out.mean(), r"\(\)"),
            (lambda out, batch: out, r"\(3, 4\)"),
            (lambda out, batch: 0.0, "float"),
        ],
    )
    def test_shapes(self, name: str, bad: Any, got: str) -> None:
        task = FunctionTask(**{"output": margin, "loss": loss, name: bad})
        pattern = f"The {name} function .* returned {got} for 3 examples"
        with pytest.raises(TaskError, match=pattern):
            task.get_out_to_loss_grad(
                torch.nn.Identity(), None, None, (draw(3, 4), LABELS)
            )

    def test_outputs_without_rows(self) -> None:
        task = FunctionTask(
            output=lambda out, batch: out.expand(3),
            loss=lambda out, batch: out.expand(3),
            forward=lambda model, batch: batch[0].sum(),
        )
        with pytest.raises(TaskError, match=r"of shape \(\), which is not one row"):
            run(task, (draw(3), LABELS))


class Colour(Enum):
    RED = 1


def scaled(scale: float):
    return lambda out, batch: scale * out[:, 0]


def factorial(n: int) -> int:
    return n * factorial(n - 1) if n else 1


SCALE = 2.0


def by_global(out: Tensor, batch: Any) -> Tensor:
    return SCALE * out


PROGRAM = """
from tests.test_modelout_function_task import *
print(FunctionTask(margin, scaled(2.0)).describe(), fingerprint(by_global))
print(fingerprint({"a", "b", "c", 1.5}), fingerprint(lambda x: x in {"p", "q", "r"}))
"""


class TestDescription:
    def test_functions_count(self) -> None:
        tasks = [
            FunctionTask(margin, loss),
            FunctionTask(margin, scaled(1.0)),
            FunctionTask(margin, scaled(2.0)),
            FunctionTask(loss, loss),
            FunctionTask(margin, loss, forward=lambda model, batch: model(batch[0])),
            FunctionTask(margin, loss, forward=lambda model, batch: model(batch[1])),
        ]
        texts = [task.describe() for task in tasks]
        assert len(set(texts)) == len(texts)
        assert FunctionTask(margin, scaled(2.0)).describe() == texts[2]
        assert texts[0].startswith("FunctionTask(forward=None, loss=loss:")

    def test_is_the_same_in_other_processes(self) -> None:
        outputs = {
            subprocess.run(
                [sys.executable, "-c", PROGRAM],
                capture_output=True,
                text=True,
                check=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONHASHSEED": seed},
            ).stdout
            for seed in ("1", "2")
        }
        assert len(outputs) == 1
        assert "0x" not in outputs.pop()


class TestFingerprint:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (None, "None"),
            (1.5, "1.5"),
            (np.float64(1.5), "1.5"),
            (np.int64(3), "3"),
            ([1, "a", (True,)], "[1, 'a', (True)]"),
            ({"b": 1, "a": 2}, "{'a': 2, 'b': 1}"),
            ({3, 1, 2}, "{1, 2, 3}"),
            (Colour.RED, "Colour.RED"),
            (Colour, "Colour"),
            (len, "len"),
            (torch.float16, "torch.float16"),
            (torch.device("cpu"), "cpu"),
            (functools, "functools"),
            (object(), "object"),
        ],
    )
    def test_values(self, value: object, text: str) -> None:
        assert fingerprint(value) == text

    def test_tensors_by_dtype_shape_and_bytes(self) -> None:
        ones = torch.ones(2, 3)
        different = [
            ones,
            ones.T,
            ones.double(),
            2 * ones,
            torch.ones(()),
            torch.ones(0),
            ones.bfloat16(),
            ones.bool(),
        ]
        assert len({fingerprint(tensor) for tensor in different}) == len(different)
        assert fingerprint(ones.T) == fingerprint(torch.ones(3, 2))
        assert fingerprint(ones.numpy()) == fingerprint(ones)
        assert fingerprint(ones.clone().requires_grad_()) == fingerprint(ones)

    def test_functions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def default(x: int = 1) -> int:
            return x

        before = fingerprint(default), fingerprint(by_global)
        default.__defaults__ = (2,)
        monkeypatch.setitem(by_global.__globals__, "SCALE", 3.0)
        assert fingerprint(default) != before[0]
        assert fingerprint(by_global) != before[1]

    def test_nested_functions_count(self) -> None:
        def outer(step: int) -> Any:
            inner = (lambda x: x + 1) if step == 1 else (lambda x: x + 2)
            return lambda x: inner(x)

        assert fingerprint(outer(1)) == fingerprint(outer(1))
        assert fingerprint(outer(1)) != fingerprint(outer(2))

    def test_partials_and_methods(self) -> None:
        half = functools.partial(scaled, scale=0.5)
        assert fingerprint(half) == fingerprint(functools.partial(scaled, scale=0.5))
        assert fingerprint(half) != fingerprint(functools.partial(scaled, scale=1.5))
        method = FunctionTask(margin, loss).get_outputs
        assert fingerprint(method).endswith("of FunctionTask")

    def test_recursion_ends(self) -> None:
        assert fingerprint(factorial) == fingerprint(factorial)
        loop: list[Any] = [1]
        loop.append(loop)
        assert fingerprint(loop) == "[1, ...]"
