"""Influence functions, Arnoldi and EK-FAC beside explicit matrices in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests import problems, reference
from tests.contracts.method_contract import MethodContract
from tests.problems import Problem, classes, classification, draw, randomized, split
from trak import modelout_functions
from trak._batches import take
from trak.errors import (
    BatchError,
    CheckpointError,
    ConvergenceError,
    GradientError,
    NoCheckpointError,
    NonFiniteError,
    OptionError,
    OrderError,
    SingularKernelError,
    TaskError,
    TrakWarning,
    UnknownNameError,
)
from trak.methods import EKFAC, Arnoldi, InfluenceFunction, TrainingLoss
from trak.methods._choices import check_checkpoints
from trak.methods._curvature import Curvature, CurvatureProducts
from trak.methods._curvature_loss import loss_of_task
from trak.methods._kronecker import precondition, squared_rotated
from trak.methods._kronecker_layers import Listener
from trak.methods._solvers import conjugate_gradients, lanczos, lissa
from trak.modelout_functions import CausalLMModelOutput

DAMPING = 0.05


def batches(batch: Any, size: int, step: int = 4) -> list[Any]:
    return [piece for piece, _ in split(batch, size, step)]


def loss_curvature(
    problem: Problem, checkpoint: Any, kind: str, rows: Tensor | None = None
) -> Tensor:
    """Hessian or Gauss-Newton matrix of the mean cross-entropy, entry by entry."""
    problem.model.load_state_dict(checkpoint)
    problem.model.eval()
    parameters = problem.parameters()
    flat = torch.cat([value.detach().reshape(-1) for value in parameters.values()])
    sizes = [value.numel() for value in parameters.values()]
    rows = torch.arange(problem.n) if rows is None else rows

    def logits(vector: Tensor) -> Tensor:
        pieces = {
            name: piece.view_as(value)
            for (name, value), piece in zip(
                parameters.items(), vector.split(sizes), strict=True
            )
        }
        weights = {**dict(problem.model.named_buffers()), **pieces}

        def call(*args: Any, **kwargs: Any) -> Tensor:
            return torch.func.functional_call(problem.model, weights, args, kwargs)

        return problem.call(call, problem.train)[rows]

    labels = problem.labels(problem.train)[rows]
    if kind == "hessian":
        return torch.autograd.functional.hessian(
            lambda vector: cross_entropy(logits(vector), labels), flat
        )
    jacobian = torch.autograd.functional.jacobian(logits, flat)
    chances = logits(flat).softmax(1)
    inner = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
    return torch.einsum("bkd,bkl,ble->de", jacobian, inner, jacobian) / len(rows)


def influence(problem: Problem, kind: str = "ggn", damping: float = DAMPING) -> Tensor:
    """The scores, from the explicit inverse: (n, m)."""
    total = torch.zeros(problem.n, problem.m, dtype=torch.float64)
    for checkpoint in problem.checkpoints:
        matrix = loss_curvature(problem, checkpoint, kind)
        damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
        train = problem.gradients(checkpoint, problem.train, problem.n)
        targets = problem.gradients(checkpoint, problem.targets, problem.m)
        weights = problem.out_to_loss(checkpoint)[:, None]
        total += weights * (train @ torch.linalg.solve(damped, targets.T))
    return total / len(problem.checkpoints)


def scores(method: Any, problem: Problem, step: int = 4) -> Tensor:
    method.fit(batches(problem.train, problem.n, step))
    found = method.score(batches(problem.targets, problem.m, 3))
    return torch.from_numpy(found).double()


def assert_scores(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    problems.assert_scores(found, expected, rtol)


def make(name: str = "mlp", **kwargs: Any) -> Problem:
    return problems.PROBLEMS[name](**kwargs)


def logistic(n: int = 13, m: int = 4) -> Problem:
    return classification(nn.Linear(3, 3), 3, n=n, m=m)


# -- exact influence functions --------------------------------------------------------


@pytest.mark.parametrize("name", list(problems.PROBLEMS))
def test_conjugate_gradients_are_the_explicit_inverse(name: str) -> None:
    problem = make(name, checkpoints=2)
    method = InfluenceFunction(
        problem.model,
        problem.task,
        problem.checkpoints,
        damping=DAMPING,
        tolerance=1e-9,
    )
    assert_scores(scores(method, problem), influence(problem))
    assert [it.checkpoint for it in method.convergence] == [0, 1]
    assert all(
        it.residual <= 1e-9 and it.damping == DAMPING for it in method.convergence
    )


@pytest.mark.parametrize("kind", [InfluenceFunction, Arnoldi, EKFAC])
def test_tiles_of_targets_do_not_matter(kind: Any) -> None:
    problem = make("residual")
    options = {"tolerance": 1e-9} if kind is InfluenceFunction else {}
    whole = kind(problem.model, problem.task, problem.checkpoints, **options)
    expected = scores(whole, problem, 5)
    d = whole._computer.selection.grad_dim
    for most in (1, 2, 3):
        cut = kind(
            problem.model,
            problem.task,
            problem.checkpoints,
            max_bytes=4 * d * most,
            **options,
        )
        assert_scores(scores(cut, problem, 5), expected, 1e-4)


class TestConjugateGradients(MethodContract):
    def make(self, problem: Problem, save_dir: Path, **options: Any) -> Any:
        return InfluenceFunction(
            problem.model, problem.task, problem.checkpoints, tolerance=1e-6
        )


class TestArnoldi(MethodContract):
    def make(self, problem: Problem, save_dir: Path, **options: Any) -> Any:
        return Arnoldi(
            problem.model,
            problem.task,
            problem.checkpoints,
            rank=20,
            keep=12,
            damping=DAMPING,
        )


class TestEKFAC(MethodContract):
    def make(self, problem: Problem, save_dir: Path, **options: Any) -> Any:
        return EKFAC(problem.model, problem.task, problem.checkpoints)


def test_the_hessian_of_logistic_regression_is_its_gauss_newton_matrix() -> None:
    problem = logistic()
    expected = influence(problem, "hessian")
    for kind in ("ggn", "hessian"):
        method = InfluenceFunction(
            problem.model,
            problem.task,
            problem.checkpoints,
            damping=DAMPING,
            curvature=kind,
            tolerance=1e-9,
        )
        assert_scores(scores(method, problem), expected)


def test_the_hessian_of_a_network() -> None:
    problem = make()
    method = InfluenceFunction(
        problem.model,
        problem.task,
        problem.checkpoints,
        damping=2.0,
        curvature="hessian",
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        tolerance=1e-9,
    )
    assert_scores(scores(method, problem), influence(problem, "hessian", 2.0))


def test_negative_curvature_is_named() -> None:
    problem = make()
    method = InfluenceFunction(
        problem.model,
        problem.task,
        problem.checkpoints,
        damping=0.0,
        curvature="hessian",
        tolerance=1e-9,
    )
    with pytest.raises(ConvergenceError, match="pass a larger damping, or curvature"):
        scores(method, problem)


def linear_regression(n: int = 9) -> tuple[nn.Linear, Any, Any]:
    """A least-squares fit, its data, and targets."""
    inputs, labels = draw(n, 3, seed=1), draw(n, seed=2)
    model = nn.Linear(3, 1, bias=False).double()
    fit = torch.linalg.lstsq(inputs, labels[:, None]).solution
    with torch.no_grad():
        model.weight.copy_(fit.T)
    return model, (inputs, labels), (draw(4, 3, seed=3), draw(4, seed=4))


@pytest.mark.parametrize("kind", ["cg", "arnoldi", "ekfac"])
def test_linear_regression_predicts_leaving_one_out(kind: str) -> None:
    model, train, targets = linear_regression()
    inputs, labels = train
    n = len(inputs)
    checkpoints = [{"weight": model.weight.detach().clone()}]
    options: Any = {"damping": 0.0}
    if kind == "cg":
        method: Any = InfluenceFunction(
            model, "regression", checkpoints, tolerance=1e-10, **options
        )
    elif kind == "arnoldi":
        method = Arnoldi(model, "regression", checkpoints, rank=3, keep=3, **options)
    else:
        method = EKFAC(model, "regression", checkpoints, fisher="exact", **options)
    found = method.fit([train]).score([targets])
    # Sherman and Morrison: the influence is the change times 1 - leverage.
    gram = torch.linalg.inv(inputs.T @ inputs)
    leverage = ((inputs @ gram) * inputs).sum(1)
    before = targets[0] @ model.weight[0].detach()
    changes = []
    for i in range(n):
        kept = torch.arange(n) != i
        fit = torch.linalg.lstsq(inputs[kept], labels[kept][:, None]).solution[:, 0]
        changes.append((before - targets[0] @ fit) * (1 - leverage[i]))
    assert_scores(torch.from_numpy(found).double() / n, torch.stack(changes))


def test_lissa_agrees_with_conjugate_gradients() -> None:
    problem = make()
    expected = influence(problem, damping=0.5)
    method = InfluenceFunction(
        problem.model,
        problem.task,
        problem.checkpoints,
        solver="lissa",
        damping=0.5,
        depth=200,
        repeats=2,
    )
    assert_scores(scores(method, problem, step=100), expected)
    assert method.convergence[0].iterations == 400
    assert math.isnan(method.convergence[0].residual)
    noisy = scores(method, problem, step=3)
    error = float((noisy - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.3


@pytest.mark.parametrize("half", [None, range(0, 11, 2)])
def test_lissa_weighs_batches_by_their_sizes(half: Any) -> None:
    """The mean over a pass of batches of several sizes is that over examples."""
    problem = make(checkpoints=1, n=12)
    method = InfluenceFunction(
        *(problem.model, problem.task, problem.checkpoints),
        solver="lissa",
        train_inds=[half],
    )
    cuts = [slice(0, 9), slice(9, 11), slice(11, 12)]
    method.fit([take(problem.train, cut) for cut in cuts])
    rows = method._signs(2, 0)
    batches = len([*method._member_batches(0)])
    assert batches == (3 if half is None else 2)
    drawn = method._noisy_operators(0, torch.Generator().manual_seed(0))
    found = sum(next(drawn)(rows) for _ in range(batches)) / batches
    torch.testing.assert_close(found, method._operator(0)(rows))


def test_lissa_that_diverges_says_to_raise_the_scale() -> None:
    problem = make()
    method = InfluenceFunction(
        problem.model, problem.task, problem.checkpoints, solver="lissa", scale=0.01
    )
    with pytest.raises(ConvergenceError, match="Raise scale above the largest"):
        scores(method, problem)


def test_a_solution_that_is_not_there_yet_warns_with_its_residual() -> None:
    problem = make()
    method = InfluenceFunction(
        problem.model, problem.task, problem.checkpoints, max_iterations=1
    )
    with pytest.warns(TrakWarning, match="stopped after 1 iterations with a relative"):
        scores(method, problem)
    assert method.convergence[0].residual > 1e-3


def test_the_default_damping_is_a_mean_eigenvalue() -> None:
    problem = make(n=40)
    matrix = loss_curvature(problem, problem.checkpoints[0], "ggn")
    method = InfluenceFunction(
        problem.model, problem.task, problem.checkpoints, multiple=0.5
    )
    scores(method, problem)
    expected = 0.5 * float(matrix.trace()) / min(problem.n, len(matrix))
    # Eight probes: the spread is sqrt(2 sum of squares off the diagonal / 8).
    off = matrix - torch.diag(matrix.diagonal())
    spread = float(off.square().sum() * 2 / 8) ** 0.5 / float(matrix.trace())
    assert abs(method.convergence[0].damping / expected - 1) < 4 * spread


def test_a_negative_trace_is_no_unit_of_damping() -> None:
    problem = make()
    method = InfluenceFunction(
        problem.model,
        problem.task,
        problem.checkpoints,
        curvature="hessian",
        loss=lambda model, batch: -model(batch[0]).square().mean(),
    )
    with pytest.raises(OptionError, match="the trace of the curvature at checkpoint 0"):
        scores(method, problem)


def test_the_curvature_is_of_a_checkpoints_own_examples() -> None:
    problem = make()
    rows = torch.tensor([0, 2, 3, 9])
    matrix = loss_curvature(problem, problem.checkpoints[0], "ggn", rows)
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype)
    train = problem.gradients(problem.checkpoints[0], problem.train, problem.n)
    targets = problem.gradients(problem.checkpoints[0], problem.targets, problem.m)
    weights = problem.out_to_loss(problem.checkpoints[0])[:, None]
    expected = weights * (train @ torch.linalg.solve(damped, targets.T))
    mask = np.zeros(problem.n, dtype=bool)
    mask[rows.numpy()] = True
    for members in (rows.tolist(), mask):
        method = InfluenceFunction(
            problem.model,
            problem.task,
            problem.checkpoints,
            damping=DAMPING,
            train_inds=[members],
            tolerance=1e-9,
        )
        assert_scores(scores(method, problem), expected)


# -- Arnoldi --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "residual", "tied"])
def test_arnoldi_of_full_rank_is_exact(name: str) -> None:
    # Gradients lie in the Gauss-Newton matrix's range, and rounding finds all of it.
    problem = make(name, checkpoints=2, n=30)
    d = sum(value.numel() for value in problem.parameters().values())
    method = Arnoldi(
        problem.model,
        problem.task,
        problem.checkpoints,
        rank=d,
        keep=d,
        damping=DAMPING,
    )
    assert_scores(scores(method, problem), influence(problem), 1e-4)


def test_arnoldi_keeps_the_largest_eigenvalues() -> None:
    problem = make(n=30)
    matrix = loss_curvature(problem, problem.checkpoints[0], "ggn")
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values[-4:], vectors[:, -4:]
    method = Arnoldi(problem.model, problem.task, problem.checkpoints, rank=40, keep=4)
    found = scores(method, problem)
    torch.testing.assert_close(method.eigenvalues[0].flip(0), values)
    damping = 0.1 * float(values.mean())
    train = problem.gradients(problem.checkpoints[0], problem.train, problem.n)
    targets = problem.gradients(problem.checkpoints[0], problem.targets, problem.m)
    inverse = vectors @ torch.diag(1 / (values + damping)) @ vectors.T
    weights = problem.out_to_loss(problem.checkpoints[0])[:, None]
    assert_scores(found, weights * (train @ inverse @ targets.T))


# -- EK-FAC ---------------------------------------------------------------------------


def test_ekfac_of_one_layer_is_the_textbook_formula() -> None:
    problem = logistic()
    model, (inputs, _) = problem.model, problem.train
    model.load_state_dict(problem.checkpoints[0])
    ones = torch.cat([inputs, torch.ones(problem.n, 1, dtype=torch.float64)], dim=1)
    chances = model(inputs).detach().softmax(1)
    units = torch.eye(3, dtype=torch.float64)
    slopes = chances[:, :, None].sqrt() * (chances[:, None, :] - units)  # (b, y, o)
    right = torch.linalg.eigh(ones.T @ ones)[1]
    left = torch.linalg.eigh(torch.einsum("byo,byp->op", slopes, slopes))[1]
    grads = torch.einsum("byo,bi->byoi", slopes, ones)
    rotated = left.T @ grads @ right
    eigenvalues = rotated.square().sum((0, 1)) / problem.n
    basis = torch.kron(left.contiguous(), right.contiguous())
    inverse = basis @ torch.diag(1 / (eigenvalues.reshape(-1) + DAMPING)) @ basis.T

    def matrices(batch: Any, size: int) -> Tensor:
        flat = problem.gradients(problem.checkpoints[0], batch, size)
        weight, bias = flat.split([9, 3], dim=1)
        return torch.cat([weight.view(-1, 3, 3), bias[:, :, None]], 2).reshape(size, 12)

    train = matrices(problem.train, problem.n)
    targets = matrices(problem.targets, problem.m)
    weights = problem.out_to_loss(problem.checkpoints[0])[:, None]
    method = EKFAC(
        model, problem.task, problem.checkpoints, damping=DAMPING, fisher="exact"
    )
    assert_scores(scores(method, problem), weights * (train @ inverse @ targets.T))
    assert method.coverage == 1.0


def test_sampled_labels_have_the_exact_factors_on_average() -> None:
    problem = logistic(n=4000)
    found = {}
    for fisher in ("exact", "sampled", "empirical"):
        method = EKFAC(problem.model, problem.task, problem.checkpoints, fisher=fisher)
        method.fit([problem.train])
        found[fisher] = method._factors[0]["weight"].eigenvalues
    total = found["exact"].sum()
    # The relative spread of a mean over 4000 examples is a few times 1/sqrt(4000).
    torch.testing.assert_close(found["sampled"].sum(), total, rtol=0.1, atol=0)
    assert abs(float(found["empirical"].sum() / total) - 1) > 0.1


class Shared(nn.Module):
    """Linear layers over positions, a convolution, and layers without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2)
        self.mix = nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images).flatten(2).mT
        return self.head(torch.tanh(self.mix(self.norm(hidden))).mean(1))


