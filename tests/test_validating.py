"""Cross-validation, damping, thresholds and errors of stored checkpoints, end to end."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import reference
from tests.problems import AUTO, Problem, assert_scores, draw, make, sparse
from trak import TRAKer, _thresholds, _validating
from trak._choices import DampingChoice
from trak._thresholds import SoftThreshold, parse_threshold
from trak._validating import parse_targets
from trak.errors import (
    ExperimentError,
    ModelIDException,
    NonFiniteError,
    OptionError,
    StoreCorruptError,
)
from trak.evaluation import (
    CrossValidation,
    choose_threshold,
    cross_validate,
    soft_threshold,
    standard_errors,
    threshold_keeping,
)
from trak.score_computers import BasicScoreComputer, BasicSingleBlockScoreComputer

N, M, C = 60, 12, 5
GRID = (0.1, 1.0, 10.0)


def trained(x: torch.Tensor, y: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """A linear classifier fitted by some steps of gradient descent."""
    model = torch.nn.Linear(6, 3).double()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = draw(*parameter.shape, seed=50 * seed + i) / 10
    descent = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=1e-2)
    for _ in range(40):
        descent.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        descent.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def halves() -> tuple[Problem, list[np.ndarray]]:
    """Noisy classes, and classifiers trained on random halves of the examples."""
    x = draw(N + M, 6, seed=1)
    y = (x[:, :3] + draw(N + M, 3, seed=2)).argmax(1)
    rng = np.random.default_rng(0)
    members = [np.sort(rng.permutation(N)[: N // 2]) for _ in range(C)]
    problem = Problem(
        torch.nn.Linear(6, 3).double(),
        (x[:N], y[:N]),
        (x[N:], y[N:]),
        N,
        M,
        [trained(x[inds], y[inds], seed) for seed, inds in enumerate(members)],
    )
    return problem, members


@pytest.fixture(scope="module")
def finished(halves: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with everything that cross-validation needs, and no scores yet."""
    directory: Path = tmp_path_factory.mktemp("finished")
    fill(halves, make(halves[0], directory))
    return directory


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "store")
    return tmp_path / "store"


def fill(
    halves: Any, traker: TRAKer, *, known: bool = True, del_grads: bool = False
) -> TRAKer:
    problem, members = halves
    for i, checkpoint in enumerate(problem.checkpoints):
        traker.load_checkpoint(checkpoint, train_inds=members[i] if known else None)
        traker.featurize(problem.train)
    traker.finalize_features(del_grads=del_grads)
    for checkpoint in problem.checkpoints:
        traker.start_scoring_checkpoint("exp", checkpoint, None, problem.m)
        traker.score(problem.targets)
    return traker


def masks(members: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.isin(torch.arange(N), torch.from_numpy(inds)) for inds in members]


def expected(halves: Any, multiple: float, b: float = AUTO[1], ids: Any = None) -> Any:
    """Scores of each checkpoint without the last weight, what is stored, and scores."""
    problem, members = halves
    features, targets, weights = problem.parts(sparse(problem))
    kernels = []
    for x, phi, q in zip(features, targets, weights, strict=True):
        rows = q.abs()[:, None] ** AUTO[0] * x
        ridge = multiple * float((rows**2).sum()) / min(rows.shape)
        kernels.append((rows @ reference.ridge_inverse(rows, ridge) @ phi.T).numpy())
    ids = range(len(kernels)) if ids is None else ids
    stacked, q = np.stack([kernels[i] for i in ids]), [weights[i] for i in ids]
    last = reference.result_weights(q, b, [masks(members)[i] for i in ids])
    scores = last.numpy()[:, None] * stacked.mean(axis=0)
    return stacked, torch.stack(q).numpy(), scores


def close(found: Any, wanted: np.ndarray, rtol: float = 1e-3) -> None:
    assert_scores(torch.from_numpy(np.array(found)), torch.from_numpy(wanted), rtol)


# -- cross-validation -------------------------------------------------------------------


