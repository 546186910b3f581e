"""Exact products, damped solves and half-precision rows."""

from __future__ import annotations

import pytest
import torch

from tests.problems import assert_scores, draw
from trak._linalg import (
    Kernel,
    add_product,
    damp,
    decode_half,
    encode_half,
    is_finite,
    mean_eigenvalue,
    product,
    pseudo_inverse,
    scale_rows,
    spans,
)
from trak.errors import SingularKernelError


@pytest.mark.parametrize(("total", "step"), [(0, 3), (1, 3), (6, 3), (7, 3), (5, 1)])
def test_spans_cover_a_range_once(total: int, step: int) -> None:
    pieces = [i for low, high in spans(total, step) for i in range(low, high)]
    assert pieces == list(range(total))
    assert all(0 < high - low <= step for low, high in spans(total, step))


class TestKernels:
    def test_solving(self) -> None:
        x = draw(6, 4)
        kernel, right = x.T @ x, draw(4, 2, seed=1)
        damped = damp(kernel, 0.5)
        expected = torch.linalg.solve(kernel + 0.5 * torch.eye(4).double(), right)
        torch.testing.assert_close(damped.solve(right), expected)
        torch.testing.assert_close(
            damped.solve(right.float()), expected, rtol=1e-5, atol=1e-5
        )
        assert isinstance(damped, Kernel)

    def test_condition_number(self) -> None:
        x = draw(20, 6)
        kernel = x.T @ x
        values = torch.linalg.eigvalsh(kernel + 0.1 * torch.eye(6).double())
        estimate = damp(kernel, 0.1).condition
        # Thirty steps of power iteration give the order of magnitude.
        assert float(estimate) == pytest.approx(float(values[-1] / values[0]), rel=0.1)

    @pytest.mark.parametrize("ridge", [0.0, 1e-12])
    def test_kernels_that_rounding_decides(self, ridge: float) -> None:
        x = draw(6, 4)
        x[:, 3] = x[:, 2]
        with pytest.raises(
            SingularKernelError, match=r"4 x 4 kernel .* Use lambda_reg='auto'"
        ):
            damp(x.T @ x, ridge)

    def test_indefinite_kernels(self) -> None:
        with pytest.raises(SingularKernelError, match="condition number is inf"):
            damp(-torch.eye(3).double(), 0.0)

    def test_kernels_with_nan(self) -> None:
        with pytest.raises(SingularKernelError, match="condition number is"):
            damp(torch.full((2, 2), torch.nan).double(), 1.0)

    def test_undamped_limit(self) -> None:
        x, right = draw(6, 4), draw(4, 2, seed=1)
        x[:, 3] = x[:, 2]
        kernel = x.T @ x
        undamped = pseudo_inverse(kernel)
        expected = torch.linalg.pinv(kernel, hermitian=True, rtol=1e-9) @ right
        torch.testing.assert_close(undamped.solve(right), expected)
        assert undamped.ridge == 0
        values = torch.linalg.eigvalsh(kernel)
        assert undamped.condition == pytest.approx(float(values[-1] / values[1]))
        assert isinstance(undamped, Kernel)

    def test_undamped_limit_of_damping(self) -> None:
        x, phi = draw(5, 9), draw(9, 2, seed=1)
        kernel = x @ x.T
        near = damp(kernel, 1e-6).solve(x @ phi)
        torch.testing.assert_close(
            pseudo_inverse(kernel).solve(x @ phi), near, rtol=1e-4, atol=1e-4
        )

    def test_mean_eigenvalue(self) -> None:
        x = draw(6, 4)
        expected = float(torch.linalg.eigvalsh(x.T @ x).mean())
        assert mean_eigenvalue(x.T @ x) == pytest.approx(expected)


