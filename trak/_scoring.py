"""From a saver and its checkpoints to blocks of scores, whichever the score computer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor
from tqdm import tqdm

from trak import _finalizing as finalizing
from trak._blocked import Block, Side
from trak._exponents import Exponents
from trak._features import Features
from trak._layout import PENDING
from trak._linalg import Kernel, is_finite
from trak._members import balanced
from trak._readiness import (
    require_features,
    require_finalized,
)
from trak._reading import read_array, read_rows
from trak._thresholds import SoftThreshold
from trak._topk import TopK
from trak.errors import (
    ExperimentError,
    ModelIDException,
    NoCheckpointError,
    NonFiniteError,
    SingularKernelError,
)
from trak.savers import AbstractSaver
from trak.score_computers import AbstractScoreComputer, as_blocked, describe

logger = logging.getLogger("TRAK")


class Tuning(NamedTuple):
    """What cross-validation may choose of how an experiment is scored."""

    multiple: float = 1.0
    """How many mean eigenvalues the damping ``"auto"`` stands for."""

    power: float | None = None
    """The exponent of the result; None for the score computer's."""

    def apply(self, computer: AbstractScoreComputer) -> AbstractScoreComputer:
        """Give a score computer the exponent.

        Returns:
            A copy with it; the score computer itself where it has that one.
        """
        blocked = as_blocked(computer)
        if blocked is None or self.power in {None, blocked.exponents.result}:
            return computer
        other = copy(blocked)
        other.exponents = Exponents(blocked.exponents.rows, float(self.power))
        return other


DEFAULT = Tuning()


