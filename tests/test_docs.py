"""The documentation is true: its blocks run, and its tables match the code."""

from __future__ import annotations

import builtins
import contextlib
import doctest
import errno
import importlib.util
import io
import json
import logging
import os
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markdown.extensions.toc import slugify

import trak
from trak import TRAKer, _layout, errors

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@dataclass(frozen=True)
class Block:
    """A fenced block, and the output that the page shows below it."""

    line: int
    info: str
    source: str
    output: str | None


def fences(text: str) -> list[tuple[int, int, str, str]]:
    """List every fenced block: first line, last line, info string, content."""
    found, start, info = [], None, ""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if start is None:
            start, info = number, line[3:].strip()
        else:
            content = "\n".join(lines[start : number - 1]) + "\n"
            found.append((start, number, info, content))
            start = None
    assert start is None, f"the fence at line {start} is not closed"
    return found


def python_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    lines = text.split("\n")
    found = fences(text)
    blocks = []
    for position, (start, end, info, source) in enumerate(found):
        if info.split(" ")[0] != "python":
            continue
        output = None
        if position + 1 < len(found):
            after, _, kind, content = found[position + 1]
            between = "".join(lines[end : after - 1])
            if kind == "text" and not between.strip():
                output = content
        blocks.append(Block(start, info, source, output))
    return blocks


