"""How much space and time attribution would take, at which stage, before any work."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trak._batches import batch_size as size_of
from trak._batches import canonical, check_device, row_leaves
from trak._choices import DAMPING, DampingChoice
from trak._estimate_table import Estimate, Stage
from trak._finalizing import FeatureReport
from trak._layout import ROW_EXPONENT
from trak._options import parse_options, positive
from trak._pipeline import Pipeline
from trak._probes import (
    Activations,
    BatchTime,
    Rates,
    measure_activations,
    measure_batch,
    measure_projection,
    measure_rates,
    untouched,
)
from trak._score_costs import Cost, finalize_cost, scores_cost, whole_cost
from trak._seams import Parts, another_computer, build_parts, store_metadata
from trak._types import Batch, GradWrt
from trak.errors import BatchError
from trak.gradient_computers import HookGradientComputer, working_bytes
from trak.savers import AbstractSaver, MmapSaver, StoreSizes, store_sizes
from trak.score_computers import as_blocked, describe

WRITE_RATE = 2e8
"""Bytes a second that a slow disk takes."""

READ_RATE = 5e8
"""Entries a second that are read from the cache of files, widened and compared."""

FLUSH_SECONDS = 3e-3
"""Seconds until a batch's rows are safe against a crash, on a local disk."""

FILES_SECONDS = 3e-2
"""Seconds that opening, checking and replacing files takes at each stage."""

HASH_RATE = 5e8
"""Bytes a second at which a checkpoint is loaded, checked and hashed."""

ROW_BYTES = 12
"""Bytes for each entry of a batch's rows, between projection and store."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work there would be."""

    n: int
    """Training examples."""

    m: int
    """Targets."""

    c: int
    """Checkpoints."""

    b: int
    """Examples of a batch."""

    k: int
    """Examples for each target that ``top_k`` keeps."""


def estimate(
    model: torch.nn.Module,
    task: Any,
    train_set_size: int,
    *,
    num_targets: int,
    num_checkpoints: int = 1,
    batch: Batch | None = None,
    batch_size: int | None = None,
    k: int = 10,
    proj_dim: int = 2048,
    use_half_precision: bool = True,
    grad_wrt: GradWrt | None = None,
    device: str | torch.device | None = None,
    gradient_computer: Any = HookGradientComputer,
    projector: Any = None,
    score_computer: Any = None,
    lambda_reg: float | str = "auto",
    exponents: tuple[float, float] | None = None,
) -> Estimate:
    """Estimate the space and time of every stage, before any work.

    No store is opened or made, and the model, its gradients and the random number
    generators stay as they are. Takes a fraction of a second, and with a ``batch`` the
    time of featurizing that twice.

    Args:
        model: The model; its weights do not matter.
        task: As in :class:`TRAKer`.
        train_set_size: Number of training examples, ``n``.
        num_targets: Number of targets, ``m``.
        num_checkpoints: Number of checkpoints, ``c``.
        batch: Some training examples, on the model's device, to measure the time of
            featurizing and the memory of activations with. None to leave activations
            out, and to count each parameter as used once by each example.
        batch_size: Examples that are featurized at a time, ``b``; None for those of
            ``batch``, or 32.
        k: Examples for each target that ``top_k`` keeps.
        proj_dim: As in :class:`TRAKer`.
        use_half_precision: As in :class:`TRAKer`.
        grad_wrt: As in :class:`TRAKer`.
        device: As in :class:`TRAKer`.
        gradient_computer: As in :class:`TRAKer`.
        projector: As in :class:`TRAKer`.
        score_computer: As in :class:`TRAKer`.
        lambda_reg: As in :class:`TRAKer`.
        exponents: As in :class:`TRAKer`.

    Returns:
        The estimate. Sizes on disk are exact up to some digits in records, memory and
        time are not.

    Raises:
        OptionError: If an argument cannot work.
        BatchError: If the batch has no rows, or is on another device.
    """
    options = parse_options(
        model,
        train_set_size=train_set_size,
        save_dir="trak_results",
        load_from_save_dir=True,
        device=device,
        proj_dim=proj_dim,
        use_half_precision=use_half_precision,
        proj_max_batch_size=32,
        projector_seed=0,
        grad_wrt=grad_wrt,
        lambda_reg=lambda_reg,
        on_non_finite="raise",
    )
    given = gradient_computer, projector, score_computer
    parts = build_parts(
        model,
        task,
        options,
        *given,
        logging.getLogger("ScoreComputer").level,
        exponents,
    )
    return estimate_parts(
        parts, None, num_targets, num_checkpoints, batch, batch_size, k
    )


