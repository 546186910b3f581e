"""The saver of files: the contract, and what disks and other processes do to it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contracts.saver_contract import M, N, P, SaverContract
from trak import _layout
from trak._layout import ArraySpec
from trak.errors import (
    ModelIDException,
    StoreCorruptError,
    StoreWriteError,
)
from trak.savers import MmapSaver


class TestMmapSaver(SaverContract):
    kind = MmapSaver

    def stored(self, directory: Path, model_id: int, key: str) -> np.ndarray | None:
        path = directory / str(model_id) / f"{key}.mmap"
        if key == "is_featurized":
            path = path.with_name("_is_featurized.mmap")
        if key == "exp_scores":
            path = directory / "scores" / "exp.mmap"
        return np.load(path) if path.exists() else None


def make(directory: Path, **options: Any) -> MmapSaver:
    saver = TestMmapSaver().make(directory, **options)
    assert isinstance(saver, MmapSaver)
    return saver


def finalized(directory: Path) -> MmapSaver:
    saver = TestMmapSaver().finalized(directory)
    assert isinstance(saver, MmapSaver)
    return saver


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as a full disk would not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.glob("**/*"))
        if path.is_file()
    }


def test_a_full_disk_takes_nothing_away(tmp_path: Path) -> None:
    saver = finalized(tmp_path)
    saver.init_experiment("exp", M, 4)
    before = files(tmp_path)

    def scores() -> None:
        with saver.open_scores("exp", 1000) as array:
            array[:] = 1.0

    calls: list[Any] = [
        lambda: saver.register_model_id(5),
        lambda: saver.init_experiment("other", 1000, 4),
        lambda: saver.keep_gram(np.eye(P)),
        scores,
    ]
    for call in calls:
        with (
            file_size_limit(100),
            pytest.raises(
                StoreWriteError, match="What was stored before is still there"
            ),
        ):
            call()
        assert files(tmp_path).items() >= before.items() - {
            item for item in before.items() if "features" in item[0]
        }
    saver.register_model_id(5)  # there is space again
    assert saver.current_store["grads"].shape == (N, P)


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    saver = finalized(tmp_path)
    saver.init_experiment("exp", M, 4)
    with file_size_limit(10), pytest.raises(StoreWriteError):
        saver.register_model_id(5)
    assert not [name for name in files(tmp_path) if ".trak-" in name]


def test_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    saver = finalized(tmp_path)
    machine = _layout._machine()
    for directory in (tmp_path / "4", tmp_path / "scores"):
        for pid in (2**22 + 1, os.getpid()):
            (directory / f".trak-{machine}-{pid}-abc").touch()
    saver.init_store(4)
    saver.init_experiment("exp", M, 4)
    with saver.open_scores("exp", M) as array:
        array[:] = 1.0
    left = [name for name in files(tmp_path) if ".trak-" in name]
    assert all(f"-{os.getpid()}-" in name for name in left)
    assert len(left) == 2


def test_the_manifest_says_what_is_stored(tmp_path: Path) -> None:
    make(tmp_path, use_half_precision=True)
    manifest = json.loads((tmp_path / "metadata.json").read_text())
    assert manifest["format"] == _layout.FORMAT
    assert manifest["dtype"] == "float16"
    assert manifest["written by"].startswith("trak ")


def test_half_precision_has_exponents(tmp_path: Path) -> None:
    saver = make(tmp_path, use_half_precision=True)
    saver.register_model_id(4)
    saver.init_experiment("exp", M, 4)
    assert saver.current_store["grads"].dtype == np.float16
    assert saver.current_store["grads_exponent"].shape == (N, 1)
    assert saver.current_store["exp_grads_exponent"].shape == (M, 1)


def test_checkpoints_without_a_manifest(tmp_path: Path) -> None:
    finalized(tmp_path)
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(
        StoreCorruptError, match=r"has checkpoints \(id_4.json\) but no"
    ):
        make(tmp_path)


def test_an_id_belongs_to_the_first_weights(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    for saver, weights in ((first, "a"), (second, "b")):
        saver.register_model_id(0)
        saver.model_ids[0]["weights"] = weights
    first.serialize_current_model_id_metadata()
    with pytest.raises(ModelIDException, match="taken by another process for other"):
        second.serialize_current_model_id_metadata()


def test_what_another_process_finalized_stays_so(tmp_path: Path) -> None:
    TestMmapSaver().filled(tmp_path)
    slow = make(tmp_path)
    slow.load_current_store(4)
    quick = make(tmp_path)
    quick.load_current_store(4)
    quick.model_ids[4] |= {"is_finalized": 1, "report": "done"}
    quick.serialize_current_model_id_metadata()
    slow.serialize_current_model_id_metadata()
    assert make(tmp_path).model_ids[4]["report"] == "done"


def test_a_deleted_directory_is_explained(tmp_path: Path) -> None:
    saver = finalized(tmp_path)
    (tmp_path / "4" / "grads.mmap").unlink()
    with pytest.raises(
        ModelIDException, match=r"no grads.mmap .*and id_4.json, and feat"
    ):
        saver.load_current_store(4)


def test_digests_of_another_checkpoint(tmp_path: Path) -> None:
    saver = finalized(tmp_path)
    digests = saver.open_digests(4)
    assert digests is not None
    assert sorted(digests) == ["is_featurized", "row_digest"]
    with pytest.raises(ValueError, match="read-only"):
        digests["row_digest"][0] = 1
    (tmp_path / "4" / "_row_digest.mmap").unlink()
    assert saver.open_digests(4) is None


def test_nothing_is_loaded_at_first(tmp_path: Path) -> None:
    saver = make(tmp_path)
    with pytest.raises(ModelIDException, match="load or register one first"):
        saver.keep_gram(np.eye(P))


def test_a_gram_matrix_replaces_older_features(tmp_path: Path) -> None:
    saver = finalized(tmp_path)
    saver.keep_gram(np.eye(P))
    assert not (tmp_path / "4" / "features.mmap").exists()
    with pytest.raises(KeyError, match="features"):
        saver.current_store["features"]


def test_features_on_demand(tmp_path: Path) -> None:
    saver = finalized(tmp_path)
    saver.keep_gram(np.eye(P))

    def make_features(model_id: int, store: dict[str, Any], array: np.memmap) -> None:
        array[:] = model_id * store["gram"][0, 0]

    saver.make_features = make_features
    np.testing.assert_array_equal(saver.current_store["features"], 4.0)
    assert saver.current_store.get("features") is not None
    with pytest.raises(KeyError, match="nothing"):
        saver.current_store["nothing"]


def test_loading_an_experiment_loads_its_checkpoint(tmp_path: Path) -> None:
    saver = finalized(tmp_path)
    saver.init_experiment("exp", M, 4)
    saver.register_model_id(5)
    saver.load_current_store(4, "exp", None)
    assert saver.current_model_id == 4
    np.testing.assert_array_equal(saver.current_store["out_to_loss"], 0.5)


def test_modes_of_mapping(tmp_path: Path) -> None:
    saver = finalized(tmp_path)
    saver.load_current_store(4, mode="r")
    with pytest.raises(ValueError, match="read-only"):
        saver.current_store["grads"][0] = 1
    saver.load_current_store(4, mode="c")
    saver.current_store["grads"][0] = 99
    saver.load_current_store(4, mode=None)
    assert saver.current_store["grads"][0, 0] == 0


def test_every_array_is_declared_once() -> None:
    specs = [
        *_layout.TRAIN_ARRAYS.values(),
        *_layout.DERIVED_ARRAYS.values(),
        *_layout.TARGET_ARRAYS.values(),
        _layout.SCORES,
    ]
    assert all(isinstance(spec, ArraySpec) for spec in specs)
    assert len({spec.path for spec in specs}) == len(specs)
