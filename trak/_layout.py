"""The on-disk contract: every file's name, axes and type, and how files come to be.

Arrays are NumPy ``.npy`` files (named ``.mmap``, as 0.3.2 names them) that are mapped
into memory; records are JSON. Nothing is ever unpickled. A file appears under its name
only when it is whole: it is made under a temporary name and then linked or renamed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trak.errors import ExperimentError, StoreCorruptError, StoreWriteError

FORMAT = 1
"""Version of everything this module describes."""

MANIFEST = "metadata.json"
EXPERIMENTS = "experiments.json"


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One kind of array file."""

    path: str
    """Path under ``save_dir``; ``{model}`` and ``{exp}`` stand for the two names."""

    axes: tuple[str, str]
    """Symbols of its axes; ``q`` is ``min(n, p)``."""

    dtype: str
    """NumPy type name, or ``"store"`` for the type that features are stored in."""


TRAIN_ARRAYS = {
    "grads": ArraySpec("{model}/grads.mmap", ("n", "p"), "store"),
    "grads_exponent": ArraySpec("{model}/grads_exponent.mmap", ("n", "1"), "int16"),
    "out_to_loss": ArraySpec("{model}/out_to_loss.mmap", ("n", "1"), "float32"),
    "row_digest": ArraySpec("{model}/_row_digest.mmap", ("n", "1"), "int64"),
    "is_featurized": ArraySpec("{model}/_is_featurized.mmap", ("n", "1"), "int32"),
}
"""Arrays of a checkpoint; of a row, the flag is written last."""

DERIVED_ARRAYS = {
    "gram": ArraySpec("{model}/gram.mmap", ("q", "q"), "float64"),
    "weighted_gram": ArraySpec("{model}/weighted_gram.mmap", ("q", "q"), "float64"),
    "features": ArraySpec("{model}/features.mmap", ("n", "p"), "float32"),
}
"""Arrays computed from those, present once asked for; one Gram matrix, not both."""

ROW_EXPONENT = "row_exponent"
"""Key of a checkpoint's record: which power of ``out_to_loss`` its Gram matrix's rows
were multiplied with; ``gram`` is that of power 0."""

TARGET_ARRAYS = {
    "grads": ArraySpec("{model}/{exp}_grads.mmap", ("m", "p"), "store"),
    "grads_exponent": ArraySpec(
        "{model}/{exp}_grads_exponent.mmap", ("m", "1"), "int16"
    ),
    "row_digest": ArraySpec("{model}/{exp}_row_digest.mmap", ("m", "1"), "int64"),
    "outputs": ArraySpec("{model}/{exp}_outputs.mmap", ("m", "1"), "float64"),
    "is_scored": ArraySpec("{model}/{exp}_is_scored.mmap", ("m", "1"), "int32"),
}
"""Arrays of an experiment on a checkpoint; the store's keys begin with ``{exp}_``."""

LATER = frozenset({"outputs"})
"""Those of them that experiments of older versions do not have."""

SCORES = ArraySpec("scores/{exp}.mmap", ("n", "m"), "float32")
"""The result of an experiment."""

PENDING, DONE, SKIPPED = 0, 1, 2
"""States of a row: not there, stored, and left out for want of finite numbers."""


def check_exp_name(exp_name: object) -> str:
    """Refuse an experiment name that cannot be a file name inside the store.

    Returns:
        The name.

    Raises:
        ExperimentError: If it is empty, starts with a dot, is longer than 150 bytes,
            or has a path separator or a control character.
    """
    bad = (
        not isinstance(exp_name, str)
        or not exp_name
        or exp_name.startswith(".")
        or len(exp_name.encode(errors="replace")) > 150
        or re.search(r"[/\\\x00-\x1f\ud800-\udfff]", exp_name) is not None
    )
    if bad or not isinstance(exp_name, str):
        raise ExperimentError(
            f"exp_name={exp_name!r} cannot name files; use up to 150 bytes without path "
            f"separators, control characters, lone surrogates or a leading dot."
        )
    return exp_name


@contextlib.contextmanager
def writing(path: Path, place: str = "save_dir") -> Iterator[None]:
    """Name the file and the remedy when the operating system refuses to write.

    Raises:
        StoreWriteError: In place of the OSError.
    """
    try:
        yield
    except OSError as error:
        remedy = {
            errno.ENOSPC: f"free some space, or use another {place}",
            errno.EDQUOT: f"free some of your quota, or use another {place}",
            errno.EFBIG: f"raise the file size limit, or use another {place}",
        }.get(error.errno or 0, f"use a {place} that this process can write to")
        raise StoreWriteError(
            error.errno,
            f"cannot write {path}: {os.strerror(error.errno or 0)}; {remedy}. What was "
            f"stored before is still there",
        ) from error


def make_directory(path: Path) -> None:
    """Make a directory and its parents, if they are not there yet."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


_TEMPORARY = re.compile(r"\.trak-(?P<machine>.+)-(?P<pid>\d+)-[a-z0-9_]+")

_WEEK = 7 * 24 * 3600.0

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems without hard links answer; there, the last of two writers wins."""


def _machine() -> str:
    """Name this host and its table of processes, of which every container has its own."""
    try:
        processes = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        processes = 0
    return f"{socket.gethostname()}-{processes}"


@contextlib.contextmanager
def temporary_beside(path: Path, place: str = "save_dir") -> Iterator[Path]:
    """Give a new file's path in the same directory; it is gone afterwards."""
    with writing(path, place):
        temporary = path.parent / f".trak-{_machine()}-{os.getpid()}-{uuid.uuid4().hex}"
        temporary.touch(exist_ok=False)  # with the permissions that the umask leaves
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remove_dead_temporaries(directory: Path) -> None:
    """Remove what killed processes left half-made in a directory.

    Whether a process of another machine is alive cannot be seen from here; what such
    processes left goes after a week without a change.
    """
    for path in directory.glob(".trak-*"):
        made = _TEMPORARY.fullmatch(path.name)
        if made is not None:
            with contextlib.suppress(OSError):  # another process removed it, or may
                if _is_dead(path, made["machine"], made["pid"]):
                    path.unlink()


