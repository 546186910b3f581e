"""What a checkpoint was trained on, and its outputs on targets: parsed, kept, used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import reference
from tests.bench import Bench
from tests.problems import (
    PROBLEMS,
    Problem,
    assert_scores,
    classification,
    featurize,
    make,
    mlp,
    score,
)
from trak._members import balanced, pack_mask, parse_train_inds, unpack_mask
from trak.errors import OptionError, StoreCorruptError, StoreMismatchError, TrakWarning
from trak.gradient_computers import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput
from trak.projectors import NoOpProjector
from trak.savers import MmapSaver

MASK = np.array([True, False, True, True, False])
INDS = [3, 0, 2]


# -- train_inds -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        INDS,
        tuple(INDS),
        set(INDS),
        iter(INDS),
        np.array(INDS, "uint8"),
        np.array([9, *INDS])[1:],
        np.arange(8)[3::-1][[0, 3, 1]],
        torch.tensor(INDS),
        torch.tensor(INDS, dtype=torch.int32),
        MASK,
        MASK.tolist(),
        torch.tensor(MASK),
        np.repeat(MASK, 2)[::2],
    ],
)
def test_indices_and_masks(given: Any) -> None:
    mask = parse_train_inds(given, 5)
    np.testing.assert_array_equal(mask, MASK)
    assert mask.dtype == bool
    mask[:] = False
    if isinstance(given, np.ndarray):
        assert given.any()


def test_all_examples_and_one() -> None:
    assert parse_train_inds(range(7), 7).all()
    assert parse_train_inds([2], 3).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0, 5], r"train_inds has 5, but the training examples are 0 to 4"),
        ([-1], r"train_inds has -1, but"),
        ([1, 3, 1], r"train_inds has 1 more than once"),
        ([], r"train_inds has no training example"),
        (np.zeros(5, bool), r"train_inds has no training example"),
        ([True, False], r"is a mask of 2 entries, and there are 5"),
        ([0.0, 1.0], r"must be whole numbers or booleans .* got list of float64"),
        ([[0, 1]], r"shape \(1, 2\)"),
        ([[0], [1, 2]], r"must be whole numbers"),
        (3, r"must be whole numbers .* got int of int64, shape \(\)"),
        ("012", r"must be whole numbers"),
    ],
)
def test_what_cannot_be_a_training_set(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_train_inds(given, 5)


@pytest.mark.parametrize("n", [1, 3, 8, 1001])
def test_packing(n: int) -> None:
    mask = np.random.default_rng(n).random(n) < 0.5
    record = json.loads(json.dumps(pack_mask(mask)))
    np.testing.assert_array_equal(unpack_mask(record, n, "here"), mask)
    changed = [
        {**record, "count": record["count"] + 1},
        {**record, "bits": "AAA="},
        {**record, "bits": "?"},
        {**record, "bits": 3},
        {**record, "hash": "0"},
        {key: value for key, value in record.items() if key != "bits"},
        {},
    ]
    for bad in changed:
        with pytest.raises(StoreCorruptError, match="here does not say which"):
            unpack_mask(bad, n, "here")
    with pytest.raises(StoreCorruptError, match="which of"):
        unpack_mask(record, n + 8, "here")


class Forgetful(MmapSaver):
    """A saver that keeps what it is told in its records, as users' savers may."""

    keep_members = MmapSaver.__mro__[1].keep_members
    members = MmapSaver.__mro__[1].members


@pytest.mark.parametrize("saver", [MmapSaver, Forgetful])
def test_they_are_kept(tmp_path: Path, saver: type[MmapSaver]) -> None:
    bench = Bench(tmp_path, saver=saver)
    bench.traker.load_checkpoint(bench.ckpt, train_inds=[4, 2, 10])
    again = bench.open(saver=saver)
    assert np.flatnonzero(again.saver.members(0)).tolist() == [2, 4, 10]
    again.load_checkpoint(bench.ckpt)
    again.load_checkpoint(bench.ckpt, train_inds=np.array([2, 4, 10]))
    message = r"on 3 of 11 .* now has 2; 3 differ, the first is 3\. Use the same"
    with pytest.raises(StoreMismatchError, match=message):
        again.load_checkpoint(bench.ckpt, train_inds=[2, 3])
    assert np.flatnonzero(again.saver.members(0)).tolist() == [2, 4, 10]
    scores = bench.complete(again)
    again = bench.open(saver=saver)
    assert np.flatnonzero(again.saver.members(0)).tolist() == [2, 4, 10]
    assert_scores(Bench(tmp_path / "without").complete(), scores, 1e-6)


