"""From what a layer got and its output's gradient to a sink, some examples at a time."""

from __future__ import annotations

from torch import Tensor

from trak._linalg import spans
from trak.gradient_computers._layer_rules import LayerRule, SegmentRule
from trak.gradient_computers._layouts import (
    WITHOUT_EXAMPLES,
    Layout,
    by_example,
    is_positionwise,
)
from trak.gradient_computers._sinks import GradientSink
from trak.gradient_computers._stations import Station


def form_gradients(
    station: Station,
    rule: LayerRule,
    layout: Layout,
    inputs: Tensor,
    grad: Tensor,
    b: int,
    sink: GradientSink,
) -> str | None:
    """Form the gradients of what a rule serves at a station.

    Args:
        station: The layer, and which of its parameters are wanted.
        rule: Its rule.
        layout: Where the examples are in its output.
        inputs: What it got.
        grad: The gradient of its output; with a dimension of examples in front where the
            output has none.
        b: Number of examples.
        sink: Where the gradients go.

    Returns:
        Why the rule does not hold, for users; None if it does.
    """
    module = station.module
    if is_positionwise(module):
        inputs = by_example(inputs, layout, b)
        if layout not in WITHOUT_EXAMPLES:
            grad = by_example(grad, layout, b)
    elif layout is Layout.APART:
        inputs = by_example(inputs, layout, b).flatten(0, 1)
        grad = grad.flatten(0, 1)
    reason = rule.refusal(module, inputs, grad)
    if reason is not None:
        return reason
    wanted = dict(station.by_rule)
    if isinstance(rule, SegmentRule) and "weight" in wanted:
        # Of a table smaller than what was looked up in it, the whole gradient is less.
        weight = module._parameters["weight"]
        if weight is None or inputs[0].numel() <= len(weight):
            runs = rule.segments(module, inputs, grad)
            sink.add_segments(wanted.pop("weight"), *runs)
    for local, name in wanted.items():
        _form_one(station, rule, local, name, inputs, grad, b, sink)
    return None


def _form_one(
    station: Station,
    rule: LayerRule,
    local: str,
    name: str,
    inputs: Tensor,
    grad: Tensor,
    b: int,
    sink: GradientSink,
) -> None:
    """Form one parameter's gradients; rows may be several an example, and are summed."""
    module, step, each = station.module, b, len(grad) // b
    parameter = module._parameters[local]
    if parameter is not None and parameter.ndim > 1:  # others take next to nothing
        size = max(1, each * rule.bytes_per_example(module, inputs, grad))
        step = max(1, sink.block_bytes // size)
    for low, high in spans(b, step):
        rows = slice(low * each, high * each)
        pieces = rule.per_sample(module, inputs[rows], grad[rows], frozenset({local}))
        for _, piece in pieces:
            if each > 1:
                piece = piece.reshape(high - low, each, -1).sum(1)
            sink.add(name, slice(low, high), piece)
            del piece  # the next one is to be formed in its memory
