"""One forward and backward pass that hands over each layer's per-sample gradients.

Hooks on modules save what a layer got, hooks on its outputs form its gradients as soon as
the outputs' gradients are there. Nothing of a pass stays on the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trak._linalg import spans
from trak.gradient_computers._apart import Apart, Meetings
from trak.gradient_computers._forming import form_gradients
from trak.gradient_computers._graph import (
    Saved,
    Watched,
    autocast_of,
    no_fast_path,
    on_gradient,
    start,
    wide,
)
from trak.gradient_computers._layouts import (
    EXPANDED,
    Layout,
    by_example,
    find_layouts,
    is_positionwise,
)
from trak.gradient_computers._module_gradients import (
    FLAT,
    ModuleCall,
    batch_dims,
    flatten,
    output_dims,
)
from trak.gradient_computers._sinks import GradientSink
from trak.gradient_computers._stations import NOT_AUTOGRADS, Finding, Station, Use


class Tape:
    """A pass over one batch.

    Args:
        stations: Where to listen.
        b: Number of examples, at least 1.
        sink: Where gradients go.
        shapes: The shapes of an example's tensors.

    Attributes:
        findings: What went wrong; if anything, what the sink got is not complete.
        used: The layouts that were met.
        spare: Those for which another layout fits as well.
        views: The modules whose output is a view; if it is written to, its hook is lost.
        derived: Parameters of layers that got what no example has a part in from others.
        dtypes: The types of the layers' outputs.
        needs_proof: Whether the pass was given up, to check a layout first.
    """

    def __init__(
        self,
        stations: Iterable[Station],
        b: int,
        sink: GradientSink,
        shapes: tuple[torch.Size, ...] = (),
    ) -> None:
        self.findings: list[Finding] = []
        self.used: set[Use] = set()
        self.spare: set[Use] = set()
        self.views: set[str] = set()
        self.derived: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self.needs_proof = False
        self._stations = list(stations)
        self._b, self._sink, self._shapes = b, sink, shapes
        self._anchor = torch.zeros((), requires_grad=True, device="cpu")
        self._meetings = Meetings(b, self._anchor)
        self._followed: list[tuple[Station, dict[str, str]]] = []
        self._kept: list[tuple[Station, str, nn.Parameter]] = []
        self._is_forming = False
        self._originals: dict[tuple[int, str], nn.Parameter] = {}

    @contextlib.contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Freeze the model's parameters and listen, until the block is left."""
        frozen = [value for value in model.parameters() if value.requires_grad]
        handles: list[RemovableHandle] = []
        try:
            for value in frozen:
                value.requires_grad_(False)
            for station in self._stations:
                handles += self._listen(station)
                self._follow_parameters(station)
            with no_fast_path(model):
                yield
            self.finish()
        finally:
            for station, local, original in self._kept:
                station.module._parameters[local] = original
            self._meetings.leave()
            for handle in handles:
                handle.remove()
            for station in self._stations:
                self._restore(station)
            for value in frozen:
                value.requires_grad_()

    def _listen(self, station: Station) -> Iterator[RemovableHandle]:
        module = station.module
        is_inside = station.is_inside and station.by_rule
        if is_inside:
            yield module.register_forward_pre_hook(
                functools.partial(self._watch_weight, station)
            )
        if station.copied:
            before = functools.partial(self._copy_parameters, station)
            yield module.register_forward_pre_hook(before)
        # First of all hooks, to see the output that others may replace.
        yield module.register_forward_hook(
            functools.partial(self._after, station), prepend=True, with_kwargs=True
        )
        if station.copied or is_inside:
            yield module.register_forward_hook(
                lambda *_: self._restore(station), always_call=True
            )

    # -- forward ----------------------------------------------------------------------

    def _copy_parameters(self, station: Station, _: nn.Module, args: Any) -> None:
        if self._is_forming or not torch.is_grad_enabled():
            return
        for local, name in station.copied.items():
            original = station.module._parameters[local]
            if original is None or (id(station), local) in self._originals:
                continue
            self._originals[id(station), local] = original
            rank, value = station.arrangements(local)[0], original.detach()
            if rank >= 0:
                value = value.reshape(1, *[1] * rank, *value.shape)
            copies = start(value.expand(self._b, *value.shape[1:]), self._anchor)
            on_gradient(copies, functools.partial(self._take_copies, name))
            station.module._parameters[local] = copies  # type: ignore[assignment]
            reading = (local, rank, *(x.ndim for x in flatten(args)[0]))
            self.used.add(Use(station.name, Layout.SHARED, self._b > 1, reading))

    def _follow_parameters(self, station: Station) -> None:
        for local, name in station.followed.items():
            original = station.module._parameters[local]
            if original is None:
                continue

            def form(grads: list[Tensor | None], name: str = name) -> None:
                for grad in grads:
                    if grad is not None:
                        self._take_copies(name, grad)

            self._kept.append((station, local, original))
            self._followed.append((station, {local: name}))
            followed = self._meetings.follow([original], form)[0]
            station.module._parameters[local] = followed  # type: ignore[assignment]
            self.used.add(Use(station.name, Layout.APART, self._b > 1, (local,)))

    def _watch_weight(self, station: Station, *_: Any) -> None:
        if self._is_forming or not torch.is_grad_enabled():
            return
        original = station.module._parameters["weight"]
        if original is None or (id(station), "weight") in self._originals:
            return

        def see(ids: Tensor, found: Tensor) -> Tensor:
            tapped: Tensor = self._tap_layer(station, (ids,), {}, found)
            return tapped

        self._originals[id(station), "weight"] = original
        watched = original.detach().as_subclass(Watched)
        watched.seen = see
        station.module._parameters["weight"] = watched  # type: ignore[assignment]

    def _take_copies(self, name: str, grad: Tensor) -> None:
        self._sink.add(
            name, slice(0, self._b), wide(grad.detach().reshape(self._b, -1))
        )

    def _restore(self, station: Station) -> None:
        for local in [*station.copied, "weight"]:
            original = self._originals.pop((id(station), local), None)
            if original is not None:
                station.module._parameters[local] = original

    def _after(
        self, station: Station, _: nn.Module, args: Any, kwargs: Any, outputs: Any
    ) -> Any:
        if self._is_forming or not torch.is_grad_enabled():
            return None  # running again for us, or a checkpoint's first run
        if station.by_module:
            outputs = self._tap_module(station, args, kwargs, outputs)
        if station.by_rule and not station.is_inside:
            outputs = self._tap_layer(station, args, kwargs, outputs)
        return outputs

    def _tap_layer(self, station: Station, args: Any, kwargs: Any, output: Any) -> Any:
        given = [*args, *kwargs.values()]
        if not (given and isinstance(given[0], Tensor) and isinstance(output, Tensor)):
            self._fail(station, station.by_rule, "it is not called with one tensor")
            return output
        layouts = self._layouts_of(station, given[0], output)
        if not layouts:
            reason = (
                f"its output of shape {tuple(output.shape)} holds a batch of {self._b} "
                f"in no known way"
            )
            if station.excluded:
                self.findings.append(
                    Finding(station, tuple(station.by_rule.values()), NOT_AUTOGRADS)
                )
                return output
            self._fail(station, station.by_rule, reason)
            return output
        layout = layouts[0]
        # Rows that were picked by a mask are as many an example only by chance.
        each = len(output) // self._b
        picked = (each, *self._shapes) if layout is Layout.FLAT else ()
        use = Use(station.name, layout, self._b > 1, (*layouts, *picked))
        self.used.add(use)
        if len(layouts) > 1:
            self.spare.add(use)
        self.dtypes.add(output.dtype)
        if layout is Layout.APART:
            return self._follow(station, given[0], output)
        if layout in EXPANDED:
            output = by_example(output, layout, self._b).clone()
        if output._is_view():
            self.views.add(station.name)
            output = output.clone() if station.copies_outputs else output
        if not output.requires_grad or output.is_leaf:
            output = start(output, self._anchor)
        saved = Saved(given[0], copy=station.copies_inputs)
        on_gradient(output, functools.partial(self._form, station, layout, saved))
        return output

    def _layouts_of(
        self, station: Station, inputs: Tensor, output: Tensor
    ) -> list[Layout]:
        """List where the examples may be in an output, without what turned out wrong."""
        positionwise = is_positionwise(station.module)
        layouts = find_layouts(output.shape, self._b, positionwise=positionwise)
        if isinstance(inputs, Apart):
            layouts = [Layout.APART]
            self.derived.update(station.by_rule.values())
        elif self._b == 1 or (
            not inputs.requires_grad and inputs.shape[:1] != (self._b,)
        ):
            layouts.append(Layout.APART)  # of a single example everything is its own
        return [it for it in layouts if it not in station.excluded]

    def _follow(self, station: Station, inputs: Tensor, output: Tensor) -> Tensor:
        saved = Saved(inputs, copy=station.copies_inputs)

        def form(grads: list[Tensor | None]) -> None:
            for grad in grads:
                if grad is not None:
                    self._form(station, Layout.APART, saved, grad)

        self._followed.append((station, station.by_rule))
        return self._meetings.follow([output], form)[0]

    def _tap_module(
        self, station: Station, args: Any, kwargs: Any, outputs: Any
    ) -> Any:
        leaves, rebuild = flatten(outputs)
        dims = output_dims(station.module, leaves, self._b)
        tapped = [
            place
            for place, leaf in enumerate(leaves)
            if leaf.is_floating_point() and dims[place] is not None
        ]
        if not tapped:
            reason = "it returns no tensor with one row for each example"
            self._fail(station, station.by_module, reason)
            return outputs
        rows = len(leaves[tapped[0]]) if dims[tapped[0]] == FLAT else 0
        input_dims = batch_dims(station.module, args, kwargs, self._b, rows)
        reading = (*input_dims, *dims)
        self.used.add(Use(station.name, Layout.ROWS, self._b > 1, reading))
        for place in tapped:
            self.dtypes.add(leaves[place].dtype)
            if leaves[place]._is_view():
                self.views.add(station.name)
                if station.copies_outputs:
                    leaves[place] = leaves[place].clone()
            if not leaves[place].requires_grad or leaves[place].is_leaf:
                leaves[place] = start(leaves[place], self._anchor)
            elif len(tapped) > 1:
                # One may be made of another, whose gradient would count twice.
                leaves[place] = leaves[place].clone()
        inputs, again = flatten((args, kwargs))
        saved = [Saved(x, copy=station.copies_inputs) for x in inputs]
        call = ModuleCall(
            inputs=[],
            rebuild=again,
            input_dims=input_dims,
            b=self._b,
            grads={},
            grad_dims={place: dims[place] or 0 for place in tapped},
            autocast=autocast_of(leaves[tapped[0]].device.type),
        )
        torch.autograd.graph.register_multi_grad_hook(
            [leaves[place] for place in tapped],
            functools.partial(self._rerun, station, call, saved),
        )
        return rebuild(leaves)

    # -- backward ---------------------------------------------------------------------

    def finish(self) -> None:
        """Form what only can be when the pass is over; leaving the block does it too."""
        for number in self._meetings.finish():
            station, served = self._followed[number]
            reason = "what is made of it meets the examples in no known way"
            self._fail(station, served, reason)

    @torch.no_grad()
    def _form(
        self, station: Station, layout: Layout, saved: Saved, grad: Tensor
    ) -> None:
        inputs = saved.take()
        if inputs is None or station.rule is None:
            self._copy_from_now_on(station)
            return
        reason = form_gradients(
            station, station.rule, layout, inputs, grad, self._b, self._sink
        )
        if reason is not None:
            self._fail(station, station.by_rule, reason)

    @torch.no_grad()
    def _rerun(
        self,
        station: Station,
        call: ModuleCall,
        saved: list[Saved],
        grads: Iterable[Tensor | None],
    ) -> None:
        inputs = [it.take() for it in saved]
        tensors = [x for x in inputs if x is not None]
        if len(tensors) < len(inputs):
            self._copy_from_now_on(station)
            return
        along = {
            place: grad
            for place, grad in zip(call.grad_dims, grads, strict=True)
            if grad is not None
        }
        if not along:
            return
        call = dataclasses.replace(call, inputs=tensors, grads=along)
        every = dict(station.module.named_parameters(remove_duplicate=False))
        chosen = {local: every[local] for local in station.by_module}
        size = 4 * sum(value.numel() for value in chosen.values())
        step = max(1, self._sink.block_bytes // max(1, size))
        self._is_forming, self._meetings.is_open = True, False
        try:
            for low, high in spans(self._b, step):
                made = call.gradients(
                    station.module, chosen, slice(low, high), loops=station.loops
                )
                for local, name in station.by_module.items():
                    rows = wide(made[local].reshape(high - low, -1))
                    self._sink.add(name, slice(low, high), rows)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if station.loops:
                self._fail(station, station.by_module, f"it cannot run again: {error}")
            else:
                station.loops = True
                self.findings.append(Finding(station, ()))
        finally:
            self._is_forming, self._meetings.is_open = False, True

    def _fail(self, station: Station, served: dict[str, str], reason: str) -> None:
        kind = type(station.module).__name__
        where = f"{station.name or 'the model'} ({kind})"
        found = Finding(station, tuple(served.values()), f"{where}: {reason}")
        self.findings.append(found)

    def _copy_from_now_on(self, station: Station) -> None:
        station.copies_inputs = True
        self.findings.append(Finding(station, ()))
