"""Whatever happens to a file of a store: a named error, or the right scores."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bench import Bench
from trak.errors import StoreCorruptError, StoreMismatchError, TrakError

ARRAYS = [
    "0/grads.mmap",
    "0/grads_exponent.mmap",
    "0/out_to_loss.mmap",
    "0/_row_digest.mmap",
    "0/_is_featurized.mmap",
    "0/weighted_gram.mmap",
    "0/features.mmap",
    "0/exp_grads.mmap",
    "0/exp_grads_exponent.mmap",
    "0/exp_row_digest.mmap",
    "0/exp_outputs.mmap",
    "0/exp_is_scored.mmap",
    "scores/exp.mmap",
]
RECORDS = ["metadata.json", "id_0.json", "0/finalized.json", "experiments/exp.json"]
# The first is written for readers of 0.3.2, the other matters to concurrent writers.
NOT_READ = ["experiments.json", "0/weights.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A store with every file there is, and its scores."""
    bench = Bench(tmp_path_factory.mktemp("finished"), use_half_precision=True)
    scores, traker = bench.complete(), bench.traker
    traker.saver.load_current_store(0)
    assert traker.saver.current_store["features"].shape == (11, 7)
    files = {str(p.relative_to(bench.store)) for p in bench.store.glob("**/*.*")}
    assert files == {*ARRAYS, *RECORDS, *NOT_READ}
    return bench.store, scores


@pytest.fixture
def bench(tmp_path: Path, finished: tuple[Path, Tensor]) -> Bench:
    result = Bench(tmp_path, use_half_precision=True)
    shutil.rmtree(result.store)
    shutil.copytree(finished[0], result.store)
    return result


def complete(bench: Bench) -> Tensor:
    return bench.complete(bench.open(use_half_precision=True))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_byte_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(8))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def objects(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)


def saved(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def other_shape(path: Path) -> None:
    array = np.load(path)
    saved(path, array[:-1])


def transposed(path: Path) -> None:
    array = np.load(path)
    saved(path, np.asfortranarray(np.tile(array, (1, 2)))[:, : array.shape[1]])


def other_dtype(path: Path) -> None:
    array = np.load(path)
    saved(path, array.astype("complex64"))


def other_byte_order(path: Path) -> None:
    array = np.load(path)
    saved(path, array.astype(array.dtype.newbyteorder(">")))


def other_version(path: Path) -> None:
    array = np.load(path)
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))


FILE_DAMAGE = [half, one_byte_short, emptied, garbage, pickled]
ARRAY_DAMAGE = [
    longer,
    objects,
    other_shape,
    other_dtype,
    other_byte_order,
    other_version,
]


@pytest.mark.parametrize("damage", FILE_DAMAGE + ARRAY_DAMAGE)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(bench: Bench, name: str, damage: Callable[[Path], None]) -> None:
    path = bench.store / name
    damage(path)
    with pytest.raises(StoreCorruptError, match=path.name):
        complete(bench)


@pytest.mark.parametrize("damage", FILE_DAMAGE)
@pytest.mark.parametrize("name", RECORDS)
def test_records(bench: Bench, name: str, damage: Callable[[Path], None]) -> None:
    path = bench.store / name
    damage(path)
    with pytest.raises(StoreCorruptError, match=path.name):
        complete(bench)


@pytest.mark.parametrize("content", [[], 3, "x", None, {}, {"0": 3}, {"9": {}}])
@pytest.mark.parametrize("name", ["id_0.json", "experiments/exp.json"])
def test_records_of_other_content(bench: Bench, name: str, content: object) -> None:
    (bench.store / name).write_text(json.dumps(content))
    with pytest.raises(StoreCorruptError, match=Path(name).name):
        complete(bench)


@pytest.mark.parametrize("count", [0, -1, 2.5, "4", True, None])
def test_experiments_of_no_size(bench: Bench, count: object) -> None:
    path = bench.store / "experiments/exp.json"
    path.write_text(json.dumps({"num_targets": count}))
    with pytest.raises(StoreCorruptError, match="is not the record"):
        complete(bench)


@pytest.mark.parametrize("name", NOT_READ)
@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_summaries(
    bench: Bench,
    finished: tuple[Path, Tensor],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    damage(bench.store / name)
    torch.testing.assert_close(complete(bench), finished[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ARRAYS + RECORDS + NOT_READ)
def test_missing_files(bench: Bench, finished: tuple[Path, Tensor], name: str) -> None:
    path = bench.store / name
    path.unlink()
    try:
        scores = complete(bench)
    except TrakError:
        return
    torch.testing.assert_close(scores, finished[1])


def test_a_checkpoint_may_be_deleted_and_made_again(
    bench: Bench, finished: tuple[Path, Tensor]
) -> None:
    shutil.rmtree(bench.store / "0")
    (bench.store / "id_0.json").unlink()
    torch.testing.assert_close(complete(bench), finished[1], rtol=0, atol=0)


def test_a_store_of_another_library(bench: Bench) -> None:
    shutil.rmtree(bench.store)
    bench.store.mkdir()
    manifest = {"JL dimension": 7, "JL matrix type": "rademacher", "train set size": 11}
    (bench.store / "metadata.json").write_text(json.dumps(manifest))
    (bench.store / "id_0.json").write_text(json.dumps({"0": {"is_featurized": 1}}))
    with pytest.raises(StoreMismatchError, match="no format number; traker"):
        bench.open()


def test_headers_with_any_byte_changed(
    bench: Bench, finished: tuple[Path, Tensor]
) -> None:
    path = bench.store / "0/grads.mmap"
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    expected = np.load(path)
    traker = bench.open(use_half_precision=True)
    for position in range(128):
        for byte in (*generator.bytes(2), *b"({[\\\"'#0"):
            changed = bytearray(whole)
            changed[position] = byte
            path.write_bytes(changed)
            try:
                traker.saver.load_current_store(0)
            except StoreCorruptError:
                continue
            found = traker.saver.current_store["grads"]  # one space for another
            np.testing.assert_array_equal(found, expected)
