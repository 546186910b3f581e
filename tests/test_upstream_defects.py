"""What went wrong in traker 0.3.2, each defect with the test that it is gone.

The numbers are those of a list of its defects; those that no behaviour shows (names,
duplicated code, tone) have no test here.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from tests.compat import plugins
from tests.compat.problem import (
    CHECKPOINTS,
    TARGETS,
    TRAIN,
    D,
    M,
    N,
    assert_scores,
    batches,
    checkpoint,
    featurize,
    gradients,
    logits_of,
    make,
    miss,
    network,
    run,
    score,
    textbook,
)
from trak import TRAKer, gradient_computers, modelout_functions, savers, utils
from trak import projectors as projections
from trak import score_computers as scorers
from trak.errors import (
    BackendError,
    ExperimentError,
    ModelIDException,
    OptionError,
    OrderError,
    SingularKernelError,
    StaleRowError,
    StoreError,
    StoreMismatchError,
    TrakWarning,
)

ROOT = Path(__file__).parents[1]
CPU_PROJECTORS = [
    projections.SparseProjector,
    projections.BasicProjector,
    projections.BasicSingleBlockProjector,
]


def project_with(kind: Any, **options: Any) -> Any:
    law = "sparse" if kind is projections.SparseProjector else "rademacher"
    defaults = {"grad_dim": D, "proj_dim": 16, "seed": 0, "device": "cpu"}
    return kind(**{**defaults, "proj_type": law, **options})


def rows(data: tuple[Tensor, Tensor], low: int, high: int) -> tuple[Tensor, Tensor]:
    return data[0][low:high], data[1][low:high]


# -- 2 to 5: state and storage ------------------------------------------------------


@pytest.mark.parametrize("kind", CPU_PROJECTORS)
@pytest.mark.parametrize("proj_dim", [16, 128])
def test_02_free_memory_then_project(kind: Any, proj_dim: int) -> None:
    """0.3.2: ``AttributeError``, the matrix was deleted and never made again."""
    projector = project_with(kind, proj_dim=proj_dim)
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    before = projector.project(x, model_id=0)
    projector.free_memory()
    projector.free_memory()
    torch.testing.assert_close(projector.project(x, model_id=0), before)


@pytest.mark.parametrize("kind", CPU_PROJECTORS)
def test_02_featurize_finalize_score_on_the_cpu(kind: Any, tmp_path: Path) -> None:
    """0.3.2: the same crash in the documented order of calls, for proj_dim <= 100."""
    found = run(tmp_path, projector=project_with(kind))
    assert found.shape == (N, M)
    assert torch.isfinite(found).all()


def test_03_other_calls_do_not_move_the_cursor_of_featurizing(tmp_path: Path) -> None:
    """0.3.2: finalizing one checkpoint reset the row where another would go on."""
    traker = make(tmp_path, projector=projections.NoOpProjector())
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize(TRAIN, num_samples=N)
    traker.load_checkpoint(CHECKPOINTS[1], 1)
    traker.featurize(rows(TRAIN, 0, 20), num_samples=20)
    traker.finalize_features([0])
    with pytest.raises(OrderError, match="call load_checkpoint first"):
        traker.featurize(rows(TRAIN, 20, N), num_samples=N - 20)
    traker.load_checkpoint(CHECKPOINTS[1], 1)
    traker.featurize(TRAIN, num_samples=N)
    traker.finalize_features()
    assert_scores(score(traker), textbook())


def test_03_experiments_have_a_cursor_each(tmp_path: Path) -> None:
    """0.3.2: one cursor for all experiments; another experiment's targets moved it."""
    traker = make(tmp_path, projector=projections.NoOpProjector())
    featurize(traker)
    for model_id, state in enumerate(CHECKPOINTS):
        for exp_name, stop in (("a", 2), ("b", M), ("a", M)):
            traker.start_scoring_checkpoint(exp_name, state, model_id, M)
            traker.score(rows(TARGETS, 0, stop), num_samples=stop)
    for exp_name in ("a", "b"):
        assert_scores(traker.finalize_scores(exp_name), textbook())


