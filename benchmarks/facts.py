"""Fact tracing: which texts state a fact, and which texts a model has it from.

``python benchmarks/facts.py --data DIR [--models llama,t5,smollm2]`` trains language
models on texts of WebNLG, asks them for facts in paraphrases that they have not seen, and
prints two tables. The first, *retrieval*, is how well methods find the texts that state a
fact. The second, *counterfactual*, is how often a fact that a model knows is lost when
the texts that a method names are removed and it is trained again (Park et al., 2023,
Section 5.2, asks both questions of mT5). What is done is not done again: a run may be
killed and goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts_setting import KINDS, FactModel
from speed import proc_field, revision
from torch import nn

import trak
from trak import methods
from trak.evaluation import (
    GroundTruth,
    bootstrap_interval,
    mean_reciprocal_rank,
    recall_at_k,
    retrain_subsets,
)

HERE = Path(__file__).parent
EPOCHS_KEPT = 5
"""Epochs of one run that TracIn compares gradients at."""

REMOVED = 10
"""Texts that are removed for each fact."""

PARTS = ("models", "retrieval", "counterfactual")

KNOWN = 0.8
"""Share of the checkpoints that must have a fact right."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--models", default="llama,t5", help=",".join(KINDS))
    parser.add_argument("--work", type=Path, default=HERE / "results" / "facts")
    parser.add_argument("--checkpoints", type=int)
    parser.add_argument("--groups", type=int, help="of facts to be removed")
    parser.add_argument("--repeats", type=int, help="retrainings of each")
    parser.add_argument("--shard", default="0/1", help="retrain only these: 0/2, 1/2")
    parser.add_argument("--only", choices=["retrieval", "counterfactual"])
    parser.add_argument("--render", action="store_true", help="print what is stored")
    parser.add_argument("--page", type=Path, help="page that takes the tables")
    return parser.parse_args()


@dataclass(frozen=True)
class Run:
    """A model with its files."""

    model: FactModel
    work: Path

    @property
    def checkpoints(self) -> int:
        return self.model.checkpoints

    @cached_property
    def states(self) -> list[dict[str, torch.Tensor]]:
        """Train, or read, models on all texts."""
        return [self._state(f"{c}.pt", c) for c in range(self.checkpoints)]

    def _state(self, name: str, seed: int) -> dict[str, torch.Tensor]:
        path = self.work / "checkpoints" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._train(path.parent, seed)
        return torch.load(path, weights_only=True)

    def _train(self, folder: Path, seed: int) -> None:
        """Train a model; keep some epochs of the first one as well."""

        def keep(epoch: int, model: nn.Module) -> None:
            if seed == 0 and epoch in self.epochs:
                torch.save(model.state_dict(), folder / f"0-{epoch}.pt")

        model = self.model.train(np.arange(self.model.n), seed, keep)
        part = folder / f"{seed}.part"
        torch.save(model.state_dict(), part)
        part.replace(folder / f"{seed}.pt")
        print(f"{self.model.name}: trained {seed}", flush=True)

    @property
    def epochs(self) -> list[int]:
        last = self.model.recipe.epochs - 1
        return sorted({round(e) for e in np.linspace(last / 5, last, EPOCHS_KEPT)})

    @cached_property
    def known_before(self) -> np.ndarray:
        """Facts that the model has right before it is trained. Shape ``(m,)``."""
        return self.model.answers(self.model.build().eval())[1]

    @cached_property
    def known(self) -> np.ndarray:
        """Facts that most checkpoints have right. Shape ``(m,)``."""
        model, right = self.model.build().eval(), []
        for state in self.states:
            model.load_state_dict(state)
            right.append(self.model.answers(model)[1])
        return np.mean(right, axis=0) >= KNOWN


# -- scores ---------------------------------------------------------------------------


def scored(run: Run) -> dict[str, np.ndarray]:
    """Score with every method, or read what was. Shapes ``(n, m)``."""
    found = {}
    for name, score in scorers(run).items():
        path = run.work / "scores" / f"{name.replace(' ', '-')}.npy"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            np.save(path, np.asarray(score(), dtype=np.float32))
            print(f"{run.model.name}: scored {name}", flush=True)
        found[name] = np.load(path)
    return found


def scorers(run: Run) -> dict[str, Callable[[], np.ndarray]]:
    last = run.checkpoints
    paper = partial(methods.TRAK, exponents=(0.0, 1.0))
    return {
        "random": lambda: np.random.default_rng(0).standard_normal((
            run.model.n,
            run.model.m,
        )),
        "BM25": lambda: bm25(run.model),
        "representations": lambda: of_states(run),
        "gradient cosine": lambda: along(run, methods.GradientCosine, 1),
        "TracIn": lambda: tracin(run),
        "TRAK, 1 checkpoint": lambda: along(run, paper, 1),
        f"TRAK, {last} checkpoints": lambda: along(run, paper, last),
    }


