"""What is kept of plans, and what gives way."""

from __future__ import annotations

import copy
import pickle

from trak._kernels.plans import PlanCache


def rounds(plans: PlanCache, names: str, times: int) -> int:
    """Ask for plans of 10 bytes in turn; return how often one was not held."""
    drawn = 0
    for _ in range(times):
        for name in names:
            if plans.get(name) is None:
                drawn += 1
                plans.keep(name, name.upper(), 10)
    return drawn


def test_what_fits_is_kept() -> None:
    plans = PlanCache(30)
    assert rounds(plans, "abc", 5) == 3
    assert plans.bytes == 30
    assert plans.get("b") == "B"


def test_some_of_too_many_are_kept() -> None:
    plans = PlanCache(30)
    rounds(plans, "abcdef", 2)
    assert plans.bytes == 30
    # The latest used of six would never be those that are asked for next.
    assert rounds(plans, "abcdef", 1) < 6


def test_what_is_no_longer_asked_for_gives_way() -> None:
    plans = PlanCache(30)
    rounds(plans, "abc", 5)
    assert not plans.has_room(10)
    rounds(plans, "xyz", 8)
    assert rounds(plans, "xyz", 1) == 0
    assert plans.bytes == 30


def test_what_is_larger_than_all_drives_nothing_out() -> None:
    plans = PlanCache(30)
    rounds(plans, "abc", 1)
    for _ in range(100):
        assert plans.get("large") is None
        assert not plans.has_room(31)
        plans.keep("large", "LARGE", 31)
    assert plans.bytes == 30
    assert rounds(plans, "abc", 1) == 0


def test_the_first_of_two_is_kept() -> None:
    plans = PlanCache(30)
    plans.keep("a", "first", 10)
    plans.keep("a", "second", 20)
    assert plans.get("a") == "first"
    assert plans.bytes == 10


def test_nothing_can_be_kept_without_room() -> None:
    plans = PlanCache(0)
    assert rounds(plans, "ab", 2) == 4
    assert plans.bytes == 0


def test_a_copy_begins_empty() -> None:
    plans = PlanCache(30)
    rounds(plans, "abc", 1)
    for other in (copy.copy(plans), copy.deepcopy(plans)):
        assert other.bytes == 0
        assert rounds(other, "abcd", 1) == 4
        assert other.bytes == 30
    again = pickle.loads(pickle.dumps(plans))
    assert again.get("a") is None
    assert not again.has_room(31)


def test_clearing() -> None:
    plans = PlanCache(30)
    rounds(plans, "abc", 1)
    plans.clear()
    assert plans.bytes == 0
    assert plans.get("a") is None
    assert rounds(plans, "abc", 2) == 3
