"""Probes of this machine and of a model, which leave both as they were. No store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trak._batches import (
    as_arguments,
    copied,
    rebuild,
    row_digests,
    row_leaves,
    take,
)
from trak._featurizing import store_batch
from trak._linalg import product
from trak._pipeline import Pipeline
from trak._seams import has_batched_form
from trak._types import Batch
from trak.modelout_functions import AbstractModelOutput
from trak.modelout_functions._calls import evaluating
from trak.projectors import AbstractProjector, AdditiveProjector

PROBE_SECONDS = 0.1
"""How long what is fast is repeated."""

LONG = 20.0
"""Seconds of a first batch after which a second is not worth its time."""

_SIDE = {"cpu": 768}
_SIDE_ELSEWHERE = 4096
"""Sides of the matrices: large enough for the full rate, small enough to repeat."""

_COORDINATES = 1 << 20


@dataclass(frozen=True, slots=True)
class Rates:
    """Floating-point operations a second in large products, each multiplication two."""

    float32: float
    """In float32, made as scores are."""

    float64: float
    """In float64."""


@dataclass(frozen=True, slots=True)
class BatchTime:
    """How long a batch takes from examples to rows."""

    first: float
    """Seconds for the first of a checkpoint, checks and caches included."""

    others: float
    """Seconds for each of the rest."""

    def total(self, batches: float) -> float:
        """Add up the batches of a checkpoint."""
        return self.others * batches + max(0.0, self.first - self.others)


def measure_rates(device: torch.device) -> Rates:
    """Time products on a device, for a fifth of a second in all.

    Args:
        device: Where scores are computed.

    Returns:
        The rates.
    """
    side = _SIDE.get(device.type, _SIDE_ELSEWHERE)
    return Rates(
        _rate(torch.ones(side, side, device=device, dtype=torch.float32)),
        _rate(torch.ones(side, side, device=device, dtype=torch.float64)),
    )


def _rate(matrix: Tensor) -> float:
    def multiply() -> None:
        product(matrix, matrix)

    multiply()
    seconds = repeat(multiply, matrix.device, PROBE_SECONDS)
    return 2.0 * len(matrix) ** 3 / seconds


def repeat(call: Callable[[], None], device: torch.device, seconds: float) -> float:
    """Time a call by repeating it for a while.

    Args:
        call: What to time.
        device: Where it runs.
        seconds: For how long; it runs once at least.

    Returns:
        Seconds of the fastest call: other processes only ever make it slower.
    """
    begin, least = _now(device), float("inf")
    while True:
        start = _now(device)
        call()
        end = _now(device)
        least = min(least, end - start)
        if end - begin >= seconds:
            return least


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_projection(
    projector: AbstractProjector, grad_dim: int, size: int, device: torch.device
) -> float | None:
    """Time the projection of some coordinates of a batch of gradients of ones.

    Args:
        projector: The projector.
        grad_dim: Gradient entries, ``d``.
        size: Examples, ``b``.
        device: Where gradients are.

    Returns:
        Seconds for all coordinates of the batch; None for a projector that takes only
        whole gradients.
    """
    if not isinstance(projector, AdditiveProjector):
        return None
    some = min(grad_dim, max(1, _COORDINATES // size))
    grads = torch.ones(size, some, device=device)
    out = torch.zeros(size, projector.proj_dim, device=device)

    def project() -> None:
        projector.project_into(out, grads, 0)

    project()  # with what is drawn or compiled only once
    return repeat(project, device, PROBE_SECONDS / 2) * grad_dim / some


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and everything back afterwards.

    Modes, buffers and the states of torch's generators are restored, on an error too.
    What the functions below do with the model changes nothing else.

    Args:
        model: The model.
    """
    buffers = [(value, value.clone()) for value in model.buffers()]
    devices = {value.device for value in model.parameters() if value.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), evaluating(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def measure_batch(
    pipeline: Pipeline, batch: Batch, size: int, device: torch.device, *, half: bool
) -> BatchTime:
    """Featurize a batch into arrays that are thrown away, at least twice.

    Args:
        pipeline: What computes; its computer is loaded with the model anew, which is in
            evaluation mode.
        batch: The examples, canonical.
        size: Their number.
        device: Where they are.
        half: Whether rows are stored in float16.

    Returns:
        How long it takes.
    """
    computer, p = pipeline.computer, pipeline.proj_dim
    inds = np.arange(size, dtype=np.int64)
    store = {"grads": np.empty((size, p), np.float16 if half else np.float32)}
    if half:
        store["grads_exponent"] = np.empty((size, 1), np.int16)
    computer.load_model_params(computer.model)

    def featurize() -> None:
        digests = row_digests(batch)
        store_batch(pipeline, store, None, batch, inds, digests, skip=True)

    first = repeat(featurize, device, 0.0)
    others = first if first > LONG else repeat(featurize, device, PROBE_SECONDS)
    return BatchTime(max(first, others), others)


@dataclass(frozen=True, slots=True)
class Activations:
    """What a forward pass keeps for its backward pass, in bytes."""

    fixed: int
    """Whatever the batch: parameters in another type, say."""

    each: int
    """For each example."""


def measure_activations(
    model: torch.nn.Module, task: AbstractModelOutput, batch: Batch, size: int
) -> Activations:
    """Run one example forward, then two, and count what is kept.

    Args:
        model: The model, in evaluation mode.
        task: What is differentiated.
        batch: The examples, canonical; the first two are taken.
        size: Their number.

    Returns:
        The bytes, without parameters and buffers.
    """
    one = _kept(model, task, take(batch, slice(0, 1)))
    if size < 2 or not has_batched_form(task):
        return Activations(0, one)
    two = _kept(model, task, take(batch, slice(0, 2)))
    each = min(max(two - one, 0), one)
    return Activations(one - each, each)


def _kept(model: torch.nn.Module, task: AbstractModelOutput, batch: Batch) -> int:
    named, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    held = {_address(value) for value in [*named.values(), *buffers.values()]}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        if _address(value) not in held:
            kept[_address(value)] = value.untyped_storage().nbytes()
        return value.detach()  # a node that held its own output would never be freed

    batch = copied(batch)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda value: value)
    with torch.inference_mode(False), torch.enable_grad(), hooks:
        if has_batched_form(task):
            task.get_outputs(model, None, None, batch)
        else:
            example = rebuild(batch, [leaf[0] for leaf in row_leaves(batch)])
            task.get_output(model, named, buffers, *as_arguments(example))
    return sum(kept.values())


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
