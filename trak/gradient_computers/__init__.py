"""Per-sample gradients of a model output: the interface and its implementations."""

from trak.gradient_computers._abstract import AbstractGradientComputer
from trak.gradient_computers._functional import FunctionalGradientComputer
from trak.gradient_computers._hooks import HookGradientComputer
from trak.gradient_computers._iterative import IterativeGradientComputer
from trak.gradient_computers._working import working_bytes

__all__ = [
    "AbstractGradientComputer",
    "FunctionalGradientComputer",
    "HookGradientComputer",
    "IterativeGradientComputer",
    "working_bytes",
]
