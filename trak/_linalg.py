"""Gram matrices, damped solves, half-precision rows and streaming top-k.

Pure tensor functions: what they read comes through a callable, what they make is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Float16, Float32, Float64, Int16, Int64
from torch import Tensor

from trak.errors import SingularKernelError

RowReader: TypeAlias = Callable[[int, int], Tensor]
"""``read(low, high)`` gives rows ``low..high`` of X as float32, on the working device."""

TILE = 1 << 24
"""Entries of a working tile: 64 MiB in float32."""

FLOAT32_ROUNDING = 2.0**-24
"""Relative size of what float32 products round away."""


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut ``range(total)`` into consecutive ``(low, high)`` pieces of at most ``step``.

    Yields:
        The bounds of each piece.

    Example:
        >>> list(spans(5, 2))
        [(0, 2), (2, 4), (4, 5)]
    """
    for low in range(0, total, step):
        yield low, min(low + step, total)


def product(
    left: Float[Tensor, "i k"], right: Float[Tensor, "k j"]
) -> Float[Tensor, "i j"]:
    """Multiply two matrices in their own type, whatever a caller set for speed.

    Autocast is left out, and where float32 products may use TensorFloat-32 or bfloat16
    they are made in float64: no switch of the process is touched.

    Args:
        left: Left matrix. Shape ``(i, k)``.
        right: Right matrix, of the same type. Shape ``(k, j)``.

    Returns:
        The product, in that type. Shape ``(i, j)``.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     product(torch.tensor([[1.001]]), torch.eye(1))
        tensor([[1.0010]])
    """
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype == torch.float32 and _products_are_narrow(left.device.type):
            return (left.double() @ right.double()).float()
        return left @ right


def _products_are_narrow(device_type: str) -> bool:
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    matmul = getattr(backend, "matmul", None)
    try:
        narrow = torch.get_float32_matmul_precision() != "highest"
    except (
        RuntimeError
    ):  # torch 2.13 cannot tell where newer and older switches are set
        narrow = True
    return narrow or getattr(matmul, "fp32_precision", "none") not in {"ieee", "none"}


