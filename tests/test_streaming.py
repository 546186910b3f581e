"""Rows block by block: order, errors, ends, and memory that runs out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from torch import Tensor

from tests.problems import draw
from trak._reading import StoredRows
from trak._streaming import over_rows, prefetched
from trak.errors import OutOfMemoryError

CPU = torch.device("cpu")


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("trak-reader")]


@pytest.mark.parametrize("total", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("ahead", [0, 1, 2, 20])
def test_tasks_come_in_order(total: int, ahead: int) -> None:
    tasks = [lambda i=i: i for i in range(total)]
    assert list(prefetched(tasks, ahead)) == list(range(total))
    assert readers() == []


def test_only_a_few_run_ahead() -> None:
    begun: list[int] = []
    tasks = [lambda i=i: begun.append(i) for i in range(20)]
    with closing(prefetched(tasks, 2)) as results:
        next(results)
        assert len(begun) <= 3
    assert len(begun) <= 3
    assert readers() == []


def test_they_run_in_another_thread() -> None:
    (name,) = prefetched([lambda: threading.current_thread().name])
    assert name.startswith("trak-reader")


def test_errors_come_where_the_result_would() -> None:
    def fail() -> int:
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(prefetched([lambda: 1, fail, lambda: 3], ahead=2))
    results = prefetched([lambda: 1, fail, lambda: 3])
    assert next(results) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)
    assert readers() == []


def test_nothing_is_left_of_an_interrupted_reader() -> None:
    def consume() -> None:
        for _ in prefetched([lambda: 1] * 9):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert readers() == []


class Limited:
    """Sums rows, of which not more than some fit into memory."""

    def __init__(self, most: int, error: type[Exception] = MemoryError) -> None:
        self.most = most
        self.error = error
        self.heights: list[int] = []

    def __call__(self, low: int, high: int, parts: Iterator[Tensor]) -> Tensor:
        self.heights.append(high - low)
        if high - low > self.most:
            raise self.error("no")
        return sum(rows.clone() for rows in parts)


def stored(x: Tensor) -> StoredRows:
    return StoredRows(x.float().numpy(), None, CPU)


@pytest.mark.parametrize("height", [1, 2, 5, 9, 100])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_blocks_are_those_of_a_loop(height: int, most: int) -> None:
    x, y = draw(9, 4), draw(9, 4, seed=1)
    sources = [stored(x), lambda low, high: y[low:high].float(), stored(x)]
    make = Limited(most)
    blocks = list(over_rows(sources, 9, height, make, "sums"))
    assert [low for low, _, _ in blocks] == [0, *(high for _, high, _ in blocks[:-1])]
    found = torch.cat([block for _, _, block in blocks])
    torch.testing.assert_close(found, (2 * x + y).float())
    assert max(make.heights[-1:]) <= most
    assert readers() == []


def test_no_rows_and_no_sources() -> None:
    assert list(over_rows([stored(draw(9, 4))], 0, 3, Limited(1), "sums")) == []
    none = over_rows([], 5, 3, lambda low, high, parts: [*parts], "sums")
    assert list(none) == [(0, 3, []), (3, 5, [])]


def test_no_memory_at_all() -> None:
    with pytest.raises(OutOfMemoryError, match="no memory left for sums"):
        list(over_rows([stored(draw(9, 4))], 9, 4, Limited(0), "sums"))
    assert readers() == []


def test_other_errors_are_not_answered_with_smaller_blocks() -> None:
    make = Limited(0, RuntimeError)
    with pytest.raises(RuntimeError, match="no"):
        list(over_rows([stored(draw(9, 4))], 9, 4, make, "sums"))
    assert make.heights == [4]