class TopScores(NamedTuple):
    """The training examples with the largest or smallest scores on each target."""

    scores: Float32[np.ndarray, "m k"]
    """Their scores, best first."""

    indices: Int64[np.ndarray, "m k"]
    """Their indices in the training set."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """What turns features and stored rows of targets into scores."""

    features: Features

    @property
    def _saver(self) -> AbstractSaver:
        return self.features.saver

    @property
    def _computer(self) -> AbstractScoreComputer:
        return self.features.computer

    def usable(
        self, exp_name: str, model_ids: Sequence[int], *, allow_skip: bool
    ) -> list[int]:
        """Check that every checkpoint has features and all targets of an experiment.

        Args:
            exp_name: The experiment.
            model_ids: The checkpoints asked for.
            allow_skip: Whether those that lack something are left out with a warning.

        Returns:
            The checkpoints to use.

        Raises:
            NoCheckpointError: If there are none, or none is left.
            ModelIDException: If one is not finalized.
            ExperimentError: If one lacks targets.
        """
        if not model_ids:
            raise NoCheckpointError(
                f"There is no checkpoint to score {exp_name!r} with; model_ids is empty."
            )
        usable = []
        for model_id in model_ids:
            try:
                self._check_usable(exp_name, model_id)
            except (ModelIDException, ExperimentError) as error:
                if not allow_skip:
                    raise
                logger.warning("leaving out model id %d: %s", model_id, error)
            else:
                usable.append(model_id)
        if not usable:
            raise NoCheckpointError(
                f"No checkpoint has both finalized features and targets of {exp_name!r}; "
                f"of {len(model_ids)} asked for, all were left out."
            )
        return usable

    def _check_usable(self, exp_name: str, model_id: int) -> None:
        require_finalized(self._saver, model_id)
        self.features.check_same(model_id)
        require_features(self._saver, model_id, on_demand=self.features.on_demand)
        m = int(self._saver.experiments[exp_name]["num_targets"])
        self._saver.load_current_store(model_id, exp_name, m)
        if self._saver.current_store.get(f"{exp_name}_grads") is None:
            raise ExperimentError(
                f"experiment {exp_name!r} has no targets on model id {model_id}."
            )
        flags = self._saver.current_store.get(f"{exp_name}_is_scored")
        if flags is not None:
            done = int((np.asarray(flags) != PENDING).sum())
            if done < m:
                raise ExperimentError(
                    f"experiment {exp_name!r} has {done} of {m} targets on model id "
                    f"{model_id}; score the rest, or pass allow_skip=True to leave this "
                    f"checkpoint out."
                )

    def blocks(
        self, exp_name: str, model_ids: Sequence[int], tuning: Tuning = DEFAULT
    ) -> Iterator[Block]:
        """Compute the scores of an experiment, averaged over checkpoints.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints that :meth:`usable` gave.
            tuning: What was chosen for the experiment.

        Yields:
            Blocks that cover the ``(n, m)`` matrix: all rows of some columns, then the
            next columns.

        Raises:
            NonFiniteError: If a score is not finite.
        """
        m = int(self._saver.experiments[exp_name]["num_targets"])
        sides = [self.side(i, exp_name, m, tuning.multiple) for i in model_ids]
        weight = torch.from_numpy(np.mean([weight for _, weight in sides], axis=0))
        blocked = as_blocked(tuning.apply(self._computer))
        if blocked is not None:
            found = blocked.score_blocks(
                [side for side, _ in sides], weight, self.features.n, m, self.features.p
            )
        else:
            found = self._whole([side for side, _ in sides], weight, m)
        with tqdm(
            total=self.features.n * m,
            desc="Scoring",
            unit="score",
            disable=self.features.quiet,
        ) as bar:
            for block in found:
                if not is_finite(block.values):
                    raise NonFiniteError(
                        f"scores of training examples {block.rows[0]} to "
                        f"{block.rows[1] - 1} on experiment {exp_name!r} are not finite; "
                        f"they overflow float32. Use a larger lambda_reg."
                    )
                yield block
                bar.update(block.values.numel())

    def _whole(
        self, sides: Sequence[Side], weight: Float64[Tensor, " n"], m: int
    ) -> Iterator[Block]:
        total = torch.zeros(self.features.n, m, dtype=torch.float32, device="cpu")
        for side in sides:
            train, targets = side.train(0, self.features.n), side.targets(0, m)
            self._computer.get_scores(train, targets, accumulator=total)
        total *= (weight / len(sides)).float()[:, None]
        yield Block((0, self.features.n), (0, m), total)

    def side(
        self, model_id: int, exp_name: str | None, m: int = 0, multiple: float = 1.0
    ) -> tuple[Side, Float64[np.ndarray, " n"]]:
        """Give a checkpoint's part in the scores.

        Args:
            model_id: A checkpoint that can be used.
            exp_name: The experiment; None if the targets are the training examples.
            m: Its number of targets.
            multiple: How many mean eigenvalues the damping ``"auto"`` stands for.

        Returns:
            Readers of its rows, with its kernel; and its out-to-loss weights for the
            result, balanced if it is known what it was trained on, of shape ``(n,)``.
        """
        saver = self._saver
        saver.load_current_store(model_id)
        # A copy: savers may put the next checkpoint's arrays into the same dictionary.
        store = dict(saver.current_store)
        has_grads = store.get("grads") is not None
        if exp_name is None:
            targets = read_rows(store, "", self.features.device) if has_grads else None
        else:
            saver.load_current_store(model_id, exp_name, m)
            targets = read_rows(
                saver.current_store, f"{exp_name}_", self.features.device
            )
        raw = np.asarray(store["out_to_loss"], dtype=np.float64).reshape(-1)
        weight = balanced(raw, saver.members(model_id))
        blocked = as_blocked(self._computer)
        if blocked is None or not has_grads:
            train = read_array(store["features"], self.features.device)
            return Side(train, targets or train, None), weight

        def kernel() -> Kernel:
            n, p = self.features.n, self.features.p
            return finalizing.fit(blocked, store, n, p, multiple=multiple)[1]

        train = finalizing.train_rows(blocked, store, self.features.device)
        return Side(train, targets or train, kernel), weight

    def write_scores(
        self,
        exp_name: str,
        model_ids: Sequence[int],
        tuning: Tuning,
        threshold: SoftThreshold,
    ) -> np.ndarray:
        """Write the scores of an experiment block by block.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints that :meth:`usable` gave.
            tuning: What was chosen for the experiment.
            threshold: What happens to small scores.

        Returns:
            The ``(n, m)`` scores, mapped from their file; changes stay in memory.
        """
        record = self._saver.experiments[exp_name]
        made_with = describe(tuning.apply(self._computer), scores=True)
        record.update(model_ids=[*model_ids], finalized_with=made_with)
        record["soft_threshold"] = threshold.describe()
        m = int(record["num_targets"])
        with self._saver.open_scores(exp_name, m) as array:
            for block in self.blocks(exp_name, model_ids, tuning):
                array[slice(*block.rows), slice(*block.columns)] = block.values.cpu()
            threshold.apply(array, self.features.n, m)
        self._saver.save_scores(exp_name)
        scores: np.ndarray = self._saver.current_store[f"{exp_name}_scores"]
        return scores

    def top_k(
        self,
        exp_name: str,
        model_ids: Sequence[int],
        k: int,
        tuning: Tuning,
        *,
        largest: bool,
    ) -> TopScores:
        """Find every target's best training examples without the ``(n, m)`` matrix.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints that :meth:`usable` gave.
            k: How many.
            tuning: What was chosen for the experiment.
            largest: Whether the most helpful, or the most harmful.

        Returns:
            Scores and indices, best first; of equal scores the lower index first.
        """
        finished: list[TopK] = []
        columns: tuple[int, int] | None = None
        for block in self.blocks(exp_name, model_ids, tuning):
            if block.columns != columns:
                columns = block.columns
                finished.append(TopK(k, columns[1] - columns[0], largest=largest))
            finished[-1].update(block.values, block.rows[0])
        return TopScores(
            np.concatenate([top.values.T.numpy() for top in finished]),
            np.concatenate([top.indices.T.numpy() for top in finished]),
        )

    def self_influence(self, model_ids: Sequence[int]) -> Float32[np.ndarray, " n"]:
        """Compute every training example's score on itself.

        Args:
            model_ids: Finalized checkpoints.

        Returns:
            The scores. Shape ``(n,)``.

        Raises:
            NoCheckpointError: If there are none.
            ModelIDException: If one is not finalized.
            SingularKernelError: If the score computer is not the blocked one.
        """
        if not model_ids:
            raise NoCheckpointError("There is no checkpoint; featurize one first.")
        blocked = as_blocked(self._computer)
        if blocked is None:
            raise SingularKernelError(
                f"Self-influence needs the kernel of BasicScoreComputer; "
                f"{type(self._computer).__name__} replaces it."
            )
        influence, weights = np.zeros(self.features.n), np.zeros(self.features.n)
        for model_id in model_ids:
            require_finalized(self._saver, model_id)
            self.features.check_same(model_id)
            require_features(self._saver, model_id, on_demand=self.features.on_demand)
            side, weight = self.side(model_id, None)
            raw = self._saver.current_store["out_to_loss"]
            row_weights = blocked.exponents.row_weights(raw)
            found = blocked.self_influence(
                side, self.features.n, self.features.p, row_weights
            )
            influence += found.cpu().numpy()
            weights += weight
        c = len(model_ids)
        result: np.ndarray = (
            influence / c * blocked.exponents.result_weights(weights / c)
        )
        return result.astype(np.float32)
