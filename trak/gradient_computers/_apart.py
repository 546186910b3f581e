"""Tensors that no example has a part in, followed up to where they meet the examples.

A table of relative positions is looked up once for all examples, and what was looked up is
broadcast over them later. There each example gets a copy of its own, whose gradient is
taken back to the layer, one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  PyTorch's own name for it

from trak.errors import GradientError
from trak.gradient_computers._graph import on_gradient, start
from trak.gradient_computers._module_gradients import flatten
from trak.gradient_computers._self_check import BLAMABLE

_EXPANDING = frozenset({Tensor.expand, Tensor.expand_as, torch.broadcast_to})
"""Functions after which each example has a row, without having met any."""

_REPEATING = frozenset({Tensor.repeat, torch.tile, Tensor.tile})
"""Functions after which each example has as many rows as there were."""

_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm})
"""Functions of inputs and a matrix ``(i, o)``."""


class Apart(Tensor):
    """A tensor that was computed from parameters alone; so is what is computed from it.

    Attributes:
        meetings: Where it is followed; None once it is not any more.
        sources: The layers it came from, by number.
    """

    meetings: Meetings | None = None
    sources: frozenset[int] = frozenset()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run any function of PyTorch, and follow what it returns."""
        kwargs = kwargs or {}
        leaves, rebuild = flatten((args, kwargs))
        own = [leaf for leaf in leaves if isinstance(leaf, Apart)]
        meetings = next((it.meetings for it in own), None)
        with torch._C.DisableTorchFunctionSubclass():
            if meetings and meetings.is_open and torch.is_grad_enabled():
                return meetings.run(func, args, kwargs, leaves, rebuild)
            return func(*args, **kwargs)


@dataclass(slots=True)
class _Source:
    """A layer whose output is followed."""

    values: list[Tensor]
    """What it returned."""

    form: Callable[[list[Tensor | None]], None]
    """Takes the gradients of these, of shapes ``(b, *shape)``."""

    is_lost: bool = False
    """Whether an example's share of the gradient cannot be told."""

    grads: list[Any] = field(default_factory=list)
    """The gradients of each, or None; empty as long as there is none."""


@dataclass(slots=True)
class _Meeting:
    """Where a tensor met the examples."""

    value: Tensor
    """The tensor, in the graph that it came from."""

    sources: frozenset[int]
    """Which layers those are."""

    is_expanded: bool
    """Whether each example got a copy; else a part of the tensor is each example's."""

    inputs: Tensor | None = None
    """What a matrix was multiplied with, instead of a copy for each example."""

    is_transposed: bool = False
    """Whether that matrix is ``(o, i)``."""

    version: int = 0
    """How often the inputs had been written to."""

    grad: Tensor | None = None
    """The gradient of what the examples got."""


