"""What was drawn for a sketch, kept for the next one of the same coordinates.

Only how much is kept, and what gives way, is decided here; a plan is what its back end
makes of it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final

# Of as many plans as are kept: what was not asked for so long is another checkpoint's.
_ROUNDS: Final = 4


@dataclass(slots=True)
class _Held:
    """A plan that is kept."""

    plan: Any
    """Whatever its back end needs."""

    bytes: int
    """How much memory it takes."""

    used: int
    """When it was used last, in plans asked for."""


class PlanCache:
    """Plans, up to a number of bytes; safe to share among threads.

    Coordinates come round and round in one order, where keeping the latest used of too
    many plans would keep none until it is used again; so a plan gives way only after it
    was passed over for several rounds.

    Args:
        capacity: The most bytes to keep.

    Attributes:
        bytes: How many are kept.

    Example:
        >>> plans = PlanCache(100)
        >>> plans.keep("a", "the plan of a", 60)
        >>> plans.get("a"), plans.get("b"), plans.has_room(60)
        ('the plan of a', None, False)
    """

    def __init__(self, capacity: int) -> None:
        self.bytes = 0
        self._capacity = capacity
        self._clock = 0
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[PlanCache], tuple[int]]:
        """Copy and pickle it empty: plans can be drawn again, and a lock cannot."""
        return PlanCache, (self._capacity,)

    def get(self, address: Hashable) -> Any:
        """Return the plan of an address; None if it is not held."""
        with self._lock:
            self._clock += 1
            held = self._held.get(address)
            if held is None:
                return None
            held.used = self._clock
            self._held.move_to_end(address)
            return held.plan

    def has_room(self, needed: int) -> bool:
        """Tell whether a plan of so many bytes would be kept; make room if that helps."""
        with self._lock:
            return self._makes_room(needed)

    def keep(self, address: Hashable, plan: Any, needed: int) -> None:
        """Keep a plan, if there is room for it.

        Args:
            address: What it is of.
            plan: The plan; nothing may write to it any more.
            needed: How many bytes it takes.
        """
        with self._lock:
            if address not in self._held and self._makes_room(needed):
                self._held[address] = _Held(plan, needed, self._clock)
                self.bytes += needed

    def clear(self) -> None:
        """Drop every plan."""
        with self._lock:
            self._held.clear()
            self.bytes = 0

    def _makes_room(self, needed: int) -> bool:
        """Drop plans, the longest unused first, that are no longer in use."""
        if needed > self._capacity:
            return False
        while self.bytes + needed > self._capacity:
            address, oldest = next(iter(self._held.items()))
            if self._clock - oldest.used <= _ROUNDS * len(self._held):
                return False
            del self._held[address]
            self.bytes -= oldest.bytes
        return True
