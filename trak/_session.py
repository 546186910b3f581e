"""The checkpoint that is loaded, whose rows the next batches are, and where they go on."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trak._batches import batch_size, canonical, check_device, row_digests
from trak._checkpoints import (
    Loaded,
    check_loaded,
    check_mode,
    check_weights,
    ids_of_weights,
    load_weights,
    note_loaded,
)
from trak._featurizing import first_difference, store_batch
from trak._layout import PENDING, check_exp_name
from trak._members import check_same_members, parse_train_inds
from trak._options import (
    NonFinitePolicy,
    Options,
    integer,
    parse_model_ids,
    parse_rows,
)
from trak._pipeline import Pipeline
from trak._readiness import require_finalized
from trak._scoring_call import ScoringCall
from trak._seams import Parts, has_batched_form
from trak._types import Batch, Checkpoint
from trak.errors import (
    ExperimentError,
    ModelIDException,
    OrderError,
    StaleRowError,
    TrakWarning,
)
from trak.gradient_computers import AbstractGradientComputer
from trak.projectors import AbstractProjector
from trak.savers import AbstractSaver, MmapSaver

DEFAULT_EXPERIMENT = "default"
"""Name of an experiment that was given none."""

_ALONE = threading.RLock()
"""Held while a model is loaded or run: that changes the model, which another thread may
have too, and settings of the process."""


@dataclass(frozen=True, slots=True)
class Current:
    """What the next batch belongs to."""

    model_id: int
    """The checkpoint that is loaded."""

    exp_name: str | None
    """The experiment; None while featurizing."""

    total: int
    """Number of rows there are: ``n``, or the experiment's ``m``."""

    other: dict[str, Any] | None
    """What another checkpoint's training rows came from, to compare with."""