def estimate_parts(
    parts: Parts,
    saver: AbstractSaver | None,
    num_targets: int,
    num_checkpoints: int,
    batch: Batch | None,
    batch_size: int | None,
    k: int = 10,
) -> Estimate:
    """Estimate for parts that are built; see :func:`estimate`.

    Returns:
        The estimate.
    """
    found = None if batch is None else _check_batch(parts, batch := canonical(batch))
    sizes = Sizes(
        n=parts.options.train_set_size,
        m=positive("num_targets", num_targets),
        c=positive("num_checkpoints", num_checkpoints),
        b=positive("batch_size", found or 32 if batch_size is None else batch_size),
        k=min(positive("k", k), parts.options.train_set_size),
    )
    with untouched(parts.gradient_computer.model):
        measured = _measure(parts, sizes, batch, found or 0)
    has_files = saver is None or isinstance(saver, MmapSaver)
    files = _files(parts, sizes) if has_files else StoreSizes(0, 0, 0, 0)
    finalize, scores, top_k = _score_costs(parts, sizes)
    n, m, c = sizes.n, sizes.m, sizes.c
    return Estimate(
        featurize=_rows_stage(parts, sizes, measured, n, files.featurize),
        finalize_features=_score_stage(parts, measured, finalize, c, files.finalize),
        score=_rows_stage(parts, sizes, measured, m, files.score),
        finalize_scores=_score_stage(parts, measured, scores, 1, files.finalize_scores),
        top_k=_score_stage(parts, measured, top_k, 1, 0),
        sizes=(
            f"{n:,} training examples, {m:,} targets, {c:,} checkpoints; "
            f"{parts.options.selection.grad_dim:,} gradient entries projected to "
            f"{parts.proj_dim:,}; batches of {sizes.b:,} on {parts.options.device}"
        ),
        notes=_notes(measured, found, has_files=has_files),
    )


