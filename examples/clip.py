"""Train a small CLIP on emoji, and ask which pairs taught it to match a drawing and words.

Run ``python examples/clip.py``; it fetches four npm packages (137 MB) once, takes about one
minute on two cores, and writes a picture and the scores into ``./clip_results``. It needs
``pip install -c constraints.txt '.[demo,text]'``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched from there

import _before_torch  # noqa: F401  imported for its effect
import _clip_model as clip_model
import _clip_picture as picture
import _emoji as emoji
import _emoji_pairs as emoji_pairs
import numpy as np
from tqdm.auto import tqdm

from trak import TRAKer
from trak.modelout_functions import CLIPModelOutput

N_CHECKPOINTS = 3
N_PICTURED = 8


def attribute(
    question: emoji_pairs.Question, store: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Train, score; return scores (n, m), and each target's median rank of its text (m,)."""
    train, targets = question.train, question.targets
    model = clip_model.make_model(question.vocabulary)
    # What a pair is contrasted with: 300 training pairs, embedded by each checkpoint.
    task = CLIPModelOutput(pairs=train.batches())
    traker = TRAKer(model, task, len(train), store, logging_level=logging.WARNING)
    checkpoints, ranks = [], []
    for seed in range(N_CHECKPOINTS):
        print(f"model {seed + 1} of {N_CHECKPOINTS}", flush=True)
        everything = np.arange(len(train))
        trained = clip_model.train(
            train, everything, question.vocabulary, seed, verbose=True
        )
        checkpoints.append(trained.state_dict())
        ranks.append(clip_model.ranks(trained, targets))
    bar = tqdm(total=N_CHECKPOINTS * (len(train) + len(targets)), unit="pair")
    for checkpoint in checkpoints:
        traker.load_checkpoint(checkpoint)
        for batch in train.batches():
            traker.featurize(batch)
            bar.update(len(batch["input_ids"]))
    traker.finalize_features()
    for checkpoint in checkpoints:
        traker.start_scoring_checkpoint(checkpoint, num_targets=len(targets))
        for batch in targets.batches():
            traker.score(batch)
            bar.update(len(batch["input_ids"]))
    bar.close()
    return np.array(traker.finalize_scores()), np.median(ranks, axis=0)


def report(
    question: emoji_pairs.Question,
    scores: np.ndarray,
    ranks: np.ndarray,
    categories: list[str],
) -> list[int]:
    """Print what was found; return the best known target of each category."""
    m, n = len(question.targets), len(question.train)
    places = 1 + (scores > scores[question.twins, np.arange(m)]).sum(axis=0)
    print(
        f"\n{n} pairs to train on, {m} held-out drawings. The models find the words of a "
        f"held-out drawing\namong the first 10 of {m} for {(ranks <= 10).mean():.0%} "
        f"(chance: {10 / m:.0%}). The same emoji by the other vendor,\nwith other words, is "
        f"the top training pair of {(places == 1).mean():.0%} of the targets, and among "
        f"the first 10\nfor {(places <= 10).mean():.0%} (chance: {10 / n:.1%}).\n"
    )
    kinds = np.array(categories)[question.targets.emoji]
    known = [
        int(np.flatnonzero(kinds == kind)[ranks[kinds == kind].argmin()])
        for kind in np.unique(kinds)
    ]
    chosen = sorted(known, key=lambda target: ranks[target])[:N_PICTURED]
    for target in chosen:
        print(f"{question.targets.captions[target]!r} was taught by")
        for i in np.argsort(-scores[:, target])[:3]:
            vendor, caption = question.train.vendors[i], question.train.captions[i]
            print(f"    {1000 * scores[i, target]:+6.1f}  {vendor}: {caption!r}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("clip_results"))
    parser.add_argument(
        "--data", type=Path, help="pairs_32.npz, if it is built already"
    )
    parser.add_argument("--packages", type=Path, help="directory of the npm archives")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        drawn = (
            emoji.read(args.data) if args.data else emoji.load(args.out, args.packages)
        )
    except emoji.NotAvailableError as error:
        sys.exit(str(error))
    question = emoji_pairs.ask(drawn)
    scores, ranks = attribute(question, args.out / "store")
    categories = [entry["category"] for entry in drawn.meta]
    chosen = report(question, scores, ranks, categories)
    np.save(args.out / "scores.npy", scores)
    path = picture.draw(args.out / "clip.png", question, scores, chosen)
    print(f"\nPicture: {path.resolve()}")


if __name__ == "__main__":
    main()
