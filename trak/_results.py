"""The half of TRAKer that reads stored rows: features, scores and what they are worth."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32

from trak._features import Features
from trak._finalizing import FeatureReport, read_reports
from trak._options import positive
from trak._scoring import Scoring, TopScores
from trak._session import Session
from trak.errors import OptionError
from trak.savers import AbstractSaver


class Results(ABC):
    """The calls of :class:`trak.TRAKer` after its loops over batches.

    Attributes:
        scores: What :meth:`finalize_scores` returned last.
    """

    saver: AbstractSaver
    train_set_size: int
    scores: np.ndarray | None
    _features: Features
    _scoring: Scoring
    _session: Session

    @property
    def reports(self) -> dict[int, FeatureReport]:
        """What finalizing found about each checkpoint, by model id."""
        return read_reports(self.saver.model_ids)

    def finalize_features(
        self,
        model_ids: Iterable[int] | None = None,
        del_grads: bool = False,  # noqa: FBT001
    ) -> None:
        """Compute what scoring needs of fully featurized checkpoints.

        Checkpoints that are finalized already are left as they are, unless the damping
        or the exponent of the rows is another now.

        Args:
            model_ids: The checkpoints; None for all in the store.
            del_grads: Whether to keep only the finished features: half the space, but
                the damping and the exponent of the rows are then fixed.

        Raises:
            ModelIDException: If one is unknown or not fully featurized.
            SingularKernelError: If a kernel cannot be inverted with this damping.
        """
        self._session.projector.free_memory()
        ids = self._session.choose(model_ids)
        self._features.finalize_all(ids, del_grads=del_grads)

    def finalize_scores(
        self,
        exp_name: str | None = None,
        model_ids: Iterable[int] | None = None,
        allow_skip: bool = False,  # noqa: FBT001  0.3.2's signature
    ) -> Float32[np.ndarray, "n m"]:
        r"""Compute the scores of an experiment, averaged over checkpoints.

        Entry ``(i, j)`` estimates how much training example ``i`` raises the model
        output of target ``j``: positive is helpful, negative is harmful.

        Args:
            exp_name: The experiment; None for the one that was started last, or the
                only one.
            model_ids: The checkpoints; None for all in the store.
            allow_skip: Whether checkpoints without features or targets are left out
                with a log message.

        Returns:
            The scores, mapped into memory from the store's file; changes stay in
            memory. Shape ``(n, m)``.

        Raises:
            ExperimentError: If there is no such experiment, or targets are missing.
            ModelIDException: If a checkpoint is not finalized.
            StoreMismatchError: If one was finalized with another damping.
            NonFiniteError: If a score is not finite.
        """
        exp_name, ids = self._session.select(exp_name, model_ids)
        ids = self._scoring.usable(exp_name, ids, allow_skip=allow_skip)
        self.scores = self._scoring.write_scores(exp_name, ids)
        return self.scores

    def top_k(
        self,
        exp_name: str | None = None,
        k: int = 10,
        *,
        largest: bool = True,
        model_ids: Iterable[int] | None = None,
        allow_skip: bool = False,
    ) -> TopScores:
        """Find every target's most helpful, or most harmful, training examples.

        Memory is that of a tile and the result; the ``(n, m)`` matrix is never made.

        Args:
            exp_name: As in :meth:`finalize_scores`.
            k: How many, at most ``n``.
            largest: Whether the most helpful; else the most harmful.
            model_ids: As in :meth:`finalize_scores`.
            allow_skip: As in :meth:`finalize_scores`.

        Returns:
            ``scores`` and ``indices``, best first, ties by index. Shapes ``(m, k)``.

        Raises:
            OptionError: If ``k`` is not between 1 and ``n``.
        """
        if positive("k", k) > self.train_set_size:
            raise OptionError(
                f"k={k}, but there are only {self.train_set_size} training examples."
            )
        exp_name, ids = self._session.select(exp_name, model_ids)
        ids = self._scoring.usable(exp_name, ids, allow_skip=allow_skip)
        return self._scoring.top_k(exp_name, ids, int(k), largest=largest)

    def self_influence(
        self, model_ids: Iterable[int] | None = None
    ) -> Float32[np.ndarray, " n"]:
        """Compute each training example's score on itself, in ``min(n, p)**2`` memory.

        Large values mark examples that the model could not predict without having seen
        them: atypical, or mislabelled.

        Args:
            model_ids: The checkpoints; None for all in the store.

        Returns:
            The diagonal of the scores of the training set on itself. Shape ``(n,)``.

        Raises:
            ModelIDException: If there is no checkpoint, or one is not finalized.
            SingularKernelError: If gradients were deleted, or scores are a custom class's.
        """
        ids = self._session.choose(model_ids, for_scores=True)
        return self._scoring.self_influence(ids)
