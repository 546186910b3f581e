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


def has_features(saver: AbstractSaver, *, on_demand: bool) -> bool:
    """Tell whether the current checkpoint's features are there, or can be made.

    Args:
        saver: The saver, with a finalized checkpoint loaded.
        on_demand: Whether they can be made from gradients at any time.

    Returns:
        Whether scores can be computed.
    """
    store = saver.current_store
    return "features" in store or (on_demand and "grads" in store)


def require_features(saver: AbstractSaver, model_id: int, *, on_demand: bool) -> None:
    """Load a finalized checkpoint, and refuse it if its features are not there.

    Raises:
        ModelIDException: If they are not.
    """
    saver.load_current_store(model_id)
    if not has_features(saver, on_demand=on_demand):
        raise ModelIDException(
            f"model id {model_id} is marked as finalized, but its features are not "
            f"there: finalizing it anew was interrupted, or the file was removed. Call "
            f"finalize_features()."
        )
