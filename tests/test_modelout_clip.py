"""CLIP: the simulated batch, its bank, and what they must not depend on."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.task_contract import TaskCase, TaskContract, sdp_flags, state
from trak import TRAKer
from trak.errors import (
    BatchError,
    NonFiniteError,
    OptionError,
    OrderError,
    TaskError,
    TrakWarning,
)
from trak.modelout_functions import CLIPModelOutput

ROOT = Path(__file__).parents[1]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class TwoTowers(torch.nn.Module):
    """Linear towers with CLIP's calling convention and its learnt factor."""

    def __init__(self, scale: float = 3.0, wrap: Any = None) -> None:
        super().__init__()
        self.image_tower = torch.nn.Parameter(draw(5, 4, seed=1))
        self.text_tower = torch.nn.Parameter(draw(6, 4, seed=2))
        self.logit_scale = torch.nn.Parameter(torch.tensor(scale).double().log())
        self.wrap = wrap

    def forward(self, image: Tensor, text: Tensor) -> Any:
        phi = torch.nn.functional.normalize(image @ self.image_tower, dim=-1)
        psi = torch.nn.functional.normalize(text @ self.text_tower, dim=-1)
        output = phi, psi, self.logit_scale.exp()
        return self.wrap(*output) if self.wrap else output


PAIRS = draw(3, 5, seed=3), draw(3, 6, seed=4)
POOL = draw(20, 5, seed=5), draw(20, 6, seed=6)


def loader(batch_size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(side.split(batch_size) for side in POOL), strict=True))


def ready(model: torch.nn.Module | None = None, **options: Any) -> CLIPModelOutput:
    task = CLIPModelOutput(**{"simulated_batch_size": 8, **options})
    task.get_embeddings(model or TwoTowers(), loader(7))
    return task


class TestClip(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        return TaskCase(ready(), TwoTowers(), PAIRS)


class TestClipMapping(TaskContract):
    @pytest.fixture
    def case(self) -> TaskCase:
        batch = dict(zip(("image", "text"), PAIRS, strict=True))
        return TaskCase(ready(temperature=2.0), TwoTowers(), batch)


def drawn(task: CLIPModelOutput) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(task.seed)
    rows = torch.randperm(task.num_computed_embeddings, generator=generator)
    rows = rows[: task.simulated_batch_size]
    return task.image_embeddings[rows], task.text_embeddings[rows]


class TestValues:
    def test_output_is_the_papers(self) -> None:
        task, model = ready(), TwoTowers()
        images, texts = drawn(task)
        for i in range(3):
            phi, psi, _ = model(PAIRS[0][i], PAIRS[1][i])
            by_text = torch.stack([(-phi @ (psi - other)).exp() for other in texts])
            by_image = torch.stack([(-psi @ (phi - other)).exp() for other in images])
            expected = -by_text.sum().log() - by_image.sum().log()
            value = task.get_output(model, None, None, PAIRS[0][i], PAIRS[1][i])
            torch.testing.assert_close(value, expected)

    @pytest.mark.parametrize("temperature", [None, 0.5])
    def test_weight_is_one_minus_the_mean_probability(
        self, temperature: float | None
    ) -> None:
        task, model = ready(temperature=temperature), TwoTowers()
        images, texts = drawn(task)
        q = task.get_out_to_loss_grad(model, None, None, PAIRS)
        for i in range(3):
            phi, psi, scale = model(PAIRS[0][i], PAIRS[1][i])
            factor = scale if temperature is None else temperature
            by_text = (factor * torch.cat([psi[None], texts]) @ phi).softmax(0)[0]
            by_image = (factor * torch.cat([phi[None], images]) @ psi).softmax(0)[0]
            torch.testing.assert_close(q[i, 0], 1 - (by_text + by_image) / 2)

    def test_each_checkpoint_brings_its_own_temperature(self) -> None:
        task = ready()
        for scale in (1.0, 20.0, 1.0):
            torch.testing.assert_close(
                task.get_out_to_loss_grad(TwoTowers(scale), None, None, PAIRS),
                ready(temperature=scale).get_out_to_loss_grad(
                    TwoTowers(), None, None, PAIRS
                ),
            )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_stays_finite(self, dtype: torch.dtype) -> None:
        big = (1e2 * torch.ones(3, 4)).to(dtype)
        model = torch.nn.Module()
        model.forward = lambda image, text: (image, text, 100.0)
        task = CLIPModelOutput()
        task.set_embeddings(big, -big)
        f = task.get_outputs(model, None, None, (big, -big))
        q = task.get_out_to_loss_grad(model, None, None, (big, -big))
        assert f.isfinite().all()
        assert q.isfinite().all()
        assert f.dtype == q.dtype == torch.float32

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda a, b, s: SimpleNamespace(
                image_embeds=a, text_embeds=b, logit_scale=s
            ),
            lambda a, b, s: {"image_features": a, "text_features": b, "logit_scale": s},
            lambda a, b, s: [a, b, s, "logit bias"],
        ],
    )
    def test_every_kind_of_model_output(self, wrap: Any) -> None:
        model = TwoTowers(wrap=wrap)
        task = ready(model)
        torch.testing.assert_close(
            task.get_out_to_loss_grad(model, None, None, PAIRS),
            ready().get_out_to_loss_grad(TwoTowers(), None, None, PAIRS),
        )

    def test_a_model_without_a_factor_needs_a_temperature(self) -> None:
        model = TwoTowers(wrap=lambda a, b, _: (a, b))
        with pytest.raises(TaskError, match="no logit_scale; pass a temperature"):
            ready(model).get_out_to_loss_grad(model, None, None, PAIRS)
        q = ready(model, temperature=3.0).get_out_to_loss_grad(model, None, None, PAIRS)
        expected = ready().get_out_to_loss_grad(TwoTowers(3.0), None, None, PAIRS)
        torch.testing.assert_close(q, expected)


