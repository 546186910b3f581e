"""Trace facts: which texts state a fact, and which texts does a model have it from?

``python examples/fact_tracing.py webnlg.jsonl.gz`` trains two small T5 on texts about
airports and their cities, asks them for facts in paraphrases that they have not seen, and
prints which texts TRAK and a search engine name. Then it takes the texts of some facts away,
trains again, and asks again. Eight minutes on two cores, with
``pip install -c constraints.txt '.[text]'``.

The file has a JSON object a line: ``category``, ``text``, and ``triples``, the facts that the
text states, as WebNLG has them (https://gitlab.com/shimorina/webnlg-dataset).
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import _before_torch  # noqa: F401  imported for its effect
import bm25s
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Config, T5ForConditionalGeneration

from trak import TRAKer
from trak.evaluation import mean_reciprocal_rank

CATEGORY, HOLE, PAD, END = "Airport", "<hole>", 0, 1
N_QUERIES, EPOCHS, REMOVED, N_FORGOTTEN = 100, 30, 10, 8


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).exists():
        print(
            "Pass WebNLG's texts: a .jsonl.gz with category, text and triples a line.\n"
            "They come from https://gitlab.com/shimorina/webnlg-dataset, and are not "
            "fetched here."
        )
        return 2
    texts, queries = read(Path(sys.argv[1]))
    stated = np.array([[q["fact"] in t["triples"] for q in queries] for t in texts])
    print(f"{len(texts)} texts, {len(queries)} facts asked for in other words")

    # The model fills a hole where a text had a name.
    tokenizer = learn_words([t["text"] for t in texts])
    train = encode(tokenizer, [with_hole(t) for t in texts])
    asked = encode(
        tokenizer, [(q["prompt"] + f" {HOLE}.", q["answer"]) for q in queries]
    )
    everything = np.arange(len(texts))
    checkpoints = [train_model(train, everything, seed, tokenizer) for seed in (0, 1)]
    right = np.mean([is_right(model, asked) for model in checkpoints], axis=0)
    print(f"the models have {right.mean():.0%} of the facts right")

    with tempfile.TemporaryDirectory() as store:
        scores = attribute(checkpoints, train, asked, store)
    found = {"TRAK": scores, "BM25": search(texts, queries)}
    print("\nMean reciprocal rank of the first text that states the fact:")
    for name, value in found.items():
        print(f"  {mean_reciprocal_rank(value, stated)}  {name}")

    known = np.flatnonzero(right == 1)
    for j in known[:3]:
        print(f"\n{queries[j]['prompt']} [{queries[j]['answer']}]")
        for i in np.argsort(-scores[:, j])[:4]:
            mark = "states it" if stated[i, j] else "         "
            print(f"  {scores[i, j]:+.3f}  {mark}  {texts[i]['text']}")

    print(
        f"\nWithout {REMOVED} texts for each of {N_FORGOTTEN} facts, of these are lost:"
    )
    facts = known[:N_FORGOTTEN]
    found["chance"] = np.random.default_rng(0).standard_normal(scores.shape)
    for name, value in found.items():
        gone = np.argsort(-value[:, facts], axis=0)[:REMOVED]
        left = np.setdiff1d(everything, gone)
        again = is_right(train_model(train, left, 2, tokenizer), asked)
        print(f"  {len(facts) - again[facts].sum()} of {len(facts)}  by {name}")
    return 0


# -- the data -------------------------------------------------------------------------


def read(path: Path) -> tuple[list[dict], list[dict]]:
    """Split into texts to train on, and facts to ask for in texts that are left out."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [r for r in rows if r["category"] == CATEGORY and len(r["triples"]) <= 2]
    texts = list({r["text"]: r for r in rows}.values())
    counts = Counter(fact for text in texts for fact in text["triples"])
    queries: dict[str, dict] = {}
    left_out = set()
    for i in np.random.default_rng(0).permutation(len(texts)):
        fact, said = texts[i]["triples"][0], texts[i]["text"].rstrip(".")
        name = object_of(fact)
        is_short = len(texts[i]["triples"]) == 1 and said.endswith(" " + name)
        if is_short and counts[fact] > 2 and fact not in queries:
            prompt = said[: -len(name) - 1]
            queries[fact] = {"fact": fact, "prompt": prompt, "answer": name}
            left_out.add(i)
        if len(queries) == N_QUERIES:
            break
    kept = [text for i, text in enumerate(texts) if i not in left_out]
    return kept, list(queries.values())


