"""From rows of the store to kernels, features and reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from trak._blocked import Shape
from trak._blocked import write_features as write_blocks
from trak._featurizing import Store
from trak._layout import SKIPPED
from trak._linalg import Kernel, spans
from trak._memory import read_height
from trak._reading import StoredRows, ZeroRows, read_rows
from trak.errors import TaskError
from trak.score_computers import BasicScoreComputer

SATURATED = 1e-6
"""Out-to-loss weight below which an example has next to no say in any score."""


@dataclass(frozen=True, slots=True)
class FeatureReport:
    """What finalizing a checkpoint's features found."""

    examples: int
    """Number of training examples, ``n``."""

    proj_dim: int
    """Projected entries, ``p``."""

    solve: str
    """``"primal"`` (``p`` by ``p``) or ``"dual"`` (``n`` by ``n``)."""

    ridge: float
    """What was added to the kernel's diagonal, in its own units."""

    condition: float
    """Condition number of the damped kernel, estimated."""

    zero_rows: int
    """Examples whose projected gradient is zero; they score zero on every target."""

    skipped_rows: int
    """Examples left out for want of finite gradients; they score zero as well."""

    saturated: float
    """Share of examples with an out-to-loss weight below 1e-6."""

    dtype: str
    """Type that the rows are stored in."""

    @property
    def is_remarkable(self) -> bool:
        """Whether some examples cannot score, or most hardly can."""
        return self.zero_rows > 0 or self.skipped_rows > 0 or self.saturated > 0.5

    def as_dict(self) -> dict[str, Any]:
        """Turn it into what a JSON record can hold."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"n={self.examples}, p={self.proj_dim}, {self.dtype} rows, {self.solve} "
            f"solve; ridge {self.ridge:.3g}, condition number {self.condition:.2g}; "
            f"{self.zero_rows} zero rows, {self.skipped_rows} skipped, "
            f"{100 * self.saturated:.1f} % saturated"
        )


def fit(
    computer: BasicScoreComputer,
    store: Store,
    n: int,
    p: int,
    zeros: ZeroRows | None = None,
    multiple: float = 1.0,
) -> tuple[Float64[Tensor, "q q"], Kernel]:
    """Compute, or read, a checkpoint's Gram matrix, and factor it.

    It is that of the rows weighted with the computer's first exponent. A ``gram`` among
    the arrays must be as well.

    Args:
        computer: What computes.
        store: The checkpoint's arrays.
        n: Number of training examples.
        p: Projected entries.
        zeros: Takes note of rows that are zero, if rows are read at all.
        multiple: How many mean eigenvalues the damping ``"auto"`` stands for.

    Returns:
        The Gram matrix and the damped kernel.
    """
    if "gram" in store:
        gram = torch.from_numpy(np.array(store["gram"])).to(computer.device)
    else:
        gram = computer.gram(train_rows(computer, store, computer.device, zeros), n, p)
    if multiple == 1:  # subclasses may know no other
        return gram, computer.kernel(gram, n, p)
    return gram, computer.kernel(gram, n, p, multiple)


def train_rows(
    computer: BasicScoreComputer,
    store: Store,
    device: torch.device,
    look: ZeroRows | None = None,
) -> StoredRows:
    """Make a reader of a checkpoint's rows, weighted with the first exponent.

    Args:
        computer: What has the exponents.
        store: The checkpoint's arrays.
        device: Where the rows are wanted.
        look: Takes note of rows that are zero, before they are weighted.

    Returns:
        The reader.
    """
    weights = computer.exponents.row_weights(store["out_to_loss"])
    return read_rows(store, "", device, look, weights)


def check_out_to_loss(store: Store, n: int) -> None:
    """Refuse a checkpoint on which every score would be zero.

    Raises:
        TaskError: If every out-to-loss weight is.
    """
    if not np.asarray(store["out_to_loss"]).any():
        raise TaskError(
            f"The out-to-loss gradient of all {n} training examples is exactly zero, so "
            f"every score would be. Is the model fitted to the last bit, or the task's "
            f"get_out_to_loss_grad wrong?"
        )


def report(
    store: Store, kernel: Kernel, n: int, p: int, zeros: ZeroRows | None = None
) -> FeatureReport:
    """Put together what a user should know about a checkpoint's rows.

    Args:
        store: The checkpoint's arrays.
        kernel: Its damped Gram matrix.
        n: Number of training examples.
        p: Projected entries.
        zeros: What saw the rows while they were read for something else; if it did not
            see all, they are read.

    Returns:
        The report.
    """
    if zeros is None or not zeros.is_complete:
        zeros = ZeroRows(n)
        read = read_rows(store, "", torch.device("cpu"), zeros)
        for low, high in spans(n, read_height(p)):
            read(low, high)
    weights = np.abs(np.asarray(store["out_to_loss"], dtype=np.float64))
    flags = store.get("is_featurized")
    skipped = 0 if flags is None else int((np.asarray(flags) == SKIPPED).sum())
    return FeatureReport(
        examples=n,
        proj_dim=p,
        solve="primal" if n > p else "dual",
        ridge=kernel.ridge,
        condition=kernel.condition,
        zero_rows=zeros.count - skipped,
        skipped_rows=skipped,
        saturated=float((weights < SATURATED).mean()),
        dtype=str(store["grads"].dtype),
    )


def read_reports(
    records: Mapping[int, Mapping[str, Any]],
) -> dict[int, FeatureReport]:
    """Read the reports out of checkpoints' records, where they have one."""
    return {
        model_id: FeatureReport(**record["report"])
        for model_id, record in records.items()
        if record.get("report") is not None
    }


def write_features(
    computer: BasicScoreComputer,
    kernel: Kernel,
    store: Store,
    array: Any,
    n: int,
    p: int,
) -> None:
    """Write the features of a checkpoint.

    Args:
        computer: What has the exponents, and where to compute.
        kernel: The checkpoint's damped Gram matrix, the smaller of the two.
        store: Its arrays.
        array: Changed in place. Shape ``(n, p)``.
        n: Number of training examples.
        p: Projected entries.
    """
    rows = train_rows(computer, store, computer.device)
    write_blocks(kernel, rows, array, Shape(n, 0, p, computer.device))
