"""The façade's arguments, each parsed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.problems import mlp
from trak._options import (
    NonFinitePolicy,
    integer,
    parse_damping,
    parse_device,
    parse_model_ids,
    parse_options,
    parse_rows,
    parse_save_dir,
    positive,
)
from trak._scoring_call import parse_scoring_call
from trak.errors import BatchError, OptionError


class TestDamping:
    @pytest.mark.parametrize(
        ("value", "ridge"),
        [("auto", 2.0), ("pinv", 0.0), (0, 0.0), (0.5, 0.5), (np.float32(0.5), 0.5)],
    )
    def test_ridge(self, value: Any, ridge: float) -> None:
        assert parse_damping(value).ridge(mean_eigenvalue=2.0) == ridge

    def test_undamped_by_name(self) -> None:
        assert parse_damping("pinv").is_pseudo_inverse
        assert not parse_damping(0).is_pseudo_inverse

    @pytest.mark.parametrize("value", [-1, "x", None, float("nan"), float("inf"), [1]])
    def test_nothing_else(self, value: Any) -> None:
        with pytest.raises(
            OptionError, match=r"pass a number >= 0, 'auto' .* or 'pinv'"
        ):
            parse_damping(value)


class TestNumbers:
    @pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
    def test_whole_numbers(self, value: Any) -> None:
        assert type(integer("k", value)) is int
        assert positive("k", value) == 3

    @pytest.mark.parametrize("value", [3.0, "3", None, True, [3]])
    def test_others(self, value: Any) -> None:
        with pytest.raises(OptionError, match="k must be a whole number; got"):
            integer("k", value)

    @pytest.mark.parametrize("value", [0, -4])
    def test_too_small(self, value: int) -> None:
        with pytest.raises(OptionError, match=f"k must be at least 1; got {value}"):
            positive("k", value)


class TestDevice:
    @pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
    def test_where_the_model_is(self, device: Any) -> None:
        assert parse_device(mlp(), device) == torch.device("cpu")

    @pytest.mark.parametrize("device", ["cpu:1", "meta", "cuda"])
    def test_elsewhere(self, device: str) -> None:
        with pytest.raises(
            OptionError, match="but the model is on cpu; move the model"
        ):
            parse_device(mlp(), device)


def test_save_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_save_dir("a/../b") == tmp_path.resolve() / "b"
    with pytest.raises(OptionError, match="cannot be a directory"):
        parse_save_dir(3)


def test_all_together(tmp_path: Path) -> None:
    options = parse_options(
        mlp(),
        train_set_size=np.int64(5),
        save_dir=str(tmp_path),
        load_from_save_dir=True,
        device=None,
        proj_dim=4,
        use_half_precision=False,
        proj_max_batch_size=8,
        projector_seed=-1,
        grad_wrt=["2.*"],
        lambda_reg=0.5,
        on_non_finite="skip",
    )
    assert (options.train_set_size, options.proj_dim) == (5, 4)
    assert options.non_finite is NonFinitePolicy.SKIP
    assert options.selection.grad_dim == 18
    with pytest.raises(AttributeError):
        options.proj_dim = 3  # type: ignore[misc]


def rows(
    inds: Any, num_samples: Any = None, size: int = 3, cursor: int = 2
) -> list[int]:
    found = parse_rows(inds, num_samples, size, cursor, 9, "target")
    assert found.dtype == np.int64
    return found.tolist()


class TestRows:
    @pytest.mark.parametrize("num_samples", [None, 3, np.int32(3)])
    def test_the_next_ones(self, num_samples: Any) -> None:
        assert rows(None, num_samples) == [2, 3, 4]
        assert rows(None, cursor=6) == [6, 7, 8]

    @pytest.mark.parametrize(
        "inds",
        [
            [7, 0, 3],
            (7, 0, 3),
            np.array([7, 0, 3], dtype=np.uint8),
            np.array([[7], [0], [3]]),
            torch.tensor([7, 0, 3]),
            [torch.tensor(7), np.int64(0), 3],
            iter([7, 0, 3]),
            {7: None, 0: None, 3: None},
        ],
    )
    def test_any_iterable_of_numbers(self, inds: Any) -> None:
        assert rows(inds) == [7, 0, 3]

    def test_one_number(self) -> None:
        assert rows(5, size=1) == rows(range(5, 6), size=1) == [5]

    @pytest.mark.parametrize(
        ("inds", "message"),
        [
            ([1, 2], "inds has 2 entries, but the batch has 3"),
            ([], "inds has 0 entries"),
            ([1, 2, 9], "inds has 9, but the targets are 0 to 8"),
            ([1, -1, 9], "inds has -1, but"),
            ([1, 2, 1], "inds has 1 more than once"),
            ([1.0, 2.0, 3.0], "whole numbers; got float64"),
            ([True, False, True], "whole numbers; got bool"),
            (["a", "b", "c"], "whole numbers; got <U1"),
            ([None, 1, 2], "whole numbers; got object"),
            ([[1], [2, 3]], "whole numbers"),
        ],
    )
    def test_wrong_ones(self, inds: Any, message: str) -> None:
        with pytest.raises(BatchError, match=message):
            rows(inds)

    def test_counts(self) -> None:
        with pytest.raises(BatchError, match="Exactly one of num_samples and inds"):
            rows([1, 2, 3], 3)
        with pytest.raises(BatchError, match="num_samples=2, but the batch has 3"):
            rows(None, 2)
        with pytest.raises(BatchError, match="would be targets 7 to 9, but there are"):
            rows(None, cursor=7)
        with pytest.raises(BatchError, match="The batch is empty"):
            rows(None, size=0)


class TestModelIds:
    @pytest.mark.parametrize(
        ("given", "ids"),
        [
            (None, [1, 4]),
            ([4, 1, 4], [4, 1]),
            (4, [4]),
            (np.int64(4), [4]),
            ([], []),
            ((i for i in (1,)), [1]),
        ],
    )
    @pytest.mark.usefixtures("untyped")
    def test_lists(self, given: Any, ids: list[int]) -> None:
        assert parse_model_ids(given, [4, 1]) == ids


class TestScoringCall:
    CKPT: dict[str, Any] = {"w": torch.zeros(1)}  # noqa: RUF012  a constant

    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            (("e", CKPT, 3, 4), {}),
            (("e", CKPT), {"model_id": 3, "num_targets": 4}),
            ((CKPT, 3, 4, "e"), {}),
            ((CKPT,), {"exp_name": "e", "model_id": 3, "num_targets": 4}),
            (
                (),
                {"exp_name": "e", "checkpoint": CKPT, "model_id": 3, "num_targets": 4},
            ),
        ],
    )
    def test_every_way_of_calling(self, args: Any, kwargs: Any) -> None:
        call = parse_scoring_call(args, kwargs)
        assert (call.exp_name, call.model_id, call.num_targets) == ("e", 3, 4)
        assert call.checkpoint is self.CKPT

    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            (("e", "a.pt", 3, 4), {}),
            (("e", Path("a.pt"), 3, 4), {}),
            (("a.pt", 3, 4, "e"), {}),
            (("a.pt",), {"exp_name": "e", "model_id": 3, "num_targets": 4}),
            ((Path("a.pt"), 3), {"exp_name": "e", "num_targets": 4}),
            (("e",), {"checkpoint": "a.pt", "model_id": 3, "num_targets": 4}),
        ],
    )
    def test_paths(self, args: Any, kwargs: Any) -> None:
        call = parse_scoring_call(args, kwargs)
        assert (call.exp_name, call.model_id, call.num_targets) == ("e", 3, 4)
        assert str(call.checkpoint) == "a.pt"

    def test_defaults(self) -> None:
        call = parse_scoring_call((self.CKPT,), {"num_targets": 4})
        assert (call.exp_name, call.model_id) == (None, None)
