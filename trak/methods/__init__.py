"""The methods that attribution is compared with, and TRAK, behind one interface.

Each is fitted on the training set and scores targets: ``method.fit(train).score(targets)``.
"""

from __future__ import annotations

from trak.methods._base import Method

__all__ = ["Method"]
