"""From arrays of the store to rows of floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.problems import draw
from trak import _reading
from trak._linalg import encode_half, spans
from trak._reading import StoredRows, ZeroRows, read_array, read_rows
from trak._streaming import Rows

CPU = torch.device("cpu")
KINDS: dict[str, Any] = {
    "float16": lambda x: x.half().numpy(),
    "float32": lambda x: x.float().numpy(),
    "float64": lambda x: x.numpy(),
    "tensor": lambda x: x.float(),
    "bfloat16 tensor": lambda x: x.bfloat16(),
    "columns first": lambda x: np.asfortranarray(x.float().numpy()),
    "every other column": lambda x: x.float().repeat_interleave(2, 1).numpy()[:, ::2],
    "backwards": lambda x: x.flip(0).float().numpy()[::-1],
}


@pytest.mark.parametrize("b", [0, 1, 3, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_array(kind: str, b: int) -> None:
    x = draw(9, 5)
    array = KINDS[kind](x)
    read = read_array(array, CPU)
    assert isinstance(read, Rows)
    found = read(0, b)
    expected = array if "tensor" in kind else torch.from_numpy(array.copy())
    torch.testing.assert_close(found, expected[:b].float(), rtol=0, atol=0)
    found += 1  # is no part of the array
    torch.testing.assert_close(read(0, b) + 1, found)


def test_read_only_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", draw(9, 5).numpy())
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    torch.testing.assert_close(read_array(array, CPU)(2, 9), draw(9, 5)[2:].float())


@pytest.mark.parametrize("cached", [1, 7, 1 << 20])
@pytest.mark.parametrize("prefix", ["", "exp_"])
def test_half_precision_rows_with_exponents(
    monkeypatch: pytest.MonkeyPatch, prefix: str, cached: int
) -> None:
    monkeypatch.setattr(_reading, "CACHED", cached)
    x = (draw(9, 5) * 10.0 ** torch.arange(-30, 33, 7)[:, None]).float()
    half, exponent = encode_half(x)
    store = {
        f"{prefix}grads": half.numpy(),
        f"{prefix}grads_exponent": exponent[:, None].numpy(),
    }
    read = read_rows(store, prefix, CPU)
    pieces = [read(low, high) for low, high in spans(9, 4)]
    torch.testing.assert_close(torch.cat(pieces), x, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("step", [1, 4, 9])
def test_zero_rows_are_noted(step: int) -> None:
    x = draw(9, 5).float()
    x[:, 0] = 0
    x[[2, 5]] = 0
    zeros = ZeroRows(9)
    read = StoredRows(x.numpy(), None, CPU, zeros)
    for low, high in spans(9, step):
        assert not zeros.is_complete
        read(low, high)
        read(low, high)
    assert zeros.is_complete
    assert zeros.count == 2
