"""The default engine: one batched pass, from which every layer's gradients are taken."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trak._batches import (
    batch_size,
    copied,
    describe_value,
    rebuild,
    row_leaves,
)
from trak._types import Batch
from trak.errors import GradientError, TaskError, TrakError, TrakWarning
from trak.gradient_computers._abstract import SelectiveGradientComputer
from trak.gradient_computers._functional import FunctionalGradientComputer
from trak.gradient_computers._ladder import (
    HOOKED,
    Coverage,
    Ladder,
    Rung,
    describe_moves,
    unwrapped,
)
from trak.gradient_computers._layouts import EXPANDED, Layout
from trak.gradient_computers._proof import EXAMPLES, prove, unrest
from trak.gradient_computers._remaining import (
    has_batched_form,
    loop_gradients,
    vmap_gradients,
)
from trak.gradient_computers._replay import Recording
from trak.gradient_computers._sinks import GradientCollector, GradientSink
from trak.gradient_computers._tape import Tape

_LOGGER = logging.getLogger("TRAK")

_MOST_PROOFS = 3
"""How often one batch is checked: some of it, all of it, and again after learning."""

_BLAMABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model or a task may raise when it is run in a way it does not expect."""


class HookGradientComputer(SelectiveGradientComputer):
    """Takes every layer's per-sample gradients from one batched forward and backward pass.

    A layer's gradient for each example is formed from its input and the gradient of its
    output, handed over and dropped, so memory is that of one layer's gradients of a few
    examples. A parameter that cannot be served so goes to a slower way with the same
    result: its module run again under ``vmap``, a copy for each example, ``vmap`` over the
    whole model with respect to what is left, or one example at a time. On the first batch
    of each checkpoint the gradients are checked against autograd, and what is wrong moves
    to a slower way with one warning.

    Args:
        model: The model; wrapped in ``DataParallel`` or by ``torch.compile``, the model
            inside is used.
        task: A task. With ``get_outputs`` it is differentiated as above; with only
            ``get_output`` all parameters go to ``vmap`` over the whole model.
        grad_dim: Number of gradient entries, ``d``; None to count them.
        dtype: Floating-point type of the computation; the model's own decides.
        device: Where the model is.
        grad_wrt: Names, globs or a predicate; None for all parameters.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        replaced = {"compute_per_sample_grad", "per_sample_grad_blocks"} & set(own)
        if replaced and "stream_per_sample_grads" not in own:
            # What is streamed would not pass through the subclass's method.
            cls.stream_per_sample_grads = None  # type: ignore[assignment, method-assign]

    def load_model_params(self, model: nn.Module) -> None:
        """Take over the weights of a model whose checkpoint was just loaded.

        Args:
            model: The model.
        """
        self.model = model
        self._inner, self._prefix = unwrapped(model)
        self._recording = Recording()
        self._functional: dict[tuple[str, ...], FunctionalGradientComputer] = {}
        self._verified: set[tuple[str, Layout]] = set()
        self._is_checked = False
        self._last: Tape | None = None
        self._proofs = 0
        if not hasattr(self, "_ladder"):
            self._ladder: Ladder | None = None
            self._logged = ""
            self._moved: dict[str, str] = {}

    @property
    def coverage(self) -> Coverage:
        """Which way serves each parameter; before the first batch, as it is planned."""
        return self._plan().coverage()

    def compute_per_sample_grad(self, batch: Batch) -> dict[str, Tensor]:
        r"""Compute :math:`\nabla_\theta f(z_i; \theta)` for every example of a batch.

        Args:
            batch: Tensors in any nesting, with one row for each example.

        Returns:
            ``{parameter: (b, *shape)}`` for the selected parameters, in float32, or
            float64 where the model is. An example whose output is not finite has
            gradients of NaN.
        """
        parameter = next(self._inner.parameters())
        collector = GradientCollector(
            self.selection, batch_size(batch), self.sum_dtype, parameter.device
        )
        outputs = self._stream(batch, collector)
        grads = collector.gradients()
        lost = ~torch.isfinite(outputs)
        if lost.any():
            for grad in grads.values():
                grad[lost] = torch.nan
        return grads

    def stream_per_sample_grads(
        self, batch: Batch, sink: GradientSink
    ) -> Float[Tensor, " b"]:
        r"""Hand over the gradients of a batch piece by piece.

        Args:
            batch: Tensors in any nesting, with one row for each example.
            sink: Where they go; complete when this returns.

        Returns:
            The outputs :math:`f(z_i; \theta)`. Gradients of an example whose output is
            not finite mean nothing. Shape ``(b,)``.
        """
        return self._stream(batch, sink)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The type to add gradients in: float64 if a selected parameter is, or float32."""
        named = dict(self.model.named_parameters())
        dtypes = {named[name].dtype for name in self.selection.names}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def compute_loss_grad(self, batch: Batch) -> Tensor:
        """Compute the out-to-loss gradient of every example of a batch.

        After the gradients of the same batch the model is not run again.

        Args:
            batch: Tensors in any nesting, with one row for each example.

        Returns:
            The entries of Q (Park et al., 2023, Section 3.4). Shape ``(b, 1)``.
        """
        inner, recording = self._inner, self._recording
        self._recording = Recording()
        weights = {name: value.detach() for name, value in inner.named_parameters()}
        with torch.no_grad(), recording.replayed(inner):
            return self.modelout_fn.get_out_to_loss_grad(
                inner, weights, dict(inner.named_buffers()), batch
            )

    # -- passes -----------------------------------------------------------------------

    def _stream(self, batch: Batch, sink: GradientSink) -> Tensor:
        b = batch_size(batch)
        # Callers may be under no_grad or inference_mode; autograd is needed here.
        with torch.inference_mode(mode=False), torch.enable_grad():
            batch = rebuild(batch, [_plain(leaf) for leaf in row_leaves(batch)])
            if b == 0:
                return torch.zeros(0, device=next(self._inner.parameters()).device)
            ladder = self._plan()
            self._proofs = 0
            if not self._is_checked and ladder.served_by(*HOOKED):
                self._prove(batch)
            for _ in range(4 * len(self.selection.names) + 8):
                outputs = self._attempt(batch, sink)
                if outputs is not None:
                    self._say()
                    return outputs
                sink.clear()
        raise GradientError(unrest(self.modelout_fn))

    def _plan(self) -> Ladder:
        if self._ladder is None:
            task = self.modelout_fn
            reason = None
            if not has_batched_form(task):
                reason = (
                    f"{type(task).__name__} has only get_output, for one example; define "
                    f"get_outputs(model, weights, buffers, batch) to be faster"
                )
            self._ladder = Ladder(
                self._inner, self.selection, self._prefix, batched=reason
            )
        return self._ladder

    def _prove(self, batch: Batch) -> None:
        """Check some examples of a batch; if those leave doubts, all of them."""
        self._proofs += 1
        limit = EXAMPLES if self._proofs == 1 else batch_size(batch)
        if prove(self, batch, limit):
            self._is_checked = True
            if self._last is not None:
                self._verified |= self._last.used
        else:
            self._proofs = _MOST_PROOFS  # nothing in this batch to prove anything with

    def attempt(self, batch: Batch, sink: GradientSink) -> Tensor | None:
        """Compute the gradients of a batch for a check, or learn why not."""
        return self._attempt(batch, sink, proving=True)

    def dtypes(self) -> set[torch.dtype]:
        """Return the types that the layers' outputs had in the last pass."""
        return set() if self._last is None else self._last.dtypes

    def learn(self, wrong: Mapping[str, float]) -> None:
        """Try another layout where one is left, or a slower way, for wrong gradients.

        Args:
            wrong: By how much each parameter's gradient was off.

        Raises:
            GradientError: If there is no slower way.
        """
        ladder, tape = self._plan(), self._last
        for station in ladder.stations:
            spare = set() if tape is None else tape.spare
            mine = {layout for name, layout in spare if name == station.name}
            if mine and not wrong.keys().isdisjoint(station.by_rule.values()):
                station.excluded |= mine
                wrong = {
                    k: v for k, v in wrong.items() if k not in station.parameters()
                }
        lost = [name for name in wrong if ladder.rungs[name] is Rung.LOOP]
        if lost:
            raise GradientError(
                f"The gradient of {lost[0]!r} for {type(self.modelout_fn).__name__} differs "
                f"by {wrong[lost[0]]:.2g} from one computation to the next; is the output "
                f"random?"
            )
        for name, share in wrong.items():
            off = "infinitely" if math.isinf(share) else f"by {share:.2g}"
            self.move_down([name], f"differs {off} from autograd's gradient")

    def _attempt(
        self, batch: Batch, sink: GradientSink, *, proving: bool = False
    ) -> Tensor | None:
        """Compute the gradients of a batch, or learn why not; then the sink is spoilt."""
        ladder = self._plan()
        outputs = None
        if ladder.stations:
            outputs = self._pass(batch, sink, proving=proving)
            if outputs is None:
                return None
        rest = ladder.served_by(Rung.VMAP)
        if rest:
            try:
                values = vmap_gradients(
                    self._remaining(rest), batch, sink, self._prefix
                )
            except GradientError as error:
                self.move_down(rest, str(error).split("\n", 1)[0])
                return None
            outputs = values if outputs is None else outputs
        rest = ladder.served_by(Rung.LOOP)
        if rest:
            names = {name.removeprefix(self._prefix): name for name in rest}
            values = loop_gradients(self._inner, self.modelout_fn, names, batch, sink)
            outputs = values if outputs is None else outputs
        return outputs

    def _pass(
        self, batch: Batch, sink: GradientSink, *, proving: bool
    ) -> Tensor | None:
        ladder, b = self._plan(), batch_size(batch)
        tape = Tape(ladder.stations, b, sink)
        recording = Recording()
        try:
            with tape.listening(self._inner):
                with recording.of(self._inner):
                    outputs = self.outputs(batch)
                known = tape.used <= self._verified or bool(tape.findings)
                if not known and not proving and self._proofs < _MOST_PROOFS:
                    self._prove(batch)
                    return None
                if outputs.requires_grad:
                    torch.autograd.backward(outputs, torch.ones_like(outputs))
        except TrakError:
            raise
        except _BLAMABLE as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._blame(batch, tape, error)
            return None
        for found in tape.findings:
            names = [it for it in found.parameters if ladder.rungs[it] in HOOKED]
            self.move_down(names, found.reason)
        if tape.findings:
            return None
        self._last = tape
        self._recording = recording
        return outputs.detach()

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
        outputs: object = task.get_outputs(self._inner, None, None, copied(batch))
        if isinstance(outputs, Tensor) and outputs.shape == (b,):
            return outputs
        raise TaskError(
            f"{type(task).__name__} gives outputs of {describe_value(outputs)} for a "
            f"batch of {b}; a tensor of shape ({b},) is needed."
        )

    def _remaining(self, names: list[str]) -> FunctionalGradientComputer:
        """Return an engine for some parameters; one is kept for each choice of them."""
        key = tuple(name.removeprefix(self._prefix) for name in names)
        if key not in self._functional:
            made = FunctionalGradientComputer(
                self._inner, self.modelout_fn, grad_wrt=key
            )
            made.max_block_bytes = self.max_block_bytes
            self._functional[key] = made
        return self._functional[key]

    # -- what is learned --------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the selected parameters by name."""
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self.selection.names}

    def move_down(self, names: Iterable[str], reason: str) -> None:
        """Serve parameters in a slower way from now on, and remember to say so."""
        names = list(names)
        self._plan().move_down(names, reason)
        self._moved |= dict.fromkeys(names, reason)

    def _blame(self, batch: Batch, tape: Tape, error: Exception) -> None:
        """Learn from an error in a pass; raise it if the model alone raises it."""
        with torch.no_grad():
            self.outputs(batch)
        expanded = {name for name, layout in tape.used if layout in EXPANDED}
        ladder = self._plan()
        suspects = [it for it in ladder.stations if it.name in expanded]
        reason = f"{type(error).__name__} when it is expanded over the batch: {error}"
        for station in suspects:
            station.excluded |= EXPANDED
            self.move_down(list(station.expanded.values()), reason)
        if not suspects:
            reason = f"{type(error).__name__} in a pass with hooks: {error}"
            self.move_down(ladder.served_by(*HOOKED), reason)

    def _say(self) -> None:
        """Warn of what moved down, once; and log the coverage whenever it changes."""
        moved, self._moved = self._moved, {}
        coverage = self.coverage
        if moved:
            warnings.warn(describe_moves(moved, coverage), TrakWarning, stacklevel=2)
        text = str(coverage)
        if text == self._logged:
            return
        self._logged = text
        slow = {coverage.rungs[name] for name in coverage.rungs} - HOOKED
        unexpected = slow and not moved and has_batched_form(self.modelout_fn)
        level = logging.WARNING if unexpected else logging.INFO
        _LOGGER.log(level, "Per-sample gradients: %s", text)


def _plain(leaf: Tensor) -> Tensor:
    """Take a tensor out of inference mode and of any graph."""
    return leaf.clone() if leaf.is_inference() else leaf.detach()
