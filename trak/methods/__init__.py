"""The methods that attribution is compared with, and TRAK, behind one interface.

Each is fitted on the training set and scores targets: ``method.fit(train).score(targets)``.
"""

from __future__ import annotations

from trak.methods._arnoldi import Arnoldi
from trak.methods._base import Method
from trak.methods._curvature_loss import TrainingLoss
from trak.methods._ekfac import EKFAC
from trak.methods._influence import InfluenceFunction

__all__ = ["EKFAC", "Arnoldi", "InfluenceFunction", "Method", "TrainingLoss"]
