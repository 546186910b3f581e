"""The models of open_clip and transformers under the task ``clip``, as they are."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.architectures_models import define_operators
from tests.problems import draw
from trak import TRAKer
from trak.errors import TaskError
from trak.gradient_computers import HookGradientComputer
from trak.modelout_functions import CLIPModelOutput
from trak.projectors import NoOpProjector

define_operators()  # transformers imports torchvision where there is one

EOS, VOCABULARY, LENGTH = 49, 50, 7


def draw_images(count: int, seed: int) -> Tensor:
    return draw(count, 3, 8, 8, seed=seed)


def draw_tokens(count: int, seed: int) -> Tensor:
    """Texts of 1 to 6 words, the end, and padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, EOS, (count, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH, (count,), generator=generator)
    places = torch.arange(LENGTH)
    tokens[places == lengths[:, None]] = EOS
    return tokens.where(places <= lengths[:, None], 0)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Draw every weight, so that none is a special case such as a bias of 0."""
    model = model.double().eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            is_scale = "norm" in name or "ln_" in name
            shift = float(is_scale and name.endswith("weight"))
            parameter.copy_(shift + 0.3 * draw(*parameter.shape, seed=i))
            if name.endswith("logit_scale"):
                parameter.fill_(1.3)
    return model


def transformers_clip() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    tower = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        projection_dim=6,
        text_config={**tower, **text},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
    )
    return randomize(transformers.CLIPModel(config))


def transformers_siglip() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    tower = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    config = transformers.SiglipConfig(
        text_config={**tower, **text},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
    )
    return randomize(transformers.SiglipModel(config))


def import_open_clip() -> Any:
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("open_clip")


def open_clip_vit(**options: Any) -> torch.nn.Module:
    open_clip = import_open_clip()
    vision = open_clip.CLIPVisionCfg(
        layers=1, width=8, head_width=4, patch_size=4, image_size=8
    )
    text = open_clip.CLIPTextCfg(
        context_length=LENGTH, vocab_size=VOCABULARY, width=8, heads=2, layers=1
    )
    return randomize(open_clip.CLIP(6, vision, text, **options))


def open_clip_text_tower() -> torch.nn.Module:
    open_clip = import_open_clip()
    vision = open_clip.CLIPVisionCfg(
        layers=1, width=8, head_width=4, patch_size=4, image_size=8
    )
    text = open_clip.CLIPTextCfg(
        context_length=LENGTH, vocab_size=VOCABULARY, width=8, heads=2, layers=1
    )
    return randomize(open_clip.CustomTextCLIP(6, vision, text, init_logit_bias=-1.0))


def as_tuple(images: Tensor, tokens: Tensor) -> Any:
    return images, tokens


def as_processed(images: Tensor, tokens: Tensor) -> Any:
    """What CLIP's processor gives, and a collator for ``Trainer`` adds."""
    transformers = pytest.importorskip("transformers")
    mask = (tokens > 0).long()
    batch = {"input_ids": tokens, "attention_mask": mask, "pixel_values": images}
    return transformers.BatchEncoding({**batch, "return_loss": True})


def as_tokenized(images: Tensor, tokens: Tensor) -> Any:
    return images, {"input_ids": tokens, "attention_mask": (tokens > 0).long()}


def as_unmasked(images: Tensor, tokens: Tensor) -> Any:
    """SigLIP reads its padding, so its processor gives no mask."""
    return {"input_ids": tokens, "pixel_values": images}


def as_named(images: Tensor, tokens: Tensor) -> Any:
    return {"image": images, "text": tokens}


CASES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[..., Any]]] = {
    "CLIPModel, processor": (transformers_clip, as_processed),
    "CLIPModel, tuple": (transformers_clip, as_tuple),
    "CLIPModel, tokenizer": (transformers_clip, as_tokenized),
    "SiglipModel, processor": (transformers_siglip, as_unmasked),
    "open_clip, tuple": (open_clip_vit, as_tuple),
    "open_clip, dict": (lambda: open_clip_vit(output_dict=True), as_named),
    "open_clip, towers": (open_clip_text_tower, as_tuple),
}
END_TO_END = ("CLIPModel, processor", "open_clip, tuple")
PAIRS = draw_images(5, seed=1), draw_tokens(5, seed=2)
POOL = draw_images(12, seed=3), draw_tokens(12, seed=4)
DRAWN = 8


def embed(model: torch.nn.Module, make: Any, images: Tensor, tokens: Tensor) -> Any:
    """Embed pairs one by one, by the model's own methods."""
    rows = []
    for image, text in zip(images.split(1), tokens.split(1), strict=True):
        if hasattr(model, "encode_image"):
            phi, psi = model.encode_image(image), model.encode_text(text)
        else:
            mask = None if make in {as_tuple, as_unmasked} else (text > 0).long()
            phi = model.get_image_features(image).pooler_output
            psi = model.get_text_features(text, attention_mask=mask).pooler_output
        rows.append([x[0] / x[0].square().sum().sqrt() for x in (phi, psi)])
    return [torch.stack(side) for side in zip(*rows, strict=True)]


