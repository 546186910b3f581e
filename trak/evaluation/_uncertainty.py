"""How sure scores are: from those of each checkpoint, a block of targets at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from trak._exponents import Exponents, parse_exponents
from trak._options import integer
from trak.errors import NonFiniteError, OptionError
from trak.evaluation._arrays import check_targets_finite, generator, to_numpy
from trak.evaluation._cross_validation_maths import (
    correlation_of_overlap,
    overlap_of_normals,
    project_reliability,
)

_TOO_LARGE = "scale the scores down: their squares overflow float64."
_SPLITS = 4  # pairs of halves of the checkpoints whose top examples are compared


def combine(
    kernels: Float[np.ndarray, "c n m"],
    out_to_loss: Float[np.ndarray, "c n"] | None = None,
    exponent: float = 1.0,
) -> Float64[np.ndarray, "n m"]:
    r"""Average checkpoints: :math:`\operatorname{sign}(\bar Q) |\bar Q|^b\, \bar K`.

    Args:
        kernels: Scores of each checkpoint, before the weight of the rows. Shape
            ``(c, n, m)``.
        out_to_loss: Their out-to-loss weights, or None for none. Shape ``(c, n)``.
        exponent: The power :math:`b` of the weight.

    Returns:
        The scores. Shape ``(n, m)``.

    Example:
        >>> combine(np.array([[[1.0]], [[3.0]]]), np.array([[1.0], [0.0]]))
        array([[1.]])
    """
    mean: np.ndarray = kernels.mean(axis=0, dtype=np.float64)
    if out_to_loss is None:
        return mean
    weight = out_to_loss.mean(axis=0, dtype=np.float64)
    scores: np.ndarray = _result_weights(weight, exponent) * mean
    return scores


def standard_errors(
    kernels: np.ndarray | Tensor,
    out_to_loss: np.ndarray | Tensor | None = None,
    *,
    exponent: float = 1.0,
) -> Float64[np.ndarray, "n m"]:
    r"""Estimate the standard errors of scores, by leaving out each checkpoint.

    .. math::
        \mathrm{se}^2 = \frac{C-1}{C} \sum_c (\tau_{-c} - \bar\tau_{-\cdot})^2

    Checkpoints differ in their subset, their training noise and their projection, so
    all three are in it. Any rectangle of the scores may be given.

    Args:
        kernels: Scores of each checkpoint, before the weight of the rows. Shape
            ``(c, n, m)``.
        out_to_loss: Their out-to-loss weights; None if ``kernels`` have them. Shape
            ``(c, n)``.
        exponent: The power of the weight.

    Returns:
        The standard errors. Shape ``(n, m)``.

    Raises:
        OptionError: If there are fewer than 2 checkpoints, shapes do not fit, or the
            exponent is negative.
        NonFiniteError: If a score or a weight is NaN or infinite, or a square of one
            overflows.

    Example:
        >>> standard_errors(np.array([[[1.0]], [[3.0]]]))
        array([[1.]])
    """
    blocks, weights = checked(kernels, out_to_loss, exponent)
    count = len(blocks)
    total = blocks.sum(axis=0, dtype=np.float64)
    mean, squares = np.zeros_like(total), np.zeros_like(total)
    for index in range(count):
        left: np.ndarray = (total - blocks[index]) / (count - 1)
        if weights is not None:
            others = (weights.sum(axis=0) - weights[index]) / (count - 1)
            left *= _result_weights(others, exponent)
        step = left - mean
        mean += step / (index + 1)
        with np.errstate(over="ignore"):  # which is looked for below
            squares += step * (left - mean)  # Welford: no cancellation where all agree
    result: np.ndarray = np.sqrt(squares * (count - 1) / count)
    check_targets_finite("the standard error", result, _TOO_LARGE)
    return result


def _result_weights(
    mean: Float64[np.ndarray, " n"], exponent: float
) -> Float64[np.ndarray, "n 1"]:
    return Exponents(result=exponent).result_weights(mean)[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class TopKStability:
    """How much of a target's top k would come again with other checkpoints."""

    k: int
    """How many examples are on top."""

    halves: Float64[np.ndarray, " m"]
    """Share of the top k that two halves of the checkpoints have in common."""

    again: Float64[np.ndarray, " m"]
    """Expected share in common with as many other checkpoints."""

    limit: Float64[np.ndarray, " m"]
    """Expected share in common with infinitely many."""

    n_checkpoints: int
    """Checkpoints."""

    def __str__(self) -> str:
        return (
            f"top {self.k}: {self.again.mean():.0%} would come again with "
            f"{self.n_checkpoints} other checkpoints, {self.limit.mean():.0%} with "
            f"infinitely many ({len(self.again)} targets)"
        )


