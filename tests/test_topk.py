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
