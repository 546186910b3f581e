"""The default engine's behaviour: checks, fallbacks, warnings, memory, clean-up."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.problems import Residual, classes, classification, draw, make, mlp, run
from tests.test_hooks_models import (
    Module,
    assert_exact,
    compute,
    expected,
    head,
    parameter,
    randomize,
)
from trak._params import flatten_rows
from trak.errors import GradientError, TaskError, TrakWarning
from trak.gradient_computers import HookGradientComputer
from trak.gradient_computers._ladder import Rung, unwrapped
from trak.gradient_computers._sinks import GradientCollector, GradientSink
from trak.modelout_functions import (
    AbstractModelOutput,
    FunctionTask,
    ImageClassificationModelOutput,
    RegressionModelOutput,
    resolve_task,
)

BATCH = draw(5, 4, seed=3), classes(5)
IMAGES = draw(5, 2, 4, 4, seed=3), classes(5)


def computer_of(model: nn.Module, task: Any = None) -> HookGradientComputer:
    return HookGradientComputer(model, task or ImageClassificationModelOutput())


def gradients(computer: HookGradientComputer, batch: Any = BATCH) -> Tensor:
    return flatten_rows(computer.compute_per_sample_grad(batch))


class PerExample(AbstractModelOutput):
    """A task of the older kind, with nothing for a batch."""

    def __init__(self, function: Any = lambda logits: logits[0]) -> None:
        self.function = function

    def get_output(
        self, model: Any, weights: Any, buffers: Any, image: Tensor, label: Tensor
    ) -> Tensor:
        call = torch.func.functional_call(model, (weights, buffers), image[None])
        return self.function(call[0])

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Tensor:
        return torch.func.functional_call(model, (weights, buffers), batch[0])[:, :1]


# -- the ladder -----------------------------------------------------------------------


def unseen(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(nn.functional.linear(x, m.layer.weight)))


def half_seen(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.layer(x) + x @ m.layer.weight))


@pytest.mark.parametrize("function", [unseen, half_seen])
def test_a_weight_used_behind_the_layers_back(function: Any) -> None:
    model = randomize(Module(function, **head(layer=nn.Linear(4, 4, bias=False))))
    with pytest.warns(TrakWarning, match=r"layer\.weight by vmap .* differs") as seen:
        found, known, computer = compute(model, BATCH)
    assert len(seen) == 1
    assert_exact(found, known)
    assert computer.coverage.rungs["layer.weight"] is Rung.VMAP
    assert computer.coverage.rungs["head.weight"] is Rung.LAYER
    computer.load_model_params(model)
    assert_exact(gradients(computer), known)  # and no second warning


def test_values_that_are_read_go_to_the_loop() -> None:
    def clipped(m: Any, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,ij->bj", x, m.matrix) @ m.layer.weight
        return m.head(hidden / 2 if hidden.abs().max().item() > 1e9 else hidden)

    parts = head(matrix=parameter(4, 4), layer=nn.Linear(4, 4, bias=False))
    model = randomize(Module(clipped, **parts))
    with pytest.warns(TrakWarning, match=r"matrix, layer.weight by one .*torch\.func"):
        found, known, computer = compute(model, BATCH)
    assert_exact(found, known)
    assert set(computer.coverage.rungs.values()) == {Rung.LAYER, Rung.LOOP}


def test_a_task_with_only_the_form_for_one_example(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, task = randomize(nn.Linear(4, 3)), PerExample()
    computer = computer_of(model, task)
    logger = logging.getLogger("TRAK")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        with caplog.at_level(logging.INFO, "TRAK"):
            found = gradients(computer)
            gradients(computer)
    finally:
        logger.setLevel(before)
    assert_exact(found[:, :4], BATCH[0])
    assert len(caplog.records) == 1
    assert "define get_outputs(model, weights, buffers, batch)" in caplog.text
    torch.testing.assert_close(
        computer.compute_loss_grad(BATCH)[:, 0], model(BATCH[0])[:, 0].detach()
    )


def test_the_form_for_one_example_in_a_loop() -> None:
    task = PerExample(lambda logits: logits[int(logits.argmax())])
    with pytest.warns(TrakWarning, match="by one example at a time"):
        found = gradients(computer_of(randomize(nn.Linear(4, 3)), task))
    assert_exact(found[:, :12].reshape(5, 3, 4).sum(1), BATCH[0])


def test_a_batched_form_that_needs_weights() -> None:
    class Functional(PerExample):
        def get_outputs(
            self, model: Any, weights: Any, buffers: Any, batch: Any
        ) -> Any:
            return torch.func.functional_call(model, (weights, buffers), batch[0])[:, 0]

    with pytest.warns(TrakWarning, match="get_outputs does not take weights=None"):
        found = gradients(computer_of(randomize(nn.Linear(4, 3)), Functional()))
    assert_exact(found[:, :4], BATCH[0])


def test_a_batched_form_that_does_not_run_at_all() -> None:
    class Typo(PerExample):
        def get_outputs(self, model: Any, *arguments: Any) -> Any:
            return model(arguments[-1]["image"])

    with pytest.raises(TypeError, match="tuple indices"):
        gradients(computer_of(randomize(nn.Linear(4, 3)), Typo()))


@pytest.mark.parametrize("task", [PerExample(), ImageClassificationModelOutput()])
def test_a_bad_batch_does_not_make_the_next_ones_slow(task: Any) -> None:
    computer = computer_of(randomize(nn.Linear(4, 3)), task)
    before = dict(computer.coverage.rungs)
    for size in (5, 3):
        with pytest.raises(
            RuntimeError, match=r"shapes cannot be multiplied|size mismatch"
        ):
            gradients(computer, (draw(5, size), classes(5)))
    gradients(computer)
    with pytest.raises(
        RuntimeError, match=r"shapes cannot be multiplied|size mismatch"
    ):
        gradients(computer, (draw(5, 3), classes(5)))
    assert computer.coverage.rungs == before


def test_a_method_that_knows_nothing_of_a_batch_of_copies() -> None:
    """A copy for each example must not change what the model computes unnoticed."""

    def summed(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(x * m.scale.sum()))

    model = randomize(Module(summed, **head(scale=parameter(1, 4))))
    found, known, computer = compute(model, BATCH)
    assert_exact(found, known)
    assert computer.coverage.rungs["scale"] is Rung.FOLLOWED


def test_coverage_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = randomize(Module(unseen, **head(layer=nn.Linear(4, 4, bias=False))))
    computer = computer_of(model)
    assert computer.coverage.share(Rung.LAYER) == 1
    with pytest.warns(TrakWarning):
        gradients(computer)
    assert math.isclose(computer.coverage.share(Rung.LAYER), 15 / 31)
    assert "layer rules: 48.4 % of the gradient (2 parameters)" in str(
        computer.coverage
    )


def test_an_output_that_holds_no_batch() -> None:
    def examples_last(m: Any, x: Tensor) -> Tensor:
        made = m.layer(m.first(x).reshape(len(x), 3, 2).permute(1, 2, 0))
        return m.head(made.permute(2, 0, 1).flatten(1))

    parts = {"first": nn.Linear(4, 6), "layer": nn.Conv1d(2, 2, 1)}
    model = randomize(Module(examples_last, **parts, head=nn.Linear(6, 3)))
    with pytest.warns(TrakWarning, match=r"shape \(3, 2, 5\) holds a batch of 5 in no"):
        found, known, _ = compute(model, BATCH)
    assert_exact(found, known)


# -- what the check refuses -----------------------------------------------------------


def test_outputs_of_another_shape() -> None:
    class Pairs(RegressionModelOutput):
        def get_outputs(self, model: Any, *arguments: Any) -> Tensor:
            return model(arguments[-1][0])

    with pytest.raises(TaskError, match=r"outputs of shape \(5, 1\) for a batch of 5"):
        gradients(computer_of(randomize(nn.Linear(4, 1)), Pairs()))


def test_outputs_that_depend_on_the_batch() -> None:
    model = randomize(Module(lambda m, x: m.head(x - x.mean(0)), **head()))
    with pytest.raises(GradientError, match=r"alone and .* in a batch"):
        gradients(computer_of(model))


def test_outputs_that_are_random() -> None:
    def noisy(m: Any, x: Tensor) -> Tensor:
        logits = m.head(x)
        return logits * (1 + torch.rand(()) * logits.requires_grad)

    with pytest.raises(GradientError, match="are others each time"):
        gradients(computer_of(randomize(Module(noisy, **head()))))


def test_precision_that_is_too_coarse() -> None:
    def rounded(m: Any, x: Tensor) -> Tensor:
        # The gradient of a batch of one is another; the value is not.
        inner = torch.tanh(m.layer(x))
        return m.head(inner + (inner - inner.detach()) * (len(x) > 1))

    model = randomize(Module(rounded, **head(layer=nn.Linear(4, 4))))
    with pytest.warns(
        TrakWarning, match=r"differs by \d+ % between .* in float64 is too"
    ):
        gradients(computer_of(model))


class Texts(nn.Module):
    """Takes a mask, and heeds it or not."""

    def __init__(self, *, heeds: bool) -> None:
        super().__init__()
        self.embed, self.head, self.heeds = nn.Embedding(9, 4), nn.Linear(4, 3), heeds

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(input_ids))
        mask = attention_mask if self.heeds else torch.ones_like(attention_mask)
        logits: Tensor = self.head((hidden * mask[..., None]).sum(1))
        return logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_takes_part(side: str) -> None:
    ids = torch.tensor([[5, 6, 0, 0], [1, 2, 3, 4], [2, 4, 0, 0]])
    ids = ids.flip(1) if side == "left" else ids
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": classes(3)}
    task = resolve_task("text_classification")
    gradients(computer_of(randomize(Texts(heeds=True)), task), batch)
    with pytest.warns(TrakWarning, match="with and without its padding"):
        gradients(computer_of(randomize(Texts(heeds=False)), task), batch)


# -- one example among others ---------------------------------------------------------


@pytest.mark.parametrize("bad", [[0], [1], [0, 1, 2, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_example_that_is_not_finite_stays_alone(
    bad: list[int], value: float
) -> None:
    model = randomize(Residual())
    known = expected(model, ImageClassificationModelOutput(), IMAGES)
    images = IMAGES[0].clone()
    images[bad] = value
    computer = computer_of(model)
    found = gradients(computer, (images, IMAGES[1]))
    good = [i for i in range(5) if i not in bad]
    assert_exact(found[good], known[good]) if good else None
    assert found[bad].isnan().all(1).all()
    assert_exact(gradients(computer, IMAGES), known)  # checked in the end


def test_a_gradient_that_is_not_finite_stays_alone() -> None:
    task = FunctionTask(
        lambda out, batch: out[:, 0].abs().sqrt(), lambda out, batch: out[:, 0]
    )
    model = nn.Linear(4, 1).double()
    model.weight.data.fill_(1), model.bias.data.zero_()
    images = torch.stack([torch.ones(4), torch.zeros(4), torch.ones(4)]).double()
    found = gradients(computer_of(model, task), (images, classes(3)))
    torch.testing.assert_close(found[[0, 2]], torch.full((2, 5), 0.25).double())
    assert not found[1].isfinite().all()


# -- precision ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_in_every_precision(dtype: torch.dtype) -> None:
    model = randomize(Residual())
    known = expected(model, ImageClassificationModelOutput(), IMAGES)
    model = model.to(dtype)
    found = gradients(computer_of(model), (IMAGES[0].to(dtype), IMAGES[1]))
    assert found.dtype == torch.float32
    share = 1e-5 if dtype is torch.float32 else 0.05
    assert float((found - known).norm()) < share * float(known.norm())


def test_autocast() -> None:
    model = randomize(Residual()).float()
    images = IMAGES[0].float(), IMAGES[1]
    plain = gradients(computer_of(model), images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(computer_of(model), images)
    assert found.dtype == torch.float32
    assert 0 < float((found - plain).norm()) < 0.05 * float(plain.norm())


# -- nothing stays --------------------------------------------------------------------


def state(model: nn.Module) -> list[Any]:
    return [
        (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            "forward" in vars(module),
            [(id(v), v.requires_grad, v.grad) for v in module._parameters.values()],
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_stays_on_the_model(breaks: bool) -> None:
    class Broken(Exception):  # noqa: N818
        pass

    class Sink(GradientCollector):
        def add(self, *arguments: Any, **options: Any) -> None:
            super().add(*arguments, **options)
            if breaks:
                raise Broken

    model = randomize(
        Module(lambda m, x: m.head(x * m.scale), **head(scale=parameter(1, 4)))
    )
    model.head.bias.requires_grad_(False)
    before = state(model)
    computer = computer_of(model)
    sink = Sink(computer.selection, 5, torch.float64, torch.device("cpu"))
    assert isinstance(sink, GradientSink)
    if breaks:
        with pytest.raises(Broken):
            computer.stream_per_sample_grads(BATCH, sink)
    else:
        outputs = computer.stream_per_sample_grads(BATCH, sink)
        assert outputs.shape == (5,)
        assert not outputs.requires_grad
        computer.compute_loss_grad(BATCH)
    assert state(model) == before


def test_hooks_of_the_user_are_left_and_heeded() -> None:
    model = randomize(mlp())
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    found, known, _ = compute(model, BATCH)
    assert_exact(found, known)


# -- wrappers and plug-ins ------------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")
    return wrapped


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
def test_wrapped_models(wrap: Any) -> None:
    model = randomize(mlp())
    known = expected(model, ImageClassificationModelOutput(), BATCH)
    wrapped = wrap(model)
    computer = computer_of(wrapped)
    assert_exact(gradients(computer), known)
    assert list(computer.coverage.rungs) == [
        name for name, _ in wrapped.named_parameters()
    ]
    assert unwrapped(wrapped)[0] is model
    computer.load_model_params(model)
    assert unwrapped(model) == (model, "")


def test_a_subclass_that_changes_gradients_is_heeded(tmp_path: Path) -> None:
    class Doubled(HookGradientComputer):
        def compute_per_sample_grad(self, batch: Any) -> dict[str, Tensor]:
            grads = super().compute_per_sample_grad(batch)
            return {name: 2 * grad for name, grad in grads.items()}

    problem = classification(mlp(), 4)
    plain = run(problem, tmp_path / "plain", lambda_reg=1e-9)
    doubled = run(
        problem, tmp_path / "doubled", lambda_reg=4e-9, gradient_computer=Doubled
    )
    torch.testing.assert_close(doubled, plain, rtol=1e-3, atol=1e-3)
    rows = [make(problem, tmp_path / name).saver for name in ("plain", "doubled")]
    for saver in rows:
        saver.load_current_store(0)
    one, two = (torch.from_numpy(saver.current_store["grads"] + 0.0) for saver in rows)
    torch.testing.assert_close(two, 2 * one)


# -- the model runs once --------------------------------------------------------------


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.layer(x)
        return logits


def test_the_out_to_loss_weights_do_not_run_the_model_again() -> None:
    model = randomize(Counted())
    computer = computer_of(model)
    gradients(computer)
    alone = computer_of(model).compute_loss_grad(BATCH)
    model.calls = 0
    gradients(computer)
    copy = tuple(leaf.clone() for leaf in BATCH)
    torch.testing.assert_close(computer.compute_loss_grad(copy), alone)
    assert model.calls == 1
    torch.testing.assert_close(computer.compute_loss_grad(copy), alone)
    assert model.calls == 2


def test_a_language_model_is_not_run_again_either() -> None:
    """Its task looks at what the model's forward takes."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head, self.calls = nn.Embedding(9, 4), nn.Linear(4, 9), 0

        def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
            self.calls += 1
            assert not use_cache
            return self.head(torch.tanh(self.words(input_ids)))

    model, ids = randomize(Causal()), torch.arange(10).reshape(2, 5) % 9
    batch = {"input_ids": ids, "labels": ids}
    computer = computer_of(model, resolve_task("causal_lm"))
    computer.compute_per_sample_grad(batch)
    model.calls = 0
    computer.compute_per_sample_grad(batch)
    computer.compute_loss_grad(batch)
    assert model.calls == 1


