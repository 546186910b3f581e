"""The projectors around fast_jl, with a stand-in for it, and their chunks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.contracts.projector_contract import ProjectorContract, gradients
from trak.errors import BackendError, OptionError
from trak.projectors import (
    AbstractProjector,
    BasicProjector,
    BasicSingleBlockProjector,
    ChunkedCudaProjector,
    CudaProjector,
    SparseProjector,
    _cuda,
)


class TestChunked(ProjectorContract):
    def make(self, seed: int = 0) -> AbstractProjector:
        sizes = [10, 10, 10, 10, 10, 7]
        chunks = [
            BasicProjector(k, self.proj_dim, seed * 100 + i, "rademacher", "cpu")
            for i, k in enumerate(sizes)
        ]
        return ChunkedCudaProjector(chunks, 10, sizes, 8, "cpu", torch.float32)


def chunked(sizes: list[int], max_chunk_size: int = 50) -> ChunkedCudaProjector:
    chunks = [SparseProjector(k, 8, seed) for seed, k in enumerate(sizes)]
    return ChunkedCudaProjector(chunks, max_chunk_size, sizes, 2, "cpu", torch.float32)


def test_chunks_cut_through_parameters() -> None:
    x = gradients(5, 60)
    named = {"a": x[:, :3], "big": x[:, 3:50].reshape(5, 47, 1), "c": x[:, 50:]}
    expected = sum(
        SparseProjector(k, 8, seed).project(x[:, lo : lo + k], model_id=1)
        for seed, (lo, k) in enumerate(((0, 20), (20, 25), (45, 15)))
    )
    projector = chunked([20, 25, 15])
    torch.testing.assert_close(projector.project(named, model_id=1), expected)
    torch.testing.assert_close(projector.project(x, model_id=1), expected)
    assert projector.grad_dim == 60
    assert projector.describe() == (
        "chunks: 20 of trak-1/sparse nonzeros=4 proj_dim=8 seed=0; "
        "25 of trak-1/sparse nonzeros=4 proj_dim=8 seed=1; "
        "15 of trak-1/sparse nonzeros=4 proj_dim=8 seed=2"
    )


def test_chunks_that_do_not_fit() -> None:
    with pytest.raises(OptionError, match="got 0 projectors for 0 chunks"):
        chunked([])
    with pytest.raises(OptionError, match=r"max_chunk_size=50 columns, got \[51\]"):
        chunked([51])
    same = [SparseProjector(5, 8), SparseProjector(5, 8)]
    with pytest.raises(OptionError, match=r"different seeds.*got \[0, 0\]"):
        ChunkedCudaProjector(same, 5, [5, 5], 2, "cpu", torch.float32)
    wide = [SparseProjector(5, 8), SparseProjector(5, 9, 1)]
    with pytest.raises(OptionError, match=r"share one proj_dim, got \[8, 9\]"):
        ChunkedCudaProjector(wide, 5, [5, 5], 2, "cpu", torch.float32)
    with pytest.raises(OptionError, match="feat_bs must be at least 1, got 0"):
        ChunkedCudaProjector(same[:1], 5, [5], 0, "cpu", torch.float32)


def fake_fast_jl(
    spoil: Callable[[Tensor], Tensor] = lambda sketch: sketch,
) -> SimpleNamespace:
    """A stand-in that rounds to float16 and takes full launches only, as the real one."""
    calls: list[int] = []

    def launch(law: str, width: int) -> Callable[..., Tensor]:
        def project(x: Tensor, p: int, seed: int, multiprocessors: int) -> Tensor:
            assert x.shape[0] == width
            assert x.is_contiguous()
            assert x.dtype == torch.float32
            assert 0 <= seed < 2**32
            assert multiprocessors == 4
            calls.append(width)
            make = BasicSingleBlockProjector(x.shape[1], p, seed, law, "cpu")
            return spoil(make.project(x.half().float(), model_id=0))

        return project

    functions = {
        f"project_{law}_{width}": launch(law, width)
        for law in ("normal", "rademacher")
        for width in (8, 16, 32)
    }
    return SimpleNamespace(calls=calls, **functions)


Install = Callable[..., SimpleNamespace]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a stand-in for fast_jl, and let it run on the CPU."""

    def run(
        spoil: Callable[[Tensor], Tensor] = lambda sketch: sketch,
    ) -> SimpleNamespace:
        module = fake_fast_jl(spoil)
        monkeypatch.setitem(sys.modules, "fast_jl", module)  # type: ignore[arg-type]
        monkeypatch.setattr(_cuda, "_require_cuda", torch.device)
        monkeypatch.setattr(_cuda, "_multiprocessors", lambda device: 4)
        monkeypatch.setattr(_cuda, "_PROBE_COLUMNS", 259)
        return module

    return run


