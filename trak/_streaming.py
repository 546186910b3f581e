"""Rows of large arrays, block by block, the next blocks being fetched meanwhile.

No arithmetic: what is computed of a block is the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float32
from torch import Tensor

from trak._linalg import RowReader, spans
from trak._memory import halved

T = TypeVar("T")

AHEAD = 2
"""Blocks that are fetched before they are asked for."""


@runtime_checkable
class Rows(Protocol):
    """Rows whose reading has two parts: waiting for them, and making floats of them."""

    def __call__(self, low: int, high: int) -> Float32[Tensor, "b p"]:
        """Do both."""

    def buffer(self, height: int) -> Float32[Tensor, "height p"]:
        """Give a place for the rows of a block, on their device."""

    def fetch(self, low: int, high: int) -> Any:
        """Wait for rows. Any thread may; no tensor is computed with."""

    def decode(self, fetched: Any, out: Float32[Tensor, "b p"]) -> None:
        """Put what was fetched into a place."""


def prefetched(
    tasks: Iterable[Callable[[], T]], ahead: int = AHEAD
) -> Generator[T, None, None]:
    """Run tasks in order in another thread, a few ahead of who takes their results.

    Args:
        tasks: What to run.
        ahead: How many may be finished and not taken.

    Yields:
        The result of each, in order; an error of a task is raised where its result
        would be. When the iterator is closed, no task is running any more.

    Example:
        >>> list(prefetched([lambda: "a", lambda: "b"]))
        ['a', 'b']
    """
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="trak-reader") as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(task))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def over_rows(
    sources: Sequence[RowReader],
    n: int,
    height: int,
    make: Callable[[int, int, Iterator[Tensor]], T],
    what: str,
) -> Iterator[tuple[int, int, T]]:
    """Compute something of every block of rows; with smaller blocks if memory runs out.

    Args:
        sources: What gives rows; each as many.
        n: How many.
        height: Rows of a block.
        make: ``make(low, high, parts)``, where ``parts`` gives the rows ``low..high`` of
            each source in order, each valid until the next is asked for; all must be
            taken. It may be called again for the same rows after it ran out of memory.
        what: What is computed, for the message.

    Yields:
        ``(low, high, result)`` of each block, in order.

    Raises:
        OutOfMemoryError: If there is no memory even for a single row.
    """
    low = 0
    while low < n:
        try:
            with closing(_blocks(sources, low, n, height)) as blocks:
                for start, high, parts in blocks:
                    yield start, high, make(start, high, parts)
                    low = high
        except (RuntimeError, MemoryError) as error:
            height = halved(min(height, n - low), error, what)


def _blocks(
    sources: Sequence[RowReader], low: int, n: int, height: int
) -> Generator[tuple[int, int, Iterator[Tensor]], None, None]:
    pieces = [(low + start, low + stop) for start, stop in spans(n - low, height)]
    if len(pieces) * len(sources) == 1:  # nothing to fetch meanwhile
        yield *pieces[0], (source(*pieces[0]) for source in sources)
        return
    staged = [source for source in sources if isinstance(source, Rows)]
    place = staged[0].buffer(min(height, n - low)) if staged else None
    tasks = (partial(_fetch, source, *piece) for piece in pieces for source in sources)
    with closing(prefetched(tasks)) as fetched:
        for start, stop in pieces:
            yield start, stop, _decoded(sources, fetched, stop - start, place)


def _fetch(source: RowReader, low: int, high: int) -> Any:
    return source.fetch(low, high) if isinstance(source, Rows) else source(low, high)


def _decoded(
    sources: Sequence[RowReader],
    fetched: Iterator[Any],
    size: int,
    place: Tensor | None,
) -> Iterator[Tensor]:
    for source in sources:
        got = next(fetched)
        if isinstance(source, Rows) and place is not None:
            source.decode(got, place[:size])
            got = place[:size]
        yield got
