"""Random projections of per-sample gradients, as the seam that users can implement.

`SparseProjector` is the default; `BasicProjector` is the dense projection of the paper.
``docs/projections.md`` states which random numbers they use, to the bit.
"""

from __future__ import annotations

from trak.projectors._base import AbstractProjector, AdditiveProjector, ProjectionType
from trak.projectors._basic import (
    BasicProjector,
    BasicSingleBlockProjector,
    NoOpProjector,
)
from trak.projectors._cuda import ChunkedCudaProjector, CudaProjector
from trak.projectors._sparse import SparseProjector, default_projector

__all__ = [
    "AbstractProjector",
    "AdditiveProjector",
    "BasicProjector",
    "BasicSingleBlockProjector",
    "ChunkedCudaProjector",
    "CudaProjector",
    "NoOpProjector",
    "ProjectionType",
    "SparseProjector",
    "default_projector",
]
