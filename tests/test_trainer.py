"""From a trainer to scores: by itself, against the loops, and what cannot be right."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.problems import randomized
from trak import TRAKer
from trak._collating import Collating, pad_together, seeded
from trak._trainer import infer_task
from trak.errors import (
    BatchError,
    CheckpointFileError,
    OptionError,
    OrderError,
    TrakWarning,
)

N, M = 11, 3
OPTIONS: dict[str, Any] = {
    "proj_dim": 64,
    "logging_level": 100,
    "use_half_precision": False,
}


class Classifier(nn.Module):
    """Bags of words, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        weights = attention_mask.unsqueeze(2)
        x = (self.embed(input_ids) * weights).sum(1) / weights.sum(1)
        return self.head(self.drop(x))


class Tagger(nn.Module):
    """A prediction for every token, from all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 20)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) * attention_mask.unsqueeze(2)
        mean = x.sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        return self.head(x + mean)


def examples(n: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "text": "words",
            "input_ids": [draw.randrange(3, 20) for _ in range(draw.randrange(2, 7))],
            "label": draw.randrange(3),
        }
        for _ in range(n)
    ]


class Padding:
    """Pads ids on the right."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row["input_ids"]) for row in rows], batch_first=True
        )
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch


class Masking(Padding):
    """Masks a third of the tokens, from the generator that everyone draws from."""

    mlm = True
    seed: int | None = None
    generator: torch.Generator | None = None
    tokenizer = SimpleNamespace(padding_side="left", pad_token_id=0)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__([{"input_ids": row["input_ids"]} for row in rows])
        if self.seed is not None and self.generator is None:
            self.generator = torch.Generator().manual_seed(self.seed)
        chance = torch.rand(batch["input_ids"].shape, generator=self.generator)
        chosen = (chance < 1 / 3) & (batch["attention_mask"] > 0)
        batch["labels"] = batch["input_ids"].where(chosen, -100)
        batch["input_ids"] = batch["input_ids"].where(~chosen, 2)
        return batch


def trainer_of(directory: Path, module: nn.Module, **changes: Any) -> Any:
    """What is read of a trainer, and two checkpoints in its output directory."""
    arguments = {
        "output_dir": str(directory),
        "per_device_eval_batch_size": 4,
        "remove_unused_columns": True,
        "seed": 3,
    }
    parts = {
        "model": module,
        "args": SimpleNamespace(**arguments),
        "train_dataset": examples(N, 0),
        "eval_dataset": examples(M, 1),
        "data_collator": Padding(),
        "state": SimpleNamespace(global_step=20),
    }
    return SimpleNamespace(**{**parts, **changes})


@pytest.fixture
def model() -> nn.Module:
    with seeded(0):
        return Classifier().train()


def save_checkpoints(directory: Path, model: nn.Module) -> list[dict[str, Tensor]]:
    states = []
    for step in (10, 9):  # which sort the other way as strings
        folder = directory / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(step)
        states.append({
            k: torch.randn(v.shape, generator=generator)
            for k, v in model.state_dict().items()
        })
        torch.save(states[-1], folder / "pytorch_model.bin")
    (directory / "checkpoint-final").mkdir()
    (directory / "checkpoint-12").touch()
    return states[::-1]


def looped(
    directory: Path, model: nn.Module, states: list[Any], task: str, **options: Any
) -> Tensor:
    """The scores from the calls that a user would make one by one, text by text."""
    traker = TRAKer(model, task, N, directory, **{**OPTIONS, **options})
    for state in states:
        traker.load_checkpoint(state)
        for row in examples(N, 0):
            traker.featurize(Padding()([row]))
    traker.finalize_features()
    for state in states:
        traker.start_scoring_checkpoint(state, num_targets=M)
        for row in examples(M, 1):
            traker.score(Padding()([row]))
    return torch.from_numpy(traker.finalize_scores() + 0.0)