def change_weights(model: nn.Module, batch: Any) -> Any:
    model.layer.weight.data = model.layer.weight.data * 2
    return batch


def change_batch(model: nn.Module, batch: Any) -> Any:
    return batch[0] + 1, batch[1]


def shorten(model: nn.Module, batch: Any) -> Any:
    return batch[0][:2], batch[1][:2]


@pytest.mark.parametrize("change", [change_weights, change_batch, shorten])
def test_another_question_runs_the_model(change: Any) -> None:
    model = randomize(Counted())
    computer = computer_of(model)
    gradients(computer)
    batch = change(model, BATCH)
    known = ImageClassificationModelOutput().get_out_to_loss_grad(
        model, None, None, batch
    )
    model.calls = 0
    torch.testing.assert_close(computer.compute_loss_grad(batch), known)
    assert model.calls == 1


class Tempered(nn.Module):
    """Takes a NumPy array, and has a buffer."""

    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x: Tensor, gains: np.ndarray) -> Tensor:
        logits: Tensor = self.layer(x * self.temperature) * torch.from_numpy(gains)
        return logits


@pytest.mark.parametrize("in_inference", [False, True])
def test_another_buffer_or_an_array_runs_the_model(in_inference: bool) -> None:
    class Hot(PerExample):
        def get_outputs(self, model: Any, *arguments: Any) -> Tensor:
            return model(arguments[-1][0], np.ones(3))[:, 0]

        def get_out_to_loss_grad(
            self, model: Any, weights: Any, buffers: Any, batch: Any
        ) -> Tensor:
            hot = {"temperature": torch.tensor(5.0)}
            call = torch.func.functional_call(model, (weights, hot), batch[0], hot_only)
            logits: Tensor = call
            return logits[:, :1]

    hot_only = {"gains": np.ones(3)}
    with torch.inference_mode(mode=in_inference):
        constant = torch.ones(())
    model = randomize(Tempered())
    model.temperature = constant
    computer = computer_of(model, Hot())
    gradients(computer)
    found = computer.compute_loss_grad(BATCH)
    torch.testing.assert_close(found, model.layer(5 * BATCH[0])[:, :1])


