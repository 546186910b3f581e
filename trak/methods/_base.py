"""What every attribution method is: fitted on the training set, it scores targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, TypeVar

import numpy as np
from jaxtyping import Float32

from trak._types import Batch

M = TypeVar("M", bound="Method")
"""The class of a method: typing has no ``Self`` before Python 3.11."""


class Method(ABC):
    r"""A way to score training examples for targets.

    Positive scores are of training examples that raise the target's model output
    :math:`f`. A training example acts through the gradient of its loss,
    :math:`-\partial L / \partial f = Q`.

    Batches are any iterable that can be gone through again, in the same order: a list,
    or a loader that does not shuffle.
    """

    name: ClassVar[str]
    """What tables and plots call it."""

    @abstractmethod
    def fit(self: M, train: Iterable[Batch]) -> M:
        """Compute what scoring needs of the training set.

        Args:
            train: Its batches.

        Returns:
            The method itself.
        """

    @abstractmethod
    def score(self, targets: Iterable[Batch]) -> Float32[np.ndarray, "n m"]:
        """Score every training example for every target.

        Args:
            targets: Batches of targets.

        Returns:
            The scores, in memory. Shape ``(n, m)``.

        Raises:
            OrderError: If the method was not fitted.
            BatchError: If there are no targets.
        """