def test_four_lines(tmp_path: Path, model: nn.Module) -> None:
    states = save_checkpoints(tmp_path, model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = looped(tmp_path / "loop", Classifier(), states, "text_classification")
    trainer = trainer_of(tmp_path, model)
    traker = TRAKer.from_trainer(
        trainer, tmp_path / "store", task="text_classification", **OPTIONS
    )
    scores = torch.from_numpy(traker.attribute() + 0.0)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert list(traker.saver.model_ids) == [0, 1]
    # The model is what it was, and other targets get an experiment of their own.
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.training
    assert model.drop.training
    other = traker.attribute(trainer.eval_dataset[::-1])
    torch.testing.assert_close(torch.from_numpy(other + 0.0), scores.flip(1))
    assert len(traker.saver.experiments) == 2
    assert traker.top_k(k=2).indices.shape == (M, 2)
    named = traker.attribute(trainer.eval_dataset[:1], "one")
    torch.testing.assert_close(torch.from_numpy(named + 0.0), scores[:, :1])
    assert "one" in traker.saver.experiments


def test_work_that_was_interrupted_is_gone_on_with(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoints(tmp_path, model)
    trainer = trainer_of(tmp_path, model)
    options = {"task": "text_classification", **OPTIONS}
    whole = TRAKer.from_trainer(trainer, tmp_path / "whole", **options).attribute()
    before = model.head.weight.clone()
    calls = 0
    collate = Padding()

    def failing(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 12:  # 4 draws and a batch of targets, and then of training
            raise KeyboardInterrupt
        return collate(rows)

    broken = trainer_of(tmp_path, model, data_collator=failing)
    with pytest.raises(KeyboardInterrupt):
        TRAKer.from_trainer(broken, tmp_path / "parts", **options).attribute()
    torch.testing.assert_close(model.head.weight, before)
    again = TRAKer.from_trainer(trainer, tmp_path / "parts", **options)
    computer = again.gradient_computer
    done = 0
    stream = computer.stream_per_sample_grads

    def counted(*args: Any) -> Any:
        nonlocal done
        done += 1
        return stream(*args)

    monkeypatch.setattr(computer, "stream_per_sample_grads", counted)
    assert np.array_equal(again.attribute(), whole)
    first = done
    assert 0 < first < 8  # of 2 checkpoints with 3 batches and 1
    assert np.array_equal(again.attribute(), whole)
    assert done == first


def test_the_model_as_it_is(tmp_path: Path, model: nn.Module) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = looped(tmp_path / "loop", Classifier(), [state], "text_classification")
    trainer = trainer_of(tmp_path, model)
    options = {"task": "text_classification", **OPTIONS}
    traker = TRAKer.from_trainer(trainer, tmp_path / "store", **options)
    scores = traker.attribute()
    torch.testing.assert_close(
        torch.from_numpy(scores + 0.0), expected, rtol=1e-4, atol=1e-5
    )
    for given in (state, [state]):
        again = TRAKer.from_trainer(
            trainer, tmp_path / "store", checkpoints=given, **options
        )
        assert np.array_equal(again.attribute(), scores)
    # After more training it is another checkpoint, and scores are of that alone.
    with torch.no_grad():
        model.head.weight += 1
    assert traker.featurize_all() == [1]
    assert not np.array_equal(traker.attribute(), scores)


# -- columns and collators ---------------------------------------------------------------


def test_columns_are_those_that_the_trainer_keeps(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        seen.append({key for row in rows for key in row})
        return Padding()(rows)

    def sees(**changes: Any) -> set[str]:
        seen.clear()
        trainer = trainer_of(tmp_path, Classifier(), data_collator=collate, **changes)
        traker = TRAKer.from_trainer(
            trainer,
            tmp_path / "s",
            task="text_classification",
            checkpoints=[],
            **OPTIONS,
        )
        assert traker._source is not None
        list(traker._source.collating.batches(trainer.train_dataset))
        assert all(it == seen[0] for it in seen)
        return seen[0]

    arguments = trainer_of(tmp_path, Classifier()).args
    assert sees() == {"input_ids", "label"}
    assert sees(label_names=["text"]) == {"input_ids", "label", "text"}
    everything = SimpleNamespace(**{**vars(arguments), "remove_unused_columns": False})
    assert sees(args=everything) == {"input_ids", "label", "text"}
    own = {"_signature_columns": ["input_ids", "label", "text"]}
    assert sees(**own) == {"input_ids", "label", "text"}


def collating(collate: Any, batch_size: int = 4, **changes: Any) -> Collating:
    parts = {
        "collate": collate,
        "columns": None,
        "batch_size": batch_size,
        "device": torch.device("cpu"),
        "seed": 0,
    }
    return Collating(**{**parts, **changes})


@pytest.mark.parametrize("seed", [None, 5])
def test_random_masks_are_drawn_once_for_every_example(seed: int | None) -> None:
    collate = Masking()
    collate.seed = seed
    state = torch.get_rng_state()
    rows = examples(N, 0)

    def masked(batch_size: int) -> list[tuple[list[int], list[int]]]:
        found = []
        for batch in collating(collate, batch_size).batches(rows):
            for ids, mask, labels in zip(
                batch["input_ids"],
                batch["attention_mask"],
                batch["labels"],
                strict=True,
            ):
                assert not mask[: int((mask == 0).sum())].any()  # padded on the left
                assert (labels[mask == 0] == -100).all()
                chosen = mask > 0
                found.append((ids[chosen].tolist(), labels[chosen].tolist()))
        return found

    known = masked(4)
    assert known == masked(4) == masked(1) == masked(50)
    assert torch.equal(torch.get_rng_state(), state)
    for (ids, labels), row in zip(known, rows, strict=True):
        whole = [it if it != -100 else ids[i] for i, it in enumerate(labels)]
        assert whole == row["input_ids"]
        assert any(it != -100 for it in labels)  # of 2 tokens too
    assert len({tuple(it == -100 for it in labels) for _, labels in known}) > 3
    other = next(collating(collate, seed=1).batches(rows))
    again = next(collating(collate).batches(rows))
    assert not torch.equal(other["labels"], again["labels"])


def test_masked_language_models(tmp_path: Path) -> None:
    with seeded(0):
        model = Tagger()
    trainer = trainer_of(tmp_path, model, data_collator=Masking())
    options = {"task": "masked_lm", "checkpoints": [], **OPTIONS}
    first = TRAKer.from_trainer(trainer, tmp_path / "1", **options).attribute()
    second = TRAKer.from_trainer(trainer, tmp_path / "2", batch_size=1, **options)
    np.testing.assert_allclose(second.attribute(), first, rtol=1e-4, atol=1e-5)


def test_padding_without_a_tokenizer() -> None:
    made = [
        {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[-100, 6]])},
        {"input_ids": torch.tensor([[7]]), "labels": torch.tensor([[7]])},
    ]
    batch = pad_together(made, None)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["labels"].tolist() == [[-100, 6], [7, -100]]
    other = pad_together(made, SimpleNamespace(padding_side="left", pad_token_id=1))
    assert other["input_ids"].tolist() == [[5, 6], [1, 7]]


def noisy(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = Padding()(rows)
    return {**batch, "input_ids": torch.randint(3, 20, batch["input_ids"].shape)}


def cropped(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    keep = np.random.randint(1, 7)  # noqa: NPY002  as collators do
    return {k: v[:, :keep] if v.ndim > 1 else v for k, v in Padding()(rows).items()}


def packed(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {k: v[:1] for k, v in Padding()(rows).items()}


class Augmented(list[Any]):
    """Examples that are others every time."""

    def __getitem__(self, i: Any) -> Any:
        row = super().__getitem__(i)
        return {**row, "input_ids": random.sample(range(3, 20), 4)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"collate": noisy},
            OptionError,
            r"data collator \(function\), or the dataset",
        ),
        ({"collate": cropped}, OptionError, "without random changes"),
        ({"collate": packed}, BatchError, "made 1 rows of 4 examples"),
        (
            {"columns": frozenset({"pixels"})},
            OptionError,
            "takes none of the dataset's",
        ),
    ],
)
def test_what_is_not_one_batch(changes: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        list(collating(**{"collate": Padding(), **changes}).batches(examples(N, 0)))


@pytest.mark.parametrize("collate", [Padding(), Masking()])
def test_datasets_that_change_are_refused(collate: Any) -> None:
    with pytest.raises(OptionError, match="or the dataset, makes something else"):
        list(collating(collate).batches(Augmented(examples(N, 0))))


def test_generators_go_on_where_they_were() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    with seeded(4):
        first = draws()
    with seeded(4):
        assert draws() == first
        with seeded(4, 1):
            assert draws() != first
        second = draws()
    with seeded(4):
        draws()
        assert draws() == second


# -- what cannot be right ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": None}, "train_dataset must be a dataset with a length"),
        ({"train_dataset": iter([])}, "got list_iterator. Read a stream into a list"),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"train_dataset": {"a": [1]}}, r"train_dataset is a mapping with \['a'\]"),
        ({"model": None}, "trainer must be a transformers.Trainer"),
        (
            {"is_deepspeed_enabled": True},
            "is_deepspeed_enabled, so no process holds all",
        ),
        ({"is_fsdp_enabled": True}, "is_fsdp_enabled"),
        ({"args": SimpleNamespace(world_size=2)}, "runs in 2 processes"),
    ],
)
def test_trainers_that_cannot_be_used(
    tmp_path: Path, model: nn.Module, changes: Any, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        TRAKer.from_trainer(trainer_of(tmp_path, model, **changes), tmp_path / "s")


def test_things_that_are_no_trainer(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(
        OptionError, match="got Classifier, which has no model, args, tr"
    ):
        TRAKer.from_trainer(model, tmp_path)
    trainer = trainer_of(tmp_path, model)
    with pytest.raises(OptionError, match=r"Classifier does not tell .* 'causal_lm'"):
        TRAKer.from_trainer(trainer, tmp_path)
    with pytest.raises(OptionError, match="batch_size must be at least 1"):
        TRAKer.from_trainer(trainer, tmp_path, batch_size=0)


def test_targets_that_cannot_be_used(tmp_path: Path, model: nn.Module) -> None:
    trainer = trainer_of(tmp_path, model, eval_dataset={"a": [1], "b": [2]})
    traker = TRAKer.from_trainer(
        trainer, tmp_path / "s", task="text_classification", **OPTIONS
    )
    with pytest.raises(OptionError, match=r"mapping with \['a', 'b'\]; pass one"):
        traker.attribute()
    with pytest.raises(OptionError, match=r"dataset must be a dataset .* got str"):
        traker.attribute("test")
    with pytest.raises(OptionError, match="dataset is empty"):
        traker.attribute([])
    plain = TRAKer(Classifier(), "text_classification", N, tmp_path / "p", **OPTIONS)
    with pytest.raises(OrderError, match=r"attribute goes .* TRAKer\.from_trainer"):
        plain.attribute([])
    with pytest.raises(OrderError, match="featurize_all goes"):
        plain.featurize_all()


def test_checkpoints_that_cannot_be_used(tmp_path: Path, model: nn.Module) -> None:
    options = {"task": "text_classification", **OPTIONS}
    fresh = SimpleNamespace(global_step=0)
    with pytest.warns(TrakWarning, match="this trainer has not trained"):
        TRAKer.from_trainer(
            trainer_of(tmp_path, model, state=fresh), tmp_path / "s", **options
        )
    save_checkpoints(tmp_path, model)
    TRAKer.from_trainer(
        trainer_of(tmp_path, model, state=fresh), tmp_path / "s", **options
    )
    early = SimpleNamespace(global_step=9)
    with pytest.warns(TrakWarning, match="checkpoint-10 .* later than this trainer"):
        TRAKer.from_trainer(
            trainer_of(tmp_path, model, state=early), tmp_path / "s", **options
        )
    (tmp_path / "checkpoint-9" / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointFileError, match=r"\['checkpoint-9'\] .* no weights"):
        TRAKer.from_trainer(trainer_of(tmp_path, model), tmp_path / "s", **options)
    last = str(tmp_path / "checkpoint-10")
    traker = TRAKer.from_trainer(
        trainer_of(tmp_path, model), tmp_path / "s", checkpoints=last, **options
    )
    assert traker.featurize_all() == [0]


def test_another_training_set_in_the_same_store(
    tmp_path: Path, model: nn.Module
) -> None:
    options = {"task": "text_classification", "checkpoints": [], **OPTIONS}
    TRAKer.from_trainer(
        trainer_of(tmp_path, model), tmp_path / "s", **options
    ).attribute()
    other = trainer_of(tmp_path, model, train_dataset=examples(N, 0)[::-1])
    with pytest.raises(BatchError, match="stored"):
        TRAKer.from_trainer(other, tmp_path / "s", **options).attribute()


# -- tasks -------------------------------------------------------------------------------


def named(
    name: str, bases: tuple[type, ...] = (nn.Module,), **config: Any
) -> nn.Module:
    model: nn.Module = type(name, bases, {})()
    model.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (named("LlamaForCausalLM"), "causal_lm"),
        (named("GPT2LMHeadModel"), "causal_lm"),
        (named("BertForMaskedLM"), "masked_lm"),
        (named("Own", (type(named("BertForMaskedLM")),)), "masked_lm"),
        (named("T5ForConditionalGeneration", is_encoder_decoder=True), "seq2seq_lm"),
        (named("BertForSequenceClassification", num_labels=2), "text_classification"),
        (named("BertForSequenceClassification", num_labels=1), "regression"),
        (
            named(
                "BertForSequenceClassification",
                num_labels=3,
                problem_type="multi_label_classification",
            ),
            "multilabel",
        ),
        (
            named(
                "BertForSequenceClassification",
                num_labels=3,
                problem_type="single_label_classification",
            ),
            "text_classification",
        ),
        (named("ViTForImageClassification", num_labels=9), "image_classification"),
    ],
)
def test_tasks_of_classes(model: nn.Module, task: str) -> None:
    assert infer_task(model) == task


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(1, 1),
        named("XLMWithLMHeadModel"),
        named("LlavaForConditionalGeneration", is_encoder_decoder=False),
        named("BertForTokenClassification"),
    ],
)
def test_classes_that_do_not_tell(model: nn.Module) -> None:
    with pytest.raises(OptionError, match=r"pass task=\.\.\., one of \['binary_class"):
        infer_task(model)


