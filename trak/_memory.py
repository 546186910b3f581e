"""How large tiles are, what memory is free, and what happens when there is none.

Sizes are functions of shapes, so that the same job gives the same bits. What is free only
makes them smaller, where it is less than twice what they take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from trak.errors import OutOfMemoryError

TILE = 1 << 24
"""Entries of a working tile: 64 MiB in float32."""

SUMMED = 8192
"""Most products that are summed in float32 before float64 takes over: enough for the
wider sum to cost a few hundredths of the products."""


def read_height(p: int) -> int:
    """Give the number of rows of ``p`` entries to read at once, whatever is free.

    It decides the order of the sums of a Gram matrix, and so its last bits.

    Returns:
        The number.

    Example:
        >>> read_height(512), read_height(2**20)
        (8192, 64)
    """
    return max(1, min(SUMMED, 4 * TILE // max(p, 1)))


def score_width(p: int, checkpoints: int) -> int:
    """Give the number of targets that are solved for at once.

    Returns:
        The number.

    Example:
        >>> score_width(4096, 10)
        6553
    """
    return max(1, 16 * TILE // max(p * checkpoints, 1))


def score_height(p: int, width: int) -> int:
    """Give the number of rows of a block of scores.

    Returns:
        The number.

    Example:
        >>> score_height(4096, 1000), score_height(4096, 2**17)
        (2048, 128)
    """
    return max(1, min(2048, TILE // max(p, width, 1)))


def solve_width(q: int) -> int:
    """Give the number of right sides of a solve, which is made in float64.

    Returns:
        The number.

    Example:
        >>> solve_width(4096)
        4096
    """
    return max(1, TILE // max(q, 1))


def affordable(size: int, unit: int, device: torch.device) -> int:
    """Halve a size until half of the free memory takes it.

    Args:
        size: Rows, columns, or whatever is counted.
        unit: Bytes that each takes.
        device: Where.

    Returns:
        The size, 1 at least.
    """
    budget = free_bytes(device) // 2
    while size > 1 and size * unit > budget:
        size //= 2
    return size


def halved(size: int, error: Exception, what: str) -> int:
    """Answer an error with a smaller size, if that can help.

    Args:
        size: The size that was tried.
        error: What happened.
        what: What was to be computed, for the message.

    Returns:
        Half the size.

    Raises:
        OutOfMemoryError: If memory ran out at size 1.
    """
    if not is_out_of_memory(error):
        raise error
    if size <= 1:
        raise OutOfMemoryError(
            f"There is no memory left for {what}, even for a single row at a time. Use a "
            f"smaller proj_dim, a device with more memory, or end what else is using it."
        ) from error
    return size // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory could not be had."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return not isinstance(error, OutOfMemoryError)
    # The CPU allocator has no error of its own (torch 2.13).
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Find out how much memory can be taken, under the limits of the container.

    Args:
        device: Where.
        root: Where ``proc`` and ``sys`` are.

    Returns:
        Bytes; 2**62 where nobody can tell.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )
        return torch.cuda.mem_get_info(device)[0] + cached
    found = [2**62, *_limits(root)]
    for line in _read(root / "proc/meminfo").splitlines():
        with contextlib.suppress(ValueError, LookupError):
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    return max(0, min(found))


_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Limit, use, and the cache within it that gives way, in both versions of cgroups."""


def _limits(root: Path) -> Iterator[int]:
    """Give what each control group that this process is in has left."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) < 3:
            continue
        _, controllers, path = parts
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = base / path.lstrip("/")
        # In a container the path may be the one outside, and the files at the base.
        for directory in {base, group, *group.parents}:
            if directory == base or base in directory.parents:
                yield from _left(directory, *_FILES[version])


def _left(directory: Path, limit: str, use: str, cache: str) -> Iterator[int]:
    with contextlib.suppress(ValueError, LookupError):  # not there, or "max"
        left = int(_read(directory / limit)) - int(_read(directory / use))
        for line in _read(directory / "memory.stat").splitlines():
            if line.startswith(f"{cache} "):
                left += int(line.split()[1])
        yield left


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "surrogateescape")
    except OSError:
        return ""
