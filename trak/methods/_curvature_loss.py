"""Training losses split at the model's outputs, as Gauss-Newton matrices need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  PyTorch's own name for it
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._batches import batch_size, describe_value
from trak._types import Batch
from trak.errors import NonFiniteError, OptionError, TaskError
from trak.methods._likelihoods import (
    Bernoulli,
    Gaussian,
    Likelihood,
    Softmax,
    Tokens,
)
from trak.modelout_functions import (
    AbstractModelOutput,
    BinaryClassificationModelOutput,
    FunctionTask,
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
    MultilabelModelOutput,
    RegressionModelOutput,
    TextClassificationModelOutput,
)
from trak.modelout_functions._calls import call_for_logits, split_labels
from trak.modelout_functions._margins import check_class_labels
from trak.modelout_functions._token_labels import IGNORED
from trak.modelout_functions._tokens import TokenModelOutput

MeanLoss = Callable[[Module, Batch], Tensor]
"""``(model, batch) -> ()``, the mean loss of a batch."""

_SOFTMAX = (
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
    TextClassificationModelOutput,
)


@dataclass(frozen=True, slots=True)
class TrainingLoss:
    """The loss a model was trained with, split at the model's outputs.

    Example:
        >>> loss = TrainingLoss(
        ...     outputs=lambda model, batch: model(batch[0])[:, 0],
        ...     losses=lambda outputs, batch: (outputs - batch[1]) ** 2 / 2,
        ... )
        >>> batch = torch.tensor([[3.0], [1.0]]), torch.tensor([1.0, 1.0])
        >>> loss.mean(torch.nn.Identity(), batch)
        tensor(1.)
    """

    outputs: Callable[[Module, Batch], Tensor]
    """``(model, batch) -> (b, ...)``: what the loss is a convex function of."""

    losses: Callable[[Tensor, Batch], Tensor]
    """``(outputs, batch) -> (b,)``."""

    likelihood: Likelihood | None = None
    """Whose negative logarithm the loss is, if any."""

    def mean(self, model: Module, batch: Batch) -> Float[Tensor, ""]:
        """Compute the mean loss of a batch.

        Args:
            model: The model.
            batch: The examples.

        Returns:
            The mean. Shape ``()``.
        """
        return self.of_outputs(self.call(model, batch), batch).mean()

    def call(self, model: Module, batch: Batch) -> Float[Tensor, "b ..."]:
        """Call the model, and check what it gave.

        Args:
            model: The model.
            batch: The examples.

        Returns:
            The outputs. Shape ``(b, ...)``.

        Raises:
            TaskError: If they are not one tensor with a row for each example.
            NonFiniteError: If one is NaN or infinite.
        """
        outputs: object = self.outputs(model, batch)
        b = batch_size(batch)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != b:
            raise TaskError(
                f"outputs of a TrainingLoss gave {describe_value(outputs)} for {b} "
                f"examples; return one tensor with a row for each, shape ({b}, ...)."
            )
        is_bad = ~torch.isfinite(outputs).reshape(b, -1).all(dim=1)
        if is_bad.any():
            row = int(is_bad.nonzero()[0])
            raise NonFiniteError(
                f"the model's output for row {row} of a training batch is NaN or "
                f"infinite; leave the example out, or compute in a wider type."
            )
        return outputs

    def of_outputs(
        self, outputs: Float[Tensor, "b ..."], batch: Batch
    ) -> Float[Tensor, " b"]:
        """Compute the losses of a batch from the model's outputs.

        Args:
            outputs: What :attr:`outputs` gave. Shape ``(b, ...)``.
            batch: The examples.

        Returns:
            The losses. Shape ``(b,)``.

        Raises:
            TaskError: If there is not one loss for each example.
        """
        values: object = self.losses(outputs, batch)
        b = batch_size(batch)
        if isinstance(values, Tensor) and values.shape == (b,):
            return values
        raise TaskError(
            f"losses of a TrainingLoss gave {describe_value(values)} for {b} examples; "
            f"return one number an example, shape ({b},), for a loss of PyTorch with "
            f"reduction='none'."
        )


def loss_of_task(task: AbstractModelOutput) -> TrainingLoss:
    """Find the training loss that a task's out-to-loss weights belong to.

    Args:
        task: A task of classes, of tokens, of numbers or of binary labels, or a
            ``FunctionTask``.

    Returns:
        The loss.

    Raises:
        OptionError: If the task does not tell.
    """
    if isinstance(task, _SOFTMAX):
        return _softmax_loss(task)
    if isinstance(task, TokenModelOutput):
        return _token_loss(task)
    if isinstance(task, RegressionModelOutput):
        return TrainingLoss(
            lambda model, batch: task._forward(model, None, None, batch)[0],
            lambda outputs, batch: (outputs - _labels(task, outputs, batch)) ** 2 / 2,
            Gaussian(),
        )
    if isinstance(task, BinaryClassificationModelOutput | MultilabelModelOutput):
        return TrainingLoss(
            lambda model, batch: task._forward(model, None, None, batch)[0],
            lambda outputs, batch: _binary_losses(
                outputs, _labels(task, outputs, batch)
            ),
            Bernoulli(),
        )
    if isinstance(task, FunctionTask):
        return TrainingLoss(
            lambda model, batch: _tensor_of(task._call(model, None, None, batch)),
            task.loss,
        )
    raise OptionError(
        f"the training loss of {type(task).__name__} is not known; pass loss="
        f"TrainingLoss(outputs, losses), or a function (model, batch) -> mean loss with "
        f"curvature='hessian'."
    )


def _softmax_loss(task: AbstractModelOutput) -> TrainingLoss:
    def outputs(model: Module, batch: Batch) -> Tensor:
        return call_for_logits(model, None, None, task._split(batch))  # type: ignore[attr-defined]

    def losses(logits: Tensor, batch: Batch) -> Tensor:
        labels = task._split(batch).labels  # type: ignore[attr-defined]
        check_class_labels(labels, logits)
        labels = labels.long()
        return F.cross_entropy(logits / temperature, labels, reduction="none")

    temperature = float(getattr(task, "loss_temperature", 1.0))
    return TrainingLoss(outputs, losses, Softmax(temperature))


def _token_loss(task: TokenModelOutput) -> TrainingLoss:
    """Give the cross-entropy of a text, its tokens' mean or sum as the output is."""

    def outputs(model: Module, batch: Batch) -> Float[Tensor, "b t k"]:
        logits, labels = task.logits_and_labels(model, None, None, batch)
        is_labelled = labels != IGNORED
        weights = is_labelled.to(logits.dtype)
        if task.reduction == "mean":
            weights = weights / weights.sum(1, keepdim=True)
        known = labels.where(is_labelled, 0).to(logits.dtype)
        return torch.cat([logits, known[..., None], weights[..., None]], dim=-1)

    def losses(values: Float[Tensor, "b t k"], batch: Batch) -> Float[Tensor, " b"]:
        del batch
        logits, labels, weights = values[..., :-2], values[..., -2], values[..., -1]
        entropies = F.cross_entropy(
            logits.transpose(1, 2), labels.long(), reduction="none"
        )
        return (entropies * weights).sum(1)

    return TrainingLoss(outputs, losses, Tokens())


def _labels(task: AbstractModelOutput, outputs: Tensor, batch: Batch) -> Tensor:
    """Bring a batch's labels to the shape and type of the outputs."""
    aligned: Tensor = task._align(outputs, split_labels(batch).labels)[1]  # type: ignore[attr-defined]
    return aligned.to(outputs.dtype)


def _binary_losses(outputs: Tensor, labels: Tensor) -> Float[Tensor, " b"]:
    losses = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    return losses if losses.ndim == 1 else losses.sum(1)


def _tensor_of(outputs: object) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    raise OptionError(
        f"the model of this FunctionTask returns {type(outputs).__name__}; its loss is a "
        f"function of several tensors, so pass loss=TrainingLoss(outputs, losses), whose "
        f"outputs are one tensor."
    )
