"""The triton kernels compiled to machine code, as their launches ask, without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

from trak._kernels import triton_dense_launch, triton_sparse_launch
from trak._signs import block_sizes, stream_key

TOOL = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
KEY = stream_key(0, 0)


class Driver:
    """What triton asks of a GPU before it compiles for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Kernels are kept by device.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[80, 90])
def compiled(request: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every kernel that is launched from here on, by name; none of them runs."""
    kernels: dict[str, Any] = {}
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> None:
        kernels[self.fn.__name__] = run(self, *args, **{**options, "warmup": True})

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    triton.runtime.driver.set_active(Driver(request.param))
    return kernels


def spilled(kernel: Any, directory: Path) -> int:
    """Bytes of a thread's stack."""
    file = directory / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    report = subprocess.run(
        [TOOL, "-res-usage", file], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1])


@pytest.mark.parametrize("columns", ["rows", "columns"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
def test_every_launch_compiles(
    dtype: torch.dtype, columns: str, compiled: dict[str, Any], tmp_path: Path
) -> None:
    x = torch.zeros(64, 2**16, dtype=dtype)
    if columns == "columns":
        x = x.T.contiguous().T
    out = torch.zeros(64, 2048, dtype=torch.promote_types(dtype, torch.float32))
    sizes = block_sizes(2048, 4)
    examples = torch.zeros(64, dtype=torch.int64)
    triton_sparse_launch.sparse_into(out, x, KEY, 0, sizes)
    triton_sparse_launch.sparse_into(out, x[:, :1000], KEY, 2**40, sizes)
    triton_dense_launch.dense_into(out, x, KEY, 2**40)
    segments = (out, x[:, :384], examples, examples)
    triton_sparse_launch.sparse_segments_into(*segments, KEY, sizes)
    triton_dense_launch.dense_segments_into(*segments, KEY)
    assert set(compiled) == {
        "draw",
        "gather",
        "gather_few",
        "gather_segments",
        "pack",
        "multiply",
        "multiply_segments",
        "_add_up",
    }
    for name, kernel in compiled.items():
        # A few bytes are predicates; a spilled tile is hundreds.
        assert spilled(kernel, tmp_path) < 32, name
    matrix_units = {torch.float64: "mma.sync"}.get(dtype, "mma")
    assert matrix_units in compiled["multiply"].asm["ptx"]
