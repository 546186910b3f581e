"""The models of the matrix: small, with random weights, of real classes, and their batches.

Each is made with its default attention, in whatever type is the default of its class.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trak._params import flatten_rows
from trak.gradient_computers import HookGradientComputer
from trak.modelout_functions import resolve_task

IDS = torch.tensor([
    [3, 9, 4, 1, 5, 9, 2],
    [6, 5, 3, 5, 8, 9, 0],
    [7, 9, 3, 2, 0, 0, 0],
])
"""Three texts, two of them padded at the end."""

MASK = (IDS > 0).long()

Batch = Any


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def randomize(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Draw all weights anew, exact in float32; in evaluation mode."""
    model = model.to(dtype).eval()
    for i, value in enumerate(model.parameters()):
        fan_in = value[0].numel() if value.ndim == 4 else 1  # or images overflow
        drawn = draw(*value.shape, seed=i) / 2 / fan_in**0.5
        value.data = drawn.float().to(dtype)
    return model


# -- batches ------------------------------------------------------------------------------


def texts(dtype: torch.dtype) -> Batch:
    return {
        "input_ids": IDS,
        "attention_mask": MASK,
        "labels": IDS.where(IDS > 0, -100),
    }


def masked(dtype: torch.dtype) -> Batch:
    batch = texts(dtype)
    labels = batch["labels"].where(torch.arange(IDS.shape[1]) % 2 == 1, -100)
    return {**batch, "labels": labels}


def one_label(dtype: torch.dtype) -> Batch:
    return {"input_ids": IDS, "attention_mask": MASK, "labels": torch.arange(3) % 2}


def images(dtype: torch.dtype) -> Batch:
    return {
        "pixel_values": draw(3, 3, 8, 8).float().to(dtype),
        "labels": torch.arange(3) % 2,
    }


ENDED = IDS.where(torch.arange(7) != 5, 29)
"""CLIP takes a text where its last token is, which has the greatest number."""


def pairs(dtype: torch.dtype) -> Batch:
    return {"image": draw(3, 3, 32, 32).float().to(dtype), "text": ENDED}


