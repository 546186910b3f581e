"""Scores, self-influence and features of whole training sets, in tiles.

Rows come through readers and results leave as blocks: no files, and no damping rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from trak._gram import panels
from trak._linalg import (
    Kernel,
    PseudoInverseKernel,
    RowReader,
    add_product,
    product,
    spans,
)
from trak._memory import (
    affordable,
    halved,
    read_height,
    score_height,
    score_width,
    solve_width,
)
from trak._streaming import over_rows

KEPT = 1 << 30
"""Bytes of factors that are kept when targets are too many to be solved for at once."""


CANCELLED = 1e-6
"""Difference from 1 below which a float64 has less than ten digits of it."""

EPSILON = 2.0**-1022
"""The smallest number of full precision, so that nothing is divided by 0."""


@dataclass(frozen=True, slots=True)
class Side:
    """One checkpoint's part in the scores: where its rows are, and its kernel."""

    train: RowReader
    """Reads projected training gradients, or finished features if ``kernel`` is None."""

    targets: RowReader
    """Reads projected target gradients."""

    kernel: Callable[[], Kernel] | None
    """Factors the damped Gram matrix of the training gradients, anew at each call."""


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of the score matrix."""

    rows: tuple[int, int]
    """First training example, and one past the last."""

    columns: tuple[int, int]
    """First target, and one past the last."""

    values: Float32[Tensor, "rows columns"]
    """The scores."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a job of scoring, and where it runs."""

    n: int
    """Training examples."""

    m: int
    """Targets."""

    p: int
    """Projected entries."""

    device: torch.device
    """Where the products are made."""

    @property
    def is_dual(self) -> bool:
        """Whether the kernel is ``(n, n)``."""
        return self.n <= self.p


def score_blocks(
    sides: Sequence[Side], scale: Float32[Tensor, "n 1"], shape: Shape
) -> Iterator[Block]:
    """Compute the scores in rectangles, summing the checkpoints inside each.

    Every kernel is factored once for all targets whose solutions fit into a gigabyte
    (65,536 at ``p=4096`` for one checkpoint), and every row is read once for them. If
    there are more targets, factors of up to a gigabyte are kept for the others.

    Args:
        sides: The checkpoints.
        scale: What the rows of the sum are multiplied with. Shape ``(n, 1)``.
        shape: The sizes.

    Yields:
        Blocks that cover the matrix: all rows of some columns, then all rows of the
        next.

    Raises:
        OutOfMemoryError: If there is no memory even for one target and one row.
    """
    unit = 4 * max(shape.p, 1) * max(len(sides), 1)
    width = affordable(score_width(shape.p, len(sides)), unit, shape.device)
    if width < shape.m:
        sides = _remembering(sides, shape)
    start = 0
    while start < shape.m:
        stop = min(start + width, shape.m)
        try:
            parts = [_right(side, shape, start, stop) for side in sides]
        except (RuntimeError, MemoryError) as error:
            width = halved(min(width, stop - start), error, "the scores")
            continue
        yield from _columns(sides, parts, scale, shape, (start, stop))
        start = stop


def _remembering(sides: Sequence[Side], shape: Shape) -> Sequence[Side]:
    """Keep the factors for further targets, if they take no more room than solutions."""
    size = 8 * min(shape.n, shape.p) ** 2
    if affordable(len(sides), size, shape.device) < len(sides):
        return sides
    if size * len(sides) > KEPT:
        return sides
    return [
        replace(side, kernel=None if side.kernel is None else cache(side.kernel))
        for side in sides
    ]


def _columns(
    sides: Sequence[Side],
    rights: Sequence[Float32[Tensor, "k columns"]],
    scale: Float32[Tensor, "n 1"],
    shape: Shape,
    columns: tuple[int, int],
) -> Iterator[Block]:
    """Compute all rows of some columns, given the solved targets or their scores."""
    (first, solved), *others = zip(sides, rights, strict=True)

    def make(low: int, high: int, parts: Iterator[Tensor]) -> Tensor:
        if is_score(first, shape):
            total = solved[low:high].clone()
        else:
            total = product(next(parts), solved)
        for side, right in others:
            if is_score(side, shape):
                total += right[low:high]
            else:
                add_product(total, next(parts), right)
        return total.mul_(scale[low:high])

    sources = [side.train for side in sides if not is_score(side, shape)]
    width = columns[1] - columns[0]
    unit = 4 * max(shape.p + width, 1)
    height = affordable(score_height(shape.p, width), unit, shape.device)
    for low, high, values in over_rows(sources, shape.n, height, make, "the scores"):
        yield Block((low, high), columns, values)


def is_score(side: Side, shape: Shape) -> bool:
    """Tell whether solving for a target gives its scores already, as in the dual."""
    return side.kernel is not None and shape.is_dual


def _right(
    side: Side, shape: Shape, start: int, stop: int
) -> Float32[Tensor, "k columns"]:
    """Solve for some targets."""
    rows = shape.n if is_score(side, shape) else shape.p
    right = torch.empty(rows, stop - start, dtype=torch.float32, device=shape.device)
    kernel = None if side.kernel is None else side.kernel()
    # The solves are in float64 and copy, so they are made for fewer columns at a time.
    for low, high in spans(stop - start, solve_width(shape.p)):
        part = side.targets(start + low, start + high).T
        if is_score(side, shape):
            part = _products(side.train, part, shape)
        right[:, low:high] = part if kernel is None else kernel.solve(part)
    return right


