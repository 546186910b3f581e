"""The best of every column of a matrix that arrives in blocks of rows."""

from __future__ import annotations

import pytest
import torch

from tests.problems import draw
from trak._linalg import spans
from trak._topk import TopK


class TestTopK:
    @pytest.mark.parametrize("largest", [True, False])
    @pytest.mark.parametrize("step", [1, 2, 5, 9])
    @pytest.mark.parametrize("k", [1, 3, 9, 20])
    def test_is_the_sorted_matrix(self, k: int, step: int, largest: bool) -> None:
        matrix = draw(9, 4).float()
        top = TopK(k, 4, largest=largest)
        for low, high in spans(9, step):
            top.update(matrix[low:high], low)
        values, indices = matrix.sort(dim=0, descending=largest)
        torch.testing.assert_close(top.values, values[:k])
        torch.testing.assert_close(top.indices, indices[:k])

    def test_ties_and_empty_blocks(self) -> None:
        top = TopK(2, 1)
        top.update(torch.zeros(0, 1), 0)
        top.update(torch.ones(3, 1), 0)
        top.update(torch.ones(3, 1), 3)
        assert top.values[:, 0].tolist() == [1, 1]
        assert len(set(top.indices[:, 0].tolist())) == 2

    def test_no_columns(self) -> None:
        top = TopK(2, 0)
        top.update(torch.zeros(3, 0), 0)
        assert top.values.shape == (2, 0)

    @pytest.mark.parametrize("largest", [True, False])
    @pytest.mark.parametrize("step", [7, 32, 100, 333])
    @pytest.mark.parametrize("k", [1, 5, 40])
    def test_ties_go_to_the_lower_row(self, k: int, step: int, largest: bool) -> None:
        matrix = (2 * draw(333, 5)).round().float()  # has negative zeros too
        top = TopK(k, 5, largest=largest)
        for low, high in spans(333, step):
            top.update(matrix[low:high], low)
        values, indices = matrix.sort(dim=0, descending=largest, stable=True)
        torch.testing.assert_close(top.values, values[:k])
        torch.testing.assert_close(top.indices, indices[:k])

    @pytest.mark.parametrize("spread", [1e-30, 1.0, 1e30])
    def test_rows_in_rising_order_are_all_kept_for_a_while(self, spread: float) -> None:
        matrix = torch.arange(400.0)[:, None] * torch.tensor([1.0, -1.0]) * spread
        top = TopK(3, 2)
        for low, high in spans(400, 50):
            top.update(matrix[low:high], low)
            assert top.indices[:, 0].tolist() == [high - 1, high - 2, high - 3]
            assert top.indices[:, 1].tolist() == [0, 1, 2]

    def test_blocks_of_any_type_and_layout(self) -> None:
        matrix = draw(70, 6)
        top = TopK(4, 3)
        top.update(matrix[:35, ::2].bfloat16().double(), 0)
        top.update(matrix[35:, ::2].T.contiguous().T.bfloat16(), 35)
        expected = matrix[:, ::2].bfloat16().float().topk(4, dim=0).values
        torch.testing.assert_close(top.values, expected)
