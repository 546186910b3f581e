"""From a saver and its checkpoints to blocks of scores, whichever the score computer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor
from tqdm import tqdm

from trak import _finalizing as finalizing
from trak._blocked import Block, Side
from trak._layout import PENDING
from trak._linalg import Kernel, is_finite
from trak._readiness import (
    has_features,
    require_features,
    require_featurized,
    require_finalized,
)
from trak._reading import ZeroRows, read_array, read_rows
from trak._topk import TopK
from trak.errors import (
    ExperimentError,
    ModelIDException,
    NoCheckpointError,
    NonFiniteError,
    SingularKernelError,
    StoreMismatchError,
)
from trak.savers import AbstractSaver, MmapSaver
from trak.score_computers import AbstractScoreComputer, as_blocked, describe

logger = logging.getLogger("TRAK")


class TopScores(NamedTuple):
    """The training examples with the largest or smallest scores on each target."""

    scores: Float32[np.ndarray, "m k"]
    """Their scores, best first."""

    indices: Int64[np.ndarray, "m k"]
    """Their indices in the training set."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """What turns stored rows into features and scores."""

    saver: AbstractSaver
    computer: AbstractScoreComputer
    device: torch.device
    n: int
    """Training examples."""

    p: int
    """Projected entries."""

    quiet: bool
    """Whether to leave out progress bars."""

    # -- features ---------------------------------------------------------------------

    def finalize_all(self, model_ids: Sequence[int], *, del_grads: bool) -> None:
        """Finalize checkpoints that are not, or not with this score computer.

        Args:
            model_ids: The checkpoints.
            del_grads: Whether to keep only their features.

        Raises:
            NoCheckpointError: If there are none.
            ModelIDException: If one lacks rows.
        """
        if not model_ids:
            raise NoCheckpointError(
                "There is no checkpoint to finalize: model_ids is empty, or nothing was "
                "featurized yet; load_checkpoint and featurize first."
            )
        for model_id in model_ids:
            require_featurized(self.saver, model_id)
        for model_id in tqdm(model_ids, desc="Finalizing features", disable=self.quiet):
            self.saver.load_current_store(model_id)  # others may have finalized it
            record = self.saver.model_ids[model_id]
            deleted = bool(record.get("grads_deleted"))
            if not self._is_finished(model_id):
                if deleted:
                    raise ModelIDException(
                        f"model id {model_id} was finalized with "
                        f"{record.get('finalized_with')} and its gradients were deleted, "
                        f"so it cannot be finalized otherwise; featurize it with "
                        f"another model_id, or in another save_dir."
                    )
                self.finalize(model_id, del_grads=del_grads)
            elif del_grads and not deleted:
                self.finalize(model_id, del_grads=True)
            else:
                logger.info("model id %d is finalized already", model_id)
                # Whoever finalized it may have been killed between two records.
                self.saver.serialize_current_model_id_metadata()

    def finalize(self, model_id: int, *, del_grads: bool) -> None:
        """Compute what scoring needs of a checkpoint, and mark it finalized.

        Args:
            model_id: The checkpoint, which is loaded; all its rows are there.
            del_grads: Whether to keep only its features.

        Raises:
            SingularKernelError: If its features are not finite.
        """
        saver = self.saver
        store, record = saver.current_store, saver.model_ids[model_id]
        blocked = as_blocked(self.computer)
        if blocked is not None:
            zeros = ZeroRows(self.n)
            gram, kernel = finalizing.fit(blocked, store, self.n, self.p, zeros)
            found = finalizing.report(store, kernel, self.n, self.p, zeros)
            record.update(finalized_with=describe(self.computer), is_finalized=0)
            saver.keep_gram(gram.cpu().numpy())
            record["report"] = found.as_dict()
            level = logging.WARNING if found.is_remarkable else logging.INFO
            logger.log(level, "model id %d: %s", model_id, found)
            if del_grads or not isinstance(saver, MmapSaver):
                self.write_features(kernel, store)
        else:
            grads = read_rows(store, "", self.device)(0, self.n)
            features = self.computer.get_x_xtx_inv(grads, self.computer.get_xtx(grads))
            if not bool(torch.isfinite(features).all()):
                raise SingularKernelError(
                    f"{type(self.computer).__name__} gave features that are not finite "
                    f"for model id {model_id}."
                )
            record.update(finalized_with=describe(self.computer), is_finalized=0)
            with saver.open_features() as array:
                array[:] = features.float().cpu().numpy()
        record["is_finalized"] = 1
        saver.serialize_current_model_id_metadata()
        if del_grads:
            saver.del_grads(model_id)

    def write_features(self, kernel: Kernel, store: dict[str, Any]) -> None:
        """Write the features of the current checkpoint."""
        with self.saver.open_features() as array:
            finalizing.write_features(kernel, store, array, self.n, self.p, self.device)

    def make_features(self, model_id: int, store: dict[str, Any], array: Any) -> None:
        """Compute features that were asked for after finalizing."""
        self._check_same(model_id)
        blocked = as_blocked(self.computer)
        if blocked is None:
            raise KeyError("features")
        _, kernel = finalizing.fit(blocked, store, self.n, self.p)
        finalizing.write_features(kernel, store, array, self.n, self.p, self.device)

    def is_current(self, model_id: int) -> bool:
        """Tell whether a checkpoint was finalized the way this score computer does it."""
        mine = describe(self.computer)
        return bool(self.saver.model_ids[model_id].get("finalized_with", mine) == mine)

    def _is_finished(self, model_id: int) -> bool:
        """Tell whether the current checkpoint has all that scoring needs of it."""
        is_finalized = bool(self.saver.model_ids[model_id].get("is_finalized"))
        if not (is_finalized and self.is_current(model_id)):
            return False
        return has_features(self.saver, on_demand=self._on_demand)

    @property
    def _on_demand(self) -> bool:
        """Whether features can be made whenever there are gradients."""
        return as_blocked(self.computer) is not None

    def _check_same(self, model_id: int) -> None:
        if not self.is_current(model_id):
            raise StoreMismatchError(
                f"model id {model_id} was finalized with "
                f"{self.saver.model_ids[model_id]['finalized_with']}, and this TRAKer has "
                f"{describe(self.computer)}; call finalize_features() to change it (no "
                f"gradient is computed again)."
            )

    # -- scores -----------------------------------------------------------------------

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
        require_finalized(self.saver, model_id)
        self._check_same(model_id)
        require_features(self.saver, model_id, on_demand=self._on_demand)
        m = int(self.saver.experiments[exp_name]["num_targets"])
        self.saver.load_current_store(model_id, exp_name, m)
        if self.saver.current_store.get(f"{exp_name}_grads") is None:
            raise ExperimentError(
                f"experiment {exp_name!r} has no targets on model id {model_id}."
            )
        flags = self.saver.current_store.get(f"{exp_name}_is_scored")
        if flags is not None:
            done = int((np.asarray(flags) != PENDING).sum())
            if done < m:
                raise ExperimentError(
                    f"experiment {exp_name!r} has {done} of {m} targets on model id "
                    f"{model_id}; score the rest, or pass allow_skip=True to leave this "
                    f"checkpoint out."
                )

    def blocks(self, exp_name: str, model_ids: Sequence[int]) -> Iterator[Block]:
        """Compute the scores of an experiment, averaged over checkpoints.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints that :meth:`usable` gave.

        Yields:
            Blocks that cover the ``(n, m)`` matrix: all rows of some columns, then the
            next columns.

        Raises:
            NonFiniteError: If a score is not finite.
        """
        m = int(self.saver.experiments[exp_name]["num_targets"])
        sides = [self._side(model_id, exp_name, m) for model_id in model_ids]
        weight = torch.from_numpy(np.mean([weight for _, weight in sides], axis=0))
        blocked = as_blocked(self.computer)
        if blocked is not None:
            found = blocked.score_blocks(
                [side for side, _ in sides], weight, self.n, m, self.p
            )
        else:
            found = self._whole([side for side, _ in sides], weight, m)
        with tqdm(
            total=self.n * m, desc="Scoring", unit="score", disable=self.quiet
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
        total = torch.zeros(self.n, m, dtype=torch.float32, device="cpu")
        for side in sides:
            train, targets = side.train(0, self.n), side.targets(0, m)
            self.computer.get_scores(train, targets, accumulator=total)
        total *= (weight / len(sides)).float()[:, None]
        yield Block((0, self.n), (0, m), total)

    def _side(
        self, model_id: int, exp_name: str | None, m: int = 0
    ) -> tuple[Side, Float64[np.ndarray, " n"]]:
        saver = self.saver
        saver.load_current_store(model_id)
        # A copy: savers may put the next checkpoint's arrays into the same dictionary.
        store = dict(saver.current_store)
        has_grads = store.get("grads") is not None
        if exp_name is None:
            targets = read_rows(store, "", self.device) if has_grads else None
        else:
            saver.load_current_store(model_id, exp_name, m)
            targets = read_rows(saver.current_store, f"{exp_name}_", self.device)
        weight = np.asarray(store["out_to_loss"], dtype=np.float64).reshape(-1)
        blocked = as_blocked(self.computer)
        if blocked is None or not has_grads:
            train = read_array(store["features"], self.device)
            return Side(train, targets or train, None), weight

        def kernel() -> Kernel:
            return finalizing.fit(blocked, store, self.n, self.p)[1]

        train = read_rows(store, "", self.device)
        return Side(train, targets or train, kernel), weight

    def write_scores(self, exp_name: str, model_ids: Sequence[int]) -> np.ndarray:
        """Write the scores of an experiment block by block.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints that :meth:`usable` gave.

        Returns:
            The ``(n, m)`` scores, mapped from their file; changes stay in memory.
        """
        record = self.saver.experiments[exp_name]
        record.update(model_ids=[*model_ids], finalized_with=describe(self.computer))
        with self.saver.open_scores(exp_name, int(record["num_targets"])) as array:
            for block in self.blocks(exp_name, model_ids):
                array[slice(*block.rows), slice(*block.columns)] = block.values.cpu()
        self.saver.save_scores(exp_name)
        scores: np.ndarray = self.saver.current_store[f"{exp_name}_scores"]
        return scores

    def top_k(
        self, exp_name: str, model_ids: Sequence[int], k: int, *, largest: bool
    ) -> TopScores:
        """Find every target's best training examples without the ``(n, m)`` matrix.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints that :meth:`usable` gave.
            k: How many.
            largest: Whether the most helpful, or the most harmful.

        Returns:
            Scores and indices, best first; of equal scores the lower index first.
        """
        finished: list[TopK] = []
        columns: tuple[int, int] | None = None
        for block in self.blocks(exp_name, model_ids):
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
        blocked = as_blocked(self.computer)
        if blocked is None:
            raise SingularKernelError(
                f"Self-influence needs the kernel of BasicScoreComputer; "
                f"{type(self.computer).__name__} replaces it."
            )
        influence, weights = np.zeros(self.n), np.zeros(self.n)
        for model_id in model_ids:
            require_finalized(self.saver, model_id)
            self._check_same(model_id)
            require_features(self.saver, model_id, on_demand=self._on_demand)
            side, weight = self._side(model_id, None)
            influence += blocked.self_influence(side, self.n, self.p).cpu().numpy()
            weights += weight
        result: np.ndarray = influence * weights / len(model_ids) ** 2
        return result.astype(np.float32)
