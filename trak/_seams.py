"""Building the five pluggable parts from what the user gave: class, instance or None."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from trak._exponents import PAPER, Exponents, parse_exponents
from trak._options import Options
from trak.errors import OptionError, StoreMismatchError
from trak.gradient_computers import AbstractGradientComputer
from trak.modelout_functions import AbstractModelOutput, resolve_task
from trak.projectors import (
    AbstractProjector,
    CudaProjector,
    NoOpProjector,
    SparseProjector,
    default_projector,
)
from trak.savers import AbstractSaver, MmapSaver
from trak.score_computers import (
    AbstractScoreComputer,
    BasicScoreComputer,
    as_blocked,
    is_blocked,
)


@dataclass(frozen=True, slots=True)
class Parts:
    """What computes: everything but the saver."""

    options: Options
    """The façade's plain arguments."""

    task: AbstractModelOutput
    """What is differentiated."""

    projector: AbstractProjector
    """Projects gradients."""

    proj_dim: int
    """Projected entries, ``p``."""

    gradient_computer: AbstractGradientComputer
    """Computes them."""

    computer_class: Any
    """What that was built from; None for an instance that was given."""

    score_computer: AbstractScoreComputer
    """Computes features and scores."""

    logging_level: int
    """Level of the loggers."""

    @property
    def exponents(self) -> Exponents:
        """The exponents of the out-to-loss weight that scores are computed with."""
        blocked = as_blocked(self.score_computer)
        return PAPER if blocked is None else blocked.exponents


def build_parts(
    model: torch.nn.Module,
    task: Any,
    options: Options,
    gradient_computer: Any,
    projector: Any,
    score_computer: Any,
    logging_level: int,
    exponents: object = None,
) -> Parts:
    """Build every part but the saver from what the user gave.

    Returns:
        The parts.
    """
    resolved = resolve_task(task)
    built = build_projector(projector, options)
    return Parts(
        options,
        resolved,
        built,
        built.proj_dim or options.selection.grad_dim,
        build_gradient_computer(gradient_computer, model, resolved, options),
        gradient_computer if isinstance(gradient_computer, type) else None,
        build_score_computer(
            score_computer, options, logging_level, resolved, exponents
        ),
        logging_level,
    )


def another_computer(parts: Parts) -> AbstractGradientComputer:
    """Build the gradient computer once more, or copy the instance that was given.

    Returns:
        One whose use leaves the other as it is.
    """
    computer = parts.gradient_computer
    if parts.computer_class is None:
        return copy.copy(computer)
    return build_gradient_computer(
        parts.computer_class, computer.model, parts.task, parts.options
    )


def build_gradient_computer(
    given: Any,
    model: torch.nn.Module,
    task: AbstractModelOutput,
    options: Options,
) -> AbstractGradientComputer:
    """Build the gradient computer from its class, or take the instance.

    Returns:
        The gradient computer.
    """
    every = [name for name, _ in model.named_parameters()]
    chosen = list(options.selection.names)
    built = _build(
        "gradient_computer",
        given,
        AbstractGradientComputer,
        model=model,
        task=task,
        grad_dim=options.selection.grad_dim,
        dtype=torch.float32,
        device=options.device,
        grad_wrt=None if chosen == every else chosen,
    )
    result: AbstractGradientComputer = built
    return result


def build_projector(given: Any, options: Options) -> AbstractProjector:
    """Build the projector from its class, take the instance, or make the default.

    Returns:
        The projector.

    Raises:
        OptionError: If nothing says how many entries it should make.
    """
    if given is not None and not isinstance(given, type):
        instance: AbstractProjector = _build("projector", given, AbstractProjector)
        return instance
    keeps_all = given is not None and issubclass(given, NoOpProjector)
    proj_dim = 0 if keeps_all else options.proj_dim
    if proj_dim is None:
        raise OptionError(
            "proj_dim=None leaves open how many entries to project to; pass a number, or "
            "a projector instance."
        )
    grad_dim, seed = options.selection.grad_dim, options.projector_seed
    if given is None:
        return default_projector(grad_dim, proj_dim, seed, options.device)
    common = {
        "grad_dim": grad_dim,
        "proj_dim": proj_dim,
        "seed": seed,
        "proj_type": "sparse" if issubclass(given, SparseProjector) else "rademacher",
        "device": options.device,
    }
    if issubclass(given, CudaProjector):
        common["max_batch_size"] = options.proj_max_batch_size
    built: AbstractProjector = _build("projector", given, AbstractProjector, **common)
    return built


