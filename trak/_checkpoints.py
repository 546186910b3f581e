"""Loading a checkpoint into the model, after checking that it can be right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from trak._fitting import check_ties, fit
from trak._params import fingerprint, first_non_finite
from trak._types import Checkpoint
from trak._weights_files import read_weights
from trak.errors import (
    CheckpointError,
    ModelIDException,
    ModelModeError,
    NonFiniteError,
    OrderError,
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint in a model, and what tells that it is still there."""

    weights: str
    """Fingerprint of the weights."""

    versions: tuple[tuple[int, int, int], ...]
    """For every parameter its identity, its address and how often it was written to."""


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> str:
    """Load a checkpoint and put the model in evaluation mode.

    Args:
        model: Changed in place, and only if the checkpoint fits.
        checkpoint: Its state dict, or the path of a file or folder with it.

    Returns:
        A fingerprint of the weights.

    Raises:
        CheckpointError: If keys or shapes do not fit the model.
        CheckpointFileError: If a path is given, and no state dict can be read from it.
        NonFiniteError: If a weight is NaN or infinite.
        ModelModeError: If some layer couples the examples of a batch.
    """
    if isinstance(checkpoint, str | os.PathLike):
        checkpoint = read_weights(Path(checkpoint))
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f"checkpoint must be a state dict or a path; got "
            f"{type(checkpoint).__name__}. Pass model.state_dict()."
        )
    fitted = fit(model, checkpoint)
    bad = first_non_finite((k, v) for k, v in fitted.items() if _is_tensor(v))
    if bad is not None:
        raise NonFiniteError(
            f"the checkpoint's {bad!r} has a NaN or an infinity, so every gradient would; "
            f"the training run diverged, or the file is damaged.",
            parameter=bad,
        )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ModelModeError(
                f"{name or 'the model'} is a {type(module).__name__} without running "
                f"statistics: each example's output depends on its batch, and has no "
                f"gradient of its own. Use track_running_stats=True, or GroupNorm."
            )
    check_ties(model, fitted)
    if all(fitted.get(key) is value for key, value in checkpoint.items()):
        model.load_state_dict(checkpoint, strict=False)  # with its versions of modules
    else:
        model.load_state_dict(fitted, strict=False)
    model.eval()
    return _fingerprint(model)


def _fingerprint(model: torch.nn.Module) -> str:
    return fingerprint({k: v for k, v in model.state_dict().items() if _is_tensor(v)})


def note_loaded(model: torch.nn.Module, weights: str) -> Loaded:
    """Note what a model holds, to notice when something else writes to it.

    Args:
        model: The model, a checkpoint just loaded.
        weights: The fingerprint that :func:`load_weights` gave.

    Returns:
        The note.
    """
    return Loaded(weights, _versions(model))


def check_loaded(model: torch.nn.Module, loaded: Loaded, model_id: int) -> Loaded:
    """Refuse a model that no longer holds the checkpoint that was loaded.

    Values are read only if some parameter was written to or replaced, so this costs
    next to nothing. Writes through ``parameter.data`` go unnoticed.

    Args:
        model: The model.
        loaded: What was noted.
        model_id: The checkpoint's id, for the message.

    Returns:
        The note to compare with next time.

    Raises:
        OrderError: If the weights are others now.
    """
    versions = _versions(model)
    if versions == loaded.versions:
        return loaded
    weights = _fingerprint(model)
    if weights != loaded.weights:
        raise OrderError(
            f"the model's weights are not those of model id {model_id} any more "
            f"(fingerprint {weights}; the checkpoint's is {loaded.weights}): something "
            f"trained or loaded it since. Load the checkpoint again, or give each TRAKer "
            f"a model of its own."
        )
    return Loaded(weights, versions)


def _versions(model: torch.nn.Module) -> tuple[tuple[int, int, int], ...]:
    return tuple(
        # Tensors made in inference mode have no version, and cannot be written to.
        (id(value), value.data_ptr(), 0 if value.is_inference() else value._version)
        for value in model.parameters()
    )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def check_mode(model: torch.nn.Module) -> None:
    """Refuse a model with batch statistics or dropout switched on.

    Raises:
        ModelModeError: If a layer with either is in training mode.
    """
    for name, module in model.named_modules():
        if module.training and _is_stochastic(module):
            raise ModelModeError(
                f"{name or 'the model'} ({type(module).__name__}) is in training mode, so "
                f"an example's gradient depends on its batch or on chance. Call "
                f"model.eval(); load_checkpoint did, and something switched it back."
            )


def _is_stochastic(module: torch.nn.Module) -> bool:
    if isinstance(module, _BatchNorm | _DropoutNd):
        return True
    rate = getattr(module, "dropout", 0.0)  # attention and recurrent layers
    return isinstance(rate, float) and rate > 0


def ids_of_weights(records: Mapping[int, Mapping[str, Any]], weights: str) -> list[int]:
    """List the model ids whose checkpoints have this fingerprint."""
    return [i for i, record in records.items() if record.get("weights") == weights]


def check_weights(
    records: Mapping[int, Mapping[str, Any]], model_id: int, weights: str
) -> None:
    """Refuse new weights under a known model id.

    Raises:
        ModelIDException: If the id's record has another fingerprint.
    """
    stored = records[model_id].get("weights", weights)
    if stored != weights:
        raise ModelIDException(
            f"model id {model_id} belongs to other weights (fingerprint {stored}; this "
            f"checkpoint's is {weights}). Use another model_id, or another save_dir."
        )