def bm25(model: FactModel) -> np.ndarray:
    """Score by the words that a query, its answer included, shares with a text."""
    import bm25s

    index = bm25s.BM25()
    corpus = bm25s.tokenize([t.text for t in model.facts.texts], show_progress=False)
    index.index(corpus, show_progress=False)
    columns = []
    for query in model.facts.queries:
        (words,) = bm25s.tokenize([query.text], return_ids=False, show_progress=False)
        columns.append(index.get_scores(words))
    return np.stack(columns, axis=1)


def of_states(run: Run) -> np.ndarray:
    method = methods.RepresentationSimilarity(
        run.model.build(), run.states, run.model.states, same_label=False
    )
    return method.fit(run.model.train_batches).score(run.model.query_batches)


def gradients(run: Run, states: list, name: str) -> methods.ProjectedGradients:
    return methods.ProjectedGradients(
        run.model.build().eval(),
        run.model.task,
        states,
        run.model.n,
        run.work / "stores" / name,
        proj_dim=4096,
        logging_level=logging.ERROR,
    )


def along(run: Run, kind: Any, count: int) -> np.ndarray:
    shared = gradients(run, run.states[:count], f"first-{count}")
    return kind(shared).fit(run.model.train_batches).score(run.model.query_batches)


def tracin(run: Run) -> np.ndarray:
    """Sum over epochs of one run, by their rates."""
    _ = run.states  # trains it
    folder, total = run.work / "checkpoints", run.model.recipe.epochs
    states = [
        torch.load(folder / f"0-{epoch}.pt", weights_only=True) for epoch in run.epochs
    ]
    done = [(epoch + 1) / total for epoch in run.epochs]
    rates = [max(min(x / 0.2, (1 - x) / 0.8), 0.01) for x in done]
    shared = gradients(run, states, "epochs")
    method = methods.TracIn(shared, rates).fit(run.model.train_batches)
    found = method.score(run.model.query_batches)
    shutil.rmtree(run.work / "stores" / "epochs")
    return found


# -- the first question ---------------------------------------------------------------


def retrieval(run: Run) -> list[dict[str, Any]]:
    """Compare with the labels: which texts state the fact."""
    stated, rows = run.model.facts.proponents, []
    for name, scores in scored(run).items():
        row: dict[str, Any] = {"model": run.model.name, "method": name}
        for key, result in (
            ("MRR", mean_reciprocal_rank(scores, stated)),
            ("recall@5", recall_at_k(scores, stated, 5)),
            ("recall@10", recall_at_k(scores, stated, 10)),
        ):
            row[key] = [result.mean, *result.interval]
        rows.append(row)
    return rows


# -- the second question --------------------------------------------------------------


def removals(run: Run) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """List what is removed.

    Yields:
        The method, the facts it is removed for, and the mask of the texts that are left.
    """
    stated = run.model.facts.proponents
    found = scored(run)
    kept = ["random", "BM25", "representations", f"TRAK, {run.checkpoints} checkpoints"]
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(run.known))
    size = run.model.group
    for start in range(0, min(len(chosen), run.model.groups * size) - size + 1, size):
        facts = chosen[start : start + size]
        for name in kept:
            top = np.argsort(-found[name][:, facts], axis=0, kind="stable")[:REMOVED]
            yield name, facts, _without(run.model.n, top)
        yield "texts that state it", facts, ~stated[:, facts].any(axis=1)


def _without(n: int, indices: np.ndarray) -> np.ndarray:
    mask = np.ones(n, dtype=bool)
    mask[indices.ravel()] = False
    return mask


def counterfactual(run: Run, shard: str) -> list[dict[str, Any]]:
    """Remove, retrain and ask again."""
    planned, groups = list(removals(run)), run.model.groups
    whole = np.ones(run.model.n, dtype=bool)
    # Nothing is removed from as many as there are groups: what chance does.
    names = ["nothing"] * groups + [name for name, _, _ in planned]
    asked = [facts for name, facts, _ in planned if name == "random"]
    asked += [facts for _, facts, _ in planned]
    masks = np.array([whole] * groups + [mask for _, _, mask in planned])
    index, count = map(int, shard.split("/"))

    def outputs(model: nn.Module) -> np.ndarray:
        return np.concatenate(run.model.answers(model)).astype(np.float64)

    bank = retrain_subsets(
        run.model.train,
        outputs,
        masks,
        run.work / "removed.npz",
        n_repeats=run.model.repeats,
        seed=1,
        shard=(index, count),
        metadata=run.model.recipe.as_dict(),
        progress=False,
    )
    if bank.n_subsets < len(masks):
        return []  # a warning was given: other shards are not done
    rows = lost(bank, names, asked, masks, run.known_before)
    return [row | {"model": run.model.name} for row in rows]


