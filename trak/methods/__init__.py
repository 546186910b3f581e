"""The methods that attribution is compared with, and TRAK, behind one interface.

Each is fitted on the training set and scores targets: ``method.fit(train).score(targets)``.
"""

from __future__ import annotations

from trak.methods._arnoldi import Arnoldi
from trak.methods._base import Method
from trak.methods._curvature_loss import TrainingLoss
from trak.methods._datamodels import Datamodels
from trak.methods._ekfac import EKFAC
from trak.methods._gradients import GAS, TRAK, GradientCosine, GradientDot, TracIn
from trak.methods._influence import InfluenceFunction
from trak.methods._representations import RepresentationSimilarity
from trak.methods._retrained import EmpiricalInfluence
from trak.methods._shared import CheckpointGradients, ProjectedGradients

__all__ = [
    "EKFAC",
    "GAS",
    "TRAK",
    "Arnoldi",
    "CheckpointGradients",
    "Datamodels",
    "EmpiricalInfluence",
    "GradientCosine",
    "GradientDot",
    "InfluenceFunction",
    "Method",
    "ProjectedGradients",
    "RepresentationSimilarity",
    "TracIn",
    "TrainingLoss",
]
