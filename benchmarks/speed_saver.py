"""A saver that keeps one checkpoint's rows in plain arrays, to time all but the store."""

from __future__ import annotations

from typing import Any

import numpy as np

from trak.savers import AbstractSaver


class ArraysSaver(AbstractSaver):
    """Enough of a saver for featurizing one checkpoint."""

    def register_model_id(
        self,
        model_id: int,
        _allow_featurizing_already_registered: bool = False,  # noqa: FBT001
    ) -> None:
        self.model_ids[model_id] = {"is_featurized": 0, "is_finalized": 0}
        self.init_store(model_id)

    def init_store(self, model_id: int) -> None:
        n = self.train_set_size
        self.current_store = {
            "grads": np.zeros((n, self.proj_dim), dtype=np.float32),
            "out_to_loss": np.zeros((n, 1), dtype=np.float32),
            "is_featurized": np.zeros((n, 1), dtype=np.int32),
        }
        self.current_model_id = model_id

    def serialize_current_model_id_metadata(self) -> None:
        pass

    def load_current_store(self, *_: Any, **__: Any) -> None:
        pass

    def init_experiment(self, *_: Any) -> None:
        raise NotImplementedError

    def save_scores(self, exp_name: str) -> None:
        raise NotImplementedError

    def del_grads(self, model_id: int) -> None:
        raise NotImplementedError
