"""The JSON records of a store: what they must agree in, and who may write them first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trak import _layout
from trak._version import __version__
from trak.errors import ModelIDException, StoreCorruptError, StoreMismatchError
from trak.savers._places import FINALIZED, GRADS_DELETED


def open_manifest(save_dir: Path, mine: dict[str, Any]) -> None:
    """Write a store's manifest, or compare it with the one that is there.

    Args:
        save_dir: The store.
        mine: What every checkpoint of it must agree in.

    Raises:
        StoreCorruptError: If there are checkpoints and no manifest.
        StoreMismatchError: If it was written with other settings, or by 0.3.2.
    """
    path = save_dir / _layout.MANIFEST
    # Looked for first: another process may be making the store at this moment.
    strays = sorted(p.name for p in save_dir.glob("id_*.json"))
    if not path.exists():
        if strays:
            raise StoreCorruptError(
                f"{save_dir} has checkpoints ({strays[0]}) but no {_layout.MANIFEST}; it "
                f"cannot be told what they are. Use another save_dir."
            )
        record = {**mine, "written by": f"trak {__version__}"}
        if _layout.write_record(path, record, replace=False):
            return
    stored = _layout.read_record(path)
    if "format" not in stored:
        raise StoreMismatchError(
            f"{save_dir} was not written by this library (its {_layout.MANIFEST} has no "
            f"format number; traker 0.3.2 leaves such stores). Its projections are "
            f"others; use a new save_dir."
        )
    for key, value in mine.items():
        if stored.get(key) != value:
            raise StoreMismatchError(
                f"{save_dir} was made with {key} = {stored.get(key)!r}, and this TRAKer "
                f"has {key} = {value!r}; the numbers would not belong together. Use the "
                f"same setting, or another save_dir."
            )


def read_model_record(path: Path) -> dict[int, dict[str, Any]]:
    """Read the record of a checkpoint, and what finalizing added to it.

    Processes that featurize write the one, those that finalize the other, so what is
    in the second stands.

    Args:
        path: Its file.

    Returns:
        The record, under its model id.

    Raises:
        StoreCorruptError: If it is not such a record.
    """
    key = path.stem.removeprefix("id_")
    records = _layout.read_record(path)
    record = records.get(key)
    is_one = re.fullmatch(r"-?\d+", key) and len(records) == 1
    flags = {"is_featurized": 0, "is_finalized": 0}
    if not is_one or not isinstance(record, dict):
        raise StoreCorruptError(
            f"{path} is not the record of a checkpoint; move it away, or use another "
            f"save_dir."
        )
    return {int(key): {**flags, **record, **read_finalized(path.parent / key)}}


def read_finalized(directory: Path) -> dict[str, Any]:
    """Read what finalizing a checkpoint, and deleting its gradients, left on record.

    Args:
        directory: The checkpoint's directory.

    Returns:
        What its record has to be updated with.
    """
    path = directory / FINALIZED
    found = _layout.read_record(path) if path.exists() else {}
    if (directory / GRADS_DELETED).exists():
        found["grads_deleted"] = True
    return found


def read_experiment_record(path: Path) -> dict[str, Any]:
    """Read the record of an experiment.

    Args:
        path: Its file.

    Returns:
        The record.

    Raises:
        StoreCorruptError: If it does not say how many targets there are.
    """
    record = _layout.read_record(path)
    num_targets = record.get("num_targets")
    if type(num_targets) is not int or num_targets < 1:
        raise StoreCorruptError(
            f"{path} is not the record of an experiment: num_targets is {num_targets!r}. "
            f"Move it away, or use another save_dir."
        )
    return record


def write_summary(path: Path, directory: Path) -> None:
    """Gather the records of all experiments in the one file that 0.3.2 has.

    Args:
        path: That file.
        directory: Where the records are.
    """
    summary = None
    while summary != (found := _read_all(directory)):  # others may write meanwhile
        summary = found
        _layout.write_record(path, summary)


def _read_all(directory: Path) -> dict[str, Any]:
    return {
        path.stem: read_experiment_record(path)
        for path in sorted(directory.glob("*.json"))
    }


def pin_weights(path: Path, model_id: int, weights: str) -> None:
    """Let only the first of several processes decide whose weights an id is for.

    Args:
        path: The file that says so.
        model_id: The id.
        weights: Fingerprint of the weights that it is claimed for.

    Raises:
        ModelIDException: If another process claimed it for other weights.
    """
    if not path.exists():
        _layout.write_record(path, {"weights": weights}, replace=False)
    first = _layout.read_record(path).get("weights")
    if first != weights:
        raise ModelIDException(
            f"model id {model_id} was taken by another process for other weights; use "
            f"another model_id."
        )
