"""Models with adapters of PEFT: what is attributed, gradients, checkpoints, the store."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import architectures_models as models
from benchmarks.architectures_models import IDS, MASK
from tests.problems import draw
from tests.test_hooks_models import assert_exact, compute
from trak import TRAKer
from trak._checkpoints import load_weights
from trak._params import select_parameters
from trak.errors import CheckpointError, OptionError
from trak.gradient_computers._ladder import HOOKED, Rung

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT calls what transformers deprecates, and warns of tied heads.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft"
)

SIZES = {**models.SIZES, "max_position_embeddings": 16}
QUERIES = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value"]}


def base_of(kind: str) -> nn.Module:
    model: nn.Module
    if kind == "llama":
        config = transformers.LlamaConfig(
            **SIZES, num_key_value_heads=1, tie_word_embeddings=True
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            **SIZES,
            num_labels=3,
            hidden_dropout_prob=0.3,
            attention_probs_dropout_prob=0.2,
        )
        model = transformers.BertForSequenceClassification(config)
    return filled(model.double())


def filled(model: nn.Module, seed: int = 0, *, only_trained: bool = False) -> nn.Module:
    """Random weights for everything; adapters begin with zeros otherwise."""
    with torch.no_grad():
        for i, value in enumerate(model.parameters()):
            if value.requires_grad or not only_trained:
                value.copy_(0.3 * draw(*value.shape, seed=seed + i))
    return model


def adapted(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    task = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}[kind]
    options = {"r": 2, "target_modules": QUERIES[kind], "lora_dropout": 0.4, **changes}
    config = peft.LoraConfig(task_type=task, **options)
    model: nn.Module = peft.get_peft_model(base_of(kind), config)
    model = model.double()
    return filled(model, 100 + seed, only_trained=True).eval()


def batch_of(kind: str) -> dict[str, Tensor]:
    batch = {"input_ids": IDS, "attention_mask": MASK}
    return batch if kind == "llama" else {**batch, "labels": torch.tensor([0, 2, 1])}


TASKS = {"llama": "causal_lm", "bert": "text_classification"}


# -- gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "bias": "lora_only"}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("bert", {}),
        ("bert", {"modules_to_save": ["classifier", "pooler"]}),
    ],
)
def test_adapters_have_exact_gradients(kind: str, changes: dict[str, Any]) -> None:
    model = adapted(kind, **changes)
    found, known, computer = compute(model, batch_of(kind), TASKS[kind])
    assert_exact(found, known)
    rungs = computer.coverage.rungs
    assert all(rung in HOOKED for rung in rungs.values())
    parts = ("lora_", "modules_to_save", "bias")
    assert all(any(part in name for part in parts) for name in rungs)
    assert sum("lora_" in name for name in rungs) == 2 * 2 * len(QUERIES[kind])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_magnitudes_of_dora(kind: str) -> None:
    """No rule knows them, and their modules are run again, which coverage says."""
    model = adapted(kind, use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, known, computer = compute(model, batch_of(kind), TASKS[kind])
    assert_exact(found, known)
    rungs = computer.coverage.rungs
    served = {rung for name, rung in rungs.items() if "magnitude" in name}
    assert served == {Rung.MODULE}
    assert sum("magnitude" in name for name in rungs) == 2 * len(QUERIES[kind])


# -- what is attributed ------------------------------------------------------------------


def test_adapters_are_attributed_and_nothing_else(tmp_path: Path) -> None:
    model = adapted("bert")
    names = select_parameters(model).names
    assert len(names) > 0
    traker = TRAKer(model, "text_classification", 3, tmp_path, logging_level=100)
    assert traker.options.selection.names == names
    model.save_pretrained(tmp_path / "adapter")
    inference = peft.PeftModel.from_pretrained(base_of("bert"), tmp_path / "adapter")
    with pytest.raises(
        OptionError, match=r"is_trainable=True\), or call requires_grad_"
    ):
        TRAKer(inference, "text_classification", 3, tmp_path / "2")
    trainable = peft.PeftModel.from_pretrained(
        base_of("bert"), tmp_path / "adapter", is_trainable=True
    )
    assert select_parameters(trainable.double()).names == names


# -- checkpoints and the store -----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("bert", {"modules_to_save": ["classifier"]}),
        ("bert", {"use_dora": True}),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "bin", "state_dict", "whole"])
def test_checkpoints_of_adapters(
    tmp_path: Path, kind: str, changes: dict[str, Any], form: str
) -> None:
    trained = adapted(kind, seed=7, **changes)
    known = load_weights(trained, trained.state_dict())
    trained.save_pretrained(tmp_path, safe_serialization=form != "bin")
    checkpoint: Any = tmp_path
    if form == "state_dict":
        checkpoint = peft.get_peft_model_state_dict(trained)
        assert not any("default" in key for key in checkpoint)
    elif form == "whole":
        checkpoint = {k: v.clone() for k, v in trained.state_dict().items()}
    model = adapted(kind, **changes)
    assert load_weights(model, checkpoint) == known
    torch.testing.assert_close(dict(model.state_dict()), dict(trained.state_dict()))
    wrapped = nn.DataParallel(adapted(kind, **changes))
    assert load_weights(wrapped, checkpoint) == known


def test_the_same_store_with_and_without_the_wrapper(tmp_path: Path) -> None:
    model = adapted("bert")
    inner = model.base_model.model
    assert (
        select_parameters(model).fingerprint() == select_parameters(inner).fingerprint()
    )
    options: dict[str, Any] = {"proj_dim": 16, "logging_level": 100}
    rows = []
    for one in (model, inner):
        store = tmp_path / str(len(rows))
        traker = TRAKer(one, "text_classification", 3, store, **options)
        traker.load_checkpoint(model.state_dict())
        traker.featurize(batch_of("bert"))
        rows.append(torch.from_numpy(traker.saver.current_store["grads"] + 0.0))
    assert torch.equal(*rows)
    traker = TRAKer(inner, "text_classification", 3, tmp_path / "0", **options)
    traker.load_checkpoint(inner.state_dict())
    assert list(traker.saver.model_ids) == [0]


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    trained = adapted("bert")
    adapters = peft.get_peft_model_state_dict(trained)
    with pytest.raises(CheckpointError, match=r"holds adapters; put them on the model"):
        load_weights(base_of("bert"), adapters)
    first = next(iter(adapters))
    part = {key: value for key, value in adapters.items() if key != first}
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(adapted("bert"), part)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(adapted("bert"), base_of("bert").state_dict())
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(adapted("bert"), {})
    with pytest.raises(CheckpointError, match=r"lora_A.weight' has shape \(4, 16\)"):
        load_weights(
            adapted("bert"), peft.get_peft_model_state_dict(adapted("bert", r=4))
        )


# -- checkpoints of transformers ---------------------------------------------------------


@pytest.mark.parametrize("size", ["50GB", "4KB"])
def test_checkpoints_of_transformers(tmp_path: Path, size: str) -> None:
    """Tied weights are left out of the files, and big ones are cut."""
    trained = base_of("llama")
    known = load_weights(trained, trained.state_dict())
    trained.save_pretrained(tmp_path, max_shard_size=size)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (size == "4KB")
    if index.exists():
        assert "lm_head.weight" not in json.loads(index.read_text())["weight_map"]
    model = filled(base_of("llama"), 50)
    assert load_weights(model, tmp_path) == known
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=1)
    )
    with pytest.raises(CheckpointError, match=r"missing \['lm_head.weight'\]"):
        load_weights(untied, tmp_path)
