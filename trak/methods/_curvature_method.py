"""What the methods with a curvature share: checkpoints, tiles of targets, training passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from trak._batches import batch_size, canonical, copied, rebuild, row_leaves
from trak._checkpoints import load_weights
from trak._options import positive
from trak._params import flatten_rows
from trak._types import Batch, GradWrt
from trak.errors import NonFiniteError, OptionError, OrderError
from trak.gradient_computers import HookGradientComputer
from trak.methods._base import Method
from trak.methods._choices import (
    check_above_zero,
    check_checkpoints,
    check_not_negative,
    check_unchanged,
)
from trak.methods._data import Contents, checked, read_contents
from trak.methods._gradient_products import gradient_products
from trak.modelout_functions import AbstractModelOutput, resolve_task

C = TypeVar("C", bound="CurvatureMethod")
"""The class of such a method."""

Members = Sequence[int] | np.ndarray | Tensor
"""Indices of training examples, or a boolean for each."""


class CurvatureMethod(Method):
    r"""Scores :math:`\tau_i(z) = Q_i \nabla f(z_i)^\top C^{-1} \nabla f(z)`.

    A subclass says what :math:`C` is. Scores are averaged over checkpoints, and
    training gradients are streamed once for each tile of targets.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | AbstractModelOutput | type[AbstractModelOutput] | object,
        checkpoints: Sequence[Mapping[str, Tensor]],
        *,
        damping: float | None,
        multiple: float,
        grad_wrt: GradWrt | None,
        train_inds: Sequence[Members | None] | None,
        max_bytes: int,
    ) -> None:
        check_checkpoints(checkpoints)
        if damping is not None:
            check_not_negative("damping", damping)
        check_above_zero(multiple=multiple)
        if train_inds is not None and len(train_inds) != len(checkpoints):
            raise OptionError(
                f"train_inds is for {len(train_inds)} checkpoints and there are "
                f"{len(checkpoints)}; pass one entry a checkpoint, None for all examples."
            )
        self.task = resolve_task(task)
        self._model, self._checkpoints = model, checkpoints
        self._damping, self._multiple = damping, multiple
        self._train_inds = train_inds
        self._max_bytes = positive("max_bytes", max_bytes)
        self._computer = HookGradientComputer(model, self.task, grad_wrt=grad_wrt)
        self._train: Iterable[Batch] = ()
        self._contents: Contents | None = None
        self._is_fitted = False
        self._weights: dict[int, str] = {}
        self._n = 0

    def fit(self: C, train: Iterable[Batch]) -> C:
        """Compute what scoring needs of the training set.

        Args:
            train: Its batches; kept, and gone through again for scoring.

        Returns:
            The method itself.

        Raises:
            BatchError: If there are no examples, or they are not the same whenever they
                are gone through.
            OptionError: If ``train_inds`` do not fit the number of examples.
            NonFiniteError: If the curvature is not finite.
        """
        self._is_fitted = False  # in case of an error below
        contents = read_contents(train, "train")
        self._train, self._n = train, contents.size
        self._contents = contents
        self._members = [self._parse_members(c) for c in range(len(self._checkpoints))]
        self._weights = {}
        self._begin()
        for c in self._load_each():
            self._fit_checkpoint(c)
        self._is_fitted = True
        return self

    def score(self, targets: Iterable[Batch]) -> Float32[np.ndarray, "n m"]:
        """Score every training example for every target.

        Args:
            targets: Batches of targets.

        Returns:
            The scores, in memory. Shape ``(n, m)``.

        Raises:
            OrderError: If the method was not fitted.
            BatchError: If there are no targets, or batches are not the same whenever
                they are gone through.
            CheckpointError: If a checkpoint has other weights than in ``fit``.
            NonFiniteError: If a target's gradient is not finite, with its index, or a
                score, with the training example's.
        """
        if not self._is_fitted:
            raise OrderError(
                f"{type(self).__name__} has no training set to score; fit it first."
            )
        found_targets = read_contents(targets, "targets")
        m = found_targets.size
        total = np.zeros((self._n, m), dtype=np.float32)
        for c in self._load_each():
            weights = self._out_to_loss()
            for low, rows in self._tiles(targets, found_targets):
                found = weights * self._products(c, rows)
                with np.errstate(over="ignore"):  # it is an error below
                    total[:, low : low + len(rows)] += found.cpu().numpy()
        total /= len(self._checkpoints)
        if not np.isfinite(total).all():
            index = int(np.flatnonzero(~np.isfinite(total).all(axis=1))[0])
            raise NonFiniteError(
                f"a score of training example {index} is not finite: its model output or "
                f"its gradient is not, or the score overflows float32. Leave the example "
                f"out, or pass a larger damping.",
                index=index,
            )
        return total

    def _begin(self) -> None:
        """Forget what an earlier fit found."""

    @abstractmethod
    def _fit_checkpoint(self, c: int) -> None:
        """Compute what scoring with a checkpoint needs; it is loaded."""

    @abstractmethod
    def _products(self, c: int, rows: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        """Compute ``∇f(z_i)' C^-1 ∇f(z)`` from target gradients; c is loaded."""

    # -- checkpoints ------------------------------------------------------------------

    def _load_each(self) -> Iterator[int]:
        for c, checkpoint in enumerate(self._checkpoints):
            weights = load_weights(self._model, checkpoint)
            check_unchanged(c, self._weights.setdefault(c, weights), weights)
            self._computer.load_model_params(self._model)
            yield c

    def _parse_members(self, c: int) -> Int64[np.ndarray, " k"] | None:
        given = None if self._train_inds is None else self._train_inds[c]
        if given is None:
            return None
        try:
            found = np.asarray(given)
        except ValueError:  # rows of different lengths
            found = np.asarray(given, dtype=object)
        if found.dtype == np.bool_ and found.shape == (self._n,):
            found = np.flatnonzero(found)
        fits = found.ndim == 1 and found.size and found.dtype.kind in "iu"
        if not fits or found.min() < 0 or found.max() >= self._n:
            raise OptionError(
                f"train_inds[{c}] is {found.dtype} of shape {found.shape}; pass indices "
                f"from 0 to {self._n - 1}, at least one, or a boolean for each of the "
                f"{self._n} training examples."
            )
        return np.unique(found).astype(np.int64)

    # -- passes -----------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        """Go through all training examples."""
        if self._contents is not None:
            for batch in checked(self._train, self._contents, "train"):
                yield canonical(batch)

    def _member_batches(self, c: int) -> Iterator[Batch]:
        """Go through the examples that a checkpoint was trained on."""
        members, first = self._members[c], 0
        for batch in self._batches():
            b = batch_size(batch)
            if members is None:
                yield batch
            else:
                own = members[(members >= first) & (members < first + b)] - first
                rows = torch.from_numpy(own)
                leaves = [leaf[rows.to(leaf.device)] for leaf in row_leaves(batch)]
                if len(rows):
                    yield rebuild(batch, leaves)
            first += b

    def _member_count(self, c: int) -> int:
        members = self._members[c]
        return self._n if members is None else len(members)

    def _out_to_loss(self) -> Float[Tensor, "n 1"]:
        rows = [
            # A copy, for models that write to their inputs.
            self._computer.compute_loss_grad(copied(batch))
            for batch in self._batches()
        ]
        return torch.cat(rows)

    def _signs(self, k: int, seed: int) -> Float[Tensor, "k d"]:
        """Draw random signs in the shape, type and place of gradients."""
        computer = self._computer
        generator = torch.Generator().manual_seed(seed)
        shape = (k, computer.selection.grad_dim)
        drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
        device = next(self._model.parameters()).device
        return drawn.to(device, computer.sum_dtype).mul_(2).sub_(1)

    def _tiles(
        self, targets: Iterable[Batch], contents: Contents
    ) -> Iterator[tuple[int, Float[Tensor, "k d"]]]:
        """Compute target gradients, as many at a time as memory may hold.

        Args:
            targets: Batches of targets.
            contents: What they hold.

        Yields:
            Position of the first target, and gradients, in memory that may be written
            to and that the next ones take.
        """
        d = self._computer.selection.grad_dim
        most = max(1, min(contents.size, self._max_bytes // (4 * d)))
        low, count = 0, 0
        tile = torch.empty(0, d)
        for rows in self._target_rows(targets, contents):
            if not len(tile):
                tile = rows.new_empty(most, d)
            for piece in torch.split(rows, max(1, most // 2)):
                if count + len(piece) > most:
                    yield low, tile[:count]
                    low, count = low + count, 0
                tile[count : count + len(piece)] = piece
                count += len(piece)
        if count:
            yield low, tile[:count]

    def _target_rows(
        self, targets: Iterable[Batch], contents: Contents
    ) -> Iterator[Float[Tensor, "k d"]]:
        low = 0
        for batch in checked(targets, contents, "targets"):
            for grads in self._computer.per_sample_grad_blocks(canonical(batch)):
                rows = flatten_rows(grads)
                bad = (~torch.isfinite(rows).all(dim=1)).nonzero()
                if len(bad):
                    index = low + int(bad[0])
                    raise NonFiniteError(
                        f"the gradient of target {index} has a NaN or an infinity; look "
                        f"at that example and the model's output for it.",
                        index=index,
                    )
                yield rows
                low += len(rows)

    def _train_products(self, matrix: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        """Multiply all training gradients with the rows of a matrix."""
        rows = [
            gradient_products(self._computer, batch, matrix)
            for batch in self._batches()
        ]
        return torch.cat(rows)
