"""The helpers of ``trak.utils``, and the check of an installation."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.compat.problem import D, network
from trak import utils
from trak.errors import BackendError, OptionError


def test_parameters_to_vector() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    vector = utils.parameters_to_vector([base.T, torch.zeros(())])
    assert vector.tolist() == [0, 3, 1, 4, 2, 5, 0]


def test_get_num_params() -> None:
    model = network()
    assert utils.get_num_params(model) == D
    model[2].requires_grad_(False)
    assert utils.get_num_params(model) == D


def test_is_not_buffer() -> None:
    names = ["0.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    found = [utils.is_not_buffer(i, names) for i in range(len(names))]
    assert found == [True, False, False, False]
    assert utils.is_not_buffer(7, {7: "bias"})


@pytest.mark.parametrize("b", [0, 1, 3])
def test_vectorize(b: int) -> None:
    grads = {
        "w": torch.arange(b * 4.0).reshape(b, 2, 2),
        "scalar": torch.arange(float(b)),
    }
    expected = torch.cat([grads["w"].reshape(b, 4), grads["scalar"][:, None]], dim=1)
    torch.testing.assert_close(utils.vectorize(grads, device="cpu"), expected)
    out = torch.full((b, 5), -1.0)
    found = utils.vectorize(grads, out)
    assert found is out
    torch.testing.assert_close(out, expected)


def test_get_output_memory() -> None:
    features, targets = torch.ones(3, 2), torch.ones(5, 2)
    assert utils.get_output_memory(features, targets, torch.float16) == 30
    assert utils.get_output_memory(features, targets, torch.float32) == 60


def test_get_free_memory() -> None:
    assert utils.get_free_memory("cpu") > 0
    assert utils.get_free_memory(torch.device("cpu")) > 0


def test_get_free_memory_where_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sysconf")  # as on Windows
    assert utils.get_free_memory("cpu") == 0
    product = utils.get_matrix_mult(torch.ones(3, 2), torch.ones(4, 2), batch_size=2)
    torch.testing.assert_close(product, torch.full((3, 4), 2.0))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64])
@pytest.mark.parametrize("use_blockwise", [False, True])
def test_get_matrix_mult(dtype: torch.dtype | None, use_blockwise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 4, generator=generator)
    targets = torch.randn(5, 4, generator=generator)
    found = utils.get_matrix_mult(features, targets, dtype, 3, use_blockwise)
    assert found.dtype == (dtype or torch.float32)
    expected = features.double() @ targets.double().T
    tolerance = 1e-2 if dtype is torch.float16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bs", [1, 2, 3, 5, 7, 100])
def test_get_matrix_mult_blockwise(bs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 4, generator=generator)
    targets = torch.randn(5, 4, generator=generator)
    found = utils.get_matrix_mult_blockwise(features, targets, torch.float32, bs)
    whole = utils.get_matrix_mult_standard(features, targets, torch.float32)
    torch.testing.assert_close(found, whole)


def test_blocks_have_a_size() -> None:
    rows = torch.ones(2, 2)
    with pytest.raises(OptionError, match="bs must be at least 1; got 0"):
        utils.get_matrix_mult_blockwise(rows, rows, torch.float32, 0)


def test_get_parameter_chunk_sizes() -> None:
    model = network()
    most, groups = utils.get_parameter_chunk_sizes(model, 32)
    assert most == (2**32 - 1) // 32
    assert groups == [D]
    most, groups = utils.get_parameter_chunk_sizes(model, (2**32 - 1) // 30)
    assert most == 30
    assert groups == [28, 15]


@pytest.mark.parametrize("use_fast_jl", [None, False])
def test_an_installation_without_fast_jl(
    use_fast_jl: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    utils.test_install(use_fast_jl=use_fast_jl)
    printed = capsys.readouterr().out
    assert "SparseProjector on cpu" in printed
    assert "installed correctly" in printed
    assert "fast_jl" in printed


@pytest.mark.skipif(
    torch.cuda.is_available() and importlib.util.find_spec("fast_jl") is not None,
    reason="fast_jl runs here",
)
def test_fast_jl_that_was_asked_for_must_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(BackendError, match="fast_jl was asked for"):
        utils.test_install(use_fast_jl=True)
    assert "installed correctly" not in capsys.readouterr().out