class TestBank:
    @pytest.mark.parametrize("batch_size", [1, 7, 20])
    @pytest.mark.parametrize("size", [1, 7, 12, 20, 50_000])
    def test_loader_batches_do_not_matter(self, batch_size: int, size: int) -> None:
        task = CLIPModelOutput(simulated_batch_size=8)
        task.get_embeddings(
            TwoTowers(), loader(batch_size), batch_size, embedding_dim=4, size=size
        )
        phi, psi, _ = TwoTowers()(*POOL)
        assert task.num_computed_embeddings == min(size, 20)
        torch.testing.assert_close(task.image_embeddings, phi[:size].detach())
        torch.testing.assert_close(task.text_embeddings, psi[:size].detach())
        assert not task.image_embeddings.requires_grad

    def test_nothing_is_read_from_the_loader_past_size(self) -> None:
        def pairs():
            yield loader(7)[0]
            raise AssertionError("read too far")

        CLIPModelOutput().get_embeddings(TwoTowers(), pairs(), size=7)

    def test_preprocessing_and_mapping_loaders(self) -> None:
        batches = [
            {"image": image / 2, "text": text.tolist()} for image, text in loader(7)
        ]
        task = CLIPModelOutput(simulated_batch_size=8)
        task.get_embeddings(
            TwoTowers(),
            batches,
            preprocess_fn_img=lambda image: image * 2,
            preprocess_fn_txt=lambda text: torch.tensor(text, dtype=torch.float64),
        )
        assert task.describe() == ready().describe()

    def test_simulated_batch_is_uniform_and_without_repeats(self) -> None:
        counts = torch.zeros(20)
        bank = torch.eye(20)
        model = torch.nn.Module()
        model.forward = lambda image, text: (image, text, 1.0)
        zeros = torch.zeros(1, 20)
        draws = 200
        for seed in range(draws):
            task = CLIPModelOutput(simulated_batch_size=5, seed=seed)
            task.set_embeddings(bank, bank)
            probe = zeros.clone().requires_grad_()
            # At zero embeddings the gradient is minus the mean of the drawn rows.
            f = task.get_outputs(model, None, None, (probe, zeros))
            (gradient,) = torch.autograd.grad(f.sum(), probe)
            torch.testing.assert_close(
                gradient.sort().values[0, :5], torch.full((5,), -0.2)
            )
            counts += (gradient[0] < 0).float()
        # Binomial(200, 1/4): mean 50, standard deviation 6.1; five of them.
        assert (counts - draws / 4).abs().max() < 31

    def test_fewer_pairs_than_the_simulated_batch(self) -> None:
        task = ready(simulated_batch_size=300)
        outputs = task.get_outputs(TwoTowers(), None, None, PAIRS)
        bigger = ready(simulated_batch_size=20)
        expected = bigger.get_outputs(TwoTowers(), None, None, PAIRS)
        torch.testing.assert_close(outputs, expected)

    def test_instances_share_nothing(self) -> None:
        first = ready()
        before = first.get_outputs(TwoTowers(), None, None, PAIRS), first.describe()
        second = CLIPModelOutput(simulated_batch_size=2)
        assert second.image_embeddings is None
        assert second.text_embeddings is None
        assert second.num_computed_embeddings == 0
        second.set_embeddings(torch.ones(2, 4), torch.ones(2, 4))
        after = first.get_outputs(TwoTowers(), None, None, PAIRS), first.describe()
        torch.testing.assert_close(after[0], before[0])
        assert after[1] == before[1]

    def test_embedding_changes_nothing_global(self) -> None:
        rng, flags, model = torch.get_rng_state(), sdp_flags(), TwoTowers()
        ready(model)
        assert torch.equal(torch.get_rng_state(), rng)
        assert sdp_flags() == flags
        assert model.training
        assert torch.is_grad_enabled()


