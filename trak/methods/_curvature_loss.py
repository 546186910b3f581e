"""Training losses split at the model's outputs, as Gauss-Newton matrices need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812  PyTorch's own name for it
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._batches import batch_size, describe_value
from trak._types import Batch
from trak.errors import NonFiniteError, OptionError, TaskError
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

MeanLoss = Callable[[Module, Batch], Tensor]
"""``(model, batch) -> ()``, the mean loss of a batch."""

_SOFTMAX = (
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
    TextClassificationModelOutput,
)


@runtime_checkable
class Likelihood(Protocol):
    """What a model's outputs say of labels; the loss is its negative logarithm."""

    def sample(
        self, outputs: Float[Tensor, "b ..."], generator: torch.Generator
    ) -> Float[Tensor, "b ..."]:
        """Differentiate the loss by the outputs, at labels drawn from the model.

        Args:
            outputs: The model's outputs, of whatever shape. Shape ``(b, ...)``.
            generator: Draws the labels.

        Returns:
            A gradient whose covariance is the loss's Hessian. Shape ``(b, ...)``.
        """

    def roots(self, outputs: Float[Tensor, "b ..."]) -> list[Float[Tensor, "b ..."]]:
        """Factor the Hessian of the loss by the outputs.

        Args:
            outputs: The model's outputs. Shape ``(b, ...)``.

        Returns:
            Vectors whose outer products sum to the Hessian of each example.
        """


class Softmax:
    """Classes with the probabilities of a softmax.

    Args:
        temperature: Divides the logits.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self._temperature = temperature

    def sample(
        self, outputs: Float[Tensor, "b k"], generator: torch.Generator
    ) -> Float[Tensor, "b k"]:
        """Return ``p - e_y`` for a class ``y`` drawn with probabilities ``p``."""
        chances = (outputs / self._temperature).softmax(1)
        # One number an example: how a batch is cut does not matter.
        uniform = _uniform(chances[:, :1], generator)
        drawn = (chances.double().cumsum(1) < uniform).sum(1, keepdim=True)
        drawn = drawn.clamp(max=chances.shape[1] - 1)  # the sum may fall short of 1
        hits = torch.zeros_like(chances).scatter_(1, drawn, 1.0)
        return (chances - hits) / self._temperature

    def roots(self, outputs: Float[Tensor, "b k"]) -> list[Float[Tensor, "b k"]]:
        """Return ``sqrt(p_y) (p - e_y)`` for every class ``y``."""
        chances = (outputs / self._temperature).softmax(1)
        units = torch.eye(chances.shape[1], dtype=chances.dtype, device=chances.device)
        return [
            chances[:, [y]].sqrt() * (chances - units[y]) / self._temperature
            for y in range(chances.shape[1])
        ]


class Gaussian:
    """Numbers with unit variance around the outputs."""

    def sample(
        self, outputs: Float[Tensor, " b"], generator: torch.Generator
    ) -> Float[Tensor, " b"]:
        """Return ones: only the square of a number's noise counts, and its mean is 1."""
        return torch.ones_like(outputs)

    def roots(self, outputs: Float[Tensor, " b"]) -> list[Float[Tensor, " b"]]:
        """Return ones: the Hessian of half the square."""
        return [torch.ones_like(outputs)]


class Bernoulli:
    """Independent labels 0 and 1, whose log-odds are the outputs."""

    def sample(
        self, outputs: Float[Tensor, "b ..."], generator: torch.Generator
    ) -> Float[Tensor, "b ..."]:
        """Return ``p - y`` for drawn labels ``y``."""
        chances = outputs.sigmoid()
        return chances - (_uniform(chances, generator) < chances).to(chances.dtype)

    def roots(self, outputs: Float[Tensor, "b ..."]) -> list[Float[Tensor, "b ..."]]:
        """Return ``sqrt(p (1 - p))``, one label at a time."""
        chances = outputs.sigmoid()
        root = (chances * (1 - chances)).sqrt()
        if root.ndim == 1:
            return [root]
        columns = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
        return [root * column for column in columns]


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
        task: A task of classes, of numbers or of binary labels, or a ``FunctionTask``.

    Returns:
        The loss.

    Raises:
        OptionError: If the task does not tell.
    """
    if isinstance(task, _SOFTMAX):
        return _softmax_loss(task)
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


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return drawn.to(like.device)


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
