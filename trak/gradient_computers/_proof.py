"""The order of the self-check: what is compared, what is learned, what is warned of."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trak._batches import batch_size, rebuild, row_leaves, take
from trak._types import Batch
from trak.errors import GradientError, TrakWarning
from trak.gradient_computers._self_check import (
    BLAMABLE,
    FiniteRows,
    Residual,
    Tolerance,
    check_alone,
    check_weights,
    differentiable,
    differentiate,
    is_close,
    tolerance,
    trimmed,
)
from trak.gradient_computers._sinks import GradientSink

EXAMPLES = 8
"""How many examples of a batch are checked."""

LARGEST_DISTANCE = 0.2
"""Relative distance of one example's gradient in a batch from that alone, or without its
padding, above which a warning is due. A cosine of 0.98."""

FIRST_RECHECK = 8
"""The first batch of a checkpoint at which the gradients are checked again; then at four
times as many batches, and so on, so that all checks cost little."""

_SURELY_WRONG = 0.5
"""Relative difference of a parameter's gradient that no rounding explains. Those of two
examples that changed places differ by their own size."""

_ROUNDS = 100
"""Every round but the last moves a parameter down the ladder, or changes one layer."""


@runtime_checkable
class Subject(Protocol):
    """What is checked."""

    model: Any
    modelout_fn: Any

    def outputs(self, batch: Batch) -> Tensor:
        """Compute the outputs of a batch, in whatever context it is called."""

    def plain_outputs(self, batch: Batch) -> Tensor:
        """Compute the outputs of a batch without hooks or gradients."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Return the selected parameters by name."""

    def dtypes(self) -> set[torch.dtype]:
        """Return the types that the last attempt computed in."""

    def settle(self, batch: Batch) -> None:
        """Prepare what can only be found out by trying."""

    def attempt(self, batch: Batch, sink: GradientSink) -> Tensor | None:
        """Compute gradients, or learn why not and return None."""

    def is_proved(self) -> bool:
        """Tell whether the last attempt read all layouts in ways that were proved."""

    def distrust(self, reason: str) -> None:
        """Serve parameters in another way, after outputs came out differently."""

    def learn(self, wrong: Mapping[str, float]) -> None:
        """Serve parameters in another way that were off by so much."""


def prove(engine: Subject, batch: Batch, limit: int = EXAMPLES) -> bool:
    """Make an engine agree with autograd on some examples of a batch.

    Args:
        engine: The engine; it learns until it agrees.
        batch: The examples.
        limit: How many of them to take at most.

    Returns:
        Whether it was proved; not where no example has a finite output and gradient.

    Raises:
        GradientError: If it cannot agree, or an output depends on its batch.
    """
    batch = take(batch, slice(0, limit))
    with torch.no_grad():
        outputs = engine.outputs(batch)
    batch = _select(batch, torch.isfinite(outputs))
    for _ in range(_ROUNDS):
        if batch_size(batch) == 0:
            return False
        engine.settle(batch)
        outcome = _compare(engine, batch)
        if outcome is True:
            _compare_alone(engine, batch)
            return True
        if isinstance(outcome, Tensor):
            batch = _select(batch, outcome)
    raise GradientError(unrest(engine.modelout_fn))


def unrest(task: object) -> str:
    """Say that no way of computing gradients holds for two batches."""
    return (
        f"The outputs or gradients of {type(task).__name__} are others each time they are "
        f"computed. Is there chance in the model, or in the task?"
    )


def _compare(engine: Subject, batch: Batch) -> bool | Tensor:
    """Compare once.

    Returns:
        Whether the engine agrees; or which examples are finite, if not all are.
    """
    parameters = engine.parameters()
    plain = engine.plain_outputs(batch)
    if len(plain) > 1:
        with torch.no_grad():
            alone = engine.outputs(take(batch, slice(0, 1)))
        check_alone(engine.modelout_fn, alone, plain[0])
    weights = check_weights(len(plain)).to(plain.device)
    with differentiable(parameters.values()):
        gradient = differentiate(
            functools.partial(engine.outputs, batch), weights, parameters
        )
    if not all(bool(torch.isfinite(value).all()) for value in gradient.values()):
        rows = FiniteRows(len(plain), plain.device)
        if engine.attempt(batch, rows) is None:
            return False
        # An overflow of the sum alone is no example's fault, and has no remedy here.
        return rows.finite if not rows.finite.all() else ~rows.finite
    residual = Residual(gradient, weights)
    outputs = engine.attempt(batch, residual)
    if outputs is None:
        return False
    dtypes = engine.dtypes() | {value.dtype for value in parameters.values()}
    if not is_close(outputs, plain):
        engine.distrust("the outputs of a pass with hooks differ")
        return False
    wrong = residual.wrong(tolerance(dtypes))
    if wrong:
        engine.learn(wrong)
    return not wrong


