"""Changes to the estimator that were tried, on the same gradients without projection.

Everything is written with the Gram matrix of the rows and their products with the targets,
so that a variant costs a solve. Letters are those of the estimator.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from trak._members import balanced

BASE = "the default"
BLOCKS = 16
COPIES = 5
"""Copies of one checkpoint, or epochs of one run, that stand for checkpoints."""
DROPPED = 0.05
SUMMED = "outputs summed over tokens"


@dataclass(frozen=True)
class Products:
    """What a checkpoint's scores are made of."""

    gram: Tensor
    """``X Xᵀ``. Shape ``(n, n)``."""

    cross: Tensor
    """``X φᵀ``. Shape ``(n, m)``."""

    weights: np.ndarray
    """The out-to-loss weights. Shape ``(n,)``."""

    members: np.ndarray
    """Which examples it was trained on. Shape ``(n,)``."""

    known: dict[float, Tensor] = field(default_factory=dict)
    """Factors that were computed."""

    def powered(self, a: float) -> tuple[Tensor, Tensor]:
        """Weigh the rows."""
        scale = torch.from_numpy(np.abs(self.weights) ** a)
        return self.gram * scale[:, None] * scale, self.cross * scale[:, None]

    def solve(self, a: float, right: Tensor) -> Tensor:
        """Multiply with the inverse of the damped Gram matrix of weighted rows."""
        if a not in self.known:
            self.known[a] = factor(self.powered(a)[0])
        return torch.cholesky_solve(right, self.known[a])


