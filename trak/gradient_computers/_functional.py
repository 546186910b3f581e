"""Per-sample gradients by ``torch.func``, vectorised over the batch."""

from __future__ import annotations

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
)
from trak._types import Batch
from trak.errors import GradientError, TaskError, TrakError
from trak.gradient_computers._abstract import SelectiveGradientComputer
from trak.modelout_functions import AbstractModelOutput


def check_scalar(value: object, task: AbstractModelOutput) -> Tensor:
    """Check that a task's output for one example is one number.

    Returns:
        The output.

    Raises:
        TaskError: If it is not.
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    raise TaskError(
        f"{type(task).__name__}.get_output must return a scalar tensor for one example; "
        f"got {describe_value(value)}."
    )


class FunctionalGradientComputer(SelectiveGradientComputer):
    """Differentiates a task's per-example output with ``vmap`` over ``grad``.

    Only the selected parameters are differentiated; the others are constants.

    Args:
        model: The model.
        task: A task whose ``get_output`` takes one example.
        grad_dim: Number of gradient entries, ``d``; None to count them.
        dtype: Floating-point type of the computation; the model's own decides.
        device: Where the model is.
        grad_wrt: Names, globs or a predicate; None for all parameters.
    """

    def load_model_params(self, model: torch.nn.Module) -> None:
        """Take over the weights of a model whose checkpoint was just loaded.

        Args:
            model: The model.

        Raises:
            GradientError: If it is wrapped in a way that ``torch.func`` cannot call.
        """
        if isinstance(model, torch.nn.DataParallel):
            raise GradientError(
                "torch.func cannot call a DataParallel model; make the TRAKer with "
                "model.module."
            )
        self.model = model
        self.func_weights = {
            name: value.detach() for name, value in model.named_parameters()
        }
        self.func_buffers = dict(model.named_buffers())

    def compute_per_sample_grad(self, batch: Batch) -> dict[str, Tensor]:
        r"""Compute :math:`\nabla_\theta f(z_i; \theta)` for every example of a batch.

        Args:
            batch: Tensors in any nesting, with one row for each example.

        Returns:
            ``{parameter: (b, *shape)}`` for the selected parameters. An example whose
            output is not finite has gradients of NaN.

        Raises:
            TaskError: If the task's output for one example is not a scalar.
            GradientError: If ``torch.func`` cannot vectorise this model.
            TrakError: Whatever the task itself raises.
        """
        return self.differentiate(batch)[0]

    def differentiate(
        self, batch: Batch
    ) -> tuple[dict[str, Tensor], Float[Tensor, " b"]]:
        r"""Compute outputs and gradients, as :meth:`compute_per_sample_grad` does.

        Args:
            batch: Tensors in any nesting, with one row for each example.

        Returns:
            The gradients, and the outputs :math:`f(z_i; \theta)` of shape ``(b,)``.

        Raises:
            TaskError: If the task's output for one example is not a scalar.
            GradientError: If ``torch.func`` cannot vectorise this model.
            TrakError: Whatever the task itself raises.
        """
        selected = {name: self.func_weights[name] for name in self.selection.names}
        batch = copied(batch)  # for models that write to their inputs
        leaves = row_leaves(batch)
        if batch_size(batch) == 0:
            grads = {name: w.new_empty(0, *w.shape) for name, w in selected.items()}
            return grads, torch.empty(0)

        def output(chosen: dict[str, Tensor], *example: Tensor) -> Tensor:
            arguments = as_arguments(rebuild(batch, list(example)))
            value: object = self.modelout_fn.get_output(
                self.model,
                {**self.func_weights, **chosen},
                self.func_buffers,
                *arguments,
            )
            return check_scalar(value, self.modelout_fn)

        vectorised = torch.func.vmap(
            torch.func.grad_and_value(output),
            in_dims=(None, *[0] * len(leaves)),
            randomness="different",
        )
        try:
            grads, values = vectorised(selected, *leaves)
        except TrakError:
            raise
        except RuntimeError as error:
            raise GradientError(
                f"torch.func cannot compute per-sample gradients of "
                f"{type(self.model).__name__}: {error}\nPass "
                f"gradient_computer=IterativeGradientComputer to differentiate one "
                f"example at a time."
            ) from error
        finite = torch.isfinite(values)
        if not finite.all():
            for name, grad in grads.items():
                shape = (-1, *[1] * (grad.ndim - 1))
                grads[name] = grad.where(finite.reshape(shape), torch.nan)
        return grads, values.detach()

    def compute_loss_grad(self, batch: Batch) -> Tensor:
        """Compute the out-to-loss gradient of every example of a batch.

        Args:
            batch: Tensors in any nesting, with one row for each example.

        Returns:
            The entries of Q (Park et al., 2023, Section 3.4). Shape ``(b, 1)``.
        """
        with torch.no_grad():
            return self.modelout_fn.get_out_to_loss_grad(
                self.model, self.func_weights, self.func_buffers, copied(batch)
            )
