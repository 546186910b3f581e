"""Fixtures that several test modules use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jaxtyping import config
from torch import Tensor

from tests.bench import Bench


@pytest.fixture(scope="session")
def bench_scores(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """What every job of :class:`tests.bench.Bench` must come to in the end."""
    return Bench(tmp_path_factory.mktemp("expected")).complete()


@pytest.fixture
def untyped() -> Iterator[None]:
    """Switch run-time type checks off, as they are for users, to pass wrong types."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)