def check_again(engine: Subject, batch: Batch) -> None:
    """Refuse to go on where gradients that were right are wrong.

    A model may sort its examples, say, and the first batch have been in order.

    Args:
        engine: The engine; it stays as it is.
        batch: A later batch.

    Raises:
        GradientError: If what was proved on the first batch does not hold on this one.
    """
    batch = take(batch, slice(0, EXAMPLES))
    parameters = engine.parameters()
    with torch.no_grad():
        b = len(engine.outputs(batch))
    weights = check_weights(b).to(row_leaves(batch)[0].device)
    with differentiable(parameters.values()):
        gradient = differentiate(
            functools.partial(engine.outputs, batch), weights, parameters
        )
    residual = Residual(gradient, weights)
    if engine.attempt(batch, residual) is None or not engine.is_proved():
        return  # what is new to it is proved with the batch itself
    wrong = residual.wrong(Tolerance(_SURELY_WRONG, 0.05))
    # Without finite gradients there is nothing to compare.
    wrong = {name: share for name, share in wrong.items() if share > _SURELY_WRONG}
    if wrong:
        name, share = max(wrong.items(), key=lambda item: item[1])
        raise GradientError(
            f"The per-sample gradients of {name!r} agreed with autograd on the first batch "
            f"and are off by {share:.2g} on a later one: does the model sort or pack its "
            f"examples? Gradients stored since then may be wrong too. Start again with "
            f"gradient_computer=FunctionalGradientComputer or IterativeGradientComputer, "
            f"in another save_dir."
        )


def _compare_alone(engine: Subject, batch: Batch) -> None:
    """Warn if the first example's gradient depends on its batch, or on its padding."""
    b = batch_size(batch)
    example = take(batch, slice(0, 1))
    first = torch.zeros(b, dtype=torch.float64, device=row_leaves(batch)[0].device)
    first[0] = 1
    config = getattr(engine.model, "config", None)
    is_seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    unpadded = trimmed(example, is_seq2seq=is_seq2seq)
    versions = {"alone": example if b > 1 else None, "unpadded": unpadded}
    for version, other in versions.items():
        if other is None:
            continue
        parameters = engine.parameters()
        try:
            with differentiable(parameters.values()):
                gradient = differentiate(
                    functools.partial(engine.outputs, other), first[:1], parameters
                )
        except BLAMABLE:
            continue  # a model may want what looks like padding: there is no verdict
        residual = Residual(gradient, first)
        if engine.attempt(batch, residual) is None:
            return
        if residual.distance() > LARGEST_DISTANCE:
            _warn(version, residual.distance(), engine.dtypes())
            return


def _warn(version: str, distance: float, dtypes: Iterable[torch.dtype]) -> None:
    share = f"{100 * distance:.0f} %"
    names = ", ".join(sorted(str(it).removeprefix("torch.") for it in dtypes))
    if version == "alone":
        text = (
            f"An example's gradient differs by {share} between a batch and a batch of one: "
            f"computing in {names} is too coarse for this model. Load the model in "
            f"float32, or expect noisy scores."
        )
    else:
        text = (
            f"An example's gradient differs by {share} with and without its padding: the "
            f"model lets padding take part, or counts positions from the padded end. Pass "
            f"the attention mask on, pad on the other side, or group texts by length."
        )
    warnings.warn(text, TrakWarning, stacklevel=2)


def _select(batch: Batch, rows: Tensor) -> Batch:
    """Put examples of some rows in the places of the others; of none if there are none.

    The batch keeps its size, as layouts are read off it.

    Returns:
        The batch, or an empty one.
    """
    if rows.all():
        return batch
    kept = rows.nonzero()[:, 0]
    order = torch.arange(len(rows) if len(kept) else 0, device=rows.device)
    if len(kept):
        order = order.where(rows, kept[order % len(kept)])
    leaves = row_leaves(batch)
    return rebuild(batch, [leaf[order.to(leaf.device)] for leaf in leaves])
