"""Plug-ins as users of traker 0.3.2 wrote them: its names and calls only, no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.gradient_computers import AbstractGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import AbstractProjector
from trak.savers import AbstractSaver, ModelIDException
from trak.score_computers import AbstractScoreComputer, BasicScoreComputer
from trak.utils import vectorize


class LogitTask(AbstractModelOutput):
    """The logit of the label, times a constant."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = scale

    def get_output(
        self, model: Any, weights: Any, buffers: Any, image: Tensor, label: Tensor
    ) -> Tensor:
        logits = torch.func.functional_call(
            model, (weights, buffers), image.unsqueeze(0)
        )
        return self.scale * logits[0].gather(0, label.unsqueeze(0)).sum()

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Tensor:
        images, labels = batch
        logits = torch.func.functional_call(model, (weights, buffers), images)
        p = logits.softmax(-1)[torch.arange(len(labels)), labels]
        return ((1 - p) / self.scale).clone().detach().unsqueeze(-1)


class StaticLogitTask(LogitTask):
    """The same, with the static method that 0.3.2's own tasks have."""

    @staticmethod
    def get_output(
        model: Any, weights: Any, buffers: Any, image: Tensor, label: Tensor
    ) -> Tensor:
        logits = torch.func.functional_call(
            model, (weights, buffers), image.unsqueeze(0)
        )
        return 2.0 * logits[0].gather(0, label.unsqueeze(0)).sum()


class WholeBatchTask(StaticLogitTask):
    """The same, for gradient computers that give no weights and a whole batch."""

    @staticmethod
    def get_output(
        model: Any, weights: Any, buffers: Any, images: Tensor, labels: Tensor
    ) -> Tensor:
        return 2.0 * model(images).gather(1, labels[:, None])[:, 0]

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Tensor:
        images, labels = batch
        p = model(images).softmax(-1)[torch.arange(len(labels)), labels]
        return ((1 - p) / self.scale).clone().detach().unsqueeze(-1)


class LoopGradientComputer(AbstractGradientComputer):
    """A backward pass an example, on plain autograd."""

    def __init__(
        self,
        model: torch.nn.Module,
        task: AbstractModelOutput,
        grad_dim: int,
        dtype: torch.dtype,
        device: Any,
        grad_wrt: Any = None,
    ) -> None:
        super().__init__(model, task, grad_dim, dtype, device)
        self.grad_wrt = grad_wrt
        self.load_model_params(model)

    def load_model_params(self, model: torch.nn.Module) -> None:
        self.weights = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())

    def _chosen(self) -> dict[str, Tensor]:
        if self.grad_wrt is None:
            return self.weights
        return {name: self.weights[name] for name in self.grad_wrt}

    def _gradients(self, batch: Any) -> list[dict[str, Tensor]]:
        chosen = self._chosen()
        result = []
        for example in zip(*batch, strict=True):
            output = self.modelout_fn.get_output(
                self.model, self.weights, self.buffers, *example
            )
            grads = torch.autograd.grad(output, list(chosen.values()))
            result.append(dict(zip(chosen, grads, strict=True)))
        return result

    def compute_per_sample_grad(self, *, batch: Any) -> Any:
        rows = self._gradients(batch)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def compute_loss_grad(self, batch: Any) -> Tensor:
        return self.modelout_fn.get_out_to_loss_grad(
            self.model, self.weights, self.buffers, batch
        )


class FlatGradientComputer(LoopGradientComputer):
    """The same gradients as one ``(b, d)`` tensor, and weights without their axis."""

    def compute_per_sample_grad(self, *, batch: Any) -> Any:
        rows = super().compute_per_sample_grad(batch=batch)
        return torch.cat([value.flatten(start_dim=1) for value in rows.values()], dim=1)

    def compute_loss_grad(self, batch: Any) -> Tensor:
        return super().compute_loss_grad(batch).reshape(-1)


class NormalProjector(AbstractProjector):
    """A whole matrix from torch's generator, made anew at each call."""

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str,
        device: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)

    def matrix(self, model_id: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1000 * model_id)
        return torch.randn(self.grad_dim, self.proj_dim, generator=generator)

    def project(self, grads: Any, model_id: int) -> Tensor:
        if isinstance(grads, dict):
            grads = vectorize(grads, device=self.device)
        return grads @ self.matrix(model_id).to(grads.dtype)

    def free_memory(self) -> None:
        pass


