"""How good are the scores? Pure functions of arrays; training stays with the caller."""

from __future__ import annotations

from trak.evaluation._bootstrap import bootstrap_interval
from trak.evaluation._lds import LdsResult, lds
from trak.evaluation._subsets import random_subsets

__all__ = ["LdsResult", "bootstrap_interval", "lds", "random_subsets"]
