"""What every method keeps: one suite that each shipped class inherits.

Copies of the targets are among the training examples, so that each target has an
example that must help it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.problems import Problem, classes, draw, mlp, randomized
from trak.errors import BatchError, OrderError
from trak.methods import Method

N, M = 11, 4


def problem(checkpoints: int = 2, dtype: torch.dtype = torch.float64) -> Problem:
    """Eleven examples, of which the first four are the targets too."""
    model = mlp().to(dtype)
    x, y = draw(N, 4, seed=1).to(dtype), classes(N, seed=1)
    states = [randomized(model, seed) for seed in range(checkpoints)]
    return Problem(model, (x, y), (x[:M], y[:M]), N, M, states)


def cut(batch: tuple[Tensor, ...], step: int) -> list[tuple[Tensor, ...]]:
    """Batches of ``step`` examples."""
    return [
        tuple(part[low : low + step] for part in batch)
        for low in range(0, len(batch[0]), step)
    ]


class MethodContract:
    """Inherit, name it ``Test...``, and give ``make``."""

    rtol: ClassVar[float] = 1e-4
    needs_fit: ClassVar[bool] = True
    """Whether scoring before fitting is an error."""

    duplicates_are_positive: ClassVar[bool] = True
    """Whether an example that is the target itself must score above zero."""

    def make(self, problem: Problem, save_dir: Path, **options: Any) -> Method:
        raise NotImplementedError

    def scores(
        self, save_dir: Path, step: int = 3, found: Problem | None = None
    ) -> np.ndarray:
        found = found or problem()
        method = self.make(found, save_dir)
        train, targets = cut(found.train, step), cut(found.targets, step)
        assert method.fit(train) is method
        return method.score(targets)

    @pytest.fixture(scope="class")
    @classmethod
    def usual(cls, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
        """The scores, from batches of three."""
        scores = cls().scores(tmp_path_factory.mktemp("usual"))
        scores.setflags(write=False)
        return scores

    def test_shape_and_dtype(self, usual: np.ndarray) -> None:
        assert type(usual) is np.ndarray
        assert usual.base is None  # in memory of its own
        assert usual.shape == (N, M)
        assert usual.dtype == np.float32
        assert np.isfinite(usual).all()

    def test_duplicates_help(self, usual: np.ndarray) -> None:
        own = np.diagonal(usual[:M])
        if self.duplicates_are_positive:
            assert (own > 0).all()
        assert (own >= np.median(usual, axis=0)).all()

    @pytest.mark.parametrize("step", [1, 100])
    def test_batches_may_be_cut_anywhere(
        self, tmp_path: Path, usual: np.ndarray, step: int
    ) -> None:
        assert_near(self.scores(tmp_path, step), usual, self.rtol)

    def test_loaders_will_do(self, tmp_path: Path, usual: np.ndarray) -> None:
        found = problem()

        def loader(batch: tuple[Tensor, ...]) -> Any:
            data = torch.utils.data.TensorDataset(*batch)
            return torch.utils.data.DataLoader(data, batch_size=3)

        method = self.make(found, tmp_path).fit(loader(found.train))
        np.testing.assert_array_equal(method.score(loader(found.targets)), usual)

    def test_noncontiguous_inputs(self, tmp_path: Path, usual: np.ndarray) -> None:
        found = problem()
        x, y = found.train
        strided = x.T.contiguous().T, torch.stack([y, y], dim=1)[:, 0]
        method = self.make(found, tmp_path).fit([strided])
        assert_near(method.score([found.targets]), usual, self.rtol)

    def test_models_in_single_precision(
        self, tmp_path: Path, usual: np.ndarray
    ) -> None:
        found = problem(dtype=torch.float32)
        assert_near(self.scores(tmp_path, found=found), usual, 5e-3)

    def test_one_target_and_again(self, tmp_path: Path, usual: np.ndarray) -> None:
        found = problem()
        x, y = found.targets
        method = self.make(found, tmp_path, targets=1).fit([found.train])
        one = [(x[:1], y[:1])]
        scores = method.score(one)
        assert scores.shape == (N, 1)
        assert_near(scores, usual[:, :1], 1e-3)
        np.testing.assert_array_equal(method.score(one), scores)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_models_on_a_gpu(self, tmp_path: Path, usual: np.ndarray) -> None:
        found = problem()
        found.model.cuda()
        found.train, found.targets = (
            tuple(part.cuda() for part in batch)
            for batch in (found.train, found.targets)
        )
        assert_near(self.scores(tmp_path, found=found), usual, 1e-3)

    def test_the_order_of_calls(self, tmp_path: Path) -> None:
        method = self.make(problem(), tmp_path)
        assert method.name == type(method).name
        if self.needs_fit:
            with pytest.raises(OrderError, match="fit it first"):
                method.score([problem().targets])

    def test_no_examples(self, tmp_path: Path) -> None:
        found = problem()
        method = self.make(found, tmp_path)
        with pytest.raises(BatchError, match="train has no examples"):
            method.fit([])
        method.fit([found.train])
        with pytest.raises(BatchError, match="targets has no examples"):
            method.score([])


def assert_near(actual: np.ndarray, expected: np.ndarray, rtol: float) -> None:
    """Equal within a share of the largest score."""
    torch.testing.assert_close(
        torch.from_numpy(actual),
        torch.from_numpy(np.array(expected)),
        rtol=rtol,
        atol=rtol * float(np.abs(expected).max()),
    )