# -- the trainer itself ------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    module = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    module.logging.set_verbosity_error()
    return module


def tokenizer_of(transformers: Any) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, **{f"w{i}": i for i in range(3, 20)}}
    model = tokenizers.models.WordLevel(words, unk_token="[UNK]")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text_classification", "masked_lm", "causal_lm"])
def test_a_trainer(transformers: Any, tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    tokenizer = tokenizer_of(transformers)
    collator = None
    if kind == "text_classification":
        config = transformers.BertConfig(**SIZES, num_labels=3)
        model = transformers.BertForSequenceClassification(config)
    elif kind == "masked_lm":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, seed=1)
    else:
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model.load_state_dict(randomized(model, 1))

    def columns(rows: list[dict[str, Any]]) -> Any:
        found = datasets.Dataset.from_list(rows)
        masks = [[1] * len(ids) for ids in found["input_ids"]]
        return found.add_column("attention_mask", masks)

    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path / "out"),
            num_train_epochs=2,
            learning_rate=0.05,
            save_strategy="epoch",
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=columns(examples(N, 0)),
        eval_dataset=columns(examples(M, 1)),
        processing_class=tokenizer,
        data_collator=collator,
    )
    trainer.train()
    traker = TRAKer.from_trainer(trainer, tmp_path / "store", **OPTIONS)
    scores = torch.from_numpy(traker.attribute() + 0.0)
    assert type(traker.task).__name__.lower().startswith(kind.split("_", 1)[0])
    folders = sorted(
        (tmp_path / "out").iterdir(), key=lambda it: int(it.name.split("-")[1])
    )
    assert len(folders) == 2
    # By hand: the library's own loading, and batches of one that nothing shuffles.
    states = [type(model).from_pretrained(it).state_dict() for it in folders]
    by_hand = TRAKer(type(model)(model.config), kind, N, tmp_path / "hand", **OPTIONS)
    assert traker._source is not None
    single = Collating(
        trainer.data_collator,
        traker._source.collating.columns,
        1,
        torch.device("cpu"),
        traker._source.collating.seed,
    )
    for state in states:
        by_hand.load_checkpoint(state)
        for batch in single.batches(trainer.train_dataset):
            by_hand.featurize(batch)
    by_hand.finalize_features()
    for state in states:
        by_hand.start_scoring_checkpoint(state, num_targets=M)
        for batch in single.batches(trainer.eval_dataset):
            by_hand.score(batch)
    expected = torch.from_numpy(by_hand.finalize_scores() + 0.0)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)
    assert json.loads((folders[0] / "trainer_state.json").read_text())
    # The same weights have the same ids, read by the library or from its files.
    known = {k: v["weights"] for k, v in traker.saver.model_ids.items()}
    assert known == {k: v["weights"] for k, v in by_hand.saver.model_ids.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
def test_a_trainer_of_adapters(transformers: Any, tmp_path: Path) -> None:
    """Its checkpoints hold the adapters alone, and the base model is not changed."""
    peft = pytest.importorskip("peft")
    config = transformers.BertConfig(**SIZES, num_labels=3)
    base = transformers.BertForSequenceClassification(config)
    base.load_state_dict(randomized(base, 1))
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    model = peft.get_peft_model(base, lora)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path / "out"),
            num_train_epochs=2,
            learning_rate=0.05,
            save_strategy="epoch",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=examples(N, 0),
        eval_dataset=examples(M, 1),
        data_collator=Padding(),
    )
    trainer.train()
    saved = [it.name for it in (tmp_path / "out").glob("*/*.safetensors")]
    assert saved == ["adapter_model.safetensors"] * 2
    traker = TRAKer.from_trainer(trainer, tmp_path / "store", **OPTIONS)
    scores = traker.attribute()
    assert scores.shape == (N, M)
    assert np.abs(scores).max() > 0
    assert list(traker.saver.model_ids) == [0, 1]
    selected = traker.options.selection.names
    assert all("lora_" in it or "modules_to_save" in it for it in selected)
    # The last checkpoint is what the model holds now.
    again = TRAKer.from_trainer(
        trainer, tmp_path / "store", checkpoints=[model.state_dict()], **OPTIONS
    )
    assert again.featurize_all() == [1]
