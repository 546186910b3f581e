"""What a task is: the abstract model output, its contract and its sign convention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from trak._types import Batch, Weights
from trak.errors import TaskError
from trak.modelout_functions._fingerprint import fingerprint


class AbstractModelOutput(ABC):
    r"""What is attributed: a model output :math:`f(z; \theta)` and its loss weight.

    A task answers two questions about a model and an example :math:`z`. Which number
    :math:`f(z; \theta)` should the scores explain? And how strongly did training pull
    on that number at :math:`z`? The second is the *out-to-loss* weight

    .. math:: Q(z) = -\frac{\partial L(z; \theta)}{\partial f(z; \theta)},

    the diagonal of :math:`Q` in Park et al. (2023), Section 3, for the training loss
    :math:`L` seen as a function of :math:`f`.

    **Sign convention**, here once for every task: a gradient step on example :math:`i`
    moves :math:`f(z)` along :math:`Q_i \nabla f(z_i)^\top \nabla f(z)`. So with the
    minus sign a score is the effect of the training example on the *output* :math:`f`
    of the target: positive scores raise it. For a classification margin raising
    :math:`f` means helping, and :math:`Q = 1 - p`; for a regression :math:`Q = y - f`,
    and a positive score says that the example pushes the prediction up.

    Calling convention: ``weights`` and ``buffers`` are named tensors for
    :func:`torch.func.functional_call`; where ``weights`` is None the model is called as
    it stands, and gradients flow to its own parameters.

    Subclasses implement :meth:`get_output` and :meth:`get_out_to_loss_grad`. A subclass
    that replaces :meth:`get_output` of a task that has :meth:`get_outputs` falls back
    to the per-example form, unless it defines :meth:`get_outputs` as well.

    Attributes:
        exponents: Powers ``(a, b)`` of ``Q`` on training rows and on the result, where
            :class:`trak.TRAKer` is given none and the damping is ``"auto"``. They do
            not change what is stored.
    """

    exponents: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherited = getattr(super(cls, cls), "get_output", None)
        replaces = not getattr(inherited, "__isabstractmethod__", False)
        if "get_output" in vars(cls) and "get_outputs" not in vars(cls) and replaces:
            # The inherited batched form would compute another output than this one.
            cls.get_outputs = AbstractModelOutput.get_outputs  # type: ignore[method-assign]

    @abstractmethod
    def get_output(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        *example: Any,
    ) -> Float[Tensor, ""]:
        r"""Compute :math:`f(z; \theta)` of one example, under ``vmap(grad(...))``.

        Args:
            model: The model.
            weights: Its parameters by name, or None for those it holds.
            buffers: Its buffers by name.
            *example: One example without batch axis: the entries of a tuple batch one
                by one, or a mapping as a single argument.

        Returns:
            The output, differentiable. Shape ``()``.
        """

    @abstractmethod
    def get_out_to_loss_grad(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, "b 1"]:
        """Compute the out-to-loss weight ``Q`` of every example of a batch.

        Args:
            model: The model.
            weights: Its parameters by name, or None for those it holds.
            buffers: Its buffers by name.
            batch: The examples: a tuple, a list or a mapping of batched tensors.

        Returns:
            Minus the derivative of the loss with respect to the output, detached. Shape
            ``(b, 1)``.
        """

    def get_outputs(
        self,
        model: Module,
        weights: Weights | None,
        buffers: Weights | None,
        batch: Batch,
    ) -> Float[Tensor, " b"]:
        """Compute the outputs of a batch at once, shape ``(b,)``; optional.

        Row ``i`` must equal :meth:`get_output` of example ``i``, depend on that example
        only, and be differentiable. Whether a task has this method is
        ``type(task).get_outputs is not AbstractModelOutput.get_outputs``.

        Args:
            model: The model.
            weights: Its parameters by name, or None for those it holds.
            buffers: Its buffers by name.
            batch: The examples: a tuple, a list or a mapping of batched tensors.

        Raises:
            TaskError: If the task has only the per-example form.
        """
        raise TaskError(
            f"{type(self).__name__} has no batched get_outputs; use get_output, one "
            f"example at a time, or define get_outputs."
        )

    def start_checkpoint(self, model: Module) -> None:  # noqa: B027  it is optional
        """Take note that a checkpoint was loaded; optional, and here nothing happens.

        A task that contrasts examples with others computes here what depends on the
        weights alone.

        Args:
            model: The model that holds it, in the mode that it will be used in.
        """

    def describe(self) -> str:
        """Identify what this task computes, to notice that it changed.

        Returns:
            The name of the class and its public attributes but ``exponents``: scalars
            as they are, tensors and functions as a hash of their content. The same in
            every process of the same Python version.
        """
        return describe_object(self)

    def describe_data(self) -> str:
        """Identify the data that the task was given after it was made, if any.

        A checkpoint's training examples and targets must all be computed with the same.

        Returns:
            The same text for the same data; empty where there is none.
        """
        return ""


def describe_object(task: object) -> str:
    """Identify an object by its class's name and the public data on it.

    Returns:
        For example ``Task(scale=2.0)``.
    """
    data: dict[str, Any] = {}
    for parent in reversed(type(task).__mro__):
        if parent.__module__ in {"builtins", "abc", "typing"}:
            continue
        data |= {
            name: value
            for name, value in vars(parent).items()
            if not (callable(value) or hasattr(value, "__get__"))
        }
    data |= vars(task) if hasattr(task, "__dict__") else {}
    entries = (
        f"{name}={fingerprint(value)}"
        for name, value in sorted(data.items())
        if not (name.startswith("_") or name == "exponents")
    )
    return f"{type(task).__qualname__}({', '.join(entries)})"
