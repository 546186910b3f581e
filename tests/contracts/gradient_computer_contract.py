"""What every gradient computer keeps: one suite that each shipped class inherits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import PROBLEMS, Problem, randomized, split
from trak._batches import take
from trak._params import flatten_rows
from trak.gradient_computers import AbstractGradientComputer
from trak.modelout_functions import resolve_task


class GradientComputerContract:
    """Inherit, name it ``Test...``, and set ``kind``."""

    kind: type[AbstractGradientComputer]

    @pytest.fixture(params=PROBLEMS)
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        problem = (
            PROBLEMS[request.param](n=5, m=1)
            if request.param != "named"
            else (PROBLEMS["named"]())
        )
        problem.model.load_state_dict(problem.checkpoints[0])
        problem.model.eval()
        return problem

    def make(self, problem: Problem, **options: Any) -> AbstractGradientComputer:
        name = (
            "text_classification" if isinstance(problem.train, dict) else problem.task
        )
        arguments = {
            "model": problem.model,
            "task": resolve_task(name),
            "grad_dim": sum(v.numel() for v in problem.parameters().values()),
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "grad_wrt": None,
            **options,
        }
        return self.kind(**arguments)

    def grads(self, problem: Problem, rows: slice, **options: Any) -> Tensor:
        batch = take(problem.train, rows)
        computer = self.make(problem, **options)
        return flatten_rows(computer.compute_per_sample_grad(batch))

    def expected(self, problem: Problem, size: int) -> Tensor:
        batch = take(problem.train, slice(0, size))
        return problem.gradients(problem.checkpoints[0], batch, size)

    def test_agrees_with_a_loop_over_examples(self, problem: Problem) -> None:
        grads = self.grads(problem, slice(0, 3))
        torch.testing.assert_close(grads, self.expected(problem, 3))
        assert not grads.requires_grad

    @pytest.mark.parametrize("b", [0, 1, 3])
    def test_shapes(self, problem: Problem, b: int) -> None:
        batch = take(problem.train, slice(0, b))
        computer = self.make(problem)
        d = sum(value.numel() for value in problem.parameters().values())
        assert flatten_rows(computer.compute_per_sample_grad(batch)).shape == (b, d)
        weights = computer.compute_loss_grad(batch)
        assert weights.shape == (b, 1)
        assert not weights.requires_grad

    def test_out_to_loss(self, problem: Problem) -> None:
        weights = self.make(problem).compute_loss_grad(problem.train)
        expected = problem.out_to_loss(problem.checkpoints[0])
        torch.testing.assert_close(weights[:, 0], expected)

    def test_batch_split_does_not_matter(self, problem: Problem) -> None:
        parts = [self.grads(problem, slice(i, i + 1)) for i in range(3)]
        torch.testing.assert_close(torch.cat(parts), self.grads(problem, slice(0, 3)))

    def test_blocks_make_up_the_batch(self, problem: Problem) -> None:
        computer = self.make(problem)
        computer.max_block_bytes = 1  # one example at a time, where it is honoured
        batch = take(problem.train, slice(0, 3))
        blocks = list(map(flatten_rows, computer.per_sample_grad_blocks(batch)))
        torch.testing.assert_close(torch.cat(blocks), self.expected(problem, 3))

    def test_new_weights_are_taken_over(self, problem: Problem) -> None:
        computer = self.make(problem)
        problem.checkpoints = [randomized(problem.model, 7)]
        problem.model.load_state_dict(problem.checkpoints[0])
        computer.load_model_params(problem.model)
        batch = take(problem.train, slice(0, 3))
        grads = flatten_rows(computer.compute_per_sample_grad(batch))
        torch.testing.assert_close(grads, self.expected(problem, 3))
        weights = computer.compute_loss_grad(problem.train)[:, 0]
        torch.testing.assert_close(weights, problem.out_to_loss(problem.checkpoints[0]))

    @pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
    def test_gradients_may_be_switched_off(self, problem: Problem, guard: Any) -> None:
        with guard():
            problem.train = take(problem.train, slice(0, 3))
            grads = self.grads(problem, slice(0, 3))
        torch.testing.assert_close(grads.clone(), self.expected(problem, 3))

    def test_nothing_else_changes(self, problem: Problem) -> None:
        before = {k: v.clone() for k, v in problem.model.state_dict().items()}
        flags = [value.requires_grad for value in problem.model.parameters()]
        state = torch.get_rng_state()
        batch = take(problem.train, slice(0, 3))
        copies = torch.utils._pytree.tree_map(torch.clone, batch)
        self.make(problem).compute_per_sample_grad(batch)
        torch.testing.assert_close(problem.model.state_dict(), before)
        torch.testing.assert_close(batch, copies)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(value.grad is None for value in problem.model.parameters())
        assert [v.requires_grad for v in problem.model.parameters()] == flags
        assert not problem.model.training

    def test_an_output_that_is_not_finite_has_no_gradient(
        self, problem: Problem
    ) -> None:
        if isinstance(problem.train, dict):
            pytest.skip("its inputs are integers")
        expected = self.expected(problem, 3)
        problem.train[0][1] = torch.nan
        grads = self.grads(problem, slice(0, 3))
        assert grads[1].isnan().all()
        torch.testing.assert_close(grads[[0, 2]], expected[[0, 2]])

    def test_only_what_is_named_is_differentiated(self, problem: Problem) -> None:
        name = list(problem.parameters())[-1]
        grads = self.grads(problem, slice(0, 3), grad_wrt=[name])
        size = problem.parameters()[name].numel()
        torch.testing.assert_close(grads, self.expected(problem, 3)[:, -size:])

    def test_any_split_of_a_batch(self, problem: Problem) -> None:
        computer = self.make(problem)
        rows = [
            flatten_rows(computer.compute_per_sample_grad(batch))
            for batch, _ in split(problem.train, problem.n, 2)
        ]
        torch.testing.assert_close(torch.cat(rows), self.expected(problem, problem.n))
