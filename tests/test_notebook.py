"""The CIFAR-10 notebook: what is committed of it, its data, and one run from top to bottom."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "cifar_quickstart.ipynb"
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
FIGURES = ["pictures", "self", "retraining"]


def code_cells(path: Path = NOTEBOOK) -> dict[str, dict[str, Any]]:
    """List the notebook's code cells by id."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: cell for cell in cells if cell["cell_type"] == "code"}


def outputs(cell: dict[str, Any], mime: str) -> list[str]:
    found = [output.get("data", {}).get(mime) for output in cell["outputs"]]
    return ["".join(one) for one in found if one is not None]


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def assert_complete(cells: dict[str, dict[str, Any]]) -> None:
    counts = [cell["execution_count"] for cell in cells.values()]
    assert counts == list(range(1, len(cells) + 1))
    for name, cell in cells.items():
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds <= {"stream", "display_data"}, name
        assert "stderr" not in {output.get("name") for output in cell["outputs"]}, name
        assert len(outputs(cell, "image/png")) == (name in FIGURES), name
    assert "digits instead of CIFAR-10" in printed(cells["data"])
    assert "expected LDS" in printed(cells["cross-validation"])


def test_the_committed_notebook_was_run_from_top_to_bottom():
    assert_complete(code_cells())
    assert NOTEBOOK.stat().st_size < 300_000
    assert str(ROOT) not in NOTEBOOK.read_text(encoding="utf-8")
    # Nor a folder of another machine: an absolute path follows a blank or a quote.
    shown = [
        line
        for cell in code_cells().values()
        for line in (printed(cell), *outputs(cell, "text/plain"))
    ]
    assert not re.search(r"(?:^|[\s'\"(=])/\w", "\n".join(shown))


@pytest.fixture
def read_data(monkeypatch, capsys):
    """Run the notebook's first two code cells; give their names, and what they print."""

    def run(root: str) -> tuple[dict[str, Any], str]:
        monkeypatch.setenv("CIFAR10", root)
        names: dict[str, Any] = {}
        capsys.readouterr()
        for key in ("imports", "data"):
            exec("".join(code_cells()[key]["source"]), names)
        return names, capsys.readouterr().out

    pytest.importorskip("matplotlib").use("Agg")
    return run


def test_it_reads_cifar10_as_it_is_published(read_data, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (18, 3072), dtype=np.uint8)
    for part in range(6):
        rows = slice(3 * part, 3 * part + 3)
        content = {"data": pixels[rows], "labels": [part, 8, 9]}
        name = f"data_batch_{part + 1}" if part < 5 else "test_batch"
        (folder / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": ["airplane", "automobile"]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))

    names, out = read_data(str(tmp_path))
    assert names["name"] == "cifar10"
    assert names["classes"] == ["airplane", "automobile"]
    assert "instead" not in out
    (x, y), (test_x, test_y) = names["train"], names["test"]
    expected = torch.from_numpy(pixels).view(-1, 3, 32, 32).float() / 255
    torch.testing.assert_close(torch.cat([x, test_x]), expected)
    assert y.tolist() == [label for part in range(5) for label in (part, 8, 9)]
    assert test_y.tolist() == [5, 8, 9]


def test_it_takes_digits_where_there_is_no_torchvision(
    read_data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    names, out = read_data(str(tmp_path))
    assert names["name"] == "digits"
    assert "digits instead of CIFAR-10 (ModuleNotFoundError" in out
    assert len(names["train"][0]) == 1297
    assert len(names["test"][0]) == 500
    assert names["train"][0].shape[1:] == (1, 16, 16)
    assert not list(tmp_path.iterdir())


def test_it_takes_digits_when_asked_to(read_data):
    names, out = read_data("digits")
    assert names["name"] == "digits"
    assert "(CIFAR10=digits)" in out


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    copy = tmp_path / NOTEBOOK.name
    copy.write_bytes(NOTEBOOK.read_bytes())
    environment = {
        **os.environ,
        "CIFAR10": "digits",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONPATH": PYTHONPATH,
    }
    subprocess.run(
        [
            *(sys.executable, "-c", "from nbclient.cli import main; main()"),
            *("--inplace", "--NotebookClient.record_timing=False", copy.name),
        ],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    cells = code_cells(copy)
    assert_complete(cells)
    committed = code_cells()
    for name in cells:
        assert cells[name]["source"] == committed[name]["source"]
    assert (tmp_path / "demo_results").is_dir()
