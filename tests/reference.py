"""The float64 oracle: loop gradients, explicit matrices, textbook TRAK."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trak.projectors import AbstractProjector


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """log p / (1 - p) of the correct class of one example."""
    others = torch.arange(len(logits)) != label
    return logits[label] - torch.logsumexp(logits[others], 0)


def loop_gradients(
    output: Callable[[int], Tensor], n: int, parameters: Sequence[Tensor]
) -> Tensor:
    """Gradients of n outputs, one backward pass each, parameters in order: (n, d)."""
    rows = []
    for i in range(n):
        grads = torch.autograd.grad(
            output(i), parameters, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    return torch.stack(rows)


def projection_matrix(
    projector: AbstractProjector, parameters: dict[str, Tensor], model_id: int
) -> Tensor:
    """The matrix of a projector, row by row, from unit gradients: (d, p), float64."""
    sizes = [value.numel() for value in parameters.values()]
    columns = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, dim=1)
    units = {
        name: column.reshape(-1, *value.shape)
        for (name, value), column in zip(parameters.items(), columns, strict=True)
    }
    return projector.project(units, model_id=model_id).double()


def ridge_inverse(x: Tensor, lambda_reg: float | str) -> Tensor:
    """(X'X + λI)^-1 of features X, with λ as TRAKer takes it."""
    n, p = x.shape
    kernel = x.T @ x
    if lambda_reg == "pinv":
        return torch.linalg.pinv(kernel, hermitian=True, rtol=1e-9)
    ridge = kernel.trace() / min(n, p) if lambda_reg == "auto" else lambda_reg
    return torch.linalg.inv(kernel + ridge * torch.eye(p, dtype=x.dtype))


def level(q: Tensor, members: Tensor | None) -> Tensor:
    """Q, with the mean of |Q| the same on what a model was trained on and on the rest."""
    groups = [] if members is None else [members, ~members]
    if not all(len(q[group]) >= 10 and q[group].any() for group in groups):
        return q
    result = q.clone()
    for group in groups:
        result[group] *= q.abs().mean() / q[group].abs().mean()
    return result


def result_weights(
    out_to_loss: Sequence[Tensor],
    b: float,
    members: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """sign(Q)|Q|^b of the mean Q over checkpoints, levelled where members are known."""
    known = [None] * len(out_to_loss) if members is None else members
    mean = sum(level(q, mask) for q, mask in zip(out_to_loss, known, strict=True))
    mean = mean / len(out_to_loss)
    return torch.where(mean < 0, -1.0, 1.0) * mean.abs() ** b


def trak(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    out_to_loss: Sequence[Tensor],
    lambda_reg: float | str = "auto",
    exponents: tuple[float, float] = (0.0, 1.0),
    members: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """sign(Q)|Q|^b times the mean of X~ (X~'X~ + λI)^-1 φ, with X~ = |Q|^a X: (n, m)."""
    a, b = exponents
    total = torch.zeros(len(features[0]), len(targets[0]), dtype=torch.float64)
    for x, phi, q in zip(features, targets, out_to_loss, strict=True):
        rows = q.abs()[:, None] ** a * x
        total += rows @ ridge_inverse(rows, lambda_reg) @ phi.T
    weights = result_weights(out_to_loss, b, members)
    return weights[:, None] * total / len(features)