def top_k_stability(
    blocks: Iterable[np.ndarray | Tensor],
    k: int,
    out_to_loss: np.ndarray | Tensor | None = None,
    *,
    exponent: float = 1.0,
    seed: int = 0,
) -> TopKStability:
    r"""Estimate how stable a target's top examples are, from halves of the checkpoints.

    The overlap of two halves' top k is that of normal variables of some correlation; with
    more checkpoints that grows as Spearman and Brown have it, and the overlap with it.

    Args:
        blocks: Scores of each checkpoint on all training examples, some targets a block.
            Shape ``(c, n, w)`` each.
        k: How many examples are on top.
        out_to_loss: Weights of the rows; None if the blocks have them. Shape ``(c, n)``.
        exponent: The power of the weight.
        seed: Seed of the halves.

    Returns:
        The overlaps, target by target.

    Raises:
        OptionError: If there are fewer than 2 checkpoints, no block or target, shapes do
            not fit, ``k`` is not between 1 and ``n - 1``, or the exponent or the seed is
            negative.
        NonFiniteError: If a score or a weight is NaN or infinite.
    """
    shares: list[np.ndarray] = []
    count = n = 0
    for block in blocks:
        kernels, weights = checked(block, out_to_loss, exponent)
        count, n = kernels.shape[:2]
        if not 0 < integer("k", k) < n:
            raise OptionError(f"k={k} of n={n} examples; pass 1 to n - 1.")
        shares.append(_overlaps(kernels, weights, k, exponent, seed))
    halves = np.concatenate([np.zeros(0), *shares])
    if len(halves) == 0:
        raise OptionError(
            "there is no block of scores; pass at least one, with at least one target."
        )
    values, place = np.unique(halves, return_inverse=True)
    latent = [correlation_of_overlap(float(one), k / n) for one in values]
    whole = [project_reliability(one, count / (count // 2)) for one in latent]
    return TopKStability(
        k=k,
        halves=halves,
        again=np.array([overlap_of_normals(one, k / n) for one in whole])[place],
        limit=np.array([overlap_of_normals(one**0.5, k / n) for one in whole])[place],
        n_checkpoints=count,
    )


def _overlaps(
    kernels: Float[np.ndarray, "c n m"],
    weights: Float64[np.ndarray, "c n"] | None,
    k: int,
    exponent: float,
    seed: int,
) -> Float64[np.ndarray, " m"]:
    """Average the overlap of the top k of two halves, over a few splits."""
    count, n, m = kernels.shape
    rng = generator(seed)
    half, total = count // 2, np.zeros(m)
    splits = 1 if count == 2 else _SPLITS
    for _ in range(splits):
        order = rng.permutation(count)
        found = np.zeros((n, m), dtype=np.int8)
        for part in (order[:half], order[half : 2 * half]):
            own = None if weights is None else weights[part]
            scores = combine(kernels[part], own, exponent)
            top = np.argpartition(scores, n - k, axis=0)[n - k :]
            np.put_along_axis(
                found, top, np.take_along_axis(found, top, axis=0) + 1, axis=0
            )
        total += (found == 2).sum(axis=0) / k
    return total / splits


def checked(
    kernels: np.ndarray | Tensor,
    out_to_loss: np.ndarray | Tensor | None,
    exponent: float,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Give scores and weights as arrays of shapes that fit.

    Args:
        kernels: Scores of each checkpoint. Shape ``(c, n, m)``.
        out_to_loss: Their weights, or None. Shape ``(c, n)``.
        exponent: The power of the weights.

    Returns:
        Both.

    Raises:
        OptionError: If there are fewer than 2 checkpoints, shapes do not fit, or the
            exponent is negative.
        NonFiniteError: If a number is NaN or infinite.
    """
    parse_exponents((0.0, exponent))
    blocks = to_numpy("kernels", kernels)
    if blocks.ndim != 3:
        raise OptionError(
            f"the scores have {blocks.ndim} axes; pass (c, n, m), those of each "
            f"checkpoint."
        )
    if len(blocks) < 2:
        raise OptionError(
            f"{len(blocks)} checkpoints do not tell how much checkpoints differ; pass at "
            f"least 2."
        )
    check_targets_finite("kernels", blocks, "compute the scores again.")
    if out_to_loss is None:
        return blocks, None
    weights = to_numpy("out_to_loss", out_to_loss).astype(np.float64)
    if weights.shape != blocks.shape[:2]:
        raise OptionError(
            f"out_to_loss has shape {weights.shape} beside scores of {blocks.shape}; pass "
            f"(c, n)={blocks.shape[:2]}."
        )
    if not np.isfinite(weights).all():
        checkpoint, row = (int(i) for i in np.argwhere(~np.isfinite(weights))[0])
        raise NonFiniteError(
            f"out_to_loss of checkpoint {checkpoint} is {weights[checkpoint, row]} for "
            f"training example {row}; leave the checkpoint out.",
            index=row,
        )
    return blocks, weights
