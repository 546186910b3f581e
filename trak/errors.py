"""The exception tree: one root, and leaves that also are what 0.3.2 raised."""

from __future__ import annotations


class TrakError(Exception):
    """Root of every error this library raises on purpose."""


class OptionError(TrakError, ValueError):
    """An argument has a value that cannot work."""


class UnknownNameError(OptionError, KeyError):
    """A name is not one of the known names."""

    def __str__(self) -> str:
        # KeyError would print the repr of its message.
        return Exception.__str__(self)


class UnknownTaskError(UnknownNameError):
    """The task's name is not one of the registered names."""


class OrderError(TrakError, AssertionError):
    """A method was called before the one it builds on."""


class BatchError(TrakError, AssertionError, ValueError):
    """A batch, its ``inds`` or its ``num_samples`` do not fit each other or the store."""


class TaskError(TrakError, RuntimeError):
    """A task returned something of the wrong shape, or cannot run on this batch."""


class GradientError(TrakError, RuntimeError):
    """The per-sample gradients of this model cannot be computed this way."""


class CheckpointError(TrakError, RuntimeError):
    """A checkpoint does not fit the model."""


class CheckpointFileError(CheckpointError, OSError):
    """A checkpoint's file is missing or damaged, or cannot be read safely."""


class ModelModeError(TrakError, RuntimeError):
    """The model is in a mode that makes one example's output depend on the others."""


class NonFiniteError(TrakError, ArithmeticError):
    """A NaN or an infinity where none can be right.

    Attributes:
        index: Position of the offending example in the training set or among the
            targets; None where no single example is to blame.
        model_id: The checkpoint it was found with, or None.
        parameter: Name of the first parameter whose gradient is not finite, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        index: int | None = None,
        model_id: int | None = None,
        parameter: str | None = None,
    ) -> None:
        super().__init__(message)
        self.index = index
        self.model_id = model_id
        self.parameter = parameter


class SingularKernelError(TrakError, RuntimeError):
    """The kernel of the features has no inverse at the damping asked for."""


class ConvergenceError(TrakError, ArithmeticError):
    """An iteration diverges, or cannot reach an answer."""


class OutOfMemoryError(TrakError, MemoryError):
    """There is not enough memory even for the smallest tile."""


class BackendError(TrakError, ModuleNotFoundError, ValueError):
    """A back end was asked for by name and cannot run here."""


class ModelIDException(TrakError):  # noqa: N818  0.3.2's name
    """A model id is unknown, taken, or not yet in the state a call needs."""


class NoCheckpointError(ModelIDException, AssertionError):
    """There is no checkpoint to work with."""


class ExperimentError(TrakError, ValueError):
    """An experiment is unknown, badly named, or not yet in the state a call needs."""


class StoreError(TrakError):
    """Root of the errors about what is, or should be, on disk."""


class StoreMismatchError(StoreError, AssertionError):
    """The store was written with a setting that would change the numbers."""


class StoreCorruptError(StoreError, ValueError):
    """A file of the store is truncated, damaged or not one of ours."""


class StoreWriteError(StoreError, OSError):
    """The store cannot be written: a full disk, or no permission."""


class StaleRowError(StoreError, BatchError):
    """A row is stored for this index, but from different data."""


class TrakWarning(UserWarning):
    """Something is not wrong, but the user should know."""


class BackendWarning(TrakWarning):
    """A faster back end cannot be used here; the numbers are the same without it."""