class TestCuda(ProjectorContract):
    proj_dim = 512
    # The stand-in rounds the gradients to float16.
    rtol = 1e-2
    atol = 0.3

    @pytest.fixture(autouse=True)
    def _installed(self, install: Install) -> None:
        install()

    def make(self, seed: int = 0) -> AbstractProjector:
        return CudaProjector(
            self.grad_dim,
            self.proj_dim,
            seed,
            "normal",
            "cpu",
            16,
            dtype=torch.float16,
        )


def cuda(max_batch_size: int = 32, p: int = 512) -> CudaProjector:
    return CudaProjector(30, p, 0, "rademacher", "cpu", max_batch_size)


def test_fast_jl_launches(install: Install) -> None:
    module = install()
    projector = cuda()
    module.calls.clear()
    for b in (1, 8, 9, 17, 32, 41):
        projector.project(gradients(b, 30), model_id=0)
    assert module.calls == [8, 8, 16, 32, 32, 32, 16]
    module.calls.clear()
    cuda(max_batch_size=20).project(gradients(20, 30), model_id=0)
    assert module.calls[-2:] == [16, 8]
    assert projector.describe() == (
        "fast_jl/rademacher proj_dim=512 seed=0 multiprocessors=4"
    )


def test_fast_jl_keeps_scales_that_float16_cannot(install: Install) -> None:
    install()
    projector = cuda()
    x = gradients(4, 30)
    scale = torch.tensor([[2.0**-100], [1.0], [2.0**100], [0.0]])
    torch.testing.assert_close(
        projector.project(x * scale, model_id=0),
        projector.project(x, model_id=0) * scale,
    )
    ones = torch.ones(1, 30)
    torch.testing.assert_close(
        projector.project(ones * 2.0**-140, model_id=0),
        projector.project(ones, model_id=0) * 2.0**-140,
        rtol=1e-5,
        atol=0,
    )
    x[0, 0] = torch.inf
    out = projector.project(x, model_id=0)
    assert not bool(out[0].isfinite().any())
    assert bool(out[1:].isfinite().all())


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (torch.zeros_like, "returned only zeros"),
        (lambda sketch: sketch * torch.nan, "values that are not finite"),
        (lambda sketch: sketch * 2, "projections of the wrong norm"),
        (lambda sketch: sketch + torch.rand(()), "two results for one input"),
        (lambda sketch: sketch.roll(len(sketch), 1), "depends on the batch"),
    ],
)
def test_fast_jl_proves_itself(
    install: Install, spoil: Callable[[Tensor], Tensor], match: str
) -> None:
    install(spoil)
    with pytest.raises(BackendError, match=f"fast_jl .*{match}.*use SparseProjector"):
        cuda()


def test_fast_jl_that_cannot_launch(install: Install) -> None:
    module = install()
    projector = cuda()

    def refuse(*args: object) -> Tensor:
        raise RuntimeError("CUDA error: too many resources requested for launch")

    def fail(*args: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    module.project_rademacher_32 = refuse
    with pytest.raises(BackendError, match=r"for 32 rows.*max_batch_size below 32"):
        projector.project(gradients(32, 30), model_id=0)
    module.project_rademacher_32 = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        projector.project(gradients(32, 30), model_id=0)


def test_fast_jl_options(install: Install) -> None:
    install()
    with pytest.raises(OptionError, match="a multiple of 512, got 100"):
        cuda(p=100)
    with pytest.raises(OptionError, match="max_batch_size must be at least 8, got 4"):
        cuda(max_batch_size=4)
    with pytest.raises(OptionError, match="one of 'normal', 'rademacher' here"):
        CudaProjector(30, 512, 0, "sparse", "cpu", 8)


def test_fast_jl_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device, got 'cpu'"):
        cuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="which this torch cannot use here"):
        CudaProjector(30, 512, 0, "normal", "cuda", 8)


def test_fast_jl_missing(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setitem(sys.modules, "fast_jl", None)  # type: ignore[arg-type]
    with pytest.raises(ModuleNotFoundError, match="or use SparseProjector"):
        cuda()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.cuda
@needs_cuda
def test_fast_jl_on_cuda() -> None:
    pytest.importorskip("fast_jl")
    projector = CudaProjector(5000, 512, 0, "rademacher", "cuda", 32)
    x = gradients(41, 5000).cuda()
    out = projector.project(x, model_id=0)
    ratio = out.square().sum(1) / (512 * x.square().sum(1))
    assert bool(((ratio - 1).abs() < 0.5).all())