def gram(read: RowReader, n: int, p: int) -> Float64[Tensor, "q q"]:
    r"""Sum the smaller Gram matrix of the features, in float32 blocks, into float64.

    Args:
        read: Reads rows of :math:`X`. Shape ``(n, p)``.
        n: Number of rows.
        p: Number of columns.

    Returns:
        :math:`X X^\top` where ``n <= p``, else :math:`X^\top X`; ``q = min(n, p)``.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0]])
        >>> gram(lambda low, high: rows[low:high], n=2, p=1)
        tensor([[5.]], dtype=torch.float64)
    """
    step = max(1, TILE // p)
    if n > p:
        total: Tensor | None = None
        for low, high in spans(n, step):
            rows = read(low, high)
            part = product(rows.T, rows).double()
            total = part if total is None else total.add_(part)
        return total if total is not None else torch.zeros(p, p, dtype=torch.float64)
    kernel: Tensor | None = None
    for low, high in spans(n, step):
        left = read(low, high)
        if kernel is None:
            kernel = torch.zeros(n, n, dtype=torch.float64, device=left.device)
        for start, stop in spans(high, step):
            right = left if start == low else read(start, stop)
            block = _outer(left, right)
            kernel[low:high, start:stop] = block
            kernel[start:stop, low:high] = block.T
    return kernel if kernel is not None else torch.zeros(0, 0, dtype=torch.float64)


def _outer(
    left: Float[Tensor, "i p"], right: Float[Tensor, "j p"]
) -> Float64[Tensor, "i j"]:
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for low, high in spans(left.shape[1], 4096):
        total += product(left[:, low:high], right[:, low:high].T)
    return total


@runtime_checkable
class Kernel(Protocol):
    """A damped Gram matrix that can be solved with."""

    @property
    def ridge(self) -> float:
        """The penalty added to the diagonal."""

    @property
    def condition(self) -> float:
        """The condition number, estimated."""

    def solve(self, right: Float[Tensor, "q k"]) -> Float64[Tensor, "q k"]:
        """Apply the inverse, in float64."""


@dataclass(frozen=True, slots=True)
class CholeskyKernel:
    """A damped Gram matrix, factored."""

    factor: Float64[Tensor, "q q"]
    """Its lower Cholesky factor."""

    ridge: float
    """The penalty on its diagonal."""

    condition: float
    """Its condition number, from power and inverse iteration."""

    def solve(self, right: Float[Tensor, "q k"]) -> Float64[Tensor, "q k"]:
        """Apply the inverse, in float64."""
        return torch.cholesky_solve(right.double(), self.factor)


@dataclass(frozen=True, slots=True)
class PseudoInverseKernel:
    """An undamped Gram matrix, inverted on its range only."""

    vectors: Float64[Tensor, "q r"]
    """Eigenvectors of the ``r`` eigenvalues above rounding."""

    values: Float64[Tensor, " r"]
    """Those eigenvalues."""

    @property
    def ridge(self) -> float:
        """No penalty."""
        return 0.0

    @property
    def condition(self) -> float:
        """Ratio of the largest to the smallest eigenvalue that is kept."""
        return float(self.values.max() / self.values.min())

    def solve(self, right: Float[Tensor, "q k"]) -> Float64[Tensor, "q k"]:
        """Apply the pseudo-inverse, in float64."""
        return self.vectors @ ((self.vectors.T @ right.double()) / self.values[:, None])


def mean_eigenvalue(kernel: Float64[Tensor, "q q"]) -> float:
    """Average the eigenvalues of a Gram matrix: its trace over its size."""
    return float(kernel.diagonal().mean())


def damp(kernel: Float64[Tensor, "q q"], ridge: float) -> CholeskyKernel:
    r"""Factor a Gram matrix with a penalty on its diagonal.

    Args:
        kernel: Gram matrix. Shape ``(q, q)``, float64.
        ridge: Penalty :math:`\lambda \ge 0`, in the units of the diagonal.

    Returns:
        The factored :math:`K + \lambda I`.

    Raises:
        SingularKernelError: If it is not positive definite, or so badly conditioned
            that what float32 rounded away in the Gram matrix decides the result.

    Example:
        >>> damp(torch.eye(2, dtype=torch.float64), 1.0).solve(torch.ones(2, 1))
        tensor([[0.5000],
                [0.5000]], dtype=torch.float64)
    """
    q = len(kernel)
    damped = kernel.clone()
    damped.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(damped)
    condition = float("inf") if bool(info) else _condition(damped, factor)
    if not condition * FLOAT32_ROUNDING < 1.0:
        raise SingularKernelError(
            f"The {q} x {q} kernel of the features cannot be inverted with a ridge of "
            f"{ridge:g}: its condition number is {condition:.1e}, and above "
            f"{1 / FLOAT32_ROUNDING:.1e} rounding decides the scores. Use "
            f"lambda_reg='auto', a larger lambda_reg, or 'pinv' for the undamped limit."
        )
    return CholeskyKernel(factor, ridge, condition)


def pseudo_inverse(kernel: Float64[Tensor, "q q"]) -> PseudoInverseKernel:
    """Invert a Gram matrix on the eigenvalues that are above float32 rounding.

    Args:
        kernel: Gram matrix, not zero. Shape ``(q, q)``, float64.

    Returns:
        The undamped limit of :func:`damp`.
    """
    values, vectors = torch.linalg.eigh(kernel)
    keep = values > 4 * FLOAT32_ROUNDING * values[-1]
    return PseudoInverseKernel(vectors[:, keep], values[keep])


def _condition(matrix: Float64[Tensor, "q q"], factor: Float64[Tensor, "q q"]) -> float:
    start = torch.arange(len(matrix), dtype=torch.float64, device=matrix.device).cos()
    largest = _power(lambda x: matrix @ x, start)
    inverse = _power(lambda x: torch.cholesky_solve(x[:, None], factor)[:, 0], start)
    return largest * inverse


def _power(apply: Callable[[Tensor], Tensor], vector: Tensor) -> float:
    norm = vector.norm()
    for _ in range(30):
        vector = apply(vector / norm)
        norm = vector.norm()
    return float(norm)


def encode_half(
    rows: Float[Tensor, "b p"],
) -> tuple[Float16[Tensor, "b p"], Int16[Tensor, " b"]]:
    """Round rows to half precision, each with a power of two where its range needs one.

    Args:
        rows: Finite rows. Shape ``(b, p)``.

    Returns:
        The rows in float16, and the exponents: a row is ``half * 2**exponent``. The
        exponent is 0 wherever the row's largest entry is between 2**-10 and 2**15, so
        ordinary rows are stored as they are.

    Example:
        >>> encode_half(torch.tensor([[3.0, 0.0], [3e-8, 0.0]]))[1]
        tensor([  0, -24], dtype=torch.int16)
    """
    wide = rows.double()
    peak = wide.abs().amax(dim=1) if rows.shape[1] else wide.new_zeros(len(rows))
    exponent = torch.frexp(peak).exponent
    fits = (peak == 0) | ((peak >= 2.0**-10) & (peak < 2.0**15))
    exponent = exponent.masked_fill(fits, 0)
    half = torch.ldexp(wide, -exponent[:, None]).half()
    return half, exponent.short()


def decode_half(
    half: Float16[Tensor, "b p"], exponent: Int16[Tensor, " b"]
) -> Float32[Tensor, "b p"]:
    """Undo :func:`encode_half`, up to its rounding."""
    scaled = half.float()
    if bool(exponent.any()):
        scaled = torch.ldexp(scaled.double(), exponent[:, None]).float()
    return scaled


class TopK:
    """The k best of every column of a matrix that arrives in blocks of rows."""

    def __init__(self, k: int, columns: int, *, largest: bool = True) -> None:
        self._k = k
        self._sign = 1.0 if largest else -1.0
        self.values: Float32[Tensor, "k m"] = torch.empty(
            0, columns, dtype=torch.float32, device="cpu"
        )
        self.indices: Int64[Tensor, "k m"] = torch.empty(
            0, columns, dtype=torch.int64, device="cpu"
        )

    def update(self, block: Float[Tensor, "rows m"], first_row: int) -> None:
        """Take the next rows into account.

        Args:
            block: Consecutive rows. Shape ``(rows, m)``.
            first_row: The matrix row that the block begins with.
        """
        block = block.float().cpu()
        rows = torch.arange(first_row, first_row + len(block), device="cpu")
        values = torch.cat([self.values, block])
        indices = torch.cat([self.indices, rows[:, None].expand(block.shape)])
        k = min(self._k, len(values))
        order = (values * self._sign).topk(k, dim=0).indices
        self.values = values.gather(0, order)
        self.indices = indices.gather(0, order)
