"""Installing with a compiler, without one, and under the sanitizers of one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trak._kernels.native import digest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
CHECK = """
import warnings
import torch
import trak
from trak.projectors import SparseProjector
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trak.test_install()
    SparseProjector(9, 4).project(torch.ones(1, 9), model_id=0)
print("warned:", *(str(w.message) for w in caught))
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what is released; building leaves files behind."""
    copy = tmp_path / "sources"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "trak", copy / "trak", ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def run(*command: str, cwd: str = ROOT.anchor, **environment: str) -> str:
    result = subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def install(sources: Path, compiler: str) -> tuple[list[str], str]:
    """Build a wheel, install it, and return its file names and what a check says."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    wheels = sources / "wheels"
    run(*pip, "wheel", *offline, "-w", str(wheels), str(sources), CC=compiler)
    [wheel] = wheels.iterdir()
    target = sources / "installed"
    run(*pip, "install", *offline, "--target", str(target), str(wheel))
    libraries = [path.name for path in target.rglob("*.so")]
    told = run(sys.executable, "-c", CHECK, PYTHONPATH=str(target), TRAK_BACKEND="")
    return [wheel.name, *libraries], told


@pytest.mark.slow
def test_without_a_compiler(sources: Path) -> None:
    names, told = install(sources, "/bin/false")
    assert len(names) == 1
    assert names[0].endswith("-py3-none-any.whl")
    assert "SparseProjector on cpu: " in told
    assert "native kernels: not used (they were not compiled when trak was" in told
    assert "trak is installed correctly." in told
    warned = told[told.index("warned:") :]
    assert (
        warned.count("trak's native kernels are not used: they were not compiled") == 1
    )


@pytest.mark.slow
@needs_compiler
def test_with_a_compiler(sources: Path) -> None:
    names, told = install(sources, str(COMPILER))
    assert "-py3-none-" in names[0]
    assert not names[0].endswith("-any.whl")
    assert names[1:] == ["_native.so"]
    assert "native kernels: ready on cpu" in told
    assert told.endswith("warned:\n")


@pytest.mark.slow
@needs_compiler
def test_under_sanitizers(tmp_path: Path) -> None:
    runtime = run(str(COMPILER), "-print-file-name=libasan.so").strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    library = tmp_path / "native.so"
    source = ROOT / "trak" / "_kernels" / "native.c"
    run(
        str(COMPILER),
        *("-std=gnu11", "-O1", "-g", "-ffp-contract=off", "-fPIC"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "-shared",
        "-pthread",
        f"-DSOURCES={digest()}ull",
        str(source),
        "-o",
        str(library),
    )
    tested = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not fork")
    told = run(
        sys.executable,
        *tested,
        "tests/test_native_kernels.py",
        cwd=str(ROOT),
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        TRAK_TEST_LIBRARY=str(library),
    )
    assert " passed" in told
    assert "skipped" not in told