# -- models -------------------------------------------------------------------------------

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
HEADS = {**GROUPED, "head_dim": 8}
POSITIONS = {**SIZES, "max_position_embeddings": 32}
GPT2 = {
    "vocab_size": 30,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
DISTILBERT = {
    "vocab_size": 30,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 12,
}
T5 = {
    "vocab_size": 30,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 30,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
MIXTRAL = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
DEBERTA = {
    **POSITIONS,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 4,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
VIT = {k: v for k, v in SIZES.items() if not k.endswith(("size", "id"))} | {
    "hidden_size": 16,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
}
CLIP = {
    "text_config": {**POSITIONS, "eos_token_id": 29},
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "image_size": 32,
        "patch_size": 16,
    },
    "projection_dim": 8,
}
GEMMA3 = {**HEADS, "sliding_window": 4, "layer_types": None}


class Pairs(nn.Module):
    """CLIP of transformers, called as the task does."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, image: Tensor, text: Tensor) -> Any:
        mask = torch.ones_like(text)
        return self.clip(input_ids=text, pixel_values=image, attention_mask=mask)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A line of the matrix."""

    title: str
    """The family."""

    kind: str
    """The model's class in transformers, or its encoder in open_clip."""

    task: str
    """The name of the task."""

    batch: Callable[[torch.dtype], Batch]
    """Makes the examples, of the model's type where they are not integers."""

    options: dict[str, Any] = field(default_factory=dict)
    """What its configuration is made with."""

    config: str = ""
    """The configuration's class, if it is not named after the model's."""

    library: str = "transformers"
    """Where the class is."""

    exact: dict[str, Any] = field(default_factory=dict)
    """What its configuration needs besides to compute in float64."""

    alike: bool = False
    """Whether another line has nearly the same layers, and tests can do without it."""

    batched_from: int = 0
    """Major version of its library before which a part of it is looped over."""

    @property
    def dtype(self) -> torch.dtype:
        """The widest type that it computes in as it is."""
        return torch.float32 if self.exact else torch.float64

    def absence(self) -> str:
        """Say why it cannot be made here; empty if it can."""
        define_operators()  # as transformers imports torchvision where there is one
        if importlib.util.find_spec(self.library) is None:
            return f"{self.library} is not installed"
        if self.library == "transformers":
            import transformers

            names = (self.config or _config_of(self.kind), self.kind)
            for name in names:
                if not hasattr(transformers, name):
                    return f"transformers {transformers.__version__} has no {name}"
        return ""

    def is_batched(self) -> bool:
        """Tell whether all of it is served in one pass by the installed library."""
        if not self.batched_from:
            return True
        found = importlib.metadata.version(self.library)
        return int(found.split(".")[0]) >= self.batched_from

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Build the model, with the same random weights in every process."""
        if self.library == "open_clip":
            return randomize(open_clip_model(self.options), dtype)
        import transformers

        options = dict(self.options)
        if dtype == torch.float64:
            options |= self.exact
        config = getattr(transformers, self.config or _config_of(self.kind))
        model = getattr(transformers, self.kind)(config(**options))
        if self.task == "clip":
            model = Pairs(model)
        return randomize(model, dtype)


def _config_of(kind: str) -> str:
    for ending in ("LMHeadModel", "For", "Model"):
        kind = kind.split(ending)[0]
    return kind + "Config"


def define_operators() -> None:
    """Let a torchvision that was built for CUDA be imported beside a torch without.

    It lacks operators that no model here needs. One that belongs to this torch has them,
    and could not be imported once others have defined them.
    """
    if torch.version.cuda or not importlib.util.find_spec("torchvision"):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchvision")
    except RuntimeError:
        for name in [it for it in sys.modules if it.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            box = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", box)


def open_clip_model(options: dict[str, Any]) -> nn.Module:
    """Build a model of open_clip."""
    import open_clip.model

    return open_clip.model.CLIP(**options)


def _open_clip(**vision: Any) -> dict[str, Any]:
    text = {
        "context_length": 7,
        "vocab_size": 30,
        "width": 16,
        "heads": 2,
        "layers": 2,
    }
    return {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "width": 16, **vision},
        "text_cfg": text,
        "output_dict": True,
    }


ARCHITECTURES = (
    Architecture("GPT-2", "GPT2LMHeadModel", "causal_lm", texts, GPT2),
    Architecture(
        "Llama (grouped queries, tied)",
        "LlamaForCausalLM",
        "causal_lm",
        texts,
        {**GROUPED, "tie_word_embeddings": True},
    ),
    Architecture(
        "Mistral", "MistralForCausalLM", "causal_lm", texts, GROUPED, alike=True
    ),
    Architecture("Qwen2", "Qwen2ForCausalLM", "causal_lm", texts, GROUPED, alike=True),
    Architecture("Qwen3", "Qwen3ForCausalLM", "causal_lm", texts, HEADS),
    Architecture("Gemma", "GemmaForCausalLM", "causal_lm", texts, HEADS, alike=True),
    Architecture("Gemma 2", "Gemma2ForCausalLM", "causal_lm", texts, HEADS, alike=True),
    Architecture(
        "Gemma 3", "Gemma3ForCausalLM", "causal_lm", texts, GEMMA3, "Gemma3TextConfig"
    ),
    Architecture("GPT-NeoX", "GPTNeoXForCausalLM", "causal_lm", texts, SIZES),
    Architecture(
        "BLOOM (ALiBi)",
        "BloomForCausalLM",
        "causal_lm",
        texts,
        {"vocab_size": 30, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    Architecture(
        "OPT",
        "OPTForCausalLM",
        "causal_lm",
        texts,
        {**POSITIONS, "ffn_dim": 12, "word_embed_proj_dim": 16},
    ),
    Architecture("Phi", "PhiForCausalLM", "causal_lm", texts, POSITIONS, alike=True),
    Architecture(
        "Mixtral",
        "MixtralForCausalLM",
        "causal_lm",
        texts,
        MIXTRAL,
        exact={"experts_implementation": "eager"},  # the fused product has no float64
        batched_from=5,  # a module for each expert before, which gets some rows only
    ),
    Architecture("BERT", "BertForMaskedLM", "masked_lm", masked, SIZES),
    Architecture(
        "BERT, one label a text",
        "BertForSequenceClassification",
        "text_classification",
        one_label,
        SIZES,
    ),
    Architecture(
        "RoBERTa", "RobertaForMaskedLM", "masked_lm", masked, POSITIONS, alike=True
    ),
    Architecture(
        "DistilBERT",
        "DistilBertForMaskedLM",
        "masked_lm",
        masked,
        DISTILBERT,
    ),
    Architecture(
        "ModernBERT",
        "ModernBertForMaskedLM",
        "masked_lm",
        masked,
        {**SIZES, "cls_token_id": 1, "sep_token_id": 1},
    ),
    Architecture(
        "ELECTRA",
        "ElectraForMaskedLM",
        "masked_lm",
        masked,
        {**POSITIONS, "embedding_size": 8},
        alike=True,
    ),
    Architecture("DeBERTa-v2", "DebertaV2ForMaskedLM", "masked_lm", masked, DEBERTA),
    Architecture("T5", "T5ForConditionalGeneration", "seq2seq_lm", texts, T5),
    Architecture(
        "mT5", "MT5ForConditionalGeneration", "seq2seq_lm", texts, T5, alike=True
    ),
    Architecture("BART", "BartForConditionalGeneration", "seq2seq_lm", texts, BART),
    Architecture(
        "ViT", "ViTForImageClassification", "image_classification", images, VIT
    ),
    Architecture("CLIP", "CLIPModel", "clip", pairs, CLIP),
    Architecture(
        "open_clip ViT",
        "ViT",
        "clip",
        pairs,
        _open_clip(layers=2, head_width=8, patch_size=16),
        library="open_clip",
    ),
    Architecture(
        "open_clip ResNet",
        "ModifiedResNet",
        "clip",
        pairs,
        _open_clip(layers=[1, 1, 1, 1], head_width=8),
        library="open_clip",
    ),
)


# -- gradients ----------------------------------------------------------------------------


def other(batch: Batch) -> Batch:
    """Draw other images, and other tokens in the same places."""
    made = dict(batch)
    for key in ("input_ids", "labels", "text"):
        if key in made and made[key].ndim > 1:
            ids = made[key]
            made[key] = ((ids * 5) % 27 + 2).where((ids > 0) & (ids < 29), ids)
    return {k: x.sin() if x.is_floating_point() else x for k, x in made.items()}


def task_of(it: Architecture, dtype: torch.dtype) -> Any:
    """Build the task; CLIP's with twenty pairs to compare with."""
    task = resolve_task(it.task)
    if it.task == "clip":
        pairs = [draw(20, 8, seed=seed).float().to(dtype) for seed in range(2)]
        task.set_embeddings(*pairs)
    return task


def engine_gradients(
    it: Architecture, dtype: torch.dtype
) -> tuple[Tensor, HookGradientComputer]:
    """Compute what the default engine does: (b, d), in float64.

    It has proved itself on other examples before, as on the first batch of a job.

    Returns:
        The gradients, and the engine.
    """
    task, batch = task_of(it, dtype), it.batch(dtype)
    computer = HookGradientComputer(it.make(dtype), task)
    computer.compute_per_sample_grad({
        key: x.flip(0) for key, x in other(batch).items()
    })
    grads = computer.compute_per_sample_grad(batch)
    return flatten_rows(grads).double(), computer


def loop_gradients(it: Architecture) -> tuple[Tensor, torch.dtype]:
    """Compute them one example and one backward pass at a time.

    Returns:
        The gradients, of shape (b, d), in float64; and the type they were computed in,
        float64 but for models whose code is for float32 only, as some were once.

    Raises:
        RuntimeError: What else the model raises.
    """
    try:
        return _looped(it, torch.float64), torch.float64
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
    return _looped(it, torch.float32).double(), torch.float32


def _looped(it: Architecture, dtype: torch.dtype) -> Tensor:
    model, task, batch = it.make(dtype), task_of(it, dtype), it.batch(dtype)
    parameters, rows = list(model.parameters()), []
    for i in range(3):
        example = {key: value[i : i + 1] for key, value in batch.items()}
        output = task.get_outputs(model, None, None, example)[0]
        grads = torch.autograd.grad(
            output, parameters, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    return torch.stack(rows)
