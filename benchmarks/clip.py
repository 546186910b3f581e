"""Which pairs taught a CLIP to match this drawing with these words? Retrieval and removal.

Run ``python benchmarks/clip.py``; it fetches four npm packages once, or takes what
``examples/_emoji.py`` built by ``--data``. Six minutes on one core; what is done is kept in
``--out``, and not done again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import _clip_model as clip_model
import _emoji as emoji
import _emoji_pairs as emoji_pairs

from trak.evaluation import (
    CounterfactualCurve,
    TargetMean,
    mean_reciprocal_rank,
    recall_at_k,
    remove_and_retrain,
)
from trak.methods import (
    TRAK,
    GradientCosine,
    GradientDot,
    ProjectedGradients,
    RepresentationSimilarity,
)
from trak.modelout_functions import CLIPModelOutput

N_CHECKPOINTS = 5
COUNTS = (1, 3, 5)
PROJ_DIM = 4096
BATCH_SIZE = 64
KNOWN_RANK = 10  # targets whose own text comes this early are asked about by retraining
OUT = Path(__file__).parent / "results" / "clip"

Weights = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="pairs_32.npz, if it is built already"
    )
    parser.add_argument("--packages", type=Path, help="directory of npm archives")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--targets", type=int, default=8, help="of the retraining")
    parser.add_argument("--repeats", type=int, default=2, help="seeds of a retraining")
    parser.add_argument("--random", type=int, default=3, help="random removals")
    parser.add_argument("--share", type=float, default=0.01, help="of pairs to remove")
    parser.add_argument(
        "--words", action="store_true", help="remove by shared words, too"
    )
    parser.add_argument("--no-retraining", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.data:
        drawn = emoji.read(options.data)
    else:
        drawn = emoji.load(options.out, options.packages)
    question = emoji_pairs.ask(drawn)
    checkpoints = train_checkpoints(question, options.out)
    known = report_checkpoints(question, checkpoints)
    scores = kept_scores(question, checkpoints, options.out)
    found: dict[str, Any] = {
        "retrieval": retrieve(question, scores),
        "words": look_at_words(question, scores),
    }
    if not options.no_retraining:
        found["removal"] = remove(question, scores, known, options)
    (options.out / "results.json").write_text(json.dumps(found, indent=2) + "\n")


def train_checkpoints(question: emoji_pairs.Question, out: Path) -> list[Weights]:
    """Train the models that are attributed, on all pairs."""
    checkpoints = []
    for seed in range(N_CHECKPOINTS):
        path = out / f"checkpoint_{seed}.pt"
        if not path.exists():
            rows = np.arange(len(question.train))
            model = clip_model.train(question.train, rows, question.vocabulary, seed)
            torch.save(model.state_dict(), path)
        checkpoints.append(torch.load(path, weights_only=True))
    return checkpoints


def report_checkpoints(
    question: emoji_pairs.Question, checkpoints: list[Weights]
) -> np.ndarray:
    """Print how well held-out drawings find their texts; return who is known. (m,)"""
    model, rows = clip_model.make_model(question.vocabulary).eval(), []
    for checkpoint in checkpoints:
        model.load_state_dict(checkpoint)
        rows.append(clip_model.ranks(model, question.targets))
    ranks, m = np.array(rows), len(question.targets)
    shares = [f"{(ranks <= k).mean():.3f} (chance {k / m:.3f})" for k in (1, 5, 10)]
    print(
        f"{len(question.train)} training pairs, {m} targets; text among the first "
        f"1, 5, 10 of {m} for a held-out drawing: {', '.join(shares)}",
        flush=True,
    )
    return np.median(ranks, axis=0) <= KNOWN_RANK


def joint(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings of image and text beside each other: their cosine is the mean of both."""
    output = model(**batch)
    return torch.cat([output.image_embeds, output.text_embeds], dim=1)


def kept_scores(
    question: emoji_pairs.Question, checkpoints: list[Weights], out: Path
) -> dict[str, np.ndarray]:
    """Score once: what is retrained without must be the same when the run goes on."""
    path = out / "scores.npz"
    if not path.exists():
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, **score(question, checkpoints, out))
        unfinished.replace(path)
    with np.load(path) as arrays:
        return dict(arrays)


def score(
    question: emoji_pairs.Question, checkpoints: list[Weights], out: Path
) -> dict[str, np.ndarray]:
    """Score every training pair for every target, by every method."""
    model = clip_model.make_model(question.vocabulary).eval()
    train = question.train.batches(BATCH_SIZE)
    targets = question.targets.batches(BATCH_SIZE)
    scores: dict[str, np.ndarray] = {}

    def of(name: str, method: Any) -> None:
        start = time.process_time()
        scores[name] = method.fit(train).score(targets)
        print(f"{name}: {time.process_time() - start:.0f} s", file=sys.stderr)

    # One pass of gradients serves every number of checkpoints.
    for count in COUNTS:
        shared = ProjectedGradients(
            model,
            CLIPModelOutput(pairs=train),
            checkpoints[:count],
            len(question.train),
            out / "gradients",
            proj_dim=PROJ_DIM,
            logging_level=logging.WARNING,
        )
        of(f"TRAK, {_checkpoints(count)}", TRAK(shared))
    suffix = _checkpoints(COUNTS[-1])
    of(f"gradient cosine, {suffix}", GradientCosine(shared))
    of(f"gradient product (TracIn), {suffix}", GradientDot(shared))
    layers: dict[str, Callable[..., Tensor]] = {
        "image": lambda model, batch: model(**batch).image_embeds,
        "text": lambda model, batch: model(**batch).text_embeds,
        "image and text": joint,
    }
    for name, layer in layers.items():
        similar = RepresentationSimilarity(model, checkpoints, layer)
        of(f"CLIP similarity of {name}, {suffix}", similar)
    pixels = RepresentationSimilarity(
        model, checkpoints[:1], lambda model, batch: batch["pixel_values"].flatten(1)
    )
    of("similarity of pixels", pixels)
    scores["shared words"] = shared_words(question)
    n, m = len(question.train), len(question.targets)
    scores["random"] = np.random.default_rng(0).random((n, m))
    return scores


