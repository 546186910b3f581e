"""The native kernels against float64 sketches by torch operations."""

from __future__ import annotations

import copy
import ctypes
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.contracts.projector_contract import gradients
from trak._kernels import native
from trak._kernels.choice import dense_segments_into, sparse_segments_into
from trak._kernels.native import Variant
from trak._kernels.plans import PlanCache
from trak._signs import block_sizes, stream_key
from trak.projectors import AdditiveProjector, BasicProjector, SparseProjector

CPU = torch.device("cpu")
KEY = stream_key(3, 1, "w")
# A library compiled with sanitizers, by tests/test_native_install.py.
native._LIBRARY = os.environ.get("TRAK_TEST_LIBRARY") or native._LIBRARY
ABSENT = native.unavailable(CPU)
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
VARIANTS = [] if ABSENT else [v for v in Variant if v <= native.variant()]
LAWS = ["sparse", "rademacher"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=[1, 3])
def threads(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """Every call on so many threads, however small."""
    monkeypatch.setattr(native, "_threads", lambda additions: request.param)
    return request.param


def expected(law: str, x: Tensor, p: int, s: int, offset: int) -> Tensor:
    """The sketch by torch operations, in float64."""
    out = torch.zeros(len(x), p, dtype=torch.float64)
    rows, starts = torch.arange(len(x)), torch.full((len(x),), offset)
    if law == "sparse":
        sparse_segments_into(out, x.double(), rows, starts, KEY, block_sizes(p, s))
    else:
        dense_segments_into(out, x.double(), rows, starts, KEY, law)
    return out


def sketch(law: str, out: Tensor, x: Tensor, s: int, offset: int, v: Variant) -> None:
    if law == "sparse":
        native._run("trak_sparse", out, x, KEY, offset=offset, blocks=s, chosen=v)
    else:
        rows = torch.arange(len(x))
        native._run("trak_dense", out, x, KEY, offset=offset, order=rows, chosen=v)


def strided(x: Tensor, how: int) -> Tensor:
    return [
        x,
        x.T.contiguous().T,
        x.repeat_interleave(2, 1)[:, ::2],
        x.flip(0).flip(0),
    ][how]


def cases() -> Iterator[tuple[int, int, int, int, int, torch.dtype, int]]:
    """Some of all combinations, each value of each many times: b, k, p, s, offset."""
    every = itertools.product(
        (1, 3, 4, 17),
        (1, 5, 128, 300, 5000, 40000),
        (1, 7, 64, 130, 513),
        (1, 3, 4),
        (0, 5, 128, 2**33 + 77),
        DTYPES,
        range(4),
    )
    yield from itertools.islice(every, 0, None, 331)


@pytest.mark.parametrize("law", LAWS)
def test_every_size_dtype_and_stride(law: str, threads: int) -> None:
    for b, k, p, s, offset, dtype, how in cases():
        if law == "rademacher" and k * p > 10**6:
            continue
        x = gradients(b, k, dtype)
        wanted = expected(law, x, p, min(s, p), offset)
        for out_dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            found = []
            for v in VARIANTS:
                out = torch.ones(b, p, dtype=out_dtype)
                sketch(law, out, strided(x, how), min(s, p), offset, v)
                found.append(out)
            scale = float(wanted.abs().max())
            torch.testing.assert_close(
                found[0].double(), wanted + 1, rtol=rtol, atol=rtol * scale
            )
            # Which vectors add does not matter to the last bit.
            assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("law", LAWS)
def test_threads_do_not_matter(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = gradients(9, 90000 if law == "sparse" else 600)
    found = []
    for count in (1, 2, 5, 64):
        monkeypatch.setattr(native, "_threads", lambda additions, n=count: n)
        out = torch.zeros(9, 200)
        sketch(law, out, x, 4, 7, native.variant())
        found.append(out)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_kept_plans_change_no_bit(threads: int) -> None:
    for b, k, p, s, offset, dtype, how in cases():
        x = strided(gradients(b, k, dtype), how)
        wanted = torch.ones(b, p)
        sketch("sparse", wanted, x, min(s, p), offset, native.variant())
        plans = PlanCache(2**24)
        held = []
        for v in (*VARIANTS, native.variant()):
            # Every variant may use what another has drawn.
            found = torch.ones(b, p)
            native._run(
                *("trak_sparse", found, x, KEY),
                offset=offset,
                blocks=min(s, p),
                plans=plans,
                chosen=v,
            )
            assert torch.equal(found, wanted)
            held.append(plans.bytes)
        assert held == [held[0]] * len(held)
        # Bits for every coordinate and block, rounded up, and a word for a rotation.
        m, blocks = p // min(s, p), min(s, p)
        chunks = k // m + 2
        assert held[0] <= 4 * blocks * chunks * ((m + 64) // 64 * 2 + 1)
        assert held[0] > 0 or k <= 4 * (m + 1)


def test_plans_of_other_coordinates_are_others() -> None:
    x, plans = gradients(2, 3000), PlanCache(2**20)
    calls = [
        (x, KEY, 0, (32, 32)),
        (x, KEY, 1, (32, 32)),
        (x[:, :2999], KEY, 0, (32, 32)),
        (x, stream_key(3, 1, "v"), 0, (32, 32)),
        (x, KEY, 0, (16, 16, 16, 16)),
        (x, KEY, 0, (33, 33)),
    ]
    for turn in range(2):
        for grads, key, offset, sizes in calls:
            wanted, found = torch.zeros(2, 2, sum(sizes))
            native.sparse_into(wanted, grads, key, offset, sizes)
            native.sparse_into(found, grads, key, offset, sizes, plans)
            assert torch.equal(found, wanted)
        if turn == 0:
            held = plans.bytes
    assert plans.bytes == held > 0


def test_plans_that_do_not_fit_are_drawn_every_time() -> None:
    x, plans = gradients(2, 3000), PlanCache(1000)
    wanted, first, second = torch.zeros(3, 2, 64)
    native.sparse_into(wanted, x, KEY, 0, (32, 32))
    native.sparse_into(first, x, KEY, 0, (32, 32), plans)
    native.sparse_into(second, x, KEY, 0, (32, 32), plans)
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)
    assert plans.bytes == 0


def test_a_plan_that_was_not_finished_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = PlanCache(2**20)
    monkeypatch.setattr(native, "_library", Exhausted)
    with pytest.raises(MemoryError):
        native.sparse_into(torch.zeros(1, 64), torch.ones(1, 900), KEY, 0, (64,), plans)
    assert plans.bytes == 0


def test_projectors_keep_plans_and_free_them() -> None:
    x = gradients(3, 20000)
    projector = SparseProjector(20000, 64, backend="native")
    first = projector.project(x, model_id=0)
    held = projector._plans.bytes
    assert held > 0
    assert torch.equal(projector.project(x, model_id=0), first)
    assert projector._plans.bytes == held
    projector.project(x, model_id=1)
    assert projector._plans.bytes == 2 * held
    again = copy.deepcopy(projector)
    assert again._plans.bytes == 0
    assert torch.equal(again.project(x, model_id=0), first)
    projector.free_memory()
    assert projector._plans.bytes == 0
    assert torch.equal(projector.project(x, model_id=0), first)


def test_one_projector_in_several_threads() -> None:
    projector = SparseProjector(40000, 64, backend="native")
    x = gradients(2, 40000)
    alone = SparseProjector(40000, 64, backend="native")
    wanted = [alone.project(x, model_id=i) for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        ids = [0, 1, 2] * 8
        found = list(pool.map(lambda i: projector.project(x, model_id=i), ids))
    for i, rows in zip(ids, found, strict=True):
        assert torch.equal(rows, wanted[i])
    assert projector._plans.bytes == alone._plans.bytes


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("p", [5, 64, 131])
def test_unit_vectors_show_the_exact_entries(law: str, p: int) -> None:
    s = min(4, p)
    x = torch.eye(400)
    for v in VARIANTS:
        out = torch.zeros(400, p)
        sketch(law, out, x, s, 2**32 * 128 - 100, v)
        wanted = expected(law, x, p, s, 2**32 * 128 - 100).float()
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("k", "w"), [(1, 1), (7, 40), (60, 300)])
def test_segments(law: str, k: int, w: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    examples = torch.randint(0, 5, (k,), generator=generator)
    positions = torch.randint(0, 900, (k,), generator=generator) // 7 * 7
    positions[k // 2 :] += 2**40
    x = gradients(k, w)
    for p in (1, 130):
        sizes = block_sizes(p, min(4, p))
        wanted = torch.zeros(5, p, dtype=torch.float64)
        found = torch.zeros(5, p)
        if law == "sparse":
            sparse_segments_into(wanted, x.double(), examples, positions, KEY, sizes)
            native.sparse_segments_into(found, x, examples, positions, KEY, sizes)
        else:
            dense_segments_into(wanted, x.double(), examples, positions, KEY, law)
            native.dense_segments_into(found, x, examples, positions, KEY)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("law", LAWS)
def test_sums_are_of_blocks(law: str) -> None:
    # One running sum of so many equal terms would be wrong in its fourth digit.
    k, p = 2**20, 8
    x = torch.full((1, k), 0.1)
    out = torch.zeros(1, p)
    sketch(law, out, x, 2, 0, native.variant())
    wide = torch.zeros(1, p, dtype=torch.float64)
    sketch(law, wide, x.double(), 2, 0, native.variant())
    torch.testing.assert_close(out.double(), wide, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("law", LAWS)
def test_what_is_not_finite_stays_in_its_row(law: str) -> None:
    x = gradients(6, 300)
    x[1, 17], x[2, 18] = torch.inf, torch.nan
    for v in VARIANTS:
        out = torch.zeros(6, 40)
        sketch(law, out, x, 4, 0, v)
        assert bool(out[[0, 3, 4, 5]].isfinite().all())
        assert bool(out[1].isinf().any())
        assert not bool(out[1].isnan().any())
        assert bool(out[2].isnan().any())


def test_float16_of_every_value() -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    out = torch.zeros(2**16, 1, dtype=torch.float64)
    for v in VARIANTS:
        sketch("sparse", out.zero_(), x[:, None], 1, 0, v)
        sign = float(expected("sparse", torch.ones(1, 1), 1, 1, 0))
        assert torch.equal(out[:, 0].nan_to_num(7), (x.double() * sign).nan_to_num(7))


@pytest.mark.parametrize("law", LAWS)
def test_sketches_of_any_layout(law: str) -> None:
    x = gradients(3, 500)
    wanted = expected(law, x, 24, 4, 0)
    layouts = [
        torch.zeros(24, 3).T,
        torch.zeros(3, 60)[:, 5:29],
        torch.zeros(9, 24)[::3],
        torch.zeros(3, 48)[:, ::2],
    ]
    for out in layouts:
        sketch(law, out, x, 4, 0, native.variant())
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-3)


def test_back_ends_differ_by_rounding_only() -> None:
    x = {"a": gradients(5, 3000), "b": gradients(5, 20).half()}
    for law in LAWS:
        found = []
        for backend in ("torch", "native"):
            projector: AdditiveProjector = (
                SparseProjector(3020, 96, backend=backend)
                if law == "sparse"
                else BasicProjector(3020, 96, 0, law, "cpu", backend=backend)
            )
            assert projector.running_backend().value == backend
            found.append(projector.project(x, model_id=2))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-2)


class Exhausted:
    """A library whose kernels find no memory."""

    def trak_best_variant(self) -> int:
        return 0

    def trak_dense(self, task: object) -> int:
        return 1

    trak_sparse = trak_dense

    def trak_sparse_plan_bytes(self, task: object) -> int:
        return 8


def test_out_of_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    task = native._Task(p=2**50, rows=1, columns=2**53, blocks=1, threads=1)
    library = native._library()
    assert library.trak_sparse(ctypes.byref(task)) == 1
    assert library.trak_dense(ctypes.byref(task)) == 1
    monkeypatch.setattr(native, "_library", Exhausted)
    with pytest.raises(MemoryError, match=r"of shape \(1, 9\) to 2 outputs"):
        native.dense_into(torch.zeros(1, 2), torch.ones(1, 9), KEY, 0)


def test_forked_processes_sketch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_threads", lambda additions: 3)
    x, out = gradients(4, 50000), torch.zeros(4, 64)
    sketch("sparse", out, x, 4, 0, native.variant())
    child = os.fork()
    if child == 0:
        again = torch.zeros(4, 64)
        sketch("sparse", again, x, 4, 0, native.variant())
        os._exit(0 if torch.equal(again, out) else 1)
    assert os.waitpid(child, 0)[1] == 0