@pytest.mark.parametrize("stage", ["loaded", "featurized", "finalized", "scored"])
def test_they_may_come_later(tmp_path: Path, stage: str) -> None:
    bench = Bench(tmp_path, stage)
    assert bench.traker.saver.members(0) is None
    bench.open().load_checkpoint(bench.ckpt, train_inds=[1])
    assert np.flatnonzero(bench.traker.saver.members(0)).tolist() == [1]


def test_the_first_of_two_processes_decides(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    other = bench.open()
    bench.traker.load_checkpoint(bench.ckpt, model_id=0, train_inds=[1])
    with pytest.raises(StoreMismatchError, match="0 was trained on 1 of 11"):
        other.load_checkpoint(bench.ckpt, model_id=0, train_inds=[2])


def test_bad_ones_change_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(OptionError, match="has 11, but"):
        bench.traker.load_checkpoint(bench.ckpt, train_inds=[11])
    assert bench.traker.saver.model_ids == {}


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"n": 11}'])
def test_a_damaged_record(tmp_path: Path, content: bytes) -> None:
    bench = Bench(tmp_path, "loaded")
    (bench.store / "0" / "train_inds.json").write_bytes(content)
    with pytest.raises(StoreCorruptError, match=r"train_inds\.json"):
        bench.open().load_checkpoint(bench.ckpt, train_inds=[1])
    with pytest.raises(StoreCorruptError, match=r"train_inds\.json"):
        bench.traker.saver.members(0)
    traker = bench.open()
    with pytest.raises(StoreCorruptError, match=r"train_inds\.json"):
        bench.complete(traker)  # it is read when scores are computed
    with pytest.raises(StoreCorruptError, match=r"train_inds\.json"):
        traker.self_influence()
    (bench.store / "0" / "train_inds.json").unlink()
    expected = Bench(tmp_path / "without").complete()
    found = torch.from_numpy(traker.finalize_scores("exp") + 0.0)
    assert_scores(found, expected, 1e-6)


# -- balance --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("inside", [10, 37, 80])
def test_groups_have_the_same_mean_size(inside: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(90)
    members = rng.permutation(90) < inside
    weights[members] *= 0.1
    before = weights.copy()
    found = balanced(weights, members)
    torch.testing.assert_close(
        torch.from_numpy(found),
        reference.level(torch.from_numpy(weights), torch.from_numpy(members)),
    )
    mean = np.abs(weights).mean()
    for group in (members, ~members):
        assert np.abs(found[group]).mean() == pytest.approx(mean)
        ratios = found[group] / weights[group]
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-12)
        assert ratios[0] > 0
    np.testing.assert_array_equal(weights, before)
    np.testing.assert_allclose(balanced(found, members), found, rtol=1e-12)
    turned = balanced(weights[::-1], members[::-1])
    np.testing.assert_allclose(turned, found[::-1], rtol=1e-12)


def test_a_weight_of_zero_among_others_stays_zero() -> None:
    weights = np.arange(30.0) - 3
    found = balanced(weights, np.arange(30) % 2 == 0)
    np.testing.assert_array_equal(np.sign(found), np.sign(weights))


@pytest.mark.parametrize(
    "members",
    [
        None,
        np.arange(30) < 0,
        np.arange(30) < 9,
        np.arange(30) >= 9,
        np.arange(30) < 30,
    ],
)
def test_what_is_not_known_or_small_is_not_balanced(members: Any) -> None:
    weights = np.linspace(-1, 3, 30)
    np.testing.assert_array_equal(balanced(weights, members), weights)


@pytest.mark.parametrize("is_member", [True, False])
def test_a_group_of_zeros_is_not_balanced(is_member: bool) -> None:
    members = np.arange(30) % 3 == 0
    weights = np.where(members == is_member, 0.0, np.linspace(1, 2, 30))
    np.testing.assert_array_equal(balanced(weights, members), weights)
    np.testing.assert_array_equal(balanced(0 * weights, members), 0 * weights)


# -- outputs --------------------------------------------------------------------------

COMPUTERS = [
    HookGradientComputer,
    FunctionalGradientComputer,
    IterativeGradientComputer,
]