def test_outputs_that_were_written_to_are_not_used_again() -> None:
    class Writes(ImageClassificationModelOutput):
        def get_outputs(self, model: Any, *arguments: Any) -> Tensor:
            logits = model(arguments[-1][0])
            outputs = logits[:, 0] * 1
            logits.data.zero_(), logits.detach().add_(0)
            return outputs

    model = randomize(Counted())
    computer = computer_of(model, Writes())
    gradients(computer)
    known = computer_of(model).compute_loss_grad(BATCH)
    torch.testing.assert_close(computer.compute_loss_grad(BATCH), known)


def test_copies_that_a_model_returns_are_not_used_again() -> None:
    class Scaled(Counted):
        def __init__(self) -> None:
            super().__init__()
            self.scale = parameter()

        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.scale.exp()

    class Pair(PerExample):
        def get_outputs(self, model: Any, *arguments: Any) -> Tensor:
            return model(arguments[-1][0])[0][:, 0]

        def get_out_to_loss_grad(self, model: Any, *arguments: Any) -> Tensor:
            logits, scale = model(arguments[-1][0])
            assert scale.shape == ()
            return logits[:, :1] * scale

    model = randomize(Scaled())
    computer = computer_of(model, Pair())
    gradients(computer)
    assert computer.compute_loss_grad(BATCH).shape == (5, 1)


def test_labels_are_checked_before_anything_is_stored(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    traker = make(problem, tmp_path)
    traker.load_checkpoint(problem.checkpoints[0])
    with pytest.raises(Exception, match="label at position 0"):
        traker.featurize((problem.train[0], problem.train[1] + 9))