def oracle(model: torch.nn.Module, make: Any) -> tuple[Tensor, Tensor]:
    """Outputs with their graph, and weights: two loops over the simulated batch."""
    rows = torch.randperm(len(POOL[0]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bank = embed(model, make, *(side[rows[:DRAWN]] for side in POOL))
    images, texts = embed(model, make, *PAIRS)
    scale = model.logit_scale.detach().exp()
    outputs, weights = [], []
    for phi, psi in zip(images, texts, strict=True):
        by_text = torch.stack([(-phi @ (psi - other)).exp() for other in bank[1]])
        by_image = torch.stack([(-psi @ (phi - other)).exp() for other in bank[0]])
        outputs.append(-by_text.sum().log() - by_image.sum().log())
        picked = [
            (scale * torch.cat([own[None], others]) @ given).softmax(0)[0]
            for own, others, given in ((psi, bank[1], phi), (phi, bank[0], psi))
        ]
        weights.append(1 - sum(picked) / 2)
    return torch.stack(outputs), torch.stack(weights).detach()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    build, make = CASES[request.param]
    return build(), make


def ready(model: torch.nn.Module, make: Any) -> CLIPModelOutput:
    task = CLIPModelOutput(simulated_batch_size=DRAWN)
    halves = zip(*(side.split(5) for side in POOL), strict=True)
    task.get_embeddings(model, [make(*half) for half in halves])
    return task


class TestAgainstLoops:
    def test_outputs_and_weights(self, case: Any) -> None:
        model, make = case
        task, (outputs, weights) = ready(model, make), oracle(model, make)
        batch = make(*PAIRS)
        values = task.get_outputs(model, None, None, batch)
        torch.testing.assert_close(values, outputs)
        found = task.get_out_to_loss_grad(model, None, None, batch)
        torch.testing.assert_close(found, weights[:, None])

    def test_gradients_of_the_default_engine(self, case: Any) -> None:
        model, make = case
        task, (outputs, _) = ready(model, make), oracle(model, make)
        computer = HookGradientComputer(
            model=model, task=task, dtype=torch.float64, device="cpu"
        )
        computer.load_model_params(model)
        found = computer.compute_per_sample_grad(make(*PAIRS))
        named = dict(model.named_parameters())
        for i, output in enumerate(outputs):
            expected = torch.autograd.grad(
                output,
                list(named.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for name, value in zip(named, expected, strict=True):
                torch.testing.assert_close(found[name][i], value, msg=name)

    def test_other_weights_bring_their_factor(self, case: Any) -> None:
        model, make = case
        task, batch = ready(model, make), make(*PAIRS)
        weights = {name: value.detach() for name, value in model.named_parameters()}
        buffers = dict(model.named_buffers())
        same = task.get_out_to_loss_grad(model, weights, buffers, batch)
        weights["logit_scale"] = weights["logit_scale"] + 1
        other = task.get_out_to_loss_grad(model, weights, buffers, batch)
        with torch.no_grad():
            model.logit_scale += 1
        torch.testing.assert_close(
            other, task.get_out_to_loss_grad(model, None, None, batch)
        )
        assert not torch.allclose(other, same)


@pytest.mark.slow
@pytest.mark.parametrize("name", END_TO_END)
def test_end_to_end(name: str, tmp_path: Path) -> None:
    build, make = CASES[name]
    model = build()
    checkpoints = []
    for shift in (0.0, 0.05):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += shift * torch.sin(torch.arange(parameter.numel())).view(
                    parameter.shape
                )
        state = model.state_dict()
        checkpoints.append({name: value.clone() for name, value in state.items()})
    task = CLIPModelOutput(simulated_batch_size=DRAWN, pairs=[make(*POOL)])
    traker = TRAKer(
        model,
        task,
        5,
        tmp_path,
        projector=NoOpProjector(),
        use_half_precision=False,
        lambda_reg=1e-3,
        logging_level=100,
    )
    kernels, expected = [], torch.zeros(5, 5, dtype=torch.float64)
    for checkpoint in checkpoints:
        traker.load_checkpoint(checkpoint)
        traker.featurize(make(*PAIRS))
        outputs, weights = oracle(model, make)
        rows = []
        for output in outputs:
            gradient = torch.autograd.grad(
                output,
                list(model.parameters()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            rows.append(torch.cat([x.flatten() for x in gradient]))
        x = torch.stack(rows) / traker.normalize_factor
        inverse = torch.linalg.inv(x @ x.T + 1e-3 * torch.eye(5, dtype=x.dtype))
        kernels.append(inverse @ x @ x.T)
        expected += weights[:, None] / 2
    traker.finalize_features()
    for checkpoint in checkpoints:
        traker.start_scoring_checkpoint(checkpoint, num_targets=5)
        traker.score(make(*PAIRS))
    scores = torch.as_tensor(traker.finalize_scores()).double()
    expected = expected * (kernels[0] + kernels[1]) / 2
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)


class TestCalls:
    def test_a_wrapper_that_passes_everything_on(self) -> None:
        inner = transformers_clip()

        class Wrapper(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.base_model = inner

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return self.base_model(*args, **kwargs)

        batch = as_processed(*PAIRS)
        task = ready(inner, as_processed)
        torch.testing.assert_close(
            task.get_out_to_loss_grad(Wrapper(), None, None, batch),
            task.get_out_to_loss_grad(inner, None, None, batch),
        )

    def test_a_model_of_something_else(self) -> None:
        task = CLIPModelOutput()
        with pytest.raises(TaskError, match=r"Linear.forward takes \['input'\]; the"):
            task.get_embeddings(torch.nn.Linear(2, 2), [(torch.ones(1), torch.ones(1))])