def _is_dead(temporary: Path, machine: str, pid: str) -> bool:
    if machine == _machine() and Path("/proc/self").exists():
        return not Path(f"/proc/{pid}").exists()
    return time.time() - temporary.stat().st_mtime > _WEEK


def write_record(
    path: Path, record: Mapping[str, Any], *, replace: bool = True
) -> bool:
    """Write a JSON record so that no reader ever sees a part of it.

    Args:
        path: Where.
        record: What.
        replace: Whether a record already there gives way; if not, it stays.

    Returns:
        Whether the record was written.

    Raises:
        StoreWriteError: If the file system refuses.
    """
    with temporary_beside(path) as temporary, writing(path):
        with temporary.open("w") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        return _publish(temporary, path, replace=replace)


def _publish(temporary: Path, path: Path, *, replace: bool) -> bool:
    try:
        if not replace:
            os.link(temporary, path)
            return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False
    temporary.replace(path)
    return True


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON record.

    Returns:
        The record.

    Raises:
        StoreCorruptError: If it is not a JSON object.
    """
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:  # not UTF-8, or not JSON
        raise StoreCorruptError(
            f"{path} is damaged ({error}); move it away, or use another save_dir."
        ) from error
    if not isinstance(record, dict):
        raise StoreCorruptError(
            f"{path} holds a {type(record).__name__} where a record was expected; it is "
            f"not a file of this store. Move it away, or use another save_dir."
        )
    return record


def create_arrays(places: Sequence[tuple[Path, tuple[int, int], str]]) -> None:
    """Make arrays of zeros where they are not there, the array of flags last.

    Args:
        places: Path, shape and type of each; flags say which rows of the others count.

    Raises:
        StoreCorruptError: If the flags are there and another array is not.
    """
    # Once there are flags, everything was there: no other process is still making it.
    if places[-1][0].exists():
        for path, _, _ in places:
            if not path.exists():
                raise StoreCorruptError(f"{path} is missing; {_REMEDY}")
    for place in places:
        create_array(*place)


def create_array(path: Path, shape: tuple[int, int], dtype: str) -> None:
    """Make an array of zeros with all its blocks on disk, unless it is there already.

    The blocks are reserved at once, so that a full disk is an error here and not a
    crash of the process at some later write.

    Raises:
        StoreWriteError: If the file system refuses.
    """
    if path.exists():
        return
    with temporary_beside(path) as temporary, writing(path):
        write_header(temporary, shape, dtype)
        _publish(temporary, path, replace=False)


@contextlib.contextmanager
def new_array(
    path: Path, shape: tuple[int, int], dtype: str, label: bytes = b""
) -> Iterator[np.memmap]:
    """Fill a new array, which takes its name only when the block ends without error.

    Args:
        path: Where.
        shape: Its shape.
        dtype: Its type's name.
        label: What follows the data: in the same file, so that no crash can part them.

    Yields:
        The array, of zeros.
    """
    with temporary_beside(path) as temporary:
        with writing(path):
            write_header(temporary, shape, dtype, label)
        array = open_array(temporary, shape, dtype, label=label)
        yield array
        with writing(path):
            array.flush()
            _publish(temporary, path, replace=True)


def write_header(
    path: Path, shape: tuple[int, int], dtype: str, label: bytes = b""
) -> None:
    """Write an array file's header and label, and reserve its blocks."""
    with path.open("wb") as file:
        size = file.write(header(shape, dtype))
        size += shape[0] * shape[1] * np.dtype(dtype).itemsize
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size + len(label))
        file.truncate(size)
        file.seek(size)
        file.write(label)


def header(shape: tuple[int, int], dtype: str) -> bytes:
    """Give what precedes the data of an array file."""
    file = io.BytesIO()
    fields = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def open_array(
    path: Path,
    shape: tuple[int, int],
    dtype: str,
    mode: Any = "r+",
    label: bytes = b"",
) -> np.memmap:
    """Map an array file, after checking that it is the one that was made.

    Args:
        path: Where.
        shape: Its shape.
        dtype: Its type's name.
        mode: How NumPy maps it: ``"r"``, ``"r+"`` or ``"c"``.
        label: What follows the data; only its length is checked.

    Returns:
        The array.

    Raises:
        StoreCorruptError: If its header, shape, type or length is another.
        StoreWriteError: If it may not be written to.
    """
    with writing(path), path.open("rb") as file:
        prefix = file.read(10)
        text = file.read(int.from_bytes(prefix[8:], "little"))
        offset = file.tell()
        actual = os.fstat(file.fileno()).st_size
    expected = header(shape, dtype)
    # The padding of the header is not the same in every version of NumPy.
    if prefix[:8] != expected[:8] or text.strip() != expected[10:].strip():
        raise StoreCorruptError(
            f"{path} is not the array file that belongs there: its header is "
            f"{(prefix + text)[:99]!r}, where an array of {dtype} of shape {shape} was "
            f"expected; {_REMEDY}"
        )
    length = offset + shape[0] * shape[1] * np.dtype(dtype).itemsize + len(label)
    if actual != length:
        raise StoreCorruptError(
            f"{path} has {actual} bytes where {length} were expected: it was truncated or "
            f"written over; {_REMEDY}"
        )
    with writing(path):
        return np.memmap(path, dtype, mode, offset, shape)


_REMEDY = "delete what belongs to this checkpoint or experiment, and compute it again."
