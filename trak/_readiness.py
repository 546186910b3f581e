"""What state a checkpoint must be in before a call can use it."""

from __future__ import annotations

import numpy as np

from trak._layout import PENDING
from trak.errors import ModelIDException
from trak.savers import AbstractSaver


def require_finalized(saver: AbstractSaver, model_id: int) -> None:
    """Refuse a checkpoint that is unknown or not finalized.

    Raises:
        ModelIDException: If it is.
    """
    if model_id not in saver.model_ids:
        raise ModelIDException(
            f"model id {model_id} is not in the store, which has "
            f"{sorted(saver.model_ids)}; load_checkpoint and featurize it first."
        )
    if not saver.model_ids[model_id].get("is_finalized"):
        raise ModelIDException(
            f"model id {model_id} is not finalized; call finalize_features() first."
        )


def require_featurized(saver: AbstractSaver, model_id: int) -> None:
    """Refuse a checkpoint that is unknown or lacks rows.

    Raises:
        ModelIDException: If it does.
    """
    if model_id not in saver.model_ids:
        raise ModelIDException(
            f"model id {model_id} is not in the store, which has "
            f"{sorted(saver.model_ids)}."
        )
    saver.load_current_store(model_id)
    flags = np.asarray(saver.current_store["is_featurized"])
    done = int((flags != PENDING).sum())
    if done < flags.size:
        raise ModelIDException(
            f"model id {model_id} is featurized for {done} of {flags.size} examples; "
            f"featurize the rest before finalize_features."
        )
