"""Similarity of representations, against features taken by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests import problems
from tests.contracts.method_contract import MethodContract, cut, problem
from tests.problems import Problem, assert_scores, draw
from trak.errors import (
    BatchError,
    CheckpointError,
    NoCheckpointError,
    NonFiniteError,
    OptionError,
    OrderError,
    TaskError,
    UnknownNameError,
)
from trak.methods import Method, RepresentationSimilarity


class OfRepresentations(MethodContract):
    options: ClassVar[dict[str, Any]] = {}

    def make(self, problem: Problem, save_dir: Path, **options: Any) -> Method:
        return RepresentationSimilarity(
            problem.model, problem.checkpoints, **self.options
        )


class TestCosine(OfRepresentations):
    pass


class TestDot(OfRepresentations):
    options: ClassVar[dict[str, Any]] = {"metric": "dot", "same_label": True}


class TestL2(OfRepresentations):
    options: ClassVar[dict[str, Any]] = {"metric": "l2", "layer": "0"}
    duplicates_are_positive = False  # no distance is below zero


def hidden(found: Problem, state: Any, x: torch.Tensor, layers: int) -> torch.Tensor:
    found.model.load_state_dict(state)
    with torch.no_grad():
        return found.model[:layers](x)


METRICS = {
    "dot": lambda a, b: a @ b,
    "cosine": lambda a, b: (a @ b) / (a.norm() * b.norm()),
    "l2": lambda a, b: -(a - b).norm(),
}


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize(
    ("layer", "layers"),
    [
        (None, 2),
        ("0", 1),
        ("1", 2),
        ("2", 3),
        (lambda model, batch: model[:1](batch[0]), 1),
    ],
)
def test_features_are_those_of_the_layer(metric, layer, layers):
    found = problem()
    method = RepresentationSimilarity(found.model, found.checkpoints, layer, metric)
    scores = method.fit(cut(found.train, 4)).score(cut(found.targets, 3))
    expected = torch.zeros(found.n, found.m, dtype=torch.float64)
    for state in found.checkpoints:
        train = hidden(found, state, found.train[0], layers)
        targets = hidden(found, state, found.targets[0], layers)
        for i in range(found.n):
            for j in range(found.m):
                expected[i, j] += METRICS[metric](train[i], targets[j]) / 2
    assert_scores(torch.from_numpy(scores), expected, 1e-5)


def test_other_labels_score_zero(monkeypatch):
    monkeypatch.setattr("trak.methods._representations.TILE", 20)
    found = problem()
    arguments = found.model, found.checkpoints
    every = RepresentationSimilarity(*arguments).fit([found.train])
    same = RepresentationSimilarity(*arguments, same_label=True).fit([found.train])
    is_same = (found.train[1][:, None] == found.targets[1]).numpy()
    np.testing.assert_array_equal(
        same.score([found.targets]), is_same * every.score([found.targets])
    )


def test_nothing_is_left_on_the_model():
    found = problem()
    method = RepresentationSimilarity(found.model, found.checkpoints)
    method.fit([found.train]).score([found.targets])
    assert not any(module._forward_hooks for module in found.model.modules())
    assert all(value.grad is None for value in found.model.parameters())


class Encoder(torch.nn.Module):
    """Tokens by keyword, a tuple of hidden states, a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)
        self.body = torch.nn.ModuleDict({"block": Pair()})
        self.head = torch.nn.Linear(4, 2)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        states, _ = self.body["block"](self.embed(input_ids))
        return self.head(states[:, 0])


class Pair(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden.tanh(), None


def texts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 3, 1, 4, 2, 0])
    return {
        "input_ids": torch.randint(0, 9, (6, 5), generator=generator),
        "attention_mask": (torch.arange(5) < lengths[:, None]).long(),
        "labels": torch.tensor([[0], [1], [0], [1], [0], [1]]),
    }


