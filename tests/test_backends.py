"""The choice of a back end, and what is said where one cannot be used."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.projector_contract import gradients
from trak._kernels import choice, native
from trak._kernels.choice import Backend
from trak.errors import BackendError, BackendWarning, UnknownNameError
from trak.projectors import (
    AdditiveProjector,
    BasicProjector,
    BasicSingleBlockProjector,
    SparseProjector,
)

CPU = torch.device("cpu")


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has not chosen yet, and forgets what it chose."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    caches = (choice._problem, choice._kernels, choice._warn, native._load)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def sign_projectors(backend: str = "auto") -> list[AdditiveProjector]:
    return [
        SparseProjector(57, 16, backend=backend),
        BasicProjector(57, 16, 0, "rademacher", "cpu", backend=backend),
        BasicSingleBlockProjector(57, 16, 0, "rademacher", "cpu", backend=backend),
    ]


def stand_in(**functions: Any) -> Any:
    """A back end like torch operations, but for some functions."""
    members: dict[str, Any] = {
        "unavailable": lambda device: None,
        "sparse_into": lambda *arguments: None,
        "dense_into": lambda *arguments: None,
        "sparse_segments_into": choice.sparse_segments_into,
        "dense_segments_into": lambda *arguments: choice.dense_segments_into(
            *arguments, "rademacher"
        ),
    }
    return types.SimpleNamespace(**{**members, **functions})


def right() -> Any:
    """A back end that is right."""

    def sparse(
        out: Tensor, x: Tensor, key: Any, offset: int, sizes: Any, plans: Any = None
    ) -> None:
        rows = torch.arange(len(x))
        starts = torch.full((len(x),), offset)
        choice.sparse_segments_into(out, x, rows, starts, key, sizes)

    def dense(out: Tensor, x: Tensor, key: Any, offset: int) -> None:
        rows = torch.arange(len(x))
        starts = torch.full((len(x),), offset)
        choice.dense_segments_into(out, x, rows, starts, key, "rademacher")

    return stand_in(sparse_into=sparse, dense_into=dense)


def test_names() -> None:
    assert choice.parse_backend(Backend.native) is Backend.native
    known = "one of 'auto', 'torch', 'native', 'triton', got 'gpu'"
    with pytest.raises(UnknownNameError, match=known):
        SparseProjector(5, 5, backend="gpu")
    with pytest.raises(UnknownNameError, match=known):
        BasicProjector(5, 5, 0, "normal", "cpu", backend="gpu")


def test_torch_operations_can_be_asked_for(forgotten: None) -> None:
    x = gradients(3, 57)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for projector in sign_projectors("torch"):
            assert projector.backend is Backend.torch
            assert projector.running_backend() is Backend.torch
            projector.project(x, model_id=0)


def test_the_variable_names_a_back_end(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAK_BACKEND", "torch")
    for projector in sign_projectors():
        assert projector.running_backend() is Backend.torch
    monkeypatch.setenv("TRAK_BACKEND", "gpu")
    with pytest.raises(UnknownNameError, match="TRAK_BACKEND must be one of"):
        sign_projectors()[0].project(gradients(1, 57), model_id=0)
    monkeypatch.setenv("TRAK_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"cannot run on cpu.*TRAK_BACKEND names"):
        sign_projectors()[0].running_backend()


def test_what_is_asked_for_and_cannot_run_is_an_error(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_LIBRARY", "absent.so")
    expected = "the native kernels cannot run on cpu: they were not compiled"
    with pytest.raises(BackendError, match=expected):
        SparseProjector(5, 5, backend="native")
    with pytest.raises(BackendError, match=expected):
        BasicProjector(5, 5, 0, "rademacher", "cpu", backend="native")
    with pytest.raises(BackendError, match=r"cannot run on cuda: .* not on cuda"):
        SparseProjector(5, 5, device="cuda", backend="native")
    with pytest.raises(BackendError, match="cannot sum normal entries"):
        BasicProjector(5, 5, 0, "normal", "cpu", backend="native")


def test_an_absence_is_said_once(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_LIBRARY", "absent.so")
    x = gradients(3, 57)
    with pytest.warns(BackendWarning, match=r"not compiled when .*TRAK_BACKEND=torch"):
        first = SparseProjector(57, 16).project(x, model_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for projector in sign_projectors():
            projector.project(x, model_id=0)
            assert projector.running_backend() is Backend.torch
    assert torch.equal(first, SparseProjector(57, 16).project(x, model_id=0))
    # Entries that have no kernels are not an absence.
    assert BasicProjector(5, 5, 0, "normal", "cpu").running_backend() is Backend.torch


def test_other_devices_use_torch_operations(forgotten: None) -> None:
    projector = SparseProjector(5, 5, device="meta")
    assert projector.running_backend() is Backend.torch
    assert projector.running_backend("mps") is Backend.torch


def test_a_back_end_that_is_right_is_used(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = right()
    assert choice.prove(kernels, CPU) is None
    monkeypatch.setattr(choice, "_kernels", lambda backend: kernels)
    for projector in sign_projectors():
        assert projector.running_backend() is Backend.native
        found = projector.project(gradients(3, 57), model_id=0)
        assert bool((found != 0).any())


@pytest.mark.parametrize("name", ["sparse", "dense"])
@pytest.mark.parametrize("form", ["into", "segments_into"])
def test_a_back_end_that_is_wrong_is_not_used(
    name: str, form: str, forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = right()
    add = getattr(kernels, f"{name}_{form}")

    def wrong(out: Tensor, *arguments: Any) -> None:
        add(out, *arguments)
        out[2, 1] += 1e-2

    setattr(kernels, f"{name}_{form}", wrong)
    monkeypatch.setattr(choice, "_kernels", lambda backend: kernels)
    with pytest.warns(BackendWarning, match=f"their {name} .*is .* from the one by"):
        choice.choose(Backend.auto, CPU)


def test_a_back_end_that_repeats_itself_wrongly_is_not_used() -> None:
    kernels = right()
    add, seen = kernels.sparse_into, []

    def forgets(out: Tensor, x: Tensor, *arguments: Any) -> None:
        if arguments[-1] not in seen:
            add(out, x, *arguments)
        if len(arguments) == 4:
            seen.append(arguments[-1])

    kernels.sparse_into = forgets
    reason = choice.prove(kernels, CPU)
    assert reason is not None
    assert reason.startswith("their second sparse sketch of a small random input is")


@pytest.mark.parametrize("error", [RuntimeError("no"), MemoryError("no")])
def test_a_back_end_that_fails_is_not_used(error: Exception) -> None:
    def fails(*arguments: Any) -> None:
        raise error

    reason = choice.prove(stand_in(sparse_into=fails), CPU)
    assert reason == f"they fail on a small input ({type(error).__name__}: no)"


def test_a_back_end_that_cannot_be_imported(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_MODULES", {Backend.triton: "trak._kernels.absent"})
    reason = choice.problem(Backend.triton, torch.device("cuda"))
    assert reason is not None
    assert "they cannot be imported (No module named" in reason


def test_a_library_that_is_not_ours(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "_LIBRARY", str(broken))
    reason = native.unavailable(CPU)
    assert reason is not None
    assert "cannot be loaded" in reason
    with pytest.raises(BackendError, match=r"the native kernels cannot run: .*broken"):
        native.variant()


def test_a_library_from_other_sources(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.unavailable(CPU) is not None:
        pytest.skip("the library is not compiled here")
    native._load.cache_clear()
    monkeypatch.setattr(native, "digest", lambda: 1)
    reason = native.unavailable(CPU)
    assert reason is not None
    assert "was compiled from other sources; install trak again" in reason
