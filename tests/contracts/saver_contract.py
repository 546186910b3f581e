"""What every saver keeps, read behind its back: one suite that shipped savers inherit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trak.errors import ExperimentError, ModelIDException, StoreMismatchError
from trak.savers import AbstractSaver

N, P, M = 5, 3, 2


class SaverContract:
    """Inherit, name it ``Test...``, and implement ``make`` and ``stored``."""

    kind: type[AbstractSaver]

    def make(self, directory: Path, **options: Any) -> AbstractSaver:
        arguments = {
            "save_dir": directory,
            "metadata": {"JL dimension": P, "JL matrix type": "sparse"},
            "train_set_size": N,
            "proj_dim": P,
            "load_from_save_dir": True,
            "logging_level": logging.INFO,
            "use_half_precision": False,
            **options,
        }
        return self.kind(**arguments)

    def stored(self, directory: Path, model_id: int, key: str) -> np.ndarray | None:
        """What is kept of an array, read without the saver; None if nothing is."""
        raise NotImplementedError

    def filled(self, directory: Path, model_id: int = 4) -> AbstractSaver:
        saver = self.make(directory)
        saver.register_model_id(model_id)
        store = saver.current_store
        store["grads"][:] = np.arange(N * P).reshape(N, P)
        store["out_to_loss"][:] = 0.5
        store["is_featurized"][:] = 1
        saver.serialize_current_model_id_metadata()
        return saver

    def finalized(self, directory: Path) -> AbstractSaver:
        saver = self.filled(directory)
        saver.model_ids[4]["is_finalized"] = 1
        with saver.open_features() as array:
            array[:] = 7.0
        saver.serialize_current_model_id_metadata()
        return saver

    def test_new_arrays_are_zeros(self, tmp_path: Path) -> None:
        saver = self.make(tmp_path)
        saver.register_model_id(4)
        shapes = {"grads": (N, P), "out_to_loss": (N, 1), "is_featurized": (N, 1)}
        for key, shape in shapes.items():
            assert saver.current_store[key].shape == shape
            np.testing.assert_array_equal(saver.current_store[key], 0)
        assert saver.current_model_id == 4
        assert saver.model_ids[4] == {"is_featurized": 0, "is_finalized": 0}

    def test_what_is_written_is_kept(self, tmp_path: Path) -> None:
        saver = self.filled(tmp_path)
        assert saver.model_ids[4]["is_featurized"] == 1
        rows = np.arange(N * P).reshape(N, P)
        np.testing.assert_array_equal(self.stored(tmp_path, 4, "grads"), rows)
        np.testing.assert_array_equal(self.stored(tmp_path, 4, "out_to_loss"), 0.5)
        again = self.make(tmp_path)
        assert again.model_ids[4]["is_featurized"] == 1
        again.load_current_store(4)
        np.testing.assert_array_equal(again.current_store["grads"], rows)

    def test_a_part_is_not_the_whole(self, tmp_path: Path) -> None:
        saver = self.make(tmp_path)
        saver.register_model_id(4)
        saver.current_store["is_featurized"][: N - 1] = 1
        saver.serialize_current_model_id_metadata()
        assert self.make(tmp_path).model_ids[4]["is_featurized"] == 0

    def test_an_id_is_registered_once(self, tmp_path: Path) -> None:
        saver = self.filled(tmp_path)
        with pytest.raises(ModelIDException, match="4 is already registered"):
            saver.register_model_id(4)
        saver.register_model_id(4, _allow_featurizing_already_registered=True)
        np.testing.assert_array_equal(saver.current_store["out_to_loss"], 0.5)

    def test_ids_do_not_mix(self, tmp_path: Path) -> None:
        saver = self.filled(tmp_path)
        saver.register_model_id(2)
        saver.current_store["out_to_loss"][:] = 0.25
        saver.load_current_store(4)
        assert saver.current_model_id == 4
        np.testing.assert_array_equal(saver.current_store["out_to_loss"], 0.5)
        np.testing.assert_array_equal(self.stored(tmp_path, 2, "out_to_loss"), 0.25)

    def test_unknown_ids(self, tmp_path: Path) -> None:
        saver = self.filled(tmp_path)
        with pytest.raises(ModelIDException, match="9"):
            saver.load_current_store(9)
        with pytest.raises(ModelIDException, match="9"):
            saver.init_experiment("exp", M, 9)
        assert saver.current_model_id == 4

    def test_nothing_is_loaded_at_first(self, tmp_path: Path) -> None:
        saver = self.make(tmp_path)
        with pytest.raises(ModelIDException, match="No checkpoint is loaded"):
            saver.serialize_current_model_id_metadata()

    def test_features(self, tmp_path: Path) -> None:
        saver = self.finalized(tmp_path)
        np.testing.assert_array_equal(saver.current_store["features"], 7.0)
        np.testing.assert_array_equal(self.stored(tmp_path, 4, "features"), 7.0)
        again = self.make(tmp_path)
        assert again.model_ids[4]["is_finalized"] == 1
        again.load_current_store(4)
        np.testing.assert_array_equal(again.current_store["features"], 7.0)

    def test_deleting_gradients(self, tmp_path: Path) -> None:
        saver = self.finalized(tmp_path)
        saver.del_grads(4)
        assert self.stored(tmp_path, 4, "grads") is None
        for other in (saver, self.make(tmp_path)):
            other.load_current_store(4)
            assert "grads" not in other.current_store
            np.testing.assert_array_equal(other.current_store["features"], 7.0)
            np.testing.assert_array_equal(other.current_store["out_to_loss"], 0.5)

    def test_a_gram_matrix_may_be_kept(self, tmp_path: Path) -> None:
        saver = self.filled(tmp_path)
        saver.keep_gram(np.eye(P))
        if "gram" in saver.current_store:
            np.testing.assert_array_equal(saver.current_store["gram"], np.eye(P))

    def test_experiments(self, tmp_path: Path) -> None:
        saver = self.finalized(tmp_path)
        saver.init_experiment("exp", M, 4)
        assert saver.current_experiment_name == "exp"
        assert saver.experiments["exp"]["num_targets"] == M
        assert saver.current_store["exp_grads"].shape == (M, P)
        saver.current_store["exp_grads"][:] = 3.0
        np.testing.assert_array_equal(self.stored(tmp_path, 4, "exp_grads"), 3.0)
        again = self.make(tmp_path)
        assert again.experiments["exp"]["num_targets"] == M
        again.load_current_store(4, "exp")
        np.testing.assert_array_equal(again.current_store["exp_grads"], 3.0)
        np.testing.assert_array_equal(again.current_store["out_to_loss"], 0.5)
        again.init_experiment("exp", M, 4)
        np.testing.assert_array_equal(again.current_store["exp_grads"], 3.0)

    def test_an_experiment_has_one_size(self, tmp_path: Path) -> None:
        saver = self.finalized(tmp_path)
        saver.init_experiment("exp", M, 4)
        for other in (saver, self.make(tmp_path)):
            with pytest.raises(ExperimentError, match="has 2 targets, not 3"):
                other.init_experiment("exp", M + 1, 4)

    def test_unknown_experiments(self, tmp_path: Path) -> None:
        saver = self.finalized(tmp_path)
        with pytest.raises(ExperimentError, match="no experiment 'nope'"):
            saver.load_current_store(4, "nope")
        saver.init_experiment("exp", M, 4)
        saver.register_model_id(5)
        with pytest.raises(ExperimentError, match="has no targets on model id 5"):
            saver.load_current_store(5, "exp")
        for name in ("../exp", "", "a/b"):
            with pytest.raises(ExperimentError, match="cannot name files"):
                saver.init_experiment(name, M, 4)

    def test_scores(self, tmp_path: Path) -> None:
        saver = self.finalized(tmp_path)
        saver.init_experiment("exp", M, 4)
        with saver.open_scores("exp", M) as array:
            assert array.shape == (N, M)
            array[:] = 1.5
        saver.save_scores("exp")
        np.testing.assert_array_equal(saver.current_store["exp_scores"], 1.5)
        np.testing.assert_array_equal(self.stored(tmp_path, 4, "exp_scores"), 1.5)
        assert self.make(tmp_path).experiments["exp"]["scores_finalized"] == 1

    def test_half_made_scores_replace_nothing(self, tmp_path: Path) -> None:
        saver = self.finalized(tmp_path)
        saver.init_experiment("exp", M, 4)
        with saver.open_scores("exp", M) as array:
            array[:] = 1.5

        def fail() -> None:
            with saver.open_scores("exp", M) as array:
                array[:1] = 9.0
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        np.testing.assert_array_equal(self.stored(tmp_path, 4, "exp_scores"), 1.5)

    def test_only_new_work_counts_if_asked(self, tmp_path: Path) -> None:
        self.finalized(tmp_path).init_experiment("exp", M, 4)
        saver = self.make(tmp_path, load_from_save_dir=False)
        assert (saver.model_ids, saver.experiments) == ({}, {})
        saver.register_model_id(4)
        assert saver.model_ids[4]["is_featurized"] == 1
        with pytest.raises(ExperimentError, match="has 2 targets, not 3"):
            saver.init_experiment("exp", M + 1, 4)

    def test_other_settings_are_refused(self, tmp_path: Path) -> None:
        self.filled(tmp_path)
        with pytest.raises(
            StoreMismatchError, match=r"JL dimension = 3.*JL dimension = 4"
        ):
            self.make(tmp_path, metadata={"JL dimension": 4})
