"""One pass of gradients that several methods share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from trak._linalg import RowReader
from trak._options import positive
from trak._reading import read_rows
from trak._types import Batch, Weights
from trak.errors import BatchError, OptionError, OrderError
from trak.methods._choices import check_checkpoints
from trak.methods._data import Contents, Memory, checked
from trak.projectors import NoOpProjector
from trak.traker import TRAKer

_OF_TRAK = ("lambda_reg", "exponents")


@dataclass(frozen=True, slots=True)
class CheckpointGradients:
    """The projected gradients of one checkpoint."""

    train: RowReader
    """Reads rows of :math:`X_c`, ``(n, p)``."""

    targets: RowReader
    """Reads rows :math:`\\phi_c`, ``(m, p)``."""

    out_to_loss: Float64[np.ndarray, " n"]
    """:math:`Q_c` of the training examples. Shape ``(n,)``."""


class ProjectedGradients:
    r"""The gradients of a model at its checkpoints, computed once for several methods.

    A :class:`trak.TRAKer` computes them and keeps them in ``save_dir``: work that was
    interrupted is gone on with, and another process, or another day, finds them there.

    Args:
        model: The model; checkpoints are loaded into it, and it is left in evaluation
            mode.
        task: What is attributed, as :class:`trak.TRAKer` takes it.
        checkpoints: State dicts. Any sequence will do, such as one that reads its items
            from files.
        train_set_size: Number of training examples, ``n``; None to count them.
        save_dir: Directory of the store. It holds one training set.
        train_inds: The training examples that each checkpoint was trained on, as
            :meth:`trak.TRAKer.load_checkpoint` takes them; None where that is unknown.
        **options: Further arguments of :class:`trak.TRAKer`, such as ``proj_dim``,
            ``use_half_precision`` or ``projector``. A ``NoOpProjector()`` keeps exact
            gradients, which is for small models.

    Raises:
        NoCheckpointError: If there are no checkpoints.
        OptionError: If ``train_set_size`` is no such number, ``train_inds`` are not one
            for each checkpoint, or an option belongs to :class:`TRAK`.

    Attributes:
        model_ids: The checkpoints' ids in the store: 0, 1, ...
    """

    def __init__(
        self,
        model: torch.nn.Module,
        task: Any,
        checkpoints: Sequence[Weights],
        train_set_size: int | None = None,
        save_dir: str | Path = "./trak_results",
        *,
        train_inds: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        check_checkpoints(checkpoints)
        if train_inds is not None and len(train_inds) != len(checkpoints):
            raise OptionError(
                f"train_inds has {len(train_inds)} entries for {len(checkpoints)} "
                f"checkpoints; pass one for each, or None."
            )
        for name in _OF_TRAK:
            if name in options:
                raise OptionError(
                    f"{name} is no option of the gradients; pass it to TRAK."
                )
        self._model, self._task, self._checkpoints = model, task, checkpoints
        self._n = (
            None
            if train_set_size is None
            else positive("train_set_size", train_set_size)
        )
        self._save_dir = Path(save_dir).resolve()
        self._train_inds, self._options = train_inds, options
        self.model_ids = list(range(len(checkpoints)))
        self._memory = Memory()
        self._train: Contents | None = None
        self._traker: TRAKer | None = None
        self._scored: set[str] = set()

    def fit(self, train: Iterable[Batch]) -> ProjectedGradients:
        """Compute the gradients of the training set, where they are not stored yet.

        Args:
            train: Its batches. The same object again costs nothing.

        Returns:
            The gradients themselves.

        Raises:
            BatchError: If there are not ``train_set_size`` examples, they are not those
                of an earlier call, or they are not the same whenever they are gone
                through.
            StaleRowError: If the store has gradients of other examples.
        """
        contents, is_known = self._memory.read(train, "train")
        if self._train is not None and contents != self._train:
            raise BatchError(
                f"train has {contents.size} examples that are not the {self._train.size} "
                f"these gradients are of; make another ProjectedGradients, with another "
                f"save_dir."
            )
        if is_known and self._train is not None:
            return self
        if self._n not in {None, contents.size}:
            raise BatchError(
                f"train has {contents.size} examples, and train_set_size is {self._n}; "
                f"make the two agree."
            )
        traker = self._traker or self._make(contents.size)
        for model_id in self.model_ids:
            known: dict[str, Any] = {}
            if self._train_inds is not None:
                known["train_inds"] = self._train_inds[model_id]
            checkpoint = self._checkpoints[model_id]
            traker.load_checkpoint(checkpoint, model_id=model_id, **known)
            for batch in checked(train, contents, "train"):
                traker.featurize(batch)
        # Which damping does not matter: scoring only wants the rows to be complete.
        traker.finalize_features(self.model_ids)
        self._train, self._traker = contents, traker
        return self

    def prepare(self, targets: Iterable[Batch]) -> tuple[str, int]:
        """Compute the gradients of targets, where they are not stored yet.

        Args:
            targets: Their batches. The same object again costs nothing.

        Returns:
            The name of their experiment, which depends on the targets alone, and their
            number.

        Raises:
            OrderError: If there are no gradients of a training set yet.
            BatchError: If there are no targets, or they are not the same whenever they
                are gone through.
        """
        traker = self.traker
        contents, _ = self._memory.read(targets, "targets")
        name = f"targets-{contents.name}"
        if name not in self._scored:
            for model_id in self.model_ids:
                checkpoint = self._checkpoints[model_id]
                traker.start_scoring_checkpoint(
                    name, checkpoint, model_id, contents.size
                )
                for batch in checked(targets, contents, "targets"):
                    traker.score(batch)
            self._scored.add(name)
        return name, contents.size

    def rows(self, targets: Iterable[Batch]) -> list[CheckpointGradients]:
        """Read the projected gradients, computing those of the targets if need be.

        Args:
            targets: Batches of targets.

        Returns:
            Those of each checkpoint; rows are read from the store when they are asked
            for.
        """
        name, m = self.prepare(targets)
        traker = self.traker
        found = []
        for model_id in self.model_ids:
            saver, device = traker.saver, traker.device
            saver.load_current_store(model_id)
            # A copy: the next checkpoint's arrays may go into the same dictionary.
            store = dict(saver.current_store)
            saver.load_current_store(model_id, name, m)
            read = read_rows(dict(saver.current_store), f"{name}_", device)
            weights = np.asarray(store["out_to_loss"], dtype=np.float64).reshape(-1)
            train = read_rows(store, "", device)
            found.append(CheckpointGradients(train, read, weights))
        return found

    @property
    def traker(self) -> TRAKer:
        """What computes and keeps the gradients.

        Raises:
            OrderError: If there are no gradients of a training set yet.
        """
        if self._traker is None:
            raise OrderError(
                "There are no gradients of a training set to score; fit it first."
            )
        return self._traker

    @property
    def gain(self) -> float:
        """What a product of two rows estimates that of the gradients with.

        Rows are divided by the square root of ``d``, and a projection's entries have unit
        variance: the factor is ``d / p``, or ``d`` without projection.
        """
        d = self.traker.num_params_for_grad
        is_exact = isinstance(self.traker.projector, NoOpProjector)
        return float(d if is_exact else d / self.traker.proj_dim)

    def reopen(self, **options: Any) -> TRAKer:
        """Make a TRAKer on the same store, with other options of scoring.

        Args:
            **options: Arguments of :class:`trak.TRAKer`.

        Returns:
            The TRAKer.
        """
        return self._make(self.traker.train_set_size, **options)

    def _make(self, n: int, **options: Any) -> TRAKer:
        given = {**self._options, **options}
        return TRAKer(self._model, self._task, n, save_dir=self._save_dir, **given)
