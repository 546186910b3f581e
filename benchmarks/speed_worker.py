"""The process that runs one library: JSON lines in, JSON lines out.

The same file runs in both environments, each of which has its own ``trak``; so it uses
only what the two have in common, and says where they differ. It holds one job at a time
and makes the turns that it is asked for.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import inspect
import json
import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_models import (
    SUBJECTS,
    forward_backward,
    next_token_losses,
    next_token_margins,
    save_materials,
)

PATIENCE = 2.0
"""Seconds that a first call may take for a second one to be made before the turns."""


def is_upstream() -> bool:
    try:
        return importlib.metadata.version("traker") is not None
    except importlib.metadata.PackageNotFoundError:
        return False


UPSTREAM = is_upstream()


# -- clocks and memory ----------------------------------------------------------------


def timed(action: Callable[[], Any]) -> dict[str, float]:
    """Run something; seconds by the wall, and of processor time over all threads."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return math.nan


class Memory:
    """The most anonymous memory while it is entered, looked at 500 times a second.

    Pages of mapped files, as those of a store, are the system's to drop and do not count.
    """

    def __enter__(self) -> Memory:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free but kept is not in use
        self.before = self.peak = status_mib("RssAnon")
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def look(self) -> None:
        while not self.stopped.wait(0.002):
            self.peak = max(self.peak, status_mib("RssAnon"))

    def found(self) -> dict[str, float]:
        return {"before": self.before, "peak": self.peak}

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, status_mib("RssAnon"))
        self.stopped.set()
        self.thread.join()


# -- the libraries --------------------------------------------------------------------


def causal_task() -> Any:
    """Build the task that neither library has a name for, as a user of each would."""
    if not UPSTREAM:
        from trak.modelout_functions import FunctionTask

        return FunctionTask(
            output=lambda logits, batch: next_token_margins(logits, batch[0]),
            loss=lambda logits, batch: next_token_losses(logits, batch[0]),
        )
    from trak.modelout_functions import AbstractModelOutput

    class Causal(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, ids: Any) -> Any:
            ids = ids[None]
            logits = torch.func.functional_call(model, (weights, buffers), (ids,))
            return next_token_margins(logits, ids).sum()

        def get_out_to_loss_grad(
            self, model: Any, weights: Any, buffers: Any, batch: Any
        ) -> Any:
            with torch.no_grad():
                logits = torch.func.functional_call(model, (weights, buffers), batch)
                return (1 - (-next_token_losses(logits, batch[0])).exp())[:, None]

    return Causal()


def build_projector(law: str, backend: str, d: int, p: int) -> Any:
    """Build a projector of this library; ``backend`` as ours are told apart."""
    from trak import projectors

    common = {"grad_dim": d, "proj_dim": p, "seed": 0, "device": torch.device("cpu")}
    if law == "sparse":
        chosen = {} if backend == "auto" else {"backend": backend}
        return projectors.SparseProjector(**common, **chosen)
    chosen = {} if backend in {"auto", ""} else {"backend": backend}
    law_ = projectors.ProjectionType(law)
    return projectors.BasicProjector(proj_type=law_, **common, **chosen)


def backends() -> list[str]:
    """List the back ends of our projectors that run here, fastest first."""
    from trak.projectors import SparseProjector

    if "backend" not in inspect.signature(SparseProjector).parameters:
        return ["auto"]
    found = []
    for name in ("native", "torch"):
        try:
            build_projector("sparse", name, 8, 8).project(torch.ones(1, 8), 0)
        except Exception as error:  # noqa: BLE001  what cannot run here is left out
            print(f"back end {name}: {error}", file=sys.stderr)
        else:
            found.append(name)
    return found


# -- jobs -----------------------------------------------------------------------------


