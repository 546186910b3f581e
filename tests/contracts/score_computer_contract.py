"""What every score computer keeps: one suite that each shipped class inherits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tests import reference
from tests.problems import assert_scores, draw
from trak.errors import SingularKernelError
from trak.score_computers import AbstractScoreComputer


class ScoreComputerContract:
    """Inherit, name it ``Test...``, and set ``kind``."""

    kind: type[AbstractScoreComputer]

    def make(self, lambda_reg: float | str = "auto", **options: Any) -> Any:
        return self.kind(
            dtype=torch.float32,
            device="cpu",
            logging_level=logging.INFO,
            lambda_reg=lambda_reg,
            **options,
        )

    @pytest.mark.parametrize("n", [0, 1, 3, 9])
    def test_gram(self, n: int) -> None:
        x = draw(n, 4)
        assert_scores(self.make().get_xtx(x.float()), x.T @ x + 0.0, 1e-5)

    @pytest.mark.parametrize("lambda_reg", ["auto", 0.5, 1e-3, "pinv"])
    @pytest.mark.parametrize("n", [1, 3, 5, 9])
    def test_features(self, n: int, lambda_reg: float | str) -> None:
        x = draw(n, 5)
        computer = self.make(lambda_reg)
        features = computer.get_x_xtx_inv(x.float(), computer.get_xtx(x.float()))
        assert features.shape == (n, 5)
        assert_scores(features, x @ reference.ridge_inverse(x, lambda_reg), 2e-3)

    @pytest.mark.parametrize("m", [0, 1, 3])
    @pytest.mark.parametrize("n", [0, 1, 9])
    def test_scores_are_added(self, n: int, m: int) -> None:
        features, targets, before = draw(n, 4), draw(m, 4, seed=1), draw(n, m, seed=2)
        total = before.float()
        self.make().get_scores(features.float(), targets.float(), total)
        torch.testing.assert_close(total, (before + features @ targets.T).float())

    def test_half_precision_rows_do_not_overflow(self) -> None:
        x = torch.full((9000, 2), 3.0).half()
        torch.testing.assert_close(
            self.make().get_xtx(x).float(), torch.full((2, 2), 81000.0)
        )

    @pytest.mark.parametrize("lambda_reg", ["auto", 0.0, 1.0, "pinv"])
    def test_no_gradients_at_all(self, lambda_reg: float | str) -> None:
        computer, x = self.make(lambda_reg), torch.zeros(6, 3)
        with pytest.raises(SingularKernelError, match="6 training examples are zero"):
            computer.get_x_xtx_inv(x, computer.get_xtx(x))

    def test_undamped_is_refused_where_it_is_noise(self) -> None:
        computer, x = self.make(0.0), draw(3, 5).float()
        with pytest.raises(
            SingularKernelError, match=r"lambda_reg=0 with 3 .* proj_dim=5"
        ):
            computer.get_x_xtx_inv(x, computer.get_xtx(x))
