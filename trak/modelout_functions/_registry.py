"""Which name means which task, and what else may be passed as one."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._types import Batch, Weights
from trak.errors import OptionError, UnknownTaskError
from trak.modelout_functions._abstract import AbstractModelOutput, describe_object
from trak.modelout_functions._classification import (
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
    TextClassificationModelOutput,
)
from trak.modelout_functions._clip import CLIPModelOutput
from trak.modelout_functions._scalar import (
    BinaryClassificationModelOutput,
    MultilabelModelOutput,
    RegressionModelOutput,
)
from trak.modelout_functions._tokens import (
    CausalLMModelOutput,
    MaskedLMModelOutput,
    Seq2SeqLMModelOutput,
)

TASK_TO_MODELOUT: dict[str, type[AbstractModelOutput]] = {
    "image_classification": ImageClassificationModelOutput,
    "iterative_image_classification": IterativeImageClassificationModelOutput,
    "text_classification": TextClassificationModelOutput,
    "clip": CLIPModelOutput,
    "regression": RegressionModelOutput,
    "binary_classification": BinaryClassificationModelOutput,
    "multilabel": MultilabelModelOutput,
    "causal_lm": CausalLMModelOutput,
    "masked_lm": MaskedLMModelOutput,
    "seq2seq_lm": Seq2SeqLMModelOutput,
}
"""The task each name stands for."""


def resolve_task(
    task: str | AbstractModelOutput | type[AbstractModelOutput] | object,
) -> AbstractModelOutput:
    """Make a task from a name, a class or an instance.

    Args:
        task: A key of :data:`TASK_TO_MODELOUT`, a class that needs no arguments, or an
            instance. An object that has ``get_output`` and ``get_out_to_loss_grad``
            without inheriting from :class:`AbstractModelOutput` is wrapped, and keeps
            its attributes.

    Returns:
        The task.

    Raises:
        UnknownTaskError: If the name is not registered.
        OptionError: If a class cannot be instantiated without arguments, or the object
            is no task.

    Example:
        >>> resolve_task("image_classification").describe()
        'ImageClassificationModelOutput(loss_temperature=1.0)'
    """
    if isinstance(task, str):
        if task not in TASK_TO_MODELOUT:
            raise UnknownTaskError(
                f"Unknown task {task!r}; pass one of {sorted(TASK_TO_MODELOUT)}, or an "
                f"AbstractModelOutput."
            )
        return TASK_TO_MODELOUT[task]()
    if isinstance(task, type) and _has_methods(task):
        task = _instantiate(task)
    if isinstance(task, AbstractModelOutput):
        return task
    if isinstance(task, type) or not _has_methods(task):
        name = task.__qualname__ if isinstance(task, type) else type(task).__name__
        raise OptionError(
            f"A task is a name, an AbstractModelOutput, or an object with get_output "
            f"and get_out_to_loss_grad, got {name}; see FunctionTask for plain functions."
        )
    batched = callable(getattr(task, "get_outputs", None))
    return _BatchedForeignTask(task) if batched else _ForeignTask(task)


def _instantiate(cls: type) -> object:
    try:
        return cls()
    except TypeError as error:
        raise OptionError(
            f"The task class {cls.__qualname__} cannot be built without arguments "
            f"({error}); pass an instance."
        ) from error


def _has_methods(task: object) -> bool:
    methods = ("get_output", "get_out_to_loss_grad")
    return all(callable(getattr(task, name, None)) for name in methods)


class _ForeignTask(AbstractModelOutput):
    """Stands in for an object that has the methods but not the base class."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        if name == "_task":  # not set yet while unpickling
            raise AttributeError(name)
        return getattr(self._task, name)

    def get_output(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        *example: Any,
    ) -> Float[Tensor, ""]:
        return self._task.get_output(model, weights, buffers, *example)  # type: ignore[no-any-return]

    def get_out_to_loss_grad(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, "b 1"]:
        return self._task.get_out_to_loss_grad(model, weights, buffers, batch)  # type: ignore[no-any-return]

    def describe(self) -> str:
        own = getattr(self._task, "describe", None)
        return str(own()) if callable(own) else describe_object(self._task)


class _BatchedForeignTask(_ForeignTask):
    """The same, for one that computes a batch of outputs at once."""

    def get_outputs(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, " b"]:
        return self._task.get_outputs(model, weights, buffers, batch)  # type: ignore[no-any-return]
