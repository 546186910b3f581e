"""Reading a ``transformers.Trainer``: its model, task, data and checkpoints."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trak._collating import Collating
from trak._options import positive
from trak._types import Checkpoint
from trak._weights_files import holds_weights
from trak.errors import CheckpointFileError, OptionError, TrakWarning
from trak.modelout_functions import TASK_TO_MODELOUT
from trak.modelout_functions._inputs import forward_parameters

_TASKS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForConditionalGeneration": "seq2seq_lm",
    "ForSequenceClassification": "text_classification",
    "ForImageClassification": "image_classification",
}
"""What a model's class ends with, and its task."""

_PROBLEMS = {
    "regression": "regression",
    "single_label_classification": None,
    "multi_label_classification": "multilabel",
}
"""What the configuration of a classifier calls its problem, and the task if another."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where training examples, targets and checkpoints come from."""

    model: torch.nn.Module
    """The model; checkpoints are loaded into it."""

    task: Any
    """What is attributed."""

    training: Any
    """The training set, by index."""

    evaluation: Any
    """The targets where none are named; None for none."""

    collating: Collating
    """What makes batches of either."""

    checkpoints: tuple[Checkpoint, ...]
    """Files or state dicts, in order; none for what the model holds."""


def read_trainer(
    trainer: Any,
    *,
    checkpoints: Iterable[Checkpoint] | None,
    task: Any,
    train_dataset: Any,
    data_collator: Any,
    batch_size: int | None,
) -> Source:
    """Find in a trainer what attribution needs.

    Args:
        trainer: A ``Trainer`` of ``transformers``, or something like it.
        checkpoints: The checkpoints; None for those in its output directory.
        task: The task; None to tell it from the model's class.
        train_dataset: The training set; None for the trainer's.
        data_collator: What makes batches; None for the trainer's.
        batch_size: Examples at a time; None for the trainer's, in evaluation.

    Returns:
        The source.

    Raises:
        OptionError: If something is missing, or cannot be attributed.
    """
    names = ("model", "args", "train_dataset", "data_collator")
    missing = [name for name in names if not hasattr(trainer, name)]
    if missing or not isinstance(trainer.model, torch.nn.Module):
        raise OptionError(
            f"trainer must be a transformers.Trainer; got {type(trainer).__name__}"
            f"{', which has no ' + ', '.join(missing) if missing else ''}. For a loop of "
            f"your own make a TRAKer(model, task, train_set_size)."
        )
    _check_one_process(trainer)
    model, args = trainer.model, trainer.args
    training = trainer.train_dataset if train_dataset is None else train_dataset
    check_dataset("train_dataset", training)
    if batch_size is None:
        batch_size = args.per_device_eval_batch_size
    collating = Collating(
        trainer.data_collator if data_collator is None else data_collator,
        _columns(trainer),
        positive("batch_size", batch_size),
        next(model.parameters()).device,
        int(getattr(args, "seed", 0)),
    )
    return Source(
        model,
        infer_task(model) if task is None else task,
        training,
        getattr(trainer, "eval_dataset", None),
        collating,
        _parse_checkpoints(trainer, checkpoints),
    )


def _parse_checkpoints(trainer: Any, checkpoints: Any) -> tuple[Checkpoint, ...]:
    if checkpoints is None:
        return find_checkpoints(trainer)
    if isinstance(checkpoints, str | os.PathLike | Mapping):
        return (checkpoints,)
    return tuple(checkpoints)


def _check_one_process(trainer: Any) -> None:
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        if getattr(trainer, name, False):
            raise OptionError(
                f"the trainer has {name}, so no process holds all weights; load the model "
                f"into a Trainer without it, with the same output_dir."
            )
    if getattr(trainer.args, "world_size", 1) > 1:
        raise OptionError(
            f"the trainer runs in {trainer.args.world_size} processes, and each would "
            f"compute every row; run this part of the script in one."
        )


