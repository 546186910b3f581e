"""Memory-mapped NumPy files and JSON records, safe to interrupt and to share."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trak import _layout
from trak._members import pack_mask, unpack_mask
from trak.errors import ExperimentError, ModelIDException, StoreError
from trak.savers._abstract import AbstractSaver
from trak.savers._derived import Derived
from trak.savers._lazy import FeatureMaker, LazyStore
from trak.savers._places import GRADS_DELETED, Places
from trak.savers._records import (
    open_manifest,
    pin_weights,
    read_experiment_record,
    read_finalized,
    read_model_record,
    write_summary,
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
        self._places = Places(
            self.save_dir, train_set_size, proj_dim, use_half_precision
        )
        self.make_features: FeatureMaker | None = None
        self._places.prepare()
        mine = {**self.metadata, "format": _layout.FORMAT, "dtype": self._places.dtype}
        open_manifest(self.save_dir, mine)
        self.refresh()
        for model_id in self.model_ids:
            _layout.remove_dead_temporaries(self._places.directory(model_id))
        self.logger.info("%s: %d checkpoints", self.save_dir, len(self.model_ids))

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
        if self._places.record(model_id).exists():  # by another process, meanwhile
            self.model_ids.update(read_model_record(self._places.record(model_id)))
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
        directory = self._places.directory(model_id)
        _layout.make_directory(directory)
        _layout.remove_dead_temporaries(directory)
        specs = self._places.used(_layout.TRAIN_ARRAYS)
        last = self._places.of(specs["is_featurized"], model_id)[0]
        if not last.exists():  # where it is, what is missing was removed
            places = [self._places.of(spec, model_id) for spec in specs.values()]
            _layout.create_arrays(places)
        self.load_current_store(model_id)

    def serialize_current_model_id_metadata(self) -> None:
        """Write the record of the current checkpoint, its two flags as they stand."""
        model_id = self.current_model_id
        if model_id is None:
            raise ModelIDException("No checkpoint is loaded, so there is no record.")
        record = self.model_ids[model_id]
        flags = self.current_store["is_featurized"]
        record["is_featurized"] = int(bool((flags != _layout.PENDING).all()))
        if "weights" in record and not record["is_finalized"]:
            self._pin_weights(model_id, record["weights"])
        found = read_finalized(self._places.directory(model_id))
        if not record["is_finalized"]:
            record.update(found)
        else:
            if found.get("grads_deleted"):  # by another process, meanwhile
                record["grads_deleted"] = True
            _layout.write_record(self._places.finalized(model_id), record)
        _layout.write_record(self._places.record(model_id), {str(model_id): record})

    def _pin_weights(self, model_id: int, weights: str) -> None:
        path = self._places.directory(model_id) / "weights.json"
        try:
            pin_weights(path, model_id, weights)
        except ModelIDException:
            del self.model_ids[model_id]  # it is the other process's
            if self._places.record(model_id).exists():
                self.model_ids.update(read_model_record(self._places.record(model_id)))
            raise

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
        places = self._places.targets(model_id, exp_name, exp_num_targets)
        if not all(path.exists() for path, _, _ in places.values()):
            raise ExperimentError(
                f"experiment {exp_name!r} has no targets on model id {model_id}; score "
                f"them with start_scoring_checkpoint and score first."
            )
        self.current_experiment_name = exp_name
        for key, place in places.items():
            self.current_store[f"{exp_name}_{key}"] = _layout.open_array(*place, mode)
        scores = self._places.of(_layout.SCORES, model_id, exp_name, exp_num_targets)
        if scores[0].exists():
            self.current_store[f"{exp_name}_scores"] = _layout.open_array(*scores, "c")

    def _load_training(self, model_id: int, mode: str) -> dict[str, Any]:
        store: dict[str, Any] = LazyStore(self, model_id)
        missing = []
        for key, spec in self._places.used(_layout.TRAIN_ARRAYS).items():
            place = self._places.of(spec, model_id)
            try:
                store[key] = _layout.open_array(*place, mode)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                missing.append(place[0])
        record = self.model_ids[model_id]
        if missing or not record["is_finalized"]:
            # Another process may have finalized it. That is looked up after the arrays,
            # as gradients are deleted only when the record says so.
            record.update(read_finalized(self._places.directory(model_id)))
        if record.get("grads_deleted"):
            self._drop_grads(model_id, store, missing)
        if missing:
            raise ModelIDException(
                f"model id {model_id} has no {missing[0].name} in {missing[0].parent}; "
                f"delete that directory and {self._places.record(model_id).name}, and "
                f"featurize this checkpoint again."
            )
        if record["is_finalized"]:
            self._derived(model_id).load(mode, store)
        return store

    def _drop_grads(
        self, model_id: int, store: dict[str, Any], missing: list[Path]
    ) -> None:
        path = self._places.of(_layout.TRAIN_ARRAYS["grads"], model_id)[0]
        if path in missing:
            missing.remove(path)
        else:  # a process was killed before it could delete them
            del store["grads"]
            path.unlink(missing_ok=True)

    def _derived(self, model_id: int) -> Derived:
        return Derived(self._places, model_id, self.model_ids[model_id])

    def open_digests(self, model_id: int) -> dict[str, Any] | None:
        """Map what tells the training data of another checkpoint, if it is there."""
        specs = {
            key: _layout.TRAIN_ARRAYS[key] for key in ("row_digest", "is_featurized")
        }
        places = {key: self._places.of(spec, model_id) for key, spec in specs.items()}
        if not all(path.exists() for path, _, _ in places.values()):
            return None
        return {key: _layout.open_array(*place, "r") for key, place in places.items()}

    def keep_members(self, members: np.ndarray) -> np.ndarray:
        """Keep which examples the current checkpoint was trained on, if nothing was kept.

        Args:
            members: The mask. Shape ``(n,)``.

        Returns:
            The mask that is kept, which another process may have given first.
        """
        model_id = self._current()
        path = self._places.members(model_id)
        if not path.exists():
            _layout.write_record(path, pack_mask(members), replace=False)
        return unpack_mask(_layout.read_record(path), len(members), str(path))

    def members(self, model_id: int) -> np.ndarray | None:
        """Give the mask of the examples that a checkpoint was trained on, if it is kept.

        Args:
            model_id: The checkpoint.

        Returns:
            The mask, of shape ``(n,)``, or None.
        """
        path = self._places.members(model_id)
        if not path.exists():
            return None
        return unpack_mask(_layout.read_record(path), self.train_set_size, str(path))

    def refresh(self) -> None:
        """Read what other processes have written since.

        Checkpoints and experiments that they added take part from now on, unless
        ``load_from_save_dir`` was False; checkpoints that they finalized are finalized.
        """
        for path in sorted(self.save_dir.glob("id_*.json")):
            for model_id, found in read_model_record(path).items():
                mine = self.model_ids.get(model_id)
                if mine is None and self.load_from_save_dir:
                    self.model_ids[model_id] = found
                elif mine is not None and not mine["is_finalized"]:
                    mine.update(found)
        if self.load_from_save_dir:
            for path in sorted(self._places.experiments.glob("*.json")):
                self.experiments.setdefault(path.stem, read_experiment_record(path))

    # -- results ----------------------------------------------------------------------

    @contextlib.contextmanager
    def open_features(self) -> Iterator[Any]:
        """Give an array for the features of the current checkpoint."""
        with self.new_features(self._current(), self.current_store) as array:
            yield array

    @contextlib.contextmanager
    def new_features(self, model_id: int, store: dict[str, Any]) -> Iterator[np.memmap]:
        """Give an array for the features of a checkpoint, and add it to its arrays."""
        with self._derived(model_id).new_features(store) as array:
            yield array

    def keep_gram(self, gram: np.ndarray) -> None:
        """Keep the Gram matrix of the current checkpoint, and drop other features."""
        self._derived(self._current()).write_gram(gram, self.current_store)

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
        self.load_current_store(model_id)
        self.current_store.pop("grads", None)
        self.model_ids[model_id]["grads_deleted"] = True
        mark = self._places.directory(model_id) / GRADS_DELETED
        _layout.write_record(mark, {"grads_deleted": True}, replace=False)
        self.serialize_current_model_id_metadata()
        self._places.of(_layout.TRAIN_ARRAYS["grads"], model_id)[0].unlink(
            missing_ok=True
        )

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
        if not (self._places.directory(model_id)).exists():
            raise ModelIDException(
                f"model id {model_id} is not in {self.save_dir}; featurize it first."
            )
        path = self._places.experiment(exp_name)
        if not path.exists():
            new = {
                "num_targets": num_targets,
                "scores_path": str(self._places.scores(exp_name)),
                "scores_finalized": 0,
            }
            self._write_experiment(exp_name, new, replace=False)
        known = self.experiments[exp_name] = read_experiment_record(path)
        if known.get("num_targets") != num_targets:
            raise ExperimentError(
                f"experiment {exp_name!r} has {known.get('num_targets')} targets, not "
                f"{num_targets}; use another exp_name for other targets."
            )
        places = self._places.targets(model_id, exp_name, num_targets)
        _layout.create_arrays([*places.values()])
        self.load_current_store(model_id)
        self.load_current_store(model_id, exp_name, num_targets)

    def _write_experiment(
        self, exp_name: str, record: dict[str, Any], *, replace: bool = True
    ) -> None:
        path = self._places.experiment(exp_name)
        _layout.write_record(path, record, replace=replace)
        write_summary(self.save_dir / _layout.EXPERIMENTS, self._places.experiments)

    @contextlib.contextmanager
    def open_scores(self, exp_name: str, num_targets: int) -> Iterator[Any]:
        """Give an array for the scores, which replaces older ones when it is whole."""
        _layout.remove_dead_temporaries(self.save_dir / "scores")
        place = self._places.of(_layout.SCORES, 0, exp_name, num_targets)
        with _layout.new_array(*place) as array:
            yield array
            # The record says what is to come before it comes.
            self.experiments[exp_name]["scores_finalized"] = 0
            self._write_experiment(exp_name, self.experiments[exp_name])
        self.current_store[f"{exp_name}_scores"] = _layout.open_array(*place, "c")

    def save_scores(self, exp_name: str) -> None:
        """Commit the scores of an experiment.

        Args:
            exp_name: The experiment's name.
        """
        self.experiments[exp_name]["scores_finalized"] = 1
        self._write_experiment(exp_name, self.experiments[exp_name])
