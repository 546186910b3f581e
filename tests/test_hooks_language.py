"""The default engine on language models of many kinds, against a loop over texts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.problems import draw
from tests.test_hooks_models import T5, assert_exact, compute, randomize
from trak.gradient_computers._ladder import Rung
from trak.gradient_computers._self_check import trimmed

IDS = torch.tensor([
    [3, 9, 4, 1, 5, 9, 2],
    [6, 5, 3, 5, 8, 9, 0],
    [7, 9, 3, 2, 0, 0, 0],
])
MASK = (IDS > 0).long()

# -- a bias that a head and its last layer hold ------------------------------------------


class Head(nn.Module):
    """As in BERT: the bias belongs to the head, and its last layer uses it."""

    def __init__(self, adds: float) -> None:
        super().__init__()
        self.adds = adds
        self.bias = nn.Parameter(draw(5))
        self.decoder = nn.Linear(4, 5)
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        found = self.decoder(x)
        return found + self.adds * self.bias if self.adds else found


@pytest.mark.parametrize("adds", [0.0, 2.0])
def test_a_parameter_under_two_names(adds: float) -> None:
    """The rule of the layer serves it, unless the head uses it as well."""
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Head(adds)))
    batch = draw(6, 3), torch.arange(6) % 5
    with warnings.catch_warnings():
        warnings.simplefilter("error" if not adds else "ignore")
        found, known, computer = compute(model, batch)
    assert_exact(found, known)
    served = computer.coverage.rungs["2.bias"]
    assert (served is Rung.LAYER) == (not adds)


# -- models of transformers --------------------------------------------------------------

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
SEQ2SEQ = {**T5, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT2LMHeadModel": (
        "causal_lm",
        "GPT2Config",
        {
            "vocab_size": 30,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
    "LlamaForCausalLM": (
        "causal_lm",
        "LlamaConfig",
        {**GROUPED, "tie_word_embeddings": True},
    ),
    "MistralForCausalLM": ("causal_lm", "MistralConfig", GROUPED),
    "Qwen2ForCausalLM": ("causal_lm", "Qwen2Config", GROUPED),
    "Qwen3ForCausalLM": ("causal_lm", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "Gemma2ForCausalLM": ("causal_lm", "Gemma2Config", {**GROUPED, "head_dim": 8}),
    "GPTNeoXForCausalLM": ("causal_lm", "GPTNeoXConfig", SIZES),
    "BloomForCausalLM": (
        "causal_lm",
        "BloomConfig",
        {"vocab_size": 30, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    "BertForMaskedLM": ("masked_lm", "BertConfig", SIZES),
    "RobertaForMaskedLM": (
        "masked_lm",
        "RobertaConfig",
        {**SIZES, "max_position_embeddings": 32},
    ),
    "DistilBertForMaskedLM": (
        "masked_lm",
        "DistilBertConfig",
        {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 12},
    ),
    "ModernBertForMaskedLM": (
        "masked_lm",
        "ModernBertConfig",
        {**SIZES, "cls_token_id": 1, "sep_token_id": 1},
    ),
    "T5ForConditionalGeneration": ("seq2seq_lm", "T5Config", SEQ2SEQ),
    "MT5ForConditionalGeneration": ("seq2seq_lm", "MT5Config", SEQ2SEQ),
}
RELATIVE = {"T5ForConditionalGeneration", "MT5ForConditionalGeneration"}
"""Their tables of relative positions have no batch axis, and are served one by one."""


@pytest.mark.parametrize("name", MODELS)
def test_language_models(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    task, config, options = MODELS[name]
    model = randomize(
        getattr(transformers, name)(getattr(transformers, config)(**options))
    )
    batch = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "labels": IDS.where(IDS > 0, -100),
    }
    if task == "masked_lm":
        batch["labels"] = batch["labels"].where(torch.arange(7) % 2 == 1, -100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in RELATIVE else "error")
        found, known, computer = compute(model, batch, task)
    scale = float(known.abs().max())
    torch.testing.assert_close(found, known, rtol=1e-7, atol=1e-9 * scale)
    slow = computer.coverage.share(Rung.VMAP) + computer.coverage.share(Rung.LOOP)
    assert slow < 0.1 if name in RELATIVE else slow == 0


def test_padding_of_a_source_is_not_cut_off_the_target() -> None:
    """Where both are equally long: the check of padding would compare other outputs."""
    ids = torch.tensor([[5, 6, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": ids + 1,
        "decoder_input_ids": ids + 2,
    }
    cut = trimmed(batch, is_seq2seq=True)
    assert {key: value.shape[1] for key, value in cut.items()} == {
        "input_ids": 2,
        "attention_mask": 2,
        "labels": 3,
        "decoder_input_ids": 3,
    }
    assert trimmed(batch)["labels"].shape == (1, 2)
