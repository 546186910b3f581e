"""Language-model tasks: margins of tokens, their weights, and what can be wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests import problems
from tests.contracts.task_contract import TaskCase, TaskContract, state, take
from tests.problems import draw
from trak.errors import BatchError, OptionError, TaskError
from trak.modelout_functions import (
    AbstractModelOutput,
    CausalLMModelOutput,
    FunctionTask,
    MaskedLMModelOutput,
    Seq2SeqLMModelOutput,
    _token_margins,
    resolve_task,
)
from trak.modelout_functions._margins import log_odds
from trak.modelout_functions._padding import padded_on_the_right
from trak.modelout_functions._token_margins import margins_of_rows

IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 0, 0], [1, 2, 3, 4, 0]])
MASK = (IDS > 0).long()
MARKED = IDS.where(MASK > 0, -100)
TASKS = {
    "causal_lm": CausalLMModelOutput,
    "masked_lm": MaskedLMModelOutput,
    "seq2seq_lm": Seq2SeqLMModelOutput,
}


class Reader(problems.Reader):
    """One of 7 tokens and 8 places."""

    def __init__(self) -> None:
        super().__init__(7, 8)


class Translator(Reader):
    """Reads a source and, one place further right, the target."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> SimpleNamespace:
        if decoder_input_ids is None:
            known = labels.where(labels != -100, 0)
            decoder_input_ids = nn.functional.pad(known[:, :-1], (1, 0))
        source = self.read(input_ids, None).mean(1, keepdim=True)
        hidden = self.read(decoder_input_ids, None) + source
        return SimpleNamespace(logits=self.head(hidden))


def a_case(name: str, reduction: str = "mean") -> TaskCase:
    task = TASKS[name](reduction=reduction)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": MARKED}
    if name == "masked_lm":
        batch["labels"] = MARKED.where(torch.arange(5) % 2 == 1, -100)
    if name == "seq2seq_lm":
        batch = {"input_ids": IDS.flip(1), "labels": MARKED}
    model = Translator() if name == "seq2seq_lm" else Reader()
    return TaskCase(task, model, batch)


