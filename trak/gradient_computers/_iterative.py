"""Per-sample gradients one example at a time, for any model that autograd can run."""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trak._batches import (
    as_arguments,
    batch_size,
    copied,
    describe_value,
    rebuild,
    row_leaves,
    take,
)
from trak._types import Batch
from trak.errors import GradientError, TaskError, TrakError
from trak.gradient_computers._abstract import SelectiveGradientComputer
from trak.gradient_computers._self_check import check_alone
from trak.modelout_functions import AbstractModelOutput


class IterativeGradientComputer(SelectiveGradientComputer):
    """Differentiates each example's output by a backward pass of its own.

    The model is called as it stands, on the whole batch, so it needs nothing of
    ``torch.func``. A task is asked for ``get_outputs(model, None, None, batch)`` where
    it has that, else for ``get_output(model, None, None, *batch)`` as in 0.3.2; either
    gives ``(b,)`` outputs.

    Args:
        model: The model.
        task: A task with batched outputs.
        grad_dim: Number of gradient entries, ``d``; None to count them.
        dtype: Floating-point type of the computation; the model's own decides.
        device: Where the model is.
        grad_wrt: Names, globs or a predicate; None for all parameters.
    """

    def load_model_params(self, model: torch.nn.Module) -> None:
        """Take over the weights of a model whose checkpoint was just loaded."""
        self.model = model
        named = dict(model.named_parameters())
        self.model_params = [named[name] for name in self.selection.names]
        self._is_checked = False

    def compute_per_sample_grad(self, batch: Batch) -> Float[Tensor, "b d"]:
        r"""Compute :math:`\nabla_\theta f(z_i; \theta)` for every example of a batch.

        Args:
            batch: Tensors in any nesting, with one row for each example.

        Returns:
            The gradients, parameters in the model's order. Shape ``(b, d)``. An example
            whose output is not finite has gradients of NaN.

        Raises:
            TaskError: If the task does not give one output for each example.
            GradientError: If the outputs do not depend on the selected parameters, or
                an example's output depends on the rest of its batch.
        """
        # Callers may be under no_grad or inference_mode; autograd is needed here.
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [x.clone() if x.is_inference() else x for x in row_leaves(batch)]
            return self._rows(rebuild(batch, leaves))

    def _rows(self, batch: Batch) -> Float[Tensor, "b d"]:
        b = batch_size(batch)
        dtype = functools.reduce(
            torch.promote_types, (value.dtype for value in self.model_params)
        )
        first = self.model_params[0]
        rows = first.new_zeros(b, self.selection.grad_dim, dtype=dtype)
        if b == 0:
            return rows
        alone = self._first_alone(batch)
        outputs = self._outputs(copied(batch))
        if not isinstance(outputs, Tensor) or outputs.shape != (b,):
            raise TaskError(
                f"{type(self.modelout_fn).__name__} gives outputs of "
                f"{describe_value(outputs)} for a batch of {b}; a tensor of shape ({b},) "
                f"is needed."
            )
        if not outputs.requires_grad:
            raise GradientError(
                f"The outputs of {type(self.modelout_fn).__name__} do not depend on any "
                f"selected parameter through autograd; does it detach, or use no_grad?"
            )
        if isinstance(alone, Tensor):
            check_alone(self.modelout_fn, alone, outputs[0])
        for i in range(b):
            grads = torch.autograd.grad(
                outputs[i],
                self.model_params,
                retain_graph=i + 1 < b,
                allow_unused=True,
                materialize_grads=True,
            )
            rows[i] = torch.cat([grad.to_dense().reshape(-1) for grad in grads])
        rows[~torch.isfinite(outputs.detach())] = torch.nan
        if b > 1:  # one example's NaN is every example's, as 0 times NaN is NaN
            for i in (~torch.isfinite(rows).all(dim=1)).nonzero()[:, 0].tolist():
                rows[i] = self._rows(take(batch, slice(i, i + 1)))[0]
        return rows

    @torch.no_grad()
    def _first_alone(self, batch: Batch) -> object:
        """Compute the first example's output without its batch, once a checkpoint."""
        if self._is_checked or batch_size(batch) < 2:
            return None
        self._is_checked = True
        return self._outputs(copied(take(batch, slice(0, 1))))

    def _outputs(self, batch: Batch) -> object:
        task = self.modelout_fn
        own = getattr(type(task), "get_outputs", None)
        if own is not None and own is not AbstractModelOutput.get_outputs:
            return task.get_outputs(self.model, None, None, batch)
        try:
            return task.get_output(self.model, None, None, *as_arguments(batch))
        except TrakError:
            raise
        except (TypeError, RuntimeError) as error:
            raise TaskError(
                f"{type(task).__name__}.get_output cannot be called on a whole batch "
                f"without weights ({error}). Give the task get_outputs(model, weights, "
                f"buffers, batch), or use FunctionalGradientComputer."
            ) from error

    @torch.no_grad()
    def compute_outputs(self, batch: Batch) -> Tensor:
        r"""Compute the outputs :math:`f(z_i; \theta)` of a batch, all at once.

        Args:
            batch: The examples.

        Returns:
            The outputs, detached. Shape ``(b,)``.
        """
        outputs: Any = self._outputs(batch)
        result: Tensor = outputs
        return result

    def compute_loss_grad(self, batch: Batch) -> Tensor:
        """Compute the out-to-loss gradient of every example of a batch.

        Args:
            batch: Tensors in any nesting, with one row for each example.

        Returns:
            The entries of Q (Park et al., 2023, Section 3.4). Shape ``(b, 1)``.
        """
        with torch.no_grad():
            return self.modelout_fn.get_out_to_loss_grad(
                self.model, None, None, copied(batch)
            )