@dataclass(slots=True)
class Session:
    """Loads checkpoints, and stores the batches that follow as their rows."""

    saver: AbstractSaver
    computer: AbstractGradientComputer
    projector: AbstractProjector
    options: Options
    proj_dim: int
    scale: float
    _current: Current | None = None
    _loaded: Loaded | None = None
    _experiment: str | None = None
    _cursors: dict[tuple[int, str | None], int] = field(default_factory=dict)

    @classmethod
    def of(cls, saver: AbstractSaver, parts: Parts) -> Session:
        """Make a session of what was built."""
        options = parts.options
        scale = math.sqrt(options.selection.grad_dim)
        computer, projector = parts.gradient_computer, parts.projector
        return cls(saver, computer, projector, options, parts.proj_dim, scale)

    def load_for_training(
        self,
        checkpoint: Checkpoint,
        model_id: int | None,
        *,
        allow_known: bool,
        train_inds: object = None,
    ) -> int:
        """Load a checkpoint; the next batches are training examples.

        Args:
            checkpoint: Its state dict, or the path of one.
            model_id: Its id; None for the id of these weights, or the next free one.
            allow_known: Passed on to the saver.
            train_inds: What it was trained on; None if that is not known.

        Returns:
            The checkpoint's id.
        """
        n, members = self.options.train_set_size, None
        if train_inds is not None:
            members = parse_train_inds(train_inds, n)
        with _ALONE:
            self.end()
            saver = self.saver
            saver.refresh()
            weights = load_weights(self.computer.model, checkpoint)
            if model_id is None:
                same = ids_of_weights(saver.model_ids, weights)
                model_id = min(same, default=max(saver.model_ids, default=-1) + 1)
            model_id = integer("model_id", model_id)
            twins: list[int] = []
            if model_id in saver.model_ids:
                check_weights(saver.model_ids, model_id, weights)
                saver.load_current_store(model_id)
            else:
                saver.register_model_id(model_id, allow_known)
                check_weights(saver.model_ids, model_id, weights)
                twins = [
                    i for i in ids_of_weights(saver.model_ids, weights) if i != model_id
                ]
                saver.model_ids[model_id]["weights"] = weights
                saver.serialize_current_model_id_metadata()
            if members is not None:
                check_same_members(saver.keep_members(members), members, model_id)
            self._begin(model_id, None, n, weights)
            if twins:
                warnings.warn(
                    f"model id {model_id} has the same weights as model id {twins[0]}, so it "
                    f"adds only another projection of them. Does a list hold one state dict "
                    f"several times? state_dict() gives references; copy.deepcopy each.",
                    TrakWarning,
                    stacklevel=3,
                )
            return model_id

    def load_for_scoring(self, call: ScoringCall) -> None:
        """Load a checkpoint; the next batches are targets of an experiment.

        Args:
            call: What was asked for.

        Raises:
            ModelIDException: If no checkpoint has these weights, or the one named is
                not finalized or has others.
        """
        exp_name = check_exp_name(
            DEFAULT_EXPERIMENT if call.exp_name is None else call.exp_name
        )
        with _ALONE:
            self.end()
            self.saver.refresh()
            weights = load_weights(self.computer.model, call.checkpoint)
            model_id = call.model_id
            if model_id is None:
                same = ids_of_weights(self.saver.model_ids, weights)
                if not same:
                    raise ModelIDException(
                        f"no checkpoint in the store has these weights (fingerprint "
                        f"{weights}); load_checkpoint and featurize them first."
                    )
                model_id = min(same)
            require_finalized(self.saver, model_id)
            check_weights(self.saver.model_ids, model_id, weights)
            self.saver.init_experiment(exp_name, call.num_targets, model_id)
            self._experiment = exp_name
            self._begin(model_id, exp_name, call.num_targets, weights)

    def select(
        self, exp_name: str | None, model_ids: Iterable[int] | None
    ) -> tuple[str, list[int]]:
        """Find the experiment and checkpoints that a call for scores means.

        Args:
            exp_name: The experiment; None for the last that was started, or the only one.
            model_ids: The checkpoints; None for all.

        Returns:
            Its name, and their ids.

        Raises:
            ExperimentError: If there is no such experiment.
        """
        ids = self.choose(model_ids, for_scores=True)
        experiments = self.saver.experiments
        if exp_name is None:
            only = next(iter(experiments)) if len(experiments) == 1 else None
            exp_name = self._experiment or only
        if exp_name is None or exp_name not in experiments:
            raise ExperimentError(
                f"There is no experiment {exp_name!r}; the store has "
                f"{sorted(experiments)}. Score targets before finalize_scores."
            )
        return exp_name, ids

    def choose(
        self, model_ids: Iterable[int] | None, *, for_scores: bool = False
    ) -> list[int]:
        """Take no more batches, and find the checkpoints that a call means.

        Args:
            model_ids: The checkpoints; None for all, those that other processes added
                among them.
            for_scores: Whether scores will be averaged over them.

        Returns:
            Their ids.
        """
        self.end()
        self.saver.refresh()
        ids = parse_model_ids(model_ids, self.saver.model_ids)
        if model_ids is None and for_scores:
            self._warn_of_others(ids)
        return ids

    def _warn_of_others(self, ids: list[int]) -> None:
        """Warn of checkpoints that another run left behind, perhaps by mistake.

        A run that loaded none of the store's checkpoints means all of them.
        """
        loaded = {model_id for model_id, _ in self._cursors}
        others = [model_id for model_id in ids if model_id not in loaded]
        if loaded and others:
            mine = sorted(loaded)
            warnings.warn(
                f"The scores average over {len(ids)} checkpoints, and this TRAKer loaded "
                f"only model ids {mine}: {others} in {self.options.save_dir} are of another "
                f"run. If they are of other models, pass model_ids={mine}, or use another "
                f"save_dir; if not, pass model_ids={ids}.",
                TrakWarning,
                stacklevel=5,
            )

    def _begin(
        self, model_id: int, exp_name: str | None, total: int, weights: str
    ) -> None:
        self.computer.load_model_params(self.computer.model)
        self.computer.modelout_fn.start_checkpoint(self.computer.model)
        self._loaded = note_loaded(self.computer.model, weights)
        other = self._other_rows(model_id) if exp_name is None else None
        self._cursors[model_id, exp_name] = 0
        self._current = Current(model_id, exp_name, total, other)

    def end(self) -> None:
        """Take no more batches."""
        self._current = None

    def process(
        self, batch: Batch, inds: Any, num_samples: Any, *, targets: bool
    ) -> None:
        """Store the rows of a batch.

        Args:
            batch: The examples.
            inds: Their row numbers; None for the next ones.
            num_samples: Their number; None to infer it.
            targets: Whether they are targets, or training examples.

        Raises:
            OrderError: If no checkpoint is loaded for that.
        """
        with _ALONE:
            current = self._current
            loaded = self._loaded
            if current is None or loaded is None or bool(current.exp_name) != targets:
                call = "start_scoring_checkpoint" if targets else "load_checkpoint"
                raise OrderError(
                    f"No checkpoint is loaded for {'scoring' if targets else 'featurizing'}; "
                    f"call {call} first."
                )
            exp_name = current.exp_name
            batch = canonical(batch)
            size = batch_size(batch)
            cursor = self._cursors[current.model_id, exp_name]
            what = "target" if exp_name else "training example"
            rows = parse_rows(inds, num_samples, size, cursor, current.total, what)
            check_device(batch, self.options.device)
            check_mode(self.computer.model)
            self._loaded = check_loaded(self.computer.model, loaded, current.model_id)
            self._load_rows(current)
            store = self.saver.current_store
            self._check_task_data(current.model_id)
            digests = row_digests(batch)
            self._compare(current, rows, digests)
            pipeline = Pipeline(
                self.computer,
                self.projector,
                self.options.selection,
                current.model_id,
                self.proj_dim,
                self.scale,
                what,
                weighted=not exp_name or has_batched_form(self.computer.modelout_fn),
                measured=f"{exp_name}_outputs" in store,
            )
            skip = not exp_name and self.options.non_finite is NonFinitePolicy.SKIP
            store_batch(pipeline, store, exp_name, batch, rows, digests, skip=skip)
            if inds is None:
                self._cursors[current.model_id, exp_name] = cursor + size
            if not exp_name:
                self._note_completion(current.model_id)

    def _load_rows(self, current: Current) -> None:
        """Load the arrays that rows go to, in case somebody looked at others."""
        saver, name = self.saver, current.exp_name
        if saver.current_model_id != current.model_id:
            saver.load_current_store(current.model_id)
        if name is not None and f"{name}_grads" not in saver.current_store:
            saver.load_current_store(current.model_id, name, current.total)

    def _check_task_data(self, model_id: int) -> None:
        data = self.computer.modelout_fn.describe_data()
        record = self.saver.model_ids[model_id]
        known = record.get("task_data")
        if data and known is None:
            record["task_data"] = data
            self.saver.serialize_current_model_id_metadata()
        elif data and known != data:
            warnings.warn(
                f"model id {model_id} has rows for which the task had other data, such as "
                f"the embeddings of CLIP ({known}; now {data}). Make them from the same "
                f"weights, with a loader that does not shuffle. (Harmless if only "
                f"rounding differs.)",
                TrakWarning,
                stacklevel=4,
            )

    def _note_completion(self, model_id: int) -> None:
        record = self.saver.model_ids[model_id]
        flags = np.asarray(self.saver.current_store["is_featurized"])
        if not record.get("is_featurized") and bool((flags != PENDING).all()):
            self.saver.serialize_current_model_id_metadata()

    def _other_rows(self, model_id: int) -> dict[str, Any] | None:
        others = [i for i in self.saver.model_ids if i != model_id]
        if not others or not isinstance(self.saver, MmapSaver):
            return None
        return self.saver.open_digests(min(others))

    def _compare(self, current: Current, rows: np.ndarray, digests: np.ndarray) -> None:
        index, has_moved = first_difference(current.other, rows, digests)
        if index is None:
            return
        if has_moved:
            raise StaleRowError(
                f"Training example {index} is not the one that another checkpoint was "
                f"featurized with: that has the examples of this batch under other "
                f"indices. Go through the data in one fixed order, or pass inds."
            )
        # Once for each checkpoint is enough.
        self._current = Current(current.model_id, None, current.total, None)
        warnings.warn(
            f"Training example {index} is not the one that another checkpoint was "
            f"featurized with: does the loader augment, or is the data other? Scores "
            f"average over checkpoints, so every index must always be the same example. "
            f"(Harmless if only padding differs.)",
            TrakWarning,
            stacklevel=4,
        )
