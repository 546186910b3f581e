"""Projectors against explicit matrices."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.projector_contract import ProjectorContract, gradients
from trak import projectors
from trak._signs import (
    block_sizes,
    dense_normals,
    dense_signs,
    sparse_rotations,
    sparse_signs,
    stream_key,
)
from trak._types import Gradients
from trak.errors import OptionError
from trak.projectors import (
    AbstractProjector,
    AdditiveProjector,
    BasicProjector,
    BasicSingleBlockProjector,
    NoOpProjector,
    ProjectionType,
    SparseProjector,
    _basic,
    _sparse,
    default_projector,
)

LAWS = ["sparse", "rademacher", "normal"]


def additive(
    law: str, d: int, p: int, seed: int = 0, **options: int
) -> AdditiveProjector:
    if law == "sparse":
        return SparseProjector(d, p, seed, **options)
    return BasicProjector(d, p, seed, law, "cpu", **options)


def matrix(
    law: str, d: int, p: int, seed: int, model_id: int, name: str = ""
) -> Tensor:
    """The ``(d, p)`` matrix as docs/projections.md states it, entry by entry."""
    key = stream_key(seed, model_id, name)
    if law == "rademacher":
        return dense_signs(key, 0, d, range(p)).double()
    if law == "normal":
        return dense_normals(key, 0, d, range(p)).double()
    s = min(4, p)
    out = torch.zeros(d, p, dtype=torch.float64)
    at = 0
    for r, m in enumerate(block_sizes(p, s)):
        signs = sparse_signs(key, 0, d, s)[r]
        chunks = -(-d // m)
        rotations = sparse_rotations(key, 0, chunks, range(r, r + 1), m)[0]
        for i in range(d):
            out[i, at + (i % m + int(rotations[i // m])) % m] = signs[i]
        at += m
    return out * math.sqrt(p / s)


class TestSparse(ProjectorContract):
    def make(self, seed: int = 0) -> AbstractProjector:
        return SparseProjector(self.grad_dim, self.proj_dim, seed)


class TestSparseOddSizes(ProjectorContract):
    proj_dim = 7

    def make(self, seed: int = 0) -> AbstractProjector:
        return SparseProjector(
            self.grad_dim, self.proj_dim, seed, "sparse", "cpu", nonzeros=3
        )


class TestRademacher(ProjectorContract):
    def make(self, seed: int = 0) -> AbstractProjector:
        return BasicProjector(
            self.grad_dim, self.proj_dim, seed, "rademacher", "cpu", block_size=5
        )


class TestNormal(ProjectorContract):
    def make(self, seed: int = 0) -> AbstractProjector:
        return BasicProjector(
            grad_dim=self.grad_dim,
            proj_dim=self.proj_dim,
            seed=seed,
            proj_type=ProjectionType.normal,
            device=torch.device("cpu"),
            max_batch_size=32,
            dtype=torch.float16,
        )


class TestSingleBlock(ProjectorContract):
    def make(self, seed: int = 0) -> AbstractProjector:
        return BasicSingleBlockProjector(
            self.grad_dim, self.proj_dim, seed, ProjectionType.normal, "cpu"
        )


class TestNoOp(ProjectorContract):
    proj_dim = ProjectorContract.grad_dim
    random = False

    def make(self, seed: int = 0) -> AbstractProjector:
        return NoOpProjector(self.grad_dim, 0, seed)


class OwnProjector(AbstractProjector):
    """What a user may write: no more than `project`."""

    def project(self, grads: Gradients, model_id: int) -> Tensor:
        assert isinstance(grads, Tensor)
        return grads[:, : self.proj_dim]


def test_abstract_projector_only_stores() -> None:
    own = OwnProjector(8, 2, 3, "mine", "cpu")
    assert (own.grad_dim, own.proj_dim, own.seed) == (8, 2, 3)
    assert own.proj_type == "mine"
    assert own.device == torch.device("cpu")
    assert not own.by_parameter
    own.free_memory()
    assert own.describe().endswith("OwnProjector proj_type=mine proj_dim=2 seed=3")
    assert own.project(torch.ones(1, 8), model_id=0).shape == (1, 2)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    ("d", "p"),
    [(1, 1), (1, 7), (3, 40), (57, 1), (57, 2), (57, 7), (57, 16), (200, 130)],
)
def test_matches_the_explicit_matrix(law: str, d: int, p: int) -> None:
    projector = additive(law, d, p, seed=-5)
    x = gradients(3, d, torch.float64)
    expected = x @ matrix(law, d, p, -5, 9)
    torch.testing.assert_close(
        projector.project(x, model_id=9), expected, rtol=1e-10, atol=1e-10
    )


def test_golden_sketches() -> None:
    # The table at the end of docs/projections.md.
    x = torch.arange(1.0, 13.0)[None]
    sketches = [
        (SparseProjector(12, 8, nonzeros=2), [-16, -34, 32, -34, -32, -26, -20, 6]),
        (BasicProjector(12, 4, 0, "rademacher", "cpu"), [-10, 2, 46, -28]),
    ]
    for projector, expected in sketches:
        assert projector.project(x, model_id=0).tolist() == [expected]
    normal = BasicProjector(12, 4, 0, "normal", "cpu").project(x, model_id=0)
    expected = torch.tensor([[-17.7098, 18.8633, -2.2443, 7.9957]])
    torch.testing.assert_close(normal, expected, rtol=0, atol=1e-4)
    named = SparseProjector(12, 8, nonzeros=2).project({"a": x}, model_id=5)
    assert named.tolist() == [[-28, -30, 16, 2, 8, 6, -24, -38]]


@pytest.mark.parametrize("law", LAWS)
def test_dict_is_a_sum_over_named_parameters(law: str) -> None:
    x = {
        "a": gradients(3, 20, torch.float64).reshape(3, 4, 5),
        "b.bias": gradients(3, 1, torch.float64)[:, 0],
    }
    p = 10
    expected = x["a"].reshape(3, 20) @ matrix(law, 20, p, 0, 4, "a")
    expected += x["b.bias"][:, None] @ matrix(law, 1, p, 0, 4, "b.bias")
    whole = additive(law, 21, p).project(x, model_id=4)
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-10)
    alone = additive(law, 20, p).project({"a": x["a"]}, model_id=4)
    alone += additive(law, 1, p).project({"b.bias": x["b.bias"]}, model_id=4)
    torch.testing.assert_close(whole, alone, rtol=1e-10, atol=1e-10)
    assert additive(law, 21, p).by_parameter
    swapped = {"b.bias": x["b.bias"], "a": x["a"]}
    torch.testing.assert_close(
        additive(law, 21, p).project(swapped, model_id=4), whole, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("p", [7, 64])
def test_pieces_of_a_parameter_add_up(law: str, p: int) -> None:
    d = 700
    projector = additive(law, d, p)
    x = gradients(3, d, torch.float64)
    out = torch.zeros(3, p, dtype=torch.float64)
    cuts = [0, 1, 1, 130, 300, 512, 699, 700]
    for lo, hi in reversed(list(pairwise(cuts))):
        projector.project_into(out, x[:, lo:hi], model_id=2, parameter="w", offset=lo)
    whole = projector.project({"w": x}, model_id=2)
    torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", LAWS)
def test_rows_of_a_sketch_can_be_added_to(law: str) -> None:
    projector = additive(law, 30, 12)
    x = gradients(4, 30)
    out = torch.zeros(4, 12)
    for lo in (0, 2):
        projector.project_into(out[lo : lo + 2], x[lo : lo + 2], model_id=0)
    torch.testing.assert_close(out, projector.project(x, model_id=0))


@pytest.mark.parametrize("law", LAWS)
def test_positions_beyond_32_bits(law: str) -> None:
    projector = additive(law, 5, 12)
    x = gradients(2, 5, torch.float64)
    near = torch.zeros(2, 12, dtype=torch.float64)
    far = near.clone()
    projector.project_into(near, x, model_id=0, offset=3)
    projector.project_into(far, x, model_id=0, offset=2**42 + 3)
    assert not torch.equal(near, far)
    again = torch.zeros_like(far)
    for i in range(5):
        column = x[:, i : i + 1]
        projector.project_into(again, column, model_id=0, offset=2**42 + 3 + i)
    torch.testing.assert_close(again, far, rtol=1e-10, atol=1e-10)


def test_piece_length_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gradients(35, 1000, torch.float64)
    for p in (7, 64, 1200):
        whole = SparseProjector(1000, p).project(x, model_id=0)
        with monkeypatch.context() as patch:
            patch.setattr(_sparse, "_PIECE", 96)
            patch.setattr(_sparse, "_ROWS", {"cpu": 8})
            projector = SparseProjector(1000, p, backend="torch")
            pieces = projector.project(x, model_id=0)
        torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", ["rademacher", "normal"])
def test_block_and_tile_do_not_matter(
    law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = gradients(3, 1000, torch.float64)
    single = BasicSingleBlockProjector(1000, 50, 1, law, "cpu", backend="torch")
    whole = single.project(x, model_id=3)
    for block_size in (1, 7, 49, 100):
        blocks = BasicProjector(1000, 50, 1, law, "cpu", block_size, backend="torch")
        torch.testing.assert_close(
            blocks.project(x, model_id=3), whole, rtol=1e-10, atol=1e-10
        )
    monkeypatch.setattr(_basic, "_TILE_ENTRIES", {law: 1})
    torch.testing.assert_close(
        single.project(x, model_id=3), whole, rtol=1e-10, atol=1e-10
    )


def test_sketch_matrix_of_a_single_block() -> None:
    x = gradients(3, 20)
    projector = BasicSingleBlockProjector(20, 6, 1, "normal", "cpu", model_id=4)
    torch.testing.assert_close(
        x @ projector.generate_sketch_matrix(), projector.project(x, model_id=4)
    )


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_gradients_sum_in_float32(law: str, dtype: torch.dtype) -> None:
    d = 4000
    # Their sum overflows float16, and stops growing in bfloat16.
    x = torch.full((2, d), 60000.0, dtype=dtype)
    projector = additive(law, d, 8)
    out = projector.project(x, model_id=0)
    assert out.dtype == torch.float32
    expected = additive(law, d, 8).project(x.double(), model_id=0)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=10.0)


def test_dtype_float64_sums_in_float64() -> None:
    x = gradients(2, 30)
    wide = SparseProjector(30, 8, dtype=torch.float64).project(x, model_id=0)
    assert wide.dtype == torch.float64
    assert torch.equal(wide, SparseProjector(30, 8).project(x.double(), model_id=0))


def test_mixed_dtypes_take_the_widest() -> None:
    x = {"a": gradients(2, 3, torch.float16), "b": gradients(2, 3, torch.float64)}
    assert SparseProjector(6, 4).project(x, model_id=0).dtype == torch.float64


def test_an_infinite_gradient_stays_in_its_row() -> None:
    x = gradients(3, 300)
    x[1, 17] = torch.inf
    out = SparseProjector(300, 40).project(x, model_id=0)
    assert bool(out[[0, 2]].isfinite().all())
    assert int((~out[1].isfinite()).sum()) == 4


@pytest.mark.parametrize("p", [4096, 65536])
def test_many_outputs(p: int) -> None:
    x = gradients(2, 300)
    out = SparseProjector(300, p).project(x, model_id=0)
    # 300 coordinates are less than a chunk, so none collide and norms are exact.
    torch.testing.assert_close(
        out.double().square().sum(1) / p, x.double().square().sum(1), rtol=1e-5, atol=0
    )


def test_plans_are_bounded_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sparse, "_CACHE_BYTES", 20000)
    monkeypatch.setattr(_sparse, "_PIECE", 128)
    projector = SparseProjector(1000, 16, backend="torch")
    x = gradients(2, 1000)
    first = projector.project(x, model_id=0)
    plans = projector._plans
    assert 0 < plans.bytes <= 20000
    assert torch.equal(projector.project(x, model_id=0), first)
    assert 0 < plans.bytes <= 20000
    projector.free_memory()
    assert plans.bytes == 0
    assert torch.equal(projector.project(x, model_id=0), first)


def test_some_of_too_many_plans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = _sparse._plan

    def counted(*arguments: Any) -> Any:
        drawn.append(arguments[1])
        return draw(*arguments)

    monkeypatch.setattr(_sparse, "_plan", counted)
    monkeypatch.setattr(_sparse, "_CACHE_BYTES", 20000)
    monkeypatch.setattr(_sparse, "_PIECE", 128)
    projector = SparseProjector(1280, 16, backend="torch")
    x = gradients(2, 1280)
    projector.project(x, model_id=0)
    assert len(drawn) == 10
    held = projector._plans.bytes
    projector.project(x, model_id=0)
    assert len(drawn) < 20
    # Those of another checkpoint take their place in the end.
    for _ in range(6):
        projector.project(x, model_id=1)
    assert projector._plans.bytes == held
    drawn.clear()
    projector.project(x, model_id=1)
    assert len(drawn) < 10


def test_plans_are_reused() -> None:
    projector = SparseProjector(100, 16, backend="torch")
    x = gradients(2, 100)
    projector.project(x, model_id=0)
    held = projector._plans.bytes
    assert held > 0
    projector.project(x, model_id=0)
    assert projector._plans.bytes == held
    projector.project(x, model_id=1)
    assert projector._plans.bytes == 2 * held


def test_descriptions() -> None:
    assert SparseProjector(9, 8, 1).describe() == (
        "trak-1/sparse nonzeros=4 proj_dim=8 seed=1"
    )
    assert SparseProjector(9, 2).describe() == (
        "trak-1/sparse nonzeros=2 proj_dim=2 seed=0"
    )
    dense = "trak-1/rademacher proj_dim=8 seed=1"
    assert BasicProjector(9, 8, 1, "rademacher", "cpu", 3).describe() == dense
    single = BasicSingleBlockProjector(9, 8, 1, ProjectionType.rademacher, "cpu")
    assert single.describe() == dense
    assert NoOpProjector().describe() == "identity"


def test_default_projector() -> None:
    projector = default_projector(9, 8, 1, torch.device("cpu"))
    assert projector.describe() == "trak-1/sparse nonzeros=4 proj_dim=8 seed=1"
    assert projector.proj_type is ProjectionType.sparse


def test_public_names() -> None:
    assert all(hasattr(projectors, name) for name in projectors.__all__)
    assert [member.value for member in ProjectionType] == [
        "normal",
        "rademacher",
        "sparse",
    ]


def test_noop_returns_gradients_side_by_side() -> None:
    x = {"a": gradients(2, 6).reshape(2, 2, 3), "b": gradients(2, 1)[:, 0]}
    out = NoOpProjector().project(x, model_id=0)
    assert torch.equal(out, torch.cat((x["a"].reshape(2, 6), x["b"][:, None]), 1))
    half = gradients(2, 6, torch.float16)
    assert torch.equal(NoOpProjector(device="cuda").project(half, model_id=0), half)


def test_noop_dimensions() -> None:
    assert NoOpProjector().proj_dim == 0
    assert NoOpProjector(5).proj_dim == 5
    assert NoOpProjector(5, 5).proj_dim == 5
    for d, p in ((5, 4), (-1, 0), (0, -1)):
        with pytest.raises(OptionError, match=f"neither negative; got proj_dim={p}"):
            NoOpProjector(d, p)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("law", LAWS)
def test_cuda_makes_the_same_sketch(law: str) -> None:
    x = {"a": gradients(41, 70000), "b": gradients(41, 3)}
    cls, args = (
        (SparseProjector, (law,)) if law == "sparse" else (BasicProjector, (law,))
    )
    on_cpu = cls(70003, 100, 0, *args, "cpu").project(x, model_id=0)
    device_x = {name: g.cuda() for name, g in x.items()}
    projector = cls(70003, 100, 0, *args, "cuda")
    out = projector.project(device_x, model_id=0)
    assert out.is_cuda
    torch.testing.assert_close(out.cpu(), on_cpu, rtol=1e-4, atol=1e-1)
    assert torch.equal(projector.project(device_x, model_id=0), out)
