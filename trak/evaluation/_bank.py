"""A bank of retrainings: the ground truth that scores are compared with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from trak.errors import OptionError, StoreCorruptError
from trak.evaluation import _files

_FORMAT = 1
_KEYS = {"format", "n", "masks", "outputs", "metadata"}


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """What models retrained on subsets of the training set put out.

    Raises:
        OptionError: If masks, outputs and seeds are not of those types, or are for
            other numbers of subsets or retrainings; or ``metadata`` is not JSON.

    Example:
        >>> masks = np.array([[True, False, True], [False, True, True]])
        >>> bank = GroundTruth(masks, outputs=np.zeros((2, 5, 4)))
        >>> print(bank)
        2 subsets of 3 examples x 5 retrainings, 4 targets
    """

    masks: Bool[np.ndarray, "s n"]
    """Which training examples each subset holds. Shape ``(s, n)``."""

    outputs: Float[np.ndarray, "s r m"]
    """Outputs of each retraining on the targets; NaN or infinite where one diverged.
    Shape ``(s, r, m)``."""

    seeds: Int[np.ndarray, "s r"] | None = None
    """What each retraining was seeded with, if known. Shape ``(s, r)``."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else the caller says of how they came about; JSON."""

    def __post_init__(self) -> None:
        """Refuse what is not a bank."""
        _check_arrays(self.masks, self.outputs, self.seeds)
        as_json(self.metadata)

    @property
    def n_examples(self) -> int:
        """Training examples, in and out of the subsets."""
        return int(self.masks.shape[1])

    @property
    def n_subsets(self) -> int:
        """Subsets that models were retrained on."""
        return int(self.outputs.shape[0])

    @property
    def n_repeats(self) -> int:
        """Retrainings a subset."""
        return int(self.outputs.shape[1])

    @property
    def n_targets(self) -> int:
        """Targets that outputs were taken on."""
        return int(self.outputs.shape[2])

    def __str__(self) -> str:
        text = (
            f"{self.n_subsets} subsets of {self.n_examples} examples x {self.n_repeats} "
            f"retrainings, {self.n_targets} targets"
        )
        bad = len(self.non_finite())
        return f"{text}; {bad} retrainings are not finite" if bad else text

    def non_finite(self) -> Int[np.ndarray, "k 2"]:
        """Find retrainings with an output that is not finite: they diverged.

        Returns:
            The subset and the repeat of each. Shape ``(k, 2)``.
        """
        return np.argwhere(~np.isfinite(self.outputs).all(axis=2))

    def finite(self) -> GroundTruth:
        """Leave out every subset with a retraining that :meth:`non_finite` finds.

        Returns:
            The other subsets.
        """
        keep = np.isfinite(self.outputs).all(axis=(1, 2))
        return GroundTruth(
            self.masks[keep],
            self.outputs[keep],
            None if self.seeds is None else self.seeds[keep],
            self.metadata,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank to one ``.npz`` file, in the place of any that is there.

        Args:
            path: The file. It is replaced in one step: a reader sees the old or the new
                one, whatever happens in between.

        Raises:
            StoreWriteError: If the file system refuses.
        """
        arrays = {
            "format": np.array(_FORMAT),
            "n": np.array(self.n_examples),
            "masks": np.packbits(self.masks, axis=1),
            "outputs": self.outputs,
            "metadata": np.array(as_json(self.metadata)),
        }
        if self.seeds is not None:
            arrays["seeds"] = self.seeds
        _files.write_arrays(Path(path), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GroundTruth:
        """Read a bank that :meth:`save` wrote.

        Args:
            path: The file. Nothing in it is unpickled.

        Returns:
            The bank.

        Raises:
            OptionError: If there is no such file.
            StoreCorruptError: If it is not the file of a bank, or is damaged.
        """
        path = Path(path)
        if path.is_dir():
            raise OptionError(
                f"{path} is a directory; pass the path of a file, such as "
                f"{path / 'bank.npz'}."
            )
        if not path.is_file():
            raise OptionError(
                f"there is no file {path}; retrain_subsets(..., path=...) or save() "
                f"makes one."
            )
        arrays = _files.read_arrays(path)
        try:
            return cls(**_parse(arrays))
        except (OptionError, ValueError, TypeError) as error:
            raise StoreCorruptError(
                f"{path} is not the file of a bank ({error}); move it away."
            ) from error


def as_json(metadata: Mapping[str, Any]) -> str:
    """Write metadata down, in the same way whatever its order.

    Returns:
        A JSON object.

    Raises:
        OptionError: If it cannot be written as one and read back the same.
    """
    if not isinstance(metadata, Mapping):
        raise OptionError(
            f"metadata is a {type(metadata).__name__}; pass a dict of names with numbers, "
            f"strings, lists and dicts."
        )
    try:
        text = json.dumps(metadata, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"metadata cannot be written as JSON ({error}); pass a dict of names with "
            f"numbers, strings, lists and dicts."
        ) from error
    if json.loads(text) != metadata:
        raise OptionError(
            f"metadata would be read back as {text}; pass a dict whose keys are strings, "
            f"and lists for tuples."
        )
    return text


def _parse(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    missing = _KEYS - set(arrays)
    if missing or set(arrays) - _KEYS - {"seeds"}:
        raise OptionError(f"it holds {sorted(arrays)}")
    if int(arrays["format"]) != _FORMAT:
        raise OptionError(f"format {arrays['format']} is not {_FORMAT}")
    packed, n = arrays["masks"], int(arrays["n"])
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != -(-n // 8):
        raise OptionError(
            f"masks is {packed.dtype} of shape {packed.shape}, for n={n} examples"
        )
    return {
        "masks": np.unpackbits(packed, axis=1, count=n).astype(np.bool_),
        "outputs": arrays["outputs"],
        "seeds": arrays.get("seeds"),
        "metadata": json.loads(str(arrays["metadata"])),
    }


def _check_arrays(
    masks: np.ndarray, outputs: np.ndarray, seeds: np.ndarray | None
) -> None:
    given: dict[str, object] = {"masks": masks, "outputs": outputs}
    if seeds is not None:
        given["seeds"] = seeds
    for name, array in given.items():
        if not isinstance(array, np.ndarray):
            raise OptionError(
                f"{name} is a {type(array).__name__}; pass a NumPy array."
            )
    if masks.ndim != 2 or masks.dtype != np.bool_:
        raise OptionError(
            f"masks has shape {masks.shape} and dtype {masks.dtype}; pass booleans "
            f"(s, n)."
        )
    if outputs.ndim != 3 or outputs.dtype.kind != "f":
        raise OptionError(
            f"outputs has shape {outputs.shape} and dtype {outputs.dtype}; pass floats "
            f"(s, r, m), such as outputs[:, None] for one retraining a subset."
        )
    if len(masks) != len(outputs):
        raise OptionError(
            f"masks are for {len(masks)} subsets and outputs for {len(outputs)}; make "
            f"the two agree."
        )
    if seeds is not None and (
        seeds.shape != outputs.shape[:2] or seeds.dtype.kind not in "iu"
    ):
        raise OptionError(
            f"seeds has shape {seeds.shape} and dtype {seeds.dtype}; pass integers of "
            f"shape {outputs.shape[:2]}, one a retraining, or None."
        )
