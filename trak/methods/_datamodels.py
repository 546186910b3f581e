"""Datamodels: a regression of retrained models' outputs on what they were trained on."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float64

from trak.errors import BackendError, OptionError
from trak.evaluation import GroundTruth
from trak.methods._choices import is_above_zero
from trak.methods._retrained import OfBank

_FOLDS = 5
_MIN_SUBSETS = 2 * _FOLDS

_CHOOSING_TARGETS = 64
"""Targets that choose a lasso penalty for all: more take time and change little."""

_LASSO_RATIOS = np.geomspace(0.9, 0.03, 15)
"""In units of the penalty from which on all weights are zero."""

_RIDGE_RATIOS = np.geomspace(1e-2, 1e3, 16)
"""In units of the mean eigenvalue of the masks' Gram matrix."""

Fit: TypeAlias = Callable[..., Any]


class Penalty(str, Enum):
    """What keeps the weights of a datamodel small."""

    LASSO = "lasso"
    """The sum of their absolute values: most are exactly zero."""

    RIDGE = "ridge"
    """Half the sum of their squares: none is zero."""


class Datamodels(OfBank):
    r"""The weights of a linear model from a training subset to a target's output.

    .. math::
        \tau_{\cdot j} = \operatorname*{argmin}_w \min_b \frac{1}{2s} \sum_S
            \big( f(z_j; \theta^*(S)) - w^\top 1_S - b \big)^2 + \alpha_j \|w\|_1

    (Ilyas et al., 2022, Section 2; https://arxiv.org/abs/2202.00622), or with
    :math:`\tfrac{\alpha_j}{2} \|w\|_2^2`. The larger a ridge, the nearer the weights are,
    up to their scale, to :class:`EmpiricalInfluence`.

    Where all subsets are of one size, a constant that is added to all weights of a target
    changes no prediction but the intercept: ridge weights then have the mean zero.

    Without ``alpha`` it is chosen: for the lasso by cross-validation in five parts, for
    the ridge by leaving out one subset at a time, which has a closed form. Targets share
    the choice, in units of what their own outputs call for (a lasso's of at most 64
    targets), unless ``per_target``.

    Args:
        bank: The retrainings. Those of one subset are averaged.
        alpha: :math:`\alpha`, for all targets; None to choose it.
        penalty: ``"lasso"`` or ``"ridge"``.
        per_target: Whether each target chooses for itself.

    Raises:
        OptionError: If ``alpha`` is not a positive number, ``penalty`` is unknown, or
            there are fewer than 10 subsets to choose with, or all are the same.
        NonFiniteError: If an output is NaN or infinite.
        BackendError: If scikit-learn, which solves the lasso, is not installed.
    """

    name = "Datamodels"

    def __init__(
        self,
        bank: GroundTruth,
        alpha: float | None = None,
        penalty: str = "lasso",
        *,
        per_target: bool = False,
    ) -> None:
        super().__init__(bank)
        try:
            self._penalty = Penalty(penalty)
        except ValueError as error:
            raise OptionError(
                f"penalty={penalty!r} is unknown; pass 'lasso' or 'ridge'."
            ) from error
        if alpha is not None and not is_above_zero(alpha):
            raise OptionError(
                f"alpha={alpha!r} is no penalty; pass a positive number, or None to "
                f"choose it."
            )
        if alpha is None and bank.n_subsets < _MIN_SUBSETS:
            raise OptionError(
                f"{bank.n_subsets} subsets are too few to choose alpha with; retrain on at "
                f"least {_MIN_SUBSETS}, or pass alpha."
            )
        if (bank.masks == bank.masks[0]).all():
            raise OptionError(
                f"the bank's {bank.n_subsets} subsets are all the same, so nothing can be "
                f"compared; retrain on more subsets."
            )
        if self._penalty is Penalty.LASSO:
            _lasso_path()
        self._alpha, self._per_target = alpha, per_target
        self._alphas: Float64[np.ndarray, " m"] | None = None

    @property
    def alphas(self) -> Float64[np.ndarray, " m"]:
        """The penalty of each target; 0 where all its outputs are the same."""
        if self._alphas is None:
            _ = self.scores  # that chooses them
        alphas: np.ndarray = np.asarray(self._alphas)
        return alphas

    def _compute(
        self, masks: Bool[np.ndarray, "s n"], outputs: Float64[np.ndarray, "s m"]
    ) -> Float64[np.ndarray, "n m"]:
        solver = _Lasso if self._penalty is Penalty.LASSO else _Ridge
        fitted = solver(masks, outputs)
        if self._alpha is not None:
            self._alphas = np.full(outputs.shape[1], float(self._alpha))
        else:
            errors = fitted.errors(everywhere=self._per_target)
            best = errors.argmin(axis=0)
            if not self._per_target:
                best = np.full(outputs.shape[1], errors.mean(axis=1).argmin())
            self._alphas = fitted.ratios[best] * fitted.unit
        # With all outputs the same nothing is to be explained, whatever the penalty.
        self._alphas[np.ptp(outputs, axis=0) == 0] = 0.0
        return fitted.weights(self._alphas)


