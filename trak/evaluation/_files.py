"""Files of named arrays: written whole or not at all, and never unpickled."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trak._layout import temporary_beside, writing
from trak.errors import StoreCorruptError

_DAMAGE = (
    # What NumPy and zipfile raise for files that are cut short, foreign or garbled.
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def check_writable(directory: Path) -> None:
    """Make a directory, and find out whether files can be made in it.

    Raises:
        StoreWriteError: If the file system refuses.
    """
    with writing(directory, "path"):
        directory.mkdir(parents=True, exist_ok=True)
    with temporary_beside(directory / "new", "path"):
        pass


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file of named arrays, an ``.npz``, in the place of any that is there.

    Raises:
        StoreWriteError: If the file system refuses.
    """
    with writing(path, "path"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path, "path") as temporary, writing(path, "path"):
        with temporary.open("wb") as file:
            # Names are the caller's; none is that of np.savez's own argument.
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a file of named arrays.

    Returns:
        The arrays.

    Raises:
        StoreCorruptError: If it is no such file, or its contents changed.
    """
    contents = path.read_bytes()  # what fails below is not the disk
    try:
        return _read_checked(io.BytesIO(contents))
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise StoreCorruptError(
            f"{path} is not a file of retrainings, or is damaged ({reason}); move it away."
        ) from error


def _read_checked(file: io.BytesIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()  # before any array's header is parsed
    if bad is not None:
        raise ValueError(f"{bad} has another checksum")
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
