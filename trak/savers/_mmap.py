"""Memory-mapped NumPy files and JSON records, safe to interrupt and to share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trak import _layout
from trak._layout import ArraySpec
from trak.errors import ExperimentError, ModelIDException, StoreError
from trak.savers._abstract import AbstractSaver
from trak.savers._lazy import FeatureMaker, LazyStore
from trak.savers._records import (
    open_manifest,
    pin_weights,
    read_experiment_record,
    read_model_record,
)


class MmapSaver(AbstractSaver):
    """Keeps everything in memory-mapped NumPy files and JSON records.

    The layout is that of 0.3.2 with additions; ``docs/store.md`` states it. Several
    processes may write different checkpoints, or different rows of one, at once.
    """

    def __init__(
        self,
        save_dir: Path | str,
        metadata: Mapping[str, Any],
        train_set_size: int = 0,
        proj_dim: int = 0,
        load_from_save_dir: bool = True,  # noqa: FBT001  0.3.2's signature
        logging_level: int = logging.INFO,
        use_half_precision: bool = True,  # noqa: FBT001  0.3.2's signature
    ) -> None:
        super().__init__(
            save_dir,
            metadata,
            load_from_save_dir,
            logging_level,
            use_half_precision,
            train_set_size=train_set_size,
            proj_dim=proj_dim,
        )
        self.make_features: FeatureMaker | None = None
        for directory in (
            self.save_dir,
            self.save_dir / "scores",
            self._experiment_dir,
        ):
            _layout.make_directory(directory)
        mine = {**self.metadata, "format": _layout.FORMAT, "dtype": self._dtype}
        open_manifest(self.save_dir, mine)
        if load_from_save_dir:
            for path in sorted(self.save_dir.glob("id_*.json")):
                self.model_ids.update(read_model_record(path))
            for path in sorted(self._experiment_dir.glob("*.json")):
                self.experiments[path.stem] = read_experiment_record(path)
        self.logger.info(
            "%s: %d checkpoints, %d experiments",
            self.save_dir,
            len(self.model_ids),
            len(self.experiments),
        )

    @property
    def _experiment_dir(self) -> Path:
        return self.save_dir / "experiments"

    @property
    def _dtype(self) -> str:
        return "float16" if self.use_half_precision else "float32"

    def _record_path(self, model_id: int) -> Path:
        return self.save_dir / f"id_{model_id}.json"

    def _finalized_path(self, model_id: int) -> Path:
        return self.save_dir / str(model_id) / "finalized.json"

    # -- arrays -----------------------------------------------------------------------

    def _place(
        self, spec: ArraySpec, model_id: int, exp_name: str = "", num_targets: int = 0
    ) -> tuple[Path, tuple[int, int], str]:
        n, p = self.train_set_size, self.proj_dim
        sizes = {"n": n, "p": p, "q": min(n, p), "m": num_targets, "1": 1}
        path = self.save_dir / spec.path.format(model=model_id, exp=exp_name)
        dtype = self._dtype if spec.dtype == "store" else spec.dtype
        return path, (sizes[spec.axes[0]], sizes[spec.axes[1]]), dtype

    def _used(self, specs: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
        return {
            key: spec
            for key, spec in specs.items()
            if self.use_half_precision or not key.endswith("_exponent")
        }

    def register_model_id(
        self,
        model_id: int,
        _allow_featurizing_already_registered: bool = False,  # noqa: FBT001  0.3.2's
    ) -> None:
        """Make a new checkpoint's record and arrays, and load them.

        Args:
            model_id: The checkpoint's id.
            _allow_featurizing_already_registered: Whether the id may be taken; its
                arrays are then loaded as they are.

        Raises:
            ModelIDException: If the id is taken.
            StoreError: If its files cannot be made; the id is then free again.
        """
        if model_id in self.model_ids and not _allow_featurizing_already_registered:
            raise ModelIDException(
                f"model id {model_id} is already registered in {self.save_dir}; "
                f"load_checkpoint goes on with it, another id starts a new one."
            )
        if self._record_path(model_id).exists():  # by another process, meanwhile
            self.model_ids.update(read_model_record(self._record_path(model_id)))
        fresh = model_id not in self.model_ids
        self.model_ids.setdefault(model_id, {"is_featurized": 0, "is_finalized": 0})
        try:
            self.init_store(model_id)
        except StoreError:
            if fresh:  # so that it can be tried again
                del self.model_ids[model_id]
            raise

    def init_store(self, model_id: int) -> None:
        """Make the arrays of a checkpoint where they are not there, and load them.

        Args:
            model_id: The checkpoint's id.
        """
        directory = self.save_dir / str(model_id)
        _layout.make_directory(directory)
        _layout.remove_dead_temporaries(directory)
        specs = self._used(_layout.TRAIN_ARRAYS)
        if self._grads_deleted(model_id):
            del specs["grads"]
        _layout.create_arrays([self._place(s, model_id) for s in specs.values()])
        self.load_current_store(model_id)

    def _grads_deleted(self, model_id: int) -> bool:
        return bool(self.model_ids[model_id].get("grads_deleted"))

    def serialize_current_model_id_metadata(self) -> None:
        """Write the record of the current checkpoint, its two flags as they stand."""
        model_id = self.current_model_id
        if model_id is None:
            raise ModelIDException("No checkpoint is loaded, so there is no record.")
        record = self.model_ids[model_id]
        flags = self.current_store["is_featurized"]
        record["is_featurized"] = int(bool((flags != _layout.PENDING).all()))
        if record["is_finalized"]:
            _layout.write_record(self._finalized_path(model_id), record)
        elif self._finalized_path(model_id).exists():  # by another process, meanwhile
            record.update(_layout.read_record(self._finalized_path(model_id)))
        if "weights" in record:
            directory = self.save_dir / str(model_id)
            pin_weights(directory / "weights.json", model_id, record["weights"])
        _layout.write_record(self._record_path(model_id), {str(model_id): record})

    def load_current_store(
        self,
        model_id: int,
        exp_name: str | None = None,
        exp_num_targets: int | None = -1,
        mode: str | None = "r+",
    ) -> None:
        """Load the arrays of a checkpoint, or those of an experiment on it.

        Args:
            model_id: The checkpoint's id.
            exp_name: The experiment; None for the training arrays.
            exp_num_targets: The experiment's number of targets; -1 to look it up.
            mode: How NumPy maps the files: ``"r"``, ``"r+"`` or ``"c"``.

        Raises:
            ModelIDException: If the checkpoint is unknown, or has no arrays.
            ExperimentError: If the experiment is, or has none on this checkpoint.
        """
        if model_id not in self.model_ids:
            raise ModelIDException(
                f"model id {model_id} is not in {self.save_dir}; featurize it first."
            )
        mode = mode or "r+"
        if exp_name is None:
            self.current_store = self._load_training(model_id, mode)
            self.current_model_id = model_id
            return
        if self.current_model_id != model_id:
            self.load_current_store(model_id, mode=mode)
        if exp_num_targets is None or exp_num_targets < 0:
            if exp_name not in self.experiments:
                raise ExperimentError(
                    f"There is no experiment {exp_name!r}; {self.save_dir} has "
                    f"{sorted(self.experiments)}."
                )
            exp_num_targets = int(self.experiments[exp_name]["num_targets"])
        specs = self._used(_layout.TARGET_ARRAYS)
        places = {
            f"{exp_name}_{key}": self._place(spec, model_id, exp_name, exp_num_targets)
            for key, spec in specs.items()
        }
        if not all(path.exists() for path, _, _ in places.values()):
            raise ExperimentError(
                f"experiment {exp_name!r} has no targets on model id {model_id}; score "
                f"them with start_scoring_checkpoint and score first."
            )
        self.current_experiment_name = exp_name
        for key, place in places.items():
            self.current_store[key] = _layout.open_array(*place, mode)
        scores = self._place(_layout.SCORES, model_id, exp_name, exp_num_targets)
        if scores[0].exists():
            self.current_store[f"{exp_name}_scores"] = _layout.open_array(*scores, "c")

    def _load_training(self, model_id: int, mode: str) -> dict[str, Any]:
        store: dict[str, Any] = LazyStore(self, model_id)
        for key, spec in self._used(_layout.TRAIN_ARRAYS).items():
            if key == "grads" and self._grads_deleted(model_id):
                continue
            place = self._place(spec, model_id)
            if not place[0].exists():
                raise ModelIDException(
                    f"model id {model_id} has no {place[0].name} in {place[0].parent}; "
                    f"delete that directory and {self._record_path(model_id).name}, and "
                    f"featurize this checkpoint again."
                )
            store[key] = _layout.open_array(*place, mode)
        for key, spec in _layout.DERIVED_ARRAYS.items():
            place = self._place(spec, model_id)
            if place[0].exists() and self.model_ids[model_id]["is_finalized"]:
                store[key] = _layout.open_array(*place, mode)
        return store

    def open_digests(self, model_id: int) -> dict[str, Any] | None:
        """Map what tells the training data of another checkpoint, if it is there."""
        specs = {
            key: _layout.TRAIN_ARRAYS[key] for key in ("row_digest", "is_featurized")
        }
        places = {key: self._place(spec, model_id) for key, spec in specs.items()}
        if not all(path.exists() for path, _, _ in places.values()):
            return None
        return {key: _layout.open_array(*place, "r") for key, place in places.items()}

    # -- results ----------------------------------------------------------------------

    @contextlib.contextmanager
    def open_features(self) -> Iterator[Any]:
        """Give an array for the features of the current checkpoint."""
        with self.new_features(self._current(), self.current_store) as array:
            yield array

    @contextlib.contextmanager
    def new_features(self, model_id: int, store: dict[str, Any]) -> Iterator[np.memmap]:
        """Give an array for the features of a checkpoint, and add it to its arrays."""
        place = self._place(_layout.DERIVED_ARRAYS["features"], model_id)
        with _layout.new_array(*place) as array:
            yield array
        store["features"] = _layout.open_array(*place)

    def keep_gram(self, gram: np.ndarray) -> None:
        """Keep the Gram matrix of the current checkpoint, and drop older features."""
        model_id = self._current()
        features = self._place(_layout.DERIVED_ARRAYS["features"], model_id)[0]
        features.unlink(missing_ok=True)
        self.current_store.pop("features", None)
        place = self._place(_layout.DERIVED_ARRAYS["gram"], model_id)
        with _layout.new_array(*place) as array:
            array[:] = gram
        self.current_store["gram"] = _layout.open_array(*place)

    def _current(self) -> int:
        if self.current_model_id is None:
            raise ModelIDException(
                "No checkpoint is loaded; load or register one first."
            )
        return self.current_model_id

    def del_grads(self, model_id: int) -> None:
        """Delete the training gradients of a checkpoint; its features stay.

        Args:
            model_id: The checkpoint's id.
        """
        self.model_ids[model_id]["grads_deleted"] = True
        self.load_current_store(model_id)
        self.serialize_current_model_id_metadata()
        path = self._place(_layout.TRAIN_ARRAYS["grads"], model_id)[0]
        path.unlink(missing_ok=True)

    # -- experiments ------------------------------------------------------------------

    def init_experiment(self, exp_name: str, num_targets: int, model_id: int) -> None:
        """Make an experiment's arrays on a checkpoint, or find them, and load them.

        Args:
            exp_name: The experiment's name.
            num_targets: Its number of targets, ``m``.
            model_id: The checkpoint's id.

        Raises:
            ModelIDException: If the checkpoint has no arrays.
            ExperimentError: If the experiment is known with another number of targets.
        """
        _layout.check_exp_name(exp_name)
        if not (self.save_dir / str(model_id)).exists():
            raise ModelIDException(
                f"model id {model_id} is not in {self.save_dir}; featurize it first."
            )
        path = self._experiment_dir / f"{exp_name}.json"
        if path.exists():
            self.experiments[exp_name] = read_experiment_record(path)
        known = self.experiments.get(exp_name)
        if known is None:
            known = {
                "num_targets": num_targets,
                "scores_path": str(self._scores_path(exp_name)),
                "scores_finalized": 0,
            }
            self._write_experiment(exp_name, known)
        if known.get("num_targets") != num_targets:
            raise ExperimentError(
                f"experiment {exp_name!r} has {known.get('num_targets')} targets, not "
                f"{num_targets}; use another exp_name for other targets."
            )
        specs = self._used(_layout.TARGET_ARRAYS).values()
        _layout.create_arrays([
            self._place(spec, model_id, exp_name, num_targets) for spec in specs
        ])
        self.load_current_store(model_id)
        self.load_current_store(model_id, exp_name, num_targets)

    def _scores_path(self, exp_name: str) -> Path:
        return self.save_dir / _layout.SCORES.path.format(exp=exp_name)

    def _write_experiment(self, exp_name: str, record: dict[str, Any]) -> None:
        self.experiments[exp_name] = record
        _layout.write_record(self._experiment_dir / f"{exp_name}.json", record)
        # The file of 0.3.2: a summary of the records, so no update of it can get lost.
        summary = {
            path.stem: read_experiment_record(path)
            for path in sorted(self._experiment_dir.glob("*.json"))
        }
        _layout.write_record(self.save_dir / _layout.EXPERIMENTS, summary)

    @contextlib.contextmanager
    def open_scores(self, exp_name: str, num_targets: int) -> Iterator[Any]:
        """Give an array for the scores, which replaces older ones when it is whole."""
        _layout.remove_dead_temporaries(self.save_dir / "scores")
        place = self._place(_layout.SCORES, 0, exp_name, num_targets)
        with _layout.new_array(*place) as array:
            yield array
        self.current_store[f"{exp_name}_scores"] = _layout.open_array(*place, "c")

    def save_scores(self, exp_name: str) -> None:
        """Commit the scores of an experiment.

        Args:
            exp_name: The experiment's name.
        """
        record = {**self.experiments[exp_name], "scores_finalized": 1}
        self._write_experiment(exp_name, record)
