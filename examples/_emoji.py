"""Emoji that two vendors drew, with names and keywords, from the npm registry's packages.

Run ``python examples/_emoji.py --cache emoji`` to build ``emoji/pairs_32.npz``.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DRAWINGS = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
}
NAMES, KEYWORDS = "unicode-emoji-json@0.9.0", "emojilib@4.0.3"
PACKAGES = (*DRAWINGS.values(), NAMES, KEYWORDS)
MEGABYTES = 137  # of the four together
SIZE = 32


class NotAvailableError(RuntimeError):
    """The packages are neither there nor can they be fetched."""


@dataclass(frozen=True, slots=True)
class Emoji:
    """The same emoji in the same order, drawn twice."""

    google: np.ndarray
    """(k, 32, 32, 3), bytes"""
    twitter: np.ndarray
    """(k, 32, 32, 3), bytes"""
    meta: list[dict[str, Any]]
    """Of each: ``unified`` (its code points), ``name``, ``keywords``, ``category``,
    ``subcategory``."""


def load(cache: Path, packages: Path | None = None) -> Emoji:
    """Read the emoji, building them first if they are not in the cache.

    Args:
        cache: A directory for the result and for what is downloaded.
        packages: A directory that holds the packages' archives already.

    Returns:
        The emoji.

    Raises:
        NotAvailableError: If packages are missing and cannot be fetched.
    """
    path = cache / f"pairs_{SIZE}.npz"
    if not path.exists():
        archives = fetch(cache if packages is None else packages)
        emoji = build(archives)
        meta = np.frombuffer(json.dumps(emoji.meta).encode(), dtype=np.uint8)
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part.npz")
        np.savez_compressed(
            unfinished, google=emoji.google, twitter=emoji.twitter, meta=meta
        )
        unfinished.replace(path)
    return read(path)


def read(path: Path) -> Emoji:
    """Read emoji that were built."""
    with np.load(path) as arrays:
        meta = json.loads(arrays["meta"].tobytes())
        return Emoji(arrays["google"], arrays["twitter"], meta)


def fetch(directory: Path) -> dict[str, Path]:
    """Download the packages' archives that are not in a directory.

    Returns:
        The archive of each package.

    Raises:
        NotAvailableError: If one is missing and cannot be fetched.
    """
    archives = {name: directory / f"{name.replace('@', '-')}.tgz" for name in PACKAGES}
    missing = [name for name, path in archives.items() if not path.exists()]
    if not missing:
        return archives
    wanted = (
        f"This needs the npm packages {', '.join(missing)} (up to {MEGABYTES} MB), whose "
        f"archives `npm pack NAME` would put into {directory}"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise NotAvailableError(
            f"{wanted}, and there is no npm here. Fetch them elsewhere, and pass the "
            f"directory that holds them with --packages."
        )
    directory.mkdir(parents=True, exist_ok=True)
    for name in missing:
        print(f"fetching {name} from the npm registry", flush=True)
        done = subprocess.run(
            [npm, "pack", name, "--silent", "--fetch-retries=1"],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not archives[name].exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise NotAvailableError(
                f"{wanted}, and that failed ({reason}). Without a network, fetch them "
                f"elsewhere, and pass the directory that holds them with --packages."
            )
    return archives


def build(archives: dict[str, Path]) -> Emoji:
    """Put drawings, names and keywords together.

    Args:
        archives: The archive of each package.

    Returns:
        What both vendors drew and has a name, but for the five skin tones.
    """
    names = _json(archives[NAMES], "data-by-emoji.json")
    keywords = _json(archives[KEYWORDS], "dist/emoji-en-US.json")
    listed = _json(archives[DRAWINGS["google"]], "emoji.json")
    kept, meta = [], []
    for entry in listed:
        character = "".join(chr(int(c, 16)) for c in entry["unified"].split("-"))
        is_drawn = all(entry[f"has_img_{vendor}"] for vendor in DRAWINGS)
        is_part = entry["category"] == "Component"
        if is_part or not is_drawn or not {character} <= names.keys() & keywords.keys():
            continue
        kept.append(entry["image"])
        meta.append({
            "unified": entry["unified"],
            "name": names[character]["name"],
            "keywords": [word.replace("_", " ") for word in keywords[character]],
            "category": entry["category"],
            "subcategory": entry["subcategory"],
        })
    drawn = {
        vendor: _drawings(archives[package], vendor, kept)
        for vendor, package in DRAWINGS.items()
    }
    return Emoji(**drawn, meta=meta)


def _json(archive: Path, name: str) -> Any:
    with tarfile.open(archive) as files:
        return json.load(files.extractfile(f"package/{name}"))


def _drawings(archive: Path, vendor: str, names: list[str]) -> np.ndarray:
    wanted = {f"package/img/{vendor}/64/{name}": i for i, name in enumerate(names)}
    drawings = np.empty((len(names), SIZE, SIZE, 3), dtype=np.uint8)
    found = 0
    with tarfile.open(archive) as files:
        for member in files:  # in the order of the archive: it cannot be searched
            if member.name in wanted:
                png = Image.open(io.BytesIO(files.extractfile(member).read()))
                drawings[wanted[member.name]] = _on_white(png)
                found += 1
    if found != len(names):
        raise NotAvailableError(f"{archive} holds {found} of {len(names)} drawings.")
    return drawings


def _on_white(drawing: Image.Image) -> np.ndarray:
    drawing = drawing.convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    flat = Image.alpha_composite(white, drawing).convert("RGB")
    return np.asarray(flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("emoji"))
    parser.add_argument("--packages", type=Path, help="directory of the archives")
    args = parser.parse_args()
    try:
        emoji = load(args.cache, args.packages)
    except NotAvailableError as error:
        sys.exit(str(error))
    print(f"{len(emoji.meta)} emoji in {args.cache / f'pairs_{SIZE}.npz'}")


if __name__ == "__main__":
    main()
