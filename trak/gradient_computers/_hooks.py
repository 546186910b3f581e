"""The default engine: one batched pass, from which every layer's gradients are taken."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trak._batches import batch_size, copied, rebuild, row_leaves
from trak._types import Batch
from trak.errors import TrakWarning
from trak.gradient_computers._abstract import SelectiveGradientComputer
from trak.gradient_computers._engine import Engine
from trak.gradient_computers._ladder import (
    Coverage,
    Rung,
    describe_slow,
    structure,
    unwrapped,
)
from trak.gradient_computers._remaining import has_batched_form
from trak.gradient_computers._sinks import GradientCollector, GradientSink
from trak.gradient_computers._stations import Station

_LOGGER = logging.getLogger("TRAK")


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
        inner, self._prefix = unwrapped(model)
        if getattr(self, "_inner", None) is not inner:
            self._inner = inner
            # Made with the first batch: the model may not be in evaluation mode yet.
            self._engine: Engine | None = None
            self._logged = ""
            self._warned: set[str] = set()
        if self._engine is not None:
            self._engine.begin()

    @property
    def coverage(self) -> Coverage:
        """Which way serves each parameter; before the first batch, as it is planned."""
        return self._made().ladder.coverage()

    def layer_stations(self) -> list[Station]:
        """List the layers that a rule serves, as the batches so far proved it.

        Returns:
            A station for each, to listen there; the engine's own are left as they are.
        """
        return [
            dataclasses.replace(
                it, by_rule=dict(it.by_rule), by_module={}, copied={}, followed={}
            )
            for it in self._made().ladder.stations
            if it.by_rule
        ]

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
        inner, engine = self._inner, self._made()
        recording = engine.take_recording()
        weights = {name: value.detach() for name, value in inner.named_parameters()}
        with torch.no_grad(), recording.replayed(inner):
            return self.modelout_fn.get_out_to_loss_grad(
                inner, weights, dict(inner.named_buffers()), copied(batch)
            )

    def _made(self) -> Engine:
        engine = self._engine
        if engine is None or engine.ladder.structure != structure(self._inner):
            engine = self._engine = Engine(
                self._inner, self._prefix, self.modelout_fn, self.selection
            )
        engine.max_block_bytes = self.max_block_bytes
        return engine

    def _stream(self, batch: Batch, sink: GradientSink) -> Tensor:
        engine = self._made()
        # Callers may be under no_grad or inference_mode; autograd is needed here.
        with torch.inference_mode(mode=False), torch.enable_grad():
            batch = rebuild(batch, [_plain(leaf) for leaf in row_leaves(batch)])
            if batch_size(batch) == 0:
                return torch.zeros(0, device=next(self._inner.parameters()).device)
            outputs = engine.gradients(batch, sink)
        self._say(engine)
        return outputs

    def _say(self, engine: Engine) -> None:
        """Warn of what is slow, once; and log the coverage whenever it changes."""
        coverage = engine.ladder.coverage()
        text = str(coverage)
        if text == self._logged:
            return
        self._logged = text
        _LOGGER.info("Per-sample gradients: %s", text)
        slow = set(engine.ladder.served_by(Rung.VMAP, Rung.LOOP)) - self._warned
        looped = engine.ladder.served_by(Rung.LOOP)
        if (slow and has_batched_form(self.modelout_fn)) or looped:
            self._warned |= slow
            warnings.warn(describe_slow(coverage), TrakWarning, stacklevel=4)


def _plain(leaf: Tensor) -> Tensor:
    """Take a tensor out of inference mode and of any graph."""
    return leaf.clone() if leaf.is_inference() else leaf.detach()
