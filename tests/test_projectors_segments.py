"""Segments, as an embedding's gradient comes, against the same gradients in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.contracts.projector_contract import gradients
from trak._kernels import torch_segments
from trak._kernels.choice import Backend
from trak._signs import Domain, block_sizes, entries_at, rotations_at, stream_key
from trak.errors import BatchError
from trak.projectors import AdditiveProjector, BasicProjector, SparseProjector

LAWS = ["sparse", "rademacher", "normal"]


def additive(law: str, p: int, backend: str = "auto") -> AdditiveProjector:
    if law == "sparse":
        return SparseProjector(1000, p, backend=backend)
    return BasicProjector(1000, p, 0, law, "cpu", backend=backend)


def segments(
    b: int, k: int, w: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Segments that repeat and overlap, in no order."""
    generator = torch.Generator().manual_seed(k)
    examples = torch.randint(0, b, (k,), generator=generator)
    positions = torch.randint(0, 400, (k,), generator=generator)
    positions[: k // 2] = positions[: k // 2] // w * w
    positions[: k // 3] = positions[0] if k else 0
    return gradients(k, w, dtype), examples, positions


def in_full(x: Tensor, examples: Tensor, positions: Tensor, b: int) -> Tensor:
    """The gradient of 1000 coordinates that the segments are the nonzeros of."""
    full = torch.zeros(b, 1000, dtype=x.dtype)
    for row, example, position in zip(x, examples, positions, strict=True):
        full[example, position : position + len(row)] += row
    return full


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("p", [1, 7, 64, 130])
@pytest.mark.parametrize(("k", "w"), [(0, 5), (1, 1), (3, 1), (20, 16), (30, 300)])
def test_segments_are_the_gradient_in_full(
    backend: str, law: str, p: int, k: int, w: int
) -> None:
    projector = additive(law, p, backend)
    x, examples, positions = segments(4, k, w)
    out = torch.ones(4, p, dtype=torch.float64)
    projector.project_segments_into(out, x, examples, positions, 3, "emb")
    expected = projector.project({"emb": in_full(x, examples, positions, 4)}, 3) + 1
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_segments_sum_in_float32(law: str, dtype: torch.dtype) -> None:
    projector = additive(law, 24)
    x, examples, positions = segments(3, 40, 32, dtype)
    out = torch.zeros(3, 24)
    strided = x.T.contiguous().T
    projector.project_segments_into(out, strided, examples, positions, 0)
    wide = torch.zeros(3, 24, dtype=torch.float64)
    projector.project_segments_into(wide, x, examples, positions, 0)
    torch.testing.assert_close(out.double(), wide, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("law", LAWS)
def test_piece_does_not_matter(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, examples, positions = segments(4, 60, 16)
    outs = []
    for entries in (2**19, 100, 1):
        monkeypatch.setattr(torch_segments, "_ENTRIES", entries)
        out = torch.zeros(4, 24, dtype=torch.float64)
        projector = additive(law, 24, "torch")
        projector.project_segments_into(out, x, examples, positions, 0)
        outs.append(out)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", LAWS)
def test_positions_beyond_32_bits(law: str) -> None:
    projector = additive(law, 12)
    x, examples, positions = segments(3, 10, 8)
    positions += 2**42
    out = torch.zeros(3, 12, dtype=torch.float64)
    projector.project_segments_into(out, x, examples, positions, 0, "w")
    expected = torch.zeros_like(out)
    for row, example, position in zip(x, examples, positions.tolist(), strict=True):
        into = expected[example : example + 1]
        projector.project_into(into, row[None], 0, "w", position)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_pieces_are_large_where_entries_are_made_for_each() -> None:
    assert additive("sparse", 8, "torch").block_bytes >= 128 * 2**20
    assert additive("rademacher", 8).block_bytes >= 128 * 2**20
    projector = additive("sparse", 8)
    if projector.running_backend() is not Backend.torch:
        assert projector.block_bytes == 8 * 2**20


def test_values_at_an_address_are_those_of_a_range() -> None:
    key = stream_key(1, 2, "w")
    for domain in (Domain.DENSE_SIGN, Domain.DENSE_NORMAL, Domain.SPARSE_SIGN):
        whole = entries_at(key, torch.tensor([0]), 900, range(3), domain)[:, 0]
        starts = torch.tensor([127, 128, 3, 500, 0])
        for width in (1, 2, 127, 129, 300):
            runs = entries_at(key, starts, width, range(1, 3), domain)
            for i, start in enumerate(starts.tolist()):
                assert torch.equal(runs[:, i], whole[1:, start : start + width])
    assert rotations_at(key, torch.zeros(2, 0, dtype=torch.int64), 0, 5).shape == (2, 0)
    assert block_sizes(8, 2) == (4, 4)


def test_segments_that_do_not_fit(untyped: None) -> None:
    projector = SparseProjector(100, 5)
    out, x = torch.zeros(2, 5), torch.ones(3, 4)
    rows, at = torch.tensor([0, 1, 1]), torch.tensor([0, 5, 9])
    add = projector.project_segments_into
    with pytest.raises(BatchError, match=r"of shape \(k,\), got \(3, 4\), \(2,\)"):
        add(out, x, rows[:2], at, 0)
    with pytest.raises(BatchError, match=r"positions must be int64, got torch.int32"):
        add(out, x, rows, at.int(), 0)
    with pytest.raises(BatchError, match=r"rows of out, 0 to 1, got 0 to 2"):
        add(out, x, rows * 2, at, 0)
    with pytest.raises(BatchError, match=r"rows of out, 0 to 1, got -1 to 0"):
        add(out, x, rows - 1, at, 0)
    with pytest.raises(BatchError, match="positions must be at least 0, got -1"):
        add(out, x, rows, at - 1, 0)
    with pytest.raises(BatchError, match=r"shape \(b, 5\), got \(2, 6\)"):
        add(torch.zeros(2, 6), x, rows, at, 0)
    with pytest.raises(BatchError, match=r"out has dtype torch.float16"):
        add(out.half(), x, rows, at, 0)
