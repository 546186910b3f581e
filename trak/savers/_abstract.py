"""The interface of savers."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trak._members import pack_mask, unpack_mask
from trak.errors import ModelIDException

MEMBERS = "train_inds"
"""Key of a checkpoint's record, or name of a record of its own, for its examples."""


class AbstractSaver(ABC):
    """Keeps the arrays and records of every checkpoint and experiment.

    A subclass is given to :class:`trak.TRAKer` as a class and built with these arguments
    by keyword. It holds, in ``current_store``, the arrays of the checkpoint that was
    loaded last: ``grads`` and ``features`` ``(n, p)``, ``out_to_loss`` ``(n, 1)``,
    ``is_featurized`` ``(n, 1)``; and of the experiment, ``{exp}_grads`` ``(m, p)`` and
    ``{exp}_scores`` ``(n, m)``. Arrays named ``grads_exponent``, ``row_digest``,
    ``{exp}_grads_exponent``, ``{exp}_row_digest`` and ``{exp}_is_scored`` are used where
    they are present.

    Args:
        save_dir: The directory of the store.
        metadata: What every checkpoint of the store must agree in.
        load_from_save_dir: Whether checkpoints that are already there take part.
        logging_level: Level of its logger.
        use_half_precision: Whether features are stored in float16.
        train_set_size: Number of training examples, ``n``.
        proj_dim: Projected entries, ``p``.

    Attributes:
        model_ids: Every checkpoint's record, by id: ``is_featurized``,
            ``is_finalized``, and what the façade adds.
        experiments: Every experiment's record, by name.
        current_store: The arrays that are loaded, by name.
        current_model_id: The checkpoint they belong to.
        current_experiment_name: The experiment they belong to.
    """

    def __init__(
        self,
        save_dir: Path | str,
        metadata: Mapping[str, Any],
        load_from_save_dir: bool = True,  # noqa: FBT001  0.3.2's signature
        logging_level: int = logging.INFO,
        use_half_precision: bool = True,  # noqa: FBT001  0.3.2's signature
        *,
        train_set_size: int = 0,
        proj_dim: int = 0,
    ) -> None:
        self.save_dir = Path(save_dir).resolve()
        self.metadata = dict(metadata)
        self.train_set_size = train_set_size
        self.proj_dim = proj_dim
        self.load_from_save_dir = load_from_save_dir
        self.use_half_precision = use_half_precision
        self.logger = logging.getLogger("STORE")
        self.logger.setLevel(logging_level)
        self.model_ids: dict[int, dict[str, Any]] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.current_store: dict[str, Any] = {}
        self.current_model_id: int | None = None
        self.current_experiment_name: str | None = None

    @abstractmethod
    def register_model_id(
        self,
        model_id: int,
        _allow_featurizing_already_registered: bool = False,  # noqa: FBT001  0.3.2's
    ) -> None:
        """Make a new checkpoint's record and arrays, and load them."""

    @abstractmethod
    def serialize_current_model_id_metadata(self) -> None:
        """Write the record of the current checkpoint."""

    @abstractmethod
    def init_store(self, model_id: int) -> None:
        """Make the arrays of a new checkpoint, and load them."""

    @abstractmethod
    def init_experiment(self, exp_name: str, num_targets: int, model_id: int) -> None:
        """Make an experiment's arrays on a checkpoint, or find them, and load them."""

    @abstractmethod
    def load_current_store(
        self,
        model_id: int,
        exp_name: str | None = None,
        exp_num_targets: int | None = -1,
        mode: str | None = "r+",
    ) -> None:
        """Load the arrays of a checkpoint, or those of an experiment on it."""

    @abstractmethod
    def save_scores(self, exp_name: str) -> None:
        """Commit the scores of an experiment."""

    @abstractmethod
    def del_grads(self, model_id: int) -> None:
        """Delete the training gradients of a checkpoint."""

    def refresh(self) -> None:  # noqa: B027  a saver may have a single writer
        """Learn what other processes have added since this saver was made; or do not."""

    @contextlib.contextmanager
    def open_features(self) -> Iterator[Any]:
        """Give the array that takes the current checkpoint's features, ``(n, p)``."""
        yield self.current_store["features"]

    @contextlib.contextmanager
    def open_scores(self, exp_name: str, num_targets: int) -> Iterator[Any]:
        """Give the array that takes an experiment's scores, ``(n, m)``."""
        yield self.current_store[f"{exp_name}_scores"]

    def keep_gram(self, gram: np.ndarray) -> None:  # noqa: B027  keeping it is optional
        """Keep the current checkpoint's Gram matrix, under ``gram``; or do not."""

    def keep_members(self, members: np.ndarray) -> np.ndarray:
        """Keep which examples the current checkpoint was trained on, if nothing was kept.

        Args:
            members: The mask. Shape ``(n,)``.

        Returns:
            The mask that is kept, which another call or process may have given first.

        Raises:
            ModelIDException: If no checkpoint is loaded.
        """
        model_id = self.current_model_id
        if model_id is None:
            raise ModelIDException(
                "No checkpoint is loaded; load or register one first."
            )
        known = self.members(model_id)
        if known is not None:
            return known
        self.model_ids[model_id][MEMBERS] = pack_mask(members)
        self.serialize_current_model_id_metadata()
        return members

    def members(self, model_id: int) -> np.ndarray | None:
        """Give the mask of the examples that a checkpoint was trained on, if it is kept.

        Args:
            model_id: The checkpoint.

        Returns:
            The mask, of shape ``(n,)``, or None.
        """
        record = self.model_ids[model_id].get(MEMBERS)
        if record is None:
            return None
        where = f"the record of model id {model_id}"
        return unpack_mask(record, int(record.get("n", 0)), where)
