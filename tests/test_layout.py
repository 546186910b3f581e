"""Files of the store: names, records, arrays, and what stops them from being written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trak import _layout
from trak._layout import (
    check_exp_name,
    create_array,
    create_arrays,
    make_directory,
    new_array,
    open_array,
    read_record,
    remove_dead_temporaries,
    write_record,
    writing,
)
from trak.errors import ExperimentError, StoreCorruptError, StoreWriteError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class TestNames:
    @pytest.mark.parametrize("name", ["a", "x" * 150, "cats & dogs", "é.1", "-", "a.b"])
    def test_good_ones(self, name: str) -> None:
        assert check_exp_name(name) == name

    @pytest.mark.parametrize(
        "name",
        [
            "",
            ".",
            "..",
            ".a",
            "a/b",
            "a\\b",
            "\x00",
            "a\x1f",
            "é" * 76,
            "\ud800",
            3,
            None,
        ],
    )
    def test_bad_ones(self, name: object) -> None:
        with pytest.raises(ExperimentError, match="cannot name files; use up to 150"):
            check_exp_name(name)


class TestWriting:
    @pytest.mark.parametrize(
        ("number", "remedy"),
        [
            (errno.ENOSPC, "free some space"),
            (errno.EDQUOT, "free some of your quota"),
            (errno.EFBIG, "raise the file size limit"),
            (errno.EACCES, "use a save_dir that this process can write to"),
        ],
    )
    def test_remedies(self, number: int, remedy: str) -> None:
        def fail() -> None:
            with writing(Path("/a/b")):
                raise OSError(number, "no")

        with pytest.raises(
            StoreWriteError, match=f"cannot write /a/b: .*{remedy}"
        ) as it:
            fail()
        assert it.value.errno == number
        assert isinstance(it.value, OSError)

    def test_errors_without_a_number(self) -> None:
        def fail() -> None:
            with writing(Path("/a/b")):
                raise OSError("no")

        with pytest.raises(StoreWriteError, match="cannot write /a/b"):
            fail()

    def test_directories(self, tmp_path: Path) -> None:
        make_directory(tmp_path / "a" / "b")
        make_directory(tmp_path / "a" / "b")
        (tmp_path / "file").touch()
        with pytest.raises(StoreWriteError, match="file"):
            make_directory(tmp_path / "file" / "b")


class TestRecords:
    def test_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        record = {"a": 1, "é": [None, True, 0.1]}
        assert write_record(path, record)
        assert read_record(path) == record
        assert path.stat().st_mode & 0o777 == 0o644
        assert names(tmp_path) == ["a.json"]

    def test_the_first_may_stay(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        assert write_record(path, {"a": 1}, replace=False)
        assert not write_record(path, {"a": 2}, replace=False)
        assert read_record(path) == {"a": 1}
        assert write_record(path, {"a": 3})
        assert read_record(path) == {"a": 3}
        assert names(tmp_path) == ["a.json"]

    def test_half_a_record_is_never_seen(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        write_record(path, {"a": 1})
        with pytest.raises(TypeError, match="not JSON serializable"):
            write_record(path, {"a": 2, "b": object()})
        assert read_record(path) == {"a": 1}
        assert names(tmp_path) == ["a.json"]

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1}}', b"nope"])
    def test_damaged(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(
            StoreCorruptError, match=r"a.json is damaged \(.*move it away"
        ):
            read_record(tmp_path / "a.json")

    @pytest.mark.parametrize("content", [[], 3, None, "a"])
    def test_other_values(self, tmp_path: Path, content: object) -> None:
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(StoreCorruptError, match="where a record was expected"):
            read_record(tmp_path / "a.json")


class TestArrays:
    @pytest.mark.parametrize(
        "dtype", ["float16", "float32", "float64", "int16", "int64"]
    )
    @pytest.mark.parametrize("shape", [(1, 1), (3, 2), (1, 700)])
    def test_numpy_reads_them(
        self, tmp_path: Path, shape: tuple[int, int], dtype: str
    ) -> None:
        path = tmp_path / "a.mmap"
        create_array(path, shape, dtype)
        array = open_array(path, shape, dtype)
        array[-1, -1] = 3
        array.flush()
        for found in (np.load(path), np.lib.format.open_memmap(path, mode="r")):
            assert (found.shape, found.dtype) == (shape, np.dtype(dtype))
            assert found[-1, -1] == 3
        create_array(path, shape, dtype)  # stays
        assert open_array(path, shape, dtype, "r")[-1, -1] == 3

    def test_files_that_numpy_wrote_are_read(self, tmp_path: Path) -> None:
        with (tmp_path / "a.mmap").open("wb") as file:
            np.save(file, np.eye(3, dtype="float32"))
        found = open_array(tmp_path / "a.mmap", (3, 3), "float32", "r")
        np.testing.assert_array_equal(found, np.eye(3))

    def test_blocks_are_reserved(self, tmp_path: Path) -> None:
        create_array(tmp_path / "a.mmap", (1000, 100), "float32")
        assert (tmp_path / "a.mmap").stat().st_blocks * 512 >= 400_000

    def test_without_a_way_to_reserve(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr("os.posix_fallocate")
        create_array(tmp_path / "a.mmap", (10, 10), "float32")
        assert not open_array(tmp_path / "a.mmap", (10, 10), "float32").any()

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((2, 3), "float32"), ((3, 2), "int32"), ((6, 1), "float32")],
    )
    def test_other_shapes_and_types(
        self, tmp_path: Path, shape: tuple[int, int], dtype: str
    ) -> None:
        create_array(tmp_path / "a.mmap", (3, 2), "float32")
        with pytest.raises(
            StoreCorruptError, match=r"its header is .*\(3, 2\).* shape \("
        ):
            open_array(tmp_path / "a.mmap", shape, dtype)

    @pytest.mark.parametrize("change", [-1, 1])
    def test_other_lengths(self, tmp_path: Path, change: int) -> None:
        path = tmp_path / "a.mmap"
        create_array(path, (3, 2), "float32")
        os.truncate(path, path.stat().st_size + change)
        with pytest.raises(StoreCorruptError, match="bytes where 152 were expected"):
            open_array(path, (3, 2), "float32")

    def test_not_ours_to_write(self, tmp_path: Path) -> None:
        create_array(tmp_path / "a.mmap", (3, 2), "float32")
        (tmp_path / "b.mmap").mkdir()
        with pytest.raises(StoreWriteError, match=r"b\.mmap"):
            open_array(tmp_path / "b.mmap", (3, 2), "float32")

    def test_new_ones_appear_when_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "a.mmap"
        with new_array(path, (2, 2), "float32") as array:
            array[:] = 1
            assert not path.exists()
        np.testing.assert_array_equal(np.load(path), 1)

        def fail() -> None:
            with new_array(path, (2, 2), "float32") as array:
                array[:] = 2
                raise ValueError("stop")

        with pytest.raises(ValueError, match="stop"):
            fail()
        np.testing.assert_array_equal(np.load(path), 1)
        assert names(tmp_path) == ["a.mmap"]

    def test_flags_vouch_for_the_others(self, tmp_path: Path) -> None:
        places = [(tmp_path / name, (2, 1), "int32") for name in ("rows", "flags")]
        create_arrays(places)
        create_arrays(places)
        (tmp_path / "rows").unlink()
        with pytest.raises(StoreCorruptError, match="rows is missing; delete"):
            create_arrays(places)
        (tmp_path / "flags").unlink()
        create_arrays(places)
        assert names(tmp_path) == ["flags", "rows"]

    def test_another_process_may_be_faster(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.mmap"
        write = _layout.write_header

        def slow(temporary: Path, *rest: Any) -> None:
            write(temporary, *rest)
            with path.open("wb") as file:
                np.save(file, np.ones((2, 1), dtype="float32"))

        monkeypatch.setattr(_layout, "write_header", slow)
        create_array(path, (2, 1), "float32")
        np.testing.assert_array_equal(open_array(path, (2, 1), "float32"), 1)


class TestTemporaries:
    def test_only_those_of_dead_processes_of_this_machine_go(
        self, tmp_path: Path
    ) -> None:
        machine = _layout._machine()
        stay = [
            f".trak-{machine}-{os.getpid()}-a",
            f".trak-{machine}-x-a",
            ".trak-elsewhere-9-a",
            "a.json",
        ]
        for name in (*stay, f".trak-{machine}-{2**22 + 1}-a"):
            (tmp_path / name).touch()
        remove_dead_temporaries(tmp_path)
        assert names(tmp_path) == sorted(stay)


def test_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "record.json"
    assert _layout.write_record(path, {"a": 1}, replace=False)
    assert not _layout.write_record(path, {"a": 2}, replace=False)
    assert _layout.read_record(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_the_umask_is_kept(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        _layout.write_record(tmp_path / "record.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o666 & ~umask
