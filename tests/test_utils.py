"""The helper names of 0.3.2, and the installation check."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.problems import draw, mlp
from trak import utils
from trak._kernels.native import Variant
from trak.errors import BackendError, BatchError, OptionError
from trak.utils import (
    get_free_memory,
    get_matrix_mult,
    get_matrix_mult_blockwise,
    get_matrix_mult_standard,
    get_num_params,
    get_output_memory,
    get_parameter_chunk_sizes,
    is_not_buffer,
    parameters_to_vector,
    test_install,
    vectorize,
)


def test_vectors() -> None:
    tensors = [draw(2, 3).T, draw(1)]
    assert parameters_to_vector(tensors).shape == (7,)
    torch.testing.assert_close(parameters_to_vector(tensors)[:2], tensors[0][0])
    assert get_num_params(mlp()) == 43


def test_buffers() -> None:
    names = ["conv.weight", "norm.running_mean", "norm.num_batches_tracked"]
    assert [is_not_buffer(i, names) for i in range(3)] == [True, False, False]
    assert is_not_buffer(0, dict(enumerate(names)))


@pytest.mark.parametrize("b", [0, 1, 3])
def test_vectorize(b: int) -> None:
    grads = {"a": draw(b, 2, 2), "b": draw(b)}
    rows = vectorize(grads)
    assert rows.shape == (b, 5)
    into = torch.zeros(b, 5, dtype=torch.float64)
    assert vectorize(grads, into) is into
    torch.testing.assert_close(into, rows)
    assert vectorize(grads, device="cpu").device.type == "cpu"
    with pytest.raises(BatchError, match=r"arr has shape .*, 4\), the gradients"):
        vectorize(grads, torch.zeros(b, 4, dtype=torch.float64))


@pytest.mark.parametrize(("n", "m"), [(0, 2), (1, 1), (5, 3)])
def test_products(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(n, 4).half(), draw(m, 4, seed=1).half()
    expected = x.double() @ y.double().T
    for found in (
        get_matrix_mult(x, y, torch.float32),
        get_matrix_mult(x, y, torch.float32, 2, True),
        get_matrix_mult_standard(x, y, torch.float32),
        get_matrix_mult_blockwise(x, y, torch.float32, 2),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert get_matrix_mult(x, y).dtype == torch.float16
    monkeypatch.setattr(utils, "get_free_memory", lambda device: -1)
    torch.testing.assert_close(
        get_matrix_mult(x, y, torch.float32, 2).double(), expected, rtol=1e-6, atol=1e-6
    )
    with pytest.raises(OptionError, match="bs must be at least 1; got 0"):
        get_matrix_mult_blockwise(x, y, torch.float32, 0)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_output_memory(draw(3, 2), draw(5, 2), torch.float64) == 120
    assert get_free_memory("cpu") > 0
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (7, 9))
    assert get_free_memory(torch.device("cuda")) == 7


def test_chunks() -> None:
    most, groups = get_parameter_chunk_sizes(mlp(), (2**32 - 1) // 30)
    assert most == 30
    assert groups == [25, 18]
    assert get_parameter_chunk_sizes(mlp(), 2**31)[1] == [20, 5, 15, 3]


def test_the_installation_check(capsys: pytest.CaptureFixture[str]) -> None:
    test_install()
    told = capsys.readouterr().out
    assert "SparseProjector on cpu:" in told
    assert "BasicProjector on cpu:" in told
    assert "native kernels: " in told
    assert "triton kernels: " in told
    assert told.rstrip().endswith("trak is installed correctly.")


def test_the_back_ends_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(utils, "problem", lambda backend, device: None)
    monkeypatch.setattr("trak._kernels.native.variant", lambda: Variant.avx2)
    utils._print_backends(["cpu", "cuda"])
    told = capsys.readouterr().out
    assert "native kernels: ready on cpu, avx2 instructions" in told
    assert "triton kernels: ready on cuda" in told
    monkeypatch.setattr(utils, "problem", lambda backend, device: "they are not")
    utils._print_backends(["cpu"])
    told = capsys.readouterr().out
    assert "native kernels: not used (they are not)" in told
    assert "triton kernels: not used (there is no cuda device)" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="fast_jl may run here")
def test_a_missing_kernel_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    test_install(use_fast_jl=False)
    assert "fast_jl: not used (" in capsys.readouterr().out
    with pytest.raises(BackendError, match="fast_jl was asked for and cannot run"):
        test_install(use_fast_jl=True)


def test_a_kernel_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(utils, "CudaProjector", lambda *arguments: None)
    test_install(use_fast_jl=True)
    assert "fast_jl on cuda: ran" in capsys.readouterr().out


def test_an_installation_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = torch.linalg.solve

    def wrong(*arguments: Any) -> Any:
        return 1.01 * solve(*arguments)

    monkeypatch.setattr("torch.linalg.solve", wrong)
    with pytest.raises(BackendError, match="does not compute correctly"):
        test_install()
