"""Classification, regression, binary and multilabel tasks, and the registry."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import UserDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from tests.contracts.task_contract import TaskCase, TaskContract, state
from trak.errors import BatchError, OptionError, TaskError, UnknownTaskError
from trak.modelout_functions import (
    TASK_TO_MODELOUT,
    AbstractModelOutput,
    BinaryClassificationModelOutput,
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
    MultilabelModelOutput,
    RegressionModelOutput,
    TextClassificationModelOutput,
    resolve_task,
)

ROOT = Path(__file__).parents[1]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network(*sizes: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1]).double()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = draw(*parameter.shape, seed=i)
    return model


class Encoder(torch.nn.Module):
    """A text classifier that is called by keyword and may return anything."""

    def __init__(self, wrap: Any = lambda logits: logits) -> None:
        super().__init__()
        self.wrap = wrap
        self.embed = torch.nn.Embedding(5, 4, dtype=torch.float64)
        self.embed.weight.data = draw(5, 4)
        self.head = network(4, 3)

    def forward(self, *, input_ids, attention_mask=None, token_type_ids=None) -> Any:
        hidden = self.embed(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        if token_type_ids is not None:
            hidden = hidden + token_type_ids.unsqueeze(-1)
        return self.wrap(self.head(hidden.mean(1)))


class Logits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


IMAGES, LABELS = draw(3, 6), torch.tensor([2, 0, 1])
TEXT = {
    "input_ids": torch.tensor([[1, 2], [3, 4], [0, 1]]),
    "token_type_ids": torch.tensor([[0, 1], [0, 0], [1, 1]]),
    "attention_mask": torch.tensor([[1, 1], [1, 0], [1, 1]]),
    "labels": LABELS,
}


class BatchEncoding(UserDict):
    """Stands in for what tokenizers return."""


class TestImage(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        task = ImageClassificationModelOutput(temperature=2.0)
        return TaskCase(task, network(6, 5, 3), (IMAGES, LABELS))


class TestImageMapping(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        batch = {"input": IMAGES, "label": LABELS}
        return TaskCase(ImageClassificationModelOutput(), network(6, 3)[0], batch)


class TestIterativeImage(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        task = IterativeImageClassificationModelOutput()
        return TaskCase(task, network(6, 5, 3), (IMAGES, LABELS), takes_batches=True)


class TestText(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        return TaskCase(TextClassificationModelOutput(), Encoder(), dict(TEXT))


class TestTextTuple(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        return TaskCase(
            TextClassificationModelOutput(), Encoder(), tuple(TEXT.values())
        )


class TestTextBatchEncoding(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        task = TextClassificationModelOutput()
        return TaskCase(task, Encoder(Logits), BatchEncoding(TEXT))


class TestRegression(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        return TaskCase(RegressionModelOutput(), network(6, 5, 1), (IMAGES, draw(3)))


class TestBinary(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        batch = (IMAGES, torch.tensor([True, False, True]))
        return TaskCase(BinaryClassificationModelOutput(), network(6, 5, 1), batch)


class TestMultilabel(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        batch = (IMAGES, (draw(3, 4, seed=1) > 0).long())
        return TaskCase(MultilabelModelOutput(), network(6, 5, 4), batch)


def run(task: AbstractModelOutput, predicted: Tensor, labels: Tensor):
    """Outputs and out-to-loss of a model that returns its input."""
    model, batch = torch.nn.Identity(), (predicted, labels)
    f = task.get_outputs(model, None, None, batch)
    return f, task.get_out_to_loss_grad(model, None, None, batch).squeeze(1)


def slope(loss: Tensor, f: Tensor, predicted: Tensor) -> Tensor:
    """Minus the slope of the loss along the gradient of f, by autograd."""
    by_f, by_loss = (
        torch.autograd.grad(value.sum(), predicted, retain_graph=True)[0]
        for value in (f, loss)
    )
    by_f, by_loss = by_f.reshape(len(f), -1), by_loss.reshape(len(f), -1)
    return -(by_f * by_loss).sum(1) / by_f.square().sum(1)


class TestValues:
    def test_margin_is_the_log_odds(self) -> None:
        logits = draw(3, 4).requires_grad_()
        f, q = run(ImageClassificationModelOutput(), logits, LABELS)
        p = logits.softmax(1)[torch.arange(3), LABELS]
        torch.testing.assert_close(f, (p / (1 - p)).log())
        loss = cross_entropy(logits, LABELS, reduction="none")
        torch.testing.assert_close(q, slope(loss, f, logits))
        torch.testing.assert_close(q, (1 - p).detach())

    def test_cross_entropy_is_softplus_of_minus_the_margin(self) -> None:
        logits = draw(3, 4)
        f, q = run(ImageClassificationModelOutput(), logits, LABELS)
        f.requires_grad_()
        loss = torch.nn.functional.softplus(-f)
        expected = cross_entropy(logits, LABELS, reduction="none")
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(q, -torch.autograd.grad(loss.sum(), f)[0])

    def test_temperature_acts_on_the_weight_only(self) -> None:
        logits = draw(3, 4)
        plain, _ = run(ImageClassificationModelOutput(), logits, LABELS)
        f, q = run(ImageClassificationModelOutput(temperature=5.0), logits, LABELS)
        torch.testing.assert_close(f, plain)
        p = (logits / 5).softmax(1)[torch.arange(3), LABELS]
        torch.testing.assert_close(q, 1 - p)

    def test_regression(self) -> None:
        predicted, y = draw(3).requires_grad_(), draw(3, seed=1)
        f, q = run(RegressionModelOutput(), predicted, y)
        torch.testing.assert_close(f, predicted)
        torch.testing.assert_close(q, slope((f - y).square() / 2, f, predicted))
        torch.testing.assert_close(q, (y - predicted).detach())

    @pytest.mark.parametrize("shape", [(3,), (3, 1)])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
    def test_binary(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        logits, y = draw(*shape).requires_grad_(), torch.tensor([1, 0, 1])
        f, q = run(BinaryClassificationModelOutput(), logits, y.to(dtype))
        flat = logits.reshape(3)
        p = torch.where(y.bool(), flat.sigmoid(), 1 - flat.sigmoid())
        torch.testing.assert_close(f, (p / (1 - p)).log())
        loss = binary_cross_entropy_with_logits(flat, y.double(), reduction="none")
        torch.testing.assert_close(q, slope(loss, f, logits))

    def test_multilabel(self) -> None:
        logits, y = draw(3, 4).requires_grad_(), draw(3, 4, seed=1) > 0
        f, q = run(MultilabelModelOutput(), logits, y)
        p = torch.where(y, logits.sigmoid(), 1 - logits.sigmoid())
        torch.testing.assert_close(f, (p / (1 - p)).log().sum(1))
        loss = binary_cross_entropy_with_logits(logits, y.double(), reduction="none")
        torch.testing.assert_close(q, slope(loss.sum(1), f, logits))

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    )
    @pytest.mark.parametrize("sign", [1, -1])
    def test_extreme_logits_stay_finite(self, dtype: torch.dtype, sign: int) -> None:
        logits = (sign * torch.tensor([[1e4, -1e4, 0.0]])).to(dtype).requires_grad_()
        cases = [
            (ImageClassificationModelOutput(), logits, torch.tensor([0])),
            (ImageClassificationModelOutput(), logits, torch.tensor([1])),
            (BinaryClassificationModelOutput(), logits[:, 0], torch.tensor([1])),
            (MultilabelModelOutput(), logits, torch.tensor([[1, 1, 0]])),
            (RegressionModelOutput(), logits[:, 0], torch.tensor([1.0])),
        ]
        for task, predicted, labels in cases:
            f, q = run(task, predicted, labels)
            (gradient,) = torch.autograd.grad(f.sum(), logits, retain_graph=True)
            for value in (f, q, gradient):
                assert value.isfinite().all()
            assert f.dtype == torch.promote_types(dtype, torch.float32)

    def test_weight_of_a_sure_example_is_small_but_not_zero(self) -> None:
        logits = torch.tensor([[40.0, 0.0]])
        _, q = run(ImageClassificationModelOutput(), logits, torch.tensor([0]))
        torch.testing.assert_close(q, torch.tensor([40.0]).neg().exp())

    def test_regression_predicts_the_change_of_the_output(self) -> None:
        # One gradient step on an example with a positive score raises the target.
        model, task = network(6, 1), RegressionModelOutput()
        weights, buffers = state(model)
        batch = IMAGES, torch.tensor([3.0, -3.0, 0.5], dtype=torch.float64)
        q = task.get_out_to_loss_grad(model, weights, buffers, batch).squeeze(1)
        kernel = IMAGES @ IMAGES.T + 1  # gradients of a linear model, with its bias
        for i in range(3):
            step = 1e-3 * (
                batch[1][i]
                - task.get_output(model, weights, buffers, *(IMAGES[i], batch[1][i]))
            )
            moved = {
                "0.weight": weights["0.weight"] + step * IMAGES[i],
                "0.bias": weights["0.bias"] + step,
            }
            change = task.get_outputs(model, moved, buffers, batch) - task.get_outputs(
                model, weights, buffers, batch
            )
            torch.testing.assert_close(change, 1e-3 * q[i] * kernel[i])


class TestBatches:
    def test_text_forms_agree(self) -> None:
        task, model = TextClassificationModelOutput(), Encoder()
        unlabelled = {key: TEXT[key] for key in TEXT if key != "labels"}
        forms = [
            TEXT,
            BatchEncoding(TEXT),
            {**unlabelled, "label": LABELS},
            tuple(TEXT.values()),
            list(TEXT.values()),
        ]
        values = [task.get_outputs(model, None, None, form) for form in forms]
        for value in values[1:]:
            torch.testing.assert_close(value, values[0])

    def test_shorter_text_tuples(self) -> None:
        task, model = TextClassificationModelOutput(), Encoder()
        ids, mask = TEXT["input_ids"], TEXT["attention_mask"]
        for batch, named in [
            ((ids, mask, LABELS), {"input_ids": ids, "attention_mask": mask}),
            ((ids, LABELS), {"input_ids": ids}),
        ]:
            torch.testing.assert_close(
                task.get_outputs(model, None, None, batch),
                task.get_outputs(model, None, None, {**named, "labels": LABELS}),
            )

    @pytest.mark.parametrize(
        "wrap",
        [
            Logits,
            lambda logits: {"logits": logits},
            lambda logits: (logits, "hidden states"),
            lambda logits: [logits],
        ],
    )
    def test_every_kind_of_model_output(self, wrap: Any) -> None:
        task = TextClassificationModelOutput()
        torch.testing.assert_close(
            task.get_outputs(Encoder(wrap), None, None, TEXT),
            task.get_outputs(Encoder(), None, None, TEXT),
        )

    @pytest.mark.parametrize(
        "wrap",
        [lambda _: None, lambda _: (), lambda _: {"loss": 1}, lambda x: x.long()],
    )
    def test_no_logits(self, wrap: Any) -> None:
        with pytest.raises(TaskError, match="No logits in the model's output"):
            TextClassificationModelOutput().get_outputs(Encoder(wrap), None, None, TEXT)

    def test_static_calls_of_downstream_code(self) -> None:
        model = network(6, 3)
        weights, buffers = state(model)
        expected = ImageClassificationModelOutput().get_outputs(
            model, weights, buffers, (IMAGES, LABELS)
        )
        one = ImageClassificationModelOutput.get_output(
            model, weights, buffers, image=IMAGES[0], label=LABELS[0]
        )
        torch.testing.assert_close(one, expected[0])
        every = IterativeImageClassificationModelOutput.get_output(
            model, None, None, IMAGES, LABELS
        )
        torch.testing.assert_close(every, expected)
        text = [value[0] for value in TEXT.values()]
        value = TextClassificationModelOutput.get_output(
            Encoder(), *state(Encoder()), *text
        )
        assert value.shape == ()

    def test_iterative_mapping(self) -> None:
        model = network(6, 3)[0]
        get = IterativeImageClassificationModelOutput.get_output
        torch.testing.assert_close(
            get(model, None, None, {"input": IMAGES, "labels": LABELS}),
            get(model, None, None, IMAGES, LABELS),
        )

    def test_a_model_that_squeezes_away_a_batch_of_one(self) -> None:
        model = torch.nn.Sequential(network(6, 1), torch.nn.Flatten(0))
        model.forward = lambda x: model[0](x).squeeze()
        task = RegressionModelOutput()
        batch = IMAGES[:1], draw(1)
        assert task.get_outputs(model, None, None, batch).shape == (1,)


IMAGE, TEXTS = ImageClassificationModelOutput(), TextClassificationModelOutput()
REGRESSION, BINARY = RegressionModelOutput(), BinaryClassificationModelOutput()
MULTILABEL = MultilabelModelOutput()


class TestErrors:
    @pytest.mark.parametrize(
        ("task", "batch", "message"),
        [
            (
                IMAGE,
                (draw(3, 4), torch.tensor([0, 4, 5])),
                "position 1 of the batch is 4",
            ),
            (
                IMAGE,
                (draw(3, 4), torch.tensor([0, 1, -1])),
                "a class index from 0 to 3",
            ),
            (IMAGE, (draw(3, 4), torch.tensor([0.0, 1, 2])), "dtype torch.float32"),
            (IMAGE, (draw(3, 4), torch.tensor([True] * 3)), "dtype torch.bool"),
            (
                IMAGE,
                (draw(3, 4), torch.tensor([0, 1])),
                r"shape \(2,\).*for 3 examples",
            ),
            (IMAGE, (draw(3, 4), torch.tensor([[0], [1], [2]])), r"shape \(3, 1\)"),
            (IMAGE, (draw(3, 4),), "a tuple of 1; put the labels last"),
            (IMAGE, draw(3, 4), "got a Tensor; put the labels last"),
            (IMAGE, (draw(3, 4), [0, 1, 2]), "labels are a list, not a tensor"),
            (IMAGE, (draw(3, 4), LABELS, LABELS), "got 3 entries; drop the others"),
            (IMAGE, {"input": draw(3, 4)}, r"exactly one of.*got \['input'\]"),
            (IMAGE, {"label": LABELS, "labels": LABELS}, "exactly one of the keys"),
            (TEXTS, (draw(3, 4),) * 4 + (LABELS,), "got 5 entries; pass a mapping"),
            (
                REGRESSION,
                (draw(3), draw(3, 2)),
                r"labels have shape \(3, 2\); pass one",
            ),
            (
                REGRESSION,
                (draw(2), torch.tensor([1, torch.nan])),
                "position 1 .* is nan",
            ),
            (
                BINARY,
                (draw(3), torch.tensor([0, 1, 2])),
                "position 2 .* 2.0, which is not 0",
            ),
            (
                MULTILABEL,
                (draw(3, 4), draw(3, 2)),
                r"shape \(3, 2\), the logits \(3, 4\)",
            ),
            (
                MULTILABEL,
                (draw(1, 2), torch.tensor([[0.0, 0.5]])),
                r"position \(0, 1\) of the batch is 0.5",
            ),
        ],
    )
    def test_batches(self, task: AbstractModelOutput, batch: Any, message: str) -> None:
        for method in (task.get_outputs, task.get_out_to_loss_grad):
            with pytest.raises(BatchError, match=message):
                method(torch.nn.Identity(), None, None, batch)

    @pytest.mark.parametrize(
        ("task", "batch", "message"),
        [
            (IMAGE, (draw(3, 1), LABELS), "1 logits an example.*at least 2 classes"),
            (IMAGE, (draw(3, 2, 4), LABELS), r"returned \(3, 2, 4\).*FunctionTask"),
            (
                REGRESSION,
                (draw(3, 2), draw(3)),
                r"returned shape \(3, 2\) for 3 examples",
            ),
            (BINARY, (draw(2), LABELS), r"needs one number an example, shape \(3,\)"),
            (MULTILABEL, (draw(3), draw(3)), r"shape \(b, labels\).*returned \(3,\)"),
            (MULTILABEL, (draw(3, 0), draw(3, 0)), r"returned \(3, 0\)"),
        ],
    )
    def test_models(self, task: AbstractModelOutput, batch: Any, message: str) -> None:
        for method in (task.get_outputs, task.get_out_to_loss_grad):
            with pytest.raises(TaskError, match=message):
                method(torch.nn.Identity(), None, None, batch)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
    @pytest.mark.parametrize(
        "name", ["image_classification", "iterative_image_classification", "clip"]
    )
    def test_temperature(self, name: str, temperature: float) -> None:
        with pytest.raises(
            OptionError, match="temperature must be positive and finite"
        ):
            TASK_TO_MODELOUT[name](temperature=temperature)


class PerExample(AbstractModelOutput):
    scale = 2.0

    def get_output(self, model, weights, buffers, *example):
        if weights is None:
            return model(example[0]).sum()
        return torch.func.functional_call(model, (weights, buffers), example).sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0]), 1)


class TestPerExample(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        return TaskCase(PerExample(), network(6, 5, 1), [IMAGES])


class Needy(PerExample):
    def __init__(self, scale: float) -> None:
        self.scale = scale


class Foreign:
    def __init__(self) -> None:
        self.scale = 3

    def get_output(self, model, weights, buffers, image):
        return model(image).sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0]), 1)


class ForeignBatched(Foreign):
    def get_outputs(self, model, weights, buffers, batch):
        return model(batch[0]).sum(1)

    def describe(self) -> str:
        return "mine"


class TestResolve:
    def test_names(self) -> None:
        for name, cls in TASK_TO_MODELOUT.items():
            assert type(resolve_task(name)) is cls

    def test_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(UnknownTaskError, match=r"'images'.*'clip'.*'regression'"):
            resolve_task("images")

    def test_instances_and_classes(self) -> None:
        task = Needy(1.0)
        assert resolve_task(task) is task
        assert isinstance(resolve_task(PerExample), PerExample)

    @pytest.mark.parametrize("cls", [Needy, AbstractModelOutput])
    def test_class_that_needs_arguments(self, cls: type) -> None:
        with pytest.raises(
            OptionError, match=f"{cls.__name__} cannot be built without"
        ):
            resolve_task(cls)

    @pytest.mark.parametrize("task", [3, None, int, lambda model, batch: 0])
    def test_no_task(self, task: object) -> None:
        with pytest.raises(
            OptionError, match="A task is a name, an AbstractModelOutput"
        ):
            resolve_task(task)

    @pytest.mark.parametrize("given", [Foreign, Foreign(), ForeignBatched])
    def test_foreign_objects(self, given: object) -> None:
        task = resolve_task(given)
        assert task.scale == copy.copy(task).scale == 3
        model = torch.nn.Identity()
        assert task.get_output(model, {}, {}, IMAGES[0]) == IMAGES[0].sum()
        assert task.get_out_to_loss_grad(model, {}, {}, (IMAGES,)).shape == (3, 1)
        batched = type(task).get_outputs is not AbstractModelOutput.get_outputs
        assert batched == (given is ForeignBatched)
        assert task.describe() == ("mine" if batched else "Foreign(scale=3)")
        if batched:
            assert task.get_outputs(model, {}, {}, (IMAGES,)).shape == (3,)

    def test_missing_attribute_of_a_foreign_object(self) -> None:
        with pytest.raises(AttributeError, match="temperature"):
            _ = resolve_task(Foreign()).temperature


class TestAbstract:
    def test_get_outputs_is_optional(self) -> None:
        assert PerExample.get_outputs is AbstractModelOutput.get_outputs
        with pytest.raises(TaskError, match="PerExample has no batched get_outputs"):
            PerExample().get_outputs(torch.nn.Identity(), {}, {}, (IMAGES,))

    def test_replacing_get_output_drops_the_inherited_batched_form(self) -> None:
        class Raw(ImageClassificationModelOutput):
            @staticmethod
            def get_output(model, weights, buffers, image, label=None):
                return model(image.unsqueeze(0))[0, label]

        class Tuned(ImageClassificationModelOutput):
            pass

        assert Raw.get_outputs is AbstractModelOutput.get_outputs
        assert Tuned.get_outputs is ImageClassificationModelOutput.get_outputs

    def test_description_changes_with_public_attributes(self) -> None:
        assert PerExample().describe() == "PerExample(scale=2.0)"
        assert Needy(3.0).describe() == "Needy(scale=3.0)"
        texts = {ImageClassificationModelOutput(t).describe() for t in (1.0, 1.0, 2.0)}
        assert len(texts) == 2

    def test_description_is_the_same_in_another_process(self) -> None:
        program = (
            "from trak.modelout_functions import TASK_TO_MODELOUT\n"
            "print('|'.join(cls().describe() for cls in TASK_TO_MODELOUT.values()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        here = "|".join(cls().describe() for cls in TASK_TO_MODELOUT.values())
        assert done.stdout.strip() == here


def test_a_batched_form_that_waits_for_its_per_example_form_is_kept() -> None:
    class Family(AbstractModelOutput):
        def get_out_to_loss_grad(self, *args: Any) -> Any:
            return args

        def get_outputs(self, *args: Any) -> Any:
            return args

    class Member(Family):
        def get_output(self, *args: Any) -> Any:
            return args

    class Replacement(Member):
        def get_output(self, *args: Any) -> Any:
            return args[0]

    assert Member.get_outputs is Family.get_outputs
    assert Replacement.get_outputs is AbstractModelOutput.get_outputs