def _check_batch(parts: Parts, batch: Batch) -> int:
    size = size_of(batch)
    if size == 0:
        raise BatchError("The batch is empty; pass at least one example, or no batch.")
    check_device(batch, parts.options.device)
    return size


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on this machine."""

    rates: Rates
    """Of products, where scores are computed."""

    batch: BatchTime
    """For a batch, from examples to rows."""

    batch_bytes: int
    """The batch itself."""

    gradient_bytes: int
    """Activations and gradients."""


def _measure(parts: Parts, sizes: Sizes, batch: Batch | None, found: int) -> Measured:
    device, d = parts.options.device, parts.options.selection.grad_dim
    rates = measure_rates(torch.device(getattr(parts.score_computer, "device", device)))
    pipeline = Pipeline(
        another_computer(parts),
        parts.projector,
        parts.options.selection,
        0,
        parts.proj_dim,
        math.sqrt(d),
        "training example",
        weighted=True,
    )
    if batch is None:
        used = sum(
            value.numel() for value in parts.gradient_computer.model.parameters()
        )
        seconds = 6.0 * used * sizes.b / rates.float32  # forward 2, backward 4
        seconds += measure_projection(parts.projector, d, sizes.b, device) or 0.0
        gradients = _gradient_bytes(pipeline, sizes.b, Activations(0, 0))
        return Measured(rates, BatchTime(seconds, seconds), 0, gradients)
    half = parts.options.use_half_precision
    timed = measure_batch(pipeline, batch, found, device, half=half)
    share = sizes.b / found
    model = pipeline.computer.model
    activations = measure_activations(model, parts.task, batch, found)
    return Measured(
        rates,
        BatchTime(timed.first * share, timed.others * share),
        int(_bytes(row_leaves(batch)) * share),
        _gradient_bytes(pipeline, sizes.b, activations),
    )


def _gradient_bytes(pipeline: Pipeline, b: int, activations: Activations) -> int:
    projector: Any = pipeline.projector
    block = projector.block_bytes if pipeline.streams else 0
    found = working_bytes(pipeline.computer, b, activations.each, block)
    return found + activations.fixed


def _rows_stage(
    parts: Parts, sizes: Sizes, measured: Measured, rows: int, disk: int
) -> Stage:
    b, p = min(sizes.b, rows), parts.proj_dim
    model = _model_bytes(parts)
    device = model + 2 * measured.batch_bytes + measured.gradient_bytes
    device += parts.projector.working_bytes(b)
    host = ROW_BYTES * b * p + model  # as a state dict, to load
    batches = math.ceil(rows / sizes.b)
    seconds = measured.batch.total(rows / sizes.b) + batches * FLUSH_SECONDS
    seconds = sizes.c * (seconds + model / HASH_RATE) + disk / WRITE_RATE
    return _stage(parts, disk, device, host, seconds)


def _score_stage(
    parts: Parts, measured: Measured, cost: Cost, times: int, disk: int
) -> Stage:
    seconds = (
        cost.float32 / measured.rates.float32
        + cost.float64 / measured.rates.float64
        + cost.entries / READ_RATE
        + FILES_SECONDS
    )
    device = _model_bytes(parts) + cost.device
    return _stage(parts, disk, device, cost.host, times * seconds + disk / WRITE_RATE)


def _stage(parts: Parts, disk: int, device: int, host: int, seconds: float) -> Stage:
    if parts.options.device.type == "cpu":
        return Stage(disk, device + host, 0, seconds)
    return Stage(disk, host, device, seconds)


def _score_costs(parts: Parts, sizes: Sizes) -> tuple[Cost, Cost, Cost]:
    n, m, c, p = sizes.n, sizes.m, sizes.c, parts.proj_dim
    if as_blocked(parts.score_computer) is None:
        scores = whole_cost(n, m, p, c)
        return whole_cost(n, 0, p, 1), scores, scores
    top_k = scores_cost(n, m, p, c, sizes.k)
    return finalize_cost(n, p), scores_cost(n, m, p, c), top_k


def _files(parts: Parts, sizes: Sizes) -> StoreSizes:
    n, p = sizes.n, parts.proj_dim
    computer = parts.score_computer
    finalized: dict[str, Any] = {"finalized_with": describe(computer)}
    derived = "features"
    if as_blocked(computer) is not None:
        third = 1 / 3  # as long as most numbers are
        solve, dtype = "primal", "float16"
        report = FeatureReport(n, p, solve, third, third, 0, 0, third, dtype)
        power = finalized[ROW_EXPONENT] = parts.exponents.rows
        finalized["report"] = report.as_dict()
        derived = "weighted_gram" if power else "gram"
    return store_sizes(
        parts.options.save_dir,
        store_metadata(parts),
        finalized,
        half=parts.options.use_half_precision,
        derived=derived,
        scored={
            "finalized_with": describe(computer, scores=True),
            "soft_threshold": None,
            DAMPING: asdict(
                DampingChoice(1.0, None, f"the default: {sizes.c} are few", None)
            ),
        },
        num_targets=sizes.m,
        num_checkpoints=sizes.c,
        exp_name="default",
    )


def _notes(
    measured: Measured, found: int | None, *, has_files: bool
) -> tuple[str, ...]:
    rate = measured.rates.float32 / 1e9
    if found is None:
        time = (
            "Times are rough. No batch was given, so featurizing counts each parameter "
            "as used once by each example, which is too little for convolutions and "
            "sequences, and RAM or GPU is without activations: pass batch=."
        )
    else:
        time = (
            f"Featurizing was timed with a batch of {found}; other times follow from the "
            f"number of operations, and disks are taken to be slow."
        )
    memory = "Memory is without Python and PyTorch themselves and without the cache of files."
    notes = [time, f"Products: {rate:,.0f} GFLOP/s in float32.", memory]
    if not has_files:
        notes.append(
            "The saver is a custom one: what it writes and holds is not known."
        )
    return tuple(notes)


def _model_bytes(parts: Parts) -> int:
    model = parts.gradient_computer.model
    return _bytes([*model.parameters(), *model.buffers()])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