def assert_ekfac_is_of_its_layers(problem: Problem) -> EKFAC:
    """Compare with per-sample gradients of the loss, layer by layer."""
    checkpoint = problem.checkpoints[0]
    with torch.no_grad():
        method = EKFAC(problem.model, problem.task, [checkpoint], fisher="empirical")
        found = scores(method, problem, 3)
    names = list(problem.parameters())
    sizes = [value.numel() for value in problem.parameters().values()]
    train, targets = (
        dict(zip(names, flat.split(sizes, 1), strict=True))
        for flat in (
            problem.gradients(checkpoint, problem.train, problem.n),
            problem.gradients(checkpoint, problem.targets, problem.m),
        )
    )
    weights = problem.out_to_loss(checkpoint)[:, None]
    expected = torch.zeros(problem.n, problem.m, dtype=torch.float64)
    for layer, factors in zip(method._layers, method._factors[0].values(), strict=True):

        def joined(grads: dict[str, Tensor], layer: Any = layer) -> Tensor:
            shape = problem.parameters()[layer.weight].shape
            weight = grads[layer.weight].unflatten(1, shape)
            weight = weight.mT if layer.transposed else weight.flatten(2)
            bias = grads.get(layer.weight.replace("weight", "bias"))
            return weight if bias is None else torch.cat([weight, bias[:, :, None]], 2)

        # The loss's gradient is -Q times that of the output.
        rotated = factors.left.T @ (weights[:, :, None] * joined(train)) @ factors.right
        eigenvalues = rotated.square().mean(0)
        torch.testing.assert_close(factors.eigenvalues, eigenvalues)
        damping = 0.1 * float(eigenvalues.mean())
        made = precondition(
            joined(targets), factors.left, factors.right, eigenvalues, damping
        )
        expected += weights * (joined(train).flatten(1) @ made.flatten(1).T)
    assert_scores(found, expected)
    return method


