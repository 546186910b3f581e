"""Attribute a ResNet on ImageNet, on as many GPUs as there are.

The images are two folders, ``train`` and ``val``, with a folder for each class in both, and
the checkpoints are files of weights, as torchvision's training script writes them:

    python examples/imagenet.py estimate  --images imagenet --checkpoints 0.pth 1.pth 2.pth
    python examples/imagenet.py featurize --images imagenet --checkpoints ... --shard 0/8
    python examples/imagenet.py attribute --images imagenet --checkpoints ...

``estimate`` prints the disk, memory and time that all of it would take, and writes nothing.
``featurize`` runs once for each shard, each on a GPU of its own, at the same time or not,
and again if it was interrupted; all of them write one store. When they are done ``attribute``
scores validation images and writes the training images that help and harm each most.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import trak
from trak.errors import TrakError

NEEDS = """\
ImageNet is 1,281,167 training and 50,000 validation images of 1,000 classes, about 150 GB.
https://image-net.org/download gives it to those who register; unpacked it must be
    {0}/train/n01440764/*.JPEG ... and {0}/val/n01440764/*.JPEG ...
Any other images in such folders will do as well."""

EXPERIMENT = "val"
PRINTED = 3


@dataclass(frozen=True, slots=True)
class Images:
    """Both sets, as tensors of one size, in an order that never changes."""

    train: Dataset[tuple[Tensor, int]]
    targets: Dataset[tuple[Tensor, int]]
    train_paths: list[str]
    target_paths: list[str]
    n_classes: int


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stage", choices=["estimate", "featurize", "attribute"])
    add("--images", type=Path, required=True, help="folder with train and val")
    add("--checkpoints", type=Path, nargs="+", required=True, metavar="FILE")
    text = "a boolean .npy for each checkpoint: the training images it was trained on"
    add("--trained-on", type=Path, nargs="+", metavar="FILE", help=text)
    add("--store", type=Path, default=Path("imagenet_store"))
    text = "featurize part i of k, counted from 0, on GPU i modulo their number"
    add("--shard", type=parse_shard, default=(0, 1), metavar="i/k", help=text)
    add("--model", default="resnet18", help="a classifier of torchvision")
    add("--size", type=int, default=224, help="pixels of an image's side")
    add("--proj-dim", type=int, default=4096)
    add("--targets", type=int, default=1000, help="validation images, spread evenly")
    add("--top-k", type=int, default=10)
    add("--out", type=Path, default=Path("imagenet_top.jsonl"))
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=8, help="processes that read images")
    add("--device", help="instead of a GPU, or of the CPU where there is none")
    args = parser.parse_args(argv)
    args.parser = parser
    return args


def parse_shard(text: str) -> tuple[int, int]:
    try:
        i, k = map(int, text.split("/"))
    except ValueError:
        i, k = -1, 0
    if not 0 <= i < k:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shard; 0/8, 1/8, ..., 7/8 are the eight of a set of eight"
        )
    return i, k


def check_files(args: argparse.Namespace) -> None:
    """Stop, and say what is needed, where something is not there."""
    missing = [d for d in ("train", "val") if not (args.images / d).is_dir()]
    if missing:
        wanted = " and no ".join(str(args.images / name) for name in missing)
        args.parser.error(f"there is no {wanted}.\n{NEEDS.format(args.images)}")
    for path in [*args.checkpoints, *(args.trained_on or [])]:
        if not path.is_file():
            args.parser.error(f"there is no {path}.")
    if args.trained_on and len(args.trained_on) != len(args.checkpoints):
        args.parser.error(
            f"--trained-on has {len(args.trained_on)} files for "
            f"{len(args.checkpoints)} checkpoints; pass one for each, in their order."
        )


def import_torchvision(args: argparse.Namespace) -> Any:
    try:
        import torchvision
    # One that was built for another torch raises a RuntimeError.
    except (ImportError, RuntimeError) as error:
        args.parser.error(
            f"torchvision reads the images and has the model, but cannot be imported "
            f"({error}). Install the release that belongs to torch {torch.__version__}."
        )
    return torchvision


def open_images(args: argparse.Namespace, torchvision: Any) -> Images:
    """Open the images as a model sees them that is evaluated, without augmentation."""
    tr = torchvision.transforms
    transform = tr.Compose([
        tr.Resize(args.size * 256 // 224),
        tr.CenterCrop(args.size),
        tr.ToTensor(),
        tr.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])
    train, val = (
        torchvision.datasets.ImageFolder(args.images / name, transform)
        for name in ("train", "val")
    )
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        args.parser.error(
            f"train and val of {args.images} have different classes: {odd[:5]}."
        )
    m = args.targets = min(args.targets, len(val))
    chosen = (np.arange(m) * len(val) // m).tolist()

    def relative(path: str) -> str:
        return Path(path).relative_to(args.images).as_posix()

    return Images(
        train=train,
        targets=torch.utils.data.Subset(val, chosen),
        train_paths=[relative(path) for path, _ in train.samples],
        target_paths=[relative(val.samples[i][0]) for i in chosen],
        n_classes=len(train.classes),
    )


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load a state dict, also from inside of what a training script saved."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        saved = saved.get(key, saved)
    return {key.removeprefix("module."): value for key, value in saved.items()}


def load_batches(
    args: argparse.Namespace, images: Dataset[Any], batches: list[np.ndarray]
) -> Any:
    """Give the batches of these indices, on the device."""
    loader = DataLoader(
        images,
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=args.workers,
        pin_memory=args.device.type == "cuda",
    )
    for pixels, labels in loader:
        yield (
            pixels.to(args.device, non_blocking=True),
            labels.to(args.device, non_blocking=True),
        )


def split(low: int, high: int, size: int) -> list[np.ndarray]:
    return [np.arange(s, min(s + size, high)) for s in range(low, high, size)]


def choose_device(args: argparse.Namespace) -> torch.device:
    if args.device:
        return torch.device(args.device)
    if torch.cuda.is_available():
        return torch.device("cuda", args.shard[0] % torch.cuda.device_count())
    return torch.device("cpu")


def make_traker(
    args: argparse.Namespace, model: torch.nn.Module, images: Images
) -> trak.TRAKer:
    return trak.TRAKer(
        model=model,
        task="image_classification",
        train_set_size=len(images.train_paths),
        save_dir=args.store,
        proj_dim=args.proj_dim,
    )


def estimate(args: argparse.Namespace, model: torch.nn.Module, images: Images) -> None:
    n, c = len(images.train_paths), len(args.checkpoints)
    first = split(0, min(n, args.batch_size), args.batch_size)
    expected = trak.estimate(
        model,
        "image_classification",
        n,
        num_targets=args.targets,
        num_checkpoints=c,
        batch=next(load_batches(args, images.train, first)),
        batch_size=args.batch_size,
        k=args.top_k,
        proj_dim=args.proj_dim,
    )
    print(expected)
    print(
        "This script takes top_k. Shards divide the time of featurize, where images are"
    )
    print("read as fast as they are featurized; memory is for each process.")


def featurize(args: argparse.Namespace, model: torch.nn.Module, images: Images) -> None:
    """Featurize this shard's images for every checkpoint."""
    n, (i, k) = len(images.train_paths), args.shard
    batches = split(n * i // k, n * (i + 1) // k, args.batch_size)
    traker = make_traker(args, model, images)
    for model_id, path in enumerate(args.checkpoints):
        own = args.trained_on and np.load(args.trained_on[model_id])
        traker.load_checkpoint(load_weights(path), model_id, train_inds=own)
        # trak skips rows that it has; this saves reading their images.
        done = np.asarray(traker.saver.current_store["is_featurized"]).ravel()
        todo = [batch for batch in batches if not done[batch].all()]
        loaded = load_batches(args, images.train, todo)
        for batch, inds in zip(loaded, todo, strict=True):
            traker.featurize(batch, inds=inds)
        rows = sum(map(len, batches))
        print(f"{path}: shard {i}/{k}, {rows:,} images, {sum(map(len, todo)):,} new")


def attribute(args: argparse.Namespace, model: torch.nn.Module, images: Images) -> None:
    """Score the targets, and write the best and the worst of each."""
    traker = make_traker(args, model, images)
    ids = range(len(args.checkpoints))
    traker.finalize_features(ids)
    batches = split(0, args.targets, args.batch_size)
    for model_id, path in enumerate(args.checkpoints):
        traker.start_scoring_checkpoint(
            EXPERIMENT, load_weights(path), model_id, args.targets
        )
        loaded = load_batches(args, images.targets, batches)
        for batch, inds in zip(loaded, batches, strict=True):
            traker.score(batch, inds=inds)
    if args.trained_on and len(ids) > 1:
        print(traker.cross_validate(EXPERIMENT, ids))
    top = {
        name: traker.top_k(EXPERIMENT, args.top_k, largest=largest, model_ids=ids)
        for name, largest in (("helpful", True), ("harmful", False))
    }
    with args.out.open("w", encoding="utf-8") as file:
        for j, target in enumerate(images.target_paths):
            record: dict[str, Any] = {"target": target}
            for name, found in top.items():
                record[name] = [
                    [images.train_paths[i], float(score)]
                    for i, score in zip(found.indices[j], found.scores[j], strict=True)
                ]
            file.write(json.dumps(record) + "\n")
            if j < PRINTED:
                best, worst = record["helpful"][0], record["harmful"][0]
                print(f"{target}: {best[0]} {best[1]:+.3g}, {worst[0]} {worst[1]:+.3g}")
    print(f"{len(images.target_paths):,} targets in {args.out}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_files(args)
    torchvision = import_torchvision(args)
    images = open_images(args, torchvision)
    args.device = choose_device(args)
    model = torchvision.models.get_model(
        args.model, weights=None, num_classes=images.n_classes
    ).to(args.device)
    stages = {"estimate": estimate, "featurize": featurize, "attribute": attribute}
    try:
        stages[args.stage](args, model, images)
    except TrakError as error:
        args.parser.exit(1, f"{type(error).__name__}: {error}\n")


if __name__ == "__main__":
    main()
