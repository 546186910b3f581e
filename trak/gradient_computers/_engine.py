"""The engine of the batched pass: it tries, learns what does not hold, and tries again."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trak._batches import (
    batch_size,
    copied,
    describe_value,
    rebuild,
    row_leaves,
    take,
)
from trak._params import Selection
from trak._types import Batch
from trak.errors import GradientError, TaskError, TrakError
from trak.gradient_computers._copies import Nowhere, arrangements, shortened
from trak.gradient_computers._functional import FunctionalGradientComputer
from trak.gradient_computers._ladder import HOOKED, Ladder, Rung
from trak.gradient_computers._layouts import EXPANDED, Layout
from trak.gradient_computers._proof import (
    EXAMPLES,
    FIRST_RECHECK,
    check_again,
    prove,
    unrest,
)
from trak.gradient_computers._remaining import (
    has_batched_form,
    loop_gradients,
    needs_weights,
    vmap_gradients,
)
from trak.gradient_computers._replay import Recording
from trak.gradient_computers._self_check import BLAMABLE
from trak.gradient_computers._sinks import GradientSink
from trak.gradient_computers._stations import NOT_AUTOGRADS, Use
from trak.gradient_computers._tape import Tape
from trak.modelout_functions import AbstractModelOutput

_MOST_PROOFS = 3
"""How often one batch is checked: some of it, all of it, and again after learning."""


class Engine:
    """Per-sample gradients of one model, in the fastest ways that were proved right.

    Args:
        model: The model, without wrappers.
        prefix: What the selection's names have before the model's own.
        task: What is differentiated.
        selection: The parameters.

    Attributes:
        ladder: The way of each parameter.
        max_block_bytes: Gradients that ``vmap`` over the whole model holds at once.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix: str,
        task: AbstractModelOutput,
        selection: Selection,
    ) -> None:
        self.model = model
        self.modelout_fn = task
        reason = None
        if not has_batched_form(task):
            reason = (
                f"{type(task).__name__} has only get_output, for one example; define "
                f"get_outputs(model, weights, buffers, batch) to be faster"
            )
        self.ladder = Ladder(model, selection, prefix, reason)
        self.max_block_bytes = 1 << 28
        self._prefix = prefix
        self._settled: set[str] = set()
        self._was_run = False
        self.begin()

    def begin(self) -> None:
        """Forget what was proved: the weights are others now."""
        self._recording = Recording()
        self._replays = False
        self._verified: set[Use] = set()
        self._functional: dict[tuple[str, ...], FunctionalGradientComputer] = {}
        self._is_checked = False
        self._last: Tape | None = None
        self._proofs = 0
        self._batches = 0
        self._next_check = FIRST_RECHECK

    # -- what a check needs -----------------------------------------------------------

    def outputs(self, batch: Batch) -> Tensor:
        """Run the task's batched form on a copy of a batch, and check what it gives.

        Args:
            batch: The examples.

        Returns:
            The outputs. Shape ``(b,)``.

        Raises:
            TaskError: If there is not one output for each example.
        """
        task, b = self.modelout_fn, batch_size(batch)
        outputs: object = task.get_outputs(self.model, None, None, copied(batch))
        if isinstance(outputs, Tensor) and outputs.shape == (b,):
            return outputs
        raise TaskError(
            f"{type(task).__name__} gives outputs of {describe_value(outputs)} for a "
            f"batch of {b}; a tensor of shape ({b},) is needed."
        )

    def plain_outputs(self, batch: Batch) -> Tensor:
        """Compute the outputs of a batch without gradients, and note the model's calls."""
        self._plain = Recording()
        with torch.no_grad(), self._plain.of(self.model):
            return self.outputs(batch)

    def take_recording(self) -> Recording:
        """Return the model's calls in the last pass, once.

        Empty where a pass with hooks makes the model return more than it does by itself,
        as copies of a parameter that it returns.
        """
        taken, self._recording = self._recording, Recording()
        return taken if self._replays else self._recording

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the selected parameters by name."""
        named = dict(self.model.named_parameters())
        names = self.ladder.selection.names
        return {name: named[name.removeprefix(self._prefix)] for name in names}

    def dtypes(self) -> set[torch.dtype]:
        """Return the types that the layers' outputs had in the last pass."""
        return set() if self._last is None else self._last.dtypes

    def attempt(self, batch: Batch, sink: GradientSink) -> Tensor | None:
        """Compute the gradients of a batch for a check, or learn why not."""
        return self._attempt(batch, sink, proving=True)

    def is_proved(self) -> bool:
        """Tell whether all layouts of the last pass had been proved before."""
        return self._last is not None and self._last.used <= self._verified

    def settle(self, batch: Batch) -> None:
        """Find how the copies of each parameter have to be arranged, or that none will do.

        Args:
            batch: Some examples to try it on.
        """
        waiting = [
            (station, local, name)
            for station in self.ladder.stations
            for local, name in station.copied.items()
            if name not in self._settled
        ]
        if not waiting:
            return
        if batch_size(batch) == 1:  # where every arrangement fits
            leaves = row_leaves(batch)
            batch = rebuild(batch, [torch.cat([leaf, leaf]) for leaf in leaves])
        with torch.no_grad():
            plain = self.outputs(batch)
        found: dict[object, list[int]] = {}
        for station, local, name in waiting:
            value = station.module._parameters[local]
            shape = None if value is None else value.shape
            alike = (type(station.module), local, shape, *station.arrangements(local))
            if alike not in found:
                found[alike] = arrangements(
                    self.model, self.outputs, station, local, batch, plain
                )
            station.ranks[local] = list(found[alike])
            self._settled.add(name)
            if not found[alike]:
                reason = "a copy for each example does not fit where it is used"
                self.ladder.move_down([name], reason)

    def learn(self, wrong: Mapping[str, float]) -> None:
        """Try something else for parameters whose gradients were wrong.

        Args:
            wrong: By how much each parameter's gradient was off.

        Raises:
            GradientError: If there is no slower way.
        """
        derived = self._last.derived if self._last else set()
        if not wrong.keys() <= derived:
            # These may be right once those that they come from are.
            wrong = {name: wrong[name] for name in wrong if name not in derived}
        changed = self._other_arrangements(wrong)
        wrong = {name: share for name, share in wrong.items() if name not in changed}
        for name, share in wrong.items():
            if self.ladder.rungs[name] is Rung.LOOP:
                raise GradientError(
                    f"The gradient of {name!r} differs by {share:.2g} from one computation "
                    f"to the next; is the output of {type(self.modelout_fn).__name__} random?"
                )
            self.ladder.move_down([name], NOT_AUTOGRADS)

    def _other_arrangements(self, wrong: Mapping[str, float]) -> set[str]:
        """Change how wrong parameters are served where they are; return those."""
        changed: set[str] = set()
        if self._last is None:
            return changed
        for station in self.ladder.stations:
            spare = {it.layout for it in self._last.spare if it.name == station.name}
            served = {*station.by_rule.values(), *station.by_module.values()}
            is_wrong = not wrong.keys().isdisjoint(served)
            is_view = station.name in self._last.views
            if is_wrong and is_view and not station.copies_outputs:
                station.copies_outputs = True
                changed |= served
            elif is_wrong and spare:
                station.excluded |= spare
                changed |= served
            for local, name in station.copied.items():
                if name in wrong and len(station.ranks[local]) > 1:
                    del station.ranks[local][0]
                    self._settled.discard(name)
                    changed.add(name)
        return changed

    # -- passes -----------------------------------------------------------------------

    def gradients(self, batch: Batch, sink: GradientSink) -> Tensor:
        """Compute the gradients of a batch.

        Args:
            batch: At least one example, not in inference mode or a graph.
            sink: Where they go.

        Returns:
            The outputs. Shape ``(b,)``.

        Raises:
            GradientError: If no way holds, or one that was proved does not any more.
        """
        self._proofs = 0
        if not self._is_checked and self.ladder.stations and self._runs_bare(batch):
            self._prove(batch)
        self._batches += 1
        if self._batches >= self._next_check and self._is_checked:
            self._next_check *= 4
            check_again(self, batch)
        for _ in range(4 * len(self.ladder.selection.names) + 8):
            outputs = self._attempt(batch, sink)
            if outputs is not None:
                return outputs
            sink.clear()
        raise GradientError(unrest(self.modelout_fn))

    def _runs_bare(self, batch: Batch) -> bool:
        """Tell whether the task runs the model as it stands, which hooks need."""
        if not self._was_run:
            run = functools.partial(self.outputs, batch)
            reason = needs_weights(self.model, self.modelout_fn, run, batch)
            if reason:
                self.ladder.leave_hooks(reason)
                return False
        self._was_run = True
        return True

    def _prove(self, batch: Batch) -> None:
        """Check some examples of a batch; if those leave doubts, all of them."""
        self._proofs += 1
        limit = EXAMPLES if self._proofs == 1 else batch_size(batch)
        if prove(self, batch, limit):
            self._is_checked = True
            self._replays = self._recording.is_like(self._plain)
            if self._last is not None:
                self._verified |= self._last.used
        else:
            self._proofs = _MOST_PROOFS  # nothing in this batch to prove anything with

    def _attempt(
        self, batch: Batch, sink: GradientSink, *, proving: bool = False
    ) -> Tensor | None:
        """Compute the gradients of a batch, or learn why not; then the sink is spoilt."""
        ladder = self.ladder
        outputs = None
        if ladder.stations:
            outputs = self._pass(batch, sink, proving=proving)
            if outputs is None:
                return None
        rest = ladder.served_by(Rung.VMAP)
        if rest:
            try:
                computer = self._remaining(rest)
                values = vmap_gradients(computer, batch, sink, self._prefix)
            except GradientError as error:
                self._try_loop(batch, rest, error)
                ladder.move_down(rest, shortened(str(error)))
                return None
            outputs = values if outputs is None else outputs
        rest = ladder.served_by(Rung.LOOP)
        if rest:
            values = self._looped(batch, sink, rest)
            outputs = values if outputs is None else outputs
        return outputs

    def _looped(self, batch: Batch, sink: GradientSink, rest: list[str]) -> Tensor:
        names = {name.removeprefix(self._prefix): name for name in rest}
        return loop_gradients(self.model, self.modelout_fn, names, batch, sink)

    def _try_loop(self, batch: Batch, rest: list[str], error: GradientError) -> None:
        """Raise vmap's error if a loop cannot do it either: then the batch is to blame."""
        try:
            self._looped(take(batch, slice(0, 1)), Nowhere(), rest)
        except TrakError:
            raise
        except BLAMABLE:
            raise error from None

    def _pass(
        self, batch: Batch, sink: GradientSink, *, proving: bool
    ) -> Tensor | None:
        ladder = self.ladder
        shapes = tuple(leaf.shape[1:] for leaf in row_leaves(batch))
        tape = Tape(ladder.stations, batch_size(batch), sink, shapes)
        recording = Recording()
        try:
            with tape.listening(self.model):
                with recording.of(self.model):
                    outputs = self.outputs(batch)
                known = tape.used <= self._verified or bool(tape.findings)
                if not known and not proving and self._proofs < _MOST_PROOFS:
                    tape.needs_proof = True
                elif outputs.requires_grad:
                    torch.autograd.backward(outputs, torch.ones_like(outputs))
        except BLAMABLE as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._blame(batch, tape, error)
            return None
        if tape.needs_proof:
            self._prove(batch)
            return None
        for found in tape.findings:
            names = [it for it in found.parameters if ladder.rungs[it] in HOOKED]
            ladder.move_down(names, found.reason)
        if tape.findings:
            return None
        self._last = tape
        self._recording = recording
        return outputs.detach()

    def _remaining(self, names: Iterable[str]) -> FunctionalGradientComputer:
        """Return an engine for some parameters; one is kept for each choice of them."""
        key = tuple(name.removeprefix(self._prefix) for name in names)
        if key not in self._functional:
            made = FunctionalGradientComputer(
                self.model, self.modelout_fn, grad_wrt=key
            )
            made.max_block_bytes = self.max_block_bytes
            self._functional[key] = made
        return self._functional[key]

    def _blame(self, batch: Batch, tape: Tape, error: Exception) -> None:
        """Learn from an error in a pass; raise it if the model alone raises it."""
        with torch.no_grad():
            self.outputs(batch)
        self._last = tape
        name, said = type(error).__name__, shortened(str(error))
        self.distrust(f"{name} in a pass with hooks: {said}")

    def distrust(self, reason: str) -> None:
        """Expand nothing over the batch any more; if nothing was, use no hooks.

        Args:
            reason: What went wrong, for users.

        Raises:
            GradientError: If there are no hooks to blame.
        """
        used = self._last.used if self._last else set()
        for layouts in (EXPANDED, {Layout.APART}):
            changed = {use.name for use in used if use.layout in layouts}
            suspects = [it for it in self.ladder.stations if it.name in changed]
            if suspects:
                break
        for it in suspects:
            it.excluded |= layouts
            replaced = [*it.copied.values(), *it.followed.values()]
            self.ladder.move_down(replaced, reason)
        if not suspects:
            if not self.ladder.served_by(*HOOKED):
                raise GradientError(unrest(self.modelout_fn))
            self.ladder.leave_hooks(reason)