def object_of(fact: str) -> str:
    """``"Aarhus_Airport | cityServed | Aarhus"`` is about ``"Aarhus"``."""
    name = fact.split(" | ")[2].strip('"').replace("_", " ")
    return re.sub(r"\s*\([^)]*\)", "", name).strip()


def with_hole(text: dict) -> tuple[str, str]:
    """Take a name, or else the last word, out of a text."""
    for fact in text["triples"]:
        name = object_of(fact)
        if name and name in text["text"]:
            return text["text"].replace(name, HOLE), name
    *words, last = text["text"].rstrip(".").split(" ")
    return " ".join([*words, HOLE + "."]), last


def learn_words(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>", HOLE]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    return tokenizer


def encode(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> dict:
    """Give a batch as transformers has it: what is read, and the labels."""
    source, target = (
        torch.tensor([
            e.ids for e in tokenizer.encode_batch([s + "</s>" for s in side])
        ])
        for side in zip(*pairs, strict=True)
    )
    return {
        "input_ids": source,
        "attention_mask": (source != PAD).long(),
        "labels": target.where(target != PAD, -100),
    }


def part(data: dict, indices: np.ndarray) -> dict:
    """Take some rows, without the padding that they all have."""
    rows = {key: value[torch.from_numpy(indices)] for key, value in data.items()}
    source = int(rows["attention_mask"].sum(1).max())
    target = int((rows["labels"] != -100).sum(1).max())
    widths = {"input_ids": source, "attention_mask": source, "labels": target}
    return {key: rows[key][:, :width].contiguous() for key, width in widths.items()}


def search(texts: list[dict], queries: list[dict]) -> np.ndarray:
    index = bm25s.BM25()
    words = bm25s.tokenize([t["text"] for t in texts], show_progress=False)
    index.index(words, show_progress=False)
    wanted = [f"{q['prompt']} {q['answer']}" for q in queries]
    words = bm25s.tokenize(wanted, return_ids=False, show_progress=False)
    return np.stack([index.get_scores(one) for one in words], axis=1)


# -- the model ------------------------------------------------------------------------


def make_model(size: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=size,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return T5ForConditionalGeneration(config)


def train_model(
    data: dict, indices: np.ndarray, seed: int, tokenizer: Tokenizer
) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    model = make_model(tokenizer.get_vocab_size()).train()
    steps = EPOCHS * (len(indices) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(EPOCHS):
        shuffled = order.permutation(indices)
        for start in range(0, len(indices) - 31, 32):
            batch = part(data, shuffled[start : start + 32])
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
    print(f"trained on {len(indices)} texts")
    return model.eval()


@torch.no_grad()
def is_right(model: T5ForConditionalGeneration, asked: dict) -> np.ndarray:
    """Whether every piece of an answer is the likeliest one."""
    labels = asked["labels"]
    guesses = model(**asked).logits.argmax(-1)
    return ((guesses == labels) | (labels == -100)).all(1).numpy()


def attribute(checkpoints: list, train: dict, asked: dict, store: str) -> np.ndarray:
    n, m = len(train["labels"]), len(asked["labels"])
    model = make_model(checkpoints[0].config.vocab_size).eval()
    traker = TRAKer(model, "seq2seq_lm", n, store, logging_level=30)
    for checkpoint in checkpoints:
        traker.load_checkpoint(checkpoint.state_dict())
        for rows in np.array_split(np.arange(n), n // 64):
            traker.featurize(part(train, rows))
    traker.finalize_features()
    for checkpoint in checkpoints:
        traker.start_scoring_checkpoint(checkpoint.state_dict(), num_targets=m)
        traker.score(asked)
    return np.array(traker.finalize_scores())


if __name__ == "__main__":
    sys.exit(main())