def _checkpoints(count: int) -> str:
    return f"{count} checkpoint{'s' * (count > 1)}"


def shared_words(question: emoji_pairs.Question) -> np.ndarray:
    """Cosine of bags of words, rare ones counting more. (n, m)"""
    bags = []
    for pairs in (question.train, question.targets):
        bag = torch.zeros(len(pairs), question.vocabulary, dtype=torch.float64)
        ids = pairs.inputs["input_ids"]
        bag.scatter_(1, ids, 1.0)
        bag[:, : emoji_pairs.FIRST_WORD] = 0
        bags.append(bag)
    weights = torch.log(len(bags[0]) / bags[0].sum(0).clamp(min=1))
    left, right = (torch.nn.functional.normalize(bag * weights) for bag in bags)
    return (left @ right.T).numpy()


def retrieve(
    question: emoji_pairs.Question, scores: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Print how early each target's twin comes."""
    relevant = [[int(twin)] for twin in question.twins]
    print("\n| method | recall@1 | recall@10 | MRR |\n|---|---|---|---|")
    found = {}
    for name, array in scores.items():
        results = [recall_at_k(array, relevant, k) for k in (1, 10)]
        results.append(mean_reciprocal_rank(array, relevant))
        print(f"| {name} | {' | '.join(map(_cell, results))} |", flush=True)
        found[name] = [
            {"mean": result.mean, "interval": list(result.interval)}
            for result in results
        ]
    return found


def look_at_words(
    question: emoji_pairs.Question, scores: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Print how much of each method is words: do its top pairs share one, do twins?"""
    said = [
        [set(emoji_pairs.words(caption)) for caption in pairs.captions]
        for pairs in (question.train, question.targets)
    ]
    shares = np.array([[bool(ours & theirs) for theirs in said[1]] for ours in said[0]])
    columns = np.arange(shares.shape[1])
    with_word = shares[question.twins, columns]
    print(
        f"\n{with_word.sum()} of {len(with_word)} twins share a word with the target, and "
        f"{shares.mean():.1%} of all pairs\n\n| method | of the first 10 pairs, share a "
        f"word | recall@10 of twins that do | of those that do not |\n|---|---|---|---|"
    )
    found = {}
    for name, array in scores.items():
        top = np.argsort(-array, axis=0, kind="stable")[:10]
        rate = shares[top, columns].mean()
        recalls = [
            recall_at_k(array[:, some], [[int(t)] for t in question.twins[some]], 10)
            for some in (with_word, ~with_word)
        ]
        print(
            f"| {name} | {rate:.3f} | {' | '.join(map(_cell, recalls))} |", flush=True
        )
        found[name] = [float(rate), *(result.mean for result in recalls)]
    return found


def _cell(result: TargetMean) -> str:
    low, high = result.interval
    return f"{result.mean:.3f} [{low:.3f}, {high:.3f}]"


def remove(
    question: emoji_pairs.Question,
    scores: dict[str, np.ndarray],
    known: np.ndarray,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Retrain without the top pairs of some targets; print how far they fall."""
    rng = np.random.default_rng(1)
    chosen = rng.permutation(np.flatnonzero(known))[: options.targets]
    n, suffix = len(question.train), _checkpoints(COUNTS[-1])
    k = round(options.share * n)
    of = {
        "TRAK": f"TRAK, {suffix}",
        "CLIP similarity": f"CLIP similarity of image and text, {suffix}",
    }
    if options.words:
        of["shared words"] = "shared words"
    ranked = {name: scores[long][:, chosen] for name, long in of.items()}

    def train(indices: np.ndarray, seed: int) -> torch.nn.Module:
        return clip_model.train(question.train, indices, question.vocabulary, seed)

    def outputs(model: Any) -> np.ndarray:
        return clip_model.similarity(model, question.targets)[chosen]

    curves = remove_and_retrain(
        train,
        outputs,
        ranked,
        [k],
        options.out / f"removal_{len(of)}_{len(chosen)}.npz",
        n_random=options.random,
        n_repeats=options.repeats,
        metadata={"epochs": clip_model.EPOCHS, "targets": chosen.tolist()},
        progress=False,
    )
    print(
        f"\nFall of a target's similarity without {k} of {n} pairs, {len(chosen)} "
        f"targets, {options.repeats} seeds\n\n| removed | fall | more than at random |"
        f"\n|---|---|---|"
    )
    found = {}
    for name, curve in curves.items():
        more = curve.minus(curves["random"])
        print(f"| by {name} | {_point(curve)} | {_point(more)} |", flush=True)
        found[name] = {
            "fall": curve.per_target[0].tolist(),
            "interval": curve.interval[0].tolist(),
        }
    for name in [*of][1:]:
        between = curves["TRAK"].minus(curves[name])
        print(f"| TRAK minus {name} | {_point(between)} | |", flush=True)
    return found


def _point(curve: CounterfactualCurve) -> str:
    (low, high), mean = curve.interval[0], curve.mean[0]
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