def execute(page: Path, namespace: dict[str, object]) -> None:
    checker = doctest.OutputChecker()
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for block in python_blocks(page):
        if "notest" in block.info.split():
            continue
        # Line numbers in a traceback are then those of the page.
        code = compile("\n" * block.line + block.source, str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.output is not None:
            got = printed.getvalue()
            assert checker.check_output(block.output, got, flags), (
                f"{page.name}:{block.line} printed\n{got}\nand the page shows\n"
                f"{block.output}"
            )


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    index = page.with_name("index.md")
    if page.parent.name == "symptoms" and page != index:
        execute(index, namespace)  # the set-up of all of them
    execute(page, namespace)


# -- store.md against a real store ------------------------------------------------------

STORE = ROOT / "docs" / "store.md"
N, P, M = 7, 5, 4


def tables(page: Path) -> dict[str, list[list[str]]]:
    """Give the rows of every table of a page, under the heading it follows."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not line.startswith("|---"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(heading, []).append(cells)
    return {heading: rows[1:] for heading, rows in found.items()}


def code(cell: str) -> str:
    return cell.strip("`")


@pytest.fixture(scope="module", params=[True, False], ids=["float16", "float32"])
def store(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    """Make a store with every file there can be: two checkpoints, two experiments."""
    save_dir: Path = tmp_path_factory.mktemp("store")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator)
    y = torch.arange(N) % 2
    model = torch.nn.Linear(3, 2)
    options = {
        "proj_dim": P,
        "use_half_precision": request.param,
        "logging_level": logging.WARNING,
    }
    traker = TRAKer(model, "image_classification", N, save_dir, **options)
    checkpoints = [
        {"weight": torch.randn(2, 3, generator=generator), "bias": torch.zeros(2)}
        for _ in range(2)
    ]
    for checkpoint in checkpoints:
        traker.load_checkpoint(checkpoint, train_inds=[0, 2])
        traker.featurize((x, y))
    traker.finalize_features([0])
    traker.finalize_features([1], del_grads=True)
    for checkpoint in checkpoints:
        traker.start_scoring_checkpoint(checkpoint, exp_name="one", num_targets=M)
        traker.score((x[:M], y[:M]))
    traker.finalize_scores("one")
    # Either kind of Gram matrix.
    paper = TRAKer(
        model, "image_classification", N, save_dir, exponents=(0.0, 1.0), **options
    )
    paper.finalize_features([0])
    paper.saver.load_current_store(0)
    assert paper.saver.current_store["features"].shape == (N, P)
    return save_dir


def documented_arrays() -> dict[str, list[str]]:
    found = tables(STORE)
    rows = [*found["Arrays of a checkpoint"], *found["Arrays of an experiment"]]
    return {code(row[0]): row for row in rows}


def generic(path: str) -> str:
    """Put the placeholders back into a path below a store."""
    path = re.sub(r"^[01]/", "<id>/", path)
    path = re.sub(r"^id_[01]\.", "id_<id>.", path)
    return re.sub(r"/one([._])", r"/<exp>\1", path)


def test_store_files(store: Path) -> None:
    half = json.loads((store / "metadata.json").read_text())["dtype"] == "float16"
    real = {
        generic(str(path.relative_to(store)))
        for path in store.rglob("*")
        if path.is_file()
    }
    records = {h.split("`")[1] for h in tables(STORE) if h.startswith("Record")}
    documented = {*documented_arrays(), *records, "experiments.json"}
    if not half:
        documented = {name for name in documented if "exponent" not in name}
    assert real == documented


def test_store_arrays(store: Path) -> None:
    dtype = json.loads((store / "metadata.json").read_text())["dtype"]
    sizes = {"n": N, "p": P, "q": min(N, P), "m": M, "1": 1}
    documented = documented_arrays()
    for path in store.rglob("*.mmap"):
        _, _, axes, kind, _ = documented[generic(str(path.relative_to(store)))]
        array = np.load(path, allow_pickle=False)
        assert array.shape == tuple(sizes[axis.strip()] for axis in axes.split(","))
        assert array.dtype == np.dtype(dtype if kind == "store" else kind)


def test_store_keys() -> None:
    found = tables(STORE)
    specs = {(code(row[1]), code(row[0])) for row in found["Arrays of a checkpoint"]}
    kept = {**_layout.TRAIN_ARRAYS, **_layout.DERIVED_ARRAYS}
    assert specs == {
        (key.removeprefix("weighted_"), spec.path.replace("{model}", "<id>"))
        for key, spec in kept.items()
    }
    rows = {code(row[1]) for row in found["Arrays of an experiment"]}
    assert rows == {f"<exp>_{key}" for key in [*_layout.TARGET_ARRAYS, "scores"]}


def test_store_records(store: Path) -> None:
    headings = [h for h in tables(STORE) if h.startswith("Record")]
    for heading in headings:
        name = heading.split("`")[1]
        documented = {code(row[0]) for row in tables(STORE)[heading]}
        real: set[str] = set()
        for path in store.rglob("*.json"):
            if generic(str(path.relative_to(store))) == name:
                record = json.loads(path.read_text())
                if name == "id_<id>.json":
                    (record,) = record.values()
                real |= set(record)
        # Only tasks such as CLIP are given data, and the store here is of another.
        assert real == documented - {"task_data"}, name


def test_store_refusals_name_real_errors() -> None:
    for row in tables(STORE)["What is refused"]:
        (name,) = re.findall(r"`(\w+)`", row[1])
        assert issubclass(getattr(errors, name), errors.TrakError)


# -- what pages refer to ----------------------------------------------------------------

LOOSE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
EVERY = [*LOOSE, *sorted((ROOT / "docs").rglob("*.md"))]


def prose(page: Path) -> str:
    """Give a page's text without its fenced blocks."""
    lines = page.read_text(encoding="utf-8").split("\n")
    for start, end, _, _ in fences("\n".join(lines)):
        lines[start - 1 : end] = [""] * (end - start + 1)
    return "\n".join(lines)


def anchors(page: Path) -> list[str]:
    found = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        explicit = re.search(r"\{ *#([\w-]+) *\}", heading)
        plain = heading.replace("`", "").replace("<", "").replace(">", "")
        found.append(explicit[1] if explicit else slugify(plain, "-"))
    return found


@pytest.mark.parametrize("page", EVERY, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(other), f"{page.name} links to {target}"


def test_differences_have_anchors_of_their_own() -> None:
    page = ROOT / "docs" / "differences.md"
    headings = re.findall(r"^### .+$", prose(page), re.MULTILINE)
    assert len(headings) > 15
    assert all(re.search(r" \{ #[\w-]+ \}$", heading) for heading in headings)
    assert len(set(anchors(page))) == len(anchors(page))


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for page in EVERY:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)
        assert set(named) <= targets, page.name
        if page.name == "README.md":
            assert {"demo", "test"} <= set(named)


def test_the_five_commands_are_those_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = fences((ROOT / "CONTRIBUTING.md").read_text())[0][3].splitlines()
    assert len(commands) == 5
    for command in commands:
        module = command.replace("pytest", "python -m pytest")
        assert f"$(BIN)/{module}" in makefile


def test_error_names_exist() -> None:
    for page in EVERY:
        for name in re.findall(r"`(?:\w+\.)*(\w+Error)`", prose(page)):
            known = hasattr(errors, name) or hasattr(builtins, name)
            assert known, f"{page.name} names {name}"


def test_every_public_module_is_in_the_api() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    for module in pkgutil.iter_modules(trak.__path__):
        if not module.name.startswith("_") and module.name != "traker":
            assert f"trak.{module.name}" in documented
    assert {f"trak.{name}" for name in ("TRAKer", "test_install")} <= documented


def test_every_symptom_is_in_the_table() -> None:
    index = ROOT / "docs" / "symptoms" / "index.md"
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", prose(index)))
    assert linked == {p.name for p in index.parent.glob("*.md")} - {"index.md"}


def test_a_full_disk_reads_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "store" / "0" / "grads.mmap"
    _layout.make_directory(path.parent)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(errors.StoreWriteError) as caught:
        _layout.create_array(path, (2, 2), "float32")
    page = (ROOT / "docs" / "symptoms" / "no-space.md").read_text()
    (shown,) = [block[3] for block in fences(page)[:1]]
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(
        shown, f"{caught.value.strerror}\n", flags
    )


def test_api_docstrings_read_as_markdown() -> None:
    spec = importlib.util.spec_from_file_location("roles", ROOT / "docs" / "_roles.py")
    assert spec is not None
    assert spec.loader is not None
    roles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(roles)
    text = "Solves :math:`x^2`.\n\n.. math:: y =\n     x\n\nSee :class:`~trak.TRAKer`."
    assert roles.to_markdown(text) == (
        "Solves \\(x^2\\).\n\n\\[\ny =\nx\n\\]\n\nSee `trak.TRAKer`."
    )
