"""Margins and what can be wrong with their labels, as pure tensor functions."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from trak.errors import BatchError, OptionError, TaskError


def log_odds(
    logits: Float[Tensor, "b k"], labels: Shaped[Tensor, " b"]
) -> Float[Tensor, " b"]:
    r"""Compute the log-odds of the correct class.

    With the softmax probability :math:`p` of the correct class :math:`y`,

    .. math:: \log\frac{p}{1 - p} = z_y - \log \sum_{j \ne y} e^{z_j}

    (Park et al., 2023, Section 3.3): no subtraction from 1, so nothing saturates.

    Args:
        logits: One row an example. Shape ``(b, k)``, with at least 2 classes.
        labels: The correct classes, any integer dtype. Shape ``(b,)``.

    Returns:
        The margins, in the dtype of ``logits``. Shape ``(b,)``.

    Example:
        >>> log_odds(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
        tensor([2.])
    """
    columns = labels.long().unsqueeze(1)
    others = logits.scatter(1, columns, -math.inf)
    return logits.gather(1, columns).squeeze(1) - others.logsumexp(1)


def signed(
    logits: Float[Tensor, "*shape"], labels: Shaped[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Flip the logits whose label is 0, so that larger is always more correct.

    Args:
        logits: Log-odds of label 1.
        labels: 0 or 1, in any dtype. The shape of ``logits``.

    Returns:
        The log-odds of the correct labels, in the dtype and shape of ``logits``.

    Example:
        >>> signed(torch.tensor([3.0, 3.0]), torch.tensor([1, 0]))
        tensor([ 3., -3.])
    """
    return (2 * labels.to(logits.dtype) - 1) * logits


def check_logits(logits: Tensor) -> None:
    """Refuse logits that are not one row an example with at least two classes.

    Raises:
        TaskError: If they are not, with their shape.
    """
    if logits.ndim != 2:
        raise TaskError(
            f"Classification needs logits of shape (b, classes), the model returned "
            f"{tuple(logits.shape)}; for other outputs write a FunctionTask."
        )
    if logits.shape[1] < 2:
        raise TaskError(
            f"The model returned {logits.shape[1]} logits an example, and a margin "
            f"needs at least 2 classes; for a single logit use 'binary_classification', "
            f"for a single number 'regression'."
        )


def check_class_labels(labels: Tensor, logits: Float[Tensor, "b k"]) -> None:
    """Refuse labels that are not one class index an example.

    Raises:
        BatchError: If the dtype, the shape or a value does not fit the logits.
    """
    b, classes = logits.shape
    integer = not (labels.is_floating_point() or labels.is_complex())
    if not integer or labels.dtype == torch.bool:
        raise BatchError(
            f"The labels have dtype {labels.dtype}; class indices are integers, so "
            f"convert them with labels.long()."
        )
    if labels.shape != (b,):
        raise BatchError(
            f"The labels have shape {tuple(labels.shape)}, and the model returned "
            f"logits for {b} examples; pass one class index an example, shape ({b},)."
        )
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        wanted = f"a class index from 0 to {classes - 1}"
        raise BatchError(_first_bad(labels, bad, wanted))


def check_binary_labels(labels: Tensor) -> None:
    """Refuse labels other than 0 and 1.

    Raises:
        BatchError: If there are others, with the first and its position.
    """
    bad = (labels != 0) & (labels != 1)
    if bad.any():
        raise BatchError(_first_bad(labels, bad, "0 or 1"))


def _first_bad(labels: Tensor, bad: Tensor, wanted: str) -> str:
    position = tuple(bad.nonzero()[0].tolist())
    where = str(position[0]) if len(position) == 1 else str(position)
    return (
        f"The label at position {where} of the batch is {labels[position].item()}, which "
        f"is not {wanted}; fix the labels, or leave these examples out."
    )


def check_positive(name: str, value: float | None) -> None:
    """Refuse a temperature that is not positive and finite.

    Raises:
        OptionError: If it is not.
    """
    if value is not None and not 0 < value < math.inf:
        raise OptionError(f"{name} must be positive and finite, got {value!r}.")
