"""The ImageNet script, as a user runs it, on a folder of tiny pictures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "imagenet.py"
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# The number of threads does not matter to images of 32 pixels.
SHIM = """
import runpy, sys, torch
from benchmarks.architectures_models import define_operators
define_operators()
torch.set_num_threads(1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

CLASSES = ("n01440764", "n01443537", "n01484850")
N_TRAIN, N_VAL = 11, 4  # images of each class


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SHIM, str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": "88"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with images, two checkpoints in two formats, and what made them."""
    for package in ("torchvision", "PIL"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from PIL import Image

    folder = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for part, count in (("train", N_TRAIN), ("val", N_VAL)):
        for name in CLASSES:
            (folder / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(
                    folder / "images" / part / name / f"{name}_{i:02}.png"
                )
    make = (
        "import torch, torchvision\n"
        "for seed in range(2):\n"
        "    torch.manual_seed(seed)\n"
        "    model = torchvision.models.resnet18(num_classes=3)\n"
        "    torch.save(model.state_dict(), f'{seed}.pth')\n"
    )
    (folder / "make.py").write_text(make)
    done = subprocess.run(
        [sys.executable, "-c", SHIM, str(folder / "make.py")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # As torchvision's training script saves it, from a model that DDP wraps.
    weights = torch.load(folder / "1.pth", weights_only=True)
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    saved = {"model": wrapped, "epoch": 89, "args": argparse.Namespace(lr=0.5)}
    torch.save(saved, folder / "1.pth")
    n = N_TRAIN * len(CLASSES)
    for seed in range(2):
        half = np.zeros(n, bool)
        half[np.random.default_rng(seed).permutation(n)[: n // 2]] = True
        np.save(folder / f"half_{seed}.npy", half)
    return folder


def arguments(world: Path, stage: str, **options: object) -> list[object]:
    given: dict[str, object] = {
        "images": world / "images",
        "store": "store",
        "size": 32,
        "proj-dim": 64,
        "targets": 6,
        "top-k": 5,
        "batch-size": 4,
        "workers": 0,
        "device": "cpu",
        **options,
    }
    lists = ["--checkpoints", world / "0.pth", world / "1.pth"]
    lists += ["--trained-on", world / "half_0.npy", world / "half_1.npy"]
    pairs = [item for key, value in given.items() for item in (f"--{key}", value)]
    return [stage, *pairs, *lists]


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_two_shards_write_one_store(world, tmp_path):
    def call(stage: str, **options: object) -> str:
        done = run(*arguments(world, stage, **options), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = call("estimate")
    assert "33 training examples, 6 targets, 2 checkpoints" in out
    assert "projected to 64; batches of 4 on cpu" in out
    assert not (tmp_path / "store").exists()

    out = call("featurize", shard="1/2")
    assert "0.pth: shard 1/2, 17 images, 17 new" in out
    early = run(*arguments(world, "attribute"), cwd=tmp_path)
    assert early.returncode == 1
    assert "ModelIDException: " in early.stderr
    assert "17 of 33" in early.stderr
    assert "Traceback" not in early.stderr

    out = call("featurize", shard="0/2")
    assert "1.pth: shard 0/2, 16 images, 16 new" in out
    again = call("featurize", shard="0/2")
    assert "1.pth: shard 0/2, 16 images, 0 new" in again

    out = call("attribute", out="sharded.jsonl")
    assert "expected LDS" in out
    assert "6 targets in sharded.jsonl" in out
    records = read(tmp_path / "sharded.jsonl")
    assert [record["target"] for record in records] == [
        f"val/{name}/{name}_{i:02}.png" for name in CLASSES for i in (0, 2)
    ]
    for record in records:
        for kind, sign in (("helpful", -1), ("harmful", 1)):
            paths, scores = zip(*record[kind], strict=True)
            assert len(set(paths)) == 5
            assert all((world / "images" / path).is_file() for path in paths)
            assert all(path.startswith("train/") for path in paths)
            assert np.isfinite(scores).all()
            assert (np.diff(np.multiply(sign, scores)) >= 0).all()

    # One process alone comes to the same.
    call("featurize", store="whole")
    call("attribute", store="whole", out="whole.jsonl")
    for record, other in zip(records, read(tmp_path / "whole.jsonl"), strict=True):
        assert record["target"] == other["target"]
        for kind in ("helpful", "harmful"):
            one, two = (dict(part[kind]) for part in (record, other))
            torch.testing.assert_close(one, two, rtol=2e-2, atol=1e-6)


@pytest.mark.slow
def test_classes_must_be_the_same(world, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(world / "images" / part)
    (tmp_path / "val").unlink()
    (tmp_path / "val").mkdir()
    name = CLASSES[0]
    (tmp_path / "val" / name).symlink_to(world / "images" / "val" / name)
    done = run(*arguments(world, "estimate", images=tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "have different classes: ['n01443537', 'n01484850']" in done.stderr


@pytest.fixture
def stops(monkeypatch, capsys, tmp_path):
    """Call what must end with a message, in a folder without anything; give that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "88")
    spec = importlib.util.spec_from_file_location("imagenet", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "imagenet", script)  # its dataclass looks there
    spec.loader.exec_module(script)

    def call(*given: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            script.main([*given])
        assert stopped.value.code == 2
        out, message = capsys.readouterr()
        assert not out
        return message

    return call


CALL = ("estimate", "--images", "images", "--checkpoints", "0.pth")


@pytest.mark.slow
def test_without_images_it_ends_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *CALL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "there is no images/train and no images/val." in done.stderr
    assert "1,281,167 training and 50,000 validation images" in done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_it_says_what_is_missing(stops, tmp_path):
    train, val = (tmp_path / "images" / part for part in ("train", "val"))
    train.mkdir(parents=True)
    message = stops(*CALL)
    assert "there is no images/val.\n" in message
    assert "images/train/n01440764/*.JPEG" in message
    val.mkdir()
    assert "there is no 0.pth." in stops(*CALL)


def test_it_wants_a_file_for_each_checkpoint(stops, tmp_path):
    for part in ("train", "val"):
        (tmp_path / "images" / part).mkdir(parents=True)
    (tmp_path / "0.pth").touch()
    (tmp_path / "half.npy").touch()
    message = stops(*CALL, "--trained-on", "half.npy", "half.npy")
    assert "--trained-on has 2 files for 1 checkpoints" in message


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "0/0", "1", "a/b", "0/1/2"])
def test_it_knows_its_shards(stops, shard):
    assert f"'{shard}' is no shard" in stops(*CALL, f"--shard={shard}")


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_it_says_that_torchvision_is_missing(stops, tmp_path, monkeypatch, error):
    for part in ("train", "val"):
        (tmp_path / "images" / part).mkdir(parents=True)
    (tmp_path / "0.pth").touch()
    package = tmp_path / "packages" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {error.__name__}('not for this one')")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    message = stops(*CALL)
    assert "cannot be imported (not for this one)" in message
    assert f"belongs to torch {torch.__version__}" in message
