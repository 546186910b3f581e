"""The accuracy benchmark: its arithmetic, its plan, its tables, and one small run."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.problems import randomized
from trak.evaluation import GroundTruth, lds, random_subsets

ROOT = Path(__file__).parents[1]
MODULES = (
    "arithmetic",
    "banks",
    "cells",
    "choosing",
    "counterfactual",
    "data",
    "judging",
    "models",
    "plan",
    "plot",
    "report",
    "truths",
    "variants",
    "worker",
)


@pytest.fixture(scope="module")
def accuracy():
    """The benchmark's modules; they are found as when it runs as a script."""
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setenv("PYTHONPATH", str(ROOT))  # so that workers find this trak
        modules = {
            name: importlib.import_module(f"accuracy_{name}") for name in MODULES
        }
        yield SimpleNamespace(main=importlib.import_module("accuracy"), **modules)


# -- arithmetic -----------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p"), [(7, 3), (3, 7), (5, 5)])
@pytest.mark.parametrize("power", [0.0, 0.25])
def test_kernels_are_those_of_the_formula(accuracy, n, p, power):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, p, generator=generator, dtype=torch.float64)
    targets = torch.randn(4, p, generator=generator, dtype=torch.float64)
    weights = np.linspace(-1, 2, n)
    x = rows * torch.from_numpy(np.abs(weights) ** power)[:, None]
    gram = x.T @ x
    damping = 0.3 * gram.trace() / min(n, p)
    damped = gram + damping * torch.eye(p, dtype=torch.float64)
    expected = x @ torch.linalg.solve(damped, targets.T)
    found = accuracy.arithmetic.Spectrum(rows, targets, weights, power).kernel(0.3)
    torch.testing.assert_close(found, expected)


def test_weights_keep_their_sign(accuracy):
    total = torch.ones(2, 1, dtype=torch.float64)
    weights = [np.array([4.0, -1.0]), np.array([4.0, -7.0])]
    found = accuracy.arithmetic.weighted(total, weights, 0.5)
    np.testing.assert_allclose(found, [[1.0], [-1.0]])


def test_undamped_scores_do_not_follow_the_scale_of_gradients(accuracy):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 3, generator=generator)
    found = accuracy.arithmetic.undamped(rows, rows[:2])
    larger = accuracy.arithmetic.undamped(10 * rows, 10 * rows[:2])
    torch.testing.assert_close(larger, 100 * found, rtol=1e-3, atol=1e-3)


# -- judging --------------------------------------------------------------------------


@pytest.fixture
def bank():
    rng = np.random.default_rng(0)
    return GroundTruth(random_subsets(20, 12, seed=0), rng.standard_normal((12, 2, 5)))


def test_predictions_are_judged_as_scores_are(accuracy, bank):
    scores = np.random.default_rng(1).standard_normal((20, 5))
    found = accuracy.judging.judge(bank.masks @ scores, bank)
    expected = lds(scores, bank)
    assert found["lds"] == pytest.approx(expected.mean)
    assert found["interval"] == pytest.approx(list(expected.interval))


def test_fewer_subsets_and_targets_are_the_first_ones(accuracy, bank):
    scores = np.random.default_rng(1).standard_normal((20, 3))
    few = GroundTruth(bank.masks[:7], bank.outputs[:7])
    found = accuracy.judging.judge(bank.masks @ scores, few)
    assert found["lds"] == pytest.approx(
        lds(scores, bank.masks[:7], few.outputs[:, :, :3]).mean
    )


def test_ratios_resample_targets_together(accuracy):
    values = np.random.default_rng(0).uniform(0.1, 0.5, 50)
    assert accuracy.judging.ratio(3 * values, values) == pytest.approx((3, 3, 3))


def test_a_ratio_to_nothing_has_no_upper_end(accuracy):
    middle, low, high = accuracy.judging.ratio([0.4, 0.4], [-0.1, 0.2])
    assert (middle, high) == (pytest.approx(8.0), np.inf)
    assert low == pytest.approx(2.0)


def row(**given):
    known = {
        "truth": "digits",
        "name": "TRAK",
        "method": "trak",
        "variant": "",
        "is_default": True,
        "count": 1,
        "label": "",
        "targets": 3,
        "minutes": 0.5,
        "scoring": 0.25,
        "training": 0.25,
        "wall": 0.5,
        "notes": {},
        "lds": 0.4,
        "interval": [0.3, 0.5],
        "per_target": [0.4, 0.3, 0.5],
    }
    return {**known, **given}