def products(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply rows with rows, and with targets. Shapes ``(n, n)`` and ``(n, m)``."""
    return (rows @ rows.T).double(), (rows @ targets.T).double()


def factor(gram: Tensor) -> Tensor:
    """Add one mean eigenvalue to the diagonal, and factor."""
    unit = gram.diagonal().mean()
    return torch.linalg.cholesky(gram + unit * torch.eye(len(gram), dtype=gram.dtype))


# -- kernels: from products to scores before the weight on the result -----------------


def ridge(one: Products, a: float) -> Tensor:
    r"""Compute :math:`(\tilde X \tilde X^\top + \lambda I)^{-1} \tilde X \phi^\top`."""
    return one.solve(a, one.powered(a)[1])


def unit_rows(one: Products, a: float) -> Tensor:
    """Give rows and targets length 1; a target's length ranks nothing."""
    scale = one.gram.diagonal().clamp(min=1e-30).rsqrt()
    gram, cross = one.gram * scale[:, None] * scale, one.cross * scale[:, None]
    return ridge(Products(gram, cross, one.weights, one.members), a)


def centred_rows(one: Products, a: float) -> Tensor:
    """Take the mean row from all rows."""
    gram = one.gram - one.gram.mean(0) - one.gram.mean(1, keepdim=True)
    gram = gram + one.gram.mean()
    return ridge(
        Products(gram, one.cross - one.cross.mean(0), one.weights, one.members), a
    )


def leverage(one: Products, a: float) -> Tensor:
    """Divide by one minus the leverage: the example is left out, not weighted less."""
    gram, _ = one.powered(a)
    hat = one.solve(a, gram).diagonal()
    return ridge(one, a) / (1 - hat)[:, None]


def own_examples(one: Products, a: float) -> Tensor:
    """Sum the kernel over the checkpoint's own training examples only."""
    gram, cross = one.powered(a)
    own = torch.from_numpy(np.flatnonzero(one.members))
    inner = gram[own][:, own]
    part = gram[:, own] @ torch.cholesky_solve(cross[own], factor(inner))
    return (cross - part) / inner.diagonal().mean()


def iterated(one: Products, a: float) -> Tensor:
    """Iterate the damped solve once more."""
    gram, _ = one.powered(a)
    unit, first = gram.diagonal().mean(), ridge(one, a)
    return first + unit * one.solve(a, first)


def squared(one: Products, a: float) -> Tensor:
    """Filter eigenvalues by s / (s + λ)²."""
    gram, _ = one.powered(a)
    return one.solve(a, gram @ ridge(one, a))


def truncated(one: Products, a: float) -> Tensor:
    """Leave out eigenvalues below the mean instead of damping."""
    gram, cross = one.powered(a)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values.mean()
    right = (vectors.T @ cross) / values[:, None]
    return vectors[:, kept] @ right[kept]


def one_scale(one: Products, a: float) -> Tensor:
    """Scale every checkpoint's scores to the same size before they are averaged."""
    found = ridge(one, a)
    return found / found.std()


KERNELS: dict[str, Callable[[Products, float], Tensor]] = {
    "rows of length 1": unit_rows,
    "centred rows": centred_rows,
    "corrected for leverage": leverage,
    "kernel of the checkpoint's own examples": own_examples,
    "iterated damping": iterated,
    "squared damping": squared,
    "eigenvalues cut off at the mean": truncated,
    "every checkpoint on one scale": one_scale,
}


# -- rows that are changed before they are multiplied ---------------------------------


def pieces(model: nn.Module) -> list[tuple[slice, torch.Size]]:
    """List where each parameter's entries stand in a row, and its shape."""
    found, start = [], 0
    for value in model.parameters():
        found.append((slice(start, start + value.numel()), value.shape))
        start += value.numel()
    return found


def whitened(rows: Tensor, targets: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Whiten each matrix in the eigenbases of its two sides, as EK-FAC does.

    The eigenbases are of mean products of gradients from the left and from the right;
    the second moments in them are damped with their mean.

    Returns:
        Rows and targets, with which all that is done with gradients is done.
    """
    n, parts = len(rows), []
    for place, shape in pieces(model):
        both = torch.cat([rows[:, place], targets[:, place]])
        if len(shape) > 1:
            both = both.view(len(both), shape[0], -1)
            train = both[:n]
            left = torch.einsum("nij,nkj->ik", train, train)
            right = torch.einsum("nij,nik->jk", train, train)
            basis = torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]
            both = torch.einsum("nij,ik,jl->nkl", both, *basis).flatten(1)
        moments = both[:n].square().mean(0)
        parts.append(both * (moments + moments.mean()).rsqrt())
    whole = torch.cat(parts, dim=1)
    return whole[:n], whole[n:]


def blocks(d: int) -> list[Tensor]:
    """Deal the entries of a row into blocks at random."""
    order = torch.randperm(d, generator=torch.Generator().manual_seed(0))
    return list(order.chunk(BLOCKS))


def split_kernels(
    rows: Tensor, targets: Tensor, places: list, one: Products, a: float
) -> Tensor:
    """Sum the kernels of parts of the entries, each with its own Gram matrix."""
    total: Tensor | float = 0.0
    for place in places:
        part = products(rows[:, place], targets[:, place])
        if part[0].diagonal().sum() > 0:
            total = total + ridge(Products(*part, one.weights, one.members), a)
    assert isinstance(total, Tensor)  # noqa: S101  some entries are not 0
    return total


def sketched(
    rows: Tensor, targets: Tensor, places: list[slice], p: int, seed: int
) -> tuple[Tensor, Tensor, list[slice]]:
    """Project the entries of each part by a Gaussian matrix of its own.

    Returns:
        Rows, targets and parts of at most ``p`` entries, as many of each part; of smaller
        parts all.
    """
    generator, size = torch.Generator().manual_seed(seed), p // len(places)
    both, found, kept, start = torch.cat([rows, targets]), [], [], 0
    for place in places:
        part = both[:, place]
        if part.shape[1] > size:
            matrix = torch.randn(part.shape[1], size, generator=generator)
            part = part @ matrix / size**0.5
        found.append(part)
        kept.append(slice(start, start + part.shape[1]))
        start = kept[-1].stop
    whole = torch.cat(found, dim=1)
    return whole[: len(rows)], whole[len(rows) :], kept


# -- all of it ------------------------------------------------------------------------

Gradients = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor, np.ndarray]]


def dropped(checkpoint: dict[str, Tensor], copy: int) -> dict[str, Tensor]:
    """Set some of the weights to 0, as a mask of dropout would."""
    generator = torch.Generator().manual_seed(copy)
    found: dict[str, Tensor] = {}
    tied: dict[int, Tensor] = {}
    for name, value in checkpoint.items():
        if value.data_ptr() not in tied:
            keep = torch.rand(value.shape, generator=generator) >= DROPPED
            dropped = value * keep if value.is_floating_point() else value
            tied[value.data_ptr()] = dropped
        found[name] = tied[value.data_ptr()]
    return found


@dataclass
class Tried:
    """Sums over checkpoints, by variant."""

    exponents: tuple[float, float]
    lengths: np.ndarray | None = None
    """Tokens of the training texts, where a text's output is their mean. Shape ``(n,)``."""

    def __post_init__(self) -> None:
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.levelled: list[np.ndarray] = []
        self.raw: list[np.ndarray] = []

    def add_base(
        self, rows: Tensor, targets: Tensor, weights: np.ndarray, members: np.ndarray
    ) -> Products:
        """Add a checkpoint to the default alone."""
        one = Products(*products(rows, targets), weights, members)
        self.levelled.append(balanced(weights, members))
        self.raw.append(weights)
        a, _ = self.exponents
        self.sums[f"{a:g}"] += ridge(one, a)
        return one

    def add(
        self, rows: Tensor, targets: Tensor, weights: np.ndarray, members: np.ndarray
    ) -> Products:
        """Add a checkpoint to what its products are enough for."""
        one = self.add_base(rows, targets, weights, members)
        a, _ = self.exponents
        for power in {0.0, 0.5, 1.0} - {a}:
            self.sums[f"{power:g}"] += ridge(one, power)
        for name, kernel in KERNELS.items():
            self.sums[name] += kernel(one, a)
        if self.lengths is not None:
            scale = torch.from_numpy(self.lengths)
            gram, cross = one.gram * scale[:, None] * scale, one.cross * scale[:, None]
            summed = Products(gram, cross, weights, members)
            for power in (0.0, 1.0):
                self.sums[f"{SUMMED} {power:g}"] += ridge(summed, power)
        return one

    def base(self) -> np.ndarray:
        """Give the default's scores."""
        a, b = self.exponents
        return self.weighted(self.sums[f"{a:g}"], b)

    def scores(self) -> Iterator[tuple[str, np.ndarray]]:
        """Give every variant's scores, the default first."""
        a, b = self.exponents
        base = self.sums[f"{a:g}"]
        yield BASE, self.base()
        yield "weights that are not balanced", self.weighted(base, b, raw=True)
        for powers, name in (
            ((0.0, 1.0), "exponents (0, 1): the paper's"),
            ((1.0, 0.0), "exponents (1, 0): gradients of the loss"),
            ((0.5, 0.5), "exponents (0.5, 0.5)"),
            ((0.0, 0.0), "exponents (0, 0): no weight"),
        ):
            if powers != self.exponents:
                found = self.sums[f"{powers[0]:g}"]
                yield name, self.weighted(found, powers[1])
        for name in self.sums:
            if not name[0].isdigit() and not name.startswith(SUMMED):
                yield name, self.weighted(self.sums[name], b)
        if self.lengths is not None:
            scale = self.lengths[:, None]
            yield "times the tokens of the text", scale * self.weighted(base, b)
            for power in (0.0, 1.0):
                found = self.sums[f"{SUMMED} {power:g}"]
                pair = f"{SUMMED}, exponents ({power:g}, {1 - power:g})"
                yield pair, self.weighted(found, 1 - power)
                again = scale * self.weighted(found, 1 - power)
                yield f"{pair}, times the tokens", again

    def weighted(
        self, total: Tensor | float, b: float, *, raw: bool = False
    ) -> np.ndarray:
        assert isinstance(total, Tensor)  # noqa: S101  a checkpoint was added
        mean = np.mean(self.raw if raw else self.levelled, axis=0)
        return (np.sign(mean) * np.abs(mean) ** b)[:, None] * total.numpy()


def tried(
    model: nn.Module,
    exponents: tuple[float, float],
    checkpoints: list[tuple[dict[str, Tensor], np.ndarray]],
    late: list[dict[str, Tensor]],
    gradients: Gradients,
    lengths: np.ndarray | None = None,
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Score with every variant.

    Args:
        model: What the checkpoints are of.
        exponents: The default ones.
        checkpoints: Weights, and the mask of the examples they were trained on.
        late: Weights of late epochs of the first checkpoint's run.
        gradients: Computes rows, targets and weights of a checkpoint.
        lengths: Tokens of the training examples, if they are texts.

    Yields:
        How many checkpoints were trained, the variant and its scores ``(n, m)``; for the
        first and for all.
    """
    found = Tried(exponents, lengths)
    for c, (checkpoint, members) in enumerate(checkpoints):
        rows, targets, weights = gradients(checkpoint)
        one = found.add(rows, targets, weights, members)
        whole = products(*whitened(rows, targets, model))
        white = Products(*whole, weights, members)
        a, _ = exponents
        found.sums["whitened in the bases of EK-FAC"] += ridge(white, a)
        layers = [place for place, _ in pieces(model)]
        for name, places in (
            (f"a kernel for each of {BLOCKS} random blocks", blocks(rows.shape[1])),
            ("a kernel for each parameter", layers),
        ):
            found.sums[name] += split_kernels(rows, targets, places, one, a)
        if c + 1 in {1, len(checkpoints)}:
            for name, scores in found.scores():
                yield c + 1, name, scores
    first, members = checkpoints[0]
    copies = [first, *(dropped(first, copy) for copy in range(1, COPIES))]
    for name, states in (
        (f"{COPIES} copies with {DROPPED:.0%} of the weights dropped", copies),
        (f"{len(late)} late epochs of one run", late),
    ):
        group = Tried(exponents)
        for state in states:
            group.add_base(*gradients(state), members)
        yield 1, name, group.base()


def late_epochs(epochs: int) -> list[int]:
    """Choose the last fifth to half of a run: the rate still moves the weights there.

    Returns:
        Numbers of epochs, the last one among them.

    Example:
        >>> late_epochs(20)
        [11, 13, 15, 17, 19]
    """
    first = epochs - 1 - 2 * math.ceil(epochs / 5)
    chosen = np.linspace(first, epochs - 1, COPIES).round().astype(int)
    return sorted({int(epoch) for epoch in chosen})
