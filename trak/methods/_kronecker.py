"""Kronecker-factored curvature of one layer, as pure tensor functions.

A layer's weight is ``(o, i)``, its bias a last column of it where it has one. The letters
of the einsum equations: ``b`` examples, ``t`` positions, ``i`` and ``o`` inputs and
outputs of a layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trak._linalg import spans

_ENTRIES = 1 << 23  # of per-sample gradients that are formed at once

_ROUNDING = 30
"""What rounding makes of a gradient's zeros: a few units of its largest entry each."""


def covariance(values: Float[Tensor, "b t i"]) -> Float[Tensor, "i i"]:
    """Sum the outer products of all positions of all examples.

    Returns:
        The sum, in float64: batches are added to it. Shape ``(i, i)``.

    Example:
        >>> covariance(torch.ones(2, 3, 1))
        tensor([[6.]], dtype=torch.float64)
    """
    flat = values.reshape(-1, values.shape[-1])
    return (flat.T @ flat).double()


def eigenbasis(factor: Float[Tensor, "i i"]) -> Float[Tensor, "i i"]:
    """Diagonalise a covariance.

    Returns:
        Its eigenvectors, one a column. Shape ``(i, i)``.

    Example:
        >>> eigenbasis(torch.diag(torch.tensor([1.0, 2.0]))).abs()
        tensor([[1., 0.],
                [0., 1.]])
    """
    vectors: Tensor = torch.linalg.eigh(factor)[1]
    return vectors


def squared_rotated(
    inputs: Float[Tensor, "b t i"],
    slopes: Float[Tensor, "b t o"],
    left: Float[Tensor, "o o"],
    right: Float[Tensor, "i i"],
) -> Float[Tensor, "o i"]:
    r"""Sum the squares of per-sample gradients in an eigenbasis.

    With the gradient :math:`G_b = \sum_t \delta_{bt} a_{bt}^\top` of each example,

    .. math:: \sum_b (Q_S^\top G_b Q_A) \circ (Q_S^\top G_b Q_A)

    (George et al., 2018, Section 3; https://arxiv.org/abs/1806.03884).

    Args:
        inputs: What the layer was given, :math:`a`. Shape ``(b, t, i)``.
        slopes: Gradient of its output, :math:`\delta`. Shape ``(b, t, o)``.
        left: :math:`Q_S`, one eigenvector a column. Shape ``(o, o)``.
        right: :math:`Q_A`, likewise. Shape ``(i, i)``.

    Returns:
        The sum, in float64. Shape ``(o, i)``.

    Example:
        >>> a, slope = torch.tensor([[[2.0]]]), torch.tensor([[[3.0]]])
        >>> squared_rotated(a, slope, torch.eye(1), torch.eye(1))
        tensor([[36.]], dtype=torch.float64)
    """
    b, t, i = inputs.shape
    o = slopes.shape[2]
    if t == 1:
        inputs, slopes = inputs[:, 0] @ right, slopes[:, 0] @ left
        return (slopes.square().T @ inputs.square()).double()
    # Whichever takes fewer operations; the products are the same.
    rotates_first = t * (i * i + o * o) < o * i * (o + i)
    if rotates_first:
        inputs, slopes = inputs @ right, slopes @ left
    total = torch.zeros(o, i, dtype=torch.float64, device=inputs.device)
    for low, high in spans(b, max(1, _ENTRIES // max(1, o * i))):
        grads = torch.bmm(slopes[low:high].mT, inputs[low:high])
        if not rotates_first:
            grads = left.T @ grads @ right
        total += grads.square_().sum(0)
    return total


def precondition(
    grads: Float[Tensor, "b o i"],
    left: Float[Tensor, "o o"],
    right: Float[Tensor, "i i"],
    eigenvalues: Float[Tensor, "o i"],
    damping: float,
) -> Float[Tensor, "b o i"]:
    r"""Multiply gradients with the inverse of a damped eigen-decomposition.

    .. math:: Q_S \left( \frac{Q_S^\top G Q_A}{\Lambda + \lambda} \right) Q_A^\top

    (Grosse et al., 2023, Section 2.4; https://arxiv.org/abs/2308.03296).

    Args:
        grads: Gradients :math:`G`, one an example. Shape ``(b, o, i)``.
        left: :math:`Q_S`. Shape ``(o, o)``.
        right: :math:`Q_A`. Shape ``(i, i)``.
        eigenvalues: :math:`\Lambda \ge 0`. Shape ``(o, i)``.
        damping: :math:`\lambda`; where it is 0, and an eigenvalue is 0 up to rounding,
            the result is 0, as of a pseudo-inverse.

    Returns:
        The products. Shape ``(b, o, i)``.

    Example:
        >>> grads, eigenvalues = torch.ones(1, 1, 2), torch.tensor([[1.0, 3.0]])
        >>> precondition(grads, torch.eye(1), torch.eye(2), eigenvalues, 1.0)
        tensor([[[0.5000, 0.2500]]])
    """
    damped = eigenvalues + damping
    # Eigenvalues are mean squares, so what rounding makes of a zero is squared too.
    zero = (_ROUNDING * torch.finfo(damped.dtype).eps) ** 2 * eigenvalues.max()
    is_large = damped > (zero if damping == 0 else 0.0)
    inverse = torch.where(is_large, 1 / torch.where(is_large, damped, 1.0), 0.0)
    return left @ (left.T @ grads @ right * inverse) @ right.T
