"""The half of TRAKer that reads stored rows: features, scores and what they are worth."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from trak._choices import DampingChoice, read_choice
from trak._features import Features
from trak._finalizing import FeatureReport, read_reports
from trak._options import positive
from trak._scoring import Scoring, TopScores
from trak._session import Session
from trak._thresholds import parse_threshold
from trak._validating import Uncertainty, Validation, parse_targets
from trak.errors import OptionError
from trak.evaluation import CrossValidation
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
    _validation: Validation

    @property
    def reports(self) -> dict[int, FeatureReport]:
        """What finalizing found about each checkpoint, by model id."""
        return read_reports(self.saver.model_ids)

    @property
    def dampings(self) -> dict[str, DampingChoice]:
        """The damping of each experiment's scores, and what chose it, by name."""
        found = {k: read_choice(one, k) for k, one in self.saver.experiments.items()}
        return {name: choice for name, choice in found.items() if choice is not None}

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
        *,
        soft_threshold: float | str | None = None,
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
            soft_threshold: How far scores are shrunk towards 0: a number in their units,
                or ``"auto"`` for what predicts checkpoints that are left out best, if
                anything does. None leaves them as they are.

        Returns:
            The scores, mapped into memory from the store's file; changes stay in
            memory. Shape ``(n, m)``.

        Raises:
            ExperimentError: If there is no such experiment, or targets are missing.
            ModelIDException: If a checkpoint is not finalized, or ``soft_threshold`` is
                ``"auto"`` and it is not known what one was trained on.
            StoreMismatchError: If one was finalized with another damping.
            NonFiniteError: If a score is not finite.
            OptionError: If ``soft_threshold`` is none, or checkpoints cannot choose it.
        """
        threshold = parse_threshold(soft_threshold)
        exp_name, ids = self._session.select(exp_name, model_ids)
        ids = self._scoring.usable(exp_name, ids, allow_skip=allow_skip)
        tuning = self._validation.choose(exp_name, ids).tuning
        if threshold is None:
            threshold = self._validation.threshold(exp_name, ids, tuning)
        self.scores = self._scoring.write_scores(exp_name, ids, tuning, threshold)
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
            ``scores``, before any soft threshold, and ``indices``, best first, ties by
            index. Shapes ``(m, k)``.

        Raises:
            OptionError: If ``k`` is not between 1 and ``n``.
        """
        if positive("k", k) > self.train_set_size:
            raise OptionError(
                f"k={k}, but there are only {self.train_set_size} training examples."
            )
        exp_name, ids = self._session.select(exp_name, model_ids)
        ids = self._scoring.usable(exp_name, ids, allow_skip=allow_skip)
        tuning = self._validation.choose(exp_name, ids).tuning
        return self._scoring.top_k(exp_name, ids, int(k), tuning, largest=largest)

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

    def cross_validate(
        self,
        exp_name: str | None = None,
        model_ids: Iterable[int] | None = None,
        **options: Any,
    ) -> CrossValidation:
        """Estimate how good the scores are, from the checkpoints alone.

        Each checkpoint's outputs on the targets are predicted from the scores of the
        others, summed over what it was trained on. That needs two or more checkpoints,
        loaded with ``train_inds``, each trained on a random part of the training set.

        Args:
            exp_name: As in :meth:`finalize_scores`.
            model_ids: As in :meth:`finalize_scores`.
            **options: Those of :func:`trak.evaluation.cross_validate`: ``multiples``,
                ``exponents``, ``columns``, ``max_targets``, ``n_probes``, ``seed``. If
                exponents are left out, they are those that ``lambda_reg="auto"`` chooses
                from: this TRAKer's, and other powers of the result unless it was given
                them.

        Returns:
            The expected LDS with its interval, over dampings, exponents and numbers of
            checkpoints; print it for a table. It is about scores with
            ``lambda_reg="auto"``, whatever this TRAKer has.

        Raises:
            ModelIDException: If a checkpoint has no ``train_inds``, or its gradients were
                deleted.
            ExperimentError: If targets, or the model's outputs on them, are missing.
            OptionError: If there are too few checkpoints, two had the same training set,
                all were trained on everything, or an option cannot work.
            NonFiniteError: If an output is not finite.
        """
        exp_name, ids = self._session.select(exp_name, model_ids)
        ids = self._scoring.usable(exp_name, ids, allow_skip=False)
        return self._validation.cross_validate(exp_name, ids, **options)

    def uncertainty(
        self,
        exp_name: str | None = None,
        k: int = 10,
        *,
        targets: Sequence[int] | np.ndarray | None = None,
        model_ids: Iterable[int] | None = None,
    ) -> Uncertainty:
        """Estimate how much scores would differ with other checkpoints.

        Args:
            exp_name: As in :meth:`finalize_scores`.
            k: How many examples count as a target's top, below ``n``.
            targets: Indices of the targets to look at; None for all.
            model_ids: As in :meth:`finalize_scores`.

        Returns:
            ``standard_errors``, of shape ``(n, len(targets))``, of the scores before any
            soft threshold; and ``top_k``, how much of each target's top examples would
            come again.

        Raises:
            OptionError: If there are fewer than 2 checkpoints, or ``k`` or ``targets``
                are out of range.
        """
        exp_name, ids = self._session.select(exp_name, model_ids)
        ids = self._scoring.usable(exp_name, ids, allow_skip=False)
        m = int(self.saver.experiments[exp_name]["num_targets"])
        chosen = parse_targets(targets, m)
        tuning = self._validation.choose(exp_name, ids).tuning
        return self._validation.uncertainty(
            exp_name, ids, tuning, chosen, positive("k", k)
        )
