"""How good stored checkpoints' scores are, and what damping and exponent are best."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from trak._blocked import KEPT, Shape, Side, score_blocks
from trak._choices import DAMPING, DampingChoice, read_choice
from trak._linalg import RowReader, spans
from trak._memory import TILE
from trak._reading import read_rows
from trak._scoring import Scoring, Tuning
from trak._thresholds import SoftThreshold
from trak.errors import (
    ExperimentError,
    ModelIDException,
    NonFiniteError,
    OptionError,
    TrakError,
)
from trak.evaluation import (
    CheckpointData,
    CrossValidation,
    TopKStability,
    choose_threshold,
    cross_validate,
    standard_errors,
    top_k_stability,
)
from trak.evaluation._cross_validation import MIN_TO_CHOOSE
from trak.evaluation._uncertainty_threshold import TARGETS
from trak.score_computers import BasicScoreComputer, as_blocked

logger = logging.getLogger("TRAK")

POWERS = (0.25, 0.5, 0.75, 1.0)
"""Exponents of the result that are tried; they cost next to nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Uncertainty:
    """How much scores would differ with other checkpoints."""

    standard_errors: Float32[np.ndarray, "n k"]
    """Standard error of every score."""

    top_k: TopKStability
    """How much of each target's top examples would come again."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What compares stored checkpoints with each other."""

    scoring: Scoring

    chooses_power: bool
    """Whether the exponent of the result is chosen with the damping: nobody gave it."""

    def cross_validate(
        self, exp_name: str, model_ids: Sequence[int], **options: Any
    ) -> CrossValidation:
        """Predict each checkpoint's outputs from the other checkpoints' scores.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints that can be used.
            **options: Those of :func:`trak.evaluation.cross_validate`.

        Returns:
            What was found.
        """
        check_known(options)
        blocked = self._blocked("cross_validate")
        if options.get("exponents") is None:
            options["exponents"] = self._pairs(blocked)
        features = self.scoring.features
        m = self._targets(exp_name)
        data = [self._data(exp_name, model_id, m) for model_id in model_ids]
        with counted(model_ids):
            found = cross_validate(data, features.n, m, features.p, **options)
        notes = [*found.notes]
        if any(re.search(r"checkpoints \d", note) for note in notes):
            notes += _counted(model_ids)
        lambda_reg = blocked.damping.lambda_reg
        if lambda_reg != "auto":
            notes.append(
                f"scores of this TRAKer have lambda_reg={lambda_reg!r}, which is none of "
                f"the dampings here; lambda_reg='auto' takes the one that is best."
            )
        return replace(found, notes=tuple(notes))

    def _pairs(self, blocked: BasicScoreComputer) -> list[tuple[float, float]]:
        """List the exponents to choose from, the default first."""
        a, b = blocked.exponents
        powers = POWERS if self.chooses_power else ()
        return [(a, power) for power in dict.fromkeys([b, *powers])]

    def _blocked(self, call: str) -> BasicScoreComputer:
        computer = self.scoring.features.computer
        blocked = as_blocked(computer)
        if blocked is None:
            raise OptionError(
                f"{call} needs the kernels of BasicScoreComputer; "
                f"{type(computer).__name__} replaces them. Make a TRAKer on the same "
                f"save_dir without score_computer=."
            )
        return blocked

    def _targets(self, exp_name: str) -> int:
        return int(self.scoring.features.saver.experiments[exp_name]["num_targets"])

    def _data(self, exp_name: str, model_id: int, m: int) -> CheckpointData:
        features = self.scoring.features
        saver, device = features.saver, features.device
        members = saver.members(model_id)
        if members is None or len(members) != features.n:
            raise ModelIDException(
                f"it is not known what model id {model_id} was trained on; pass "
                f"train_inds to load_checkpoint, which need not featurize again."
            )
        saver.load_current_store(model_id)
        store = dict(saver.current_store)
        if store.get("grads") is None:
            raise ModelIDException(
                f"the gradients of model id {model_id} were deleted by del_grads=True, and "
                f"cross-validation needs them; featurize again without it."
            )
        saver.load_current_store(model_id, exp_name, m)
        outputs = saver.current_store.get(f"{exp_name}_outputs")
        if outputs is None:
            raise ExperimentError(
                f"experiment {exp_name!r} was scored on model id {model_id} without "
                f"keeping the model's outputs, by an older version or a saver that has no "
                f"place for them; score the targets again under another exp_name."
            )
        weights = np.asarray(store["out_to_loss"], dtype=np.float64).reshape(-1)
        return CheckpointData(
            read_rows(store, "", device),
            read_rows(saver.current_store, f"{exp_name}_", device),
            weights,
            np.array(outputs, dtype=np.float64).reshape(-1),
            members,
        )

    # -- damping ----------------------------------------------------------------------

    def choose(self, exp_name: str, model_ids: Sequence[int]) -> DampingChoice:
        """Choose the damping of an experiment's scores, where ``"auto"`` was asked for.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints that can be used.

        Returns:
            The choice, which is on the experiment's record now.
        """
        record = self.scoring.features.saver.experiments[exp_name]
        choice = self._reason_not_to(exp_name, model_ids)
        if choice is None:
            basis = self._basis(exp_name, model_ids)
            known = read_choice(record, exp_name)
            if known is not None and known.basis == basis:
                return known
            choice = self._chosen(exp_name, model_ids, basis)
        record[DAMPING] = asdict(choice)
        logger.info("experiment %s: %s", exp_name, choice)
        return choice

    def _chosen(
        self, exp_name: str, model_ids: Sequence[int], basis: str
    ) -> DampingChoice:
        try:
            found = self.cross_validate(exp_name, model_ids)
        except (OptionError, NonFiniteError) as error:
            logger.warning("one mean eigenvalue is kept as damping: %s", error)
            reason = f"cross-validation could not tell: {error}"
            return DampingChoice(1.0, None, reason, None, basis)
        low, high = found.interval
        reason = (
            f"cross-validation of {found.n_checkpoints} checkpoints, expected LDS "
            f"{found.lds:.3f} [{low:.3f}, {high:.3f}]"
        )
        b = float(found.exponents[1])
        power = None if b == self._blocked("auto").exponents.result else b
        return DampingChoice(found.multiple, power, reason, found.lds, basis)

    def _reason_not_to(
        self, exp_name: str, model_ids: Sequence[int]
    ) -> DampingChoice | None:
        """Say why checkpoints cannot choose, before anything is computed."""
        computer = self.scoring.features.computer
        blocked = as_blocked(computer)
        if blocked is None or blocked.damping.lambda_reg != "auto":
            reason = f"lambda_reg={computer.lambda_reg!r}"
            return DampingChoice(None, None, reason, None)
        if len(model_ids) < MIN_TO_CHOOSE:
            reason = (
                f"the default: {len(model_ids)} checkpoints, and {MIN_TO_CHOOSE} choose"
            )
            return DampingChoice(1.0, None, reason, None)
        m = self._targets(exp_name)
        for model_id in model_ids:
            try:
                members = self._data(exp_name, model_id, m).members
            except (ModelIDException, ExperimentError) as error:
                return DampingChoice(1.0, None, f"the default: {error}", None)
            if members.all():
                reason = f"the default: model id {model_id} was trained on all examples"
                return DampingChoice(1.0, None, reason, None)
        return None

    def _basis(self, exp_name: str, model_ids: Sequence[int]) -> str:
        saver = self.scoring.features.saver
        parts: list[Any] = [self._pairs(self._blocked("auto"))]
        for model_id in model_ids:
            members = saver.members(model_id)
            packed = b"" if members is None else np.packbits(members).tobytes()
            weights = saver.model_ids[model_id].get("weights")
            parts.append([model_id, weights, hashlib.blake2b(packed).hexdigest()])
        text = json.dumps([exp_name, parts])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    # -- scores of each checkpoint ----------------------------------------------------

    def threshold(
        self, exp_name: str, model_ids: Sequence[int], tuning: Tuning
    ) -> SoftThreshold:
        """Choose a soft threshold by predicting checkpoints from each other.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints that can be used.
            tuning: What was chosen for the experiment.

        Returns:
            The threshold; none where none is clearly better.
        """
        b = self._power(tuning, "soft_threshold='auto'")
        m = self._targets(exp_name)
        data = [self._data(exp_name, model_id, m) for model_id in model_ids]
        chosen = np.unique(np.linspace(0, m - 1, min(m, TARGETS)).round().astype(int))
        columns = [*self._columns(exp_name, model_ids, tuning.multiple, chosen)]
        with counted(model_ids):
            choice = choose_threshold(
                np.concatenate([part for _, part in columns], axis=2),
                np.stack([one.out_to_loss for one in data]),
                np.stack([one.members for one in data]),
                np.stack([one.outputs for one in data])[:, chosen],
                exponent=b,
            )
        logger.info(
            "experiment %s: a soft threshold keeps %.3g of the scores (%d targets)",
            *(exp_name, choice.share, choice.n_targets),
        )
        return SoftThreshold(share=choice.share)

    def uncertainty(
        self,
        exp_name: str,
        model_ids: Sequence[int],
        tuning: Tuning,
        targets: np.ndarray,
        k: int,
    ) -> Uncertainty:
        """Compute standard errors of scores, and how stable the top is.

        Args:
            exp_name: The experiment.
            model_ids: Checkpoints that can be used.
            tuning: What was chosen for the experiment.
            targets: The targets.
            k: How many examples are on top.

        Returns:
            Both.
        """
        b = self._power(tuning, "uncertainty")
        n, m = self.scoring.features.n, self._targets(exp_name)
        sides = [self.scoring.side(i, exp_name, m)[1] for i in model_ids]
        weights = np.stack(sides)
        errors = np.empty((n, len(targets)), dtype=np.float32)

        def noted() -> Iterator[np.ndarray]:
            found = self._columns(exp_name, model_ids, tuning.multiple, targets)
            for (low, high), kernels in found:
                errors[:, low:high] = standard_errors(kernels, weights, exponent=b)
                yield kernels

        return Uncertainty(errors, top_k_stability(noted(), k, weights, exponent=b))

    def _power(self, tuning: Tuning, call: str) -> float:
        own = self._blocked(call).exponents.result
        return own if tuning.power is None else tuning.power

    def _columns(
        self,
        exp_name: str,
        model_ids: Sequence[int],
        multiple: float,
        targets: np.ndarray,
    ) -> Iterator[tuple[tuple[int, int], Float32[np.ndarray, "c n w"]]]:
        """Give the scores of each checkpoint, before the weight on the result."""
        features, m = self.scoring.features, self._targets(exp_name)
        n, p, c = features.n, features.p, len(model_ids)
        sides = [self.scoring.side(i, exp_name, m, multiple)[0] for i in model_ids]
        if 8 * min(n, p) ** 2 * c <= KEPT:
            sides = [_remembered(side) for side in sides]
        for low, high in spans(len(targets), max(1, TILE // (n * max(c, 1)))):
            kernels = np.empty((c, n, high - low), dtype=np.float32)
            shape = Shape(n, high - low, p, features.device)
            ones = torch.ones(n, 1, dtype=torch.float32, device=features.device)
            for one, side in zip(kernels, sides, strict=True):
                part = replace(side, targets=_chosen(side.targets, targets[low:high]))
                for block in score_blocks([part], ones, shape):
                    rows, columns = slice(*block.rows), slice(*block.columns)
                    one[rows, columns] = block.values.cpu().numpy()
            yield (low, high), kernels


def _remembered(side: Side) -> Side:
    return side if side.kernel is None else replace(side, kernel=cache(side.kernel))


def _chosen(read: RowReader, indices: np.ndarray) -> RowReader:
    def reader(low: int, high: int) -> Tensor:
        return torch.cat([read(i, i + 1) for i in indices[low:high].tolist()])

    return reader


def check_known(options: Mapping[str, Any]) -> None:
    """Refuse options that cross-validation does not have.

    Raises:
        OptionError: If there is one.
    """
    parameters = signature(cross_validate).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise OptionError(
            f"cross_validate has no option {unknown[0]!r}; it has {', '.join(known)}."
        )


@contextlib.contextmanager
def counted(model_ids: Sequence[int]) -> Iterator[None]:
    """Say in errors which ids the checkpoints have, where they are other numbers."""
    try:
        yield
    except TrakError as error:
        error.args = (" ".join([str(error), *_counted(model_ids)]),)
        raise


def _counted(model_ids: Sequence[int]) -> list[str]:
    if [*model_ids] == [*range(len(model_ids))]:
        return []
    return [f"Checkpoints are counted from 0 in the model ids {[*model_ids]}."]


def parse_targets(targets: object, m: int) -> np.ndarray:
    """Parse which targets to look at.

    Returns:
        Their indices; all of them for None.

    Raises:
        OptionError: If there are none, or one is out of range.
    """
    if targets is None:
        return np.arange(m)
    array = np.atleast_1d(np.asarray(targets))
    good = array.ndim == 1 and array.size > 0 and array.dtype.kind in "iu"
    if not (good and array.min() >= 0 and array.max() < m):
        raise OptionError(
            f"targets={targets!r} are not targets of this experiment; pass indices from 0 "
            f"to {m - 1}, or None for all."
        )
    return array.astype(np.int64)
