"""Methods that retrain: what a bank of retrainings says of every training example."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Float64

from trak._types import Batch
from trak.errors import BatchError, NonFiniteError, OptionError
from trak.evaluation import GroundTruth
from trak.methods._base import Method
from trak.methods._data import count

R = TypeVar("R", bound="OfBank")


class OfBank(Method):
    """A method whose scores come from retrainings alone.

    The bank is the fit: it holds the training examples by index, and the outputs on its
    own targets. ``fit`` and ``score`` only check that they are meant.

    Args:
        bank: The retrainings. Those of one subset are averaged.

    Raises:
        OptionError: If it is no bank, or there is no retraining, or no target.
        NonFiniteError: If an output is NaN or infinite, or overflows float32.
    """

    def __init__(self, bank: GroundTruth) -> None:
        given: object = bank
        if not isinstance(given, GroundTruth):
            raise OptionError(
                f"bank is a {type(given).__name__}; pass a GroundTruth, such as "
                f"retrain_subsets gives."
            )
        if 0 in bank.outputs.shape:
            raise OptionError(
                f"the bank has {bank}; a method needs at least one of each."
            )
        bad = bank.non_finite()
        if len(bad):
            raise NonFiniteError(
                f"retraining {bad[0, 1]} of subset {bad[0, 0]} has an output that is not "
                f"finite; leave such subsets out with bank.finite().",
            )
        if np.abs(bank.outputs).max() > np.finfo(np.float32).max:
            raise NonFiniteError(
                "the bank has an output that overflows float32, so scores would; divide "
                "the outputs of each target by a number."
            )
        self._bank = bank
        self._scores: Float32[np.ndarray, "n m"] | None = None

    def fit(self: R, train: Iterable[Batch]) -> R:
        """Check that a training set has the bank's number of examples.

        It need not be called.

        Args:
            train: Its batches.

        Returns:
            The method itself.

        Raises:
            BatchError: If it has not.
        """
        n = count(train, "train")
        if n != self._bank.n_examples:
            raise BatchError(
                f"train has {n} examples, and the bank's subsets are of "
                f"{self._bank.n_examples}; pass the training set that they were drawn from."
            )
        return self

    def score(self, targets: Iterable[Batch]) -> Float32[np.ndarray, "n m"]:
        """Give the scores for the bank's targets.

        Args:
            targets: Batches of those targets, in the bank's order.

        Returns:
            The scores, in memory. Shape ``(n, m)``.

        Raises:
            BatchError: If there are not as many as in the bank.
        """
        m = count(targets, "targets")
        if m != self._bank.n_targets:
            raise BatchError(
                f"targets are {m}, and the bank has outputs on {self._bank.n_targets}; "
                f"pass those that it has outputs on, in its order."
            )
        return self.scores.copy()

    @property
    def scores(self) -> Float32[np.ndarray, "n m"]:
        """The scores for the bank's targets, computed when first asked for.

        They cannot be written to. Shape ``(n, m)``.

        Raises:
            NonFiniteError: If one overflows float32.
        """
        if self._scores is None:
            outputs = self._bank.outputs.astype(np.float64).mean(axis=1)
            found = self._compute(self._bank.masks, outputs)
            if not np.abs(found).max() <= np.finfo(np.float32).max:
                raise NonFiniteError(
                    f"{self.name} scores overflow float32; divide the outputs of each "
                    f"target by a number."
                )
            self._scores = found.astype(np.float32)
            self._scores.setflags(write=False)  # they are kept
        return self._scores

    def _compute(
        self, masks: Bool[np.ndarray, "s n"], outputs: Float64[np.ndarray, "s m"]
    ) -> Float64[np.ndarray, "n m"]:
        raise NotImplementedError


class EmpiricalInfluence(OfBank):
    r"""How much higher a target's output is where a training example took part.

    .. math::
        \tau_{ij} = \operatorname*{mean}_{S \ni i} f(z_j; \theta^*(S))
            - \operatorname*{mean}_{S \not\ni i} f(z_j; \theta^*(S))

    (Feldman and Zhang, 2020, Section 3; https://arxiv.org/abs/2008.03703.)

    Args:
        bank: The retrainings. Those of one subset are averaged.

    Raises:
        OptionError: If there is no retraining, or no target; or an example is in all
            subsets or in none, so that there is nothing to compare with.
        NonFiniteError: If an output is NaN or infinite.
    """

    name = "Empirical influence"

    def __init__(self, bank: GroundTruth) -> None:
        super().__init__(bank)
        inside = bank.masks.sum(axis=0)
        alone = np.flatnonzero((inside == 0) | (inside == bank.n_subsets))
        if len(alone):
            index = int(alone[0])
            where = "all" if inside[index] else "none"
            raise OptionError(
                f"training example {index} is in {where} of the {bank.n_subsets} subsets, "
                f"so nothing can be compared ({len(alone)} such examples); retrain on more "
                f"subsets."
            )

    def _compute(
        self, masks: Bool[np.ndarray, "s n"], outputs: Float64[np.ndarray, "s m"]
    ) -> Float64[np.ndarray, "n m"]:
        return influence(masks, outputs)


def influence(
    masks: Bool[np.ndarray, "s n"], outputs: Float64[np.ndarray, "s m"]
) -> Float64[np.ndarray, "n m"]:
    """Subtract the mean output without each example from that with it.

    Args:
        masks: Which examples each subset holds; each is in some and not in others.
            Shape ``(s, n)``.
        outputs: Outputs. Shape ``(s, m)``.

    Returns:
        The differences. Shape ``(n, m)``.

    Example:
        >>> masks = np.array([[True, False], [True, True], [False, True]])
        >>> influence(masks, np.array([[4.0], [2.0], [1.0]]))
        array([[ 2. ],
               [-2.5]])
    """
    inside = masks.sum(axis=0).astype(np.float64)[:, None]
    centred = outputs - outputs.mean(axis=0)  # sums of less, so less is rounded away
    total = masks.T.astype(np.float64) @ centred
    # All centred outputs sum to zero: those without an example to minus those with it.
    difference: np.ndarray = total / inside + total / (len(masks) - inside)
    return difference
