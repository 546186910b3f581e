"""How many bytes the files of a store take at each stage, before there are any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trak import _layout
from trak._layout import ArraySpec
from trak._version import __version__
from trak.savers._derived import label_of
from trak.savers._places import Places

WEIGHTS = "0" * 32
"""A fingerprint of weights, as far as its length goes."""


@dataclass(frozen=True, slots=True)
class StoreSizes:
    """Bytes that each stage adds to a store, all checkpoints together.

    They are the lengths of files, without directories and the unused ends of disk
    blocks.
    """

    featurize: int
    """By ``featurize``, and what making the store and loading checkpoints writes."""

    finalize: int
    """By ``finalize_features``."""

    score: int
    """By ``score`` and ``start_scoring_checkpoint``."""

    finalize_scores: int
    """By ``finalize_scores``; ``top_k`` writes nothing."""


def store_sizes(
    save_dir: Path,
    metadata: Mapping[str, Any],
    finalized: Mapping[str, Any],
    *,
    half: bool,
    derived: str,
    scored: Mapping[str, Any],
    num_targets: int,
    num_checkpoints: int,
    exp_name: str,
) -> StoreSizes:
    """Add up the files of a store that is not there yet.

    Args:
        save_dir: Where it would be; only the length of its path counts.
        metadata: The saver's.
        finalized: What finalizing adds to a checkpoint's record: its keys, and values
            of about the right length.
        half: Whether rows are stored in float16.
        derived: What finalizing makes: ``"gram"`` or ``"features"``.
        scored: What scoring adds to an experiment's record besides ``model_ids``.
        num_targets: Targets, ``m``.
        num_checkpoints: Checkpoints, ``c``.
        exp_name: Name of the experiment.

    Returns:
        The sizes, exact but for some digits in the records.
    """
    n, p = int(metadata["train set size"]), int(metadata["JL dimension"])
    places = Places(save_dir, n, p, half)
    manifest = {**metadata, "format": _layout.FORMAT, "dtype": places.dtype}
    manifest["written by"] = f"trak {__version__}"
    featurized = {"is_featurized": 1, "is_finalized": 0, "weights": WEIGHTS}
    done = {**featurized, **finalized}
    started = {
        "num_targets": num_targets,
        "scores_path": str(places.scores(exp_name)),
        "scores_finalized": 0,
    }
    scored = {**started, "model_ids": [*range(num_checkpoints)], **scored}
    made = {derived: _layout.DERIVED_ARRAYS[derived]}
    label = 0 if derived == "gram" else len(label_of(""))
    experiment = _record(started) + _record({exp_name: started})
    return StoreSizes(
        featurize=_record(manifest)
        + num_checkpoints
        * (
            _arrays(places, _layout.TRAIN_ARRAYS)
            + _record({"weights": WEIGHTS})
            + _record({"0": featurized})
        ),
        finalize=num_checkpoints
        * (
            _arrays(places, made)
            + label
            + _record(done)
            + _record({"0": done})
            - _record({"0": featurized})
        ),
        score=experiment
        + num_checkpoints * _arrays(places, _layout.TARGET_ARRAYS, num_targets),
        finalize_scores=_arrays(places, {"scores": _layout.SCORES}, num_targets)
        + _record(scored)
        + _record({exp_name: scored})
        - experiment,
    )


def _arrays(
    places: Places, specs: Mapping[str, ArraySpec], num_targets: int = 0
) -> int:
    total = 0
    for spec in places.used(specs).values():
        _, shape, dtype = places.of(spec, 0, num_targets=num_targets)
        data = shape[0] * shape[1] * np.dtype(dtype).itemsize
        total += len(_layout.header(shape, dtype)) + data
    return total


def _record(record: Mapping[str, Any]) -> int:
    return len(json.dumps(record, indent=1))
