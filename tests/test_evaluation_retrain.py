"""Retraining on subsets: the same outputs, however often it is interrupted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings

import numpy as np
import pytest
import torch

from trak.errors import (
    OptionError,
    StoreCorruptError,
    StoreMismatchError,
    StoreWriteError,
    TrakWarning,
)
from trak.evaluation import GroundTruth, random_subsets, retrain_subsets

N, S, R, M = 12, 5, 2, 3
MASKS = random_subsets(N, S)


class Trainer:
    """Trains a "model", two sums, and counts; dies at a training if told to."""

    def __init__(self, dies_at=None, how=KeyboardInterrupt):
        self.calls, self.dies_at, self.how = [], dies_at, how

    def __call__(self, indices, seed):
        if len(self.calls) == self.dies_at:
            raise self.how
        self.calls.append((tuple(indices.tolist()), seed))
        return float(indices.sum()), seed % 1000


def outputs(model):
    total, noise = model
    return np.array([total, noise, total * noise])


def retrain(train=None, masks=MASKS, path=None, **options):
    options = {"n_repeats": R, "progress": False, **options}
    train = Trainer() if train is None else train
    return retrain_subsets(train, outputs, masks, path, **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "there" / "bank.npz"


def parts(path):
    return sorted(path.parent.glob("bank.npz.parts/*"))


def test_every_subset_is_trained_on_with_its_own_seeds():
    train = Trainer()
    bank = retrain(train, metadata={"epochs": 3})
    assert bank.outputs.shape == (S, R, M)
    np.testing.assert_array_equal(bank.masks, MASKS)
    for j in range(S):
        indices = tuple(np.flatnonzero(MASKS[j]).tolist())
        for k in range(R):
            seed = int(bank.seeds[j, k])
            assert train.calls[j * R + k] == (indices, seed)
            expected = outputs((float(sum(indices)), seed % 1000))
            np.testing.assert_array_equal(bank.outputs[j, k], expected)
    assert len(np.unique(bank.seeds)) == S * R
    assert bank.seeds.min() >= 0
    assert bank.seeds.max() < 2**31
    assert bank.metadata == {"epochs": 3}


def test_seeds_depend_on_the_place_alone():
    some = retrain(n_repeats=1, masks=MASKS[:2]).seeds
    every = retrain(n_repeats=3).seeds
    np.testing.assert_array_equal(every[:2, :1], some)
    assert (retrain(n_repeats=3, seed=1).seeds != every).all()
    # A bank is only good if the numbers stay what they were.
    assert some[0, 0] == 2044266242


def test_tensors_and_other_types_are_taken():
    def as_tensor(model):
        return torch.tensor(outputs(model)[:2], requires_grad=True)

    found = retrain_subsets(
        Trainer(), as_tensor, torch.from_numpy(MASKS), n_repeats=R, progress=False
    )
    np.testing.assert_array_equal(found.outputs, retrain().outputs[..., :2])
    rights = retrain_subsets(
        Trainer(), lambda model: outputs(model) > 9, MASKS, progress=False
    )
    assert set(np.unique(rights.outputs)) <= {0.0, 1.0}


@pytest.mark.parametrize("dies_at", [0, 1, 4, S * R - 1])
@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_goes_on(path, dies_at, how):
    first, second = Trainer(dies_at, how), Trainer()
    with pytest.raises(how):
        retrain(first, path=path)
    assert not path.exists()
    assert len(parts(path)) == dies_at
    bank = retrain(second, path=path)
    assert first.calls + second.calls == whole_run().calls
    np.testing.assert_array_equal(bank.outputs, retrain().outputs)
    np.testing.assert_array_equal(GroundTruth.load(path).outputs, bank.outputs)
    assert [file.name for file in path.parent.iterdir()] == ["bank.npz"]


def whole_run():
    train = Trainer()
    retrain(train)
    return train


def test_what_is_done_is_not_done_again(path):
    bank = retrain(path=path)
    again = Trainer()
    np.testing.assert_array_equal(retrain(again, path=path).outputs, bank.outputs)
    assert again.calls == []


def test_a_bank_grows(path):
    retrain(path=path, masks=MASKS[:2], n_repeats=1)
    for masks, repeats, new in ((MASKS[:3], 1, 1), (MASKS[:3], 2, 3), (MASKS, 2, 4)):
        train = Trainer()
        bank = retrain(train, masks=masks, n_repeats=repeats, path=path)
        assert len(train.calls) == new
    np.testing.assert_array_equal(bank.outputs, retrain().outputs)
    np.testing.assert_array_equal(GroundTruth.load(path).outputs, bank.outputs)


def test_a_part_of_a_bank_is_given_and_the_bank_left_whole(path):
    whole = retrain(path=path)
    before = path.read_bytes()
    train = Trainer()
    some = retrain(train, masks=MASKS[:3], n_repeats=1, path=path)
    assert train.calls == []
    np.testing.assert_array_equal(some.outputs, whole.outputs[:3, :1])
    np.testing.assert_array_equal(some.seeds, whole.seeds[:3, :1])
    assert path.read_bytes() == before


def test_an_interrupted_run_may_shrink_or_grow(path):
    with pytest.raises(KeyboardInterrupt):
        retrain(Trainer(5), path=path)  # two subsets and a half
    train = Trainer()
    retrain(train, masks=MASKS[:2], path=path)
    assert train.calls == []
    assert len(parts(path)) == 1  # a larger plan's
    train = Trainer()
    np.testing.assert_array_equal(retrain(train, path=path).outputs, retrain().outputs)
    assert len(train.calls) == S * R - 5
    assert not parts(path)


def test_shards_do_their_own_and_the_last_makes_the_bank(path):
    trainers = [Trainer() for _ in range(3)]
    for index in range(2):
        with pytest.warns(TrakWarning, match=r"bank\.npz: [24] of 5 subsets"):
            bank = retrain(trainers[index], path=path, shard=(index, 3))
        assert not path.exists()
    np.testing.assert_array_equal(bank.masks, MASKS[[0, 1, 3, 4]])
    np.testing.assert_array_equal(bank.outputs, retrain().outputs[[0, 1, 3, 4]])
    bank = retrain(trainers[2], path=path, shard=(2, 3))
    np.testing.assert_array_equal(bank.outputs, retrain().outputs)
    assert [len(train.calls) for train in trainers] == [4, 4, 2]
    assert path.exists()
    again = Trainer()
    retrain(again, path=path, shard=(0, 3))  # a shard that is started again
    assert again.calls == []


def test_without_a_shard_what_shards_left_is_done(path):
    with pytest.warns(TrakWarning, match="3 of 5 subsets"):
        retrain(path=path, shard=(0, 2))
    train = Trainer()
    retrain(train, path=path)
    assert len(train.calls) == 2 * R


def run_shard(path, index, count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrakWarning)
        retrain(path=path, shard=(index, count))


def die_at_the_third(path):
    retrain(Killed(), path=path)


class Killed(Trainer):
    def __call__(self, indices, seed):
        if len(self.calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(indices, seed)


def test_processes_share_a_path_and_may_be_killed(path):
    spawn = multiprocessing.get_context("spawn")
    doomed = spawn.Process(target=die_at_the_third, args=(path,))
    doomed.start()
    doomed.join()
    assert doomed.exitcode == -signal.SIGKILL
    assert len(parts(path)) == 2
    (path.parent / "bank.npz.parts" / f".trak-elsewhere-1-{'0' * 32}").touch()
    shards = [spawn.Process(target=run_shard, args=(path, i, 2)) for i in range(2)]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
        assert shard.exitcode == 0
    train = Trainer()
    np.testing.assert_array_equal(retrain(train, path=path).outputs, retrain().outputs)
    assert train.calls == []
    # What a process of another machine is writing is not ours to remove.
    assert [part.name[:5] for part in parts(path)] == [".trak"]


def test_parts_that_another_process_moved_into_the_bank_are_no_loss(path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        retrain(Trainer(4), path=path)
    read, others = np.load, []

    def late(*args, **kwargs):
        if not others:
            others.append(None)
            others[0] = retrain(path=path)  # the other process, in between
        return read(*args, **kwargs)

    monkeypatch.setattr("trak.evaluation._files.np.load", late)
    train = Trainer()
    bank = retrain(train, path=path)
    assert train.calls == []
    np.testing.assert_array_equal(bank.outputs, others[0].outputs)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": random_subsets(N + 1, S)}, "subsets of n=12 .* and n=13 was asked"),
        ({"masks": random_subsets(N, S, seed=1)}, "other subsets than"),
        ({"seed": 1}, "other seeds than"),
        ({"metadata": {"epochs": 2}}, r"metadata \{'epochs': 1\}, and \{'epochs': 2\}"),
        ({"masks": MASKS[:3], "n_repeats": 3}, "5 subsets x 2 .*3 x 3 were asked"),
    ],
)
def test_other_retrainings_are_not_mixed_in(path, finished, options, message):
    asked = {"metadata": {"epochs": 1}}
    if finished:
        retrain(path=path, **asked)
    elif "n_repeats" in options:
        return  # parts of larger and smaller plans are the same
    else:
        with pytest.raises(KeyboardInterrupt):
            retrain(Trainer(3), path=path, **asked)
        message = r"parts/000000-0000-.* another subset, seed or metadata"
    train = Trainer()
    with pytest.raises(StoreMismatchError, match=message):
        retrain(train, path=path, **{**asked, **options})
    assert train.calls == []


def test_a_bank_without_seeds_is_not_added_to(path):
    bank = retrain()
    GroundTruth(bank.masks, bank.outputs).save(path)
    with pytest.raises(StoreMismatchError, match="of other seeds"):
        retrain(path=path)


def test_damaged_retrainings_are_named(path):
    with pytest.raises(KeyboardInterrupt):
        retrain(Trainer(2), path=path)
    part = parts(path)[0]
    whole = part.read_bytes()
    part.write_bytes(whole[:-30])
    with pytest.raises(StoreCorruptError, match=part.name):
        retrain(path=path)
    np.savez(part, outputs=np.zeros((2, 2)))
    with pytest.raises(StoreCorruptError, match="not the file of a retraining"):
        retrain(path=path)
    part.write_bytes(whole)
    retrain(path=path).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(StoreCorruptError, match=r"bank\.npz"):
        retrain(path=path)


def test_shards_with_other_targets_are_not_put_together(path):
    with pytest.warns(TrakWarning, match="subsets are retrained"):
        retrain(path=path, shard=(0, 2))
    outsider = path.parent / "bank.npz.parts" / parts(path)[0].name
    np.savez(outsider, outputs=np.zeros(M + 1))
    with pytest.raises(StoreMismatchError, match=r"outputs on \[3, 4\] targets"):
        retrain(path=path)


def test_diverged_retrainings_are_kept_and_told_of(path):
    def diverging(model):
        return outputs(model) if model[0] < 35 else np.array([1.0, np.nan, 2.0])

    sums = MASKS @ np.arange(N)
    bad = int((sums >= 35).sum())
    assert 0 < bad < S
    for _ in range(2):  # the second time from the store
        with pytest.warns(TrakWarning, match=f"^{bad} of 5 retrainings .* finite"):
            bank = retrain_subsets(Trainer(), diverging, MASKS, path, progress=False)
        np.testing.assert_array_equal(
            bank.non_finite()[:, 0], np.flatnonzero(sums >= 35)
        )
    assert bank.finite().n_subsets == S - bad


@pytest.mark.parametrize("wrong", [np.zeros((3, 1)), np.float64(1.0), np.array(["a"])])
def test_outputs_are_one_number_a_target(untyped, wrong):
    with pytest.raises(OptionError, match=r"outputs\(model\) (gave|is)"):
        retrain_subsets(Trainer(), lambda _: wrong, MASKS, progress=False)


def test_outputs_are_of_the_same_targets(path):
    sizes = iter([3, 3, 4])
    with pytest.raises(OptionError, match="4 numbers where 3 targets were expected"):
        retrain_subsets(
            Trainer(), lambda _: np.zeros(next(sizes)), MASKS, path, progress=False
        )
    with pytest.raises(OptionError, match="2 numbers where 3 targets"):
        retrain_subsets(Trainer(), lambda _: np.zeros(2), MASKS, path, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": MASKS.astype(np.int64)}, "masks has dtype int64"),
        ({"masks": MASKS[0]}, r"masks has shape \(12,\)"),
        ({"masks": MASKS[:0]}, "at least one subset"),
        ({"masks": MASKS & (np.arange(S) != 3)[:, None]}, r"masks\[3\] holds no train"),
        ({"n_repeats": 0}, "n_repeats must be at least 1"),
        ({"seed": -1}, "seed=-1; pass a whole number"),
        ({"shard": (2, 2), "path": "x"}, r"shard=\(2, 2\) of 5"),
        ({"shard": (0, 6), "path": "x"}, "no more shards than subsets"),
        ({"shard": (-1, 2), "path": "x"}, "index from 0"),
        ({"shard": (0, 2)}, "without a path"),
        ({"shard": 0}, "shard=0; pass a list"),
        ({"shard": (0, 1, 2)}, r"shard=\(0, 1, 2\); pass \(index, count\)"),
        ({"shard": (0, 1.5), "path": "x"}, "entry of shard must be a whole number"),
        ({"n_repeats": 1.5}, "n_repeats must be a whole number"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"metadata": []}, "metadata is a list"),
        ({"path": "."}, "is a directory; pass the path of a file"),
        ({"metadata": {"x": object()}, "path": "x"}, "metadata cannot be written"),
        ({"metadata": {"x": object()}}, "metadata cannot be written"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(untyped, options, message):
    train = Trainer()
    with pytest.raises(OptionError, match=message):
        retrain(train, **options)
    assert train.calls == []


def test_the_bar_counts_what_is_there(path, capsys):
    with pytest.raises(KeyboardInterrupt):
        retrain(Trainer(4), path=path)
    assert capsys.readouterr().err == ""
    retrain(path=path, progress=True)
    assert f"{S * R}/{S * R}" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_refused_before_any_training(tmp_path):
    train = Trainer()
    (tmp_path / "file").touch()
    with pytest.raises(StoreWriteError, match=r"cannot write .*bank\.npz\.parts"):
        retrain(train, path=tmp_path / "file" / "bank.npz")
    assert train.calls == []
