"""Retrainings on disk: one small file each while they go on, a bank once all are done.

Retrainings of a bank at ``bank.npz`` are kept in ``bank.npz.parts/`` until the bank holds
them. Any number of processes may add to them; each file appears in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float64, Int64

from trak._layout import remove_dead_temporaries
from trak.errors import StoreCorruptError, StoreMismatchError
from trak.evaluation import _files
from trak.evaluation._bank import GroundTruth, as_json

Job: TypeAlias = tuple[int, int]
"""A retraining: its subset and its repeat."""

Done: TypeAlias = dict[Job, np.ndarray]
"""Outputs on the targets, ``(m,)``, of each retraining that is done."""

_DIGEST = "0123456789abcdef0123456789abcdef.npz"  # as parts' names end


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What is to be retrained."""

    masks: Bool[np.ndarray, "s n"]
    """Which training examples each subset holds."""

    seeds: Int64[np.ndarray, "s r"]
    """What each retraining is seeded with."""

    metadata: Mapping[str, Any]
    """What else the caller says of how they come about."""

    def __post_init__(self) -> None:
        """Refuse metadata that a bank could not hold, before anything is trained."""
        as_json(self.metadata)

    def jobs(self, index: int = 0, count: int = 1) -> list[Job]:
        """List the retrainings of one shard: those of every ``count``-th subset."""
        s, r = self.seeds.shape
        return [(j, k) for j in range(index, s, count) for k in range(r)]

    def bank(self, done: Done) -> GroundTruth:
        """Put together the subsets of which every retraining is done."""
        s, r = self.seeds.shape
        whole = [j for j in range(s) if all((j, k) in done for k in range(r))]
        m = len(next(iter(done.values()))) if done else 0
        outputs = np.empty((len(whole), r, m))
        for row, j in enumerate(whole):
            for k in range(r):
                outputs[row, k] = done[j, k]
        return GroundTruth(
            self.masks[whole], outputs, self.seeds[whole], dict(self.metadata)
        )


class Archive:
    """The retrainings of a plan that are on disk."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self._path = path
        self._parts = path.parent / f"{path.name}.parts"
        self._plan = plan
        text = as_json(plan.metadata)
        self._names = {job: _part_name(plan, job, text) for job in plan.jobs()}

    def read(self) -> Done:
        """Read what is there.

        Returns:
            The plan's retrainings that are done.

        Raises:
            StoreMismatchError: If there are retrainings of another plan, or of other
                targets.
            StoreCorruptError: If a file is damaged.
        """
        # Parts go only after a bank that has them is there: read in this order, none
        # can be missed.
        parts = self._read_parts()
        done = {**parts, **self._read_bank()}
        sizes = sorted({len(outputs) for outputs in done.values()})
        if len(sizes) > 1:
            raise StoreMismatchError(
                f"{self._path} has retrainings with outputs on {sizes} targets; delete "
                f"those made with other targets, or use another path."
            )
        return done

    def prepare(self) -> None:
        """Find out whether retrainings can be stored, before one is done.

        Raises:
            StoreWriteError: If the file system refuses.
        """
        _files.check_writable(self._parts)

    def add(self, job: Job, outputs: Float64[np.ndarray, " m"]) -> None:
        """Store a retraining.

        Raises:
            StoreWriteError: If the file system refuses.
        """
        _files.write_arrays(self._parts / self._names[job], {"outputs": outputs})

    def finish(self, bank: GroundTruth) -> None:
        """Store the bank of the whole plan, unless it is stored, and let its parts go.

        Raises:
            StoreWriteError: If the file system refuses.
        """
        if len(self._read_bank()) < self._plan.seeds.size:
            bank.save(self._path)
        remove_dead_temporaries(self._path.parent)
        if self._parts.is_dir():
            remove_dead_temporaries(self._parts)
            for name in self._names.values():
                (self._parts / name).unlink(missing_ok=True)
            # Retrainings of a larger plan stay, and whatever else is there.
            with contextlib.suppress(OSError):
                self._parts.rmdir()

    def _read_parts(self) -> Done:
        done: Done = {}
        expected = {name: job for job, name in self._names.items()}
        places = {name[: -len(_DIGEST)] for name in expected}
        for path in sorted(self._parts.glob("*.npz")):
            if path.name in expected:
                with contextlib.suppress(FileNotFoundError):  # now in the bank
                    arrays = _files.read_arrays(path)
                    done[expected[path.name]] = _only_outputs(path, arrays)
            elif path.name[: -len(_DIGEST)] in places:
                raise StoreMismatchError(
                    f"{path} is of a retraining with another subset, seed or metadata "
                    f"than asked for; ask for the same, use another path, or delete "
                    f"{self._parts}."
                )
        return done

    def _read_bank(self) -> Done:
        if not self._path.exists():
            return {}
        bank = GroundTruth.load(self._path)
        difference = _difference(bank, self._plan)
        if difference is not None:
            raise StoreMismatchError(
                f"{self._path} holds {difference}; ask for the same, or use another path."
            )
        return {
            (j, k): bank.outputs[j, k].astype(np.float64)
            for j, k in self._plan.jobs()
            if j < bank.n_subsets and k < bank.n_repeats
        }


def _difference(bank: GroundTruth, plan: Plan) -> str | None:
    """Say why a bank is neither a part of a plan nor the plan a part of it."""
    (s, r), n = plan.seeds.shape, plan.masks.shape[1]
    held = bank.n_subsets, bank.n_repeats
    both = np.s_[: min(s, held[0]), : min(r, held[1])]
    if bank.n_examples != n:
        return f"subsets of n={bank.n_examples} examples, and n={n} was asked for"
    if not np.array_equal(bank.masks[both[0]], plan.masks[both[0]]):
        return "other subsets than those asked for"
    if bank.seeds is None or not np.array_equal(bank.seeds[both], plan.seeds[both]):
        return "retrainings of other seeds than those asked for"
    if as_json(bank.metadata) != as_json(plan.metadata):
        return (
            f"retrainings with metadata {dict(bank.metadata)}, and "
            f"{dict(plan.metadata)} was asked for"
        )
    if (held[0] - s) * (held[1] - r) < 0:
        return (
            f"{held[0]} subsets x {held[1]} retrainings, and {s} x {r} were asked for: "
            f"more of one and fewer of the other"
        )
    return None


def _part_name(plan: Plan, job: Job, metadata: str) -> str:
    subset, repeat = job
    digest = hashlib.blake2b(digest_size=16)
    for part in (
        np.packbits(plan.masks[subset]).tobytes(),
        f"{plan.masks.shape[1]} {plan.seeds[job]} {metadata}".encode(),
    ):
        digest.update(part)
    return f"{subset:06d}-{repeat:04d}-{digest.hexdigest()}.npz"


def _only_outputs(path: Path, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    outputs = arrays.get("outputs")
    if outputs is None or outputs.ndim != 1 or outputs.dtype != np.float64:
        raise StoreCorruptError(
            f"{path} is not the file of a retraining: it holds {sorted(arrays)}; move it "
            f"away."
        )
    return outputs
