"""What every projector promises; each shipped class and every docs example passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trak.errors import BatchError
from trak.projectors import AbstractProjector


def gradients(b: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random gradients whose scales differ between columns, as real ones do."""
    generator = torch.Generator().manual_seed(7)
    scale = torch.logspace(-2, 1, d, dtype=torch.float64)
    return (torch.randn(b, d, generator=generator).double() * scale).to(dtype)


class ProjectorContract:
    """Inherit, name it ``Test...``, and implement `make`."""

    grad_dim = 57
    proj_dim = 16
    random = True
    """Whether seeds and model ids change the projection."""

    rtol = 1e-5
    atol = 1e-3

    def make(self, seed: int = 0) -> AbstractProjector:
        """Return a projector of ``grad_dim`` to ``proj_dim``."""
        raise NotImplementedError

    def close(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=self.rtol, atol=self.atol)

    @pytest.mark.parametrize("b", [0, 1, 3, 41])
    def test_shape_dtype_and_device(self, b: int) -> None:
        projector = self.make()
        out = projector.project(gradients(b, self.grad_dim), model_id=0)
        assert out.shape == (b, self.proj_dim)
        assert out.dtype == torch.float32
        assert out.device.type == "cpu"
        assert bool(out.isfinite().all())
        assert projector.proj_dim == self.proj_dim
        assert isinstance(projector.device, torch.device)

    def test_same_seed_same_bytes(self) -> None:
        x = gradients(3, self.grad_dim)
        first = self.make(5).project(x, model_id=2)
        assert torch.equal(first, self.make(5).project(x, model_id=2))

    def test_seeds_and_model_ids_share_nothing(self) -> None:
        if not self.random:
            return
        x = gradients(1, self.grad_dim)
        cases = [(0, 0), (0, 1), (1, 0), (1000, 0), (-1, 0), (0, -1), (2**70, 0)]
        sketches = [self.make(s).project(x, model_id=m)[0] for s, m in cases]
        unit = torch.nn.functional.normalize(torch.stack(sketches), dim=1)
        cosines = (unit @ unit.T).fill_diagonal_(0).abs()
        assert float(cosines.max()) < 0.99

    def test_batch_split_does_not_matter(self) -> None:
        projector = self.make()
        x = gradients(41, self.grad_dim)
        whole = projector.project(x, model_id=1)
        parts = [projector.project(part, model_id=1) for part in x.tensor_split(4)]
        self.close(torch.cat(parts), whole)

    def test_row_order_does_not_matter(self) -> None:
        projector = self.make()
        x = gradients(5, self.grad_dim)
        order = torch.tensor([3, 0, 4, 4, 1])
        self.close(
            projector.project(x[order], model_id=0),
            projector.project(x, model_id=0)[order],
        )

    def test_is_linear(self) -> None:
        projector = self.make()
        x = gradients(2, self.grad_dim)
        both = projector.project(x.sum(0, keepdim=True), model_id=0)
        self.close(projector.project(x, model_id=0).sum(0, keepdim=True), both)

    def test_model_ids_may_alternate(self) -> None:
        projector = self.make()
        x = gradients(2, self.grad_dim)
        first = projector.project(x, model_id=0)
        projector.project(x, model_id=1)
        assert torch.equal(projector.project(x, model_id=0), first)

    def test_projects_after_free_memory(self) -> None:
        projector = self.make()
        x = gradients(2, self.grad_dim)
        projector.free_memory()
        first = projector.project(x, model_id=0)
        projector.free_memory()
        projector.free_memory()
        assert torch.equal(projector.project(x, model_id=0), first)

    def test_dict_of_parameters(self) -> None:
        projector = self.make()
        x = gradients(3, self.grad_dim)
        named = {
            "scalar": x[:, 0],
            "weight": x[:, 1:25].reshape(3, 2, 3, 4),
            "bias": x[:, 25:],
        }
        out = projector.project(named, model_id=0)
        assert out.shape == (3, self.proj_dim)
        assert torch.equal(projector.project(named, model_id=0), out)

    def test_strides_do_not_matter(self) -> None:
        projector = self.make()
        x = gradients(3, self.grad_dim)
        for strided in (x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]):
            assert not strided.is_contiguous()
            self.close(
                projector.project(strided, model_id=0), projector.project(x, model_id=0)
            )

    def test_leaves_its_input_and_the_global_generator_alone(self) -> None:
        x = gradients(3, self.grad_dim)
        copy = x.clone()
        state = torch.get_rng_state()
        self.make().project(x, model_id=0)
        assert torch.equal(x, copy)
        assert torch.equal(torch.get_rng_state(), state)

    def test_no_graph_is_kept(self) -> None:
        x = gradients(3, self.grad_dim).requires_grad_()
        assert not self.make().project(x, model_id=0).requires_grad

    def test_wrong_number_of_columns(self) -> None:
        with pytest.raises(BatchError, match=f"have {self.grad_dim + 1} columns"):
            self.make().project(gradients(2, self.grad_dim + 1), model_id=0)

    def test_description_tells_projections_apart(self) -> None:
        assert self.make(3).describe() == self.make(3).describe()
        assert "\n" not in self.make().describe()
        if self.random:
            assert self.make(3).describe() != self.make(4).describe()