@pytest.mark.parametrize("layer", ["body.block", "embed", None])
def test_tokens_are_averaged_over_the_mask(layer):
    model, batch = Encoder().double(), texts()
    state = problems.randomized(model, 1)
    method = RepresentationSimilarity(model, [state], layer, "dot", same_label=True)
    scores = method.fit([batch]).score([batch])
    embedded = state["embed.weight"][batch["input_ids"]]
    features = embedded.tanh()[:, 0]
    if layer is not None:
        tokens = embedded if layer == "embed" else embedded.tanh()
        mask = batch["attention_mask"].double()[..., None]
        features = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)
    same = batch["labels"] == batch["labels"].T
    assert_scores(torch.from_numpy(scores), same * (features @ features.T), 1e-5)


def test_maps_of_features_are_flattened():
    found = problems.classification(problems.Residual(), 2, 4, 4)
    method = RepresentationSimilarity(found.model, found.checkpoints, "conv", "dot")
    scores = method.fit([found.train]).score([found.targets])
    found.model.load_state_dict(found.checkpoints[0])
    train, targets = (
        found.model.conv(b[0]).flatten(1) for b in (found.train, found.targets)
    )
    assert_scores(torch.from_numpy(scores), (train @ targets.T).detach(), 1e-5)


# -- errors ---------------------------------------------------------------------------


def test_options_are_checked():
    found = problem()
    model, states = found.model, found.checkpoints
    with pytest.raises(NoCheckpointError, match="checkpoints is empty"):
        RepresentationSimilarity(model, [])
    with pytest.raises(
        OptionError, match=r"metric='l1' is unknown; pass one of \['cosi"
    ):
        RepresentationSimilarity(model, states, metric="l1")
    with pytest.raises(OptionError, match="other labels 0, which is the best"):
        RepresentationSimilarity(model, states, metric="l2", same_label=True)
    with pytest.raises(
        UnknownNameError, match=r"'fc' is not a module .*\['0', '1', '2'\]"
    ):
        RepresentationSimilarity(model, states, "fc")
    many = torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(23)])
    with pytest.raises(UnknownNameError, match=r"no torch.nn.Linear .* and 3 more"):
        RepresentationSimilarity(many, states)