class _Lasso:
    """Coordinate descent along the path, with the Gram matrix computed once."""

    ratios = _LASSO_RATIOS

    def __init__(
        self, masks: Bool[np.ndarray, "s n"], outputs: Float64[np.ndarray, "s m"]
    ) -> None:
        self._masks, self._outputs = masks, outputs
        self.unit = np.abs(_Part(masks, outputs).products).max(axis=0) / len(masks)

    def errors(self, *, everywhere: bool) -> Float64[np.ndarray, "k m"]:
        """Cross-validate every penalty: shares of variance, of all targets or of some."""
        m = self._outputs.shape[1]
        chosen = np.unique(np.linspace(0, m - 1, _CHOOSING_TARGETS).round().astype(int))
        columns = np.arange(m) if everywhere else chosen
        errors = np.zeros((len(self.ratios), len(columns)))
        fold = np.arange(len(self._masks)) % _FOLDS
        for k in range(_FOLDS):
            part = _Part(self._masks[fold != k], self._outputs[fold != k])
            held = self._masks[fold == k].astype(np.float64) - part.mean
            truth = self._outputs[fold == k] - part.offset
            for place, j in enumerate(columns.tolist()):
                if self.unit[j] > 0:
                    path = part.path(j, self.ratios * self.unit[j])
                    missed = truth[:, j, None] - held @ path
                    errors[:, place] += np.square(missed).sum(axis=0)
        shares: np.ndarray = errors / _spread(self._outputs[:, columns])
        return shares

    def weights(self, alphas: Float64[np.ndarray, " m"]) -> Float64[np.ndarray, "n m"]:
        """Solve for every target with its own penalty."""
        part = _Part(self._masks, self._outputs)
        weights = np.zeros((self._masks.shape[1], len(alphas)))
        for j, alpha in enumerate(alphas):
            if alpha > 0:
                weights[:, j] = part.path(j, np.array([alpha]))[:, 0]
        return weights


class _Part:
    """Some subsets, centred, and their products, as the lasso's solver takes them."""

    def __init__(
        self, masks: Bool[np.ndarray, "s n"], outputs: Float64[np.ndarray, "s m"]
    ) -> None:
        self.mean = masks.mean(axis=0)
        self.offset = outputs.mean(axis=0)
        self._inputs = np.asfortranarray(masks - self.mean)
        self._outputs = outputs - self.offset
        s, n = masks.shape
        # With fewer subsets the solver is faster without: measured at n=2000.
        self._gram = (
            np.ascontiguousarray(self._inputs.T @ self._inputs) if 2 * s > n else False
        )
        self.products = self._inputs.T @ self._outputs

    def path(
        self, j: int, alphas: Float64[np.ndarray, " k"]
    ) -> Float64[np.ndarray, "n k"]:
        """Solve for a target at penalties that fall."""
        _, weights, _ = _lasso_path()(
            self._inputs,
            np.ascontiguousarray(self._outputs[:, j]),
            alphas=alphas,
            precompute=self._gram,
            Xy=np.ascontiguousarray(self.products[:, j]),
            check_input=False,  # they are as it wants them; checking takes longer
            max_iter=10_000,
        )
        found: np.ndarray = weights
        return found


class _Ridge:
    """One eigendecomposition gives all penalties, all targets and all errors."""

    ratios = _RIDGE_RATIOS

    def __init__(
        self, masks: Bool[np.ndarray, "s n"], outputs: Float64[np.ndarray, "s m"]
    ) -> None:
        self._inputs = masks - masks.mean(axis=0)
        self._outputs = outputs - outputs.mean(axis=0)
        values, self._vectors = np.linalg.eigh(self._inputs @ self._inputs.T)
        self._values = values.clip(min=0.0)
        self._turned = self._vectors.T @ self._outputs
        s, n = masks.shape
        mean = self._values.sum() / max(1, min(s - 1, n))
        self.unit = np.full(outputs.shape[1], mean / s)

    def errors(self, *, everywhere: bool) -> Float64[np.ndarray, "k m"]:
        """Leave out one subset at a time: shares of variance, of all targets."""
        s = len(self._values)
        found = []
        for ratio in self.ratios:
            shrunk = self._values / (self._values + s * ratio * self.unit[0])
            missed = self._outputs - self._vectors @ (shrunk[:, None] * self._turned)
            # What each subset has in its own prediction; 1/s is its part in the mean.
            own = np.square(self._vectors) @ shrunk + 1 / s
            left = np.maximum(1 - own, np.finfo(np.float64).eps)
            found.append(np.square(missed / left[:, None]).sum(axis=0))
        shares: np.ndarray = np.array(found) / _spread(self._outputs)
        return shares

    def weights(self, alphas: Float64[np.ndarray, " m"]) -> Float64[np.ndarray, "n m"]:
        """Solve for every target with its own penalty."""
        damped = self._values[:, None] + len(self._values) * alphas
        solved = np.where(alphas > 0, self._turned / np.where(damped > 0, damped, 1), 0)
        weights: np.ndarray = self._inputs.T @ (self._vectors @ solved)
        return weights


def _spread(outputs: Float64[np.ndarray, "s m"]) -> Float64[np.ndarray, " m"]:
    """Sum what each target's squared outputs differ by from their mean, or give 1."""
    total = np.square(outputs - outputs.mean(axis=0)).sum(axis=0)
    spread: np.ndarray = np.where(total > 0, total, 1.0)
    return spread


def _lasso_path() -> Fit:
    try:
        from sklearn.linear_model import lasso_path
    except ImportError as error:
        raise BackendError(
            f"Datamodels with penalty='lasso' needs scikit-learn, which cannot be imported "
            f"({error}); pip install trak[methods], or pass penalty='ridge'."
        ) from error
    found: Fit = lasso_path
    return found