def test_the_truth_chooses_among_variants(accuracy):
    rows = [row(variant="1", lds=0.2), row(variant="10", lds=0.3), row(count=2)]
    one, two = accuracy.judging.best_variants(rows)
    assert (one["variant"], one["chosen"]) == ("10", True)
    assert two["chosen"] is False


def test_cross_validation_is_held_against_the_best_on_the_truth(accuracy):
    notes = {"lds": 0.37, "interval": [0.3, 0.4], "multiple": 1.2, "exponents": [0, 1]}
    rows = [
        row(method="grid", label="0_1_1", lds=0.3),
        row(method="grid", label="0_1_3", lds=0.4),
        row(method="grid", notes=notes, lds=0.38, single=0.3),
    ]
    (found,) = accuracy.judging.validation(rows)
    assert found["best"] == "0_1_3"
    assert found["lost"] == pytest.approx(0.05)


# -- what was tried -------------------------------------------------------------------


def a_checkpoint(accuracy, n=30, d=12, m=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    targets = torch.randn(m, d, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64).numpy()
    members = np.arange(n) % 2 == 0
    made = accuracy.variants.Products
    one = made(*accuracy.variants.products(rows, targets), weights, members)
    return one, rows * torch.from_numpy(weights**0.25)[:, None], targets


def test_variants_are_their_formulas(accuracy):
    """Each with explicit matrices of the entries, where there are fewer than examples."""
    variants = accuracy.variants
    one, x, z = a_checkpoint(accuracy)
    d = x.shape[1]
    unit = float((x @ x.T).diagonal().mean())
    eye = torch.eye(d, dtype=torch.float64)
    inverse = torch.linalg.inv(x.T @ x + unit * eye)
    base = x @ inverse @ z.T
    found = {name: f(one, 0.25) for name, f in variants.KERNELS.items()}
    torch.testing.assert_close(variants.ridge(one, 0.25), base)
    hat = (x @ inverse @ x.T).diagonal()[:, None]
    torch.testing.assert_close(found["corrected for leverage"], base / (1 - hat))
    squared = x @ inverse @ x.T @ x @ inverse @ z.T
    torch.testing.assert_close(found["squared damping"], squared)
    iterated = base + unit * x @ inverse @ inverse @ z.T
    torch.testing.assert_close(found["iterated damping"], iterated)
    own = x[::2]
    unit = float((own @ own.T).diagonal().mean())
    inner = torch.linalg.inv(own.T @ own + unit * eye)
    name = "kernel of the checkpoint's own examples"
    torch.testing.assert_close(found[name], x @ inner @ z.T)
    assert found["every checkpoint on one scale"].std() == pytest.approx(1.0)


def test_white_rows_are_white(accuracy):
    model = torch.nn.Linear(3, 4)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(16, 16, generator=generator)
    rows = torch.randn(4000, 16, generator=generator) @ mixed
    left, right = accuracy.variants.whitened(rows, rows[:5], model)
    torch.testing.assert_close(left[:5], right)
    bias = left[:, 12:] ** 2
    moments = (rows[:, 12:] ** 2).mean(0)
    torch.testing.assert_close(bias.mean(0), moments / (moments + moments.mean()))


def test_sketches_of_parts_keep_lengths_and_what_is_small(accuracy):
    generator = torch.Generator().manual_seed(3)
    rows, targets = (torch.randn(n, 900, generator=generator) for n in (6, 2))
    places = [slice(0, 20), slice(20, 900)]
    found, asked, kept = accuracy.variants.sketched(rows, targets, places, 800, seed=1)
    assert kept == [slice(0, 20), slice(20, 420)]
    assert torch.equal(found[:, :20], rows[:, :20])
    assert torch.equal(asked[:, :20], targets[:, :20])
    ratio = found[:, 20:].norm(dim=1) / rows[:, 20:].norm(dim=1)
    assert (ratio - 1).abs().max() < 0.2


def test_tied_weights_stay_tied_where_some_are_dropped(accuracy):
    tied, own = torch.ones(40, 50), torch.ones(40, 50)
    found = accuracy.variants.dropped({"in": tied, "own": own, "out": tied}, 1)
    assert torch.equal(found["in"], found["out"])
    assert not torch.equal(found["in"], found["own"])
    share = accuracy.variants.DROPPED
    assert (found["own"] == 0).float().mean() == pytest.approx(share, abs=0.02)


def test_late_epochs_end_with_the_last(accuracy):
    for epochs in (3, 12, 20, 60):
        found = accuracy.variants.late_epochs(epochs)
        assert found[-1] == epochs - 1
        assert found[0] >= 0


# -- plan -----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["quick", "default", "full"])
def test_every_line_has_files_of_its_own(accuracy, plan):
    for name, truth in accuracy.truths.TRUTHS.items():
        found = accuracy.plan.lines(name, truth.n_checkpoints, truth.n_given, plan)
        keys = [line.key(name) for line in found]
        assert len(set(keys)) == len(keys)
        assert all(max(line.counts) <= 2000 for line in found)


def test_one_variant_of_a_name_is_the_default(accuracy):
    found = accuracy.plan.lines("digits", 20, 2000, "default")
    for name in ("EK-FAC", "Arnoldi", "influence, CG", "traker's arithmetic"):
        group = [line for line in found if line.name == name]
        assert sum(line.is_default for line in group) == 1


def test_truths_without_their_data_are_left_out_with_a_line(accuracy, tmp_path, capsys):
    options = ["--truths", "digits,mnist,rte", "--data", str(tmp_path)]
    found = list(accuracy.main.choose(accuracy.main.parse(options)))
    assert [truth.name for truth in found] == ["digits"]
    said = capsys.readouterr().out
    assert "mnist70k.npz" in said
    assert "rte_{train,validation}.parquet" in said


def test_without_a_directory_all_that_need_one_are_left_out(accuracy, capsys):
    found = list(accuracy.main.choose(accuracy.main.parse([])))
    assert [truth.name for truth in found] == ["digits", "diabetes"]
    assert "pass --data" in capsys.readouterr().out


def test_parts_of_a_model_want_the_data_of_the_whole(accuracy):
    names = {name: accuracy.main.file_of(name) for name in accuracy.truths.TRUTHS}
    assert names["qnli_head"] == names["qnli_top"] == "qnli_dev.tsv"
    assert names["rte_head"] == names["rte"]


# -- texts of many lengths ------------------------------------------------------------


def lengths(n=40, width=9):
    """Ids that count rows from 1, segments, masks of lengths from 1 to ``width``."""
    mask = (torch.arange(width) < 1 + torch.arange(n)[:, None] % width).long()
    ids = mask * (1 + torch.arange(n)[:, None])
    return ids, torch.zeros_like(ids), mask, torch.arange(n) % 2


def test_batches_of_a_length_are_as_wide_as_their_longest_text(accuracy):
    ids, _, mask, labels = accuracy.models.trimmed([x[:4] for x in lengths()])
    assert ids.shape == mask.shape == (4, 4)
    assert len(labels) == 4


@pytest.mark.parametrize("alike", [False, True])
def test_every_text_is_seen_once_an_epoch(accuracy, alike):
    data, seen = lengths(), []

    def loss(model, batch):
        seen.append((batch[0][:, 0].tolist(), batch[2].float().mean().item()))
        return model(batch[0][:, :1].float()).sum()

    recipe = accuracy.models.Recipe(2, 0.1, batch=4, alike=alike)
    accuracy.models.train(
        lambda: torch.nn.Linear(1, 1), loss, data, np.arange(40), 0, recipe
    )
    rows = [row for batch, _ in seen for row in batch]
    assert sorted(rows[:40]) == sorted(rows[40:]) == list(range(1, 41))
    full = float(np.mean([share for _, share in seen]))
    assert (full > 0.8) == alike


def test_what_is_stored_of_other_truths_stays_theirs(accuracy):
    assert "alike" not in accuracy.truths.TRUTHS["sst2"].recipe.as_dict()
    assert accuracy.truths.TRUTHS["sst2_top"].recipe.as_dict()["alike"] is True


def test_upper_layers_give_what_the_whole_model_gives(accuracy, monkeypatch):
    transformers = pytest.importorskip("transformers")
    models = accuracy.models

    def small():
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=12,
        )
        made = transformers.BertForSequenceClassification(config)
        made.load_state_dict(randomized(made, 1))
        return made

    monkeypatch.setattr(models, "minilm", small)
    models._frozen_minilm.cache_clear()
    model, data = models.minilm_top(2), lengths()
    models._frozen_minilm.cache_clear()
    assert len(models.upper_layers(model)) == 2
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    whole, upper = models.text_loss(model, data), models.below(model, data)
    torch.testing.assert_close(models.top_loss(model, upper), whole)