def test_ekfac_of_positions_and_convolutions() -> None:
    problem = classification(Shared(), 1, 5, 4, checkpoints=1, n=7)
    assert assert_ekfac_is_of_its_layers(problem).coverage == 1 - 4 / 47


class Again(nn.Module):
    """A layer that one pass calls three times, once for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images[:, 0])
        self.inner(hidden)
        hidden = torch.tanh(self.inner(hidden)).mean(1)
        return self.head(torch.tanh(self.inner(hidden)))


def test_ekfac_of_a_layer_that_is_called_again() -> None:
    """Its gradient is the sum over calls, and so are what eigenvalues are of."""
    problem = classification(Again(), 1, 5, 5, checkpoints=1, n=7)
    assert assert_ekfac_is_of_its_layers(problem).coverage == 1.0


def language_model(kind: str) -> Problem:
    transformers = pytest.importorskip("transformers")
    shared = {"vocab_size": 20, "num_labels": 3, "pad_token_id": 0}
    if kind == "Bert":
        sizes = {"hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 6}
        sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    else:
        sizes = {"n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
        sizes |= {"bos_token_id": 1, "eos_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**shared, **sizes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).double()

    def batch(n: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 20, (n, 5), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 3:] = 0
        ids *= mask  # the padding's id: GPT-2 looks for it
        return {"input_ids": ids, "attention_mask": mask, "labels": classes(n)}

    return Problem(
        model,
        batch(7, 1),
        batch(3, 2),
        7,
        3,
        [randomized(model, 0)],
        task="text_classification",
        call=lambda model, batch: (
            model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        ),
        labels=lambda batch: batch["labels"],
    )


@pytest.mark.parametrize("kind", ["Bert", "GPT2"])
def test_models_of_transformers(kind: str) -> None:
    problem = language_model(kind)
    method = assert_ekfac_is_of_its_layers(problem)
    assert any(it.transposed for it in method._layers) is (kind == "GPT2")
    exact = InfluenceFunction(
        problem.model,
        problem.task,
        problem.checkpoints,
        damping=DAMPING,
        tolerance=1e-10,
        max_iterations=1000,
    )
    checkpoint = problem.checkpoints[0]
    found = scores(exact, problem)
    parameters = list(problem.parameters().values())
    outputs = problem.call(problem.model, problem.train)
    rows = reference.loop_gradients(
        lambda i: problem.call(problem.model, problem.train).reshape(-1)[i],
        3 * problem.n,
        parameters,
    ).view(problem.n, 3, -1)
    chances = outputs.detach().softmax(1)
    inner = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
    matrix = torch.einsum("bkd,bkl,ble->de", rows, inner, rows) / problem.n
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype)
    targets = problem.gradients(checkpoint, problem.targets, problem.m)
    train = problem.gradients(checkpoint, problem.train, problem.n)
    weights = problem.out_to_loss(checkpoint)[:, None]
    assert_scores(found, weights * (train @ torch.linalg.solve(damped, targets.T)))


def test_a_layer_that_cannot_be_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make()
    monkeypatch.setattr(Listener, "refusal", lambda *_: "it is not called so")
    with pytest.raises(GradientError, match=r"formed: 2 \(Linear\): it is not called"):
        scores(EKFAC(problem.model, problem.task, problem.checkpoints), problem)


def test_layers_without_factors() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3)).double()
    with pytest.raises(OptionError, match="no selected layer of Sequential has"):
        EKFAC(
            model,
            modelout_functions.FunctionTask(
                output=lambda out, batch: out.sum((1, 2)),
                loss=lambda out, batch: out.square().sum((1, 2)),
            ),
            [model.state_dict()],
            fisher="empirical",
        ).fit([(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2))])


def test_tied_weights_are_left_out() -> None:
    problem = make("tied")
    with pytest.raises(OptionError, match="no selected layer of Tied has"):
        scores(EKFAC(problem.model, problem.task, problem.checkpoints), problem)


# -- pure functions -------------------------------------------------------------------


def positive(d: int, seed: int = 0) -> Tensor:
    root = draw(d, d, seed=seed)
    return root @ root.T / d + torch.eye(d, dtype=torch.float64) / 10


@pytest.mark.parametrize("k", [1, 3])
def test_conjugate_gradients_beside_scipy(k: int) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    matrix, right = positive(17), draw(k, 17, seed=1)
    right[0] *= 1e6  # rows do not share a scale
    found = conjugate_gradients(lambda rows: rows @ matrix, right, tolerance=1e-10)
    for row, solution in zip(right, found.rows, strict=True):
        expected, _ = linalg.cg(matrix.numpy(), row.numpy(), rtol=1e-10)
        torch.testing.assert_close(
            solution, torch.from_numpy(expected), rtol=1e-7, atol=0
        )
    assert float(found.residuals.max()) <= 1e-10
    assert found.iterations < 40


def test_conjugate_gradients_of_zero() -> None:
    found = conjugate_gradients(lambda rows: rows, torch.zeros(2, 3))
    assert not found.rows.any()
    assert found.iterations == 0


def test_lissa_of_one_operator_converges() -> None:
    matrix, right = positive(9), draw(2, 9, seed=1)
    operator = [lambda rows: rows @ matrix] * 3000
    found = lissa(iter(operator), right, damping=0.1, scale=6.0, depth=3000)
    damped = matrix + 0.1 * torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(found, torch.linalg.solve(damped, right.T).T)


@pytest.mark.parametrize(("scale", "depth"), [(0.42, 13), (0.45, 22), (0.48, 60)])
def test_lissa_that_diverges_slowly(scale: float, depth: int) -> None:
    """It ends while its series is not yet ten times as long as any answer's."""
    matrix, right = positive(9), draw(2, 9, seed=1)
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    operators = [lambda rows: rows @ matrix] * depth
    with pytest.raises(ConvergenceError, match=f"after {depth} of {depth} terms"):
        lissa(
            iter(operators),
            right,
            damping=top / 10,
            scale=1.1 * scale * top,
            depth=depth,
        )


