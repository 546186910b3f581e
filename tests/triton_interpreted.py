"""The triton kernels against float64 sums, in triton's interpreter, on a CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from trak import _signs
from trak._kernels import (
    choice,
    triton_backend,
    triton_dense_launch,
    triton_sparse_launch,
)
from trak._kernels.choice import Backend
from trak._kernels.triton_philox import words
from trak._signs import Key, block_sizes, dense_signs, sparse_rotations, sparse_signs
from trak.errors import BackendError
from trak.projectors import BasicProjector, SparseProjector

KEY = _signs.stream_key(1, 2, "weight")
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-4},
    torch.float64: {"rtol": 1e-13, "atol": 1e-12},
}
LONG = 2**41 + 77
"""A position whose draw and chunk do not fit in 32 bits."""


def sparse_matrix(offset: int, k: int, sizes: tuple[int, ...], key: Key) -> Tensor:
    """What coordinates ``offset..offset + k`` are multiplied by, float64."""
    matrix = torch.zeros(k, sum(sizes), dtype=torch.float64)
    signs = sparse_signs(key, offset, offset + k, len(sizes))
    at = 0
    for r, size in enumerate(sizes):
        for i in range(offset, offset + k):
            chunk = i // size
            turn = sparse_rotations(key, chunk, chunk + 1, range(r, r + 1), size)
            matrix[i - offset, at + (i % size + int(turn)) % size] = signs[
                r, i - offset
            ]
        at += size
    return matrix * math.sqrt(sum(sizes) / len(sizes))


def dense_matrix(offset: int, k: int, p: int, key: Key) -> Tensor:
    return dense_signs(key, offset, offset + k, range(p)).double()


def rows(b: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(b + k)
    return torch.randn(b, k, generator=generator, dtype=torch.float64).to(dtype)


def test_no_kernel_was_compiled() -> None:
    assert triton_dense_launch.INTERPRETED
    assert triton_backend.unavailable(torch.device("cpu")) is None


@triton.jit
def write_words(out, start, key_low, key_high, domain: tl.constexpr):
    i = tl.arange(0, 16)
    w0, w1, w2, w3 = words(i.to(tl.int64) + start, i * 0 + 3, key_low, key_high, domain)
    tl.store(out + i, w0.to(tl.int64))
    tl.store(out + 16 + i, w1.to(tl.int64))
    tl.store(out + 32 + i, w2.to(tl.int64))
    tl.store(out + 48 + i, w3.to(tl.int64))


@pytest.mark.parametrize("start", [0, 2**32 - 5, 2**40])
@pytest.mark.parametrize("domain", list(_signs.Domain))
def test_words_are_those_of_the_scheme(start: int, domain: _signs.Domain) -> None:
    out = torch.empty(4, 16, dtype=torch.int64)
    low, high = (word - 2**32 if word >= 2**31 else word for word in KEY)
    write_words[(1,)](out, start, low, high, int(domain))
    index = torch.arange(start, start + 16)
    lanes, purpose = torch.full((16,), 3), torch.full((16,), int(domain))
    counter = (index & 0xFFFFFFFF, index >> 32, lanes, purpose)
    assert torch.equal(out, torch.stack(_signs.philox(counter, KEY)))


@pytest.mark.parametrize("offset", [3, LONG])
@pytest.mark.parametrize(("p", "s"), [(1, 1), (11, 2), (2, 2)])
def test_sparse_entries_are_those_of_the_scheme(p: int, s: int, offset: int) -> None:
    sizes, k = block_sizes(p, s), 11
    out = torch.zeros(k, p, dtype=torch.float64)
    triton_backend.sparse_into(out, torch.eye(k), KEY, offset, sizes)
    assert torch.equal(out, sparse_matrix(offset, k, sizes, KEY))


@pytest.mark.parametrize("offset", [3, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_entries_are_those_of_the_scheme(dtype: torch.dtype, offset: int) -> None:
    k, p = 150, 37
    # One coordinate of every few, so that all words and most bits are met.
    some = torch.arange(0, k, 5)
    out = torch.zeros(len(some), p, dtype=dtype)
    triton_backend.dense_into(out, torch.eye(k, dtype=dtype)[some], KEY, offset)
    assert torch.equal(out.double(), dense_matrix(offset, k, p, KEY)[some])


CASES = [
    # b, k, p, s, offset: a few chunks in one launch; more in splits, with blocks of
    # one size and of two, and a last split, row tile and draw that are not full.
    (3, 200, 64, 4, 0),
    (1, 100, 33, 4, 129),
    (33, 300, 33, 2, 5),
    (3, 1000, 64, 4, 1),
    (2, 500, 50, 3, LONG),
]


@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_the_matrix(case: tuple[int, ...]) -> None:
    b, k, p, s, offset = case
    x, sizes = rows(b, k), block_sizes(p, s)
    out = rows(b, p)
    expected = out.double() + x.double() @ sparse_matrix(offset, k, sizes, KEY)
    triton_backend.sparse_into(out, x, KEY, offset, sizes)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[torch.float32])
    out = rows(b, p)
    expected = out.double() + x.double() @ dense_matrix(offset, k, p, KEY)
    triton_backend.dense_into(out, x, KEY, offset)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("k", [60, 200])
@pytest.mark.parametrize(
    ("dtype", "sums"),
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(dtype: torch.dtype, sums: torch.dtype, k: int) -> None:
    x, sizes = rows(3, k, dtype), block_sizes(33, 4)
    sparse, dense = torch.zeros(2, 3, 33, dtype=sums)
    triton_backend.sparse_into(sparse, x, KEY, 7, sizes)
    triton_backend.dense_into(dense, x, KEY, 7)
    wanted = x.double() @ sparse_matrix(7, k, sizes, KEY)
    torch.testing.assert_close(sparse.double(), wanted, **TOLERANCE[sums])
    wanted = x.double() @ dense_matrix(7, k, 33, KEY)
    torch.testing.assert_close(dense.double(), wanted, **TOLERANCE[sums])


@pytest.mark.parametrize("k", [60, 200])
def test_strides(k: int) -> None:
    x = rows(3, k)
    columns = x.T.contiguous().T
    every_other = torch.zeros(6, 2 * k)[::2, ::2].copy_(x)
    for law in (sparse_here, triton_backend.dense_into):
        plain = torch.zeros(3, 33)
        law(plain, x, KEY, 7)
        for other in (columns, every_other):
            out = torch.zeros(33, 6).T[::2]
            law(out, other, KEY, 7)
            assert torch.equal(out, plain)
        out = torch.zeros(3, 33)
        law(out, x[:1].expand(3, k), KEY, 7)
        assert torch.equal(out, plain[:1].expand(3, 33))


def sparse_here(out: Tensor, x: Tensor, key: Key, offset: int) -> None:
    triton_backend.sparse_into(out, x, key, offset, block_sizes(33, 4))


@pytest.mark.parametrize("law", [sparse_here, triton_backend.dense_into])
def test_nothing_to_add(law: Any) -> None:
    for b, k in ((0, 5), (3, 0)):
        out = torch.ones(b, 33)
        law(out, torch.zeros(b, k), KEY, 7)
        assert bool((out == 1).all())


@pytest.mark.parametrize("law", [sparse_here, triton_backend.dense_into])
def test_a_row_does_not_depend_on_the_others(
    law: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(19, 200)
    together, launched = torch.zeros(2, 19, 33)
    law(together, x, KEY, 7)
    for row in (0, 18):
        alone = torch.zeros(1, 33)
        law(alone, x[row : row + 1], KEY, 7)
        assert torch.equal(alone[0], together[row])
    monkeypatch.setattr(triton_sparse_launch, "ROWS", 11)
    monkeypatch.setattr(triton_dense_launch, "ROWS", 11)
    law(launched, x, KEY, 7)
    assert torch.equal(launched, together)


@pytest.mark.parametrize("law", [sparse_here, triton_backend.dense_into])
def test_pieces_add_up(law: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(2, 900)
    whole, cut, launched = torch.zeros(3, 2, 33)
    law(whole, x, KEY, 100)
    for lo, hi in ((0, 1), (1, 250), (250, 900)):
        law(cut, x[:, lo:hi], KEY, 100 + lo)
    torch.testing.assert_close(cut, whole, **TOLERANCE[torch.float32])
    # A split is of 64 chunks of 8 coordinates, or of 64 draws of 128.
    monkeypatch.setattr(triton_sparse_launch, "PARTIALS", 33)
    monkeypatch.setattr(triton_dense_launch, "_WIDTH", 256)
    law(launched, x, KEY, 100)
    torch.testing.assert_close(launched, whole, **TOLERANCE[torch.float32])
    assert not torch.equal(launched, whole)


def test_larger_blocks_may_have_a_chunk_more() -> None:
    sizes, start, k = block_sizes(65, 2), 32, 530
    large, small = (-(-(start + k) // size) - start // size for size in sizes)
    assert large > small
    out, x = torch.zeros(1, 65), rows(1, k)
    triton_backend.sparse_into(out, x, KEY, start, sizes)
    expected = x.double() @ sparse_matrix(start, k, sizes, KEY)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("k", [60, 300])
def test_an_infinite_gradient_reaches_only_its_own_outputs(k: int) -> None:
    x, sizes = rows(3, k), block_sizes(33, 4)
    x[1, 20] = math.inf
    out, clean = torch.zeros(2, 3, 33)
    triton_backend.sparse_into(out, x, KEY, 0, sizes)
    reached = sparse_matrix(20, 1, sizes, KEY)[0] != 0
    assert torch.equal(~out[1].isfinite(), reached)
    assert not bool(out.isnan().any())
    x[1, 20] = 0
    triton_backend.sparse_into(clean, x, KEY, 0, sizes)
    assert torch.equal(out[::2], clean[::2])
    x[1, 20] = math.nan
    dense = torch.zeros(3, 33)
    triton_backend.dense_into(dense, x, KEY, 0)
    assert dense[1].isnan().all()
    assert dense[::2].isfinite().all()


def test_dense_keeps_the_precision_and_range_of_float32() -> None:
    x = rows(4, 200)
    x *= torch.tensor([[1e-30], [1.0], [1e30], [1.0]])
    x[3, 1:] *= 1e-6
    out = torch.zeros(4, 33)
    triton_backend.dense_into(out, x, KEY, 0)
    expected = x.double() @ dense_matrix(0, 200, 33, KEY)
    error = (out.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-6


def segments(
    k: int, w: int, b: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    examples = torch.randint(b, (k,), generator=generator)
    positions = torch.randint(6, (k,), generator=generator) * w
    return rows(k, w, dtype), examples, positions


@pytest.mark.parametrize(
    ("k", "w", "b", "base", "dtype"),
    [
        (8, 24, 3, 0, torch.float32),
        (1, 150, 2, LONG, torch.bfloat16),
        (12, 5, 1, 3, torch.float64),
    ],
)
def test_segments(k: int, w: int, b: int, base: int, dtype: torch.dtype) -> None:
    x, examples, positions = segments(k, w, b, dtype)
    sizes, p = block_sizes(50, 3), 50
    sums = torch.promote_types(dtype, torch.float32)
    sparse, dense = torch.zeros(2, b, p, dtype=sums)
    wanted = torch.zeros(2, b, p, dtype=torch.float64)
    for row, example, at in zip(x.double(), examples, positions, strict=True):
        start = int(at) + base
        wanted[0, example] += row @ sparse_matrix(start, w, sizes, KEY)
        wanted[1, example] += row @ dense_matrix(start, w, p, KEY)
    where = positions + base
    triton_backend.sparse_segments_into(sparse, x, examples, where, KEY, sizes)
    triton_backend.dense_segments_into(dense, x, examples, where, KEY)
    torch.testing.assert_close(sparse.double(), wanted[0], **TOLERANCE[sums])
    torch.testing.assert_close(dense.double(), wanted[1], **TOLERANCE[sums])


def test_segments_of_an_example_depend_on_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, examples, positions = segments(7, 24, 3)
    sizes = block_sizes(32, 2)
    plain, launched, alone = torch.zeros(3, 3, 32)
    triton_backend.sparse_segments_into(plain, x, examples, positions, KEY, sizes)
    own = examples == 1
    triton_backend.sparse_segments_into(
        alone[:1], x[own], examples[own] - 1, positions[own], KEY, sizes
    )
    assert torch.equal(alone[0], plain[1])
    monkeypatch.setattr(triton_sparse_launch, "ROWS", 2)
    triton_backend.sparse_segments_into(launched, x, examples, positions, KEY, sizes)
    assert torch.equal(launched, plain)
    monkeypatch.setattr(triton_dense_launch, "ROWS", 2)
    every_other = torch.zeros(7, 48)[:, ::2].copy_(x)
    other = torch.zeros(32, 3).T
    triton_backend.dense_segments_into(other, every_other, examples, positions, KEY)
    plain = torch.zeros(3, 32)
    triton_backend.dense_segments_into(plain, x, examples, positions, KEY)
    assert torch.equal(plain, other)


def test_projectors_use_it_once_it_has_proved_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A smaller proof than elsewhere, of the same kernels.
    for name, value in (
        ("_ROWS", 2),
        ("_COLUMNS", 100),
        ("_OUTPUTS", 9),
        ("_FEW", 30),
    ):
        monkeypatch.setattr(choice, name, value)
    x = rows(2, 150)
    for law in ("sparse", "rademacher"):
        kind = SparseProjector if law == "sparse" else BasicProjector
        mine, plain = (
            kind(150, 33, 0, law, "cpu", backend=name) for name in ("triton", "torch")
        )
        assert mine.running_backend() is Backend.triton
        assert mine.describe() == plain.describe()
        torch.testing.assert_close(mine.project(x, 0), plain.project(x, 0))


def test_what_triton_raises_is_a_back_end_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(triton_dense_launch, "dense_into", fail)
    with pytest.raises(BackendError) as caught:
        triton_backend.dense_into(torch.zeros(1, 3), torch.zeros(1, 3), KEY, 0)
    message = str(caught.value)
    assert message.startswith("triton cannot compile or launch the dense kernels here")
    assert "300000" in message
    assert message.endswith(
        "sum by torch operations with backend='torch' or TRAK_BACKEND=torch"
    )


def test_no_segments() -> None:
    for k, w, b in ((0, 3, 2), (2, 0, 2), (0, 3, 0)):
        x, where = torch.zeros(k, w), torch.zeros(k, dtype=torch.int64)
        out = torch.ones(b, 10)
        sizes = block_sizes(10, 2)
        triton_backend.sparse_segments_into(out, x, where, where, KEY, sizes)
        triton_backend.dense_segments_into(out, x, where, where, KEY)
        assert bool((out == 1).all())
