"""What is true of all methods together."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from trak import methods
from trak.errors import BatchError
from trak.methods import Method
from trak.methods._data import checked, count, read_contents

EVERY = [
    value
    for value in vars(methods).values()
    if inspect.isclass(value) and issubclass(value, Method) and value is not Method
]


def test_names_are_their_own():
    names = [method.name for method in EVERY]
    assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize("method", EVERY)
def test_a_method_is_whole_and_on_the_page(method):
    assert not inspect.isabstract(method)
    assert method.__name__ in methods.__all__
    page = Path(__file__).parents[1] / "docs" / "methods.md"
    assert f"| `{method.__name__}` |" in page.read_text(encoding="utf-8")


def batches(*sizes: int, start: float = 0.0) -> list[object]:
    rows = torch.arange(start, start + sum(sizes)).split(list(sizes))
    return [{"inputs": part, "shared": torch.tensor(1.0)} for part in rows]


def test_contents_do_not_depend_on_how_batches_are_cut():
    whole = read_contents(batches(7), "train")
    assert whole == read_contents(batches(3, 3, 1), "train")
    assert whole.size == count(batches(3, 3, 1), "train") == 7
    assert whole != read_contents(batches(6), "train")
    assert whole != read_contents(batches(7, start=1.0), "train")


def test_contents_are_checked_before_a_batch_is_used():
    contents = read_contents(batches(4, 3), "train")
    assert len(list(checked(batches(2, 5), contents, "train"))) == 2
    again = checked(batches(4) + batches(3), contents, "train")
    assert len(next(again)["inputs"]) == 4
    with pytest.raises(BatchError, match="train gave other examples"):
        next(again)
    for wrong in (batches(4), batches(4, 4)):
        with pytest.raises(BatchError, match="train gave other examples"):
            list(checked(wrong, contents, "train"))


def test_batches_must_be_batches():
    for call in (read_contents, count):
        with pytest.raises(BatchError, match="no tensor with a first axis"):
            call(["text"], "train")
        with pytest.raises(BatchError, match="targets has no examples"):
            call(batches(0), "targets")