def test_lanczos_stops_where_the_space_ends() -> None:
    values = torch.tensor([3.0, -2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found, vectors = lanczos(
        lambda rows: rows * values, torch.ones(5, dtype=torch.float64), 5, 2
    )
    torch.testing.assert_close(found, values[:2])
    torch.testing.assert_close(vectors.abs(), torch.eye(5, dtype=torch.float64)[:2])


@pytest.mark.parametrize("t", [1, 2, 50])
def test_squared_rotations_are_those_of_gradients(t: int) -> None:
    inputs, slopes = draw(5, t, 4, seed=1), draw(5, t, 3, seed=2)
    left, right = (torch.linalg.qr(draw(k, k, seed=k))[0] for k in (3, 4))
    grads = torch.einsum("bto,bti->boi", slopes, inputs)
    expected = (left.T @ grads @ right).square().sum(0)
    found = squared_rotated(inputs, slopes, left, right)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("task", "width", "labels"),
    [
        ("regression", 1, draw(6, seed=3)),
        ("binary_classification", 1, classes(6, 2)),
        ("multilabel", 3, torch.stack([classes(6, 2, seed) for seed in range(3)], 1)),
    ],
)
def test_losses_belong_to_their_tasks(task: str, width: int, labels: Tensor) -> None:
    """-Q is the loss's slope, and the likelihood's roots factor its Hessian."""
    model = nn.Linear(2, width).double()
    resolved = modelout_functions.TASK_TO_MODELOUT[task]()
    batch = draw(6, 2, seed=1), labels
    loss = loss_of_task(resolved)
    outputs = loss.outputs(model, batch).detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss.of_outputs(outputs, batch).sum(), outputs)
    signs = 1.0 if task == "regression" else 2 * labels.double() - 1
    weights = resolved.get_out_to_loss_grad(model, None, None, batch)[:, 0]
    mean = (slope * signs).reshape(6, -1).mean(1)
    torch.testing.assert_close(-mean, weights)
    assert loss.likelihood is not None

    def one(row: Tensor, i: int = 0) -> Tensor:
        again = outputs.detach().clone()
        again[i] = row
        return loss.of_outputs(again, batch)[i]

    roots = torch.stack([it[0].reshape(-1) for it in loss.likelihood.roots(outputs)])
    hessian = torch.autograd.functional.hessian(one, outputs.detach()[0])
    factored = (roots.T @ roots).detach()
    torch.testing.assert_close(factored, hessian.reshape(factored.shape))
    generator = torch.Generator().manual_seed(0)
    many = outputs.detach()[:1].expand(20000, *outputs.shape[1:])
    drawn = loss.likelihood.sample(many, generator).reshape(20000, -1)
    # Standard errors are below 2/sqrt(20000) here.
    torch.testing.assert_close(drawn.T @ drawn / 20000, factored, rtol=0, atol=0.06)