def outputs(problem: Problem, model_id: int) -> Tensor:
    """The margins of the targets, by the oracle."""
    problem.model.load_state_dict(problem.checkpoints[model_id])
    problem.model.eval()
    with torch.no_grad():
        log_p = problem.call(problem.model, problem.targets).log_softmax(1)
    p = log_p.exp()[torch.arange(problem.m), problem.labels(problem.targets)]
    return torch.log(p / (1 - p))


def stored(directory: Path, model_id: int = 0) -> Tensor:
    array = np.load(directory / str(model_id) / "exp_outputs.mmap")
    assert array.shape[1] == 1
    return torch.from_numpy(array[:, 0])


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("name", ["mlp", "residual", "named"])
def test_outputs_are_kept(tmp_path: Path, name: str, computer: type) -> None:
    problem = PROBLEMS[name](checkpoints=2)
    text = {"task": "text_classification"} if name == "named" else {}
    traker = make(problem, tmp_path, gradient_computer=computer, **text)
    featurize(traker, problem)
    traker.finalize_features()
    score(traker, problem, 3)
    for model_id in range(2):
        found = stored(tmp_path, model_id)
        torch.testing.assert_close(found, outputs(problem, model_id))


class PerExample(AbstractModelOutput):
    """A task without a batched form."""

    @staticmethod
    def get_output(model: Any, weights: Any, buffers: Any, x: Any, y: Any) -> Tensor:
        call = torch.func.functional_call
        return call(model, (weights, buffers), (x[None],))[0].gather(0, y[None])[0]

    @staticmethod
    def get_out_to_loss_grad(
        model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Tensor:
        return torch.ones(len(batch[1]), 1)


@pytest.mark.parametrize("projector", [None, NoOpProjector()])
@pytest.mark.parametrize("computer", COMPUTERS[:2])
def test_of_a_task_of_single_examples(
    tmp_path: Path, computer: type, projector: Any
) -> None:
    problem = classification(torch.nn.Linear(4, 3), 4)
    options = {"gradient_computer": computer, "projector": projector}
    traker = make(problem, tmp_path, task=PerExample, **options)
    featurize(traker, problem)
    traker.finalize_features()
    score(traker, problem)
    x, y = problem.targets
    with torch.no_grad():
        expected = problem.model(x)[torch.arange(problem.m), y]
    torch.testing.assert_close(stored(tmp_path), expected)


class Strange(ImageClassificationModelOutput):
    """Its batched form gives what no computer that streams would take."""

    def get_outputs(self, *args: Any) -> Tensor:
        return super().get_outputs(*args)[:1]


def test_of_a_task_that_gives_none(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    kind = FunctionalGradientComputer
    traker = make(problem, tmp_path, task=Strange, gradient_computer=kind)
    featurize(traker, problem)
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", problem.checkpoints[0], 0, problem.m)
    message = r"Strange on the targets .*TaskError: it gives .* for 4 examples"
    with pytest.warns(TrakWarning, match=message):
        traker.score(problem.targets)
    assert stored(tmp_path).isnan().all()
    plain = make(problem, tmp_path / "plain")
    featurize(plain, problem)
    plain.finalize_features()
    found = torch.from_numpy(traker.finalize_scores("exp") + 0.0)
    assert_scores(found, score(plain, problem))


def test_experiments_of_older_versions_go_on(tmp_path: Path) -> None:
    expected = Bench(tmp_path / "new").complete()
    bench = Bench(tmp_path, "scoring")
    (bench.store / "0" / "exp_outputs.mmap").unlink()
    assert_scores(bench.complete(bench.open()), expected, 1e-6)
    assert not (bench.store / "0" / "exp_outputs.mmap").exists()


def test_outputs_come_before_their_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, "finalized")
    bench.start()
    order = []

    class Spy:
        def __init__(self, name: str, array: Any) -> None:
            self.name, self.array = name, array

        def __getattr__(self, name: str) -> Any:
            return getattr(self.array, name)

        def __getitem__(self, key: Any) -> Any:
            return self.array[key]

        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            return np.asarray(self.array)

        def __setitem__(self, key: Any, value: Any) -> None:
            order.append(self.name)
            self.array[key] = value

    store = bench.traker.saver.current_store
    for key in list(store):
        if key.startswith("exp_"):
            store[key] = Spy(key, store[key])
    images, labels = bench.problem.targets
    bench.traker.score((images, labels))
    assert order[-1] == "exp_is_scored"
    assert "exp_outputs" in order