@pytest.mark.parametrize("key", ["JL dimension", "JL matrix type", "train set size"])
def test_04_a_manifest_without_a_key(key: str, tmp_path: Path) -> None:
    """0.3.2: ``KeyError``, or nothing at all, far from its cause."""
    make(tmp_path)
    path = tmp_path / "metadata.json"
    record = json.loads(path.read_text())
    del record[key]
    path.write_text(json.dumps(record))
    with pytest.raises(StoreMismatchError, match=key):
        make(tmp_path)


@pytest.mark.parametrize("key", ["num_targets", "scores_path", "scores_finalized"])
def test_04_an_experiment_without_a_key(key: str, tmp_path: Path) -> None:
    """0.3.2: ``KeyError`` far from its cause."""
    traker = make(tmp_path)
    featurize(traker)
    expected = np.array(score(traker))
    path = tmp_path / "experiments" / "exp.json"
    record = json.loads(path.read_text())
    del record[key]
    path.write_text(json.dumps(record))
    if key == "num_targets":
        with pytest.raises(StoreError, match=r"exp\.json.*num_targets is None"):
            make(tmp_path)
    else:
        found = make(tmp_path).finalize_scores("exp")
        np.testing.assert_array_equal(found, expected)


def test_05_flags_have_one_shape(tmp_path: Path) -> None:
    """0.3.2: made as ``(n,)``, opened again as ``(n, 1)``."""
    traker = make(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    made = open_memmap(tmp_path / "0" / "_is_featurized.mmap", mode="r")
    again = make(tmp_path)
    again.load_checkpoint(CHECKPOINTS[0], 0)
    shapes = {
        made.shape,
        traker.saver.current_store["is_featurized"].shape,
        again.saver.current_store["is_featurized"].shape,
    }
    assert shapes == {(N, 1)}


# -- 6, 7: arithmetic ---------------------------------------------------------------


def scaled_logit(
    model: Any, weights: Any, images: Tensor, labels: Tensor, scale: float
) -> Tensor:
    return scale * logits_of(model, weights, images).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("scale", [1e-6, 500.0, 1e6])
def test_06_half_precision_is_not_for_sums(scale: float, tmp_path: Path) -> None:
    """0.3.2: ``inf`` on the diagonal of a float16 Gram matrix of ordinary gradients."""
    projector = plugins.NormalProjector(D, 16, 0, "normal", "cpu")
    matrices = [projector.matrix(model_id) for model_id in range(2)]
    flat = gradients(CHECKPOINTS[0], TRAIN, lambda *a: scaled_logit(*a, scale=scale))
    stored = (flat @ matrices[0].double() / D**0.5).abs()
    if scale > 1:
        assert float(stored.square().sum(dim=0).max()) > torch.finfo(torch.half).max
    found = run(
        tmp_path,
        task=plugins.LogitTask(scale),
        projector=projector,
        use_half_precision=True,
        lambda_reg="auto",
    )
    expected = textbook(
        matrices,
        output=lambda *a: scaled_logit(*a, scale=scale),
        out_to_loss=lambda *a: miss(*a) / scale,
        ridge=None,
    )
    size = float(expected.abs().max())
    # Rows are rounded by one part in 2048 and sums are not.
    torch.testing.assert_close(
        found.double() / size, expected / size, rtol=0, atol=5e-3
    )


def test_07_features_scale_inversely_with_gradients(tmp_path: Path) -> None:
    """0.3.2: gradients ten times as large gave features ten times as large."""
    features = []
    for scale in (2.0, 20.0):
        traker = make(
            tmp_path / str(scale),
            task=plugins.LogitTask(scale),
            projector=plugins.NormalProjector(D, 8, 0, "normal", "cpu"),
            lambda_reg=0.0,
        )
        traker.load_checkpoint(CHECKPOINTS[0], 0)
        traker.featurize(TRAIN, num_samples=N)
        traker.finalize_features()
        features.append(torch.tensor(traker.saver.current_store["features"]))
    torch.testing.assert_close(features[1] * 10, features[0], rtol=1e-3, atol=1e-5)


def test_07_checkpoints_are_averaged_on_one_scale(tmp_path: Path) -> None:
    """0.3.2: each checkpoint's scores had another hidden factor in the average."""
    projector = plugins.NormalProjector(D, 16, 0, "normal", "cpu")
    traker = make(tmp_path, projector=projector)
    featurize(traker)
    together = np.array(score(traker))
    alone, weights = [], []
    for model_id in range(len(CHECKPOINTS)):
        alone.append(np.array(traker.finalize_scores("exp", model_ids=[model_id])))
        traker.saver.load_current_store(model_id)
        weights.append(np.array(traker.saver.current_store["out_to_loss"]))
    products = [s / w for s, w in zip(alone, weights, strict=True)]
    expected = np.mean(products, axis=0) * np.mean(weights, axis=0)
    np.testing.assert_allclose(together, expected, rtol=1e-3, atol=1e-6)


# -- 8 to 10, 25: the CLIP task, and side effects -----------------------------------


class TinyClip(torch.nn.Module):
    def __init__(self, logit_scale: float = 0.0) -> None:
        super().__init__()
        self.image = torch.nn.Linear(4, 3)
        self.text = torch.nn.Linear(5, 3)
        self.logit_scale = torch.nn.Parameter(torch.tensor(logit_scale))

    def forward(
        self, image: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        return self.image(image), self.text(text), self.logit_scale.exp()


def pairs(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 4, generator=generator)
    return images, torch.randn(size, 5, generator=generator)


def clip_task(model: TinyClip, **options: Any) -> modelout_functions.CLIPModelOutput:
    task = modelout_functions.CLIPModelOutput(**options)
    task.get_embeddings(model, [pairs(6)], batch_size=6, embedding_dim=3, size=6)
    return task


def clip_weight(
    task: modelout_functions.CLIPModelOutput, model: TinyClip, size: int
) -> Tensor:
    weights = dict(model.named_parameters())
    return task.get_out_to_loss_grad(model, weights, {}, pairs(size))


def test_08_clip_tasks_share_no_state() -> None:
    """0.3.2: a second instance changed the first one's batch size and embeddings."""
    first = clip_task(TinyClip(), simulated_batch_size=3)
    bank = first.image_embeddings
    second = clip_task(TinyClip(), simulated_batch_size=5)
    assert first.simulated_batch_size == 3
    assert first.image_embeddings is bank
    assert second.image_embeddings is not bank
    assert modelout_functions.CLIPModelOutput().image_embeddings is None


def test_09_every_checkpoint_has_its_own_temperature() -> None:
    """0.3.2: the first checkpoint's temperature was kept for all others."""
    model = TinyClip(logit_scale=1.0)
    task = clip_task(model)
    cold = clip_weight(task, model, 3)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    hot = clip_weight(task, model, 3)
    torch.testing.assert_close(hot, clip_weight(clip_task(model), model, 3))
    assert not torch.allclose(hot, cold)


@pytest.mark.parametrize("b", [0, 1, 3])
def test_25_the_clip_task_gives_a_column(b: int) -> None:
    """0.3.2: shape ``(b,)``, which the store took for a batch of one only."""
    model = TinyClip()
    assert clip_weight(clip_task(model), model, b).shape == (b, 1)


def test_25_the_clip_task_featurizes_batches_of_three(tmp_path: Path) -> None:
    """0.3.2: ``ValueError`` from the store."""
    model = TinyClip(1.0)
    task = clip_task(model)
    traker = make(tmp_path, model=model, task=task, train_set_size=7)
    traker.load_checkpoint(model.state_dict(), 0)
    for low in (0, 3, 6):
        traker.featurize(rows(pairs(7), low, low + 3))
    stored = torch.tensor(traker.saver.current_store["out_to_loss"])
    torch.testing.assert_close(stored, clip_weight(task, model, 7))


def test_10_nothing_global_changes(tmp_path: Path) -> None:
    """0.3.2: the RNG was drawn from for every example, and a kernel switched off."""
    flag = torch.backends.cuda.mem_efficient_sdp_enabled()
    numpy_before = np.random.get_state(legacy=False)  # noqa: NPY002  what is checked
    model = TinyClip(1.0)
    state = torch.get_rng_state()
    traker = make(
        tmp_path,
        model=model,
        task=clip_task(model),
        train_set_size=7,
        lambda_reg="auto",
    )
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(pairs(7))
    traker.finalize_features()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.cuda.mem_efficient_sdp_enabled() is flag
    numpy_after = np.random.get_state(legacy=False)  # noqa: NPY002  what is checked
    np.testing.assert_equal(numpy_after, numpy_before)


OPTIMIZED = """
import json, logging, sys, tempfile, torch
root = logging.getLogger()
before = [list(root.handlers), root.level]
from trak import TRAKer
found = {}
with tempfile.TemporaryDirectory() as directory:
    traker = TRAKer(torch.nn.Linear(2, 2), "image_classification", 3, directory,
                    device="cpu")
    found["handlers"] = [list(root.handlers), root.level] == before
    batch = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    for name, call in {
        "featurize": lambda: traker.featurize(batch, num_samples=3),
        "score": lambda: traker.score(batch, num_samples=3),
        "finalize_features": lambda: traker.finalize_features(),
    }.items():
        try:
            call()
        except Exception as error:
            found[name] = [type(error).__name__, isinstance(error, AssertionError)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def optimized() -> dict[str, Any]:
    """What a fresh interpreter without assertions finds."""
    command = [sys.executable, "-O", "-c", OPTIMIZED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_10_the_root_logger_is_left_alone(optimized: dict[str, Any]) -> None:
    """0.3.2: ``logging.basicConfig()`` in the constructor."""
    assert optimized["handlers"]


def test_11_errors_without_assertions(optimized: dict[str, Any]) -> None:
    """0.3.2: under ``python -O`` an ``AttributeError`` in place of the message."""
    assert optimized["featurize"] == ["OrderError", True]
    assert optimized["score"] == ["OrderError", True]
    assert optimized["finalize_features"] == ["NoCheckpointError", True]


# -- 12 to 19: errors and interfaces ------------------------------------------------


def test_12_scoring_what_is_not_finalized(tmp_path: Path) -> None:
    """0.3.2: a log line and None; the final scores were all NaN."""
    traker = make(tmp_path)
    featurize(traker, finalize=False)
    with pytest.raises(ModelIDException, match=r"call finalize_features\(\) first"):
        traker.start_scoring_checkpoint("exp", CHECKPOINTS[0], 0, M)
    with pytest.raises(OrderError, match="call start_scoring_checkpoint first"):
        traker.score(TARGETS, num_samples=M)


def test_12_scores_of_missing_targets(tmp_path: Path) -> None:
    """0.3.2: rows of zeros, or NaN, among the scores."""
    traker = make(tmp_path)
    featurize(traker)
    for model_id, state in enumerate(CHECKPOINTS):
        traker.start_scoring_checkpoint("exp", state, model_id, M)
        traker.score(rows(TARGETS, 0, 2), num_samples=2)
    with pytest.raises(ExperimentError, match="2 of 5 targets"):
        traker.finalize_scores("exp")
    with pytest.raises(ModelIDException, match="all were left out"):
        traker.finalize_scores("exp", allow_skip=True)


def test_13_allow_skip(tmp_path: Path) -> None:
    """0.3.2: ``RuntimeError: Could not infer dtype of NoneType``."""
    traker = make(tmp_path)
    featurize(traker)
    traker.start_scoring_checkpoint("exp", CHECKPOINTS[1], 1, M)
    traker.score(TARGETS, num_samples=M)
    with pytest.raises(ExperimentError, match="no targets on model id 0"):
        traker.finalize_scores("exp")
    found = np.array(traker.finalize_scores("exp", allow_skip=True))
    np.testing.assert_array_equal(found, traker.finalize_scores("exp", model_ids=[1]))


def test_14_a_task_class(tmp_path: Path) -> None:
    """0.3.2: its documentation passed the class, which failed without its batch."""
    by_class = run(tmp_path / "class", task=plugins.LogitTask)
    by_instance = run(tmp_path / "instance", task=plugins.LogitTask())
    assert torch.equal(by_class, by_instance)


@pytest.mark.parametrize(
    "name", ["task", "gradient_computer", "projector", "score_computer", "saver"]
)
def test_14_what_is_no_plug_in(name: str, tmp_path: Path) -> None:
    """0.3.2: whatever error came first, later."""

    class Other:
        pass

    for wrong in (Other, Other()):
        with pytest.raises(OptionError):
            make(tmp_path, **{name: wrong})


def test_15_a_device_is_a_device(tmp_path: Path) -> None:
    """0.3.2: ``torch.device("cpu")`` took the CUDA branch and failed."""
    by_name = run(tmp_path / "name", device="cpu")
    by_type = run(tmp_path / "type", device=torch.device("cpu"))
    assert torch.equal(by_name, by_type)


def test_16_every_score_computer_can_be_made(tmp_path: Path) -> None:
    """0.3.2: ``BasicSingleBlockScoreComputer`` was abstract."""
    scorers.BasicSingleBlockScoreComputer(torch.float32, "cpu")
    projector = plugins.NormalProjector(D, 16, 0, "normal", "cpu")
    found = run(
        tmp_path,
        projector=projector,
        score_computer=scorers.BasicSingleBlockScoreComputer,
    )
    expected = textbook([projector.matrix(model_id) for model_id in range(2)])
    assert_scores(found, expected)


def test_16_the_savers_interface_does_nothing_on_its_own(tmp_path: Path) -> None:
    """0.3.2: its constructor made directories and read files, whatever the saver."""
    save_dir = tmp_path / "store"
    plugins.RamSaver(save_dir, {}, N, 16, True, 100, False)
    assert not save_dir.exists()


def shipped(module: Any, interface: type) -> list[type]:
    kinds = [value for value in vars(module).values() if isinstance(value, type)]
    return [k for k in kinds if issubclass(k, interface) and not inspect.isabstract(k)]


SEAMS = [
    (modelout_functions, modelout_functions.AbstractModelOutput),
    (gradient_computers, gradient_computers.AbstractGradientComputer),
    (projections, projections.AbstractProjector),
    (scorers, scorers.AbstractScoreComputer),
    (savers, savers.AbstractSaver),
]


@pytest.mark.parametrize(
    ("interface", "kind"),
    [
        (interface, kind)
        for module, interface in SEAMS
        for kind in shipped(module, interface)
    ],
    ids=lambda value: value.__name__,
)
def test_17_the_interface_is_what_is_called(interface: Any, kind: type) -> None:
    """0.3.2: abstract and concrete methods had other arguments."""
    for name in interface.__abstractmethods__:
        asked = call_arguments(inspect.getattr_static(interface, name))
        given = call_arguments(inspect.getattr_static(kind, name))
        if "*" in asked:  # an example's tensors, which each task names
            assert given[:3] == asked[:3]
        else:
            assert given == asked


def call_arguments(method: Any) -> list[str]:
    function = getattr(method, "__func__", method)
    return [
        "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    ]


def test_18_featurize_returns_nothing(tmp_path: Path) -> None:
    """0.3.2: annotated ``-> None``, and 0 where all was done already."""
    traker = make(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    calls: list[Callable[..., Any]] = [traker.featurize, traker.featurize]
    assert [call(TRAIN, inds=np.arange(N)) for call in calls] == [None, None]


@pytest.mark.parametrize("kind", [*CPU_PROJECTORS, projections.NoOpProjector])
def test_19_a_misspelt_option_of_a_projector(kind: Any) -> None:
    """0.3.2: ``*args, **kwargs`` swallowed it."""
    with pytest.raises(TypeError, match="blok_size"):
        project_with(kind, blok_size=3)


# -- 20 to 24: projections, resuming and sharing ------------------------------------


def columns(seed: int, model_id: int) -> set[bytes]:
    projector = projections.BasicSingleBlockProjector(
        64, 20_480, seed, "rademacher", "cpu", model_id=model_id
    )
    signs = (projector.generate_sketch_matrix().T > 0).numpy()
    return {column.tobytes() for column in signs}


@pytest.mark.parametrize("other", [(0, 1), (1000, 0), (10_000, 0), (1, 0)])
def test_20_streams_share_nothing(other: tuple[int, int]) -> None:
    """0.3.2: models 0 and 1 shared 105 of 205 blocks, seeds 0 and 1000 20 of 21."""
    mine, theirs = columns(0, 0), columns(*other)
    assert len(mine) == len(theirs) == 20_480  # nor are blocks of one matrix repeated
    assert not mine & theirs


def test_20_chunks_with_one_seed_are_refused() -> None:
    """0.3.2: 20 chunks repeated a seed with probability 0.32."""
    chunks = [projections.BasicProjector(4, 8, 7, "normal", "cpu") for _ in range(2)]
    with pytest.raises(OptionError, match="different seeds"):
        projections.ChunkedCudaProjector(chunks, 4, [4, 4], 8, "cpu", torch.float32)


def test_22_the_chunked_projector_is_a_projector() -> None:
    """0.3.2: another class, without the interface."""
    interface = projections.AbstractProjector
    assert issubclass(projections.ChunkedCudaProjector, interface)


def test_22_a_projector_that_cannot_run_says_so() -> None:
    """0.3.2: two lines in the log, and a slow path."""
    with pytest.raises(BackendError, match="needs a CUDA device, got 'cpu'"):
        projections.CudaProjector(D, 512, 0, "rademacher", "cpu", 8)


def test_23_a_batch_that_overlaps_finished_rows(tmp_path: Path) -> None:
    """0.3.2: ``ValueError: shape mismatch``."""
    first = make(tmp_path, projector=projections.NoOpProjector())
    first.load_checkpoint(CHECKPOINTS[0], 0)
    first.featurize(rows(TRAIN, 0, 20), num_samples=20)
    second = make(tmp_path, projector=projections.NoOpProjector())
    for model_id, state in enumerate(CHECKPOINTS):
        second.load_checkpoint(state, model_id)
        for batch in batches(TRAIN, 13):  # the second one straddles row 20
            second.featurize(batch, num_samples=len(batch[0]))
    second.finalize_features()
    assert_scores(score(second), textbook())


def test_24_jobs_that_load_nothing(tmp_path: Path) -> None:
    """0.3.2: ``FileNotFoundError`` for experiments.json, unless job 0 came first."""
    jobs = []
    for model_id, state in reversed(list(enumerate(CHECKPOINTS))):
        job = make(
            tmp_path, projector=projections.NoOpProjector(), load_from_save_dir=False
        )
        job.load_checkpoint(state, model_id)
        job.featurize(TRAIN, num_samples=N)
        job.finalize_features(model_ids=[model_id])
        jobs.append((job, state, model_id))
    for job, state, model_id in jobs:
        job.start_scoring_checkpoint("exp", state, model_id, M)
        job.start_scoring_checkpoint(f"own {model_id}", state, model_id, M)
        job.start_scoring_checkpoint("exp", state, model_id, M)
        job.score(TARGETS, num_samples=M)
    gather = make(tmp_path, projector=projections.NoOpProjector())
    assert sorted(gather.saver.experiments) == ["exp", "own 0", "own 1"]
    summary = json.loads((tmp_path / "experiments.json").read_text())
    assert sorted(summary) == ["exp", "own 0", "own 1"]
    assert_scores(gather.finalize_scores("exp"), textbook())


# -- 26, 27, 33: what is differentiated, and the documented calls -------------------


class _Tripwire(torch.autograd.Function):
    """The identity, whose derivative must never be asked for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise AssertionError("differentiated")


class Guarded(torch.nn.Module):
    """A model whose first layer must not be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 4)
        self.last = torch.nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = _Tripwire.apply(self.first.weight)
        return self.last(torch.nn.functional.linear(x, weight, self.first.bias).tanh())


@pytest.mark.parametrize(
    "computer",
    [
        gradient_computers.FunctionalGradientComputer,
        gradient_computers.IterativeGradientComputer,
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_26_and_33_only_what_is_selected_is_differentiated(
    frozen: bool, computer: Any, tmp_path: Path
) -> None:
    """0.3.2: all gradients were computed, those of frozen parameters too."""
    model = Guarded()
    options: dict[str, Any] = {"model": model, "gradient_computer": computer}
    if frozen:
        model.first.requires_grad_(False)
    else:
        options["grad_wrt"] = ["last.weight", "last.bias"]
    traker = make(tmp_path, projector=projections.NoOpProjector(), **options)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(TRAIN, num_samples=N)
    assert traker.num_params_for_grad == 15
    assert np.any(traker.saver.current_store["grads"] != 0)
    with pytest.raises(AssertionError, match="differentiated"):
        torch.nn.functional.linear(
            torch.ones(1, 6), _Tripwire.apply(torch.ones(4, 6, requires_grad=True))
        ).sum().backward()


def test_27_the_readmes_call(tmp_path: Path) -> None:
    """0.3.2: ``TypeError: multiple values for 'exp_name'``."""
    traker = make(tmp_path)
    featurize(traker)
    traker.start_scoring_checkpoint(
        CHECKPOINTS[0], model_id=0, exp_name="test", num_targets=M
    )
    traker.score(TARGETS, num_samples=M)
    assert traker.finalize_scores("test", model_ids=[0]).shape == (N, M)


# -- 31 to 37: silent noise ---------------------------------------------------------


def test_31_more_projected_entries_than_examples(tmp_path: Path) -> None:
    """0.3.2: with both defaults the scores were noise, without a warning."""
    projector = plugins.NormalProjector(D, 100, 0, "normal", "cpu")
    matrices = [projector.matrix(model_id) for model_id in range(2)]
    options = {"lambda_reg": "auto", "exponents": (0.0, 1.0)}
    found = run(tmp_path / "default", projector=projector, **options)
    assert_scores(found, textbook(matrices, ridge=None))
    traker = make(tmp_path / "zero", projector=projector, lambda_reg=0.0)
    featurize(traker, finalize=False)
    with pytest.raises(
        SingularKernelError, match="60 training examples and proj_dim=100"
    ):
        traker.finalize_features()


def test_31_the_undamped_limit_by_name(tmp_path: Path) -> None:
    """0.3.2: an inverse of a singular matrix; rank correlation with this one 0.02."""
    projector = plugins.NormalProjector(D, 100, 0, "normal", "cpu")
    traker = make(tmp_path, projector=projector, lambda_reg="pinv")
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize(TRAIN, num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", CHECKPOINTS[0], 0, M)
    traker.score(TARGETS, num_samples=M)
    matrix = projector.matrix(0).double()
    x, g = (gradients(CHECKPOINTS[0], data) @ matrix for data in (TRAIN, TARGETS))
    weight = traker.saver.current_store["out_to_loss"]
    solved = torch.linalg.pinv(x.T @ x, rtol=1e-6) @ g.T
    expected = x @ solved * torch.tensor(weight)
    found = torch.tensor(traker.finalize_scores("exp")).double()
    # Eigenvalues down to 1e-6 of the largest magnify float32's rounding.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


def test_32_a_model_id_of_other_weights(tmp_path: Path) -> None:
    """0.3.2: the old features were kept, silently."""
    traker = make(tmp_path)
    featurize(traker)
    with pytest.raises(ModelIDException, match="belongs to other weights"):
        traker.load_checkpoint(checkpoint(9), 0)
    with pytest.raises(ModelIDException, match="belongs to other weights"):
        traker.start_scoring_checkpoint("exp", checkpoint(9), 0, M)
    again = make(tmp_path)
    with pytest.raises(ModelIDException, match="belongs to other weights"):
        again.load_checkpoint(checkpoint(9), 1)


def test_32_another_seed_of_the_projection(tmp_path: Path) -> None:
    """0.3.2: rows of two projections were mixed, silently."""
    make(tmp_path, projector_seed=0)
    with pytest.raises(StoreMismatchError, match="seed=1"):
        make(tmp_path, projector_seed=1)


def test_34_test_install_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """0.3.2: ``use_fast_jl=False`` failed without CUDA."""
    utils.test_install(use_fast_jl=False)
    assert "SparseProjector on cpu" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="fast_jl might run here")
def test_34_test_install_fails_when_what_was_asked_for_did_not_run() -> None:
    """0.3.2: reported success while falling back."""
    with pytest.raises(BackendError, match="fast_jl was asked for and cannot run"):
        utils.test_install(use_fast_jl=True)


def test_35_half_precision_is_a_storage_format(tmp_path: Path) -> None:
    """0.3.2: all arithmetic in float16, 156 times a forward and backward on a CPU."""
    seen: set[torch.dtype] = set()

    class Recorder(plugins.NormalProjector):
        def project(self, grads: Any, model_id: int) -> Tensor:
            seen.update(value.dtype for value in grads.values())
            return super().project(grads, model_id)

    traker = make(
        tmp_path,
        projector=Recorder(D, 16, 0, "normal", "cpu"),
        use_half_precision=True,
    )
    featurize(traker)
    assert seen == {torch.float32}
    assert traker.gradient_computer.dtype is torch.float32
    assert traker.score_computer.dtype is torch.float32
    assert traker.saver.current_store["grads"].dtype == np.float16
    assert score(traker).dtype == np.float32


def test_36_chunks_cut_anywhere_and_take_any_batch() -> None:
    """0.3.2: one large tensor was never split, a batch above the limit failed."""
    sizes = [20, 20, 3]
    chunks = [
        projections.BasicProjector(size, 8, seed, "normal", "cpu")
        for seed, size in enumerate(sizes)
    ]
    chunked = projections.ChunkedCudaProjector(
        chunks, 20, sizes, 4, "cpu", torch.float32
    )
    x = torch.randn(11, D, generator=torch.Generator().manual_seed(0))
    grads = {"large": x[:, :40].reshape(11, 8, 5), "small": x[:, 40:]}
    expected = sum(
        chunk.project(piece, model_id=2)
        for chunk, piece in zip(chunks, x.split(sizes, dim=1), strict=True)
    )
    torch.testing.assert_close(chunked.project(grads, model_id=2), expected)


def test_36_any_number_of_gradients_and_any_batch(tmp_path: Path) -> None:
    """0.3.2: chunks were those of all parameters, whatever grad_wrt said."""
    traker = make(tmp_path, grad_wrt=["0.*"], proj_max_batch_size=8)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize(TRAIN, num_samples=N)
    assert traker.projector.grad_dim == 28


def test_37_a_loader_that_shuffles_is_noticed(tmp_path: Path) -> None:
    """0.3.2: scores of other examples than the indices said, silently."""
    traker = make(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize(TRAIN, num_samples=N)
    traker.load_checkpoint(CHECKPOINTS[1], 1)
    shuffled = TRAIN[0].flip(0), TRAIN[1].flip(0)
    with pytest.raises(StaleRowError, match=r"0 is not the one .* one fixed order"):
        traker.featurize(shuffled, num_samples=N)
    traker.featurize(shuffled, inds=range(N)[::-1])


def test_37_a_loader_that_augments_is_noticed(tmp_path: Path) -> None:
    """0.3.2: scores of other examples than the indices said, silently."""
    traker = make(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize(TRAIN, num_samples=N)
    traker.load_checkpoint(CHECKPOINTS[1], 1)
    with pytest.warns(TrakWarning, match="does the loader augment"):
        traker.featurize((-TRAIN[0], TRAIN[1]), num_samples=N)


def test_37_augmented_data_under_a_stored_index_is_refused(tmp_path: Path) -> None:
    """0.3.2: whatever came first stayed, silently."""
    traker: TRAKer = make(tmp_path)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    traker.featurize(rows(TRAIN, 0, 10), num_samples=10)
    traker.load_checkpoint(CHECKPOINTS[0], 0)
    with pytest.raises(StaleRowError, match="shuffle or augment"):
        traker.featurize((-TRAIN[0][:10], TRAIN[1][:10]), num_samples=10)


def test_the_model_here_is_the_one_that_is_described() -> None:
    assert sum(value.numel() for value in network().parameters()) == D