def test_products_of_zero_rows_and_unused_parameters() -> None:
    problem = make("strided")
    problem.model.load_state_dict(problem.checkpoints[0])
    method = InfluenceFunction(problem.model, problem.task, problem.checkpoints)
    products = CurvatureProducts(
        problem.model,
        method._computer.selection,
        loss_of_task(method.task),
        Curvature.GGN,
    )
    empty = torch.zeros(0, 14, dtype=torch.float64)
    assert products.over([problem.train], empty).shape == (0, 14)
    assert products.over([], torch.ones(1, 14, dtype=torch.float64)).sum() == 0


class _Speaker(nn.Module):
    """Predicts a token from the one before it alone."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, words).double()
        self.head = nn.Linear(words, words).double()
        self.load_state_dict(randomized(self, 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_texts_is_that_of_their_labelled_tokens(reduction: str) -> None:
    model, ids = _Speaker(3), classes(8, 3, seed=5).view(2, 4)
    labels = ids.clone()
    labels[0, 2:] = -100
    batch = {"input_ids": ids, "labels": labels}
    loss = loss_of_task(CausalLMModelOutput(reduction))
    found = loss.of_outputs(loss.call(model, batch), batch)
    for row, (tokens, known) in enumerate(zip(ids, labels, strict=True)):
        entropy = cross_entropy(
            model(tokens)[:-1], known[1:], ignore_index=-100, reduction=reduction
        )
        torch.testing.assert_close(found[row], entropy)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_likelihood_of_tokens_factors_the_hessian_of_their_loss(
    reduction: str,
) -> None:
    model, ids = _Speaker(3), classes(4, 3, seed=6).view(1, 4)
    labels = ids.clone()
    labels[0, 1] = -100
    batch = {"input_ids": ids, "labels": labels}
    loss = loss_of_task(CausalLMModelOutput(reduction))
    outputs = loss.outputs(model, batch).detach()
    assert loss.likelihood is not None

    def one(logits: Tensor) -> Tensor:
        again = torch.cat([logits, outputs[..., -2:]], dim=-1)
        return loss.of_outputs(again, batch)[0]

    hessian = torch.autograd.functional.hessian(one, outputs[..., :-2])
    roots = torch.stack(loss.likelihood.roots(outputs))
    assert roots[..., -2:].abs().sum() == 0
    flat = roots[..., :-2].reshape(len(roots), -1)
    factored = flat.T @ flat
    torch.testing.assert_close(factored, hessian.reshape(factored.shape))
    generator = torch.Generator().manual_seed(0)
    many = outputs.expand(20000, *outputs.shape[1:])
    drawn = loss.likelihood.sample(many, generator)
    assert drawn[..., -2:].abs().sum() == 0
    drawn = drawn[..., :-2].reshape(20000, -1)
    products = drawn[:, :, None] * drawn[:, None, :]
    errors = products.std(0) / 20000**0.5
    assert ((products.mean(0) - factored).abs() <= 5 * errors + 1e-12).all()


TEXTS = torch.tensor([[0, 1, 2], [3, 4, 5], [2, 4, 0]])


def test_language_models_have_influence_functions() -> None:
    """Against the whole matrix, from gradients and Hessians one text at a time."""
    model = _Speaker(6)
    parameters = list(model.parameters())
    margins, weights, curvature = [], [], torch.zeros(78, 78, dtype=torch.float64)
    for ids in TEXTS:
        said = model(ids)[:-1]
        rows = [
            torch.autograd.grad(one, parameters, retain_graph=True)
            for one in said.flatten()
        ]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        hessian = torch.autograd.functional.hessian(
            lambda out, ids=ids: cross_entropy(out, ids[1:]), said.detach()
        ).reshape(len(jacobian), -1)
        curvature += jacobian.T @ hessian @ jacobian / len(TEXTS)
        pairs = list(zip(said, ids[1:], strict=True))
        output = torch.stack([reference.margin(*pair) for pair in pairs]).mean()
        (slope,) = torch.autograd.grad(output, said, retain_graph=True)
        margins.append(slope.flatten() @ jacobian)
        chances = torch.stack([out.softmax(0)[i] for out, i in pairs])
        weights.append(1 - chances.mean().detach())
    curvature += DAMPING * torch.eye(78, dtype=torch.float64)
    targets = torch.stack(margins)
    train = torch.stack(weights)[:, None] * targets
    options = {"damping": DAMPING, "curvature": "ggn", "tolerance": 1e-9}
    method = InfluenceFunction(model, "causal_lm", [model.state_dict()], **options)
    found = scores_of_texts(method)
    assert_scores(found, train @ torch.linalg.solve(curvature, targets.T))


def scores_of_texts(method: Any) -> Tensor:
    """Of three texts for themselves."""
    batch = {"input_ids": TEXTS}
    return torch.from_numpy(method.fit([batch]).score([batch])).double()


def test_language_models_have_kronecker_factors() -> None:
    """A text of the training set is explained by itself first."""
    model = _Speaker(6)
    method = EKFAC(model, "causal_lm", [model.state_dict()])
    assert scores_of_texts(method).argmax(0).tolist() == [0, 1, 2]


# -- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"solver": "lu"},
            UnknownNameError,
            "solver is one of 'cg', 'lissa', got 'lu'",
        ),
        ({"curvature": "fisher"}, UnknownNameError, "curvature is one of 'ggn'"),
        ({"damping": -1.0}, OptionError, "damping must be at least 0 and finite"),
        ({"multiple": 0.0}, OptionError, "multiple must be positive and finite"),
        ({"depth": 0}, OptionError, "depth must be at least 1; got 0"),
        ({"train_inds": []}, OptionError, "train_inds is for 0 checkpoints"),
        ({"train_inds": [[99]]}, OptionError, r"train_inds\[0\] is int64 of shape"),
        ({"loss": lambda model, batch: None}, OptionError, "pass loss=TrainingLoss"),
    ],
)
def test_options(options: Any, error: type[Exception], message: str) -> None:
    problem = make()
    with pytest.raises(error, match=message):
        scores(
            InfluenceFunction(
                problem.model, problem.task, problem.checkpoints, **options
            ),
            problem,
        )


def test_other_refusals() -> None:
    problem = make()
    model, task, checkpoints = problem.model, problem.task, problem.checkpoints
    with pytest.raises(NoCheckpointError, match="checkpoints is empty"):
        EKFAC(model, task, [])
    with pytest.raises(OptionError, match="keep=9 eigenpairs cannot come of rank=4"):
        Arnoldi(model, task, checkpoints, rank=4, keep=9)
    with pytest.raises(UnknownNameError, match="fisher is one of 'sampled'"):
        EKFAC(model, task, checkpoints, fisher="exactly")
    with pytest.raises(OptionError, match="training loss of CLIPModelOutput is not"):
        EKFAC(model, "clip", checkpoints)


def test_function_tasks() -> None:
    problem = make()
    split_loss = modelout_functions.FunctionTask(
        output=lambda out, batch: out[:, 0],
        loss=lambda out, batch: cross_entropy(out, batch[1], reduction="none"),
    )
    with pytest.raises(OptionError, match="the loss has no likelihood"):
        EKFAC(problem.model, split_loss, problem.checkpoints)
    method = InfluenceFunction(
        problem.model, split_loss, problem.checkpoints, damping=DAMPING, tolerance=1e-9
    )
    found = scores(method, problem)
    matrix = loss_curvature(problem, problem.checkpoints[0], "ggn")
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype)
    problem.model.load_state_dict(problem.checkpoints[0])
    parameters = list(problem.model.parameters())

    def gradients(batch: Any, size: int) -> Tensor:
        return reference.loop_gradients(
            lambda i: problem.model(batch[0][i : i + 1])[0, 0], size, parameters
        )

    weights = split_loss.get_out_to_loss_grad(problem.model, None, None, problem.train)
    targets = gradients(problem.targets, problem.m)
    train = gradients(problem.train, problem.n)
    assert_scores(found, weights * (train @ torch.linalg.solve(damped, targets.T)))


def test_a_model_of_several_tensors_has_no_split_loss() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(inputs)[:, 0], inputs

    model = Pair()
    task = modelout_functions.FunctionTask(
        output=lambda out, batch: out[0], loss=lambda out, batch: out[0].square()
    )
    method = InfluenceFunction(model, task, [model.state_dict()])
    with pytest.raises(OptionError, match="its loss is a function of several tensors"):
        method.fit([(torch.ones(3, 2), torch.ones(3))])


def test_losses_of_the_wrong_shape() -> None:
    loss = TrainingLoss(
        outputs=lambda model, batch: model(batch[0]),
        losses=lambda outputs, batch: cross_entropy(outputs, batch[1]),
    )
    problem = make()
    with pytest.raises(TaskError, match=r"gave shape \(\) for 11 examples"):
        loss.mean(problem.model, problem.train)


def test_outputs_and_scores_that_are_not_finite() -> None:
    problem = classification(nn.Linear(3, 3), 3)
    problem.train[0][5] = math.inf
    method = EKFAC(problem.model, problem.task, problem.checkpoints)
    with pytest.raises(NonFiniteError, match="row 1 of a training batch is NaN"):
        scores(method, problem)
    problem.train[0][5] = 0.0
    problem.targets[0][2] = math.inf
    with pytest.raises(
        NonFiniteError, match="gradient of target 2 has a NaN"
    ) as caught:
        scores(method, problem)
    assert caught.value.index == 2


def test_the_model_is_not_changed_otherwise() -> None:
    problem = make("frozen")
    randomized(problem.model, 0)
    before = [it.requires_grad for it in problem.model.parameters()]
    scores(EKFAC(problem.model, problem.task, problem.checkpoints), problem)
    assert [it.requires_grad for it in problem.model.parameters()] == before
    assert all(it.grad is None for it in problem.model.parameters())


# -- wrong uses, and what is singular -------------------------------------------------

EVERY = [
    lambda *arguments, **options: InfluenceFunction(*arguments, **options),
    lambda *arguments, **options: InfluenceFunction(
        *arguments, **{"solver": "lissa", "depth": 30, **options}
    ),
    lambda *arguments, **options: Arnoldi(*arguments, **{"rank": 8, **options}),
    lambda *arguments, **options: EKFAC(*arguments, **options),
]


def made(kind: Any, problem: Problem, **options: Any) -> Any:
    return kind(problem.model, problem.task, problem.checkpoints, **options)


@pytest.mark.parametrize("kind", EVERY)
def test_a_target_that_is_not_finite_is_named(kind: Any) -> None:
    """Also alone: the zeros that solvers begin with are no answer."""
    problem = make()
    method = made(kind, problem).fit([problem.train])
    inputs, labels = problem.targets
    inputs[2, 1] = math.nan
    for batch, index in [
        ((inputs, labels), 2),
        ((inputs[2:3], labels[2:3]), 0),
    ]:
        with pytest.raises(NonFiniteError, match=f"target {index} has a NaN") as caught:
            method.score(batches(batch, len(batch[0]), 1))
        assert caught.value.index == index


@pytest.mark.parametrize("kind", EVERY)
def test_a_fit_that_fails_leaves_nothing_to_score_with(kind: Any) -> None:
    problem = make()
    method = made(kind, problem).fit([problem.train])
    inputs, labels = problem.train
    broken = inputs.clone()
    broken[3] = math.inf * broken[3]
    broken[3, 0] = math.nan
    with pytest.raises(NonFiniteError, match="row 3 of a training batch is NaN"):
        method.fit([(broken, labels)])
    with pytest.raises(OrderError, match="fit it first"):
        method.score([problem.targets])
    expected = made(kind, problem).fit([problem.train]).score([problem.targets])
    again = method.fit([problem.train]).score([problem.targets])
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("kind", EVERY)
def test_empty_batches_count_for_nothing(kind: Any) -> None:
    problem = make()
    plain = batches(problem.train, problem.n), batches(problem.targets, problem.m, 3)
    expected = made(kind, problem).fit(plain[0]).score(plain[1])
    empty = tuple(part[:0] for part in problem.train)
    spaced = [[empty, whole[0], empty, *whole[1:], empty] for whole in plain]
    found = made(kind, problem).fit(spaced[0]).score(spaced[1])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", EVERY)
def test_labels_are_class_indices(kind: Any) -> None:
    problem = make()
    inputs, labels = problem.train
    labels = labels.clone()
    labels[4] = 7
    with pytest.raises(BatchError, match="position 4 of the batch is 7, which is not"):
        made(kind, problem).fit([(inputs, labels)]).score([problem.targets])


class Flipping(nn.Module):
    """Writes to its inputs, and not the same every time."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.neg_()


