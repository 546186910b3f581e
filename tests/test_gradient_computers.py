"""Both gradient computers: the contract, every task, and their error messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.gradient_computer_contract import GradientComputerContract
from tests.problems import classes, draw
from tests.test_modelout_clip import TwoTowers, ready
from trak._params import flatten_rows
from trak.errors import GradientError, TaskError
from trak.gradient_computers import (
    AbstractGradientComputer,
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import (
    AbstractModelOutput,
    BinaryClassificationModelOutput,
    FunctionTask,
    ImageClassificationModelOutput,
    MultilabelModelOutput,
    RegressionModelOutput,
    resolve_task,
)


class TestFunctional(GradientComputerContract):
    kind = FunctionalGradientComputer


class TestHooks(GradientComputerContract):
    kind = HookGradientComputer


class TestIterative(GradientComputerContract):
    kind = IterativeGradientComputer


def linear(outputs: int) -> torch.nn.Module:
    model = torch.nn.Linear(4, outputs).double()
    model.weight.data, model.bias.data = draw(outputs, 4), draw(outputs)
    return model


X = draw(3, 4, seed=1)
TASKS: dict[str, tuple[Any, torch.nn.Module, Any]] = {
    "image": (ImageClassificationModelOutput(), linear(3), (X, classes(3))),
    "regression": (RegressionModelOutput(), linear(1), (X, draw(3))),
    "binary": (BinaryClassificationModelOutput(), linear(1), (X, classes(3, 2))),
    "multilabel": (
        MultilabelModelOutput(),
        linear(2),
        (X, classes(6, 2).reshape(3, 2)),
    ),
    "clip": (ready(), TwoTowers(), (draw(3, 5), draw(3, 6))),
    "functions": (
        FunctionTask(lambda out, batch: out.sum(1), lambda out, batch: out.sum(1)),
        linear(2),
        {"input": X, "labels": classes(3)},
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_both_agree_for_every_task(name: str) -> None:
    task, model, batch = TASKS[name]
    functional = FunctionalGradientComputer(model, task)
    iterative = IterativeGradientComputer(model, task)
    torch.testing.assert_close(
        flatten_rows(functional.compute_per_sample_grad(batch)),
        iterative.compute_per_sample_grad(batch),
    )
    torch.testing.assert_close(
        functional.compute_loss_grad(batch), iterative.compute_loss_grad(batch)
    )


class Task(AbstractModelOutput):
    """Outputs of a batch, or of one example, by a function of logits."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def get_output(
        self, model: Any, weights: Any, buffers: Any, image: Tensor, label: Any = None
    ) -> Any:
        if weights is None:
            return self.function(model(image))
        tensors = dict(weights)
        return self.function(torch.func.functional_call(model, tensors, image))

    def get_out_to_loss_grad(self, *arguments: Any) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda logits: logits,
            TaskError,
            r"outputs of shape \(3, 2\) for a batch of 3",
        ),
        (lambda logits: logits.sum(), TaskError, r"outputs of shape \(\)"),
        (lambda logits: None, TaskError, r"outputs of NoneType .* shape \(3,\)"),
        (lambda logits: logits[:, 0].detach(), GradientError, "does it detach"),
        (lambda logits: logits[:, 9], IndexError, "out of bounds"),
        (
            lambda logits: logits @ logits,
            TaskError,
            "give the task get_outputs|Give the",
        ),
        (lambda: None, TaskError, "cannot be called on a whole batch without weights"),
    ],
)
def test_iterative_says_what_is_wrong(function: Any, error: Any, message: str) -> None:
    computer = IterativeGradientComputer(linear(2), Task(function))
    with pytest.raises(error, match=message):
        computer.compute_per_sample_grad((X, classes(3)))


def test_a_tasks_own_errors_pass_through() -> None:
    def refuse(logits: Tensor) -> Tensor:
        raise TaskError("mine")

    for kind in (IterativeGradientComputer, FunctionalGradientComputer):
        with pytest.raises(TaskError, match=r"^mine$"):
            kind(linear(2), Task(refuse)).compute_per_sample_grad((X, classes(3)))


def test_functional_says_what_is_wrong() -> None:
    computer = FunctionalGradientComputer(linear(2), Task(lambda logits: logits))
    with pytest.raises(
        TaskError, match=r"scalar tensor for one example; got shape \(2,\)"
    ):
        computer.compute_per_sample_grad((X, classes(3)))
    looks = Task(lambda logits: logits[0] if logits[0] > 0 else logits[1])
    computer = FunctionalGradientComputer(linear(2), looks)
    with pytest.raises(GradientError, match="IterativeGradientComputer to differ"):
        computer.compute_per_sample_grad((X, classes(3)))


def test_one_example_without_gradient_leaves_the_others_alone() -> None:
    task = Task(lambda logits: logits[..., 0].abs().sqrt())
    model = linear(1)
    model.weight.data, model.bias.data = (
        torch.ones(1, 4).double(),
        torch.zeros(1).double(),
    )
    images = torch.stack([torch.ones(4), torch.zeros(4), torch.ones(4)]).double()
    for kind in (IterativeGradientComputer, FunctionalGradientComputer):
        grads = kind(model, task).compute_per_sample_grad((images, classes(3)))
        rows = flatten_rows(grads)
        torch.testing.assert_close(rows[[0, 2]], torch.full((2, 5), 0.25).double())
        assert rows[1].isnan().any()


def test_a_batch_form_of_0_3_2_is_used_without_weights() -> None:
    computer = IterativeGradientComputer(linear(2), Task(lambda logits: logits[:, 0]))
    grads = computer.compute_per_sample_grad((X, classes(3)))
    torch.testing.assert_close(grads[:, :4], X)


def test_blocks_hold_no_more_than_they_may() -> None:
    computer = FunctionalGradientComputer(linear(2), RegressionModelOutput())
    computer.max_block_bytes = 4 * 10 * 2
    assert FunctionalGradientComputer.max_block_bytes == 1 << 28
    task, model, batch = TASKS["multilabel"]
    computer = FunctionalGradientComputer(model, task)
    computer.max_block_bytes = 4 * 10 * 2
    sizes = [len(block["weight"]) for block in computer.per_sample_grad_blocks(batch)]
    assert sizes == [2, 1]


def test_the_interface_gives_one_block() -> None:
    class Ones(AbstractGradientComputer):
        def load_model_params(self, model: torch.nn.Module) -> None:
            pass

        def compute_per_sample_grad(self, batch: Any) -> Tensor:
            return torch.ones(len(batch), 2)

        def compute_loss_grad(self, batch: Any) -> Tensor:
            return torch.ones(len(batch), 1)

    computer = Ones(linear(1), RegressionModelOutput())
    blocks = list(computer.per_sample_grad_blocks(torch.zeros(3)))
    assert [block.shape for block in blocks] == [(3, 2)]


def test_examples_that_depend_on_their_batch_are_refused() -> None:
    class Centred(torch.nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs - inputs.mean(dim=0))

    model = Centred(3, 2)
    batch = torch.arange(12.0).reshape(4, 3) ** 2, torch.tensor([0, 1, 0, 1])
    task = resolve_task("image_classification")
    computer = IterativeGradientComputer(model, task)
    with pytest.raises(GradientError, match=r"alone and .* in a batch"):
        computer.compute_per_sample_grad(batch)