def test_vectors_do_not_depend_on_padding_or_neighbours(
    accuracy, tmp_path, monkeypatch
):
    transformers = pytest.importorskip("transformers")
    states = importlib.import_module("accuracy_states")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
    )
    model = transformers.BertForSequenceClassification(config)
    model.load_state_dict(randomized(model, 1))
    monkeypatch.setattr(states, "minilm", lambda: model)
    monkeypatch.setattr(states, "STORED", tmp_path)
    ids, kinds, mask, labels = lengths()
    split = accuracy.data.Split(
        (ids, kinds, mask, labels), (ids[:3], kinds[:3], mask[:3], labels[:3])
    )
    found = states.vectors(split)
    assert found.train[0].shape == (40, 16)
    torch.testing.assert_close(found.targets[0], found.train[0][:3])
    model.eval()
    alone = model.bert(ids[2:3, :3]).last_hidden_state.mean(1)
    torch.testing.assert_close(
        found.train[0][2:3], torch.nn.functional.normalize(alone).detach()
    )
    # A pair: its second text is read by itself, behind the first token of the first.
    row = torch.tensor([[7, 8, 9, 4, 5, 9]])
    second = torch.tensor([[0, 0, 0, 1, 1, 1]])
    u, v, apart, product = states._embed(
        model.bert, [row, second, torch.ones_like(row)]
    ).split(16, dim=1)
    wanted = model.bert(torch.tensor([[7, 4, 5, 9]])).last_hidden_state.mean(1)
    torch.testing.assert_close(v, torch.nn.functional.normalize(wanted).detach())
    torch.testing.assert_close(apart, (u - v).abs())
    torch.testing.assert_close(product, u * v)