class TestDescription:
    def test_changes_with_what_is_computed(self) -> None:
        texts = [
            CLIPModelOutput().describe(),
            ready().describe(),
            ready(seed=1).describe(),
            ready(temperature=1.0).describe(),
            ready(simulated_batch_size=9).describe(),
        ]
        shifted = ready()
        shifted.set_embeddings(draw(20, 4), draw(20, 4))
        texts.append(shifted.describe())
        assert len(set(texts)) == len(texts)
        assert ready().describe() == ready().describe()

    def test_is_the_same_in_another_process(self) -> None:
        program = (
            "import torch; from trak.modelout_functions import CLIPModelOutput\n"
            "task = CLIPModelOutput(simulated_batch_size=2)\n"
            "task.set_embeddings(torch.eye(3), torch.eye(3))\n"
            "print(task.describe())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        task = CLIPModelOutput(simulated_batch_size=2)
        task.set_embeddings(torch.eye(3), torch.eye(3))
        assert done.stdout.strip() == task.describe()


def test_other_embeddings_for_the_same_checkpoint_are_noticed(tmp_path: Path) -> None:
    model = TwoTowers()
    checkpoint = {name: value.clone() for name, value in model.state_dict().items()}

    def open_store() -> TRAKer:
        return TRAKer(model, "clip", 3, tmp_path, proj_dim=4, logging_level=100)

    traker = open_store()
    traker.task.get_embeddings(model, loader(7))
    traker.load_checkpoint(checkpoint)
    traker.featurize(tuple(side[:2] for side in PAIRS))
    traker = open_store()
    traker.task.get_embeddings(model, loader(7))
    traker.load_checkpoint(checkpoint)
    traker.featurize(tuple(side[1:2] for side in PAIRS), inds=[1])
    traker.task.get_embeddings(model, reversed(loader(7)))
    with pytest.warns(TrakWarning, match="model id 0 has rows for which the task had"):
        traker.featurize(tuple(side[2:] for side in PAIRS), inds=[2])


class TestCheckpoints:
    """Every checkpoint is contrasted with embeddings of its own."""

    def open_store(self, task: Any, path: Path) -> TRAKer:
        return TRAKer(TwoTowers(), task, 3, path, proj_dim=4, logging_level=100)

    def checkpoints(self) -> list[dict[str, Tensor]]:
        found = []
        for shift in (0.0, 0.1, 0.3):
            state = TwoTowers().state_dict()
            state["image_tower"] = state["image_tower"] + shift * draw(5, 4, seed=9)
            found.append(state)
        return found

    def test_pairs_are_embedded_by_each(self, tmp_path: Path) -> None:
        asked, given = self.checkpoints(), []
        for name in ("pairs", "calls"):
            pairs = loader(7) if name == "pairs" else None
            task = CLIPModelOutput(simulated_batch_size=8, pairs=pairs)
            traker = self.open_store(task, tmp_path / name)
            for checkpoint in asked:
                traker.load_checkpoint(checkpoint)
                if pairs is None:
                    task.get_embeddings(traker.gradient_computer.model, loader(7))
                traker.featurize(PAIRS)
            traker.finalize_features()
            for checkpoint in asked:
                traker.start_scoring_checkpoint(checkpoint, num_targets=3)
                if pairs is None:
                    task.get_embeddings(traker.gradient_computer.model, loader(7))
                traker.score(PAIRS)
            given.append(torch.as_tensor(traker.finalize_scores()))
        torch.testing.assert_close(given[0], given[1])
        assert given[0].abs().max() > 0

    def test_a_store_is_opened_again(self, tmp_path: Path) -> None:
        for inds in ([0, 1], [2]):
            task = CLIPModelOutput(simulated_batch_size=8, pairs=loader(7))
            before = task.describe()
            for _ in range(2):  # a task that was used is the same task
                traker = self.open_store(task, tmp_path)
                traker.load_checkpoint(self.checkpoints()[1], model_id=0)
            traker.featurize(tuple(side[inds] for side in PAIRS), inds=inds)
            assert task.describe() == before
            assert task.describe() != ready().describe()
        traker.finalize_features()

    def test_embeddings_of_another_checkpoint_are_noticed(self, tmp_path: Path) -> None:
        first, second, third = self.checkpoints()
        task = CLIPModelOutput(simulated_batch_size=8)
        traker = self.open_store(task, tmp_path)
        model = traker.gradient_computer.model
        task.get_embeddings(model, loader(7))  # of the weights that it starts with
        traker.load_checkpoint(first)
        traker.featurize(PAIRS)
        traker.load_checkpoint(second)
        with pytest.warns(
            TrakWarning, match="are of other weights than the checkpoint"
        ):
            traker.featurize(PAIRS)
        traker.load_checkpoint(third)
        phi, psi, _ = model(*POOL)
        task.set_embeddings(phi.detach(), psi.detach())  # whoever sets them knows whose
        traker.featurize(PAIRS)

    def test_embeddings_that_were_set_count_for_the_next(self, tmp_path: Path) -> None:
        first, second, _ = self.checkpoints()
        task = CLIPModelOutput()
        task.set_embeddings(draw(9, 4), draw(9, 4, seed=1))
        traker = self.open_store(task, tmp_path)
        traker.load_checkpoint(first)
        traker.featurize(PAIRS)
        traker.load_checkpoint(second)
        with pytest.warns(TrakWarning, match="or pass pairs to CLIPModelOutput"):
            traker.featurize(PAIRS)

    def test_dropout_is_off_and_the_mode_stays(self) -> None:
        class Dropped(TwoTowers):
            def __init__(self) -> None:
                super().__init__()
                self.dropout = torch.nn.Dropout(0.5)
                self.frozen = torch.nn.Dropout(0.5).eval()

            def forward(self, image: Tensor, text: Tensor) -> Any:
                return super().forward(self.dropout(image), self.frozen(text))

        model = Dropped().train()
        model.frozen.eval()
        assert ready(model).describe() == ready().describe()
        assert model.training
        assert model.dropout.training
        assert not model.frozen.training

    def test_pairs_must_last(self) -> None:
        with pytest.raises(OptionError, match="which can be gone through only once"):
            CLIPModelOutput(pairs=iter(loader(7)))
        with pytest.raises(OptionError, match="pairs is a generator"):
            CLIPModelOutput(pairs=(batch for batch in loader(7)))


@dataclass
class NoEmbeddings:
    loss: float = 0.0


class TestErrors:
    def test_embeddings_come_first(self) -> None:
        task, model = CLIPModelOutput(), TwoTowers()
        weights, buffers = state(model)
        calls = [
            lambda: task.get_output(model, weights, buffers, *(x[0] for x in PAIRS)),
            lambda: task.get_outputs(model, weights, buffers, PAIRS),
            lambda: task.get_out_to_loss_grad(model, weights, buffers, PAIRS),
        ]
        for call in calls:
            with pytest.raises(OrderError, match=r"call traker\.task\.get_embeddings"):
                call()

    def test_options(self) -> None:
        with pytest.raises(
            OptionError, match="simulated_batch_size must be at least 1"
        ):
            CLIPModelOutput(simulated_batch_size=0)
        with pytest.raises(OptionError, match="size must be at least 1, got 0"):
            CLIPModelOutput().get_embeddings(TwoTowers(), loader(7), size=0)
        with pytest.raises(
            OptionError, match=r"embedding_dim is 1024, .* have 4 entries"
        ):
            CLIPModelOutput().get_embeddings(
                TwoTowers(), loader(7), batch_size=7, embedding_dim=1024
            )

    def test_loaders(self) -> None:
        with pytest.raises(BatchError, match="no image-text pair to embed"):
            CLIPModelOutput().get_embeddings(TwoTowers(), [])
        with pytest.raises(BatchError, match=r"A CLIP batch is \(image, text\)"):
            CLIPModelOutput().get_embeddings(TwoTowers(), [POOL[0]])

    def test_images_and_texts_of_different_counts(self) -> None:
        fewer = PAIRS[0], PAIRS[1][:2]
        with pytest.raises(BatchError, match="has 3 images and 2 texts; pass one text"):
            ready().get_outputs(TwoTowers(), None, None, fewer)
        with pytest.raises(BatchError, match="has 3 images and 2 texts"):
            CLIPModelOutput().get_embeddings(TwoTowers(), [fewer])
        names = dict(zip(("pixel_values", "input_ids"), fewer, strict=True))
        with pytest.raises(BatchError, match="has 3 images and 2 texts"):
            CLIPModelOutput().get_embeddings(TwoTowers(), [names])
        words = {"image": PAIRS[0], "text": ["one", "two"]}
        with pytest.raises(BatchError, match="has 3 images and 2 texts"):
            CLIPModelOutput().get_embeddings(TwoTowers(), [words])

    @pytest.mark.parametrize("side", [0, 1])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_embeddings_that_are_not_finite(self, side: int, bad: float) -> None:
        sides = [x.clone() for x in POOL]
        sides[side][13, 2] = bad
        name = ("image", "text")[side]
        with pytest.raises(
            NonFiniteError, match=f"The {name} embedding of pair 13 is not finite"
        ) as caught:
            CLIPModelOutput().get_embeddings(TwoTowers(), [tuple(sides)])
        assert caught.value.index == 13

    def test_a_pair_that_is_not_finite(self, tmp_path: Path) -> None:
        images = PAIRS[0].clone()
        images[1, 0] = float("nan")
        task = CLIPModelOutput(pairs=[POOL])
        traker = TRAKer(TwoTowers(), task, 3, tmp_path, proj_dim=4, logging_level=100)
        traker.load_checkpoint(TwoTowers().state_dict())
        with pytest.raises(NonFiniteError) as caught:
            traker.featurize((images, PAIRS[1]))
        assert caught.value.index == 1

    def test_embeddings_of_wrong_shapes(self, untyped: None) -> None:
        rows = torch.ones(4, 3)
        task = CLIPModelOutput()
        with pytest.raises(OptionError, match=r"have shape \(4, 3\) and .* \(3, 3\)"):
            task.set_embeddings(rows, rows[:3])
        with pytest.raises(OptionError, match=r"pass one row for each image"):
            task.set_embeddings(rows[0], rows[0])
        with pytest.raises(BatchError, match="no embeddings of pairs; pass at least"):
            task.set_embeddings(rows[:0], rows[:0])
        task.set_embeddings(rows, rows)
        with pytest.raises(
            TaskError, match="have 4 entries, and those to contrast wit"
        ):
            task.get_outputs(TwoTowers(), None, None, PAIRS)

    @pytest.mark.parametrize(
        "batch", [PAIRS[0], (*PAIRS, PAIRS[0]), {"image": PAIRS[0], "caption": 0}]
    )
    def test_batches(self, batch: Any) -> None:
        with pytest.raises(BatchError, match=r"A CLIP batch is \(image, text\)"):
            ready().get_outputs(TwoTowers(), None, None, batch)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda a, b, s: a,
            lambda a, b, s: (a,),
            lambda a, b, s: (a, b[:, :2], s),
            lambda a, b, s: {"image_embeds": a},
            lambda a, b, s: NoEmbeddings(),
        ],
    )
    def test_models(self, wrap: Any) -> None:
        with pytest.raises(
            TaskError, match="No image and text embeddings of one shape"
        ):
            ready().get_outputs(TwoTowers(wrap=wrap), None, None, PAIRS)
