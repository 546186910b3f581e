"""Similarity of hidden representations: a baseline that looks at no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Shaped
from torch import Tensor

from trak._batches import batch_size, canonical, copied, describe_value
from trak._checkpoints import load_weights
from trak._linalg import spans
from trak._memory import TILE
from trak._types import Batch, Weights
from trak.errors import (
    BatchError,
    NonFiniteError,
    OptionError,
    OrderError,
    TaskError,
    UnknownNameError,
)
from trak.methods._base import Method
from trak.methods._choices import check_checkpoints, check_unchanged
from trak.methods._data import Contents, checked, read_contents

Layer: TypeAlias = str | Callable[[torch.nn.Module, Batch], Tensor]
"""A module's name, or ``layer(model, batch)`` that gives features, ``(b, k)``."""

_LABELS = ("labels", "label")
_SHOWN = 20


class Metric(str, Enum):
    """How two representations are compared."""

    COSINE = "cosine"
    """The cosine of their angle."""

    DOT = "dot"
    """Their product."""

    L2 = "l2"
    """Minus their Euclidean distance: never positive, and 0 for duplicates."""


@dataclass(frozen=True, slots=True)
class _Features:
    """Representations of some examples at one checkpoint."""

    weights: str
    values: Float32[Tensor, "b k"]
    labels: Int[Tensor, " b"] | None