class FeaturizeJob:
    """A model, its batches and a TRAKer on a store of its own."""

    def __init__(self, cell: dict[str, Any], materials: str) -> None:
        self.cell = cell
        self.subject = SUBJECTS[cell["model"]]
        loaded = torch.load(materials)
        self.batches = loaded["batches"]
        self.model = self.subject.make()
        self.model.load_state_dict(loaded["weights"])
        self.model.eval()
        self.grad_dim = sum(value.numel() for value in self.model.parameters())
        self.given = 0
        self.opened: dict[bool, tuple[Any, tempfile.TemporaryDirectory]] = {}

    def next_batch(self) -> Any:
        self.given += 1
        return self.batches[(self.given - 1) % len(self.batches)]

    def floor(self, times: int) -> None:
        for _ in range(times):
            forward_backward(self.model, self.cell["model"], self.next_batch())
        self.model.zero_grad(set_to_none=True)

    def open(self, p: int, n: int, *, in_memory: bool = False) -> None:
        """Make a TRAKer, for ``n`` training examples, on a store of its own."""
        from trak import TRAKer

        saver = None
        if in_memory:
            from speed_saver import ArraysSaver

            saver = ArraysSaver
        if in_memory in self.opened:
            self.opened.pop(in_memory)[1].cleanup()
        directory = tempfile.TemporaryDirectory(prefix="speed-")
        task = self.subject.task
        traker = TRAKer(
            self.model,
            causal_task() if task == "causal" else task,
            train_set_size=n,
            save_dir=directory.name,
            device="cpu",
            proj_dim=p,
            use_half_precision=self.cell["half"],
            logging_level=logging.ERROR,
            saver=saver,
        )
        self.opened[in_memory] = traker, directory
        traker.load_checkpoint(self.model.state_dict(), model_id=0)
        self.given = 0

    def featurize(self, times: int, *, in_memory: bool = False) -> None:
        traker = self.opened[in_memory][0]
        for _ in range(times):
            traker.featurize(self.next_batch(), num_samples=self.cell["b"])

    def gram(self) -> list[list[float]]:
        """Give the inner products of the first rows, which both sides estimate."""
        grads = self.opened[False][0].saver.current_store["grads"]
        rows = torch.tensor(grads[: self.cell["b"]]).double()
        return (rows @ rows.T).tolist()

    def parts(self) -> dict[str, dict[str, float]]:
        """Time the parts of one call of 0.3.2, the projection for two of its blocks."""
        from trak.utils import vectorize

        traker, batch, kept = self.opened[False][0], self.next_batch(), {}
        computer, projector = traker.gradient_computer, traker.projector

        def gradients() -> None:
            kept["grads"] = computer.compute_per_sample_grad(batch=batch)

        def flatten() -> None:
            kept["flat"] = vectorize(kept["grads"], device="cpu")

        return {
            "gradients": timed(gradients),
            "flatten": timed(flatten),
            "two blocks": timed(lambda: projector.project(kept["flat"], model_id=0)),
            "out-to-loss": timed(lambda: computer.compute_loss_grad(batch)),
        }


class ProjectJob:
    """A matrix of gradients and some projectors."""

    def __init__(self, d: int, b: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.grads = torch.randn(b, d, generator=generator)
        self.projectors: dict[str, Any] = {}

    def open(self, law: str, backend: str, p: int) -> None:
        d = self.grads.shape[1]
        self.projectors[f"{law} {backend}"] = build_projector(law, backend, d, p)

    def project(self, times: int, name: str) -> None:
        for _ in range(times):
            self.projectors[name].project(self.grads, model_id=0)

    def read(self, times: int) -> None:
        """Pass over the gradients once, which no projection can do without."""
        for _ in range(times):
            self.grads.sum()


# -- commands -------------------------------------------------------------------------


class Worker:
    """What the parent can ask for; every method takes and returns JSON."""

    def __init__(self) -> None:
        self.job: Any = None

    def hello(self) -> dict[str, Any]:
        import trak

        version = importlib.metadata.version("traker") if UPSTREAM else trak.__version__
        return {
            "library": "traker" if UPSTREAM else "trak",
            "version": version,
            "file": trak.__file__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "backends": [] if UPSTREAM else backends(),
        }

    def materials(self, model: str, b: int, path: str) -> dict[str, Any]:
        return {"d": save_materials(model, b, path)}

    def load(self, cell: dict[str, Any], materials: str) -> dict[str, Any]:
        """Start a job and say what a plain forward and backward takes."""
        with Memory() as memory:
            self.job = FeaturizeJob(cell, materials)
            self.job.floor(1)
        return {**memory.found(), "again": timed(lambda: self.job.floor(1))}

    def open(self, *, warm: bool = True, **options: Any) -> dict[str, Any]:
        """Make the TRAKer and featurize a first batch, with an eye on memory."""
        if not warm:
            with Memory() as memory:
                self.job.open(**options)
            return memory.found()
        return self.watched(
            lambda: self.job.open(**options),
            lambda: self.job.featurize(1, in_memory=options.get("in_memory", False)),
        )

    def parts(self) -> dict[str, Any]:
        with Memory() as memory:
            parts = self.job.parts()
        return {"parts": parts, **memory.found()}

    def gram(self) -> dict[str, Any]:
        return {"gram": self.job.gram()}

    def load_projection(self, d: int, b: int) -> dict[str, Any]:
        self.job = ProjectJob(d, b)
        return {"again": timed(lambda: self.job.read(1))}

    def open_projection(self, law: str, backend: str, p: int) -> dict[str, Any]:
        name = f"{law} {backend}"
        return self.watched(
            lambda: self.job.open(law, backend, p), lambda: self.job.project(1, name)
        )

    def watched(
        self, prepare: Callable[[], Any], action: Callable[[], Any]
    ) -> dict[str, Any]:
        """Prepare something and do it, then once more to see how long it takes."""
        with Memory() as memory:
            prepare()
            first = timed(action)
        again = timed(action) if first["wall"] < PATIENCE else first
        return {**memory.found(), "first": first, "again": again}

    def turn(self, what: str, times: int, **named: Any) -> dict[str, Any]:
        """Make one turn of ``times`` calls; seconds of all together."""
        return timed(lambda: getattr(self.job, what)(times, **named))


def main() -> None:
    # Replies go to what was standard output; nothing that is printed can get in between.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # noqa: BLE001  the parent decides what it means
            reply = {"error": f"{type(error).__name__}: {error}".strip()[:2000]}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
