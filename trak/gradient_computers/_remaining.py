"""Per-sample gradients by some parameters, without hooks: by ``vmap``, and by a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from trak._batches import as_arguments, batch_size, copied, rebuild, row_leaves, take
from trak._linalg import spans
from trak._types import Batch
from trak.errors import TrakError
from trak.gradient_computers._functional import FunctionalGradientComputer
from trak.gradient_computers._graph import wide
from trak.gradient_computers._self_check import BLAMABLE
from trak.gradient_computers._sinks import GradientSink
from trak.modelout_functions import AbstractModelOutput


def has_batched_form(task: AbstractModelOutput) -> bool:
    """Tell whether a task defines the optional batched form of its output."""
    own = getattr(type(task), "get_outputs", None)
    return own is not None and own is not AbstractModelOutput.get_outputs


def needs_weights(
    model: nn.Module,
    task: AbstractModelOutput,
    run: Callable[[], object],
    batch: Batch,
) -> str | None:
    """Find out whether a task's batched form only works with given weights.

    Args:
        model: The model.
        task: The task.
        run: Runs its batched form without weights.
        batch: Examples to run it on with weights.

    Returns:
        For users, that it does; None if it runs without.

    Raises:
        TrakError: What ``run`` raises; with weights it would raise the same.
        AttributeError: What ``run`` raises, if weights do not help.
        LookupError: Likewise.
        TypeError: Likewise.
        ValueError: Likewise.
    """
    with torch.no_grad():
        try:
            run()
        except TrakError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            weights = {name: x.detach() for name, x in model.named_parameters()}
            buffers = dict(model.named_buffers())
            try:
                task.get_outputs(model, weights, buffers, copied(batch))
            except BLAMABLE:
                raise error from None
            return f"{type(task).__name__}.get_outputs does not take weights=None"
    return None


def vmap_gradients(
    computer: FunctionalGradientComputer,
    batch: Batch,
    sink: GradientSink,
    prefix: str,
) -> Tensor:
    """Differentiate by some parameters with ``vmap``, as many examples as fit at a time.

    Args:
        computer: An engine for those parameters.
        batch: The examples.
        sink: Where gradients go; an example whose output is not finite has NaN.
        prefix: What the sink's names of parameters have before the engine's.

    Returns:
        The outputs. Shape ``(b,)``.
    """
    step = max(1, computer.max_block_bytes // (4 * computer.selection.grad_dim))
    outputs = []
    for low, high in spans(batch_size(batch), step):
        part = copied(take(batch, slice(low, high)))
        grads, values = computer.differentiate(part)
        outputs.append(values)
        for name, grad in grads.items():
            sink.add(
                prefix + name, slice(low, high), wide(grad.reshape(high - low, -1))
            )
    return torch.cat(outputs)


def loop_gradients(
    model: nn.Module,
    task: AbstractModelOutput,
    names: dict[str, str],
    batch: Batch,
    sink: GradientSink,
) -> Tensor:
    """Differentiate the outputs of a batch one example at a time.

    Args:
        model: The model, called as it stands where the task has a batched form.
        task: Its batched form is used on batches of one, or else its per-example form.
        names: The sink's names of parameters, by the model's.
        batch: The examples.
        sink: Where gradients go; an example whose output is not finite has NaN.

    Returns:
        The outputs. Shape ``(b,)``.
    """
    every = dict(model.named_parameters())
    chosen = [every[name] for name in names]
    buffers = dict(model.named_buffers())
    outputs = []
    for i in range(batch_size(batch)):
        example = copied(take(batch, slice(i, i + 1)))
        if has_batched_form(task):
            output = task.get_outputs(model, None, None, example).reshape(())
        else:
            arguments = as_arguments(_squeezed(example))
            output = task.get_output(model, every, buffers, *arguments)
        grads = _gradients(output, chosen)
        for name, grad in zip(names.values(), grads, strict=True):
            sink.add(name, slice(i, i + 1), wide(grad.to_dense().reshape(1, -1)))
        outputs.append(output.detach())
    return torch.stack(outputs)


def _gradients(output: Tensor, chosen: Iterable[Tensor]) -> tuple[Tensor, ...]:
    chosen = list(chosen)
    if not output.requires_grad:
        return tuple(torch.zeros_like(value) for value in chosen)
    return torch.autograd.grad(
        output, chosen, allow_unused=True, materialize_grads=True
    )


def _squeezed(batch: Batch) -> Batch:
    """Take the dimension of examples away from a batch of one."""
    return rebuild(batch, [leaf[0] for leaf in row_leaves(batch)])
