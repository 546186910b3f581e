"""Batches as transformers and datasets make them, and what is no batch yet."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trak import TRAKer
from trak.errors import BatchError
from trak.modelout_functions._inputs import forward_parameters, model_inputs

IDS = torch.tensor([[3, 9, 4, 1], [6, 5, 3, 0], [7, 9, 0, 0], [2, 8, 5, 0]])
MASK = (IDS > 0).long()
LABELS = torch.tensor([0, 1, 2, 0])
TEXTS = ["a", "b", "c", "d"]


class Classifier(nn.Module):
    """Takes what its ``forward`` names, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask.unsqueeze(2).float()
        x = (self.embed(input_ids) * weights).sum(1) / weights.sum(1)
        return self.head(x)


class Decoder(nn.Module):
    """The same, with an output for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).cumsum(1))


def rows_of(batch: Any, path: Path, kind: str) -> Tensor:
    """Featurize one batch of four with fixed weights: the rows."""
    model = (Classifier() if kind == "text_classification" else Decoder()).double()
    traker = TRAKer(model, kind, 4, path / kind, proj_dim=8, logging_level=100)
    generator = torch.Generator().manual_seed(0)
    traker.load_checkpoint({
        key: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for key, value in model.state_dict().items()
    })
    traker.featurize(batch)
    assert bool((traker.saver.current_store["is_featurized"] == 1).all())
    return torch.from_numpy(traker.saver.current_store["grads"] + 0.0)


def plain(kind: str) -> dict[str, Any]:
    batch = {"input_ids": IDS, "attention_mask": MASK}
    return {**batch, "labels": LABELS} if kind == "text_classification" else batch


def encoded(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.BatchEncoding(plain(kind))


def user_dict(kind: str) -> Any:
    return UserDict(plain(kind))


def with_columns(kind: str) -> Any:
    return {"text": TEXTS, **plain(kind), "pairs": list(zip(TEXTS, TEXTS, strict=True))}


def dataset(kind: str) -> Any:
    datasets = pytest.importorskip("datasets")
    columns = {key: value.tolist() for key, value in plain(kind).items()}
    return datasets.Dataset.from_dict({**columns, "text": TEXTS})


def a_slice(kind: str) -> Any:
    return dataset(kind).with_format("torch")[:4]


def collated(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    found = dataset(kind).remove_columns("text")
    return transformers.default_data_collator([found[i] for i in range(4)])


KINDS = ["text_classification", "causal_lm"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [encoded, user_dict, with_columns, a_slice, collated])
def test_what_is_a_batch(tmp_path: Path, kind: str, make: Any) -> None:
    found = rows_of(make(kind), tmp_path / "found", kind)
    known = rows_of(plain(kind), tmp_path / "known", kind)
    assert torch.equal(found, known)
    assert known.any(1).all()


def ragged(kind: str) -> Any:
    rows = [row[row > 0] for row in IDS]
    return {**plain(kind), "input_ids": rows}


def numbers(kind: str) -> Any:
    return {key: value.tolist() for key, value in plain(kind).items()}


def numbers_and_tensors(kind: str) -> Any:
    return {**plain(kind), "input_ids": [row[row > 0].tolist() for row in IDS]}


def no_tensor(kind: str) -> Any:
    return {**plain(kind), "attention_mask": MASK.tolist()}


def rows(kind: str) -> Any:
    found = numbers(kind)
    return [{key: value[i] for key, value in found.items()} for i in range(4)]


def one_example(kind: str) -> Any:
    return {key: value[0] for key, value in plain(kind).items()}


def unknown_column(kind: str) -> Any:
    return {**plain(kind), "idx": torch.arange(4)}


def on_meta(kind: str) -> Any:
    return UserDict({key: value.to("meta") for key, value in plain(kind).items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (dataset, "A dataset is not a batch"),
        (ragged, "DataCollatorWithPadding"),
        (numbers, "DataCollatorWithPadding"),
        (numbers_and_tensors, "input_ids.* DataCollatorWithPadding"),
        (no_tensor, "'attention_mask' holds Python numbers, not a tensor"),
        (rows, "rows that are not collated"),
        (one_example, r"a slice such as dataset\[3:4\]"),
        (
            unknown_column,
            r"'idx', which the model does not take: its forward takes inp",
        ),
        (on_meta, "has a tensor on meta, the model is on cpu"),
    ],
)
def test_what_is_no_batch(tmp_path: Path, kind: str, make: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        rows_of(make(kind), tmp_path, kind)


@pytest.mark.usefixtures("untyped")
def test_input_ids_of_nothing(tmp_path: Path) -> None:
    batch = {"attention_mask": MASK}
    with pytest.raises(BatchError, match="neither labels nor a tensor input_ids"):
        rows_of(batch, tmp_path, "causal_lm")


def test_what_a_model_takes() -> None:
    class Open(Classifier):
        def forward(self, input_ids: Tensor, **more: Any) -> Tensor:
            return super().forward(input_ids, more["attention_mask"])

    entries = {"input_ids": IDS, "idx": IDS, "text": TEXTS, "layers": [1, 2, 3]}
    assert list(model_inputs(Open(), entries)) == ["input_ids", "idx", "layers"]
    names = list(forward_parameters(nn.DataParallel(Classifier())))
    assert names == ["input_ids", "attention_mask"]

    class Texts(nn.Module):
        def forward(self, text: list[str]) -> Tensor:
            return torch.zeros(len(text))

    assert model_inputs(Texts(), {"text": TEXTS}) == {"text": TEXTS}