@pytest.mark.parametrize("kind", EVERY)
def test_inputs_are_not_written_to(kind: Any) -> None:
    problem = classification(nn.Sequential(Flipping(), nn.Linear(4, 3)), 4)
    before = problem.train[0].clone()
    method = made(kind, problem, damping=0.5).fit([problem.train])
    found = method.score([problem.targets])
    torch.testing.assert_close(problem.train[0], before, rtol=0, atol=0)
    plain = classification(nn.Linear(4, 3), 4)
    plain.checkpoints = [
        {key[2:]: value for key, value in state.items()}
        for state in problem.checkpoints
    ]
    flipped = tuple(
        (-inputs, labels) for inputs, labels in (plain.train, plain.targets)
    )
    expected = made(kind, plain, damping=0.5).fit([flipped[0]]).score([flipped[1]])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
        ({"max_bytes": math.nan}, "max_bytes must be a whole number; got nan"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"damping": "auto"}, "damping must be at least 0 and finite, got 'auto'"),
        ({"damping": math.nan}, "damping must be at least 0 and finite, got nan"),
        ({"multiple": "1"}, "multiple must be positive and finite, got '1'"),
        ({"train_inds": [[[0, 1], [2]]]}, r"train_inds\[0\] is object of shape \(2,\)"),
    ],
)
def test_options_of_all(untyped: Any, kind: Any, options: Any, message: str) -> None:
    problem = make()
    with pytest.raises(OptionError, match=message):
        made(kind, problem, **options).fit([problem.train])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (InfluenceFunction, {"max_iterations": 1.5}),
        (InfluenceFunction, {"depth": 2.5}),
        (InfluenceFunction, {"repeats": 1.5}),
        (Arnoldi, {"rank": 10.0}),
        (Arnoldi, {"keep": True}),
    ],
)
def test_counts_are_whole_numbers(untyped: Any, kind: Any, options: Any) -> None:
    with pytest.raises(
        OptionError, match=f"{next(iter(options))} must be a whole numb"
    ):
        made(kind, make(), **options)


