"""The methods that attribution is compared with, and TRAK, behind one interface.

Each is fitted on the training set and scores targets: ``method.fit(train).score(targets)``.
"""

from __future__ import annotations

from trak.methods._base import Method
from trak.methods._gradients import GAS, TRAK, GradientCosine, GradientDot, TracIn
from trak.methods._shared import CheckpointGradients, ProjectedGradients

__all__ = [
    "GAS",
    "TRAK",
    "CheckpointGradients",
    "GradientCosine",
    "GradientDot",
    "Method",
    "ProjectedGradients",
    "TracIn",
]
