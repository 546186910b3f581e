"""Text classifiers of transformers, from batch to scores, against a loop over texts."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import architectures_models as models
from tests import reference
from tests.test_hooks_models import compute, randomize
from trak import TRAKer
from trak.errors import BatchError, OptionError, TaskError
from trak.gradient_computers._ladder import HOOKED
from trak.modelout_functions import resolve_task
from trak.projectors import NoOpProjector

IDS = torch.cat([models.IDS, torch.tensor([[8, 2, 0, 0, 0, 0, 0]])])
MASK = (IDS > 0).long()
SEGMENTS = MASK * (torch.arange(7) >= 2)
LABELS = torch.tensor([2, 0, 1, 2])

SIZES = {**models.SIZES, "max_position_embeddings": 16, "num_labels": 3}
GPT2 = {**models.GPT2, "n_positions": 16, "pad_token_id": 0, "num_labels": 3}
DISTILBERT = {**models.DISTILBERT, "max_position_embeddings": 16, "pad_token_id": 0}
DISTILBERT |= {"num_labels": 3}
MODELS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "DistilBert": DISTILBERT,
    "ModernBert": {**SIZES, "cls_token_id": 1, "sep_token_id": 1},
    "Electra": {**SIZES, "embedding_size": 8},
    "DebertaV2": {
        **SIZES,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
    },
    "Albert": {**SIZES, "embedding_size": 8},
    "GPT2": GPT2,
    "Llama": {**SIZES, "num_key_value_heads": 1},
}
SEGMENTED = {"Bert", "Electra", "DebertaV2", "Albert"}


def make(name: str, seed: int = 0, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**{**MODELS[name], **options})
    kind = getattr(transformers, f"{name}ForSequenceClassification")
    return randomize(kind(config), seed)


def batch_of(name: str) -> dict[str, Tensor]:
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    return {**batch, "token_type_ids": SEGMENTS} if name in SEGMENTED else batch


# -- gradients, one text and one backward pass at a time -------------------------------


def margins(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """By the model alone: a text by itself, without its padding."""
    found = []
    for i, length in enumerate(MASK.sum(1).tolist()):
        inputs = {k: v[i : i + 1, :length] for k, v in batch.items() if k != "labels"}
        found.append(reference.margin(model(**inputs).logits[0], batch["labels"][i]))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model, batch = make(name), batch_of(name)
    with warnings.catch_warnings():
        # The table of relative positions has no batch axis.
        warnings.simplefilter("ignore" if name == "DebertaV2" else "error")
        found, _, computer = compute(model, batch, "text_classification")
    known = margins(model, batch)
    chosen = [p for p in model.parameters() if p.requires_grad]
    rows = reference.loop_gradients(known.__getitem__, len(known), chosen)
    scale = float(rows.abs().max())
    torch.testing.assert_close(found, rows, rtol=1e-7, atol=1e-9 * scale)
    slow = {k for k, v in computer.coverage.rungs.items() if v not in HOOKED}
    # Its projections of queries and keys of that table; others serve examples, too.
    relative = {
        f"deberta.encoder.layer.{i}.attention.self.pos_{kind}_proj.{part}"
        for i in range(2)
        for kind in ("key", "query")
        for part in ("weight", "bias")
    }
    assert slow == (relative if name == "DebertaV2" else set())


@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_out_to_loss_is_the_slope_of_the_models_own_loss(name: str) -> None:
    """The loss as a function of the margin has the slope ``p - 1``."""
    model, batch = make(name), batch_of(name)
    task = resolve_task("text_classification")
    found = task.get_out_to_loss_grad(model, None, None, batch)[:, 0]
    for i, margin in enumerate(margins(model, batch)):
        leaf = margin.detach().requires_grad_()
        loss = nn.functional.softplus(-leaf)
        (slope,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(found[i], -slope)
        one = {k: v[i : i + 1] for k, v in batch.items()}
        torch.testing.assert_close(loss, model(**one).loss)


# -- batches ---------------------------------------------------------------------------


def outputs(model: nn.Module, batch: Any) -> Tensor:
    return resolve_task("text_classification").get_outputs(model, None, None, batch)


def test_tuples_and_mappings_are_the_same_texts() -> None:
    model, batch = make("Bert"), batch_of("Bert")
    known = outputs(model, batch)
    label = {k: v for k, v in batch.items() if k != "labels"} | {"label": LABELS}
    torch.testing.assert_close(outputs(model, label), known)
    torch.testing.assert_close(outputs(model, (IDS, SEGMENTS, MASK, LABELS)), known)
    model, batch = make("DistilBert"), batch_of("DistilBert")
    torch.testing.assert_close(
        outputs(model, (IDS, MASK, LABELS)), outputs(model, batch)
    )


def test_vectors_take_the_place_of_tokens() -> None:
    model, batch = make("Bert"), batch_of("Bert")
    vectors = model.get_input_embeddings()(IDS).detach()
    given = {**batch, "inputs_embeds": vectors}
    del given["input_ids"]
    torch.testing.assert_close(outputs(model, given), outputs(model, batch))


@pytest.mark.parametrize("classes", [2, 5])
def test_any_number_of_classes(classes: int) -> None:
    model = make("Bert", num_labels=classes)
    batch = {**batch_of("Bert"), "labels": LABELS % classes}
    logits = model(input_ids=IDS, attention_mask=MASK, token_type_ids=SEGMENTS).logits
    known = [
        reference.margin(*pair) for pair in zip(logits, batch["labels"], strict=True)
    ]
    torch.testing.assert_close(outputs(model, batch), torch.stack(known))


@pytest.mark.parametrize("returns", ["tuples", "mappings"])
def test_what_models_return(returns: str) -> None:
    model, batch = make("Bert"), batch_of("Bert")
    known = outputs(model, batch)
    model.config.return_dict = returns == "mappings"
    torch.testing.assert_close(outputs(model, batch), known)


# -- from batch to scores --------------------------------------------------------------


@pytest.mark.parametrize("name", ["Albert", "Llama"])
def test_scores_are_those_of_the_formula(name: str, tmp_path: Any) -> None:
    models = [make(name, seed) for seed in (0, 1)]
    batch = batch_of(name)
    train = {k: torch.cat([v, v.flip(0)]) for k, v in batch.items()}
    train["labels"] = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    target = {k: v[:2] for k, v in batch.items()}
    traker = TRAKer(
        make(name),
        "text_classification",
        train_set_size=8,
        save_dir=tmp_path,
        projector=NoOpProjector(),
        use_half_precision=False,
        lambda_reg="auto",
        exponents=(0.0, 1.0),
    )
    features, targets, weights = [], [], []
    for number, model in enumerate(models):
        traker.load_checkpoint(model.state_dict(), model_id=number)
        for rows in (slice(3), slice(3, 8)):  # the padding of neighbours differs
            traker.featurize({k: v[rows] for k, v in train.items()})
        traker.finalize_features([number])
        traker.start_scoring_checkpoint("test", model.state_dict(), number, 2)
        traker.score(target)
        task = resolve_task("text_classification")
        features.append(compute(model, train, "text_classification")[1])
        targets.append(compute(model, target, "text_classification")[1])
        weights.append(task.get_out_to_loss_grad(model, None, None, train)[:, 0])
    found = torch.from_numpy(traker.finalize_scores("test").copy())
    known = reference.trak(features, targets, weights)
    scale = float(known.abs().max())
    torch.testing.assert_close(found.double(), known, rtol=1e-3, atol=1e-4 * scale)


# -- what is refused, and how ----------------------------------------------------------

TEXTS = batch_of("Bert")
LONG = torch.ones(4, 20, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("Bert", {"labels": LABELS + 1}, BatchError, "position 0 .* 0 to 2"),
        ("Bert", {"labels": LABELS.float()}, BatchError, "dtype torch.float32"),
        (
            "Bert",
            {"attention_mask": MASK * (torch.arange(4) != 2)[:, None]},
            BatchError,
            "Text 2 of the batch is empty",
        ),
        ("Bert", {"input_ids": IDS + 25}, BatchError, "no such token or position"),
        ("Bert", {"input_ids": IDS.float()}, BatchError, "dtype torch.float32; token"),
        ("GPT2", {"input_ids": LONG, "attention_mask": LONG}, BatchError, "position"),
        (
            "DistilBert",
            {"token_type_ids": SEGMENTS},
            BatchError,
            "the model does not take",
        ),
        ("Bert", {"labels": [0, 1, 2, 0]}, BatchError, "not a tensor"),
    ],
)
def test_batches_that_are_refused(
    name: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    batch = {**batch_of(name), **changes}
    model: Any = make(name)
    if "token_type_ids" in changes:
        model = Strict(model)
    if "attention_mask" in changes and changes["attention_mask"] is LONG:
        batch.pop("token_type_ids", None)
    with pytest.raises(error, match=message):
        outputs(model, batch)


class Strict(nn.Module):
    """Takes two inputs and no other, as encoders without segments once did."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DistilBert", "DebertaV2"])
