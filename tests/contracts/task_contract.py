"""What every task keeps: one suite that each shipped task and docs example inherits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from trak._batches import batch_size, canonical
from trak.modelout_functions import AbstractModelOutput
from trak.modelout_functions._calls import map_tensors


@dataclass(frozen=True)
class TaskCase:
    """A task, a float64 model without dropout, and a batch of three examples."""

    task: AbstractModelOutput
    model: torch.nn.Module
    batch: Any
    takes_batches: bool = False
    """Whether ``get_output`` takes a batch, as the iterative task's does."""


def state(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return weights, dict(model.named_buffers())


def take(batch: Any, rows: Any) -> Any:
    return map_tensors(batch, lambda tensor: tensor[rows])


def spread(example: Any) -> tuple[Any, ...]:
    return (dict(example),) if isinstance(example, Mapping) else tuple(example)


def is_batched(task: AbstractModelOutput) -> bool:
    return type(task).get_outputs is not AbstractModelOutput.get_outputs


def compute(
    case: TaskCase,
    weights: dict[str, Tensor] | None,
    buffers: dict[str, Tensor] | None,
    batch: Any,
) -> Tensor:
    """Outputs of a batch, by whichever form the task has."""
    if is_batched(case.task):
        return case.task.get_outputs(case.model, weights, buffers, batch)
    values = [
        case.task.get_output(case.model, weights, buffers, *spread(take(batch, i)))
        for i in range(batch_size(canonical(batch)))
    ]
    return torch.stack(values) if values else torch.zeros(0)


class TaskContract:
    """Inherit, and override the fixture ``case``; name the subclass ``Test...``."""

    @pytest.fixture
    def case(self) -> TaskCase:
        raise NotImplementedError

    def outputs(self, case: TaskCase, rows: slice) -> Tensor:
        return compute(case, *state(case.model), take(case.batch, rows))

    def out_to_loss(self, case: TaskCase, rows: slice) -> Tensor:
        weights, buffers = state(case.model)
        batch = take(case.batch, rows)
        return case.task.get_out_to_loss_grad(case.model, weights, buffers, batch)

    @pytest.mark.parametrize("b", [0, 1, 3])
    def test_shapes(self, case: TaskCase, b: int) -> None:
        assert self.outputs(case, slice(b)).shape == (b,)
        assert self.out_to_loss(case, slice(b)).shape == (b, 1)

    def test_shipped_tasks_have_the_batched_form(self, case: TaskCase) -> None:
        shipped = type(case.task).__module__.startswith("trak.")
        assert is_batched(case.task) or not shipped

    def test_batch_split_does_not_matter(self, case: TaskCase) -> None:
        for method in (self.outputs, self.out_to_loss):
            singles = [method(case, slice(i, i + 1)) for i in range(3)]
            torch.testing.assert_close(torch.cat(singles), method(case, slice(3)))

    def test_one_example_agrees_with_the_batch(self, case: TaskCase) -> None:
        if case.takes_batches:
            pytest.skip("get_output takes a batch")
        weights, buffers = state(case.model)
        looped = [
            case.task.get_output(case.model, weights, buffers, *spread(example))
            for example in (take(case.batch, i) for i in range(3))
        ]
        assert all(value.shape == () for value in looped)
        torch.testing.assert_close(torch.stack(looped), self.outputs(case, slice(3)))

    def test_vmapped_gradients_agree_with_autograd(self, case: TaskCase) -> None:
        if case.takes_batches:
            pytest.skip("get_output takes a batch")
        weights, buffers = state(case.model)

        def output(weights: dict[str, Tensor], *example: Any) -> Tensor:
            return case.task.get_output(case.model, weights, buffers, *example)

        batch = spread(case.batch)
        axes = (None, *(0 for _ in batch))
        vmapped = torch.func.vmap(torch.func.grad_and_value(output), axes)
        gradients, values = vmapped(weights, *batch)
        torch.testing.assert_close(values, self.outputs(case, slice(3)))
        for i in range(3):
            leaves = {k: v.clone().requires_grad_() for k, v in weights.items()}
            rows = take(case.batch, slice(3))
            one = compute(case, leaves, buffers, rows)[i]
            expected = torch.autograd.grad(
                one, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            for name, value in zip(leaves, expected, strict=True):
                torch.testing.assert_close(gradients[name][i], value)

    def test_without_weights_the_model_is_called_as_it_stands(
        self, case: TaskCase
    ) -> None:
        task, model, batch = case.task, case.model, take(case.batch, slice(3))
        values = compute(case, None, None, batch)
        torch.testing.assert_close(values, self.outputs(case, slice(3)))
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(values.sum(), parameters, allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in gradients)
        torch.testing.assert_close(
            task.get_out_to_loss_grad(model, None, None, batch),
            self.out_to_loss(case, slice(3)),
        )

    def test_weights_take_the_place_of_the_models(self, case: TaskCase) -> None:
        weights, buffers = state(case.model)
        other = {name: 1.3 * value.roll(1) for name, value in weights.items()}
        batch = take(case.batch, slice(3))
        functional = compute(case, other, buffers, batch)
        assert not torch.allclose(functional, self.outputs(case, slice(3)))

    def test_out_to_loss_keeps_no_graph(self, case: TaskCase) -> None:
        weights, buffers = state(case.model)
        live = {name: value.clone().requires_grad_() for name, value in weights.items()}
        batch = take(case.batch, slice(3))
        with torch.enable_grad():
            q = case.task.get_out_to_loss_grad(case.model, live, buffers, batch)
        assert not q.requires_grad
        with torch.no_grad():
            again = case.task.get_out_to_loss_grad(case.model, live, buffers, batch)
        torch.testing.assert_close(q, again)

    def test_nothing_global_or_on_the_task_changes(self, case: TaskCase) -> None:
        rng, before = torch.get_rng_state(), case.task.describe()
        flags = sdp_flags()
        self.outputs(case, slice(3))
        self.out_to_loss(case, slice(3))
        assert torch.equal(torch.get_rng_state(), rng)
        assert sdp_flags() == flags
        assert case.task.describe() == before

    def test_description_is_one_line_without_addresses(self, case: TaskCase) -> None:
        text = case.task.describe()
        assert "0x" not in text
        assert "\n" not in text
        assert type(case.task).__qualname__ in text


def sdp_flags() -> tuple[bool, ...]:
    return (
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
