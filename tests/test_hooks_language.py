"""The default engine on language models of many kinds, against a loop over texts."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures_models import (
    ARCHITECTURES,
    Architecture,
    engine_gradients,
    loop_gradients,
)
from tests.problems import draw
from tests.test_hooks_models import assert_exact, compute, randomize
from trak.gradient_computers._ladder import Rung
from trak.gradient_computers._self_check import trimmed

# -- a bias that a head and its last layer hold ------------------------------------------


class Head(nn.Module):
    """As in BERT: the bias belongs to the head, and its last layer uses it."""

    def __init__(self, adds: float) -> None:
        super().__init__()
        self.adds = adds
        self.bias = nn.Parameter(draw(5))
        self.decoder = nn.Linear(4, 5)
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        found = self.decoder(x)
        return found + self.adds * self.bias if self.adds else found


@pytest.mark.parametrize("adds", [0.0, 2.0])
def test_a_parameter_under_two_names(adds: float) -> None:
    """The rule of the layer serves it, unless the head uses it as well."""
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Head(adds)))
    batch = draw(6, 3), torch.arange(6) % 5
    with warnings.catch_warnings():
        warnings.simplefilter("error" if not adds else "ignore")
        found, known, computer = compute(model, batch)
    assert_exact(found, known)
    served = computer.coverage.rungs["2.bias"]
    assert (served is Rung.LAYER) == (not adds)


# -- models of transformers and open_clip ------------------------------------------------

CASES = [
    pytest.param(it, id=it.title, marks=[pytest.mark.slow] if it.alike else [])
    for it in ARCHITECTURES
]


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning"
)  # older transformers
@pytest.mark.parametrize("it", CASES)
def test_models(it: Architecture) -> None:
    """Each in one pass, without a warning, and right."""
    if reason := it.absence():
        pytest.skip(reason)
    known, widest = loop_gradients(it)
    scale = float(known.abs().max())
    types = {widest, it.dtype if widest == torch.float64 else widest}
    for dtype in types:
        with warnings.catch_warnings():
            warnings.simplefilter("error" if it.is_batched() else "ignore")
            found, computer = engine_gradients(it, dtype)
        close = 1e-9 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found, known, rtol=100 * close, atol=close * scale)
        slow = {Rung.VMAP, Rung.LOOP} & set(computer.coverage.rungs.values())
        assert bool(slow) == (not it.is_batched())


OPERATORS = "[torch.library.define(f'torchvision::{it}', '() -> ()') for it in names]"
PRESENT = "assert all(hasattr(torch.ops.torchvision, it) for it in names)"


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
@pytest.mark.parametrize(
    "content",
    [OPERATORS, "if not hasattr(torch.ops.torchvision, 'nms'): raise RuntimeError"],
    ids=["its own", "for another torch"],
)
def test_a_torchvision_of_either_kind_is_imported(tmp_path: Path, content: str) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    head = "import torch; names = ('nms', 'qnms')"
    (package / "__init__.py").write_text(f"{head}\n{content}\n{PRESENT}\n")
    code = "from benchmarks import architectures_models; "
    code += "architectures_models.define_operators(); import torchvision"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_padding_of_a_source_is_not_cut_off_the_target() -> None:
    """Where both are equally long: the check of padding would compare other outputs."""
    ids = torch.tensor([[5, 6, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": ids + 1,
        "decoder_input_ids": ids + 2,
    }
    cut = trimmed(batch, is_seq2seq=True)
    assert {key: value.shape[1] for key, value in cut.items()} == {
        "input_ids": 2,
        "attention_mask": 2,
        "labels": 3,
        "decoder_input_ids": 3,
    }
    assert trimmed(batch)["labels"].shape == (1, 2)
