"""From rows of the store to finalized checkpoints, whichever the score computer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from trak import _finalizing as finalizing
from trak._layout import ROW_EXPONENT
from trak._readiness import has_features, require_featurized
from trak._reading import ZeroRows, read_rows
from trak.errors import (
    ModelIDException,
    NoCheckpointError,
    SingularKernelError,
    StoreMismatchError,
)
from trak.savers import AbstractSaver, MmapSaver
from trak.score_computers import AbstractScoreComputer, as_blocked, describe

logger = logging.getLogger("TRAK")


@dataclass(frozen=True, slots=True)
class Features:
    """What finalizes checkpoints, and says how they were."""

    saver: AbstractSaver
    computer: AbstractScoreComputer
    device: torch.device
    n: int
    """Training examples."""

    p: int
    """Projected entries."""

    quiet: bool
    """Whether to leave out progress bars."""

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
            finalizing.check_out_to_loss(store, self.n)
            if record.get(ROW_EXPONENT, 0.0) != blocked.exponents.rows:
                store.pop("gram", None)  # it is of rows with other weights
            zeros = ZeroRows(self.n)
            gram, kernel = finalizing.fit(blocked, store, self.n, self.p, zeros)
            found = finalizing.report(store, kernel, self.n, self.p, zeros)
            record.update(finalized_with=describe(self.computer), is_finalized=0)
            record[ROW_EXPONENT] = blocked.exponents.rows
            saver.keep_gram(gram.cpu().numpy())
            record["report"] = found.as_dict()
            level = logging.WARNING if found.is_remarkable else logging.INFO
            logger.log(level, "model id %d: %s", model_id, found)
            if del_grads or not isinstance(saver, MmapSaver):
                with saver.open_features() as array:
                    finalizing.write_features(
                        blocked, kernel, store, array, self.n, self.p
                    )
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

    def make_features(self, model_id: int, store: dict[str, Any], array: Any) -> None:
        """Compute features that were asked for after finalizing."""
        self.check_same(model_id)
        blocked = as_blocked(self.computer)
        if blocked is None:
            raise KeyError("features")
        _, kernel = finalizing.fit(blocked, store, self.n, self.p)
        finalizing.write_features(blocked, kernel, store, array, self.n, self.p)

    def is_current(self, model_id: int) -> bool:
        """Tell whether a checkpoint was finalized the way this score computer does it."""
        mine = describe(self.computer)
        return bool(self.saver.model_ids[model_id].get("finalized_with", mine) == mine)

    def _is_finished(self, model_id: int) -> bool:
        """Tell whether the current checkpoint has all that scoring needs of it."""
        is_finalized = bool(self.saver.model_ids[model_id].get("is_finalized"))
        if not (is_finalized and self.is_current(model_id)):
            return False
        store = self.saver.current_store
        keeps_gram = self.on_demand and isinstance(self.saver, MmapSaver)
        if keeps_gram and "grads" in store and "gram" not in store:
            return False  # a process that made another one was killed
        return has_features(self.saver, on_demand=self.on_demand)

    @property
    def on_demand(self) -> bool:
        """Whether features can be made whenever there are gradients."""
        return as_blocked(self.computer) is not None

    def check_same(self, model_id: int) -> None:
        """Refuse a checkpoint that was finalized otherwise.

        Raises:
            StoreMismatchError: If it was.
        """
        if not self.is_current(model_id):
            raise StoreMismatchError(
                f"model id {model_id} was finalized with "
                f"{self.saver.model_ids[model_id]['finalized_with']}, and this TRAKer has "
                f"{describe(self.computer)}; call finalize_features() to change it (no "
                f"gradient is computed again)."
            )
