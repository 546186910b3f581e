"""How good are the scores? Pure functions of arrays, and drivers of the caller's training.

Every metric is a function of arrays, however they came about. What needs models beside
the one that was attributed takes the caller's ``train`` and ``outputs``.
"""

from __future__ import annotations

from trak.evaluation._bank import GroundTruth
from trak.evaluation._bootstrap import bootstrap_interval
from trak.evaluation._counterfactual import (
    CounterfactualCurve,
    counterfactual_curve,
    removal_masks,
    remove_and_retrain,
)
from trak.evaluation._cross_validation import CheckpointData, cross_validate
from trak.evaluation._cross_validation_result import Candidate, CrossValidation
from trak.evaluation._lds import LdsResult, lds
from trak.evaluation._mislabel import MislabelResult, mislabel_auc
from trak.evaluation._result import TargetMean
from trak.evaluation._retrain import retrain_subsets
from trak.evaluation._retrieval import mean_reciprocal_rank, recall_at_k
from trak.evaluation._subsets import random_subsets
from trak.evaluation._tail_patch import tail_patch, tail_patch_losses
from trak.evaluation._uncertainty import (
    TopKStability,
    standard_errors,
    top_k_stability,
)
from trak.evaluation._uncertainty_threshold import (
    ThresholdChoice,
    choose_threshold,
    soft_threshold,
    threshold_keeping,
)

__all__ = [
    "Candidate",
    "CheckpointData",
    "CounterfactualCurve",
    "CrossValidation",
    "GroundTruth",
    "LdsResult",
    "MislabelResult",
    "TargetMean",
    "ThresholdChoice",
    "TopKStability",
    "bootstrap_interval",
    "choose_threshold",
    "counterfactual_curve",
    "cross_validate",
    "lds",
    "mean_reciprocal_rank",
    "mislabel_auc",
    "random_subsets",
    "recall_at_k",
    "removal_masks",
    "remove_and_retrain",
    "retrain_subsets",
    "soft_threshold",
    "standard_errors",
    "tail_patch",
    "tail_patch_losses",
    "threshold_keeping",
    "top_k_stability",
]