@pytest.fixture(params=TASKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class TestTokens(TaskContract):
    @pytest.fixture(params=[(name, kind) for name in TASKS for kind in ("mean", "sum")])
    def case(self, request: pytest.FixtureRequest) -> TaskCase:
        return a_case(*request.param)


# -- formulas -------------------------------------------------------------------------


def by_hand(name: str, case: TaskCase, i: int) -> Tensor:
    """Probabilities of the labelled tokens of a sequence."""
    row = take(case.batch, slice(i, i + 1))
    inputs = {k: v for k, v in row.items() if k != "labels" or name == "seq2seq_lm"}
    p = case.model(**inputs).logits.softmax(-1)[0]
    found = []
    for t, label in enumerate(row["labels"][0].tolist()):
        place = t - 1 if name == "causal_lm" else t
        if label != -100 and place >= 0:
            found.append(p[place, label])
    return torch.stack(found)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_outputs_and_weights_are_those_of_the_formula(
    name: str, reduction: str
) -> None:
    case = a_case(name, reduction)
    outputs = case.task.get_outputs(case.model, None, None, case.batch)
    weights = case.task.get_out_to_loss_grad(case.model, None, None, case.batch)
    for i in range(3):
        p = by_hand(name, case, i)
        margins = (p / (1 - p)).log()
        expected = margins.sum() if reduction == "sum" else margins.mean()
        torch.testing.assert_close(outputs[i], expected)
        torch.testing.assert_close(weights[i, 0], (1 - p).mean())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_are_the_slope_of_cross_entropy_along_the_margins(
    reduction: str,
) -> None:
    """For two tokens, whose margins are one logit each, FunctionTask derives the same."""
    logits = draw(2, 3)
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)

    def reduce(values: Tensor) -> Tensor:
        return getattr(values, reduction)(1)

    derived = FunctionTask(
        output=lambda out, batch: reduce(signs * out),
        loss=lambda out, batch: reduce(nn.functional.softplus(-signs * out)),
        forward=lambda model, batch: model(batch[0]),
    ).get_out_to_loss_grad(nn.Identity(), None, None, logits)

    class Two(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.stack([torch.zeros_like(logits), logits], dim=-1)

    batch = {"input_ids": IDS[:2, :3], "labels": (signs > 0).long()}
    found = MaskedLMModelOutput(reduction).get_out_to_loss_grad(
        Two(), None, None, batch
    )
    torch.testing.assert_close(found, derived)


def test_the_loss_of_a_text_is_that_of_its_margins() -> None:
    case = a_case("causal_lm", "sum")
    margins = [
        (p / (1 - p)).log() for p in (by_hand("causal_lm", case, i) for i in (0, 1))
    ]
    for i, values in enumerate(margins):
        row = take(case.batch, slice(i, i + 1))
        logits = case.model(row["input_ids"], row["attention_mask"]).logits[0, :-1]
        loss = cross_entropy(logits, row["labels"][0, 1:], reduction="sum")
        torch.testing.assert_close(nn.functional.softplus(-values).sum(), loss)


def test_without_labels_all_tokens_but_padding_are_predicted() -> None:
    case = a_case("causal_lm")
    bare = {key: value for key, value in case.batch.items() if key != "labels"}
    for task in (case.task.get_outputs, case.task.get_out_to_loss_grad):
        torch.testing.assert_close(
            task(case.model, None, None, bare), task(case.model, None, None, case.batch)
        )
    whole = {"input_ids": IDS}
    expected = {"input_ids": IDS, "labels": IDS}
    torch.testing.assert_close(
        case.task.get_outputs(case.model, None, None, whole),
        case.task.get_outputs(case.model, None, None, expected),
    )


def test_padding_on_the_right_changes_nothing(name: str) -> None:
    case = a_case(name)
    wide = {
        key: nn.functional.pad(value, (0, 2), value=-100 if key == "labels" else 0)
        for key, value in case.batch.items()
    }
    if name == "seq2seq_lm":  # this model has no mask for its source
        wide["input_ids"] = case.batch["input_ids"]
    torch.testing.assert_close(
        case.task.get_outputs(case.model, None, None, wide),
        case.task.get_outputs(case.model, None, None, case.batch),
    )


def test_a_decoder_may_be_given_its_inputs() -> None:
    case = a_case("seq2seq_lm")
    known = case.batch["labels"].where(case.batch["labels"] != -100, 0)
    given = {
        **case.batch,
        "decoder_input_ids": nn.functional.pad(known[:, :-1], (1, 0)),
    }
    torch.testing.assert_close(
        case.task.get_outputs(case.model, None, None, given),
        case.task.get_outputs(case.model, None, None, case.batch),
    )


def test_no_cache_is_asked_for_where_there_may_be_one() -> None:
    asked = []

    class Caching(Reader):
        def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
            asked.append(use_cache)
            return super().forward(input_ids)

    task = CausalLMModelOutput()
    task.get_outputs(Caching(), None, None, {"input_ids": IDS})
    assert asked == [False]


def test_names() -> None:
    for name, kind in TASKS.items():
        assert type(resolve_task(name)) is kind
        assert resolve_task(name).describe() == f"{kind.__name__}(reduction='mean')"


# -- padding on the left ----------------------------------------------------------------


def on_the_left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn every row so that its padding comes first."""
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    return {
        key: torch.stack([row.roll(k) for row, k in zip(value, shifts, strict=True)])
        for key, value in batch.items()
    }


@pytest.mark.parametrize("labelled", [True, False])
def test_padding_on_the_left_is_that_on_the_right(labelled: bool) -> None:
    """Positions begin with the text, and no token is predicted from padding."""
    case = a_case("causal_lm")
    batch = dict(case.batch)
    if not labelled:
        del batch["labels"]
    left = on_the_left(batch)
    assert left["input_ids"].tolist()[1] == [0, 0, 2, 6, 5]
    for weights in ((None, None), state(case.model)):
        for call in (case.task.get_outputs, case.task.get_out_to_loss_grad):
            torch.testing.assert_close(
                call(case.model, *weights, left), call(case.model, *weights, case.batch)
            )


def test_all_that_has_an_entry_for_each_token_is_turned() -> None:
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "position_ids": torch.tensor([[1, 0, 1], [0, 1, 2]]),
        "inputs_embeds": torch.stack([ids, -ids], 2),
        "scale": torch.tensor(2.0),
        "name": "x",
    }
    found = padded_on_the_right(batch)
    assert found["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert found["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert found["position_ids"].tolist() == [[0, 1, 1], [0, 1, 2]]
    assert found["inputs_embeds"][0].tolist() == [[5, -5], [6, -6], [0, 0]]
    assert found["scale"] is batch["scale"]
    # Masks of another kind, and rows of which nothing is masked, stay.
    for mask in (torch.ones(2, 1, 3, 3), torch.zeros(2, 3), torch.zeros(2, 0), None):
        same = padded_on_the_right({**batch, "attention_mask": mask})
        assert torch.equal(same["input_ids"], ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Bloom"])
def test_models_of_transformers_padded_on_either_side(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    head = "ForCausalLM" if kind != "GPT2" else "LMHeadModel"
    model = getattr(transformers, kind + head)(
        getattr(transformers, f"{kind}Config")(**sizes)
    )
    model = model.double().eval()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": MARKED}
    task = CausalLMModelOutput()
    gradients = []
    for one in (batch, on_the_left(batch)):
        output = task.get_outputs(model, None, None, one).sum()
        gradients.append(torch.autograd.grad(output, list(model.parameters())))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


# -- logits of large vocabularies ---------------------------------------------------------


def test_margins_of_rows_are_those_of_their_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = draw(9, 5).requires_grad_()
    rows, labels = torch.tensor([7, 0, 3, 4]), torch.tensor([4, 0, 2, 2])
    for tile in (1, 13, 1 << 20):
        monkeypatch.setattr(_token_margins, "_TILE", tile)
        torch.testing.assert_close(
            margins_of_rows(logits, rows, labels), log_odds(logits[rows], labels)
        )
        assert torch.autograd.gradcheck(
            lambda value: margins_of_rows(value, rows, labels), (logits,)
        )
        assert torch.autograd.gradgradcheck(
            lambda value: margins_of_rows(value, rows, labels), (logits,)
        )
    assert margins_of_rows(logits, rows[:0], labels[:0]).shape == (0,)


def test_half_precision_is_widened_before_margins_are_taken() -> None:
    logits = (300 + 10 * draw(4, 6)).to(torch.bfloat16).requires_grad_()
    rows, labels = torch.arange(4), torch.tensor([0, 5, 2, 3])
    found = margins_of_rows(logits, rows, labels)
    assert found.dtype == torch.float32
    wide = logits.detach().float().requires_grad_()
    expected = log_odds(wide, labels)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logits.grad, wide.grad.bfloat16())


def test_certain_tokens_do_not_saturate() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    found = margins_of_rows(logits, torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([200.0]) - torch.tensor(2.0).log())
    (slope,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(slope, torch.tensor([[1.0, -0.5, -0.5]]))


class Selecting(Reader):
    """Computes only the logits that are asked for, as models of transformers do."""

    def __init__(self, ignores: bool = False) -> None:
        super().__init__()
        self.ignores, self.asked = ignores, []

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: Any = 0,
    ) -> Any:
        hidden = self.read(input_ids, attention_mask)
        self.asked.append(logits_to_keep)
        if isinstance(logits_to_keep, Tensor) and not self.ignores:
            hidden = hidden[:, logits_to_keep]
        return SimpleNamespace(logits=self.head(hidden))


@pytest.mark.parametrize("ignores", [False, True])
def test_only_the_logits_of_labelled_tokens_are_computed(ignores: bool) -> None:
    labels = MARKED.where(torch.arange(5) >= 2, -100)
    labels[0, 3] = -100
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    task, model = CausalLMModelOutput(), Selecting(ignores)
    for call in (task.get_outputs, task.get_out_to_loss_grad):
        torch.testing.assert_close(
            call(model, None, None, batch), call(Reader(), None, None, batch)
        )
    assert [places.tolist() for places in model.asked] == [[1, 2, 3]] * 2
    model.asked.clear()
    task.get_outputs(model, None, None, {**batch, "labels": MARKED})
    assert model.asked == [0]
    with pytest.raises(BatchError, match="no token to predict"):
        task.get_outputs(model, None, None, {**batch, "labels": 0 * IDS - 100})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda labels: labels[:, :4], "labels have shape .*4.*, the logits .*5"),
        (lambda labels: nn.functional.pad(labels, (0, 1)), "labels have shape .*6"),
        (lambda labels: labels.float(), "dtype torch.float32; token ids are integers"),
    ],
)
def test_labels_are_checked_where_few_logits_are_computed(
    change: Any, match: str
) -> None:
    labels = MARKED.where(torch.arange(5) >= 2, -100)
    labels[:, 3] = -100
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": change(labels)}
    both(CausalLMModelOutput(), Selecting(), batch, match)


def test_models_may_return_tuples(name: str) -> None:
    case = a_case(name)

    class Plain(type(case.model)):
        def forward(self, **inputs: Any) -> Any:
            return super().forward(**inputs).logits, "cache"

    torch.testing.assert_close(
        case.task.get_outputs(Plain(), None, None, case.batch),
        case.task.get_outputs(case.model, None, None, case.batch),
    )


def test_a_decoder_whose_loss_would_come_first_is_given_no_labels() -> None:
    """With return_dict=False a model with labels returns the loss before the logits."""
    case = a_case("seq2seq_lm")

    class Losing(Translator):
        def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
            known = labels.where(labels != -100, 0)
            return nn.functional.pad(known[:, :-1], (1, 0))

        def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
            logits = super().forward(**inputs).logits
            return (logits,) if labels is None else (logits.sum(), logits)

    for weights in ((None, None), state(case.model)):
        torch.testing.assert_close(
            case.task.get_outputs(Losing(), *weights, case.batch),
            case.task.get_outputs(case.model, *weights, case.batch),
        )


# -- what can be wrong ----------------------------------------------------------------


def both(task: AbstractModelOutput, model: nn.Module, batch: Any, match: str) -> None:
    for call in (task.get_outputs, task.get_out_to_loss_grad):
        for weights, buffers in ((None, None), state(model)):
            with pytest.raises((BatchError, TaskError), match=match):
                call(model, weights, buffers, batch)


def test_a_sequence_without_labels_is_named(name: str) -> None:
    case = a_case(name)
    labels = case.batch["labels"].clone()
    labels[1] = -100
    batch = {**case.batch, "labels": labels}
    both(
        case.task, case.model, batch, "Sequence 1 of the batch has no token to predict"
    )


def test_a_text_of_one_token_has_nothing_to_predict() -> None:
    both(
        CausalLMModelOutput(), Reader(), {"input_ids": IDS[:, :1]}, "Sequence 0 of the"
    )
    empty = {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}
    both(CausalLMModelOutput(), Reader(), empty, "no token to predict")


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_outside_the_vocabulary_is_named(name: str, label: int) -> None:
    case = a_case(name)
    labels = case.batch["labels"].clone()
    labels[2, 1] = label
    # A decoder that made its inputs of them would fail before.
    batch = {**case.batch, "labels": labels}
    if name == "seq2seq_lm":
        batch["decoder_input_ids"] = IDS
    place = 0 if name == "causal_lm" else 1
    match = f"token {place} of sequence 2 of the batch is {label}"
    both(case.task, case.model, batch, match)


def test_sequences_that_are_longer_than_the_model_are_named() -> None:
    batch = {"input_ids": IDS.repeat(1, 2)}
    both(
        CausalLMModelOutput(),
        Reader(),
        batch,
        r"(?s)no such token or position.*\(3, 10\)",
    )
    both(CausalLMModelOutput(), Reader(), {"input_ids": IDS + 9}, "own tokenizer")


def test_logits_of_another_kind_are_named(name: str) -> None:
    case = a_case(name)

    class Pooled(type(case.model)):
        def forward(self, **inputs: Any) -> Tensor:
            return super().forward(**inputs).logits.mean(1)

    both(case.task, Pooled(), case.batch, r"returned \(3, 7\)")


def test_labels_of_another_kind_are_named() -> None:
    case = a_case("masked_lm")
    for labels, match in (
        (case.batch["labels"].double(), "dtype torch.float64"),
        (case.batch["labels"][:, :4], r"shape \(3, 4\), the logits \(3, 5, 7\)"),
        (case.batch["labels"][:, 0], r"shape \(3,\)"),
    ):
        both(case.task, case.model, {**case.batch, "labels": labels}, match)


def test_batches_of_another_kind_are_named(name: str) -> None:
    case = a_case(name)
    both(case.task, case.model, (IDS, MASK, IDS), "is a mapping.*got a tuple")
    both(case.task, case.model, IDS, "is a mapping.*got a Tensor")
    wanted = "neither labels nor" if name == "causal_lm" else "'labels' and 'label'"
    both(case.task, case.model, {"attention_mask": MASK}, wanted)


def test_padding_without_a_mask_is_named(name: str) -> None:
    case = a_case(name)
    case.model.config = SimpleNamespace(pad_token_id=0)
    bare = {"input_ids": IDS, "labels": MARKED}
    match = "Sequence 1 of the batch begins or ends with the model's padding, token 0"
    if name == "causal_lm":
        # Padding on the right that has no labels is nowhere read.
        torch.testing.assert_close(
            case.task.get_outputs(case.model, None, None, bare),
            case.task.get_outputs(case.model, None, None, case.batch),
        )
        with pytest.raises(BatchError, match=match):
            case.task.get_outputs(case.model, None, None, {"input_ids": IDS})
        bare = {"input_ids": IDS.roll(2, 1), "labels": MARKED.roll(2, 1)}
    with pytest.raises(BatchError, match=match):
        case.task.get_outputs(case.model, None, None, bare)
    # One may be the end of a text, whose token also pads.
    whole = {"input_ids": IDS[2:], "labels": IDS[2:]}
    assert case.task.get_outputs(case.model, None, None, whole).shape == (1,)


@pytest.mark.parametrize("reduction", ["max", ""])
def test_other_reductions_are_refused(name: str, reduction: Any) -> None:
    with pytest.raises(OptionError, match="is not 'mean' or 'sum'"):
        TASKS[name](reduction=reduction)
