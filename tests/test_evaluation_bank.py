"""Banks of retrainings: what they hold, refuse, and survive on disk."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from trak.errors import NonFiniteError, OptionError, StoreCorruptError, StoreWriteError
from trak.evaluation import GroundTruth, lds, random_subsets

N, S, R, M = 13, 6, 2, 3


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def bank(rng):
    return GroundTruth(
        random_subsets(N, S),
        rng.standard_normal((S, R, M)),
        rng.integers(0, 2**31, (S, R)),
        {"epochs": 20, "rates": [0.1, None], "who": "Grüße"},
    )


def same(a, b):
    assert (a.masks == b.masks).all()
    assert a.masks.dtype == np.bool_
    assert a.outputs.dtype == b.outputs.dtype
    np.testing.assert_array_equal(a.outputs, b.outputs)
    assert (a.seeds is None) == (b.seeds is None)
    if a.seeds is not None:
        np.testing.assert_array_equal(a.seeds, b.seeds)
    assert a.metadata == b.metadata


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 13])
@pytest.mark.parametrize("s", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_bank_comes_back_as_it_was(rng, tmp_path, n, s, dtype):
    masks = rng.random((s, n)) < 0.5
    outputs = rng.standard_normal((s, R, M)).astype(dtype)
    bank = GroundTruth(masks, outputs)
    bank.save(tmp_path / "bank.npz")
    same(GroundTruth.load(tmp_path / "bank.npz"), bank)


def test_everything_comes_back(bank, tmp_path):
    bank.save(str(tmp_path / "new" / "bank"))  # no suffix is added
    same(GroundTruth.load(tmp_path / "new" / "bank"), bank)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bank"]


def test_noncontiguous_arrays_come_back(rng, tmp_path):
    masks = np.asfortranarray(random_subsets(N, 2 * S))[::2]
    bank = GroundTruth(masks, rng.standard_normal((M, R, S)).T[..., ::-1])
    bank.save(tmp_path / "bank.npz")
    same(GroundTruth.load(tmp_path / "bank.npz"), bank)


def test_missing_values_come_back(bank, tmp_path):
    bank.outputs[2, 1, 0] = np.nan
    bank.outputs[4, 0, 1] = np.inf
    bank.save(tmp_path / "bank.npz")
    same(GroundTruth.load(tmp_path / "bank.npz"), bank)


def test_a_bank_says_what_it_holds(bank):
    assert (bank.n_examples, bank.n_subsets) == (N, S)
    assert (bank.n_repeats, bank.n_targets) == (R, M)
    assert str(bank) == "6 subsets of 13 examples x 2 retrainings, 3 targets"
    bank.outputs[2, 1, 0] = np.nan
    assert str(bank).endswith("targets; 1 retrainings are not finite")


def test_diverged_retrainings_are_found_and_left_out(bank, rng):
    assert bank.non_finite().shape == (0, 2)
    same(bank.finite(), bank)
    bank.outputs[2, 1, 0] = np.nan
    bank.outputs[4, 0] = np.inf
    np.testing.assert_array_equal(bank.non_finite(), [[2, 1], [4, 0]])
    rest = bank.finite()
    keep = [0, 1, 3, 5]
    np.testing.assert_array_equal(rest.outputs, bank.outputs[keep])
    np.testing.assert_array_equal(rest.masks, bank.masks[keep])
    np.testing.assert_array_equal(rest.seeds, bank.seeds[keep])
    scores = rng.standard_normal((N, M))
    with pytest.raises(NonFiniteError, match=r"target 0 and subset 2.*finite\(\)"):
        lds(scores, bank)
    expected = lds(scores, bank.masks[keep], bank.outputs[keep])
    assert lds(scores, rest).mean == expected.mean
    assert GroundTruth(bank.masks, bank.outputs).finite().seeds is None


def test_lds_takes_a_bank(bank, rng):
    scores = rng.standard_normal((N, M))
    one, other = lds(scores, bank), lds(scores, bank.masks, bank.outputs)
    np.testing.assert_array_equal(one.per_target, other.per_target)
    assert (one.interval, one.n_repeats) == (other.interval, R)


def test_lds_of_a_bank_has_one_source_of_outputs(bank, rng):
    scores = rng.standard_normal((N, M))
    with pytest.raises(OptionError, match="GroundTruth has outputs of its own"):
        lds(scores, bank, bank.outputs)
    with pytest.raises(OptionError, match="outputs is missing"):
        lds(scores, bank.masks)


def test_lds_refuses_a_bank_of_other_sizes(bank, rng):
    with pytest.raises(OptionError, match=r"n=14 training .* subsets of 13 examples"):
        lds(rng.standard_normal((N + 1, M)), bank)
    with pytest.raises(OptionError, match=r"m=4 targets.* 3 targets"):
        lds(rng.standard_normal((N, M + 1)), bank)
    one = GroundTruth(bank.masks[:1], bank.outputs[:1])
    with pytest.raises(OptionError, match="s=1 subsets cannot rank"):
        lds(rng.standard_normal((N, M)), one)


def test_subsets_may_repeat(bank, rng):
    scores, twice = rng.standard_normal((N, M)), [0, 0, 1, 2, 3, 4, 5]
    repeated = GroundTruth(bank.masks[twice], bank.outputs[twice])
    expected = lds(scores, bank.masks[twice], bank.outputs[twice])
    assert lds(scores, repeated).mean == expected.mean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": np.zeros((S, N), int)}, "masks has shape .* dtype int64"),
        ({"masks": np.zeros(N, bool)}, r"masks has shape \(13,\)"),
        (
            {"outputs": np.zeros((S, M))},
            r"outputs has shape \(6, 3\).*outputs\[:, None\]",
        ),
        ({"outputs": np.zeros((S, R, M), int)}, "outputs has .* dtype int64"),
        ({"outputs": np.zeros((S - 1, R, M))}, "6 subsets and outputs for 5"),
        ({"seeds": np.zeros((S, R + 1), int)}, r"seeds has .*pass integers .*\(6, 2\)"),
        ({"seeds": np.zeros((S, R))}, "seeds has .* dtype float64"),
        ({"metadata": {"a": {1}}}, "cannot be written as JSON"),
        ({"metadata": {"a": float("nan")}}, "cannot be written as JSON"),
        ({"metadata": {"a": (1, 2)}}, "read back as"),
        ({"metadata": {1: 2}}, "read back as"),
        ({"metadata": [1]}, "metadata is a list"),
        ({"masks": [[True] * N] * S}, "masks is a list; pass a NumPy array"),
        ({"outputs": torch.zeros(S, R, M)}, "outputs is a Tensor; pass a NumPy"),
        ({"seeds": [[1] * R] * S}, "seeds is a list; pass a NumPy"),
    ],
)
def test_what_is_not_a_bank_is_refused(bank, untyped, change, message):
    arguments = {"masks": bank.masks, "outputs": bank.outputs, "seeds": bank.seeds}
    with pytest.raises(OptionError, match=message):
        GroundTruth(**{**arguments, **change})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"no file .*none\.npz"):
        GroundTruth.load(tmp_path / "none.npz")


def saved(bank, path):
    bank.save(path)
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": np.array(2)}, "format 2 is not 1"),
        ({"format": np.array([1, 1])}, "not the file of a bank"),
        ({"n": np.array(N + 8)}, "for n=21 examples"),
        ({"n": np.array(-1)}, "for n=-1 examples"),
        ({"masks": np.zeros((S, 2))}, "masks is float64"),
        ({"masks": np.zeros((S + 1, 2), np.uint8)}, "masks are for 7 subsets"),
        ({"outputs": np.zeros((S, M))}, "outputs has shape"),
        ({"seeds": np.zeros((S, 1), int)}, "seeds has shape"),
        ({"metadata": np.array("[1]")}, "not the file of a bank"),
        ({"metadata": np.array("{")}, "not the file of a bank"),
        ({"more": np.array(1)}, "it holds"),
        ({"outputs": None}, "it holds"),
    ],
)
def test_foreign_files_are_refused(bank, tmp_path, untyped, change, message):
    arrays = {**saved(bank, tmp_path / "bank.npz"), **change}
    kept = {name: array for name, array in arrays.items() if array is not None}
    np.savez(tmp_path / "bank.npz", **kept)
    with pytest.raises(StoreCorruptError, match=message):
        GroundTruth.load(tmp_path / "bank.npz")


def test_nothing_is_unpickled(bank, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    arrays = saved(bank, tmp_path / "bank.npz")
    arrays["metadata"] = np.array(Bomb(), dtype=object)
    np.savez(tmp_path / "bank.npz", **arrays)
    with pytest.raises(StoreCorruptError, match="allow_pickle=False"):
        GroundTruth.load(tmp_path / "bank.npz")
    np.save(tmp_path / "one.npy", np.array(Bomb(), dtype=object), allow_pickle=True)
    with pytest.raises(StoreCorruptError, match="not a file of retrainings"):
        GroundTruth.load(tmp_path / "one.npy")
    assert not (tmp_path / "exploded").exists()


def test_every_damaged_byte_is_noticed_or_harmless(tmp_path, untyped):
    bank = GroundTruth(random_subsets(4, 2), np.ones((2, 1, 1)))
    path = tmp_path / "bank.npz"
    bank.save(path)
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            found = GroundTruth.load(path)
        except StoreCorruptError:
            refused += 1
        else:
            same(found, bank)  # such as a file's date
    assert refused > len(whole) / 2


def test_a_file_cut_short_is_noticed(bank, tmp_path):
    path = tmp_path / "bank.npz"
    bank.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreCorruptError):
            GroundTruth.load(path)


def test_a_write_that_fails_leaves_the_old_bank(bank, tmp_path, monkeypatch):
    path = tmp_path / "bank.npz"
    bank.save(path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreWriteError, match="use another path") as caught:
            bank.finite().save(path)
    assert caught.value.errno == errno.ENOSPC
    same(GroundTruth.load(path), bank)
    assert [path.name for path in tmp_path.iterdir()] == ["bank.npz"]


def test_a_directory_that_cannot_be_made(bank, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreWriteError, match="use a path that this process can"):
        bank.save(tmp_path / "file" / "bank.npz")
