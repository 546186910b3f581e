"""The process that runs traker 0.3.2, in its own environment, on the same checkpoints.

It takes and writes the same files as ``accuracy_worker.py``, and tensors in ``materials``
for what that reads by itself.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import accuracy_models
import numpy as np
import torch

MAKE = {
    "digits": accuracy_models.digits_cnn,
    "diabetes": accuracy_models.diabetes_mlp,
    "mnist": accuracy_models.mnist_mlp,
    "cifar4": accuracy_models.small_resnet,
}


def regression() -> Any:
    """Build the task that 0.3.2 has no name for, as a user of it would."""
    from trak.modelout_functions import AbstractModelOutput

    class Regression(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, x: Any, y: Any) -> Any:
            parameters = (weights, buffers)
            return torch.func.functional_call(model, parameters, x[None]).squeeze()

        def get_out_to_loss_grad(
            self, model: Any, weights: Any, buffers: Any, batch: Any
        ) -> Any:
            x, y = batch
            found = torch.func.functional_call(model, (weights, buffers), x)
            return (y - found.squeeze(-1)).detach()[:, None]

    return Regression()


class Run:
    """A TRAKer of 0.3.2 and what its parts took."""

    def __init__(self, job: dict[str, Any], save_dir: str) -> None:
        self.loaded = torch.load(job["materials"])
        self.job, self.truth = job, job["truth"]
        self.save_dir = save_dir
        self.n = sum(len(batch[0]) for batch in self.loaded["train"])
        self.m = sum(len(batch[0]) for batch in self.loaded["targets"])
        self.traker = self.open()

    def open(self) -> Any:
        """Make a TRAKer on the same store.

        Finalizing frees what the projector on the CPU needs, and scoring before it stores
        nothing, with no error: so gradients of training examples and of targets come from
        two of them.

        Returns:
            The TRAKer.
        """
        from trak import TRAKer

        options, task = self.job["line"]["options"], self.loaded["task"]
        given = {} if "half" not in options else {"use_half_precision": options["half"]}
        return TRAKer(
            MAKE[self.truth]().eval(),
            regression() if task == "regression" else task,
            train_set_size=self.n,
            save_dir=self.save_dir,
            device="cpu",
            proj_dim=options["p"],
            logging_level=logging.ERROR,
            **given,
        )

    def checkpoint(self, c: int) -> Any:
        folder = Path(self.job["folder"]) / f"{self.truth}-checkpoints"
        return torch.load(folder / f"{c}.pt", weights_only=True)

    def featurize(self, c: int) -> None:
        self.traker.load_checkpoint(self.checkpoint(c), model_id=c)
        for batch in self.loaded["train"]:
            self.traker.featurize(batch=batch, num_samples=len(batch[0]))

    def finalize(self, count: int) -> None:
        self.traker.finalize_features(list(range(count)))
        self.traker = self.open()

    def score(self, c: int) -> None:
        checkpoint = self.checkpoint(c)
        self.traker.start_scoring_checkpoint("targets", checkpoint, c, self.m)
        for batch in self.loaded["targets"]:
            self.traker.score(batch=batch, num_samples=len(batch[0]))

    def scores(self, count: int) -> np.ndarray:
        ids = list(range(count))
        return np.array(self.traker.finalize_scores("targets", model_ids=ids))


def timed(action: Any, *given: Any) -> tuple[dict[str, float], Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = action(*given)
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return took, found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    masks = np.load(job["masks"])["masks"].astype(np.float64)
    save_dir = tempfile.mkdtemp(prefix="accuracy-")
    try:
        found, predictions = run(Run(job, save_dir), job, masks)
    finally:
        shutil.rmtree(save_dir, ignore_errors=True)
    output = Path(job["output"])
    np.savez(output.with_suffix(".part.npz"), **predictions)
    output.with_suffix(".part.npz").replace(output.with_suffix(".npz"))
    output.with_suffix(".part").write_text(json.dumps(found))
    output.with_suffix(".part").replace(output.with_suffix(".json"))


def run(one: Run, job: dict[str, Any], masks: np.ndarray) -> tuple[dict, dict]:
    counts = job["line"]["counts"]
    each = [timed(one.featurize, c)[0] for c in range(max(counts))]
    took, _ = timed(one.finalize, max(counts))
    each = [{k: part[k] + took[k] / len(each) for k in took} for part in each]
    for c in range(max(counts)):
        took, _ = timed(one.score, c)
        each[c] = {k: each[c][k] + took[k] for k in took}
    steps, predictions = {}, {}
    for count in counts:
        took, scores = timed(one.scores, count)
        seconds = {k: took[k] + sum(part[k] for part in each[:count]) for k in took}
        if not np.isfinite(scores).all():
            raise ValueError(
                f"{(~np.isfinite(scores)).mean():.0%} of scores not finite"
            )
        if not scores.any():
            raise ValueError("all scores are 0: targets were not stored")
        predictions[str(count)] = (masks @ scores.astype(np.float64)).astype("float32")
        known = {"count": count, "label": "", "trained": count, "notes": {}}
        steps[str(count)] = {**known, "seconds": seconds}
    return {"steps": steps, "each": each, "m": one.m}, predictions


if __name__ == "__main__":
    main()
