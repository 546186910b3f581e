"""Where the files of a store are, and what shape and type its arrays have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from trak import _layout
from trak._layout import ArraySpec

Place: TypeAlias = tuple[Path, tuple[int, int], str]
"""An array's file, shape and type name."""

FINALIZED = "finalized.json"
"""Name of the record that finalizing writes in a checkpoint's directory."""

GRADS_DELETED = "grads_deleted.json"
"""Name of the record, never written over, that a checkpoint's gradients must go."""


@dataclass(frozen=True, slots=True)
class Places:
    """The files of one store."""

    save_dir: Path
    n: int
    """Training examples."""

    p: int
    """Projected entries."""

    half: bool
    """Whether rows are stored in float16."""

    @property
    def dtype(self) -> str:
        """Name of the type that rows are stored in."""
        return "float16" if self.half else "float32"

    @property
    def experiments(self) -> Path:
        """The directory of the records of experiments."""
        return self.save_dir / "experiments"

    def prepare(self) -> None:
        """Make the store's directories, and clear what killed processes left there."""
        for directory in (self.save_dir, self.save_dir / "scores", self.experiments):
            _layout.make_directory(directory)
            _layout.remove_dead_temporaries(directory)

    def experiment(self, exp_name: str) -> Path:
        """Give the record of an experiment."""
        return self.experiments / f"{exp_name}.json"

    def scores(self, exp_name: str) -> Path:
        """Give the result of an experiment."""
        return self.save_dir / _layout.SCORES.path.format(exp=exp_name)

    def directory(self, model_id: int) -> Path:
        """Give the directory of a checkpoint."""
        return self.save_dir / str(model_id)

    def record(self, model_id: int) -> Path:
        """Give the record of a checkpoint."""
        return self.save_dir / f"id_{model_id}.json"

    def finalized(self, model_id: int) -> Path:
        """Give the record that finalizing a checkpoint writes."""
        return self.directory(model_id) / FINALIZED

    def members(self, model_id: int) -> Path:
        """Give the record of which examples a checkpoint was trained on."""
        return self.directory(model_id) / "train_inds.json"

    def used(self, specs: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
        """Leave out the arrays that only stores in half precision have."""
        return {
            key: spec
            for key, spec in specs.items()
            if self.half or not key.endswith("_exponent")
        }

    def of(
        self, spec: ArraySpec, model_id: int, exp_name: str = "", num_targets: int = 0
    ) -> Place:
        """Give an array's file, shape and type name."""
        sizes = {
            "n": self.n,
            "p": self.p,
            "q": min(self.n, self.p),
            "m": num_targets,
            "1": 1,
        }
        path = self.save_dir / spec.path.format(model=model_id, exp=exp_name)
        dtype = self.dtype if spec.dtype == "store" else spec.dtype
        return path, (sizes[spec.axes[0]], sizes[spec.axes[1]]), dtype

    def targets(
        self, model_id: int, exp_name: str, num_targets: int
    ) -> dict[str, Place]:
        """Find an experiment's files: those that are there, or that a new one gets."""
        found = {
            key: self.of(spec, model_id, exp_name, num_targets)
            for key, spec in self.used(_layout.TARGET_ARRAYS).items()
        }
        if found["is_scored"][0].exists():  # it is older, or has them all
            for key in _layout.LATER:
                if not found[key][0].exists():
                    del found[key]
        return found
