"""Both score computers: the contract, the blocked estimator, and who may use it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.contracts.score_computer_contract import ScoreComputerContract
from tests.problems import assert_scores, draw
from trak import _memory
from trak._blocked import Side
from trak.errors import OptionError, SingularKernelError
from trak.score_computers import (
    AbstractScoreComputer,
    BasicScoreComputer,
    BasicSingleBlockScoreComputer,
    as_blocked,
    describe,
)


class TestBasic(ScoreComputerContract):
    kind = BasicScoreComputer

    @pytest.mark.parametrize("rows", [1, 2, 7])
    def test_block_size_does_not_matter(self, rows: int) -> None:
        x, targets = draw(9, 4).float(), draw(3, 4, seed=1).float()
        results = []
        for size in (20_000, rows):
            computer = BasicScoreComputer(CUDA_MAX_DIM_SIZE=size)
            total = torch.zeros(9, 3)
            features = computer.get_x_xtx_inv(x, computer.get_xtx(x))
            computer.get_scores(features, targets, total)
            results.append(total)
        torch.testing.assert_close(*results)


class TestSingleBlock(ScoreComputerContract):
    kind = BasicSingleBlockScoreComputer


def side(computer: BasicScoreComputer, x: Tensor, phi: Tensor | None = None) -> Side:
    rows, targets = x.float(), None if phi is None else phi.float()

    def train(low: int, high: int) -> Tensor:
        return rows[low:high]

    def read(low: int, high: int) -> Tensor:
        return targets[low:high]

    n, p = x.shape
    gram = computer.gram(train, n, p)
    return Side(train, read, lambda: computer.kernel(gram, n, p))


def assembled(blocks: Any, n: int, m: int) -> Tensor:
    result = torch.full((n, m), torch.nan)
    for block in blocks:
        part = result[slice(*block.rows), slice(*block.columns)]
        assert part.isnan().all(), "a block covers what another has"
        part.copy_(block.values)
    return result


@pytest.mark.parametrize("tile", [1, 13, 1 << 24])
@pytest.mark.parametrize("lambda_reg", ["auto", 0.2, "pinv"])
@pytest.mark.parametrize(("n", "p"), [(9, 4), (6, 7), (1, 1), (3, 1)])
def test_blocks_are_the_textbook_formula(
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    p: int,
    lambda_reg: float | str,
    tile: int,
) -> None:
    monkeypatch.setattr(_memory, "TILE", tile)
    xs = [draw(n, p, seed=i) * 10**i for i in range(2)]
    phis = [draw(5, p, seed=10 + i) for i in range(2)]
    weights = draw(n, seed=20).abs()
    computer = BasicScoreComputer(lambda_reg=lambda_reg)
    sides = [side(computer, x, phi) for x, phi in zip(xs, phis, strict=True)]
    found = assembled(computer.score_blocks(sides, weights, n, 5, p), n, 5)
    assert_scores(found, reference.trak(xs, phis, 2 * [weights], lambda_reg), 1e-3)
    for x, one in zip(xs, sides, strict=True):
        influence = (x @ reference.ridge_inverse(x, lambda_reg) * x).sum(1)
        assert_scores(computer.self_influence(one, n, p), influence, 1e-3)


def test_finished_features_are_multiplied() -> None:
    features, phi = draw(9, 4), draw(3, 4, seed=1)
    computer = BasicScoreComputer()
    done = Side(
        lambda low, high: features[low:high].float(),
        lambda low, high: phi[low:high].float(),
        None,
    )
    found = assembled(computer.score_blocks([done], torch.ones(9), 9, 3, 4), 9, 3)
    assert_scores(found, features @ phi.T, 1e-6)
    with pytest.raises(SingularKernelError, match="deleted by del_grads=True"):
        computer.self_influence(done, 9, 4)


def test_scale_of_gradients_cancels_with_relative_damping() -> None:
    x, phi = draw(9, 4), draw(3, 4, seed=1)
    computer = BasicScoreComputer()
    small, large = (
        assembled(
            computer.score_blocks(
                [side(computer, c * x, c * phi)], torch.ones(9), 9, 3, 4
            ),
            9,
            3,
        )
        for c in (1e-3, 1e3)
    )
    torch.testing.assert_close(small, large)


def test_which_computers_are_blocked() -> None:
    class Renamed(BasicScoreComputer):
        pass

    class Replaced(BasicScoreComputer):
        def get_xtx(self, grads: Tensor) -> Tensor:
            return super().get_xtx(grads)

    assert as_blocked(BasicScoreComputer()) is not None
    assert as_blocked(Renamed()) is not None
    assert as_blocked(Replaced()) is None
    assert as_blocked(BasicSingleBlockScoreComputer()) is None


def test_descriptions_tell_class_damping_and_exponents() -> None:
    assert describe(BasicScoreComputer()) == "BasicScoreComputer, lambda_reg='auto'"
    assert describe(BasicScoreComputer(lambda_reg=0.5)).endswith("lambda_reg=0.5")
    assert describe(BasicScoreComputer(exponents=(0.0, 0.5))).endswith("'auto'")
    weighted = BasicScoreComputer(exponents=(0.25, 0.5))
    assert describe(weighted).endswith("lambda_reg='auto', exponents=(0.25, ...)")
    text = "lambda_reg='auto', exponents=(0.25, 0.5)"
    assert describe(weighted, scores=True).endswith(text)
    assert BasicScoreComputer(lambda_reg=0.5).damping.lambda_reg == 0.5


def test_damping_is_checked_when_built() -> None:
    with pytest.raises(OptionError, match="is not a damping"):
        BasicScoreComputer(lambda_reg=-1.0)


def test_the_interface_stores_its_arguments() -> None:
    class Mine(AbstractScoreComputer):
        def get_xtx(self, grads: Tensor) -> Tensor:
            return grads.T @ grads

        def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
            return grads

        def get_scores(self, features: Tensor, targets: Tensor, total: Tensor) -> None:
            total += features @ targets.T

    mine = Mine(device="cpu", lambda_reg=2.0)
    assert (mine.device, mine.lambda_reg) == (torch.device("cpu"), 2.0)
    assert mine.dtype == torch.float32