@pytest.mark.parametrize("power", [1, 2])
def test_pairs_are_compared_by_the_mean_of_their_texts(accuracy, power):
    alike = importlib.import_module("accuracy_alike")
    u, v = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    rows, labels = torch.cat([u, v, 5 * u, 7 * v], dim=1), torch.arange(6) % 2
    split = accuracy.data.Split((rows, labels), (rows[:2], labels[:2]))
    truth = SimpleNamespace(split=split, task="image_classification")
    options = {"by": "signed", "of": "pairs", "power": power}
    setting = SimpleNamespace(truth=truth, line=SimpleNamespace(options=options))
    cosine = torch.nn.functional.cosine_similarity((u + v)[:, None], (u + v)[:2], -1)
    signs = torch.where(labels[:, None] == labels[:2], 1.0, -1.0)
    known = signs * cosine.sign() * cosine.abs() ** power
    torch.testing.assert_close(torch.from_numpy(alike.alike(setting)), known)


# -- counterfactuals of two classes ---------------------------------------------------


def test_a_label_is_wrong_where_the_margin_is_negative(accuracy):
    """Rows: nothing removed; a target's own by one method; one random removal."""
    margins = np.ones((4, 2, 2))
    margins[1, :, 0] = -1  # without the first target's top, both retrainings
    margins[1, :, 1] = -1  # that is no matter of the second target's
    margins[2, 0, 1] = -1  # without the second's, one of two
    margins[3, 1, 0] = -1
    bank = GroundTruth(np.ones((4, 5), dtype=bool), margins)
    found = accuracy.counterfactual.wrong_labels(bank, ["TRAK", "random"])
    assert found[""][0] == 0
    assert found["TRAK"][0] == pytest.approx(0.75)
    assert found["random"][0] == pytest.approx(0.25)


def test_targets_are_right_by_a_modest_margin(accuracy, monkeypatch):
    margins = np.array([[3.0, -1, 0.5, 1, 9], [3, 2, 0.5, 1, 9]])
    states = iter(margins)

    truth = SimpleNamespace(
        model=SimpleNamespace(load_state_dict=lambda _: None, eval=lambda: None),
        checkpoints=lambda _: range(2),
        outputs=lambda _: next(states),
    )
    monkeypatch.setattr(accuracy.counterfactual, "replace", lambda truth, **_: truth)
    removals = accuracy.counterfactual.TEXT
    runner = SimpleNamespace(folder=Path())
    found = accuracy.counterfactual._modest(truth, runner, removals, 2)
    np.testing.assert_array_equal(found, [2, 3])


