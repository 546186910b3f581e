r"""What scores predict for subsets, without the scores: weighted sums of rows, then solves.

For the scores :math:`\tau = w \cdot \tilde X A^{-1} \phi` and a probe :math:`v` of the
examples, :math:`v^\top \tau = (v w)^\top \tilde X\, A^{-1} \phi` is a product of a few
rows with the targets: nothing of shape ``(n, m)`` is made where ``n`` is above ``p``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from trak._gram import accumulate, gram
from trak._linalg import RowReader, is_finite, product, spans
from trak._memory import read_height, solve_width
from trak._streaming import over_rows
from trak.errors import NonFiniteError, SingularKernelError

_CHUNK = 1024  # examples whose signs are drawn together, whatever is read at once


class Probe:
    r"""Centred vectors that measure how a sum of scores varies over random subsets.

    Random signs: the mean of :math:`(v^\top t)^2` is :math:`\sum_i (t_i - \bar t)^2` on
    average. With as many as there are examples, unit vectors, and it is so exactly.

    Args:
        n: Number of examples.
        count: Vectors.
        seed: Seeds of the signs.
        mask: A subset, whose own centred vector comes first; None for none. Shape
            ``(n,)``.
    """

    def __init__(
        self,
        n: int,
        count: int,
        seed: Sequence[int],
        mask: Bool[np.ndarray, " n"] | None = None,
    ) -> None:
        self._n = n
        self._seed = seed
        self._mask = mask
        self.is_exact = count >= n
        self._count = n if self.is_exact else count
        self._mean = 1 / n if self.is_exact else self._column_means()

    @property
    def width(self) -> int:
        """Number of vectors, with that of the subset."""
        return self._count + (self._mask is not None)

    @property
    def scale(self) -> float:
        r"""What the sum of :math:`(v^\top t)^2` over vectors is multiplied with."""
        return 1.0 if self.is_exact else 1 / self._count

    @property
    def draws(self) -> int | None:
        """Number of random draws behind the sum, or None if it is exact."""
        return None if self.is_exact else self._count

    def __call__(self, low: int, high: int) -> Float64[np.ndarray, "b v"]:
        """Give the entries of some examples, in all vectors."""
        if self.is_exact:
            found = np.eye(high - low, self._n, k=low)
        else:
            first = low // _CHUNK * _CHUNK
            chunks = [self._signs(start) for start in range(first, high, _CHUNK)]
            found = np.concatenate(chunks)[low - first : high - first]
        found = found - self._mean
        if self._mask is None:
            return found
        own = self._mask[low:high] - self._mask.mean()
        return np.concatenate([own[:, None], found], axis=1)

    def _signs(self, start: int) -> Float64[np.ndarray, "b v"]:
        rng = np.random.default_rng([*self._seed, start])
        rows = min(_CHUNK, self._n - start)
        bits = rng.integers(2, size=(rows, self._count), dtype=np.int8)
        return 2.0 * bits - 1.0

    def _column_means(self) -> Float64[np.ndarray, " v"]:
        total = np.zeros(self._count)
        for start in range(0, self._n, _CHUNK):
            total += self._signs(start).sum(axis=0)
        return total / self._n


@dataclass(frozen=True, slots=True, eq=False)
class ScoreSet:
    """Scores of some checkpoints, and what is asked about them."""

    scorers: tuple[int, ...]
    """The checkpoints; their kernels are averaged."""

    weights: Float64[np.ndarray, "n w"]
    """Weights of the scores' rows, one column for every way to weight them."""

    probe: Probe
    """What the scores are summed with."""

    @property
    def width(self) -> int:
        """Sums a target."""
        return self.probe.width * int(self.weights.shape[1])

    def __call__(self, low: int, high: int) -> Float64[np.ndarray, "b k"]:
        """Give the weighted probes of some examples; vectors change fastest."""
        found = self.weights[low:high, :, None] * self.probe(low, high)[:, None, :]
        flat: np.ndarray = found.reshape(high - low, -1)
        return flat


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The rows of a checkpoint."""

    train: RowReader
    """Reads projected gradients of training examples."""

    targets: RowReader
    """Reads those of the targets that are used, in order."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a cross-validation, and where it runs."""

    n: int
    """Training examples."""

    m: int
    """Targets that are used."""

    p: int
    """Projected entries."""

    device: torch.device
    """Where the products are made."""


def predictions(
    sources: Sequence[Source],
    sets: Sequence[ScoreSet],
    multiples: Sequence[float],
    sizes: Sizes,
) -> list[Float32[Tensor, "k w _ m"]]:
    """Sum scores over probes, for every damping.

    Args:
        sources: The checkpoints.
        sets: Which of them score, how their rows are weighted, and what is summed.
        multiples: Dampings, in mean eigenvalues.
        sizes: The sizes.

    Returns:
        For each set the sums, on the CPU. Shape ``(k, w, v, m)``: dampings, weightings,
        vectors, targets.

    Raises:
        NonFiniteError: If a row is not finite.
        SingularKernelError: If all training rows of a checkpoint are zero.
    """
    totals = [
        torch.zeros(len(multiples), one.width, sizes.m, dtype=torch.float32)
        for one in sets
    ]
    for checkpoint, source in enumerate(sources):
        used = [
            (one, total)
            for one, total in zip(sets, totals, strict=True)
            if checkpoint in one.scorers
        ]
        if used:
            _add_checkpoint(source, used, multiples, sizes, checkpoint)
            _check_finite([total for _, total in used], checkpoint)
    return [
        total.view(len(multiples), one.weights.shape[1], one.probe.width, sizes.m)
        for one, total in zip(sets, totals, strict=True)
    ]