def test_cross_validation_is_that_of_the_arrays(store: Path, halves: Any) -> None:
    problem, members = halves
    traker = make(problem, store)
    found = traker.cross_validate("exp", multiples=GRID)
    assert isinstance(found, CrossValidation)
    assert (found.n_checkpoints, len(found.targets)) == (C, M)
    assert found.candidates[0].exponents == AUTO
    assert {one.exponents for one in found.candidates} == {
        (AUTO[0], b) for b in (0.25, 0.5, 0.75, 1.0)
    }
    assert 0.3 < found.lds <= 1
    data = [traker._validation._data("exp", i, M) for i in range(C)]
    features, targets, weights = problem.parts(sparse(problem))
    for i, one in enumerate(data):
        torch.testing.assert_close(
            one.train(0, N).double(), features[i], rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            one.targets(0, M).double(), targets[i], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(one.out_to_loss, weights[i].numpy(), rtol=1e-5)
        np.testing.assert_array_equal(np.flatnonzero(one.members), members[i])
        problem.model.load_state_dict(problem.checkpoints[i])
        logits = problem.model(problem.targets[0]).detach()
        margins = [
            float(reference.margin(row, label))
            for row, label in zip(logits, problem.targets[1], strict=True)
        ]
        np.testing.assert_allclose(one.outputs, margins, rtol=1e-6)
    pairs = [AUTO, *((AUTO[0], b) for b in (0.25, 0.75, 1.0))]
    again = cross_validate(data, N, M, 7, multiples=GRID, exponents=pairs)
    assert again.lds == found.lds


def test_its_options_and_checkpoints(store: Path, halves: Any) -> None:
    traker = make(halves[0], store)
    pairs = ((0.0, 1.0), AUTO)
    found = traker.cross_validate(
        model_ids=[0, 2, 3], multiples=(1.0,), exponents=pairs, max_targets=4
    )
    assert {one.exponents for one in found.candidates} == {*pairs}
    assert (found.n_checkpoints, len(found.targets)) == (3, 4)
    with pytest.raises(OptionError, match="multiples"):
        traker.cross_validate(multiples=(-1.0,))


def test_what_cannot_be_cross_validated(
    store: Path, halves: Any, tmp_path: Path
) -> None:
    problem, members = halves
    traker = make(problem, store)
    with pytest.raises(OptionError, match="1 checkpoints cannot be cross-validated"):
        traker.cross_validate(model_ids=[0])
    with pytest.raises(ExperimentError, match="no experiment 'nope'"):
        traker.cross_validate("nope")
    path = store / "2" / "exp_outputs.mmap"
    outputs = path.read_bytes()
    np.lib.format.open_memmap(path, mode="r+")[3] = np.nan
    with pytest.raises(NonFiniteError, match="checkpoint 2 is nan for target 3"):
        traker.cross_validate()
    path.unlink()
    message = r"'exp' was scored on model id 2 without keeping .* another exp_name"
    with pytest.raises(ExperimentError, match=message):
        make(problem, store).cross_validate()
    path.write_bytes(outputs)
    (store / "1" / "train_inds.json").unlink()
    with pytest.raises(ModelIDException, match="what model id 1 was trained on; pass"):
        traker.cross_validate()
    make(problem, store).load_checkpoint(problem.checkpoints[1], train_inds=members[0])
    with pytest.raises(OptionError, match="0 and 1 were trained on the same subsets"):
        traker.cross_validate()
    (store / "1" / "train_inds.json").unlink()
    make(problem, store).load_checkpoint(problem.checkpoints[1], train_inds=range(N))
    assert traker.cross_validate(multiples=(1.0,)).n_held_out == C - 1


def test_options_that_there_are_not(store: Path, halves: Any) -> None:
    traker = make(halves[0], store)
    for name in ("multiple", "n", "checkpoints"):
        match = f"no option '{name}'; it has multiples, exponents, columns, max_targets"
        with pytest.raises(OptionError, match=match):
            traker.cross_validate(**{name: 1})


def test_checkpoints_have_their_ids_in_messages(store: Path, halves: Any) -> None:
    """They are counted in the order of model_ids, and so need not have those numbers."""
    problem, members = halves
    traker = make(problem, store)
    (store / "3" / "train_inds.json").unlink()
    traker = make(problem, store)
    traker.load_checkpoint(problem.checkpoints[3], train_inds=members[4])
    match = (
        r"^checkpoints 1 and 2 were trained on the same.*Leave one of the two out\. "
        r"Checkpoints are counted from 0 in the model ids \[1, 3, 4\]\.$"
    )
    with pytest.raises(OptionError, match=match):
        traker.cross_validate(model_ids=[1, 3, 4])
    with pytest.raises(OptionError, match=match):
        traker.finalize_scores(model_ids=[1, 3, 4], soft_threshold="auto")
    with pytest.raises(OptionError, match=r"Leave one of the two out\.$"):
        traker.cross_validate(model_ids=range(C))
    (store / "3" / "train_inds.json").unlink()
    traker = make(problem, store)
    traker.load_checkpoint(problem.checkpoints[3], train_inds=range(N))
    notes = traker.cross_validate(model_ids=[1, 2, 3], multiples=GRID).notes
    assert notes[0].startswith("checkpoints 2 saw all examples or none")
    assert notes[-1].endswith("in the model ids [1, 2, 3].")


def test_all_trained_on_everything(tmp_path: Path, halves: Any) -> None:
    problem = halves[0]
    traker = fill((problem, [range(N)] * C), make(problem, tmp_path))
    with pytest.raises(OptionError, match="0 of 5 checkpoints were trained on a part"):
        traker.cross_validate()


def test_without_gradients_or_kernels(tmp_path: Path, halves: Any) -> None:
    problem = halves[0]
    traker = fill(halves, make(problem, tmp_path / "deleted"), del_grads=True)
    with pytest.raises(ModelIDException, match="model id 0 were deleted by del_grads"):
        traker.cross_validate()
    assert_scores(
        torch.from_numpy(traker.finalize_scores() + 0.0),
        problem.expected(sparse(problem), members=masks(halves[1])),
    )
    assert "deleted by del_grads" in traker.dampings["exp"].reason
    kind = BasicSingleBlockScoreComputer
    traker = fill(halves, make(problem, tmp_path / "own", score_computer=kind))
    for call in (traker.cross_validate, traker.uncertainty):
        with pytest.raises(OptionError, match="BasicSingleBlockScoreComputer replaces"):
            call()
    with pytest.raises(OptionError, match="soft_threshold='auto' needs the kernels"):
        traker.finalize_scores(soft_threshold="auto")


# -- the damping ------------------------------------------------------------------------


def chooses(
    monkeypatch: pytest.MonkeyPatch, multiple: float, power: float | None = None
) -> list[int]:
    """Let cross-validation choose something; how many checkpoints each call had."""
    calls: list[int] = []

    def told(data: Any, *args: Any, **options: Any) -> CrossValidation:
        calls.append(len(data))
        found = cross_validate(data, *args, multiples=(1.0,), **options)
        found = replace(found, exponents=options["exponents"][0])
        if power is not None:
            found = replace(found, exponents=(AUTO[0], power))
        return replace(found, multiple=multiple, is_default=False)

    monkeypatch.setattr("trak._validating.cross_validate", told)
    return calls


def test_the_damping_is_chosen(
    store: Path, halves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = chooses(monkeypatch, 7.5)
    traker = make(halves[0], store)
    close(traker.finalize_scores(), expected(halves, 7.5)[2])
    choice = traker.dampings["exp"]
    assert choice.multiple == 7.5
    assert choice.reason.startswith("cross-validation of 5 checkpoints, expected LDS")
    assert "7.5 mean eigenvalues (cross-validation" in str(choice)
    top = traker.top_k(k=3)
    order = np.argsort(-np.array(traker.scores), axis=0, kind="stable")[:3].T
    np.testing.assert_array_equal(top.indices, order)
    assert calls == [C]  # once for both
    again = make(halves[0], store)
    close(again.finalize_scores(), expected(halves, 7.5)[2])
    assert again.dampings == {"exp": choice}
    assert calls == [C]  # and it is on record
    record = json.loads((store / "experiments" / "exp.json").read_text())
    assert record["damping"]["multiple"] == 7.5
    # Of other checkpoints it is another one.
    ids = [0, 2, 4]
    found = again.finalize_scores(model_ids=ids)
    close(found, expected(halves, 7.5, ids=ids)[2])
    assert calls == [C, 3]
    # And so for other exponents.
    other = make(halves[0], store, exponents=(0.25, 1.0))
    close(other.finalize_scores(), expected(halves, 7.5, b=1.0)[2])
    assert calls == [C, 3, C]


def test_it_is_the_one_that_cross_validation_gives(store: Path, halves: Any) -> None:
    traker = make(halves[0], store)
    traker.finalize_scores()
    found = traker.cross_validate()
    assert traker.dampings["exp"].multiple == found.multiple
    assert traker.dampings["exp"].lds == pytest.approx(found.lds)


def test_the_exponent_of_the_result_is_chosen(
    store: Path, halves: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = chooses(monkeypatch, 2.0, power=0.75)
    problem = halves[0]
    traker = make(problem, store)
    wanted = expected(halves, 2.0, b=0.75)
    close(traker.finalize_scores(), wanted[2])
    assert (traker.dampings["exp"].power, traker.dampings["exp"].multiple) == (0.75, 2)
    record = json.loads((store / "experiments" / "exp.json").read_text())
    assert "exponents=(0.25, 0.75)" in record["finalized_with"]
    order = np.argsort(-np.array(traker.scores), axis=0, kind="stable")[:3].T
    np.testing.assert_array_equal(traker.top_k(k=3).indices, order)
    errors = traker.uncertainty(k=3).standard_errors
    pairs = zip(torch.from_numpy(wanted[1]), masks(halves[1]), strict=True)
    q = torch.stack([reference.level(*pair) for pair in pairs])
    close(errors, standard_errors(wanted[0], q.numpy(), exponent=0.75))
    assert calls == [C]
    assert traker.exponents == AUTO  # of every other experiment
    # What was given stays: exponents, or a score computer with its own.
    for options in (
        {"exponents": AUTO},
        {"score_computer": BasicScoreComputer(exponents=AUTO)},
    ):
        given = make(problem, store, **options)
        assert {one.exponents for one in given.cross_validate().candidates} == {AUTO}


@pytest.mark.parametrize("lambda_reg", [0.3, "pinv"])
def test_a_damping_that_was_given_is_kept(
    store: Path, halves: Any, lambda_reg: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = chooses(monkeypatch, 7.5)
    problem = halves[0]
    traker = make(problem, store, lambda_reg=lambda_reg)
    traker.finalize_features()
    scores = torch.from_numpy(traker.finalize_scores() + 0.0)
    known = masks(halves[1])
    wanted = problem.expected(sparse(problem), lambda_reg, members=known)
    assert_scores(scores, wanted, 1e-3)
    assert calls == []
    choice = traker.dampings["exp"]
    assert choice.reason == f"lambda_reg={lambda_reg!r}"
    assert choice.multiple is None
    assert str(choice) == f"damping as given (lambda_reg={lambda_reg!r})"
    # What is compared is not what these scores have.
    note = f"scores of this TRAKer have lambda_reg={lambda_reg!r}, which is none"
    monkeypatch.undo()
    assert any(note in one for one in traker.cross_validate(multiples=GRID).notes)


def test_when_nothing_is_chosen(
    store: Path,
    halves: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = chooses(monkeypatch, 7.5)
    problem, members = halves

    def fresh() -> TRAKer:
        return make(problem, store, logging_level=logging.INFO)

    traker = fresh()

    def reason(**options: Any) -> str:
        traker.finalize_scores(**options)
        choice = traker.dampings["exp"]
        assert choice.multiple == 1
        assert choice.lds is None
        assert choice.reason in caplog.text
        return choice.reason

    assert "2 checkpoints, and 3 choose" in reason(model_ids=[0, 1])
    close(traker.scores, expected(halves, 1.0, ids=[0, 1])[2])
    path = store / "1" / "train_inds.json"
    path.unlink()
    assert "what model id 1 was trained on" in reason()
    fresh().load_checkpoint(problem.checkpoints[1], train_inds=range(N))
    assert "model id 1 was trained on all examples" in reason()
    assert calls == []
    path.unlink()
    fresh().load_checkpoint(problem.checkpoints[1], train_inds=members[0])
    assert "could not tell: checkpoints 0 and 1" in reason()
    assert "one mean eigenvalue is kept as damping: checkpoints 0" in caplog.text
    assert "could not tell" in reason()
    assert calls == [C]


# -- balance ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BasicScoreComputer, BasicSingleBlockScoreComputer])
@pytest.mark.parametrize("ids", [[3], [0, 1]])  # too few to choose a damping
def test_weights_are_balanced_where_it_is_known_what_they_are_of(
    tmp_path: Path, halves: Any, kind: type, ids: list[int]
) -> None:
    problem, members = halves
    is_blocked = kind is BasicScoreComputer
    exponents = AUTO if is_blocked else (0.0, 1.0)
    parts = [[part[i] for i in ids] for part in problem.parts(sparse(problem))]
    found = {}
    for known in (False, True):
        given = make(problem, tmp_path / str(known), score_computer=kind)
        traker = fill(halves, given, known=known)
        shown = [masks(members)[i] for i in ids] if known else None
        wanted = reference.trak(*parts, "auto", exponents, shown)
        scores = np.array(traker.finalize_scores(model_ids=ids))
        close(scores, wanted.numpy(), 1e-4)
        if is_blocked:
            top = traker.top_k(k=3, model_ids=ids)
            close(top.scores, -np.sort(-scores, axis=0)[:3].T, 1e-6)
        found[known] = torch.from_numpy(scores)
    # Only a factor for each example, which is not 1.
    factors = found[True] / found[False]
    torch.testing.assert_close(
        factors, factors[:, :1].expand_as(factors), rtol=1e-3, atol=0.0
    )
    assert (factors[:, 0] - 1).abs().max() > 0.01
    # Said later, it counts from then on.
    later = make(problem, tmp_path / "False", score_computer=kind)
    for i in ids:
        later.load_checkpoint(problem.checkpoints[i], train_inds=members[i])
    again = torch.from_numpy(later.finalize_scores(model_ids=ids) + 0.0)
    torch.testing.assert_close(again, found[True], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("p", [7, 80])
def test_self_influence_is_balanced(tmp_path: Path, halves: Any, p: int) -> None:
    problem = replace(halves[0], targets=halves[0].train, m=N)
    for known in (False, True):
        given = make(problem, tmp_path / str(known), proj_dim=p)
        traker = fill((problem, halves[1]), given, known=known)
        shown = masks(halves[1]) if known else None
        wanted = problem.expected(sparse(problem, p), members=shown).diagonal()
        close(traker.self_influence(), wanted.numpy())


@pytest.mark.parametrize("p", [7, 80])
def test_rows_are_not_balanced(tmp_path: Path, halves: Any, p: int) -> None:
    """Each checkpoint's weights, as they are, take the place of its curvature."""
    problem = halves[0]
    found = []
    for known in (False, True):
        directory = tmp_path / str(known)
        given = make(problem, directory, proj_dim=p, exponents=(0.5, 0.0))
        traker = fill(halves, given, known=known)
        scores = traker.finalize_scores(model_ids=[0, 1])
        found.append((np.array(scores), traker.self_influence()))
    for plain, known in zip(*found, strict=True):
        np.testing.assert_array_equal(known, plain)


# -- thresholds and errors --------------------------------------------------------------


def test_soft_thresholds(store: Path, halves: Any) -> None:
    traker = make(halves[0], store)
    plain = np.array(traker.finalize_scores())
    assert traker.saver.experiments["exp"]["soft_threshold"] is None
    level = float(np.median(abs(plain)))
    close(traker.finalize_scores(soft_threshold=level), soft_threshold(plain, level))
    assert make(halves[0], store).saver.experiments["exp"]["soft_threshold"] == level
    close(traker.finalize_scores(soft_threshold=0.0), plain)


@pytest.mark.parametrize("tile", [1, 1 << 24])
def test_a_chosen_threshold(
    store: Path, halves: Any, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    given = {}

    def told(*args: Any, **options: Any) -> Any:
        given.update(args=args, **options)
        return replace(choose_threshold(*args, **options), share=0.25)

    monkeypatch.setattr(_validating, "choose_threshold", told)
    for module in (_thresholds, _validating):
        monkeypatch.setattr(module, "TILE", tile)
    traker = make(halves[0], store)
    plain = np.array(traker.finalize_scores())
    multiple = traker.dampings["exp"].multiple
    found = traker.finalize_scores(soft_threshold="auto")
    close(found, soft_threshold(plain, threshold_keeping(plain, 0.25)))
    assert (np.array(found) != 0).sum(axis=0).tolist() == [N // 4] * M
    assert traker.saver.experiments["exp"]["soft_threshold"] == "share 0.25"
    kernels, weights, _ = expected(halves, multiple)
    close(given["args"][0].reshape(-1, M), kernels.reshape(-1, M))
    np.testing.assert_allclose(given["args"][1], weights, rtol=1e-5)
    assert given["exponent"] == AUTO[1]


def test_thresholds_that_cannot_be(store: Path, halves: Any, untyped: None) -> None:
    traker = make(halves[0], store)
    for bad in (-1.0, float("nan"), float("inf"), "most", True, False):
        with pytest.raises(OptionError, match="is not a threshold; pass None"):
            traker.finalize_scores(soft_threshold=bad)
    with pytest.raises(OptionError, match="2 checkpoints trained on a part"):
        traker.finalize_scores(model_ids=[0, 1], soft_threshold="auto")
    assert parse_threshold("auto") is None
    assert SoftThreshold().describe() is None


@pytest.mark.parametrize("tile", [1, 200, 1 << 24])
@pytest.mark.parametrize(("p", "known"), [(7, False), (80, True)])
def test_uncertainty(
    tmp_path: Path,
    halves: Any,
    monkeypatch: pytest.MonkeyPatch,
    tile: int,
    p: int,
    known: bool,
) -> None:
    problem = halves[0]
    traker = fill(halves, make(problem, tmp_path, proj_dim=p), known=known)
    monkeypatch.setattr("trak._validating.MIN_TO_CHOOSE", 1 + C)  # a damping of 1
    monkeypatch.setattr("trak._validating.TILE", tile)
    found = traker.uncertainty(k=5, targets=[3, 0, 11])
    features, targets, weights = problem.parts(sparse(problem, p))
    kernels = []
    for x, phi, q in zip(features, targets, weights, strict=True):
        rows = q[:, None] ** AUTO[0] * x
        kernels.append(rows @ reference.ridge_inverse(rows, "auto") @ phi[[3, 0, 11]].T)
    if known:
        pairs = zip(weights, masks(halves[1]), strict=True)
        weights = [reference.level(*pair) for pair in pairs]
    stacked, q = torch.stack(kernels).numpy(), torch.stack(weights).numpy()
    close(found.standard_errors, standard_errors(stacked, q, exponent=AUTO[1]))
    assert found.top_k.k == 5
    assert len(found.top_k.again) == 3
    assert "would come again" in str(found.top_k)


def test_uncertainty_of_what_cannot_be(store: Path, halves: Any) -> None:
    traker = make(halves[0], store)
    with pytest.raises(OptionError, match="pass at least 2"):
        traker.uncertainty(model_ids=[0])
    with pytest.raises(OptionError, match="k must be at least 1"):
        traker.uncertainty(k=0)
    with pytest.raises(OptionError, match="k=60 of n=60"):
        traker.uncertainty(k=60)
    for bad in ([12], [-1], [], [0.5]):
        with pytest.raises(OptionError, match="are not targets of this experiment"):
            parse_targets(bad, M)
    assert parse_targets(None, 3).tolist() == [0, 1, 2]


def test_the_choice_of_a_store_without_one(store: Path, halves: Any) -> None:
    assert make(halves[0], store).dampings == {}
    text = "damping of 1 mean eigenvalues (why)"
    assert str(DampingChoice(1.0, None, "why", None)) == text
    text = "damping of 2 mean eigenvalues, exponent 0.75 of the result (why)"
    assert str(DampingChoice(2.0, 0.75, "why", None)) == text


@pytest.mark.parametrize(
    "change",
    [
        {"multiple": "1"},
        {"multiple": -3.0},
        {"multiple": float("inf")},
        {"reason": None},
        {"more": 1},
    ],
)
def test_a_damaged_choice(store: Path, halves: Any, change: dict[str, Any]) -> None:
    make(halves[0], store).finalize_scores()
    path = store / "experiments" / "exp.json"
    record = json.loads(path.read_text())
    for damping in ({**record["damping"], **change}, [], {"multiple": 1.0}):
        path.write_text(json.dumps({**record, "damping": damping}))
        traker = make(halves[0], store)
        match = r"experiment 'exp' has the damping .* which is none; delete that entry"
        with pytest.raises(StoreCorruptError, match=match):
            _ = traker.dampings
        with pytest.raises(StoreCorruptError, match=match):
            traker.finalize_scores()
    path.write_text(json.dumps({**record, "damping": None}))
    traker = make(halves[0], store)
    traker.finalize_scores()
    assert traker.dampings["exp"].basis == record["damping"]["basis"]