def lost(
    bank: GroundTruth,
    names: list[str],
    asked: list[np.ndarray],
    masks: np.ndarray,
    before: np.ndarray,
) -> Iterator[dict[str, Any]]:
    """Say of every method how often a fact is lost, and how far its margin falls.

    Args:
        bank: Margins of all facts, and whether they are right, without some texts.
        names: What each removal is by.
        asked: The facts that it is for.
        masks: The texts that it leaves.
        before: Which facts are right before any training. Shape ``(m,)``.

    Yields:
        A row of each method.
    """
    m = bank.outputs.shape[2] // 2
    margins, right = bank.outputs[:, :, :m].mean(1), bank.outputs[:, :, m:].mean(1)
    whole = margins[[name == "nothing" for name in names]].mean(0)
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        wrong = np.concatenate([1 - right[i, asked[i]] for i in rows])
        known = np.concatenate([before[asked[i]] for i in rows])
        fall = np.concatenate([whole[asked[i]] - margins[i, asked[i]] for i in rows])
        yield {
            "method": name,
            "facts": len(wrong),
            "repeats": bank.n_repeats,
            "removed": float(
                np.mean([(~masks[i]).sum() / len(asked[i]) for i in rows])
            ),
            "lost": [float(wrong.mean()), *_interval(wrong)],
            "known before": int(known.sum()),
            "lost of these": float(wrong[known].sum()),
            "fall": [float(fall.mean()), *_interval(fall)],
        }


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = bootstrap_interval(values)
    return float(low), float(high)


# -- tables ---------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Write the tables of both questions, a model after the other."""
    found = {"retrieval": [], "removal": []}
    for name, about in results["models"].items():
        for part, rows in (
            ("retrieval", _retrieved(results["retrieval"], name)),
            ("removal", _removed(results["counterfactual"], name)),
        ):
            if len(rows) > 2:
                found[part] += ["", f"**{about['title']}**", "", *rows]
    return {part: "\n".join(lines).strip() for part, lines in found.items()}


def _retrieved(rows: list[dict[str, Any]], model: str) -> list[str]:
    lines = ["| method | MRR | recall@5 | recall@10 |", "|---|---|---|---|"]
    for row in rows:
        if row["model"] == model:
            cells = [_shown(row[k]) for k in ("MRR", "recall@5", "recall@10")]
            lines.append(f"| {' | '.join([row['method'], *cells])} |")
    return lines


def _removed(rows: list[dict[str, Any]], model: str) -> list[str]:
    lines = ["| removed | texts a fact | lost | fall |", "|---|---|---|---|"]
    for row in rows:
        if row["model"] == model:
            cells = [f"{row['removed']:.1f}", _shown(row["lost"]), _shown(row["fall"])]
            lines.append(f"| {' | '.join([row['method'], *cells])} |")
            about = f"{row['facts']} facts; retrainings of each group: {row['repeats']}"
            if row["known before"]:
                about += (
                    f". {row['known before']} are right before any training; of these"
                )
                about += f" {row['lost of these']:g} are lost by the last removal"
    return [*lines, "", about] if len(lines) > 2 else lines


def filled(page: str, parts: dict[str, str]) -> str:
    """Put tables between the marks of a page."""
    for part, text in parts.items():
        start = f"<!-- facts:{part} -->"
        head, rest = page.split(start)
        tail = rest[rest.index("<!-- facts:end -->") :]
        page = f"{head}{start}\n\n{text}\n\n{tail}"
    return page


def _shown(value: list[float]) -> str:
    middle, low, high = value
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> int:
    given = parse()
    output = given.work / "facts.json"
    if given.render:
        parts = tables(json.loads(output.read_text()))
        print("\n\n".join(parts.values()))
        if given.page:
            page = given.page.read_text(encoding="utf-8")
            given.page.write_text(filled(page, parts), encoding="utf-8")
        return 0
    results: dict[str, Any] = {
        "machine": {
            "revision": revision(),
            "processor": proc_field("/proc/cpuinfo", "model name"),
            "cores": os.cpu_count(),
            "trak": trak.__version__,
            "torch": torch.__version__,
        },
        "models": {},
        "retrieval": [],
        "counterfactual": [],
    }
    if output.exists():  # of other models, or of the other question
        stored = json.loads(output.read_text())
        results |= {key: stored[key] for key in PARTS}
    for name in given.models.split(","):
        changes = {
            key: getattr(given, key) for key in ("checkpoints", "groups", "repeats")
        }
        model = replace(
            KINDS[name](given.data),
            **{k: v for k, v in changes.items() if v is not None},
        )
        run = Run(model, given.work / name)
        results["models"][name] = {
            "title": run.model.title,
            "n": run.model.n,
            "m": run.model.m,
            "known": int(run.known.sum()),
            "known before": int(run.known_before.sum()),
            "recipe": run.model.recipe.as_dict(),
        }
        if given.only != "counterfactual":
            results["retrieval"] = _others(results, "retrieval", name) + retrieval(run)
        if given.only != "retrieval":
            others = _others(results, "counterfactual", name)
            results["counterfactual"] = others + counterfactual(run, given.shard)
        output.write_text(json.dumps(results, indent=1))
    print("\n\n".join(tables(results).values()))
    return 0


def _others(results: dict[str, Any], part: str, model: str) -> list[dict[str, Any]]:
    return [row for row in results[part] if row["model"] != model]


if __name__ == "__main__":
    sys.exit(main())
