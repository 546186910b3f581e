"""The interface of gradient computers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from trak._batches import as_arguments, batch_size, rebuild, row_leaves, take
from trak._linalg import spans
from trak._params import select_parameters
from trak._types import Batch, Gradients, GradWrt
from trak.modelout_functions import AbstractModelOutput


class AbstractGradientComputer(ABC):
    """Computes the gradient of a model output for every example of a batch.

    A subclass is given to :class:`trak.TRAKer` as a class and built with these
    arguments by keyword.

    Args:
        model: The model.
        task: What is differentiated, and its out-to-loss gradient.
        grad_dim: Number of gradient entries, ``d``.
        dtype: Floating-point type of the computation.
        device: Where the model is.
        grad_wrt: Names of the parameters to differentiate; None for all.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        task: AbstractModelOutput,
        grad_dim: int | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device | None = None,
        grad_wrt: GradWrt | None = None,
    ) -> None:
        self.model = model
        self.modelout_fn = task
        self.grad_dim = grad_dim
        self.dtype = dtype
        self.device = device
        self.grad_wrt = grad_wrt

    @abstractmethod
    def load_model_params(self, model: torch.nn.Module) -> None:
        """Take over the weights of a model whose checkpoint was just loaded."""

    @abstractmethod
    def compute_per_sample_grad(self, batch: Batch) -> Gradients:
        r"""Compute :math:`\nabla_\theta f(z_i; \theta)` for every example of a batch.

        Args:
            batch: The examples.

        Returns:
            ``{parameter: (b, *shape)}``, or one ``(b, d)`` tensor in the order of the
            parameters.
        """

    @abstractmethod
    def compute_loss_grad(self, batch: Batch) -> Tensor:
        """Compute the out-to-loss gradient of every example of a batch.

        Args:
            batch: The examples.

        Returns:
            The entries of Q (Park et al., 2023, Section 3.4). Shape ``(b, 1)``.
        """

    def per_sample_grad_blocks(self, batch: Batch) -> Iterator[Gradients]:
        """Compute the gradients of a batch piece by piece, to bound memory.

        Args:
            batch: The examples.

        Yields:
            The gradients of consecutive examples, as
            :meth:`compute_per_sample_grad` gives them; here, of all at once.
        """
        yield self.compute_per_sample_grad(batch=batch)

    def compute_outputs(self, batch: Batch) -> Tensor:
        r"""Compute the outputs :math:`f(z_i; \theta)` of a batch, without gradients.

        By the task's batched form if it has one, and else one example at a time. Only
        targets need it, and only from computers that do not stream.

        Args:
            batch: The examples.

        Returns:
            The outputs, detached. Shape ``(b,)``.
        """
        task = self.modelout_fn
        weights = {k: value.detach() for k, value in self.model.named_parameters()}
        buffers = dict(self.model.named_buffers())
        with torch.no_grad():
            if getattr(type(task), "get_outputs", NO_BATCHES) is not NO_BATCHES:
                return task.get_outputs(self.model, weights, buffers, batch)
            leaves = row_leaves(batch)
            examples = (
                rebuild(batch, [leaf[i] for leaf in leaves])
                for i in range(batch_size(batch))
            )
            return torch.stack([
                task.get_output(self.model, weights, buffers, *as_arguments(example))
                for example in examples
            ])


NO_BATCHES = AbstractModelOutput.get_outputs
"""What a task has that computes one example at a time."""


class SelectiveGradientComputer(AbstractGradientComputer):
    """A gradient computer of selected parameters, with bounded memory.

    Args:
        model: The model.
        task: What is differentiated, and its out-to-loss gradient.
        grad_dim: Number of gradient entries, ``d``; None to count them.
        dtype: Floating-point type of the computation; the model's own decides.
        device: Where the model is.
        grad_wrt: Names, globs or a predicate; None for all parameters.
    """

    max_block_bytes = 1 << 28
    """Gradients that :meth:`per_sample_grad_blocks` holds at once: 256 MiB."""

    def __init__(
        self,
        model: torch.nn.Module,
        task: AbstractModelOutput,
        grad_dim: int | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device | None = None,
        grad_wrt: GradWrt | None = None,
    ) -> None:
        super().__init__(model, task, grad_dim, dtype, device, grad_wrt)
        self.selection = select_parameters(model, grad_wrt)
        self.load_model_params(model)

    def per_sample_grad_blocks(self, batch: Batch) -> Iterator[Gradients]:
        """Compute the gradients of a batch piece by piece, to bound memory.

        Args:
            batch: Tensors in any nesting, with one row for each example.

        Yields:
            The gradients of consecutive examples, at most :attr:`max_block_bytes`
            of them or one example's.
        """
        rows = max(1, self.max_block_bytes // (4 * self.selection.grad_dim))
        for low, high in spans(batch_size(batch), rows):
            yield self.compute_per_sample_grad(batch=take(batch, slice(low, high)))
