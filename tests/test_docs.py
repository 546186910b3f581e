"""The documentation is true: its blocks run, and its tables match the code."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

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
            exec(code, namespace)  # noqa: S102
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
