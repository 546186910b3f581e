"""Sizes of tiles, free memory, and what happens when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trak import _memory
from trak._memory import (
    affordable,
    free_bytes,
    halved,
    is_out_of_memory,
    read_height,
    score_height,
    score_width,
    solve_width,
)
from trak.errors import OutOfMemoryError, TrakError

CPU = torch.device("cpu")
ALLOCATOR = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize("tile", [1, 1 << 24])
@pytest.mark.parametrize("p", [0, 1, 2048, 2**30])
def test_every_size_is_at_least_one(
    monkeypatch: pytest.MonkeyPatch, p: int, tile: int
) -> None:
    monkeypatch.setattr(_memory, "TILE", tile)
    sizes = (read_height(p), solve_width(p), score_width(p, 3), score_height(p, 7))
    assert min(sizes) >= 1


@pytest.mark.parametrize(
    ("free", "size", "expected"), [(8000, 40, 40), (8000, 41, 20), (0, 5, 1), (1, 1, 1)]
)
def test_sizes_are_halved_until_half_of_what_is_free_takes_them(
    monkeypatch: pytest.MonkeyPatch, free: int, size: int, expected: int
) -> None:
    monkeypatch.setattr(_memory, "free_bytes", lambda device: free)
    assert affordable(size, 100, CPU) == expected


def test_which_errors_are_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(OutOfMemoryError("ours"))


def test_answers_to_errors() -> None:
    assert halved(5, RuntimeError(ALLOCATOR), "the scores") == 2
    with pytest.raises(RuntimeError, match="shapes"):
        halved(5, RuntimeError("shapes"), "the scores")
    with pytest.raises(OutOfMemoryError, match=r"left for the scores, even .* smaller"):
        halved(1, RuntimeError(ALLOCATOR), "the scores")
    assert issubclass(OutOfMemoryError, (TrakError, MemoryError))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


PLENTY = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    64 kB\nCached: 1 kB\n"}


def test_free_memory_of_the_machine(tmp_path: Path) -> None:
    assert free_bytes(CPU, write(tmp_path, PLENTY)) == 64 * 1024
    assert 0 < free_bytes(CPU) <= 2**62


def test_free_memory_where_nobody_can_tell(tmp_path: Path) -> None:
    assert free_bytes(CPU, tmp_path) == 2**62


@pytest.mark.parametrize("path", ["/", "/a/b", "/../elsewhere"])
@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_containers(tmp_path: Path, version: int, path: str) -> None:
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    base = "sys/fs/cgroup" + ("/memory" if version == 1 else "")
    line = f"4:cpu,memory:{path}\n3:cpu:/no\n" if version == 1 else f"0::{path}\n"
    write(
        tmp_path,
        {
            **PLENTY,
            "proc/self/cgroup": line,
            f"{base}/{names[0]}": "5000\n",
            f"{base}/{names[1]}": "4000\n",
            f"{base}/memory.stat": f"cache 9\n{names[2]} 300\n",
        },
    )
    assert free_bytes(CPU, tmp_path) == 1300


def test_the_smallest_of_nested_limits_counts(tmp_path: Path) -> None:
    limits = {"": "max", "a/": "900", "a/b/": "4000"}
    files = {f"sys/fs/cgroup/{k}memory.max": v for k, v in limits.items()}
    uses = {f"sys/fs/cgroup/{k}memory.current": "100" for k in limits}
    write(tmp_path, {**PLENTY, "proc/self/cgroup": "0::/a/b\n", **files, **uses})
    assert free_bytes(CPU, tmp_path) == 800


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("proc/self/cgroup", b"garbage\n"),
        ("proc/self/cgroup", b"0::/\xff\n"),
        ("proc/meminfo", b"MemAvailable:\n"),
        ("proc/meminfo", b"MemAvailable: much\n"),
        ("sys/fs/cgroup/memory.stat", b"inactive_file \n"),
    ],
)
def test_files_that_say_nothing_known(tmp_path: Path, name: str, text: bytes) -> None:
    group = "sys/fs/cgroup/memory"
    limits = {f"{group}.max": "900", f"{group}.current": "100"}
    write(tmp_path, {**PLENTY, "proc/self/cgroup": "0::/\n", **limits})
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(text)
    assert free_bytes(CPU, tmp_path) >= 800


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_free_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    assert 0 < free_bytes(device) <= torch.cuda.mem_get_info(device)[1]
