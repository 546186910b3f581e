"""The ground truths: what is trained, on what, and what the models then put out.

Every truth has three families of models that share no model and no subset: the
checkpoints that are attributed, the retrainings that judge, and the retrainings that
datamodels and empirical influence are given. All are trained on random halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import accuracy_data as data
import accuracy_models as models
import facts_models
import numpy as np
import torch
from accuracy_models import Recipe
from accuracy_states import vectors
from torch import Tensor, nn

from trak.evaluation import GroundTruth, random_subsets, retrain_subsets
from trak.modelout_functions import TASK_TO_MODELOUT

CHECKPOINTS, JUDGES, GIVEN = 1, 2, 3
"""Seeds of the subsets of the three families."""


@dataclass(frozen=True)
class Truth:
    """A model, its data, and how many are trained of each family."""

    name: str
    title: str
    task: str
    make: Callable[..., nn.Module]
    """Builds it: of the directory of the data, if ``from_root``."""

    loss: Callable[[nn.Module, models.Batch], Tensor]
    read: Callable[[Path], data.Split]
    recipe: Recipe
    n_checkpoints: int = 20
    n_subsets: int = 100
    n_repeats: int = 1
    n_given: int = 0
    batch: int = 100
    """Examples that are featurized at a time."""

    names: tuple[str, ...] = ()
    """What the task calls the columns of a batch; none where it takes a tuple."""

    from_root: bool = False
    """Whether the model's first weights are read with the data."""

    below: Callable[[nn.Module, models.Batch], models.Batch] | None = None
    """What trainings start from, where that is not the data but frozen layers' states."""

    root: Path = Path()
    """Directory of the data."""

    def build(self) -> nn.Module:
        """Make a model to be trained."""
        return self.make(self.root) if self.from_root else self.make()

    @cached_property
    def split(self) -> data.Split:
        return self.read(self.root)

    @cached_property
    def material(self) -> models.Batch:
        """What models are trained on."""
        train = self.split.train
        return self.below(self.model, train) if self.below else train

    @cached_property
    def model(self) -> nn.Module:
        """A model to load checkpoints into."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval()

    @property
    def metadata(self) -> dict[str, Any]:
        shape = {"n": self.split.n, "m": self.split.m}
        return {"truth": self.name, **shape, **self.recipe.as_dict()}

    def batches(self, part: str, count: int | None = None) -> list[Any]:
        """Give the training examples (``"train"``) or the targets, a batch at a time.

        Args:
            part: Which.
            count: How many, the first ones; None for all.

        Returns:
            Batches as the task takes them.
        """
        columns = [c[:count].split(self.batch) for c in getattr(self.split, part)]
        rows = list(zip(*columns, strict=True))
        if self.names:
            return [dict(zip(self.names, row, strict=True)) for row in rows]
        if self.recipe.alike:
            rows = [models.trimmed(row) for row in rows]
        return rows

    def train(self, indices: np.ndarray, seed: int) -> nn.Module:
        return models.train(
            self.build, self.loss, self.material, indices, seed, self.recipe
        )

    @torch.no_grad()
    def outputs(self, model: nn.Module, part: str = "targets") -> np.ndarray:
        """Compute what is attributed. Shape ``(m,)``."""
        task = TASK_TO_MODELOUT[self.task]()
        parts = [task.get_outputs(model, None, None, b) for b in self.batches(part)]
        return torch.cat(parts).double().numpy()

    # -- families ---------------------------------------------------------------------

    def judges(self, folder: Path, n_subsets: int | None = None) -> GroundTruth:
        """Train, or read, the retrainings that scores are judged by."""
        return self._bank(folder / f"{self.name}.npz", JUDGES, n_subsets)

    def given(self, folder: Path) -> GroundTruth:
        """Train, or read, the retrainings that datamodels are estimated from."""
        one = replace(self, n_repeats=1, n_subsets=self.n_given)
        return one._bank(folder / f"{self.name}-given.npz", GIVEN, None)

    def _bank(self, path: Path, seed: int, n_subsets: int | None) -> GroundTruth:
        count = n_subsets or self.n_subsets
        masks = random_subsets(self.split.n, count, seed=seed)
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True)
        return retrain_subsets(
            self.train,
            self.outputs,
            masks,
            path,
            n_repeats=self.n_repeats,
            seed=seed,
            metadata=self.metadata,
        )

    def halves(self) -> np.ndarray:
        """Give the examples each checkpoint is trained on. Shape ``(c, n)``."""
        return random_subsets(self.split.n, self.n_checkpoints, seed=CHECKPOINTS)

    def checkpoints(self, folder: Path) -> Iterator[dict[str, Tensor]]:
        """Train, or read, the checkpoints, one after the other."""
        folder = folder / f"{self.name}-checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        for number, half in enumerate(self.halves()):
            path = folder / f"{number}.pt"
            if not path.exists():
                model = self.train(np.flatnonzero(half), seed=number)
                torch.save(model.state_dict(), path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
            yield torch.load(path, weights_only=True)


DIGITS = Truth(
    name="digits",
    title="digits, CNN (21k)",
    task="image_classification",
    make=models.digits_cnn,
    loss=models.image_loss,
    read=lambda root: data.digits(1297, 500),
    recipe=Recipe(epochs=20, rate=0.1),
    n_repeats=2,
    n_given=2000,
)
DIABETES = Truth(
    name="diabetes",
    title="diabetes, MLP (5k), regression",
    task="regression",
    make=models.diabetes_mlp,
    loss=models.value_loss,
    read=lambda root: data.diabetes(342, 100),
    recipe=Recipe(epochs=60, rate=0.05, batch=32),
    n_repeats=2,
    n_given=2000,
)
MNIST = Truth(
    name="mnist",
    title="MNIST 2,000, MLP (51k)",
    task="image_classification",
    make=models.mnist_mlp,
    loss=models.image_loss,
    read=lambda root: data.mnist(root, 2000, 400),
    recipe=Recipe(epochs=20, rate=0.1),
    n_repeats=2,
    n_given=2000,
)
CIFAR4 = Truth(
    name="cifar4",
    title="CIFAR-10, 4 classes at 16x16, 2,000, ResNet (73k)",
    task="image_classification",
    make=models.small_resnet,
    loss=models.image_loss,
    read=lambda root: data.cifar(
        root, ("airplane", "automobile", "bird", "cat"), 2000, 400, 16
    ),
    recipe=Recipe(epochs=30, rate=0.05, decay=5e-4, autocast=True),
    n_given=200,
)
CIFAR2 = Truth(
    name="cifar2",
    title="CIFAR-2 1,000, ResNet-9 (2.3M)",
    task="image_classification",
    make=models.cifar2_resnet9,
    loss=models.image_loss,
    read=lambda root: data.cifar(root, ("cat", "dog"), 1000, 200, 32),
    recipe=Recipe(epochs=12, rate=0.05, batch=50, decay=5e-4, autocast=True),
    n_checkpoints=10,
    batch=50,
)
SST2 = Truth(
    name="sst2",
    title="SST-2 1,000, MiniLM (22.7M)",
    task="text_classification",
    make=models.minilm,
    loss=models.text_loss,
    read=lambda root: data.sst2(root, 1000, 200, 32),
    recipe=Recipe(3, 1e-4, batch=32, optimizer="adamw", decay=0.01, autocast=True),
    n_checkpoints=10,
    batch=32,
)
RTE = Truth(
    name="rte",
    title="RTE 2,432, MiniLM judged by others' BERT",
    task="text_classification",
    make=models.minilm,
    loss=models.text_loss,
    read=lambda root: data.rte(root, 128),
    recipe=Recipe(
        3, 1e-4, 32, optimizer="adamw", decay=0.01, autocast=True, alike=True
    ),
    n_checkpoints=3,
    batch=16,
)
WEBNLG = Truth(
    name="webnlg",
    title="WebNLG 1,294 texts, Llama (260k)",
    task="causal_lm",
    make=facts_models.llama,
    loss=models.token_loss,
    read=lambda root: data.webnlg(root, 64),
    recipe=Recipe(8, 3e-3, batch=32, optimizer="adamw", decay=0.01),
    n_checkpoints=10,
    batch=64,
    names=("input_ids", "attention_mask"),
    from_root=True,
)
TOP = Recipe(
    3, 5e-4, batch=32, optimizer="adamw", decay=0.01, autocast=True, alike=True
)
SST2_TOP = replace(
    SST2,
    name="sst2_top",
    title="SST-2 1,000, two layers of MiniLM (3.7M)",
    n_checkpoints=5,
    make=models.minilm_top,
    loss=models.top_loss,
    below=models.below,
    recipe=TOP,
)
QNLI_TOP = replace(
    SST2_TOP,
    name="qnli_top",
    title="QNLI 1,000, two layers of MiniLM (3.7M)",
    read=lambda root: data.qnli(root, 1000, 200, 96),
)
RTE_TOP = replace(
    SST2_TOP,
    name="rte_top",
    title="RTE 2,432, two layers of MiniLM (3.7M) judged by others' BERT",
    read=lambda root: data.rte(root, 128),
    batch=16,
)
HEAD = Recipe(10, 2e-3, batch=32, optimizer="adamw", decay=0.01)
SST2_HEAD = Truth(
    name="sst2_head",
    title="SST-2 1,000, a head on MiniLM's vectors (25k)",
    task="image_classification",
    make=lambda: models.head(384),
    loss=models.image_loss,
    read=lambda root: vectors(data.sst2(root, 1000, 200, 64)),
    recipe=HEAD,
    n_checkpoints=10,
    n_repeats=2,
)
QNLI_HEAD = replace(
    SST2_HEAD,
    name="qnli_head",
    title="QNLI 1,000, a head on MiniLM's vectors (98k)",
    make=lambda: models.head(4 * 384),
    read=lambda root: vectors(data.qnli(root, 1000, 200, 96)),
)
RTE_HEAD = replace(
    QNLI_HEAD,
    name="rte_head",
    title="RTE 2,432, a head on MiniLM's vectors (98k) judged by others' BERT",
    read=lambda root: vectors(data.rte(root, 128)),
)

TRUTHS = {
    truth.name: truth
    for truth in (
        *(DIGITS, DIABETES, MNIST, CIFAR4, CIFAR2, SST2, RTE, WEBNLG),
        *(SST2_TOP, QNLI_TOP, RTE_TOP, SST2_HEAD, QNLI_HEAD, RTE_HEAD),
    )
}
