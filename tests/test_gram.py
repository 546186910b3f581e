"""Gram matrices of rows that are read block by block."""

from __future__ import annotations

import pytest
import torch

from tests.problems import draw
from trak import _gram, _memory
from trak._gram import gram
from trak.errors import OutOfMemoryError


class TestGram:
    @pytest.mark.parametrize("tile", [1, 5, 12, 1 << 24])
    @pytest.mark.parametrize(
        ("n", "p"), [(0, 2), (1, 1), (3, 5), (5, 3), (4, 4), (7, 1)]
    )
    def test_is_the_smaller_one(
        self, monkeypatch: pytest.MonkeyPatch, n: int, p: int, tile: int
    ) -> None:
        monkeypatch.setattr(_memory, "TILE", tile)
        x = draw(n, p).float()
        found = gram(lambda low, high: x[low:high], n, p)
        expected = x.double().T @ x.double() if n > p else x.double() @ x.double().T
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def test_no_rows_and_no_columns_to_spare(self) -> None:
        rows = torch.zeros(0, 2)
        assert gram(lambda low, high: rows[low:high], 0, 2).shape == (0, 0)

    def test_many_columns_are_summed_in_pieces(self) -> None:
        x = torch.full((2, 9000), 0.1)
        found = gram(lambda low, high: x[low:high], 2, 9000)
        expected = x.double() @ x.double().T
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize(("n", "p"), [(700, 600), (600, 700)])
    def test_one_triangle_of_panels_and_its_mirror(self, n: int, p: int) -> None:
        x = draw(n, p).float()
        found = gram(lambda low, high: x[low:high], n, p)
        expected = x.double().T @ x.double() if n > p else x.double() @ x.double().T
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(found, found.T)

    @pytest.mark.parametrize(("n", "p"), [(40, 30), (30, 40)])
    @pytest.mark.parametrize("most", [1, 50, 10_000])
    def test_products_that_do_not_fit_are_made_in_parts(
        self, monkeypatch: pytest.MonkeyPatch, most: int, n: int, p: int
    ) -> None:
        def limited(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            if left.shape[0] * right.shape[1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return left @ right

        monkeypatch.setattr(_gram, "product", limited)
        x = draw(n, p).float()
        found = gram(lambda low, high: x[low:high], n, p)
        expected = x.double().T @ x.double() if n > p else x.double() @ x.double().T
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_no_memory_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            raise MemoryError

        monkeypatch.setattr(_gram, "product", fail)
        with pytest.raises(OutOfMemoryError, match="left for the Gram matrix"):
            gram(lambda low, high: torch.ones(high - low, 2), 3, 2)