@pytest.mark.parametrize("segmented", [False, True])
def test_texts_that_are_longer_than_the_model(name: str, *, segmented: bool) -> None:
    batch = {"input_ids": LONG, "attention_mask": LONG, "labels": LABELS}
    if segmented and name in SEGMENTED:
        batch["token_type_ids"] = 0 * LONG
    model = make(name)
    with pytest.raises(BatchError, match=r"20 tokens wide.*16 pos|such token or pos"):
        outputs(model, batch)
    one = {key: value[0] for key, value in batch.items()}
    with pytest.raises(BatchError, match=r"20 tokens wide.*16 pos|such token or pos"):
        resolve_task("text_classification").get_output(model, None, None, one)


@pytest.mark.parametrize(("name", "pad"), [("Bert", 0), ("Llama", 20)])
def test_texts_that_fit_are_not_called_too_long(name: str, pad: int) -> None:
    model, width = make(name, pad_token_id=pad), 7 if pad else 16
    ids = torch.ones(4, width, dtype=torch.long)
    places = torch.arange(width - 1).expand(4, -1)
    batch = {"input_ids": ids, "position_ids": places, "labels": LABELS}
    with pytest.raises(RuntimeError, match="must match") as caught:
        outputs(model, batch)
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize("name", MODELS)
def test_padding_without_a_mask(name: str) -> None:
    """Is read as text, unless no token sees those after it."""
    model, match = make(name), "begins or ends with the model's padding, token 0"
    model.config.pad_token_id = 0
    bare = {"input_ids": IDS, "labels": LABELS}
    if name in {"GPT2", "Llama"}:
        torch.testing.assert_close(outputs(model, bare), outputs(model, batch_of(name)))
        bare["input_ids"] = IDS.roll(5, 1)
    with pytest.raises(BatchError, match=match):
        outputs(model, bare)
    whole = {"input_ids": IDS[:1, :3], "labels": LABELS[:1]}  # no padding, no need
    assert outputs(model, whole).shape == (1,)


