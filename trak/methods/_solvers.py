"""Inverses and eigenpairs of symmetric operators that are only known by their products.

An operator maps rows to rows, ``(k, d) -> (k, d)``: as many products at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trak._linalg import spans
from trak.errors import ConvergenceError

Operator = Callable[[Float[Tensor, "k d"]], Float[Tensor, "k d"]]
"""A symmetric operator, applied to every row."""

_SLACK = 1.01  # of a bound on LiSSA's series: products are rounded
_EXCURSION = 10.0  # before its end, as one batch may be too large and the next ones not
_COLUMNS = 1 << 16  # of a basis that are rotated at once: bounds a temporary


@dataclass(frozen=True, slots=True)
class Solution:
    """What an iterative solver found, and how good it is."""

    rows: Float[Tensor, "k d"]
    """The solutions, one a row. Shape ``(k, d)``."""

    iterations: int
    """Steps of all rows at a time, each with one product."""

    residuals: Float[Tensor, " k"]
    """``|A x - b| / |b|``, of the solutions themselves. Shape ``(k,)``."""


def conjugate_gradients(
    operator: Operator,
    right: Float[Tensor, "k d"],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
) -> Solution:
    r"""Solve :math:`A x = b` for several right sides at a time (Hestenes & Stiefel, 1952).

    Every row has its own recurrence and only the products are shared, so a row's answer
    does not depend on the others.

    Args:
        operator: The products with a positive definite :math:`A`.
        right: The right sides :math:`b`, one a row. Shape ``(k, d)``.
        tolerance: Share of ``|b|`` that the residual has to come down to.
        max_iterations: Steps after which to stop, converged or not.

    Returns:
        The solutions, in the dtype and on the device of ``right``.

    Raises:
        ConvergenceError: If :math:`A` turns out not to be positive definite.

    Example:
        >>> half = conjugate_gradients(lambda rows: 2 * rows, torch.tensor([[4.0, 6.0]]))
        >>> half.rows, half.iterations
        (tensor([[2., 3.]]), 1)
    """
    solution = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    scale = _dots(right, right)
    left = scale.clone()
    iterations = 0
    while iterations < max_iterations and bool((left > tolerance**2 * scale).any()):
        iterations += 1
        active = left > tolerance**2 * scale
        product = operator(direction)
        bend = _dots(direction, product)
        if bool((active & ~(bend > 0)).any()):
            row = int((active & ~(bend > 0)).nonzero()[0])
            raise ConvergenceError(
                f"conjugate gradients met the curvature "
                f"{float(bend[row] / _dots(direction, direction)[row]):.2g} after "
                f"{iterations} iterations, and need a positive one; pass a larger "
                f"damping, or curvature='ggn'."
            )
        step = torch.where(active, left / torch.where(active, bend, 1.0), 0.0)
        solution += step.to(right.dtype)[:, None] * direction
        residual -= step.to(right.dtype)[:, None] * product
        before, left = left, torch.where(active, _dots(residual, residual), left)
        turn = torch.where(active, left / torch.where(active, before, 1.0), 0.0)
        direction = residual + turn.to(right.dtype)[:, None] * direction
    if iterations:  # the recurrence's residual is another by what is rounded in it
        residual = operator(solution) - right
        left = _dots(residual, residual)
    shares = (left / torch.where(scale > 0, scale, 1.0)).sqrt()
    return Solution(solution, iterations, shares)


def lissa(
    operators: Iterator[Operator],
    right: Float[Tensor, "k d"],
    *,
    damping: float,
    scale: float,
    depth: int,
) -> Float[Tensor, "k d"]:
    r"""Estimate :math:`(H + \lambda I)^{-1} b` by a series of noisy products.

    .. math:: s_t = b + \Big(I - \frac{H_t + \lambda I}{\sigma}\Big) s_{t-1},
        \qquad (H + \lambda I)^{-1} b \approx \frac{s_T}{\sigma}

    with :math:`H_t` of one batch (Agarwal et al., 2017, Section 3; Koh & Liang, 2017,
    Section 3; https://arxiv.org/abs/1703.04730).

    Args:
        operators: The products with :math:`H_t` for ``t = 1, 2, ...``.
        right: The right sides :math:`b`, one a row. Shape ``(k, d)``.
        damping: The penalty :math:`\lambda \ge 0`.
        scale: :math:`\sigma`, above the largest eigenvalue of any
            :math:`H_t + \lambda I`.
        depth: The number of terms :math:`T`.

    Returns:
        The estimates, in the dtype of ``right``. Shape ``(k, d)``.

    Raises:
        ConvergenceError: If the series grows beyond what it can converge to.

    Example:
        >>> half = lambda rows: rows / 2
        >>> rows = torch.ones(1, 1)
        >>> lissa(iter([half] * 9), rows, damping=0.5, scale=1.0, depth=9)
        tensor([[1.]])
    """
    series = right.clone()
    start = _dots(right, right).sqrt()
    for t, operator in zip(range(1, depth + 1), operators, strict=False):
        series = right + series - (operator(series) + damping * series) / scale
        # With all eigenvalues between 0 and the scale no term is longer than b, and with
        # damping each is shorter than the one before.
        most = min(t + 1.0, scale / damping) if damping > 0 else t + 1.0
        size = _dots(series, series).sqrt()
        slack = _SLACK if t == depth else _EXCURSION
        if not bool((size <= slack * most * start).all()):
            raise ConvergenceError(
                f"LiSSA diverges: after {t} of {depth} terms with scale={scale:g} the "
                f"series is {float((size / start).max()):.2g} times as long as the "
                f"gradient it began with. Raise scale above the largest eigenvalue of "
                f"the curvature of any one batch, or use larger batches."
            )
    return series / scale


def lanczos(
    operator: Operator, start: Float[Tensor, " d"], rank: int, keep: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
    """Find the eigenpairs of a symmetric operator that are largest in magnitude.

    Arnoldi's iteration (1951), which for a symmetric operator is Lanczos's; the basis is
    orthogonalised twice against all of itself, so no eigenvalue appears more than once
    by rounding.

    Args:
        operator: The products, called with one row.
        start: Where the Krylov space begins; not zero. Shape ``(d,)``.
        rank: Its dimension. Memory is that of ``rank`` vectors.
        keep: Eigenpairs to return.

    Returns:
        The eigenvalues, the largest magnitude first, and their orthonormal eigenvectors,
        one a row; fewer than ``keep`` if the Krylov space ends before. Shapes ``(k,)``
        and ``(k, d)``.

    Example:
        >>> double = lambda rows: rows * torch.tensor([1.0, -3.0])
        >>> lanczos(double, torch.ones(2), 2, 1)[0]
        tensor([-3.])
    """
    rank = min(rank, len(start))
    basis = start.new_empty(rank, len(start))
    ritz = torch.zeros(rank, rank, dtype=torch.float64)
    basis[0] = start / start.norm()
    size = 0.0
    made = rank
    for j in range(rank):
        rest = operator(basis[j : j + 1])[0].clone()
        size = max(size, float(rest.norm()))
        for _ in range(2):
            along = basis[: j + 1] @ rest
            ritz[: j + 1, j] += along.double().cpu()
            rest -= along @ basis[: j + 1]
        norm = float(rest.norm())
        if j + 1 == rank:
            break
        if norm <= 10 * torch.finfo(start.dtype).eps * size:
            made = j + 1  # an invariant subspace
            break
        ritz[j + 1, j] = norm
        basis[j + 1] = rest / norm
    values, vectors = torch.linalg.eigh(_symmetric(ritz[:made, :made]))
    order = values.abs().argsort(descending=True)[:keep]
    rotation = vectors[:, order].T.to(basis)
    kept = basis[: len(order)]
    for low, high in spans(len(start), _COLUMNS):  # in place: memory of one basis
        kept[:, low:high] = rotation @ basis[:made, low:high]
    return values[order].to(start), kept


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _dots(left: Float[Tensor, "k d"], right: Float[Tensor, "k d"]) -> Tensor:
    dots: Tensor = torch.linalg.vecdot(left, right)
    return dots.double()