def check_dataset(name: str, dataset: Any) -> None:
    """Refuse what has no examples by index.

    Raises:
        OptionError: If it has none.
    """
    if isinstance(dataset, Mapping):
        raise OptionError(
            f"{name} is a mapping with {sorted(map(str, dataset))}; pass one of them."
        )
    if isinstance(dataset, str) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise OptionError(
            f"{name} must be a dataset with a length, and examples by index; got "
            f"{type(dataset).__name__}. Read a stream into a list, or save it as a "
            f"datasets.Dataset."
        )
    if len(dataset) == 0:
        raise OptionError(f"{name} is empty.")


def _columns(trainer: Any) -> frozenset[str] | None:
    """List the columns that a trainer gives to its collator, by its own rules.

    Returns:
        The columns; None for all.
    """
    if not getattr(trainer.args, "remove_unused_columns", True):
        return None
    own = getattr(trainer, "_set_signature_columns_if_needed", None)
    if callable(own):
        own()
    names = getattr(trainer, "_signature_columns", None)
    if not names:
        labels = list(getattr(trainer, "label_names", None) or ["labels"])
        names = [*forward_parameters(trainer.model), "label", "label_ids", *labels]
    return frozenset(names)


def infer_task(model: torch.nn.Module) -> str:
    """Tell a task from the class of a model of ``transformers``.

    Args:
        model: The model, perhaps with adapters of PEFT around it.

    Returns:
        The task's name.

    Raises:
        OptionError: If the class does not tell.
    """
    inner = getattr(model, "get_base_model", None)
    base = inner() if callable(inner) else model
    config = getattr(base, "config", None)
    for cls in type(base).__mro__:
        found = [
            task for ending, task in _TASKS.items() if cls.__name__.endswith(ending)
        ]
        if not found or cls.__name__.endswith("WithLMHeadModel"):
            continue
        task = found[0]
        if task == "seq2seq_lm" and not getattr(config, "is_encoder_decoder", True):
            break
        if cls.__name__.endswith("Classification"):
            problem = getattr(config, "problem_type", None)
            if problem is None and getattr(config, "num_labels", 2) == 1:
                problem = "regression"
            task = _PROBLEMS.get(problem or "") or task
        return task
    raise OptionError(
        f"the class {type(base).__name__} does not tell what to attribute; pass task=..., "
        f"one of {sorted(TASK_TO_MODELOUT)}, or a task of your own."
    )


def find_checkpoints(trainer: Any) -> tuple[Path, ...]:
    """List the checkpoints of a trainer's output directory, in order of their steps.

    Returns:
        The folders ``checkpoint-*``.

    Raises:
        CheckpointFileError: If one has no weights.
    """
    output = Path(trainer.args.output_dir or ".")
    steps = {
        int(match[1]): path
        for path in output.glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    folders = tuple(steps[step] for step in sorted(steps))
    bad = [path.name for path in folders if not holds_weights(path)]
    if bad:
        raise CheckpointFileError(
            f"{bad} in {str(output)!r} have no weights in a form that is read here: they "
            f"were cut short, or sharded by DeepSpeed or FSDP. Pass checkpoints=[...], the "
            f"paths of those to use."
        )
    last = int(getattr(getattr(trainer, "state", None), "global_step", 0) or 0)
    if not folders and not last:
        warnings.warn(
            f"There is no checkpoint-* in {str(output)!r}, and this trainer has not "
            f"trained: scores are those of the model as it is. If that is meant, pass "
            f"checkpoints=[].",
            TrakWarning,
            stacklevel=5,
        )
    if last and steps and max(steps) > last:
        warnings.warn(
            f"checkpoint-{max(steps)} in {str(output)!r} is later than this trainer, which "
            f"is at step {last}: is it of another run? Pass checkpoints=[...], the paths "
            f"of those to use.",
            TrakWarning,
            stacklevel=5,
        )
    return folders
