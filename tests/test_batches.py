"""Batches of any nesting: size, rows, rebuilding and hashes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from trak._batches import (
    as_arguments,
    batch_size,
    canonical,
    check_device,
    describe_value,
    rebuild,
    row_digests,
    row_leaves,
    take,
)
from trak.errors import BatchError

Pair = namedtuple("Pair", ["x", "y"])
NESTED = {
    "pair": Pair(torch.arange(3), [torch.ones(3, 2), None]),
    "shared": torch.tensor(7),
    "name": "words",
}


class TestCanonical:
    def test_containers_become_plain(self) -> None:
        batch = UserDict({"a": OrderedDict(b=(torch.ones(1),))})
        assert canonical(batch) == {"a": {"b": (torch.ones(1),)}}
        assert type(canonical(batch)["a"]) is dict

    def test_named_tuples_stay(self) -> None:
        found = canonical(Pair(np.ones(2), [np.ones(2)]))
        assert isinstance(found, Pair)
        assert isinstance(found.y[0], torch.Tensor)

    def test_arrays_share_memory(self) -> None:
        array = np.zeros(3)
        canonical(array)[0] = 5
        assert array[0] == 5

    @pytest.mark.parametrize(
        "change",
        [
            lambda array: array[::-1],
            lambda array: array.astype(">f8"),
            lambda array: np.broadcast_to(array, (2, 3)),
            lambda array: array[::2],
            lambda array: np.float64(3.0) * np.ones(()),
        ],
    )
    def test_arrays_of_any_layout(self, change: Any) -> None:
        array = change(np.arange(3.0))
        before = array.copy()
        found = canonical([array])[0]
        if isinstance(array, np.ndarray):
            np.testing.assert_array_equal(found, before)

    def test_read_only_arrays_are_copied(self) -> None:
        array = np.zeros(3)
        array.flags.writeable = False
        canonical(array)[0] = 5
        assert array[0] == 0

    @pytest.mark.parametrize("dtype", ["O", "U3", "S3", "datetime64[s]"])
    def test_other_arrays_stay(self, dtype: str) -> None:
        array = np.zeros(2, dtype=dtype)
        assert canonical(array) is array


class TestRows:
    def test_leaves_have_rows(self) -> None:
        assert [leaf.shape for leaf in row_leaves(NESTED)] == [(3,), (3, 2)]

    def test_size(self) -> None:
        assert batch_size(NESTED) == 3
        assert batch_size(torch.zeros(0, 4)) == 0

    @pytest.mark.parametrize("batch", [None, 3, "x", [], {}, torch.tensor(1), [None]])
    def test_no_size(self, batch: Any) -> None:
        kind = type(batch).__name__
        with pytest.raises(BatchError, match=f"The batch, a {kind}, holds no tensor"):
            batch_size(batch)

    def test_two_sizes(self) -> None:
        with pytest.raises(BatchError, match=r"shapes \(2,\), \(3, 1\)\. Every"):
            batch_size([torch.zeros(2), {"a": torch.zeros(3, 1)}])

    def test_taking(self) -> None:
        part = take(NESTED, slice(1, 3))
        assert isinstance(part["pair"], Pair)
        assert part["pair"].x.tolist() == [1, 2]
        assert part["pair"].y[0].shape == (2, 2)
        assert part["shared"] is NESTED["shared"]
        assert part["name"] == "words"

    def test_rebuilding(self) -> None:
        leaves = [leaf + 1 for leaf in row_leaves(NESTED)]
        built = rebuild(NESTED, leaves)
        assert [a is b for a, b in zip(row_leaves(built), leaves, strict=True)] == [
            True,
            True,
        ]
        assert built["shared"] is NESTED["shared"]

    def test_arguments(self) -> None:
        assert as_arguments((1, 2)) == (1, 2)
        assert as_arguments([1]) == (1,)
        assert as_arguments({"a": 1}) == ({"a": 1},)


class TestDevice:
    def test_same(self) -> None:
        check_device(NESTED, torch.device("cpu"))

    def test_other(self) -> None:
        with pytest.raises(BatchError, match=r"on cpu, the model is on meta.*'meta'"):
            check_device(NESTED, torch.device("meta"))


class TestDigests:
    def test_rows_are_told_apart(self) -> None:
        x, y = (
            torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]]),
            torch.tensor([0, 1, 0]),
        )
        digests = row_digests((x, y))
        assert digests.dtype == np.int64
        assert len(set(digests.tolist())) == 3
        assert row_digests((x,))[0] == row_digests((x,))[1]

    def test_place_and_layout_do_not_matter(self) -> None:
        x = torch.arange(12.0).reshape(3, 4)
        whole = row_digests(x)
        np.testing.assert_array_equal(row_digests(x[1:2])[0], whole[1])
        np.testing.assert_array_equal(row_digests(x.T.contiguous().T), whole)
        np.testing.assert_array_equal(row_digests(x.clone().requires_grad_()), whole)

    @pytest.mark.parametrize("b", [0, 1, 3])
    @pytest.mark.parametrize(
        "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.complex64]
    )
    def test_every_type_and_size(self, dtype: torch.dtype, b: int) -> None:
        assert row_digests(torch.ones(b, 2).to(dtype)).shape == (b,)
        assert row_digests([torch.ones(b), torch.ones(b, 0)]).shape == (b,)

    def test_hashes_are_those_of_every_process(self) -> None:
        assert row_digests(torch.tensor([1, 2])).tolist() == [
            int(np.frombuffer(_blake(value), dtype=np.int64)[0]) for value in (1, 2)
        ]


def _blake(value: int) -> bytes:
    return hashlib.blake2b(value.to_bytes(8, "little"), digest_size=8).digest()


def test_descriptions_for_messages() -> None:
    assert describe_value(torch.zeros(2, 1)) == "shape (2, 1)"
    assert describe_value(3.0) == "float"