@pytest.mark.parametrize(
    ("checkpoints", "error", "message"),
    [
        ({"weight": torch.ones(1)}, CheckpointError, r"such as \[state_dict\]"),
        (iter([{}]), OptionError, "got list_iterator; pass a list"),
        (None, OptionError, "got NoneType; pass a list"),
        ((), NoCheckpointError, "checkpoints is empty"),
    ],
)
def test_checkpoints_are_a_sequence(
    untyped: Any, checkpoints: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        check_checkpoints(checkpoints)
    problem = make()
    problem.checkpoints = checkpoints
    for kind in EVERY:
        with pytest.raises(error, match=message):
            made(kind, problem)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda model, batch: cross_entropy(
                model(batch[0]), batch[1], reduction="none"
            ),
            r"loss gave shape \(11,\); return the mean",
        ),
        (lambda model, batch: None, "loss gave NoneType; return the mean"),
        (
            lambda model, batch: model(batch[0]).detach().mean(),
            "loss does not depend on the selected parameters",
        ),
        (
            TrainingLoss(
                lambda model, batch: (model(batch[0]),), lambda out, batch: out
            ),
            r"outputs of a TrainingLoss gave tuple for 11 .*shape \(11, ...\)",
        ),
    ],
)
def test_losses_that_are_none(untyped: Any, loss: Any, message: str) -> None:
    problem = make()
    method = made(
        InfluenceFunction, problem, loss=loss, curvature="hessian", damping=1.0
    )
    with pytest.raises(TaskError, match=message):
        scores(method, problem, step=100)


def test_split_losses_depend_on_the_parameters(untyped: Any) -> None:
    problem = make()
    for outputs, losses, message in [
        (
            lambda model, batch: model(batch[0]).detach(),
            lambda out, batch: out.square().sum(1),
            "outputs of the TrainingLoss do not depend",
        ),
        (
            lambda model, batch: model(batch[0]),
            lambda out, batch: out.detach().square().sum(1),
            "losses of the TrainingLoss do not depend",
        ),
    ]:
        loss = TrainingLoss(outputs, losses)
        with pytest.raises(TaskError, match=message):
            scores(made(InfluenceFunction, problem, loss=loss), problem)
    plain = lambda model, batch: model(batch[0]).square().mean()  # noqa: E731
    with pytest.raises(OptionError, match="factors need the loss split"):
        made(EKFAC, problem, loss=plain)


