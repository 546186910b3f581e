"""Wrong checkpoints, stores, options and tasks: named errors that leave the store whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bench import Bench, Case, check_case, layers
from tests.problems import classification, make, mlp, randomized
from trak.errors import (
    BackendError,
    BatchError,
    CheckpointError,
    CheckpointFileError,
    ExperimentError,
    GradientError,
    ModelIDException,
    ModelModeError,
    NonFiniteError,
    OptionError,
    SingularKernelError,
    StoreMismatchError,
    StoreWriteError,
    TaskError,
    TrakError,
    UnknownTaskError,
)
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput
from trak.projectors import AbstractProjector, BasicProjector, CudaProjector

NAN, INF = float("nan"), float("inf")


def full_disk(bench: Bench) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.posix_fallocate", refuse)
        bench.traker.load_checkpoint(randomized(bench.problem.model, 5), model_id=1)


def set_projector(bench: Bench) -> None:
    bench.traker.projector = BasicProjector(48, 7, 1, "rademacher", "cpu")


def mismatch(name: str, regex: str, **options: Any) -> Case:
    return Case(
        f"other {name}",
        "featurized",
        StoreMismatchError,
        lambda bench: bench.open(**options),
        regex,
    )


class Task(AbstractModelOutput):
    """A task whose answers are given: output of logits, and out-to-loss of a batch."""

    def __init__(
        self,
        output: Callable[[Tensor], Any] = lambda logits: logits[0],
        out_to_loss: Callable[[Tensor], Any] = lambda logits: logits[:, :1] * 0 + 1,
    ) -> None:
        self.output = output
        self.out_to_loss = out_to_loss

    def get_output(
        self, model: Any, weights: Any, buffers: Any, image: Tensor, label: Tensor
    ) -> Any:
        tensors = (dict(weights), dict(buffers))
        return self.output(torch.func.functional_call(model, tensors, image[None])[0])

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Any:
        return self.out_to_loss(model(batch[0]))


class NeedsArguments(ImageClassificationModelOutput):
    def __init__(self, weight: float) -> None:
        super().__init__()


class Transposed(FunctionalGradientComputer):
    def compute_per_sample_grad(self, batch: Any) -> Any:
        grads = super().compute_per_sample_grad(batch)
        return torch.cat([g.flatten(1) for g in grads.values()], 1).T


class Halved(AbstractProjector):
    def project(self, grads: Any, model_id: int) -> Tensor:
        return torch.zeros(len(next(iter(grads.values()))) // 2, self.proj_dim)


class Narrow(AbstractProjector):
    def __init__(self, width: int) -> None:
        self.width = width


# fmt: off
CHECKPOINTS = [
    Case("missing key", "loaded", CheckpointError,
         lambda b: b.traker.load_checkpoint(b.changed(**{"0_bias": None})),
         r"missing \['0.bias'\] \(1 in all\)"),
    Case("unexpected key", "loaded", CheckpointError,
         lambda b: b.traker.load_checkpoint({**b.ckpt, "extra": torch.zeros(1)}),
         r"unexpected \['extra'\]"),
    Case("key that is no word", "loaded", CheckpointError,
         lambda b: b.traker.load_checkpoint({1: torch.zeros(1)}), r"unexpected \[1\]"),
    Case("empty checkpoint", "loaded", CheckpointError,
         lambda b: b.traker.load_checkpoint({}), r"\(9 in all\)"),
    Case("wrong shape", "loaded", CheckpointError,
         lambda b: b.traker.load_checkpoint(b.changed(**{"0_bias": torch.zeros(6)})),
         r"'0.bias' has shape \(6,\), the model's \(5,\)"),
    Case("no tensor", "loaded", CheckpointError,
         lambda b: b.traker.load_checkpoint(b.changed(**{"0_bias": "x"})), r"'0.bias'"),
    Case("a path to nothing", "loaded", CheckpointFileError,
         lambda b: b.traker.load_checkpoint("no/model.pt"),
         r"there is no checkpoint 'no/model.pt'; pass the path"),
    Case("a module", "loaded", CheckpointError,
         lambda b: b.traker.load_checkpoint(b.problem.model), "got Sequential"),
    Case("None", "loaded", CheckpointError,
         lambda b: b.traker.load_checkpoint(None), "got NoneType"),
    Case("half distributed", "loaded", CheckpointError,
         lambda b: b.traker.load_checkpoint(
             {"module." * (i > 0) + k: v for i, (k, v) in enumerate(b.ckpt.items())}),
         r"missing \['0.bias'"),
    Case("nested", "loaded", CheckpointError,
         lambda b: b.traker.load_checkpoint({"state_dict": b.ckpt, "epoch": 3}),
         "one of the checkpoint's entries"),
    Case("NaN weight", "loaded", NonFiniteError,
         lambda b: b.traker.load_checkpoint(b.changed(**{"3_bias": torch.full((3,), NAN)})),
         r"'3.bias' has a NaN"),
    Case("infinite buffer", "loaded", NonFiniteError,
         lambda b: b.traker.load_checkpoint(
             b.changed(**{"1_running_mean": torch.full((5,), INF)})),
         r"'1.running_mean'"),
    Case("taken id", "loaded", ModelIDException,
         lambda b: b.traker.load_checkpoint(randomized(b.problem.model, 5), model_id=0),
         r"0 belongs to other weights .*another model_id"),
    Case("id that is no number", "loaded", OptionError,
         lambda b: b.traker.load_checkpoint(b.ckpt, model_id="a"),
         "model_id must be a whole number; got 'a'"),
    Case("id that is a bool", "loaded", OptionError,
         lambda b: b.traker.load_checkpoint(b.ckpt, model_id=True), "got True"),
    Case("unknown weights", "finalized", ModelIDException,
         lambda b: b.start(checkpoint=randomized(b.problem.model, 5), model_id=None),
         "no checkpoint in the store has these weights"),
    Case("other weights", "finalized", ModelIDException,
         lambda b: b.start(checkpoint=randomized(b.problem.model, 5)),
         "0 belongs to other weights"),
    Case("NaN while scoring", "finalized", NonFiniteError,
         lambda b: b.start(checkpoint=b.changed(**{"3_bias": torch.full((3,), NAN)})),
         r"'3.bias'"),
    Case("unknown id", "finalized", ModelIDException,
         lambda b: b.start(model_id=4), r"4 is not in the store, which has \[0\]"),
    Case("no targets", "finalized", OptionError,
         lambda b: b.start(num_targets=0), "num_targets must be at least 1; got 0"),
    Case("half a target", "finalized", OptionError,
         lambda b: b.start(num_targets=2.5), "num_targets must be a whole number"),
    Case("targets not told", "finalized", OptionError,
         lambda b: b.start(num_targets=None), "needs num_targets; got None"),
    Case("checkpoint not told", "finalized", OptionError,
         lambda b: b.traker.start_scoring_checkpoint("exp"), "needs checkpoint"),
    Case("unknown keyword", "finalized", OptionError,
         lambda b: b.start(targets=3), "targets is unknown; it takes exp_name, checkpoint"),
    Case("given twice", "finalized", OptionError,
         lambda b: b.traker.start_scoring_checkpoint(b.ckpt, checkpoint=b.ckpt, num_targets=4),
         "checkpoint is given twice"),
    Case("too many arguments", "finalized", OptionError,
         lambda b: b.traker.start_scoring_checkpoint("exp", b.ckpt, 0, 4, 5),
         "takes 4 arguments; got 5"),
    Case("other num_targets", "scoring", ExperimentError,
         lambda b: b.start(num_targets=5), "'exp' has 4 targets, not 5; use another exp_name"),
    *[
        Case(f"exp_name {name!r:.9}", "finalized", ExperimentError,
             lambda b, name=name: b.start(name), "cannot name files; use up to 150 bytes")
        for name in ("a/b", "..", ".hidden", "", "a\\b", "a\0b", "a\nb", "\ud800",
                     "x" * 300, 7, b"exp")
    ],
]

STORES = [
    mismatch("proj_dim", "made with JL dimension = 7, .* has JL dimension = 8", proj_dim=8),
    mismatch("seed", "seed=0.*seed=1", projector_seed=1),
    mismatch("task", "task = 'Image.*task = 'Iterative",
             task="iterative_image_classification"),
    mismatch("train_set_size", "size = 11.*train set size = 12", train_set_size=12),
    mismatch("type", "dtype = 'float32'.*'float16'", use_half_precision=True),
    mismatch("grad_wrt", "parameters", grad_wrt=["0.*"]),
    mismatch("projector", "type = 'sparse'.*'rademacher'", projector=BasicProjector),
    Case("other projector set", "featurized", StoreMismatchError, set_projector,
         "rows are projected by .*do not mix"),
    Case("full disk", "featurized", StoreWriteError, full_disk,
         "No space left.*free some space.*stored before is still there"),
    Case("a file for a directory", "featurized", StoreWriteError,
         lambda b: b.fresh(save_dir=b.store / "metadata.json"), "cannot write .*metadata.json"),
    Case("nowhere to write", "made", StoreWriteError,
         lambda b: b.fresh(save_dir=Path("/proc/trak")), "cannot write /proc/trak"),
]

OPTIONS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *[(f"proj_dim {value!r}", {"proj_dim": value}, OptionError, regex) for value, regex in (
        (0, "proj_dim must be at least 1; got 0"), (-1, "at least 1; got -1"),
        (1.5, "whole number; got 1.5"), ("x", "whole number; got 'x'"),
        (True, "whole number; got True"), (None, "leaves open how many"))],
    ("train_set_size tensor", {"train_set_size": torch.tensor(1.5)}, OptionError,
     "whole number; got tensor"),
    ("train_set_size 0", {"train_set_size": 0}, OptionError, "train_set_size must be at least 1"),
    ("train_set_size float", {"train_set_size": 11.0}, OptionError, "whole number; got 11.0"),
    ("projector_seed", {"projector_seed": 0.5}, OptionError, "projector_seed must be a whole"),
    ("proj_max_batch_size", {"proj_max_batch_size": 0}, OptionError, "proj_max_batch_size must"),
    *[(f"lambda_reg {value!r}", {"lambda_reg": value}, OptionError, "is not a damping; pass a")
      for value in (-0.1, NAN, INF, "x", None, [1.0], torch.ones(2).numpy())],
    ("on_non_finite", {"on_non_finite": "ignore"}, OptionError, "pass one of ..raise., .skip.."),
    ("device absent", {"device": "meta"}, OptionError, "'meta', but the model is on cpu; move"),
    ("device unknown", {"device": "banana"}, OptionError, "'banana' is not a device"),
    ("device wrong type", {"device": 1.5}, OptionError, "1.5 is not a device"),
    ("save_dir NUL", {"save_dir": "a\0b"}, OptionError, "cannot be a directory"),
    ("save_dir None", {"save_dir": None}, OptionError, "save_dir=None cannot be"),
    ("task unknown", {"task": "images"}, UnknownTaskError, "Unknown task 'images'; pass one of"),
    ("task with arguments", {"task": NeedsArguments}, OptionError, "NeedsArguments cannot be"),
    ("task number", {"task": 3}, OptionError, "A task is a name"),
    ("grad_wrt unknown", {"grad_wrt": ["0.wieght"]}, OptionError, "closest are ..0.weight"),
    ("grad_wrt glob", {"grad_wrt": "5.*"}, OptionError, "'5..', which matches none of the model's 6 parameters; such as"),
    ("grad_wrt empty", {"grad_wrt": []}, OptionError, "grad_wrt chooses 0"),
    ("grad_wrt never", {"grad_wrt": lambda n, v: False}, OptionError, "grad_wrt chooses 0"),
    ("grad_wrt number", {"grad_wrt": 5}, OptionError, "names, globs or a predicate; got 5"),
    ("grad_wrt numbers", {"grad_wrt": [5]}, OptionError, "names, globs or a predicate; got 5"),
    ("projector number", {"projector": 5}, OptionError, "subclass of AbstractProjector .* got 5"),
    ("projector signature", {"projector": Narrow}, OptionError, "projector=Narrow cannot be built"),
    ("projector absent", {"projector": "cuda"}, OptionError, "projector must be a subclass"),
    ("computer number", {"gradient_computer": 5}, OptionError, "gradient_computer must be a"),
    ("score computer", {"score_computer": "x"}, OptionError, "has no get_scores, get_x_xtx_inv"),
    ("saver", {"saver": object()}, OptionError, "saver must be a subclass of AbstractSaver"),
    ("saver class", {"saver": dict}, OptionError, "saver"),
]

JOBS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("undamped", {"proj_dim": 20, "lambda_reg": 0}, SingularKernelError,
     "lambda_reg=0 with 11 training examples and proj_dim=20.*'auto'"),
    ("badly conditioned", {"proj_dim": 11, "lambda_reg": 1e-30}, SingularKernelError,
     "11 x 11 kernel .* cannot be inverted with a ridge of 1e-30"),
    ("no gradients", {"task": Task(lambda logits: logits[0] * 0)}, SingularKernelError,
     "All gradients of the 11 training examples are zero"),
    ("no gradients, undamped",
     {"task": Task(lambda logits: logits[0] * 0), "lambda_reg": "pinv"}, SingularKernelError,
     "All gradients of the 11 training examples are zero"),
    ("no out-to-loss", {"task": Task(out_to_loss=lambda logits: logits[:, :1] * 0)}, TaskError,
     "out-to-loss gradient of all 11 training examples is exactly zero"),
    ("output of no tensor", {"task": Task(lambda logits: 3.0)}, TaskError,
     "Task.get_output must return a scalar tensor for one example; got float"),
    ("output of a vector", {"task": Task(lambda logits: logits)}, TaskError, r"got shape \(3,\)"),
    ("output that is read", {"task": Task(lambda logits: logits[int(logits.argmax())]),
                             "gradient_computer": FunctionalGradientComputer},
     GradientError, "(?s)torch.func cannot .*Pass gradient_computer=IterativeGradientComputer"),
    ("output without gradient", {"task": Task(lambda logits: (logits[0] * 0).sqrt())},
     NonFiniteError, "example 0 has a NaN .* first for the parameter '0.weight'"),
    ("output NaN", {"task": Task(lambda logits: logits[0] * NAN)}, NonFiniteError, "example 0"),
    ("out-to-loss of None", {"task": Task(out_to_loss=lambda logits: None)}, TaskError,
     r"gave NoneType for a batch of 11; a tensor of shape \(11, 1\)"),
    ("out-to-loss of one number", {"task": Task(out_to_loss=lambda logits: logits.sum())},
     TaskError, r"gave shape \(\) for a batch of 11"),
    ("out-to-loss of many", {"task": Task(out_to_loss=lambda logits: logits)}, TaskError,
     r"gave shape \(11, 3\)"),
    ("out-to-loss NaN", {"task": Task(out_to_loss=lambda logits: logits[:, 0] * NAN)},
     NonFiniteError, "in its out-to-loss gradient"),
    ("gradients transposed", {"gradient_computer": Transposed}, GradientError,
     r"gradients of shape \(53, 11\); \(b, 53\) is needed"),
    ("rows lost", {"projector": Halved(53, 7, 0, "normal", "cpu")}, GradientError,
     r"Halved gave rows of shape \(5, 7\) for a batch of 11; \(11, 7\)"),
    ("projector of another size", {"projector": BasicProjector(5, 7, 0, "normal", "cpu")},
     BatchError, "5"),
]

# fmt: on
CASES = CHECKPOINTS + STORES


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_named_error_and_nothing_lost(
    tmp_path: Path, case: Case, bench_scores: Tensor
) -> None:
    check_case(case, tmp_path, bench_scores)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "error", "regex"),
    [row[1:] for row in OPTIONS],
    ids=[row[0] for row in OPTIONS],
)
def test_options(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], regex: str
) -> None:
    with pytest.raises(error, match=regex) as caught:
        Bench(tmp_path).fresh(**options)
    assert isinstance(caught.value, TrakError)
    assert not (tmp_path / "fresh" / "metadata.json").exists()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "error", "regex"),
    [row[1:] for row in JOBS],
    ids=[row[0] for row in JOBS],
)
def test_jobs(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], regex: str
) -> None:
    with pytest.raises(error, match=regex) as caught:
        Bench(tmp_path).job(**options)
    assert isinstance(caught.value, TrakError)


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    return model.requires_grad_(False)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("model", "regex"),
    [
        (torch.nn.Identity(), "model has no parameters"),
        (frozen(mlp()), "none has requires_grad=True"),
        (lambda x: x, "must be a torch.nn.Module; got function"),
    ],
)
def test_models(tmp_path: Path, model: Any, regex: str) -> None:
    problem = classification(mlp(), 4)
    problem.model = model
    with pytest.raises(OptionError, match=regex):
        make(problem, tmp_path)


def test_a_frozen_parameter_that_is_named(tmp_path: Path) -> None:
    problem = classification(mlp(), 4)
    problem.model[0].weight.requires_grad_(False)
    with pytest.raises(OptionError, match=r"names '0\.weight', which is frozen"):
        make(problem, tmp_path, grad_wrt=["0.weight"])


def test_batch_statistics_without_running_ones(tmp_path: Path) -> None:
    model = layers()
    model[1] = torch.nn.BatchNorm1d(5, track_running_stats=False)
    problem = classification(model, 4)
    traker = make(problem, tmp_path)
    with pytest.raises(ModelModeError, match="1 is a BatchNorm1d without running"):
        traker.load_checkpoint(problem.checkpoints[0])


def test_compiled_projector_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(BackendError):
        Bench(tmp_path).fresh(projector=CudaProjector, proj_dim=512)
