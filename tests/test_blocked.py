"""Scores and self-influence in tiles: what is read and factored how often."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.problems import assert_scores, draw
from trak import _blocked, _memory
from trak._blocked import Shape, Side, score_blocks, self_influence, squared_lengths
from trak._linalg import Kernel, damp, pseudo_inverse
from trak.errors import OutOfMemoryError

CPU = torch.device("cpu")
N, M, P = 30, 7, 4


class Counted:
    """A checkpoint's side that counts what is asked of it."""

    def __init__(self, n: int, p: int, seed: int) -> None:
        self.x, self.phi = draw(n, p, seed=seed), draw(M, p, seed=100 + seed)
        self.counts: Counter[str] = Counter()

    def side(self) -> Side:
        return Side(self.train, self.targets, self.kernel)

    def train(self, low: int, high: int) -> Tensor:
        self.counts["rows"] += high - low
        return self.x[low:high].float()

    def targets(self, low: int, high: int) -> Tensor:
        return self.phi[low:high].float()

    def kernel(self) -> Kernel:
        self.counts["factors"] += 1
        n, p = self.x.shape
        return damp(self.x.T @ self.x if n > p else self.x @ self.x.T, 0.5)


def scores(parts: list[Counted], shape: Shape) -> Tensor:
    found = torch.full((shape.n, shape.m), torch.nan)
    for block in score_blocks(
        [part.side() for part in parts],
        torch.full((shape.n, 1), 1 / len(parts)),
        shape,
    ):
        found[slice(*block.rows), slice(*block.columns)] = block.values
    return found


def expected(parts: list[Counted], n: int) -> Tensor:
    xs, phis = [part.x for part in parts], [part.phi for part in parts]
    return reference.trak(xs, phis, len(xs) * [torch.ones(n).double()], 0.5)


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize(("n", "p"), [(N, P), (P, N)])
@pytest.mark.parametrize("checkpoints", [1, 3])
def test_factors_and_rows_are_used_for_all_targets_that_fit(
    monkeypatch: pytest.MonkeyPatch, checkpoints: int, n: int, p: int, kept: int
) -> None:
    monkeypatch.setattr(_blocked, "KEPT", kept)
    parts = [Counted(n, p, seed) for seed in range(checkpoints)]
    shape = Shape(n, M, p, CPU)
    assert_scores(scores(parts, shape), expected(parts, n), 1e-4)
    for part in parts:
        assert part.counts == {"rows": n, "factors": 1}
    # Room for the solutions of two targets only.
    monkeypatch.setattr(_memory, "TILE", p * checkpoints * 2 // 16 + 1)
    width = _memory.score_width(p, checkpoints)
    assert width < M
    assert_scores(scores(parts, shape), expected(parts, n), 1e-4)
    groups = -(-M // width)
    assert parts[0].counts["factors"] == (2 if kept else 1 + groups)


def limit_products(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    for name in ("product", "add_product"):
        whole = getattr(_blocked, name)

        def limited(*matrices: Tensor, whole: Any = whole) -> Any:
            left, right = matrices[-2:]
            if left.shape[0] * right.shape[1] > most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return whole(*matrices)

        monkeypatch.setattr(_blocked, name, limited)


@pytest.mark.parametrize(("n", "p"), [(N, P), (P, N)])
@pytest.mark.parametrize("most", [7, 30, 1000])
def test_tiles_that_do_not_fit_are_made_smaller(
    monkeypatch: pytest.MonkeyPatch, most: int, n: int, p: int
) -> None:
    limit_products(monkeypatch, most)
    parts = [Counted(n, p, seed) for seed in range(2)]
    assert_scores(scores(parts, Shape(n, M, p, CPU)), expected(parts, n), 1e-4)


@pytest.mark.parametrize("n", [N, P])
def test_no_memory_at_all(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    limit_products(monkeypatch, 0)
    parts = [Counted(n, P, 0)]
    with pytest.raises(OutOfMemoryError, match="no memory left for the scores"):
        scores(parts, Shape(n, M, P, CPU))
    side = parts[0].side()
    if n > P:
        with pytest.raises(OutOfMemoryError, match="left for the self-influence"):
            self_influence(side, parts[0].kernel(), Shape(n, 0, P, CPU))


def test_free_memory_does_not_change_the_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts, shape = [Counted(N, P, 0)], Shape(N, M, P, CPU)
    before = scores(parts, shape)
    for free in (2**62, 2**20, 400):
        monkeypatch.setattr(_memory, "free_bytes", lambda device, free=free: free)
        torch.testing.assert_close(scores(parts, shape), before)


@pytest.mark.parametrize(("n", "p"), [(600, 520), (9, 4), (4, 9), (5, 5)])
@pytest.mark.parametrize("pinv", [False, True])
def test_self_influence(n: int, p: int, pinv: bool) -> None:
    part = Counted(n, p, 0)
    x = part.x
    gram = x.T @ x if n > p else x @ x.T
    kernel = pseudo_inverse(gram) if pinv else damp(gram, 0.5)
    found = self_influence(part.side(), kernel, Shape(n, 0, p, CPU))
    inverse = reference.ridge_inverse(x, "pinv" if pinv else 0.5)
    assert_scores(found, (x @ inverse * x).sum(1), 1e-4)


@pytest.mark.parametrize("b", [0, 1, 3])
@pytest.mark.parametrize("r", [1, 5, 300])
@pytest.mark.parametrize("triangular", [False, True])
def test_squared_lengths(b: int, r: int, triangular: bool) -> None:
    rows, root = draw(b, 300), draw(300, r, seed=1)
    root = root.triu() if triangular else root
    found = squared_lengths(rows.float(), root.float())
    expected = (rows @ root).square().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