class Skipped(torch.nn.Module):
    """Its last linear layer is never called, and its norm gives integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 3)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.first(inputs)}


def test_layers_without_features_are_refused():
    model, found = Skipped().double(), problem()
    state = model.state_dict()
    with pytest.raises(TaskError, match=r"input of unused .* no call of it.*'first'"):
        RepresentationSimilarity(model, [state]).fit([found.train])
    with pytest.raises(TaskError, match=r"output of the model .* got dict"):
        RepresentationSimilarity(model, [state], "").fit([found.train])
    for layer in (lambda model, batch: batch[0][0], lambda model, batch: batch[0][:2]):
        with pytest.raises(
            TaskError, match=r"layer gave shape .* \(11, k\) are needed"
        ):
            RepresentationSimilarity(model, [state], layer).fit([found.train])


def test_batches_are_checked():
    found = problem()
    arguments = found.model, found.checkpoints
    method = RepresentationSimilarity(*arguments).fit([found.train])
    x, y = found.targets
    for batch in [(x,), (x, y, y), x]:
        with pytest.raises(
            BatchError, match=r"A batch is \(inputs, labels\), or a map"
        ):
            method.score([batch])
    with pytest.raises(BatchError, match="targets is a list_iterator"):
        method.score(iter([found.targets]))
    for labels, message in [
        (y.double(), "a whole number for each"),
        (torch.stack([y, y], dim=1), r"one label for each of 4 .*\(4, 2\)"),
    ]:
        with pytest.raises(BatchError, match=message):
            RepresentationSimilarity(*arguments, same_label=True).fit([(x, labels)])


def test_other_features_are_refused():
    found = problem()
    layer = lambda model, batch: batch[0]  # noqa: E731
    method = RepresentationSimilarity(found.model, found.checkpoints, layer)
    method.fit([found.train])
    with pytest.raises(
        BatchError, match=r"targets have 5 features each and training .* 4"
    ):
        method.score([(draw(3, 5), torch.zeros(3))])


def test_features_are_finite():
    found = problem()
    found.train[0][7, 2] = torch.nan
    method = RepresentationSimilarity(found.model, found.checkpoints)
    with pytest.raises(NonFiniteError, match="example 7 of train are not") as caught:
        method.fit(cut(found.train, 3))
    assert caught.value.index == 7


def test_features_and_products_fit_float32():
    found = problem(checkpoints=1)
    layer = lambda model, batch: batch[0]  # noqa: E731
    found.train[0][7, 2] = 1e39  # finite in the model's float64
    for metric in ("cosine", "dot", "l2"):
        method = RepresentationSimilarity(found.model, found.checkpoints, layer, metric)
        with pytest.raises(
            NonFiniteError, match="example 7 of train are not finite in"
        ):
            method.fit([found.train])
    found.train[0][7, 2] = 1e30
    large = found.train[0][7:8], found.train[1][7:8]
    dot = RepresentationSimilarity(found.model, found.checkpoints, layer, "dot")
    with pytest.raises(NonFiniteError, match="overflows float32; pass metric='cosine'"):
        dot.fit([found.train]).score([large])
    cosine = RepresentationSimilarity(found.model, found.checkpoints, layer)
    assert cosine.fit([found.train]).score([large])[7] == 1


def test_a_fit_that_fails_leaves_nothing_to_score_with():
    found = problem()
    method = RepresentationSimilarity(found.model, found.checkpoints).fit([found.train])
    broken = found.train[0].clone()
    broken[7, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="example 7 of train"):
        method.fit([(broken, found.train[1])])
    with pytest.raises(OrderError, match="fit it first"):
        method.score([found.targets])


def test_loaders_that_shuffle_are_refused():
    """Features of several checkpoints would be of different examples."""
    found = problem()

    def loader(batch):
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*batch),
            batch_size=4,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
        )

    method = RepresentationSimilarity(found.model, found.checkpoints)
    with pytest.raises(BatchError, match="train gave other examples, or another order"):
        method.fit(loader(found.train))
    method.fit([found.train])
    with pytest.raises(BatchError, match="targets gave other examples"):
        method.score(loader(found.targets))


def test_inputs_are_not_written_to():
    found = problem()
    before = found.train[0].clone()
    layer = lambda model, batch: batch[0].neg_()  # noqa: E731
    method = RepresentationSimilarity(found.model, found.checkpoints, layer, "dot")
    scores = method.fit([found.train]).score([found.train])
    torch.testing.assert_close(found.train[0], before, rtol=0, atol=0)
    assert_scores(torch.from_numpy(scores), before @ before.T, 1e-5)


def test_empty_batches_count_for_nothing():
    found = problem()
    empty = tuple(part[:0] for part in found.train)
    method = RepresentationSimilarity(found.model, found.checkpoints)
    expected = method.fit([found.train]).score([found.targets])
    scores = method.fit([empty, found.train]).score([found.targets, empty])
    np.testing.assert_array_equal(scores, expected)


def test_checkpoints_stay_what_they_are():
    found = problem()
    method = RepresentationSimilarity(found.model, found.checkpoints).fit([found.train])
    found.checkpoints[1]["0.bias"] += 1
    with pytest.raises(
        CheckpointError, match="checkpoint 1 has other weights than when"
    ):
        method.score([found.targets])


def test_one_state_dict_is_no_list_of_them(untyped):
    found = problem()
    with pytest.raises(CheckpointError, match=r"such as \[state_dict\]"):
        RepresentationSimilarity(found.model, found.checkpoints[0])


@pytest.mark.parametrize("layer", [None, "bert.encoder.layer.0"])
def test_models_of_transformers(layer):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=9,
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config)
    batch = {**texts(), "labels": torch.tensor([0, 1, 0, 1, 0, 1])}
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    method = RepresentationSimilarity(model, [model.state_dict()], layer, "dot")
    scores = method.fit([batch]).score([batch])
    with torch.no_grad():
        found = model.bert(**inputs, output_hidden_states=True)
    features = found.pooler_output
    if layer is not None:
        mask = batch["attention_mask"][..., None]
        features = (found.hidden_states[1] * mask).sum(1) / mask.sum(1).clamp(min=1)
    assert_scores(torch.from_numpy(scores), features @ features.T, 1e-4)
