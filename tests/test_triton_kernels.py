"""The triton back end: why it is not used, and its kernels in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trak._kernels import triton_backend

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(module: str, **variables: str) -> None:
    """Run a test module that must say before triton is imported how it will run."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/{module}.py", "-q", "-x"],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@needs_triton
def test_kernels_in_the_interpreter() -> None:
    run("triton_interpreted", TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    run("triton_compiled", TRITON_CACHE_DIR=str(tmp_path))


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_benchmark_without_a_gpu() -> None:
    done = benchmark()
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"There is nothing to measure: torch {torch.__version__} finds no CUDA "
        f"device. --interpret checks the kernels, slowly, on the CPU."
    )


@pytest.mark.slow
@needs_triton
def test_benchmark_in_the_interpreter(tmp_path: Path) -> None:
    written = tmp_path / "gpu.json"
    done = benchmark("--interpret", "--json", str(written))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(written.read_text())
    assert len(found["errors"]) == 14
    assert len(found["kernels"]) == 6
    assert [line["dtype"] for line in found["featurize"]] == ["fp32", "bf16"]


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: capability
    )


def test_reasons_not_to_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = torch.device("cuda", 0)
    assert triton_backend.unavailable(torch.device("cpu")) == (
        "triton kernels need a CUDA device, got 'cpu'"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert triton_backend.unavailable(gpu) == (
        "triton kernels need CUDA, which this torch cannot use here"
    )
    on_a_gpu(monkeypatch, (7, 5))
    assert triton_backend.unavailable(gpu) == (
        "triton kernels need a GPU of compute capability 8.0 or above, got 7.5"
    )
    on_a_gpu(monkeypatch, (8, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = triton_backend.unavailable(gpu)
    assert reason is not None
    assert reason.startswith("triton cannot be imported (")
    assert reason.endswith("); `pip install triton` installs it")


def test_reason_to_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", sys.modules["torch"])
    on_a_gpu(monkeypatch, (9, 0))
    assert triton_backend.unavailable(torch.device("cuda")) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.unavailable(torch.device("cpu")) is None


def test_importing_trak_does_not_import_triton() -> None:
    code = (
        "import sys, trak, trak._kernels.triton_backend\n"
        "sys.exit('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