# -- banks ----------------------------------------------------------------------------


def test_parts_of_a_bank_are_read_as_far_as_they_are_whole(accuracy, tmp_path):
    folder = tmp_path / "bank.npz.parts"
    folder.mkdir()
    for j, k in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1)):
        np.savez(folder / f"{j:06d}-{k:04d}-{'0' * 32}.npz", outputs=np.full(4, j + k))
    found = accuracy.banks.read_parts(tmp_path / "bank.npz", 2)
    np.testing.assert_array_equal(found[:, :, 0], [[0, 1], [1, 2]])
    assert accuracy.banks.read_parts(tmp_path / "none.npz", 2).shape == (0, 2, 0)


def test_a_bank_of_other_subsets_is_refused(accuracy, tmp_path):
    truth = accuracy.truths.TRUTHS["diabetes"]
    masks = random_subsets(342, 5, seed=99)
    GroundTruth(masks, np.zeros((5, 2, 100))).save(tmp_path / "diabetes.npz")
    with pytest.raises(accuracy.banks.MissingBankError, match="subsets of this truth"):
        accuracy.banks.judges(truth, tmp_path, as_stored=True)


def test_nothing_is_trained_where_that_is_not_wanted(accuracy, tmp_path):
    truth = accuracy.truths.TRUTHS["diabetes"]
    with pytest.raises(accuracy.banks.MissingBankError, match="has 0 subsets"):
        accuracy.banks.given(truth, tmp_path, as_stored=True)


# -- results --------------------------------------------------------------------------


@pytest.fixture
def results(accuracy):
    about = {
        "title": "digits, CNN",
        "n": 20,
        "m": 3,
        "subsets": 12,
        "repeats": 2,
        "training": 0.25,
        "exponents": [0.0, 1.0],
        "checkpoints": 5,
    }
    notes = {"lds": 0.37, "interval": [0.3, 0.4], "multiple": 1.2, "exponents": [0, 1]}
    rows = [
        row(),
        row(count=2, minutes=1.0, lds=0.5, interval=[0.4, 0.6]),
        row(name="traker's arithmetic", method="arithmetic", variant="p=512", lds=0.1),
        row(name="similarity of inputs", method="similarity", count=0, minutes=0.0),
        row(method="grid", name="TRAK, cross-validated", notes=notes, single=0.3),
        row(method="grid", name="TRAK, cross-validated", label="0_1_1"),
    ]
    curve = {
        "truth": "digits",
        "name": "TRAK",
        "ks": [1, 2, 4, 8],
        "mean": [0.1, 0.2, 0.3, 0.4],
        "interval": [[0.0, 1.0]] * 4,
        "targets": 8,
        "repeats": 3,
    }
    return {
        "machine": {"date": "today"},
        "truths": {"digits": about},
        "rows": rows,
        "failed": ["digits, LiSSA: stopped after 10 minutes"],
        "counterfactual": [curve],
        "validation": accuracy.judging.validation(rows),
    }


def test_wrong_labels_have_a_table_of_their_own(accuracy, results):
    curve = {**results["counterfactual"][0], "title": "SST-2", "n": 100, "ks": [5]}
    share = {"wrong": [0.75, 0.4, 1.0], "before": [0.0, 0.0, 0.0]}
    curve |= {"mean": [3.4], "interval": [[3.2, 3.5]], **share}
    results["counterfactual"].append(curve)
    found = accuracy.report.sections(results)
    assert "SST-2" not in found["counterfactual"]
    row = "| SST-2 | 5% | TRAK | 3.40 [3.20, 3.50] | 75% [40%, 100%] | 0% [0%, 0%] |"
    assert row in found["wrong"]


def test_tables_say_what_was_chosen_on_the_truth(accuracy, results):
    text = accuracy.report.markdown(results)
    assert "| digits, CNN | 1 | 0.400 [0.300, 0.500] | 0.100 (p=512)* |" in text
    assert "1.2, (0, 1)" in text
    assert "stopped after 10 minutes" in text
    results["rows"].append(row(variant="10", lds=0.9))
    assert "TRAK, 10 chosen on the truth" in accuracy.report.markdown(results)