def _add_checkpoint(
    source: Source,
    used: Sequence[tuple[ScoreSet, Float32[Tensor, "k _ m"]]],
    multiples: Sequence[float],
    sizes: Sizes,
    name: int,
) -> None:
    """Add one checkpoint's share to the sums of the sets that it is part of."""
    values, vectors = _eigen(gram(source.train, sizes.n, sizes.p, sizes.device), name)
    ridges = [multiple * float(values.mean()) for multiple in multiples]
    left = _left([one for one, _ in used], source.train, vectors, sizes)
    for low, high in spans(sizes.m, solve_width(len(vectors))):
        right = _right(source, vectors, sizes, low, high).float()
        for index, ridge in enumerate(ridges):
            damped = (left / (values + ridge)).float()
            row = 0
            for one, total in used:
                part = product(damped[row : row + one.width], right)
                total[index, :, low:high] += (part / len(one.scorers)).cpu()
                row += one.width


def _eigen(
    kernel: Float64[Tensor, "q q"], name: int
) -> tuple[Float64[Tensor, " q"], Float64[Tensor, "q q"]]:
    if not is_finite(kernel):
        raise NonFiniteError(
            f"the projected gradients of checkpoint {name} on the training examples are "
            f"not all finite; featurize it again, or leave it out."
        )
    if not bool(kernel.diagonal().any()):
        raise SingularKernelError(
            f"all projected gradients of checkpoint {name} are zero, so it scores "
            f"nothing; leave it out, or check what is differentiated (grad_wrt)."
        )
    values, vectors = torch.linalg.eigh(kernel)
    return values.clamp(min=0.0), vectors


def _check_finite(totals: Sequence[Float32[Tensor, "k _ m"]], name: int) -> None:
    for total in totals:
        flat = total.flatten(0, 1)
        if not is_finite(flat):
            target = int((~flat.isfinite()).any(dim=0).nonzero()[0])
            raise NonFiniteError(
                f"the predictions of checkpoint {name} for target {target} of those used "
                f"are not finite; check its projected gradients.",
                index=target,
            )


def _left(
    sets: Sequence[ScoreSet],
    train: RowReader,
    vectors: Float64[Tensor, "q q"],
    sizes: Sizes,
) -> Float64[Tensor, "v q"]:
    """Sum rows with all weighted probes, and rotate the sums to the eigenvectors."""
    width, q = sum(one.width for one in sets), len(vectors)
    if sizes.n <= sizes.p:  # the dual: scores of all rows are the solution itself
        return torch.from_numpy(_stacked(sets, 0, sizes.n)).to(vectors).T @ vectors
    total = torch.zeros(width, q, dtype=torch.float64, device=vectors.device)

    def add(low: int, high: int, parts: Iterator[Tensor]) -> None:
        (rows,) = parts
        accumulate(total, torch.from_numpy(_stacked(sets, low, high)).to(rows).T, rows)

    height = read_height(max(sizes.p, width))
    for _ in over_rows([train], sizes.n, height, add, "the sums of cross-validation"):
        pass
    return total @ vectors


def _stacked(
    sets: Sequence[ScoreSet], low: int, high: int
) -> Float64[np.ndarray, "b v"]:
    return np.concatenate([one(low, high) for one in sets], axis=1)


def _right(
    source: Source, vectors: Float64[Tensor, "q q"], sizes: Sizes, low: int, high: int
) -> Float64[Tensor, "q k"]:
    """Rotate the gradients of some targets to the eigenvectors."""
    part = source.targets(low, high).T
    if sizes.n > sizes.p:
        return vectors.T @ part.double()

    def multiply(_low: int, _high: int, parts: Iterator[Tensor]) -> Tensor:
        (rows,) = parts
        return product(rows, part)

    found = over_rows(
        [source.train], sizes.n, read_height(sizes.p), multiply, "cross-validation"
    )
    return vectors.T @ torch.cat([values for _, _, values in found]).double()


def scaled_rows(
    read: RowReader, scale: Float32[Tensor, "n 1"] | None, columns: int | None
) -> RowReader:
    """Make a reader of scaled rows, or of their first columns.

    Args:
        read: Reads rows.
        scale: A factor for each row, or None. Shape ``(n, 1)``.
        columns: How many columns, or None for all.

    Returns:
        The reader.

    Example:
        >>> rows = torch.ones(2, 3)
        >>> read = lambda low, high: rows[low:high]
        >>> scaled_rows(read, torch.tensor([[2.0], [3.0]]), columns=1)(0, 2)
        tensor([[2.],
                [3.]])
    """

    def reader(low: int, high: int) -> Float[Tensor, "b p"]:
        rows = read(low, high)[:, :columns]
        return rows if scale is None else rows * scale[low:high].to(rows.device)

    return reader


def chosen_rows(read: RowReader, indices: Int64[np.ndarray, " k"]) -> RowReader:
    """Make a reader of some rows, as if there were no others.

    Args:
        read: Reads rows.
        indices: The rows, in increasing order. Shape ``(k,)``.

    Returns:
        The reader.

    Example:
        >>> rows = torch.arange(4.0)[:, None]
        >>> chosen_rows(lambda low, high: rows[low:high], np.array([1, 3]))(0, 2)
        tensor([[1.],
                [3.]])
    """
    if np.array_equal(indices, np.arange(len(indices))):
        return read

    def reader(low: int, high: int) -> Float[Tensor, "b p"]:
        wanted = [int(index) for index in indices[low:high]]
        return torch.cat([read(index, index + 1) for index in wanted])

    return reader