class RepresentationSimilarity(Method):
    r"""How alike the representations of a training example and a target are.

    .. math::
        \tau_{ij} = \frac1C \sum_c \operatorname{sim}(h_c(z_i), h_c(z_j))

    with the features :math:`h_c` that a layer sees, or gives, at checkpoint :math:`c`.
    (As a baseline of attribution: Hanawa et al., 2021; https://arxiv.org/abs/2006.04528.)
    It knows nothing of losses, so its sign does not say that an example helps.

    Batches are ``(inputs, labels)``, or mappings whose key ``labels`` or ``label`` is
    not passed to the model. Features of tokens, ``(b, t, k)``, are averaged, over the
    ``attention_mask`` if the batch has one; features with more axes are flattened. They
    are kept in memory: ``C * n * k`` numbers.

    Args:
        model: The model; checkpoints are loaded into it, and it is left in evaluation
            mode.
        checkpoints: State dicts. Any sequence will do.
        layer: Name of the module whose output is taken, or a function of the model and
            a batch that gives features of shape ``(b, k)``. None takes the input of the
            last ``torch.nn.Linear``: the penultimate features of a classifier.
        metric: ``"cosine"``, ``"dot"`` or ``"l2"``.
        same_label: Whether training examples of another label than the target's score 0.

    Raises:
        NoCheckpointError: If there are no checkpoints.
        UnknownNameError: If there is no such module, or no linear one for the default.
        OptionError: If there is no such metric, or 0 would be its best score.
    """

    name = "RepSim"

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoints: Sequence[Weights],
        layer: Layer | None = None,
        metric: str = "cosine",
        *,
        same_label: bool = False,
    ) -> None:
        check_checkpoints(checkpoints)
        try:
            self._metric = Metric(metric)
        except ValueError as error:
            raise OptionError(
                f"metric={metric!r} is unknown; pass one of "
                f"{[member.value for member in Metric]}."
            ) from error
        if same_label and self._metric is Metric.L2:
            raise OptionError(
                "same_label gives other labels 0, which is the best score that "
                "metric='l2' has; pass metric='cosine' or 'dot'."
            )
        self._layer = _find(model, layer) if not callable(layer) else layer
        self._model, self._checkpoints = model, checkpoints
        self._same_label = same_label
        self._train: list[_Features] | None = None

    def fit(self, train: Iterable[Batch]) -> RepresentationSimilarity:
        """Compute the features of the training set.

        Args:
            train: Its batches.

        Returns:
            The method itself.

        Raises:
            BatchError: If there are no examples, batches are not as above, or they are
                not the same whenever they are gone through.
            TaskError: If the layer gives no features.
            NonFiniteError: If a feature is NaN or infinite, or overflows float32.
        """
        self._train = None  # in case of an error below
        self._train = self._features(train, "train")
        return self

    def score(self, targets: Iterable[Batch]) -> Float32[np.ndarray, "n m"]:
        """Compare every training example with every target.

        Args:
            targets: Batches of targets.

        Returns:
            The scores, in memory. Shape ``(n, m)``.

        Raises:
            OrderError: If the method was not fitted.
            BatchError: If there are no targets, batches are not as above or not the same
                whenever they are gone through, or features have another length than
                those of the training set.
            CheckpointError: If a checkpoint has other weights than in ``fit``.
            TaskError: If the layer gives no features.
            NonFiniteError: If a feature is NaN or infinite, or it or a score overflows
                float32.
        """
        if self._train is None:
            raise OrderError("There are no features of a training set; fit it first.")
        found = self._features(targets, "targets")
        n, m = len(self._train[0].values), len(found[0].values)
        scores = np.zeros((n, m), dtype=np.float32)
        device = next(self._model.parameters()).device
        for c, (train, target) in enumerate(zip(self._train, found, strict=True)):
            check_unchanged(c, train.weights, target.weights)
            k, other = train.values.shape[1], target.values.shape[1]
            if k != other:
                raise BatchError(
                    f"targets have {other} features each and training examples {k}; pass "
                    f"inputs of one size, or a layer whose features do not depend on it."
                )
            right = target.values.double().to(device)
            for low, high in spans(n, max(1, TILE // max(k, m))):
                left = train.values[low:high].double().to(device)
                part = similarity(left, right, self._metric)
                if train.labels is not None and target.labels is not None:
                    is_same = train.labels[low:high, None] == target.labels
                    part *= is_same.to(device)
                scores[low:high] += (part / len(found)).float().cpu().numpy()
        if not np.isfinite(scores).all():
            raise NonFiniteError(
                f"a product of features overflows float32; pass metric='cosine' instead "
                f"of {self._metric.value!r}."
            )
        return scores

    def _features(self, batches: Iterable[Batch], what: str) -> list[_Features]:
        contents = read_contents(batches, what)
        return [
            self._at_checkpoint(checkpoint, batches, contents, what)
            for checkpoint in self._checkpoints
        ]

    def _at_checkpoint(
        self,
        checkpoint: Weights,
        batches: Iterable[Batch],
        contents: Contents,
        what: str,
    ) -> _Features:
        weights = load_weights(self._model, checkpoint)
        values, labels, size = [], [], 0
        with torch.no_grad():
            for batch in checked(batches, contents, what):
                batch = copied(canonical(batch))  # for models that write to inputs
                found = self._layer(self._model, batch)
                found = _checked(found, batch_size(batch), size, what)
                size += len(found)
                values.append(found.cpu())
                if self._same_label:
                    labels.append(_labels(batch, len(found)).cpu())
        every = torch.cat(labels) if labels else None
        return _Features(weights, torch.cat(values), every)


def similarity(
    left: Float64[Tensor, "n k"], right: Float64[Tensor, "m k"], metric: Metric
) -> Float64[Tensor, "n m"]:
    """Compare every row of a matrix with every row of another.

    Args:
        left: Rows. Shape ``(n, k)``.
        right: Rows. Shape ``(m, k)``.
        metric: How.

    Returns:
        The similarities; 0 for the cosine with a row of zeros. Shape ``(n, m)``.

    Example:
        >>> left = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
        >>> similarity(left, left, Metric.L2)
        tensor([[-0., -5.],
                [-5., -0.]], dtype=torch.float64)
    """
    if metric is Metric.L2:
        return -torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
    if metric is Metric.COSINE:
        left, right = _unit(left), _unit(right)
    return left @ right.T


def _unit(rows: Float64[Tensor, "n k"]) -> Float64[Tensor, "n k"]:
    lengths = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(lengths > 0, lengths, 1.0)


def pooled(
    hidden: Float[Tensor, "b ..."], mask: Shaped[Tensor, "b t"] | None
) -> Float[Tensor, "b k"]:
    """Turn what a layer gives into one row an example.

    Args:
        hidden: Features; their second axis is that of tokens if there are three.
        mask: Which tokens count, if features are of tokens.

    Returns:
        The mean over tokens, or the features flattened. Shape ``(b, k)``.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> pooled(hidden, None), pooled(hidden, torch.tensor([[1, 1, 0]]))
        (tensor([[4.]]), tensor([[2.]]))
    """
    if hidden.ndim != 3:
        return hidden.flatten(1)
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(dim=1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _find(
    model: torch.nn.Module, name: str | None
) -> Callable[[torch.nn.Module, Batch], Tensor]:
    """Make what gives the output of a module, or the input of the last linear one."""
    modules = dict(model.named_modules())
    if name is None:
        linear = [
            key for key, value in modules.items() if isinstance(value, torch.nn.Linear)
        ]
        if not linear:
            raise UnknownNameError(
                f"{type(model).__name__} has no torch.nn.Linear whose input could be "
                f"taken; pass layer, one of {_listed(modules)}, or a function of the model "
                f"and a batch."
            )
        module, label = modules[linear[-1]], linear[-1]
        return lambda model, batch: _capture(model, batch, module, label, is_input=True)
    if name not in modules:
        raise UnknownNameError(
            f"layer={name!r} is not a module of {type(model).__name__}; pass one of "
            f"{_listed(modules)}, or a function of the model and a batch."
        )
    return lambda model, batch: _capture(
        model, batch, modules[name], name, is_input=False
    )


def _listed(modules: Mapping[str, torch.nn.Module]) -> str:
    names = [name for name in modules if name]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{names[:_SHOWN]}{more}"


def _capture(
    model: torch.nn.Module,
    batch: Batch,
    module: torch.nn.Module,
    name: str,
    *,
    is_input: bool,
) -> Tensor:
    with _watched(module, is_input=is_input) as seen:
        _call(model, batch)
    hidden = seen[-1] if seen else None
    if isinstance(hidden, tuple | list) and hidden:
        hidden = hidden[0]
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        what = "the input" if is_input else "the output"
        got = describe_value(hidden) if seen else "no call of it"
        raise TaskError(
            f"{what} of {name or 'the model'} should be features; got {got}. Pass another "
            f"layer, such as one of {_listed(dict(model.named_modules()))}, or a function "
            f"of the model and a batch."
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return pooled(hidden, mask)


@contextmanager
def _watched(module: torch.nn.Module, *, is_input: bool) -> Iterator[list[Any]]:
    """Note what a module gets, or gives, while the context lasts."""
    seen: list[Any] = []

    def note(_module: torch.nn.Module, inputs: Any, output: Any) -> None:
        seen[:] = [inputs if is_input else output]

    handle = module.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _call(model: torch.nn.Module, batch: Batch) -> None:
    if isinstance(batch, Mapping):
        model(**{key: value for key, value in batch.items() if key not in _LABELS})
        return
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise BatchError(
            f"A batch is (inputs, labels), or a mapping; got a {type(batch).__name__}. "
            f"Pass mappings to name what the model takes, or as layer a function of the "
            f"model and a batch."
        )
    model(batch[0])


def _labels(batch: Batch, b: int) -> Int[Tensor, " b"]:
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in _LABELS if key in batch), None)
    else:
        labels = batch[-1] if isinstance(batch, tuple | list) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise BatchError(
            f"same_label needs a whole number for each example, last in a tuple or under "
            f"'labels' or 'label'; got {describe_value(labels)}."
        )
    if labels.numel() != b:
        raise BatchError(
            f"same_label needs one label for each of {b} examples; got "
            f"{describe_value(labels)}."
        )
    return labels.reshape(-1)


def _checked(values: Any, b: int, start: int, what: str) -> Float[Tensor, "b k"]:
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != b:
        raise TaskError(
            f"layer gave {describe_value(values)} for a batch of {b}; features of shape "
            f"({b}, k) are needed."
        )
    kept = values.float()  # as they are kept
    bad = (~torch.isfinite(kept).all(dim=1)).nonzero()
    if len(bad):
        index = start + int(bad[0])
        raise NonFiniteError(
            f"features of example {index} of {what} are not finite in float32; look at "
            f"that example, or at the checkpoint.",
            index=index,
        )
    return kept
