"""The arguments of ``start_scoring_checkpoint``, in either of their orders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trak._options import integer, positive
from trak._types import Checkpoint
from trak.errors import OptionError


@dataclass(frozen=True, slots=True)
class ScoringCall:
    """The arguments of ``start_scoring_checkpoint``, whichever way they were given."""

    exp_name: str | None
    """Name of the experiment; None for the default."""

    checkpoint: Checkpoint
    """The state dict, or its path."""

    model_id: int | None
    """The checkpoint's id; None to find it by its weights."""

    num_targets: int
    """Number of targets, ``m``."""


_SCORING_NAMES = ("exp_name", "checkpoint", "model_id", "num_targets")


def parse_scoring_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ScoringCall:
    """Read the arguments of ``start_scoring_checkpoint``.

    They come as ``(exp_name, checkpoint, model_id, num_targets)``, or with the
    checkpoint first and the rest by name.

    Returns:
        The call.

    Raises:
        OptionError: If an argument is unknown, missing or given twice.
    """
    names = _SCORING_NAMES
    if args and _is_checkpoint(args, kwargs):
        names = ("checkpoint", "model_id", "num_targets", "exp_name")
    if len(args) > len(names):
        raise OptionError(
            f"start_scoring_checkpoint takes {len(names)} arguments; got {len(args)}."
        )
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in _SCORING_NAMES or name in given:
            trouble = "given twice" if name in given else "unknown"
            raise OptionError(
                f"start_scoring_checkpoint: {name} is {trouble}; it takes "
                f"{', '.join(_SCORING_NAMES)}."
            )
        given[name] = value
    for name in ("checkpoint", "num_targets"):
        if given.get(name) is None:
            raise OptionError(f"start_scoring_checkpoint needs {name}; got None.")
    model_id = given.get("model_id")
    return ScoringCall(
        exp_name=given.get("exp_name"),
        checkpoint=given["checkpoint"],
        model_id=None if model_id is None else integer("model_id", model_id),
        num_targets=positive("num_targets", given["num_targets"]),
    )


def _is_checkpoint(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether the first argument is the checkpoint, or else the experiment's name.

    Returns:
        Whether it is; a string is only where nothing else can be.
    """
    if not isinstance(args[0], str):
        return isinstance(args[0], Mapping | os.PathLike)
    if len(args) > 1:
        return isinstance(args[1], int)  # a model id
    return "num_targets" in kwargs and "checkpoint" not in kwargs
