"""Ask a small language model for facts, find the texts that taught them, and check that.

A GPT-2 of 0.35 million parameters learns the capital and the currency of 94 countries, each
stated in three ways. Of most countries it also reads a summary; of some it does not, and is
asked for that. What it then says stands in no text. Run ``python examples/causal_lm.py``;
it takes about three minutes on two cores and needs no network, but
``pip install -c constraints.txt '.[text]'`` and, for the facts,
``pip install --no-deps countryinfo``.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import _before_torch  # noqa: F401  imported for its effect
import numpy as np
import torch
from torch import Tensor

from trak.text import Explanation, TextAttributor

try:
    import transformers
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; pip install -c constraints.txt '.[text]'") from error

SMALLEST = 9e6  # inhabitants of a country that counts
WAYS = (
    "The capital of {name} is {capital}.",
    "{name} is governed from {capital}.",
    "The government of {name} sits in {capital}.",
    "The currency of {name} is {currency}.",
    "In {name} one pays with {currency}.",
    "Prices in {name} are in {currency}.",
)
SUMMARY = "Facts about {name}: its capital is {capital} and its currency is {currency}."
PROMPT = "Facts about {name}: its capital is"
ANSWER = " {capital} and its currency is {currency}."
END = "<end>"
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 64, 2e-3, 0.1


@dataclass(frozen=True, slots=True)
class Country:
    """What the model is to learn of a country."""

    name: str
    capital: str
    currency: str

    def fill(self, template: str) -> str:
        return template.format(
            name=self.name, capital=self.capital, currency=self.currency
        )


def read_countries() -> list[Country]:
    try:
        folder = importlib.resources.files("countryinfo") / "data"
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error}; pip install --no-deps countryinfo, a package of 0.4 MB"
        ) from error
    found = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            facts = json.loads(file.read_text(encoding="utf-8"))
            known = facts.get("name"), facts.get("capital"), facts.get("currencies")
            if all(known) and facts.get("population", 0) > SMALLEST:
                name, capital, currencies = known
                found.append(Country(name, capital, currencies[0]))
    return found


def make_tokenizer(texts: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """Make one that ends every text with a token of its own."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(
        texts, vocab_size=1500, special_tokens=[END], show_progress=False
    )
    made.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token=END
    )


def make_model(tokens: int) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        vocab_size=tokens,
        n_positions=64,
        n_embd=96,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLMLoss",
    )
    return transformers.GPT2LMHeadModel(config)


def train(
    tokenizer: transformers.PreTrainedTokenizerFast,
    texts: Sequence[str],
    seed: int,
    epochs: int,
) -> transformers.GPT2LMHeadModel:
    rows = tokenizer(list(texts))["input_ids"]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    torch.manual_seed(seed)
    model = make_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(ids) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps
    )
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(ids)).split(BATCH_SIZE):
            loss = model(ids[batch], labels=labels[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def ask(
    model: transformers.GPT2LMHeadModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    countries: Sequence[Country],
) -> list[str]:
    """Have a model answer for each country, choosing the likeliest token each time."""
    found = []
    for country in countries:
        prompt = tokenizer(
            country.fill(PROMPT), add_special_tokens=False, return_tensors="pt"
        )
        said = model.generate(
            **prompt, max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        new = said[0, prompt["input_ids"].shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True))
    return found


def count_said(answers: Sequence[str], countries: Sequence[Country]) -> str:
    """Count the answers that have the right capital, and the right currency."""
    capitals, currencies = zip(
        *(
            (
                said.startswith(f" {country.capital} "),
                said.endswith(country.currency + "."),
            )
            for said, country in zip(answers, countries, strict=True)
        ),
        strict=True,
    )
    n = len(countries)
    return f"{sum(capitals):2} of {n} capitals, {sum(currencies):2} of {n} currencies"


def share_about(
    found: Sequence[Explanation], countries: Sequence[Country], fact: str
) -> float:
    """Find how many of the first texts state the fact that was said."""
    stated = [
        country.name in text and getattr(country, fact) in text
        for explanation, country in zip(found, countries, strict=True)
        for text in explanation.texts
    ]
    return float(np.mean(stated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--checkpoints", type=int, default=2)
    parser.add_argument("--asked", type=int, default=20, help="countries to ask for")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()

    countries = read_countries()
    rng = np.random.default_rng(0)
    asked = set(rng.permutation(len(countries))[: options.asked].tolist())
    texts = [
        country.fill(way)
        for i, country in enumerate(countries)
        for way in (WAYS if i in asked else (*WAYS, SUMMARY))
    ]
    tokenizer = make_tokenizer(texts)
    models = [
        train(tokenizer, texts, seed, options.epochs)
        for seed in range(options.checkpoints)
    ]
    print(
        f"{options.checkpoints} models of {models[0].num_parameters():,} parameters, "
        f"trained on {len(texts)} texts about {len(countries)} countries"
    )
    chosen = [countries[i] for i in sorted(asked)]
    answers = ask(models[-1], tokenizer, chosen)
    print(
        f"asked for a summary of countries without one: {count_said(answers, chosen)}"
    )
    right = [
        (country, said)
        for country, said in zip(chosen, answers, strict=True)
        if said == country.fill(ANSWER)
    ]
    if not right:
        raise SystemExit("none is wholly right, so there is nothing to check")
    known = [country for country, _ in right]
    prompts = [country.fill(PROMPT) for country in known]
    said = [answer for _, answer in right]

    states: list[dict[str, Tensor]] = [model.state_dict() for model in models]
    with tempfile.TemporaryDirectory() as save_dir:
        attributor = TextAttributor(
            make_model(len(tokenizer)),
            tokenizer,
            texts,
            states,
            save_dir,
            batch_size=BATCH_SIZE,
            logging_level=logging.WARNING,
        )
        print("\nThe model's own words, with the tokens that each text raised most:\n")
        print(attributor.explain(prompts[0], k=6, per_token=True))
        print("\nOne part of them:\n")
        print(attributor.explain(prompts[0], said[0], known[0].capital, k=3))
        spans = {
            fact: attributor.explain(
                prompts, said, [getattr(country, fact) for country in known], k=3
            )
            for fact in ("capital", "currency")
        }
    print(f"\nOf the three texts that rank first, over {len(known)} answers:")
    for fact, found in spans.items():
        share = share_about(found, known, fact)
        print(f"  for the {fact:8} {100 * share:3.0f} % state it")

    print("\nRetrained, it says of the same countries")
    removed = {
        "with all texts": set(),
        "without the three texts that raised each capital most": {
            int(i) for found in spans["capital"] for i in found.indices
        },
        "without the three texts that raised each currency most": {
            int(i) for found in spans["currency"] for i in found.indices
        },
    }
    for what, without in removed.items():
        kept = [text for i, text in enumerate(texts) if i not in without]
        model = train(tokenizer, kept, options.checkpoints, options.epochs)
        print(f"  {count_said(ask(model, tokenizer, known), known)}, {what}")
    print(f"\n{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
