"""TRAKer: the order of operations, cursors and progress. No arithmetic, no file names."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import torch
from torch import Tensor

from trak._attributing import Attributing
from trak._estimate import estimate_parts
from trak._estimate_table import Estimate
from trak._features import Features
from trak._options import parse_options
from trak._scoring import Scoring
from trak._scoring_call import parse_scoring_call
from trak._seams import build_parts, build_saver, check_same_projector
from trak._session import Session
from trak._trainer import Source, read_trainer
from trak._types import Batch, Checkpoint, GradWrt
from trak._validating import Validation
from trak.errors import OptionError
from trak.gradient_computers import HookGradientComputer
from trak.projectors import AbstractProjector
from trak.savers import MmapSaver


class TRAKer(Attributing):
    """Attributes a model's outputs to its training examples.

    The TRAK method (Park et al., 2023; https://arxiv.org/abs/2303.14186), in two loops
    over checkpoints: featurize the training set, then score the targets.

    Args:
        model: The model; checkpoints are loaded into it, and it is left in evaluation
            mode.
        task: What is attributed: a name in
            :data:`trak.modelout_functions.TASK_TO_MODELOUT`, a task's class or instance.
        train_set_size: Number of training examples, ``n``.
        save_dir: Directory of the store; work that is there is gone on with.
        load_from_save_dir: Whether checkpoints that are already there take part in
            calls that name none.
        device: Where the model is; None to look. The model is never moved.
        gradient_computer: Class, or instance, that computes per-sample gradients.
        projector: Instance, or class, that projects them; None for the sparse one.
        saver: Class, or instance, that keeps intermediate results; None for files.
        score_computer: Class, or instance, that computes scores; None for the exact estimator.
        proj_dim: Projected entries, ``p``, where ``projector`` is not an instance.
        logging_level: Level of the loggers; above ``INFO`` there are no progress bars.
        use_half_precision: Whether rows are stored in float16, which rounds them by one
            part in 2000; every sum and solve is wider.
        proj_max_batch_size: Largest batch of a ``CudaProjector`` given as a class.
        projector_seed: Seed of the projection.
        grad_wrt: Names or globs of the parameters to differentiate, or a predicate on
            (name, parameter); None for all that require gradients.
        lambda_reg: Damping. ``"auto"`` adds a multiple of the mean eigenvalue to the
            kernel's diagonal: the one that cross-validation of the checkpoints chose, and
            once where it cannot; a number adds that; ``"pinv"`` takes the undamped limit.
        exponents: Powers ``(a, b)`` of the out-to-loss weight, on the rows of the
            training set and on the result. None for the task's where ``lambda_reg`` is
            ``"auto"``, and else for ``(0, 1)``, the paper's.
        on_non_finite: ``"raise"``, or ``"skip"`` to leave out training examples with
            NaN or infinite gradients; targets with them always raise.

    Raises:
        OptionError: If an argument cannot work.
        StoreError: If ``save_dir`` cannot be used, or holds other work.

    Attributes:
        normalize_factor: What projected gradients are divided by, ``sqrt(d)``.
        scores: What :meth:`finalize_scores` returned last.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        task: Any,
        train_set_size: int,
        save_dir: str | Path = "./trak_results",
        load_from_save_dir: bool = True,  # noqa: FBT001  0.3.2's signature
        device: str | torch.device | None = None,
        gradient_computer: Any = HookGradientComputer,
        projector: Any = None,
        saver: Any = None,
        score_computer: Any = None,
        proj_dim: int | None = 2048,
        logging_level: int = logging.INFO,
        use_half_precision: bool = True,  # noqa: FBT001  0.3.2's signature
        proj_max_batch_size: int = 32,
        projector_seed: int = 0,
        grad_wrt: GradWrt | None = None,
        lambda_reg: float | str = "auto",
        *,
        on_non_finite: str = "raise",
        exponents: tuple[float, float] | None = None,
    ) -> None:
        options = parse_options(
            model,
            train_set_size=train_set_size,
            save_dir=save_dir,
            load_from_save_dir=load_from_save_dir,
            device=device,
            proj_dim=proj_dim,
            use_half_precision=use_half_precision,
            proj_max_batch_size=proj_max_batch_size,
            projector_seed=projector_seed,
            grad_wrt=grad_wrt,
            lambda_reg=lambda_reg,
            on_non_finite=on_non_finite,
        )
        self.logger = logging.getLogger("TRAK")
        self.logger.setLevel(logging_level)
        self.options, self.model = options, model
        given = gradient_computer, projector, score_computer
        parts = self._parts = build_parts(
            model, task, options, *given, logging_level, exponents
        )
        self.task, self.proj_dim = parts.task, parts.proj_dim
        self.gradient_computer = parts.gradient_computer
        self.score_computer = parts.score_computer
        self.saver = build_saver(saver, parts)
        self.train_set_size, self.device = options.train_set_size, options.device
        self.save_dir, self.load_from_save_dir = options.save_dir, load_from_save_dir
        self.dtype = torch.float16 if use_half_precision else torch.float32
        self.grad_wrt, self.lambda_reg = grad_wrt, lambda_reg
        self.exponents = tuple(parts.exponents)
        self.num_params = sum(value.numel() for value in model.parameters())
        self.num_params_for_grad = options.selection.grad_dim
        self.proj_seed = options.projector_seed
        self.normalize_factor = torch.tensor(math.sqrt(self.num_params_for_grad))
        self._features = Features(
            self.saver,
            self.score_computer,
            torch.device(getattr(self.score_computer, "device", self.device)),
            self.train_set_size,
            self.proj_dim,
            quiet=logging_level > logging.INFO,
        )
        self._scoring = Scoring(self._features)
        is_open = exponents is None and self.score_computer is not score_computer
        self._validation = Validation(self._scoring, chooses_power=is_open)
        if isinstance(self.saver, MmapSaver):
            self.saver.make_features = self._features.make_features
        self.scores: np.ndarray | None = None
        self._session = Session.of(self.saver, parts)
        self._source: Source | None = None
        self._featurized: list[int] | None = None
        self._quiet = logging_level > logging.INFO

    @classmethod
    def from_trainer(
        cls,
        trainer: Any,
        save_dir: str | Path = "./trak_results",
        *,
        checkpoints: Iterable[Checkpoint] | None = None,
        task: Any = None,
        train_dataset: Any = None,
        data_collator: Any = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> TRAKer:
        """Make one from a ``transformers.Trainer``, for :meth:`attribute`.

        Args:
            trainer: The trainer, after training or made anew over its ``output_dir``.
            save_dir: Directory of the store; work that is there is gone on with.
            checkpoints: Paths or state dicts; None for the ``checkpoint-*`` folders of
                ``output_dir``, and where there are none, as for an empty list, the
                model's own weights.
            task: What is attributed; None to tell it from the model's class.
            train_dataset: The training set; None for the trainer's.
            data_collator: What makes batches; None for the trainer's. Tokens that it masks
                at random are drawn once for every example.
            batch_size: Examples at a time; None for ``per_device_eval_batch_size``.
            **options: Those of the constructor, such as ``proj_dim``.

        Returns:
            A TRAKer over the trainer's training set, in its order.

        Raises:
            OptionError: If the trainer lacks something, its model's class does not tell
                the task, or an option cannot work.
            CheckpointFileError: If a ``checkpoint-*`` has no weights.
            StoreError: If ``save_dir`` cannot be used, or holds other work.
        """
        source = read_trainer(
            trainer,
            checkpoints=checkpoints,
            task=task,
            train_dataset=train_dataset,
            data_collator=data_collator,
            batch_size=batch_size,
        )
        traker = cls(
            source.model, source.task, len(source.training), save_dir, **options
        )
        traker._source = source
        return traker

    def __setattr__(self, name: str, value: Any) -> None:
        if name in {"gradient_computer", "score_computer", "saver"} & set(vars(self)):
            raise OptionError(
                f"{name} cannot be replaced; make another TRAKer with it."
            )
        super().__setattr__(name, value)

    @property
    def projector(self) -> AbstractProjector:
        """The projector; another may be set if it makes the same numbers."""
        return self._session.projector

    @projector.setter
    def projector(self, projector: AbstractProjector) -> None:
        check_same_projector(self.projector, projector)
        self._session.projector = projector

    def estimate(
        self,
        num_targets: int,
        num_checkpoints: int = 1,
        batch: Batch | None = None,
        batch_size: int | None = None,
    ) -> Estimate:
        """Estimate the space and time of every stage as :func:`trak.estimate` does.

        Args:
            num_targets: Number of targets, ``m``.
            num_checkpoints: Number of checkpoints, ``c``.
            batch: Some training examples to measure with; None for a rough estimate.
            batch_size: Examples that will be featurized at a time.

        Returns:
            The estimate; nothing is stored, and nothing changes.
        """
        parts = replace(self._parts, projector=self.projector)
        return estimate_parts(
            parts, self.saver, num_targets, num_checkpoints, batch, batch_size
        )

    def load_checkpoint(
        self,
        checkpoint: Checkpoint,
        model_id: int | None = None,
        _allow_featurizing_already_registered: bool = False,  # noqa: FBT001  0.3.2's
        *,
        train_inds: Iterable[SupportsIndex] | Tensor | np.ndarray | None = None,
    ) -> None:
        """Load a checkpoint into the model, to featurize the training set with it.

        Args:
            checkpoint: Its state dict; or the path of a file of ``safetensors`` or of
                ``torch.save``, or of a ``transformers`` or PEFT folder with one. Nothing
                is unpickled but tensors.
            model_id: Its id in the store; None for the id of these weights, or a new one.
            _allow_featurizing_already_registered: Accepted for 0.3.2; a checkpoint that
                is partly featurized is always gone on with.
            train_inds: The training examples that it was trained on, as indices or as a
                boolean mask of shape ``(n,)``; None if that is not known. It is kept for
                :meth:`cross_validate`, and from then on the out-to-loss weights of these
                examples and of the others have the same mean size in the result.

        Raises:
            CheckpointError: If it does not fit the model.
            CheckpointFileError: If it is a path, and cannot be read from there.
            NonFiniteError: If it has a NaN or an infinity.
            ModelIDException: If the id belongs to other weights.
            OptionError: If ``train_inds`` is empty, has an index twice or one that is
                out of range.
            StoreMismatchError: If the checkpoint is known with other ``train_inds``.
        """
        self._session.load_for_training(
            checkpoint,
            model_id,
            allow_known=_allow_featurizing_already_registered,
            train_inds=train_inds,
        )

    def featurize(
        self,
        batch: Batch,
        inds: Iterable[SupportsIndex] | Tensor | np.ndarray | None = None,
        num_samples: int | None = None,
    ) -> None:
        r"""Compute and store the features of a batch of training examples.

        A row is :math:`P^\top \nabla_\theta f(z; \theta) / \sqrt{d}` (Park et al., 2023,
        Section 3.2). Rows that are stored already are not computed again.

        Args:
            batch: Tensors in any nesting of tuples, lists and mappings, with one row
                for each example; on the model's device.
            inds: The examples' indices in the training set, in any order; None for the
                next ones in order. Shape ``(b,)``.
            num_samples: Their number; it is inferred, and checked if given.

        Raises:
            OrderError: If no checkpoint is loaded, or the model has changed since.
            BatchError: If the batch does not fit ``inds`` or the training set.
            NonFiniteError: If a gradient is not finite and ``on_non_finite="raise"``.
            StaleRowError: If a stored row came from another example.
        """
        self._session.process(batch, inds, num_samples, targets=False)

    @overload
    def start_scoring_checkpoint(
        self, exp_name: str, checkpoint: Checkpoint, model_id: int, num_targets: int
    ) -> None: ...

    @overload
    def start_scoring_checkpoint(
        self,
        checkpoint: Checkpoint,
        model_id: int | None = None,
        *,
        exp_name: str | None = None,
        num_targets: int,
    ) -> None: ...

    def start_scoring_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Load a checkpoint into the model, to score targets with it.

        Called as ``(exp_name, checkpoint, model_id, num_targets)``, by position or name,
        or with the checkpoint first and the rest by name.

        Args:
            *args: As above.
            **kwargs: ``exp_name``: the experiment's name, one for each set of targets
                (``"default"``). ``checkpoint``: as in :meth:`load_checkpoint`. ``model_id``: its id; if
                it is left out, the id that these weights have. ``num_targets``: number
                of targets, ``m``.

        Raises:
            OptionError: If an argument is missing, unknown or given twice.
            CheckpointError: If the checkpoint does not fit the model.
            ModelIDException: If it is not finalized, or the id has other weights.
            ExperimentError: If the name cannot be one, or has another ``num_targets``.
        """
        self._session.load_for_scoring(parse_scoring_call(args, kwargs))

    def score(
        self,
        batch: Batch,
        inds: Iterable[SupportsIndex] | Tensor | np.ndarray | None = None,
        num_samples: int | None = None,
    ) -> None:
        """Compute and store the projected gradients of a batch of targets.

        Args:
            batch: As in :meth:`featurize`.
            inds: The targets' indices, in any order; None for the next ones in order.
                Shape ``(b,)``.
            num_samples: Their number; it is inferred, and checked if given.

        Raises:
            OrderError: If no checkpoint is loaded for scoring, or the model has changed.
            BatchError: If the batch does not fit ``inds`` or the number of targets.
            NonFiniteError: If a gradient is not finite.
            StaleRowError: If a stored row came from another target.
        """
        self._session.process(batch, inds, num_samples, targets=True)