def _products(
    train: RowReader, targets: Float32[Tensor, "p k"], shape: Shape
) -> Float32[Tensor, "n k"]:
    found = over_rows(
        [train],
        shape.n,
        read_height(shape.p),
        lambda _low, _high, parts: [product(rows, targets) for rows in parts],
        "the scores",
    )
    return torch.cat([part for _, _, parts in found for part in parts])


def self_influence(
    side: Side,
    kernel: Kernel,
    shape: Shape,
    weights: Float64[Tensor, " n"] | None = None,
) -> Float64[Tensor, " n"]:
    r"""Compute :math:`w_i \phi_i^\top (X^\top X + \lambda I)^{-1} \phi_i` for all rows.

    With :math:`M M^\top` the inverse it is the squared length of :math:`M^\top \phi_i`;
    ``M`` is triangular, so that costs as much as the Gram matrix.

    Args:
        side: The checkpoint; its targets are the rows before they were weighted.
        kernel: Its damped Gram matrix.
        shape: The sizes.
        weights: What each row of ``side.train`` is multiplied with; None for 1.

    Returns:
        Each training example's score on itself, before the weight on the result. Shape
        ``(n,)``.
    """
    if shape.is_dual:
        return _dual_self_influence(side, kernel, shape, weights)
    root = kernel.root().float()

    def make(_low: int, _high: int, parts: Iterator[Tensor]) -> Tensor:
        (rows,) = parts
        return squared_lengths(rows, root)

    source = side.train if weights is None else side.targets
    height = read_height(shape.p)
    found = over_rows([source], shape.n, height, make, "the self-influence")
    lengths = torch.cat([part for _, _, part in found])
    return lengths if weights is None else lengths * weights


def _dual_self_influence(
    side: Side, kernel: Kernel, shape: Shape, weights: Float64[Tensor, " n"] | None
) -> Float64[Tensor, " n"]:
    # XX'(XX' + λI)⁻¹ = I - λ(XX' + λI)⁻¹ and, undamped, the projection on its range.
    if isinstance(kernel, PseudoInverseKernel):
        values = kernel.vectors.square().sum(dim=1)
    else:
        values = 1 - kernel.ridge * kernel.root().square().sum(dim=1)
    if weights is None:
        return values
    # A weight of 0 makes a row of zeros, and 0 of every score.
    values = torch.where(weights > 0, values / weights.clamp(min=EPSILON), 0.0)
    if isinstance(kernel, PseudoInverseKernel):
        return values
    # Of rows that are next to nothing beside λ, the difference has no digits left.
    lost = ((values * weights < CANCELLED) & (weights > 0)).nonzero()[:, 0]
    for low, high in spans(len(lost), solve_width(shape.p)):
        part = lost[low:high]
        rows = torch.cat([side.targets(i, i + 1) for i in part.tolist()])
        solved = kernel.solve(_products(side.train, rows.T, shape))
        values[part] = solved[part, torch.arange(len(part), device=part.device)]
    return values


def squared_lengths(
    rows: Float32[Tensor, "b p"], root: Float32[Tensor, "p r"]
) -> Float64[Tensor, " b"]:
    """Compute the squared length of every row of ``rows @ root``.

    Args:
        rows: Rows. Shape ``(b, p)``.
        root: Columns; zeros below the diagonal are not multiplied with. Shape ``(p, r)``.

    Returns:
        The squared lengths. Shape ``(b,)``.

    Example:
        >>> squared_lengths(torch.tensor([[3.0, 4.0]]), torch.eye(2))
        tensor([25.], dtype=torch.float64)
    """
    is_triangular = not bool(root.tril(-1).any())
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for low, high in panels(root.shape[1]):
        used = high if is_triangular else len(root)
        part = product(rows[:, :used], root[:used, low:high])
        total += part.square_().sum(dim=1)
    return total


def write_features(kernel: Kernel, train: RowReader, array: Any, shape: Shape) -> None:
    r"""Write :math:`\Phi = X (X^\top X + \lambda I)^{-1}` block by block.

    Args:
        kernel: The damped Gram matrix, the smaller of the two.
        train: Reads :math:`X`.
        array: Changed in place. Shape ``(n, p)``.
        shape: The sizes.
    """
    if shape.is_dual:
        rows = train(0, shape.n)  # (XX' + λI)⁻¹ X needs all rows for each column
        for low, high in spans(shape.p, solve_width(shape.n)):
            array[:, low:high] = kernel.solve(rows[:, low:high]).float().cpu().numpy()
        return

    def make(_low: int, _high: int, parts: Iterator[Tensor]) -> Tensor:
        (rows,) = parts
        return kernel.solve(rows.T).T.float().cpu()

    height = solve_width(shape.p)
    found = over_rows([train], shape.n, height, make, "the features")
    for low, high, features in found:
        array[low:high] = features.numpy()
