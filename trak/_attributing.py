"""The calls of TRAKer that go through a whole dataset: featurize all, attribute."""

from __future__ import annotations

import hashlib
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from tqdm import tqdm

from trak._batches import row_digests
from trak._results import Results
from trak._scoring_call import ScoringCall
from trak._trainer import Source, check_dataset
from trak._types import Checkpoint
from trak.errors import OrderError
from trak.modelout_functions._calls import evaluating


class Attributing(Results, ABC):
    """The calls of :class:`trak.TRAKer` that need a trainer's data and checkpoints."""

    _source: Source | None
    _quiet: bool
    _featurized: list[int] | None

    def featurize_all(self) -> list[int]:
        """Featurize the training set with every checkpoint, and finalize the features.

        What the store has already is not computed again. The model has its weights back
        afterwards.

        Returns:
            The checkpoints' model ids, in order, each once.

        Raises:
            OrderError: If this TRAKer was not made with :meth:`from_trainer`.
            TrakError: What :meth:`load_checkpoint`, :meth:`featurize` and
                :meth:`finalize_features` raise.
        """
        source = self._read_source("featurize_all")
        if self._featurized is not None:
            return self._featurized
        ids: list[int] = []
        with _keeping(source):
            for checkpoint in _checkpoints(source):
                model_id = self._session.load_for_training(
                    checkpoint, None, allow_known=False
                )
                ids.append(model_id)
                for batch in self._batches(source, source.training, "Featurizing"):
                    self._session.process(batch, None, None, targets=False)
        unique = list(dict.fromkeys(ids))
        self.finalize_features(model_ids=unique)
        if source.checkpoints:  # the model's own weights may change
            self._featurized = unique
        return unique

    def attribute(
        self,
        dataset: Any = None,
        exp_name: str | None = None,
        *,
        soft_threshold: float | str | None = None,
    ) -> Float32[np.ndarray, "n m"]:
        """Score the examples of a dataset, featurizing the training set first.

        What the store has already is not computed again. The model has its weights back
        afterwards.

        Args:
            dataset: The targets, with the columns of the training set; None for the
                trainer's ``eval_dataset``. They are taken in order.
            exp_name: The experiment's name; None for one that the targets' content gives.
            soft_threshold: As in :meth:`finalize_scores`.

        Returns:
            The scores, as :meth:`finalize_scores` returns them: entry ``(i, j)`` is of
            example ``i`` of the training set on target ``j``. Shape ``(n, m)``.

        Raises:
            OrderError: If this TRAKer was not made with :meth:`from_trainer`.
            OptionError: If the dataset has no examples by index, or no columns that the
                model takes.
            TrakError: What :meth:`featurize_all`, :meth:`score` and
                :meth:`finalize_scores` raise.
        """
        source = self._read_source("attribute")
        targets = source.evaluation if dataset is None else dataset
        check_dataset("dataset", targets)
        if exp_name is None:
            exp_name = _name_of(source, targets)
        ids = self.featurize_all()
        with _keeping(source):
            for checkpoint in _checkpoints(source):
                call = ScoringCall(exp_name, checkpoint, None, len(targets))
                self._session.load_for_scoring(call)
                for batch in self._batches(source, targets, "Scoring"):
                    self._session.process(batch, None, None, targets=True)
        return self.finalize_scores(
            exp_name, model_ids=ids, soft_threshold=soft_threshold
        )

    def _read_source(self, call: str) -> Source:
        if self._source is None:
            raise OrderError(
                f"{call} goes through a trainer's data, and this TRAKer has none; make it "
                f"with TRAKer.from_trainer, or loop over batches with featurize and score."
            )
        return self._source

    def _batches(self, source: Source, dataset: Any, what: str) -> Iterator[Any]:
        size = source.collating.batch_size
        yield from tqdm(
            source.collating.batches(dataset),
            desc=f"{what}, model id {self.saver.current_model_id}",
            total=-(-len(dataset) // size),
            disable=self._quiet,
        )


def _checkpoints(source: Source) -> Iterator[Checkpoint]:
    if source.checkpoints:
        yield from source.checkpoints
    else:
        yield source.model.state_dict()


def _name_of(source: Source, dataset: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for batch in source.collating.batches(dataset):
        digest.update(row_digests(batch).tobytes())
    return f"targets-{digest.hexdigest()}"


@contextmanager
def _keeping(source: Source) -> Iterator[None]:
    """Give the model its weights and modes back at the end."""
    model = source.model
    kept = None
    if source.checkpoints:
        kept = {
            key: value.detach().cpu().clone()
            if isinstance(value, torch.Tensor)
            else value
            for key, value in model.state_dict().items()
        }
    with evaluating(model):
        try:
            yield
        finally:
            if kept is not None:
                model.load_state_dict(kept)