def test_pages_take_tables_between_their_marks(accuracy, results):
    page = "a\n<!-- accuracy:versus -->\nold\n<!-- end -->\nb\n<!-- accuracy:sst2 --><!-- end -->"
    found = accuracy.report.fill(page, results)
    assert "old" not in found
    assert found.startswith("a\n")
    assert "Not in this run." in found
    assert accuracy.report.fill(found, results) == found


def test_what_helps_to_choose_is_laid_out_by_truth(accuracy, results):
    five = {"count": accuracy.choosing.AT}
    results["rows"] += [
        row(method="sizes", label="p=64", lds=0.2, **five),
        row(method="sizes", label="p=0", lds=0.6, **five),
        row(method="sizes", label="p=512", lds=0.5, **five),
        row(method="grid", name="grid", label="0_1_1", lds=0.3, **five),
        row(method="grid", name="grid", label="0_1_10", lds=0.2, **five),
        row(method="grid", name="grid", label="0.25_0.5_1", lds=0.4, **five),
    ]
    results["rows"] += [
        row(method="variants", label=accuracy.variants.BASE, lds=0.5),
        row(method="variants", label="another", lds=0.45),
    ]
    found = accuracy.choosing.sections(results)
    lines = {name: text.splitlines() for name, text in found.items()}
    assert lines["sizes"][0] == "| truth | 64 | 512 | all |"
    assert lines["sizes"][2] == "| digits, CNN | 0.200 | 0.500 | **0.600** |"
    assert lines["dampings"][2] == "| digits, CNN | **0.300** | 0.200 |"
    assert lines["exponents"][2] == "| digits, CNN | 0.300 | **0.400** |"
    assert lines["tried"][2] == "| the default | 0.500 |"
    assert lines["tried"][3] == "| another | -0.050 |"
    assert lines["checkpoints"][2] == "| digits, CNN | 0.400 | **0.500** |"


@pytest.mark.parametrize("part", ["plot", "choosing"])
def test_pictures_are_the_same_from_the_same_figures(accuracy, results, tmp_path, part):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in paths:
        getattr(accuracy, part).plot(results, [path])
    assert paths[0].read_bytes() == paths[1].read_bytes()


# -- cells ----------------------------------------------------------------------------


@pytest.fixture
def runner(accuracy, tmp_path):
    said = []
    made = accuracy.cells.Runner(
        Path(), tmp_path, tmp_path, None, 60.0, as_stored=True, say=said.append
    )
    return made, said


def test_a_line_runs_once(accuracy, runner):
    one, said = runner
    truth = accuracy.truths.TRUTHS["diabetes"]
    line = accuracy.plan.Line("random", "random")
    for _ in range(2):
        one.run(truth, line)
    assert said[0] == "diabetes: random "
    assert len(said) == 2
    found = one.read(truth, line)
    assert found["steps"]["0"]["predictions"].shape == (100, 100)
    bank = accuracy.banks.judges(truth, one.folder, as_stored=True)
    training = {"cpu": 60.0, "wall": 60.0}
    (judged,) = accuracy.judging.rows_of("diabetes", line, found, bank, training)
    assert abs(judged["lds"]) < 0.1
    assert judged["training"] == 0


def test_a_line_that_takes_too_long_is_killed_and_not_done(accuracy, runner):
    one, _ = runner
    truth = accuracy.truths.TRUTHS["diabetes"]
    line = accuracy.plan.Line("random", "random")
    with pytest.raises(accuracy.cells.CellError, match="stopped after"):
        replace(one, limit=0.05).run(truth, line)
    assert not one.is_done(truth, line)


def test_a_line_that_fails_says_why(accuracy, runner):
    one, _ = runner
    truth = accuracy.truths.TRUTHS["diabetes"]
    with pytest.raises(accuracy.cells.CellError, match="no attribute 'nonsense'"):
        one.run(truth, accuracy.plan.Line("nonsense", "nonsense"))


def test_lines_of_another_environment_want_it(accuracy, runner):
    one, _ = runner
    truth = accuracy.truths.TRUTHS["diabetes"]
    line = accuracy.plan.Line("traker 0.3.2", "theirs", (1,), {"p": 256}, theirs=True)
    with pytest.raises(accuracy.cells.CellError, match="no environment"):
        one.run(truth, line)
