"""Reading state dicts from files and checkpoint folders, without unpickling objects."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trak.errors import BackendError, CheckpointFileError

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_KNOWN = (
    tuple(name + suffix for name in _WHOLE for suffix in ("", ".index.json"))
    + _ADAPTERS
)
"""Files with weights in a folder of ``transformers`` or PEFT, the best first."""

_OTHERS = {
    "zero_to_fp32.py": "DeepSpeed; its zero_to_fp32.py gathers them into one file",
    "pytorch_model_fsdp_0": (
        "FSDP, sharded; `accelerate merge-weights` gathers them into one file"
    ),
}
"""What in a folder tells that the weights are kept in a way that is not read here."""


def read_weights(path: Path) -> dict[Any, Any]:
    """Read a state dict from the disk, to the CPU.

    Args:
        path: A file of ``safetensors``, one that ``torch.save`` wrote, or a folder with
            either, in one piece or in several with an index.

    Returns:
        The state dict.

    Raises:
        CheckpointFileError: If the file is missing or damaged, holds something else, or
            could only be read by running code that it contains.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointFileError(
            f"there is no checkpoint {str(path)!r}; pass the path of a file of weights, or "
            f"of a folder with one, as it is from {str(Path.cwd())!r}."
        )
    return _read_file(path)


def holds_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights in a form that is known."""
    return any((folder / name).exists() for name in _KNOWN)


def _read_folder(folder: Path) -> dict[Any, Any]:
    for name in _KNOWN:
        path = folder / name
        if path.exists():
            return _read_shards(path) if path.suffix == ".json" else _read_file(path)
    for name, how in _OTHERS.items():
        if (folder / name).exists():
            raise CheckpointFileError(
                f"the weights in {str(folder)!r} are those of {how}. Pass that."
            )
    raise CheckpointFileError(
        f"the folder {str(folder)!r} has no weights: none of {', '.join(_KNOWN)}. Pass "
        f"the file, or one checkpoint-* folder of those that a Trainer wrote."
    )


def _read_shards(index: Path) -> dict[Any, Any]:
    """Read the files that an index names, and check that they hold what it says.

    Returns:
        The state dict.

    Raises:
        CheckpointFileError: If they do not, or the index is none.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(name) for name in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointFileError(
            f"{str(index)!r} is not an index of weights: no weight_map can be read from it "
            f"({type(error).__name__}). Copy or save the checkpoint again."
        ) from error
    found: dict[Any, Any] = {}
    for name in files:
        path = index.parent / name
        if Path(name).name != name or not path.exists():
            raise CheckpointFileError(
                f"{str(index)!r} names {name!r}, and there is no such file beside it: of "
                f"{len(files)} parts all are needed. Copy or save the checkpoint again."
            )
        part = _read_file(path)
        found |= {key: value for key, value in part.items() if places.get(key) == name}
    lost = [key for key in places if key not in found]
    if lost:
        raise CheckpointFileError(
            f"{str(index)!r} places {lost[0]!r} in {places[lost[0]]!r}, which does not hold "
            f"it ({len(lost)} such entries): the parts are of different checkpoints. Copy "
            f"or save the checkpoint again."
        )
    return found


def _read_file(path: Path) -> dict[Any, Any]:
    try:
        is_safetensors = path.suffix == ".safetensors"
        found = _read_safetensors(path) if is_safetensors else _read_pickle(path)
    except BackendError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointFileError(_explain(path, error)) from error
    if not isinstance(found, Mapping):
        raise CheckpointFileError(
            f"{str(path)!r} holds a {type(found).__name__}, not a state dict; save "
            f"model.state_dict()."
        )
    return dict(found)


def _read_safetensors(path: Path) -> dict[Any, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise BackendError(
            f"reading {str(path)!r} needs the package safetensors; pip install safetensors."
        ) from error
    found: dict[Any, Any] = load_file(path, device="cpu")
    return found


def _read_pickle(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickles of another protocol
        return torch.load(path, map_location="cpu", weights_only=True)


def _explain(path: Path, error: Exception) -> str:
    """Say why a file cannot be read.

    Returns:
        The text of an error.
    """
    name, reason = repr(str(path)), str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} cannot be read: {error.strerror}."
    with path.open("rb") as file:
        start = file.read(64)
    is_pickle = start[:1] == b"\x80" or start[:2] == b"PK"
    # "Unsupported global", or "class" or "operand", after the version of PyTorch.
    if (
        isinstance(error, pickle.UnpicklingError)
        and is_pickle
        and "nsupported" in reason
    ):
        return (
            f"{name} holds more than tensors (or is damaged), and reading it would run "
            f"code from it; that is never done here. If you trust it, read it with torch.load(path, "
            f"weights_only=False), and pass the state dict that is in it."
        )
    if start.startswith(b"version https://git-lfs"):
        return (
            f"{name} is a pointer of Git LFS and not the weights; fetch them with "
            f"`git lfs pull`."
        )
    size = path.stat().st_size
    return (
        f"{name} ({size} bytes) is damaged, or no file of weights "
        f"({type(error).__name__}: {(reason.splitlines() or [''])[0][:120]}). Copy or "
        f"save the checkpoint again."
    )
