"""Checkpoints on disk, in every form that is read, and all that cannot be."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.problems import classification, make, mlp, randomized, sparse
from trak._checkpoints import load_weights
from trak._weights_files import holds_weights, read_weights
from trak.errors import (
    BackendError,
    CheckpointError,
    CheckpointFileError,
    NonFiniteError,
)

CHECKPOINT = randomized(mlp(), 3)


def save_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    torch_format = pytest.importorskip("safetensors.torch")
    torch_format.save_file({k: v.contiguous() for k, v in weights.items()}, path)


def save_shards(weights: dict[str, Tensor], folder: Path, kind: str) -> Path:
    """Write weights in two files with an index, as ``transformers`` does."""
    stem, suffix = {
        "safetensors": ("model", "safetensors"),
        "bin": ("pytorch_model", "bin"),
    }[kind]
    places: dict[str, str] = {}
    for i in range(2):
        part = dict(list(weights.items())[i::2])
        name = f"{stem}-0000{i + 1}-of-00002.{suffix}"
        save = save_safetensors if kind == "safetensors" else torch.save
        save(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def as_torch(path: Path) -> Path:
    torch.save(CHECKPOINT, path / "a.pt")
    return path / "a.pt"


def as_old_torch(path: Path) -> Path:
    torch.save(CHECKPOINT, path / "a.ckpt", _use_new_zipfile_serialization=False)
    return path / "a.ckpt"


def as_safetensors(path: Path) -> Path:
    save_safetensors(CHECKPOINT, path / "a.safetensors")
    return path / "a.safetensors"


def as_folder(path: Path) -> Path:
    save_safetensors(CHECKPOINT, path / "model.safetensors")
    return path


def as_bin_folder(path: Path) -> Path:
    torch.save(CHECKPOINT, path / "pytorch_model.bin")
    return path


def as_shards(path: Path) -> Path:
    save_shards(CHECKPOINT, path, "safetensors")
    return path


def as_bin_shards(path: Path) -> Path:
    save_shards(CHECKPOINT, path, "bin")
    return path


FORMS = [
    as_torch,
    as_old_torch,
    as_safetensors,
    as_folder,
    as_bin_folder,
    as_shards,
    as_bin_shards,
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form(tmp_path: Path, form: Callable[[Path], Path]) -> None:
    path = form(tmp_path)
    torch.testing.assert_close(read_weights(path), CHECKPOINT, rtol=0, atol=0)
    model = mlp()
    known = load_weights(model, CHECKPOINT)
    assert load_weights(mlp(), path) == known
    assert load_weights(mlp(), str(path)) == known
    assert holds_weights(path) == path.is_dir()


def test_the_whole_of_trak_from_paths(tmp_path: Path) -> None:
    problem = classification(mlp(), 4, checkpoints=2)
    paths = []
    for i, checkpoint in enumerate(problem.checkpoints):
        paths.append(tmp_path / f"{i}.pt")
        torch.save(checkpoint, paths[i])
    traker = make(problem, tmp_path / "store")
    for path in paths:
        traker.load_checkpoint(path)
        traker.featurize(problem.train)
    traker.finalize_features()
    for path in paths:
        traker.start_scoring_checkpoint(str(path), num_targets=problem.m)
        traker.score(problem.targets)
    scores = torch.from_numpy(traker.finalize_scores() + 0.0)
    expected = problem.expected(sparse(problem))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)


# -- tied weights ------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("left_out", ["head.weight", "embed.weight"])
def test_tied_weights_that_were_left_out(left_out: str) -> None:
    model = Tied()
    known = randomized(model, 1)
    known["head.weight"] = known["embed.weight"]
    weights = load_weights(model, known)
    checkpoint = {key: value for key, value in known.items() if key != left_out}
    other = Tied()
    assert load_weights(other, checkpoint) == weights
    assert other.head.weight is other.embed.weight
    torch.testing.assert_close(dict(other.state_dict()), known)
    wrapped = nn.DataParallel(Tied())
    assert load_weights(wrapped, checkpoint) == weights


def test_tied_weights_that_differ_or_are_all_missing() -> None:
    model = Tied()
    checkpoint = randomized(model, 1)
    checkpoint["head.weight"] = checkpoint["embed.weight"] + 1
    before = model.embed.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"'embed.weight' and 'head.weight' are one"
    ):
        load_weights(model, checkpoint)
    del checkpoint["head.weight"], checkpoint["embed.weight"]
    with pytest.raises(
        CheckpointError, match=r"missing \['embed.weight', 'head.weight'\]"
    ):
        load_weights(model, checkpoint)
    torch.testing.assert_close(model.embed.weight, before)
    checkpoint["head.weight"] = torch.full((5, 3), torch.nan)
    with pytest.raises(NonFiniteError, match=r"(head|embed)\.weight"):
        load_weights(model, checkpoint)


def test_untied_weights_are_not_filled_in() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    checkpoint = randomized(model, 1)
    del checkpoint["head.weight"]
    with pytest.raises(
        CheckpointError, match=r"missing \['head.weight'\] \(1 in all\)"
    ):
        load_weights(model, checkpoint)


# -- prefixes ----------------------------------------------------------------------------

PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."]


class Deep(nn.Module):
    """Holds a model under the names that wrappers use."""

    def __init__(self, path: str) -> None:
        super().__init__()
        head, *rest = path.split(".")
        self.add_module(head, Deep(".".join(rest)) if rest else mlp())


@pytest.mark.parametrize("theirs", PREFIXES)
@pytest.mark.parametrize("ours", ["", *PREFIXES])
def test_prefixes_do_not_matter(ours: str, theirs: str) -> None:
    known = load_weights(mlp(), CHECKPOINT)
    model = Deep(ours.rstrip(".")) if ours else mlp()
    checkpoint = {theirs + key: value for key, value in CHECKPOINT.items()}
    assert load_weights(model, checkpoint) == known
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, CHECKPOINT[key.removeprefix(ours)])


def test_a_part_that_was_compiled() -> None:
    model = mlp()
    known = load_weights(model, CHECKPOINT)
    checkpoint = {k.replace(".", "._orig_mod.", 1): v for k, v in CHECKPOINT.items()}
    assert load_weights(model, checkpoint) == known


def test_names_that_are_ambiguous_stay_as_they_are() -> None:
    model = mlp()
    both = {**CHECKPOINT, **{f"_orig_mod.{k}": v + 1 for k, v in CHECKPOINT.items()}}
    with pytest.raises(CheckpointError, match=r"unexpected \['_orig_mod"):
        load_weights(model, both)
    mixed = {("module." if i else "") + k: v for i, (k, v) in enumerate(both.items())}
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(model, mixed)


# -- what cannot be read -----------------------------------------------------------------


class Unknown:
    """Something that is no tensor."""


def damaged(name: str, keep: int, **options: Any) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        if name.endswith("safetensors"):
            save_safetensors(CHECKPOINT, path / name)
        else:
            torch.save(CHECKPOINT, path / name, **options)
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:keep])
        return path / name

    return write


def holding(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        (path / name).write_bytes(content)
        return path / name

    return write


def objects(**options: Any) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        torch.save({"w": Unknown()}, path / "a.pt", **options)
        return path / "a.pt"

    return write


def a_module(path: Path) -> Path:
    torch.save(mlp(), path / "a.pt")
    return path / "a.pt"


def a_list(path: Path) -> Path:
    torch.save([1, 2], path / "a.pt")
    return path / "a.pt"


def a_zip(path: Path) -> Path:
    with zipfile.ZipFile(path / "a.pt", "w") as archive:
        archive.writestr("a", "b")
    return path / "a.pt"


def no_shard(path: Path) -> Path:
    save_shards(CHECKPOINT, path, "bin")
    (path / "pytorch_model-00002-of-00002.bin").unlink()
    return path


def foreign_shard(path: Path) -> Path:
    save_shards(CHECKPOINT, path, "bin")
    torch.save({"other": torch.zeros(1)}, path / "pytorch_model-00002-of-00002.bin")
    return path


def outside(path: Path) -> Path:
    torch.save(CHECKPOINT, path.parent / "outside.bin")
    places = dict.fromkeys(CHECKPOINT, "../outside.bin")
    index = path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return path


def no_index(content: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        (path / "model.safetensors.index.json").write_text(content)
        return path

    return write


def deepspeed(path: Path) -> Path:
    (path / "zero_to_fp32.py").touch()
    return path


def sharded_fsdp(path: Path) -> Path:
    (path / "pytorch_model_fsdp_0").mkdir()
    return path


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
CODE = r"holds more than tensors \(or is damaged\), and reading it would run code"
BROKEN = "is damaged, or no file of weights"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path / "none.pt", "there is no checkpoint"),
        (lambda path: path / "none" / "model.safetensors", "there is no checkpoint"),
        (lambda path: path, "has no weights: none of model.safetensors,"),
        (objects(), CODE),
        (objects(_use_new_zipfile_serialization=False), CODE),
        (objects(pickle_protocol=4), CODE),
        (a_module, CODE),
        (holding("a.pt", pickle.dumps({"w": Unknown()})), CODE),
        (a_list, "holds a list, not a state dict"),
        (a_zip, BROKEN),
        (damaged("a.pt", 800), BROKEN),
        (damaged("a.pt", 150, _use_new_zipfile_serialization=False), BROKEN),
        (damaged("a.pt", -9, _use_new_zipfile_serialization=False), BROKEN),
        (damaged("a.pt", 0), r"\(0 bytes\) is damaged"),
        (damaged("a.safetensors", 0), BROKEN),
        (damaged("a.safetensors", 60), BROKEN),
        (damaged("a.safetensors", -1), BROKEN),
        (holding("a.pt", b"hello world\n" * 20), BROKEN),
        (holding("a.safetensors", b"hello world\n" * 20), BROKEN),
        (holding("a.pt", bytes(range(256)) * 4), BROKEN),
        (holding("a.pt", LFS), "pointer of Git LFS"),
        (holding("a.safetensors", LFS), "pointer of Git LFS"),
        (no_shard, "there is no such file beside it: of 2 parts"),
        (foreign_shard, r"which does not hold it \(2 such entries\)"),
        (outside, "no such file beside it"),
        (no_index("{"), "is not an index of weights"),
        (no_index('{"weight_map": 3}'), "is not an index of weights"),
        (no_index("[]"), "is not an index of weights"),
        (deepspeed, "those of DeepSpeed"),
        (sharded_fsdp, "those of FSDP"),
    ],
)
def test_what_cannot_be_read(
    tmp_path: Path, write: Callable[[Path], Path], message: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = write(folder)
    if path.suffix == ".safetensors" and path.exists():
        pytest.importorskip("safetensors")
    model = mlp()
    before = model[0].weight.clone()
    with pytest.raises(CheckpointFileError, match=message) as caught:
        load_weights(model, path)
    assert isinstance(caught.value, OSError)
    torch.testing.assert_close(model[0].weight, before)


def test_a_file_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointFileError, match="cannot be read: Permission denied"):
        read_weights(as_torch(tmp_path))


def test_an_entry_of_a_training_script(tmp_path: Path) -> None:
    torch.save({"state_dict": CHECKPOINT, "epoch": 3}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="one of the checkpoint's entries"):
        load_weights(mlp(), tmp_path / "last.ckpt")


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_safetensors(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(BackendError, match="pip install safetensors"):
        read_weights(path)
