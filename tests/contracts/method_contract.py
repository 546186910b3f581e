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

    def test_shape_and_dtype(self, tmp_path: Path) -> None:
        scores = self.scores(tmp_path)
        assert type(scores) is np.ndarray
        assert scores.shape == (N, M)
        assert scores.dtype == np.float32
        assert np.isfinite(scores).all()
        scores[0] = 1.0  # they are the caller's

    def test_duplicates_help(self, tmp_path: Path) -> None:
        scores = self.scores(tmp_path)
        own = np.diagonal(scores[:M])
        if self.duplicates_are_positive:
            assert (own > 0).all()
        assert (own >= np.median(scores, axis=0)).all()

    @pytest.mark.parametrize("step", [1, 100])
    def test_batches_may_be_cut_anywhere(self, tmp_path: Path, step: int) -> None:
        one, other = self.scores(tmp_path / "a", 3), self.scores(tmp_path / "b", step)
        scale = float(np.abs(one).max())
        torch.testing.assert_close(
            torch.from_numpy(one),
            torch.from_numpy(other),
            rtol=self.rtol,
            atol=self.rtol * scale,
        )

    def test_loaders_will_do(self, tmp_path: Path) -> None:
        found = problem()

        def loader(batch: tuple[Tensor, ...]) -> Any:
            data = torch.utils.data.TensorDataset(*batch)
            return torch.utils.data.DataLoader(data, batch_size=3)

        method = self.make(found, tmp_path / "a").fit(loader(found.train))
        np.testing.assert_array_equal(
            method.score(loader(found.targets)), self.scores(tmp_path / "b")
        )

    def test_noncontiguous_inputs(self, tmp_path: Path) -> None:
        found = problem()
        x, y = found.train
        strided = x.T.contiguous().T, torch.stack([y, y], dim=1)[:, 0]
        method = self.make(found, tmp_path / "a").fit([strided])
        torch.testing.assert_close(
            torch.from_numpy(method.score([found.targets])),
            torch.from_numpy(self.scores(tmp_path / "b", 100)),
            rtol=1e-3,
            atol=1e-5,
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_models_of_any_precision(self, tmp_path: Path, dtype: torch.dtype) -> None:
        one = self.scores(tmp_path / "a", found=problem(dtype=dtype))
        other = self.scores(tmp_path / "b")
        torch.testing.assert_close(
            torch.from_numpy(one), torch.from_numpy(other), rtol=5e-3, atol=1e-3
        )

    def test_one_target(self, tmp_path: Path) -> None:
        found = problem()
        all_of_them = self.scores(tmp_path / "a", found=found)
        x, y = found.targets
        method = self.make(found, tmp_path / "b", targets=1).fit([found.train])
        scores = method.score([(x[:1], y[:1])])
        assert scores.shape == (N, 1)
        torch.testing.assert_close(
            torch.from_numpy(scores),
            torch.from_numpy(all_of_them[:, :1]),
            rtol=1e-3,
            atol=1e-3 * float(np.abs(all_of_them).max()),
        )

    def test_scoring_again(self, tmp_path: Path) -> None:
        found = problem()
        method = self.make(found, tmp_path).fit([found.train])
        first = method.score([found.targets])
        np.testing.assert_array_equal(first, method.score([found.targets]))

    def test_it_has_a_name(self, tmp_path: Path) -> None:
        method = self.make(problem(), tmp_path)
        assert method.name == type(method).name

    def test_the_order_of_calls(self, tmp_path: Path) -> None:
        if self.needs_fit:
            method = self.make(problem(), tmp_path)
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