class TestHalf:
    @pytest.mark.parametrize("b", [0, 1, 3])
    @pytest.mark.parametrize("p", [0, 1, 5])
    @pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e4, 1e30])
    def test_rounds_by_one_part_in_two_thousand(
        self, b: int, p: int, scale: float
    ) -> None:
        rows = (draw(b, p) * scale).float()
        half, exponent = encode_half(rows)
        error = (decode_half(half, exponent) - rows).abs()
        peak = rows.abs().amax(1, keepdim=True) if p else rows.sum(1, keepdim=True)
        assert bool((error <= 2.0**-11 * rows.abs() + 2.0**-23 * peak).all())

    def test_ordinary_rows_are_stored_as_they_are(self) -> None:
        rows = torch.tensor([
            [1.5, -3.25],
            [2.0**-10, 0.0],
            [2.0**15 - 16, 0.0],
            [0.0, 0.0],
        ])
        half, exponent = encode_half(rows)
        assert exponent.tolist() == [0, 0, 0, 0]
        torch.testing.assert_close(half.float(), rows, rtol=0, atol=0)

    @pytest.mark.parametrize("value", [3.4e38, 1.2e-38, 1e-44])
    def test_ends_of_the_range(self, value: float) -> None:
        rows = torch.tensor([[value, -value / 3]])
        decoded = decode_half(*encode_half(rows))
        torch.testing.assert_close(decoded, rows, rtol=2.0**-11, atol=2.0**-149)


def test_scores_compare_by_their_largest() -> None:
    with pytest.raises(AssertionError):
        assert_scores(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-2]), 1e-3)


@pytest.mark.parametrize("newer", [False, True])
def test_products_are_exact_where_fast_ones_were_asked_for(newer: bool) -> None:
    left = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    try:
        if newer:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision("medium")
        exact = product(left, left.T)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)
    expected = left.double() @ left.double().T
    torch.testing.assert_close(exact.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_products_are_added(wide: torch.dtype, narrow: bool) -> None:
    left, right, total = draw(3, 5), draw(5, 2, seed=1), draw(3, 2, seed=2)
    found = total.to(wide, copy=True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if narrow else "highest")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            add_product(found, left.float(), right.T.contiguous().T.float())
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(
        found, (total + left @ right).to(wide), rtol=1e-5, atol=1e-5
    )


def test_sums_that_overflow_are_not_mistaken_for_entries_that_did() -> None:
    assert is_finite(torch.full((2, 2), 3e38))
    for bad in (torch.inf, -torch.inf, torch.nan):
        assert not is_finite(torch.tensor([[1.0, bad]]))
    assert is_finite(torch.zeros(0, 3))


@pytest.mark.parametrize("kernel", [0.0, 0.5, "pinv"])
def test_roots_of_inverses(kernel: float | str) -> None:
    x = draw(9, 4)
    gram = x.T @ x
    fitted = pseudo_inverse(gram) if kernel == "pinv" else damp(gram, kernel)
    root = fitted.root()
    torch.testing.assert_close(root @ root.T, fitted.solve(torch.eye(4).double()))
    if kernel != "pinv":
        assert torch.equal(root, root.triu())


def test_conditions_near_the_bound_are_looked_at_closely() -> None:
    # The trace says 16 * 4e4, times rounding below 1; the ridge of 1e-4 is 1e-8 of it.
    kernel = torch.eye(4).double() * 1e4
    assert damp(kernel, 1e-4).condition == pytest.approx(1.0)
    kernel[0, 0] = 0
    with pytest.raises(SingularKernelError, match=r"condition number is 1.0e\+08"):
        damp(kernel, 1e-4)


@pytest.mark.parametrize("exponent", [-149, -127, -60, 0, 60, 127, 128])
def test_rows_are_scaled_by_powers_of_two(exponent: int) -> None:
    rows = draw(3, 5).float() * 2.0 ** (-exponent // 2)
    expected = torch.ldexp(rows.double(), torch.tensor(exponent)).float()
    scale_rows(rows, torch.full((3,), exponent))
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)