class RidgeScoreComputer(AbstractScoreComputer):
    """The three methods, with the constructor that 0.3.2 calls."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: Any,
        logging_level: int = 0,
        lambda_reg: float = 0.0,
    ) -> None:
        super().__init__(dtype, device)
        self.lambda_reg = lambda_reg

    def get_xtx(self, grads: Tensor) -> Tensor:
        return grads.T @ grads

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        ridge = self.lambda_reg * torch.eye(len(xtx), dtype=xtx.dtype)
        return grads @ torch.linalg.inv(xtx + ridge).to(self.dtype)

    def get_scores(
        self, features: Tensor, target_grads: Tensor, *, accumulator: Tensor
    ) -> None:
        accumulator += (features @ target_grads.T).detach().cpu()


class HalvedScoreComputer(BasicScoreComputer):
    """One step of the shipped score computer replaced."""

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        return super().get_x_xtx_inv(grads, xtx) / 2


class RamSaver(AbstractSaver):
    """Keeps everything in dictionaries, and one ``current_store`` that it updates."""

    def __init__(
        self,
        save_dir: Any,
        metadata: Any,
        train_set_size: int,
        proj_dim: int,
        load_from_save_dir: bool,
        logging_level: int,
        use_half_precision: bool,
    ) -> None:
        super().__init__(
            save_dir,
            metadata,
            load_from_save_dir,
            logging_level,
            use_half_precision,
        )
        self.train_set_size = train_set_size
        self.proj_dim = proj_dim
        self.dtype = np.float16 if use_half_precision else np.float32
        self.stores: dict[Any, dict[str, np.ndarray]] = {}

    def register_model_id(
        self, model_id: int, _allow_featurizing_already_registered: bool
    ) -> None:
        if model_id in self.model_ids and not _allow_featurizing_already_registered:
            raise ModelIDException(f"{model_id} is taken")
        self.current_model_id = model_id
        self.model_ids[model_id] = {"is_featurized": 0, "is_finalized": 0}
        self.init_store(model_id)
        self.serialize_current_model_id_metadata()

    def serialize_current_model_id_metadata(self) -> None:
        done = self.current_store["is_featurized"].sum() == self.train_set_size
        self.model_ids[self.current_model_id]["is_featurized"] = int(done)

    def init_store(self, model_id: int) -> None:
        n, p = self.train_set_size, self.proj_dim
        self.stores[model_id] = {
            "grads": np.zeros((n, p), self.dtype),
            "out_to_loss": np.zeros((n, 1), self.dtype),
            "features": np.zeros((n, p), self.dtype),
            "is_featurized": np.zeros((n, 1), np.int32),
        }
        self.load_current_store(model_id)

    def init_experiment(self, exp_name: str, num_targets: int, model_id: int) -> None:
        self.experiments[exp_name] = {
            "num_targets": num_targets,
            "scores_path": "",
            "scores_finalized": 0,
        }
        self.stores.setdefault(
            exp_name,
            {
                f"{exp_name}_scores": np.zeros(
                    (self.train_set_size, num_targets), np.float32
                )
            },
        )
        self.stores.setdefault(
            (model_id, exp_name),
            {f"{exp_name}_grads": np.zeros((num_targets, self.proj_dim), self.dtype)},
        )
        self.load_current_store(model_id, exp_name, num_targets)

    def load_current_store(
        self,
        model_id: int,
        exp_name: str | None = None,
        exp_num_targets: int | None = -1,
        mode: str | None = "r+",
    ) -> None:
        self.current_model_id = model_id
        if exp_name is None:
            self.current_store.update(self.stores[model_id])
        else:
            self.current_experiment_name = exp_name
            self.current_store.update(self.stores[model_id, exp_name])
            self.current_store.update(self.stores[exp_name])

    def save_scores(self, exp_name: str) -> None:
        self.experiments[exp_name]["scores_finalized"] = 1

    def del_grads(self, model_id: int) -> None:
        self.stores[model_id]["grads"] = None