def build_score_computer(
    given: Any,
    options: Options,
    logging_level: int,
    task: AbstractModelOutput,
    exponents: object,
) -> AbstractScoreComputer:
    """Build the score computer from its class, take the instance, or make the default.

    Returns:
        The score computer.

    Raises:
        OptionError: If it cannot use the exponents that were given.
    """
    wanted = None if exponents is None else parse_exponents(exponents)
    chosen = BasicScoreComputer if given is None else given
    lambda_reg = options.damping.lambda_reg
    own = isinstance(chosen, type) and not issubclass(chosen, BasicScoreComputer)
    if own and lambda_reg == "auto":
        lambda_reg = 0.0  # 0.3.2's default: such a class computes with a number
    arguments = {
        "dtype": torch.float32,
        "device": options.device,
        "logging_level": logging_level,
        "lambda_reg": lambda_reg,
    }
    if _takes_exponents(chosen):
        is_auto = lambda_reg == "auto"
        known = parse_exponents(task.exponents) if is_auto else PAPER
        arguments["exponents"] = known if wanted is None else wanted
    built = _build("score_computer", chosen, AbstractScoreComputer, **arguments)
    result: AbstractScoreComputer = built
    blocked = as_blocked(result)
    used = PAPER if blocked is None else blocked.exponents
    if wanted is not None and wanted != used:
        raise OptionError(
            f"exponents={tuple(wanted)}, but {type(result).__name__} computes with "
            f"{tuple(used)}. Leave exponents out; or use a class whose constructor takes "
            f"them and that replaces none of get_xtx, get_x_xtx_inv and get_scores, or "
            f"make the instance with them."
        )
    return result


def _takes_exponents(chosen: Any) -> bool:
    """Tell whether a class is built with exponents and scored by blocks.

    Returns:
        Whether it is; not for instances, which have theirs.
    """
    if not (isinstance(chosen, type) and is_blocked(chosen)):
        return False
    parameters = inspect.signature(chosen).parameters.values()
    return any(
        parameter.name == "exponents" or parameter.kind is parameter.VAR_KEYWORD
        for parameter in parameters
    )


def build_saver(given: Any, parts: Parts) -> AbstractSaver:
    """Build the saver from its class, take the instance, or make the default.

    Returns:
        The saver.
    """
    options = parts.options
    built = _build(
        "saver",
        MmapSaver if given is None else given,
        AbstractSaver,
        save_dir=options.save_dir,
        metadata=store_metadata(parts),
        train_set_size=options.train_set_size,
        proj_dim=parts.proj_dim,
        load_from_save_dir=options.load_from_save_dir,
        logging_level=parts.logging_level,
        use_half_precision=options.use_half_precision,
    )
    result: AbstractSaver = built
    return result


def store_metadata(parts: Parts) -> dict[str, Any]:
    """List what every checkpoint of a store must agree in.

    Returns:
        The saver's metadata.
    """
    options, law = parts.options, parts.projector.proj_type
    return {
        "JL dimension": parts.proj_dim,
        "JL matrix type": str(getattr(law, "value", law)),
        "train set size": options.train_set_size,
        "projection": describe_projector(parts.projector),
        "task": parts.task.describe(),
        "parameters": options.selection.fingerprint(),
        "gradient entries": options.selection.grad_dim,
    }


def _build(name: str, given: Any, interface: type, **arguments: Any) -> Any:
    missing = [
        method
        for method in getattr(interface, "__abstractmethods__", ())
        if not callable(getattr(given, method, None))
    ]
    if missing:
        raise OptionError(
            f"{name} must be a subclass of {interface.__name__} or an instance of one; "
            f"got {given!r}, which has no {', '.join(sorted(missing))}."
        )
    if not isinstance(given, type):
        return given
    try:
        return given(**arguments)
    except TypeError as error:
        raise OptionError(
            f"{name}={given.__name__} cannot be built with the arguments "
            f"{', '.join(arguments)}: {error}. Accept them, or pass an instance."
        ) from error


def describe_projector(projector: AbstractProjector) -> str:
    """Identify the numbers a projector makes, for the store's manifest."""
    own = getattr(projector, "describe", None)
    return str(own()) if own else type(projector).__qualname__


def check_same_projector(ours: AbstractProjector, other: AbstractProjector) -> None:
    """Refuse a projector that makes other numbers than the store's.

    Raises:
        StoreMismatchError: If it does.
    """
    mine, theirs = describe_projector(ours), describe_projector(other)
    if mine != theirs:
        raise StoreMismatchError(
            f"the store's rows are projected by {mine}; rows by {theirs} do not mix with "
            f"them. Make a TRAKer with projector=... and another save_dir."
        )


def has_batched_form(task: AbstractModelOutput) -> bool:
    """Tell whether a task defines the optional batched form of its output."""
    return type(task).get_outputs is not AbstractModelOutput.get_outputs