def test_losses_that_are_infinite() -> None:
    problem = make()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).mean() / torch.zeros(1, dtype=torch.float64)[0]

    method = made(InfluenceFunction, problem, loss=loss, curvature="hessian")
    with pytest.raises(NonFiniteError, match="mean loss of a training batch is"):
        scores(method, problem)
    roots = TrainingLoss(
        lambda model, batch: model(batch[0]) * 0.0,
        lambda out, batch: out.abs().sqrt().sum(1),
    )
    with pytest.raises(NonFiniteError, match="a second derivative is not, or overflow"):
        scores(made(InfluenceFunction, problem, loss=roots), problem)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_a_linear_loss_has_no_curvature(kind: str) -> None:
    problem = logistic()
    loss = TrainingLoss(
        lambda model, batch: model(batch[0]), lambda out, batch: out.sum(1)
    )
    options = {"loss": loss, "curvature": kind}
    found = scores(made(InfluenceFunction, problem, damping=0.5, **options), problem)
    train = problem.gradients(problem.checkpoints[0], problem.train, problem.n)
    targets = problem.gradients(problem.checkpoints[0], problem.targets, problem.m)
    weights = problem.out_to_loss(problem.checkpoints[0])[:, None]
    assert_scores(found, weights * (train @ targets.T) / 0.5)
    with pytest.raises(OptionError, match="the trace of the curvature at checkpoint 0"):
        scores(made(InfluenceFunction, problem, **options), problem)
    with pytest.raises(SingularKernelError, match="the damping 0 sum to zero"):
        scores(made(Arnoldi, problem, rank=4, **options), problem)


def test_convergence_is_of_the_last_scores() -> None:
    problem = make(checkpoints=2)
    method = made(InfluenceFunction, problem).fit([problem.train])
    for _ in range(2):
        method.score([problem.targets])
        assert [it.checkpoint for it in method.convergence] == [0, 1]


@pytest.mark.parametrize("kind", EVERY)
def test_checkpoints_stay_what_they_are(kind: Any) -> None:
    problem = make(checkpoints=2)
    method = made(kind, problem).fit([problem.train])
    problem.checkpoints[1]["0.bias"] += 1
    with pytest.raises(
        CheckpointError, match="checkpoint 1 has other weights than when"
    ):
        method.score([problem.targets])
    again = method.fit([problem.train]).score([problem.targets])
    np.testing.assert_array_equal(
        again, made(kind, problem).fit([problem.train]).score([problem.targets])
    )


def test_scores_that_overflow_are_refused() -> None:
    problem = logistic()
    problem.train[0][:] *= 1e25
    problem.targets[0][:] *= 1e25
    method = made(EKFAC, problem, damping=1e-5).fit([problem.train])
    method._factors[0]["weight"].eigenvalues.zero_()  # for products of 1e55
    with pytest.raises(
        NonFiniteError, match="or the score overflows float32"
    ) as caught:
        method.score([problem.targets])
    assert caught.value.index is not None


def test_residuals_are_of_the_solutions() -> None:
    """In float32 the recurrence believes in a smaller one."""
    basis = torch.linalg.qr(draw(120, 120, seed=1))[0]
    values = torch.logspace(-7, 0, 120, dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    right = draw(2, 120, seed=2).float()
    single = matrix.float()
    found = conjugate_gradients(
        lambda rows: rows @ single, right, tolerance=1e-3, max_iterations=800
    )
    left = found.rows.double() @ matrix - right.double()
    shares = left.norm(dim=1) / right.double().norm(dim=1)
    assert (shares > 1e-2).all()
    torch.testing.assert_close(found.residuals, shares, rtol=0.1, atol=0)


def rank_deficient(n: int = 3) -> tuple[Any, Any, Any, Tensor]:
    """Fewer examples than inputs: a regression whose curvature has no inverse."""
    inputs, labels = draw(n, 6, seed=11), draw(n, seed=12)
    targets = draw(2, 6, seed=13), draw(2, seed=14)
    weight = draw(1, 6, seed=15)
    inverse = torch.linalg.pinv(inputs.T @ inputs / n)
    residuals = labels - inputs @ weight[0]
    expected = residuals[:, None] * (inputs @ inverse @ targets[0].T)
    return {"weight": weight}, (inputs, labels), targets, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ekfac_without_damping_is_a_pseudo_inverse(dtype: torch.dtype) -> None:
    state, train, targets, expected = rank_deficient()
    model = nn.Linear(6, 1, bias=False).to(dtype)
    state, train, targets = (
        {"weight": state["weight"].to(dtype)},
        tuple(part.to(dtype) for part in train),
        tuple(part.to(dtype) for part in targets),
    )
    method = EKFAC(model, "regression", [state], damping=0.0, fisher="exact")
    found = method.fit([train]).score([targets])
    rtol = 1e-6 if dtype == torch.float64 else 1e-3
    assert_scores(torch.from_numpy(found).double(), expected, rtol)


def test_a_singular_curvature_without_damping_is_an_error() -> None:
    state, train, targets, _ = rank_deficient()
    model = nn.Linear(6, 1, bias=False).double()
    arguments = model, "regression", [state]
    full = Arnoldi(*arguments, rank=6, keep=6, damping=0.0).fit([train])
    with pytest.raises(
        SingularKernelError, match="pass a larger damping, or a smaller"
    ):
        full.score([targets])
    exact = InfluenceFunction(*arguments, damping=0.0, tolerance=1e-9).fit([train])
    with pytest.raises(ConvergenceError, match="pass a larger damping"):
        exact.score([targets])
    # What is kept has an inverse, and the training gradients lie in it.
    inputs = train[0] @ train[0].T @ train[0]  # in the span of the training set
    kept = Arnoldi(*arguments, rank=6, keep=3, damping=0.0).fit([train])
    found = torch.from_numpy(kept.score([(inputs, train[1])])).double()
    residuals = train[1] - train[0] @ state["weight"][0]
    inverse = torch.linalg.pinv(train[0].T @ train[0] / 3)
    assert_scores(found, residuals[:, None] * (train[0] @ inverse @ inputs.T))


class Idle(nn.Module):
    """A layer that nothing depends on, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.ignored = nn.Linear(4, 2)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(inputs))
        self.ignored(hidden)
        return self.head(hidden)


@pytest.mark.parametrize("damping", [None, 0.0, 0.1])
def test_layers_without_effect_change_no_score(damping: float | None) -> None:
    problem = classification(Idle(), 4)
    every = made(EKFAC, problem, damping=damping)
    found = scores(every, problem)
    assert every.coverage == 1.0
    some = made(EKFAC, problem, damping=damping, grad_wrt=["body.*", "head.*"])
    assert_scores(found, scores(some, problem))
