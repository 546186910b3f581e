"""Tail patch: does one step of training on a target's top examples teach it?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from trak._types import Batch
from trak.errors import (
    GradientError,
    ModelModeError,
    NonFiniteError,
    OptionError,
    TaskError,
)
from trak.evaluation._arrays import check_targets_finite, to_numpy
from trak.evaluation._result import TargetMean, target_mean


def tail_patch(
    before: np.ndarray | Tensor,
    after: np.ndarray | Tensor,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> TargetMean:
    r"""Measure how far a step on a target's top examples lowers its loss.

    For a target :math:`z` whose top training examples are :math:`T(z)`,

    .. math::
        \Delta(z) = L(z; \theta) - L\big(z; \theta
            - \eta\, \nabla_\theta L(T(z); \theta)\big)

    (after Chang et al., 2024; https://arxiv.org/abs/2410.17413).

    Args:
        before: Loss of each target at the final weights. Shape ``(m,)``.
        after: Its loss after the step on its own top examples, as
            :func:`tail_patch_losses` has both. Shape ``(m,)``, or ``(k, m)`` with one
            step for each of k examples apart, which are averaged.
        n_bootstrap: Resamples of the targets behind the interval.
        seed: Seed of the resampling.

    Returns:
        The mean fall over targets, its interval and the fall of each target. Positive
        where the step helps.

    Raises:
        OptionError: If the shapes do not fit each other, or there are no targets.
        NonFiniteError: If a loss is NaN or infinite.

    Example:
        >>> tail_patch(np.array([2.0, 1.0]), np.array([1.5, 1.0])).mean
        0.25
    """
    old = to_numpy("before", before)
    new = np.atleast_2d(to_numpy("after", after))
    if old.ndim != 1 or new.ndim != 2 or new.shape[1:] != old.shape or len(new) == 0:
        raise OptionError(
            f"before has shape {np.shape(before)} and after {np.shape(after)}; pass (m,), "
            f"and (m,) or (k, m)."
        )
    advice = "take a smaller step, or leave the target out of both."
    check_targets_finite("before", old, advice)
    check_targets_finite("after", new, advice)
    fall = old.astype(np.float64) - new.astype(np.float64).mean(axis=0)
    return target_mean("tail patch", fall, n_bootstrap=n_bootstrap, seed=seed)


def tail_patch_losses(
    model: torch.nn.Module,
    loss: Callable[[torch.nn.Module, Batch], Tensor],
    train_batch: Callable[[Int[np.ndarray, " k"]], Batch],
    target_batch: Callable[[int], Batch],
    top: Int[np.ndarray, "m k"] | Int[Tensor, "m k"],
    *,
    learning_rate: float,
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
    """Take one step of plain gradient descent on each target's top examples.

    Every step starts from the model as it is given, and the model is as it was
    afterwards. Parameters that require no gradient stay.

    Args:
        model: The trained model, in evaluation mode.
        loss: Gives the mean loss of a batch, a number.
        train_batch: Gives the batch of training examples at some indices.
        target_batch: Gives the batch of one target.
        top: Indices of each target's top examples, such as ``top_k(...).indices``.
            Shape ``(m, k)``.
        learning_rate: Length of the step in units of the gradient; that of the last
            steps of training is a good one.

    Returns:
        The loss of each target before and after its step. Shape ``(m,)`` each.

    Raises:
        OptionError: If ``learning_rate`` is not positive, ``top`` is not (m, k), or an
            index is negative.
        ModelModeError: If the model is in training mode.
        GradientError: If no parameter requires a gradient.
        TaskError: If ``loss`` gives no number.
        NonFiniteError: If a loss is NaN or infinite.
    """
    if not 0 < learning_rate < float("inf"):
        raise OptionError(
            f"learning_rate={learning_rate}; pass a positive number, such as that of the "
            f"last steps of training."
        )
    indices = to_numpy("top", top)
    if indices.ndim != 2 or indices.shape[1] == 0 or indices.dtype.kind not in "iu":
        raise OptionError(
            f"top has shape {indices.shape} and dtype {indices.dtype}; pass integers "
            f"(m, k), one row a target."
        )
    if (indices < 0).any():
        raise OptionError(
            f"top has the index {indices.min()}, which is that of no training example; "
            f"pass indices from 0 on."
        )
    _check_model(model)
    before, after = np.empty(len(indices)), np.empty(len(indices))
    for target, row in enumerate(indices):
        batch = target_batch(target)
        with torch.no_grad():
            before[target] = _number(loss(model, batch), f"on target {target}", target)
        with torch.enable_grad():
            taught = loss(model, train_batch(row))
        _check_taught(taught, target)
        with _stepped(model, taught, learning_rate), torch.no_grad():
            after[target] = _number(
                loss(model, batch),
                f"on target {target} after a step of learning_rate={learning_rate:g}",
                target,
            )
    return before, after


@contextlib.contextmanager
def _stepped(
    model: torch.nn.Module, loss: Tensor, learning_rate: float
) -> Iterator[None]:
    """Have a model one step of gradient descent further, until the block ends."""
    learned = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss, learned, allow_unused=True)
    saved = [parameter.detach().clone() for parameter in learned]
    try:
        with torch.no_grad():
            for parameter, slope in zip(learned, slopes, strict=True):
                if slope is not None:
                    parameter.sub_(slope, alpha=learning_rate)
        yield
    finally:
        # A copy, not a step back: that would round.
        with torch.no_grad():
            for parameter, value in zip(learned, saved, strict=True):
                parameter.copy_(value)


def _number(loss: object, where: str, target: int) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = (
            f"has shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else f"is a {type(loss).__name__}"
        )
        raise TaskError(
            f"loss(model, batch) {got} {where}; return the mean over the batch, a tensor "
            f"of one number."
        )
    value = float(loss.detach())
    if not np.isfinite(value):
        raise NonFiniteError(
            f"the loss is {value} {where}; check the batch, or take a smaller step.",
            index=target,
        )
    return value


def _check_taught(loss: Tensor, target: int) -> None:
    where = f"on the top examples of target {target}"
    _number(loss, where, target)
    if not loss.requires_grad:
        raise GradientError(
            f"loss(model, batch) {where} has no gradient; compute it from the model's "
            f"output, without detach() or item()."
        )


def _check_model(model: torch.nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ModelModeError(
            "the model is in training mode, so its loss would change without any step; "
            "call model.eval() first."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise GradientError(
            "no parameter of the model requires a gradient, so there is no step to take; "
            "call requires_grad_() on those to train."
        )