@pytest.mark.parametrize("width", [1, 6])
def test_a_mask_of_other_texts(width: int) -> None:
    batch = {**batch_of("Bert"), "attention_mask": MASK[:, :width]}
    with pytest.raises(BatchError, match=rf"has shape \(4, {width}\) .* \(4, 7\)"):
        outputs(make("Bert"), batch)


def test_texts_without_tokens() -> None:
    batch = {"input_ids": IDS[:, :0], "labels": LABELS}
    with pytest.raises(BatchError, match="no tokens"):
        outputs(make("Bert"), batch)


def test_a_decoder_that_does_not_know_its_padding() -> None:
    model = make("GPT2")
    model.config.pad_token_id = None
    with pytest.raises(TaskError, match=r"set model\.config\.pad_token_id"):
        outputs(model, batch_of("GPT2"))


@pytest.mark.parametrize(
    ("problem", "task"),
    [("regression", "regression"), ("multi_label_classification", "multilabel")],
)
def test_other_problems_are_sent_to_their_tasks(problem: str, task: str) -> None:
    count = 1 if task == "regression" else 3
    model = make("Bert", num_labels=count, problem_type=problem)
    with pytest.raises(TaskError, match=f"use the task '{task}'"):
        outputs(model, TEXTS)
    shape = (4,) if count == 1 else (4, 3)
    labels = torch.ones(shape, dtype=torch.float64)
    found = resolve_task(task).get_outputs(
        model, None, None, {**TEXTS, "labels": labels}
    )
    logits = model(**{k: v for k, v in TEXTS.items() if k != "labels"}).logits
    torch.testing.assert_close(found, logits.sum(1))


def test_a_single_number_is_no_margin() -> None:
    with pytest.raises(TaskError, match=r"'binary_classification', .* 'regression'"):
        outputs(make("Bert", num_labels=1), {**TEXTS, "labels": 0 * LABELS})


def test_errors_of_the_model_itself_are_left_alone() -> None:
    class Broken(nn.Module):
        def __init__(self, error: Exception) -> None:
            super().__init__()
            self.config = SimpleNamespace(max_position_embeddings=512)
            self.error = error

        def forward(self, **inputs: Tensor) -> Tensor:
            raise self.error

    for error in (
        RuntimeError("sizes must match"),
        ValueError("labels"),
        TypeError("got an unexpected keyword argument 'hidden'"),
    ):
        with pytest.raises(type(error)) as caught:
            outputs(Broken(error), TEXTS)
        assert caught.value is error


def test_other_devices_are_named(tmp_path: Any) -> None:
    model = make("Bert")
    traker = TRAKer(model, "text_classification", 4, tmp_path)
    traker.load_checkpoint(model.state_dict())
    far = {key: value.to("meta") for key, value in TEXTS.items()}
    with pytest.raises(BatchError, match="meta"):
        traker.featurize(far)
    with pytest.raises(OptionError, match="meta device"):
        TRAKer(model.to("meta"), "text_classification", 4, tmp_path / "other")


def test_errors_reach_the_caller_of_featurize(tmp_path: Any) -> None:
    model = make("Roberta")
    traker = TRAKer(model, "text_classification", 4, tmp_path)
    traker.load_checkpoint(model.state_dict())
    with pytest.raises(BatchError, match="20 tokens wide"):
        traker.featurize({
            "input_ids": LONG,
            "attention_mask": LONG,
            "labels": LABELS,
        })