class Meetings:
    """What became of the layers' outputs in a pass.

    Args:
        b: Number of examples.
        anchor: What graphs start from.

    Attributes:
        is_open: Whether anything is followed now.
    """

    def __init__(self, b: int, anchor: Tensor) -> None:
        self.is_open = True
        self._b, self._anchor = b, anchor
        self._sources: list[_Source] = []
        self._met: list[_Meeting] = []
        self._known: dict[tuple[int, int, bool, int], tuple[Tensor, Tensor]] = {}
        self._followed: list[Apart] = []

    def follow(
        self, values: list[Tensor], form: Callable[[list[Tensor | None]], None]
    ) -> list[Tensor]:
        """Follow what a layer returned.

        Args:
            values: Floating-point tensors.
            form: Is called once with their gradients, of shapes ``(b, *shape)``; None for
                those without.

        Returns:
            What the model is to go on with.
        """
        if self._b == 1:
            return self._alone(values, form)
        number = len(self._sources)
        kept: list[Tensor] = []
        given: list[Tensor] = []
        for value in values:
            before = value.sources if isinstance(value, Apart) else frozenset()
            with torch._C.DisableTorchFunctionSubclass():
                if not before:
                    value = value.detach().clone().requires_grad_()
                kept.append(value)
                # A copy, as later layers may write to it.
                given.append(self._wrapped(value.clone(), before | {number}))
        self._sources.append(_Source(kept, form))
        return given

    def _alone(
        self, values: list[Tensor], form: Callable[[list[Tensor | None]], None]
    ) -> list[Tensor]:
        """Give all of the gradient to the only example, wherever it comes from."""
        source = _Source([], form, grads=[None] * len(values))
        self._sources.append(source)
        given: list[Tensor] = []
        for place, value in enumerate(values):
            own = value.clone() if value.requires_grad else start(value, self._anchor)

            def take(grad: Tensor, place: int = place) -> None:
                source.grads[place] = grad.detach()[None]

            on_gradient(own, take)
            given.append(own)
        return given

    def leave(self) -> None:
        """Follow nothing any more; forget what was followed."""
        for value in self._followed:
            value.meetings = None
        self._followed.clear()
        self._known.clear()
        self._met.clear()
        self._sources.clear()

    def _wrapped(self, value: Tensor, sources: frozenset[int]) -> Apart:
        wrapped = value.as_subclass(Apart)
        wrapped.meetings, wrapped.sources = self, sources
        self._followed.append(wrapped)
        return wrapped

    # -- forward ----------------------------------------------------------------------

    def run(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        leaves: list[Tensor],
        rebuild: Callable[[list[Tensor]], Any],
    ) -> Any:
        """Run a function on arguments of which some are apart from the examples."""
        own = [leaf for leaf in leaves if isinstance(leaf, Apart)]
        sources = frozenset[int]().union(*(it.sources for it in own))
        batched = self._batched(leaves)
        if batched is None:
            result = func(*args, **kwargs)
            if func in _EXPANDING or func in _REPEATING:
                met = self._replicated(func, own[0], result)
                if met is not None:
                    return met
            return self._kept(result, sources)
        if len(own) == 1 and self._is_product(func, args, batched):
            return self._multiplied(func, args, kwargs)
        parts = [
            self._met_with(leaf, batched) if isinstance(leaf, Apart) else leaf
            for leaf in leaves
        ]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            new_args, new_kwargs = rebuild(known)
            try:
                return func(*new_args, **new_kwargs)
            except torch.OutOfMemoryError:
                raise
            except BLAMABLE:
                pass
        elif not any(x.requires_grad for x in leaves if not isinstance(x, Apart)):
            # Nothing of the examples' graph, and of another size: not theirs, perhaps.
            return self._kept(func(*args, **kwargs), sources)
        self._lose(sources)
        return func(*args, **kwargs)

    def _lose(self, sources: Iterable[int]) -> None:
        for number in sources:
            self._sources[number].is_lost = True

    def _kept(self, result: Any, sources: frozenset[int]) -> Any:
        """Follow what a function made of a tensor."""
        leaves, rebuild = flatten(result)
        if not any(leaf.requires_grad for leaf in leaves):
            return result
        return rebuild([
            self._wrapped(leaf, sources)
            if leaf.requires_grad and not isinstance(leaf, Apart)
            else leaf
            for leaf in leaves
        ])

    def _batched(self, leaves: Iterable[Tensor]) -> Tensor | None:
        """Find what holds examples among a function's arguments."""
        others = [
            x for x in leaves if not isinstance(x, Apart | nn.Parameter) and x.ndim > 0
        ]
        for x in others:
            if x.requires_grad:
                return max(
                    (it for it in others if it.requires_grad), key=lambda it: it.ndim
                )
        return next((x for x in others if len(x) == self._b), None)

    def _met_with(self, value: Apart, other: Tensor) -> Tensor | None:
        """Give each example its own of a tensor; None if there is no telling how."""
        b, shape = self._b, value.shape
        rows = len(other)  # several an example where a model made windows of images
        if rows % b == 0:
            if len(shape) < other.ndim:
                ones = [1] * (other.ndim - 1 - len(shape))
                return self._started(value, value.expand(rows, *ones, *shape), True)
            if len(shape) == other.ndim and shape[0] == 1:
                return self._started(value, value.expand(rows, *shape[1:]), True)
        if other.requires_grad and len(shape) and shape[0] % b == 0:
            return self._started(value, value, False)
        return None

    def _is_product(self, func: Any, args: Any, batched: Tensor) -> bool:
        """Tell whether examples' rows are multiplied with a matrix that all share."""
        known = func in _PRODUCTS or func is F.linear
        if not known or len(args) < 2 or args[0] is not batched:
            return False
        shared = isinstance(args[1], Apart) and args[1].ndim == 2
        return shared and batched.ndim > 1 and len(batched) % self._b == 0

    def _multiplied(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        inputs, matrix = args[0], args[1]
        result: Tensor = func(inputs, matrix.detach(), *args[2:], **kwargs)
        meeting = _Meeting(
            matrix.clone(),
            matrix.sources,
            is_expanded=True,
            inputs=inputs.detach(),
            is_transposed=func is F.linear,
            version=inputs._version,
        )
        if not result.requires_grad:
            result = start(result, self._anchor)
        self._listen(meeting, result)
        return result

    def _listen(self, meeting: _Meeting, met: Tensor) -> None:
        def take(grad: Tensor) -> None:
            meeting.grad = grad.detach()

        on_gradient(met, take)
        self._met.append(meeting)

    def _replicated(self, func: Any, value: Apart, result: Tensor) -> Tensor | None:
        """Tell whether there is a row, or several, for each example now."""
        b, shape = self._b, value.shape
        if result.ndim == 0:
            return None
        new = result.ndim > value.ndim
        if func in _REPEATING:
            several = not new and len(result) == b * shape[0]
            several = several and result.shape[1:] == shape[1:]
            own = several or result.shape == (b, *shape)
        else:
            own = len(result) == b and (new or shape[0] == 1)
        return self._started(value, result, True) if own else None

    def _started(self, value: Apart, given: Tensor, is_expanded: bool) -> Tensor:  # noqa: FBT001
        """Start the examples' graph from what they got."""
        key = (id(value), value._version, is_expanded, given.ndim)
        # A key is an object's as long as it is kept; all that is followed is.
        if key not in self._known or self._known[key][1].shape != given.shape:
            meeting = _Meeting(value.clone(), value.sources, is_expanded)
            own = start(given.detach(), self._anchor)
            self._listen(meeting, own)
            self._known[key] = value, own
        return self._known[key][1]

    # -- backward ---------------------------------------------------------------------

    def finish(self) -> list[int]:
        """Take the gradients back to the layers, and hand them over.

        Returns:
            The numbers of layers, in the order of following, that got none.

        Raises:
            torch.OutOfMemoryError: If memory runs out, which is no layer's fault.
        """
        for meeting in self._met:
            try:
                for i in range(self._b):
                    self._pull(meeting, i)
            except torch.OutOfMemoryError:
                raise
            except BLAMABLE:
                self._lose(meeting.sources)
        self._met.clear()
        lost = [i for i, source in enumerate(self._sources) if source.is_lost]
        for source in self._sources:
            grads, source.grads = source.grads, []
            if grads and not source.is_lost:
                source.form(grads)
            source.is_lost = False
        return lost

    def _pull(self, meeting: _Meeting, i: int) -> None:
        """Take one example's gradient back to the layers."""
        grad, value, b = meeting.grad, meeting.value, self._b
        if grad is None:
            return
        along = _share(meeting, value, grad, i, b)
        chosen = [
            (source, place, tapped)
            for number in sorted(meeting.sources)
            for source in [self._sources[number]]
            for place, tapped in enumerate(source.values)
        ]
        with torch._C.DisableTorchFunctionSubclass():
            found: Sequence[Tensor | None] = torch.autograd.grad(
                value,
                [tapped for _, _, tapped in chosen],
                along.to(value.dtype),
                retain_graph=True,
                allow_unused=True,
            )
        for (source, place, tapped), row in zip(chosen, found, strict=True):
            if row is None:
                continue
            source.grads = source.grads or [None] * len(source.values)
            if source.grads[place] is None:
                source.grads[place] = row.new_zeros(b, *tapped.shape)
            source.grads[place][i] += row


def _share(meeting: _Meeting, value: Tensor, grad: Tensor, i: int, b: int) -> Tensor:
    """Give an example's share of the gradient of a tensor where it met the examples."""
    each = len(grad) // b
    rows = slice(i * each, (i + 1) * each)
    part = grad[rows]
    if meeting.inputs is not None:
        if meeting.inputs._version != meeting.version:
            raise GradientError("What a matrix was multiplied with was written to.")
        inputs = meeting.inputs[rows].flatten(0, -2)
        part = part.flatten(0, -2)
        return part.mT @ inputs if meeting.is_transposed else inputs.mT @ part
    if not meeting.is_expanded:
        along = torch.zeros_like(value)
        along[rows] = part
        return along
    if part.numel() == value.numel():
        return part.reshape(value.shape)
    return part.sum_to_size(value.shape)
