"""How every line scores: what is done for each more model, and for each number of them.

A line is a generator of steps. What runs between steps is work that larger numbers build
on; what a step's ``scores`` runs is for its own number of models alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accuracy_alike import alike
from accuracy_arithmetic import Spectrum, undamped, weighted
from accuracy_banks import given
from accuracy_models import train
from accuracy_plan import EXPONENTS, MULTIPLES
from accuracy_setting import EXPERIMENT, Setting
from accuracy_steps import Lines, Step

from trak import methods
from trak._members import balanced
from trak.evaluation import CheckpointData, GroundTruth, cross_validate


def training(setting: Setting) -> Lines:
    """Train two models: the first takes longer, with first calls of every operation."""
    for count in (1, 2):
        setting.truth.train(np.flatnonzero(setting.halves[count - 1]), seed=count - 1)
        yield Step(count, trained=0)


def features(setting: Setting) -> Lines:
    traker = setting.open()
    for c in range(max(setting.line.counts)):
        setting.featurize(traker, c)
        yield Step(c + 1)


# -- without a model ------------------------------------------------------------------


def random(setting: Setting) -> Lines:
    shape = setting.n, setting.m
    yield Step(0, lambda: np.random.default_rng(0).standard_normal(shape))


def similarity(setting: Setting) -> Lines:
    found = alike(setting)
    yield Step(0, lambda: found)


# -- projected gradients --------------------------------------------------------------


def trak(setting: Setting) -> Lines:
    options = dict(setting.line.options)
    if "exponents" in options:
        options["exponents"] = tuple(options["exponents"])
    traker = setting.open(**options)
    for c in range(max(setting.line.counts)):
        traker.finalize_features([c])
        if c + 1 in setting.line.counts:
            ids = list(range(c + 1))
            yield Step(
                c + 1,
                lambda ids=ids: np.array(traker.finalize_scores(EXPERIMENT, ids)),
                setting.spent(c + 1),
            )


def grid(setting: Setting) -> Lines:
    """Score with every damping, and with what cross-validation of checkpoints chooses."""
    traker = setting.open()
    powers = list(dict.fromkeys(a for a, _ in EXPONENTS))
    sums: dict[tuple[float, float], Any] = {}
    spectra: dict[tuple[float, int], Spectrum] = {}
    known: list[CheckpointData] = []
    default = tuple(traker.exponents)
    pairs = [default, *(pair for pair in EXPONENTS if pair != default)]
    for c in range(max(setting.line.counts)):
        known.append(_record(setting, traker, c))
        rows, targets, weights = setting.rows(traker, c)
        for a in powers:
            spectra[a, c] = Spectrum(rows, targets, weights, a)
            for multiple in MULTIPLES:
                part = spectra[a, c].kernel(multiple)
                sums[a, multiple] = sums.get((a, multiple), 0) + part
        if c + 1 not in setting.line.counts:
            continue
        all_weights = [balanced(one.out_to_loss, one.members) for one in known]
        for a, b in pairs:
            for multiple in MULTIPLES:
                scores = weighted(sums[a, multiple], all_weights, b)
                label = f"{a:g}_{b:g}_{multiple:g}"
                yield Step(c + 1, lambda scores=scores: scores, label=label)
        if c + 1 >= 2:
            cheap = [pair for pair in pairs if pair[0] == default[0]]
            yield _chosen(setting, known, spectra, cheap)


def sizes(setting: Setting) -> Lines:
    """Score with columns of one sketch, at one mean eigenvalue."""
    traker = setting.open()
    a, b = traker.exponents
    sums: dict[int, Any] = {}
    weights = []
    for c in range(max(setting.line.counts)):
        rows, targets, own = setting.rows(traker, c)
        weights.append(balanced(own, setting.halves[c]))
        for p in setting.line.options["sizes"]:
            width = p or rows.shape[1]
            spectrum = Spectrum(rows[:, :width], targets[:, :width], own, a)
            sums[p] = sums.get(p, 0) + spectrum.kernel(1.0)
            if c + 1 in setting.line.counts:
                scores = weighted(sums[p], weights, b)
                yield Step(c + 1, lambda scores=scores: scores, label=f"p={p}")


def _record(setting: Setting, traker: Any, c: int) -> CheckpointData:
    rows, targets, weights = setting.rows(traker, c)
    model = setting.truth.model
    model.load_state_dict(setting.checkpoint(c))
    outputs = setting.truth.outputs(model.eval())[: setting.m]
    return CheckpointData(
        train=lambda low, high: rows[low:high].clone(),
        targets=lambda low, high: targets[low:high].clone(),
        out_to_loss=weights,
        outputs=outputs,
        members=setting.halves[c],
    )


def _chosen(
    setting: Setting,
    known: list[CheckpointData],
    spectra: dict[tuple[float, int], Spectrum],
    pairs: list[tuple[float, float]],
) -> Step:
    count, p = len(known), known[0].train(0, 1).shape[1]
    found: dict[str, Any] = {}

    def scores() -> np.ndarray:
        result = cross_validate(
            known, setting.n, setting.m, p, multiples=MULTIPLES, exponents=pairs
        )
        found.update(result.to_dict())
        found.pop("per_target"), found.pop("targets")
        a, b = result.exponents
        total = sum(spectra[a, c].kernel(result.multiple) for c in range(count))
        weights = [balanced(one.out_to_loss, one.members) for one in known]
        return weighted(total, weights, b)

    return Step(count, scores, setting.spent(count), notes=found)


def arithmetic(setting: Setting) -> Lines:
    """Do what 0.3.2 does with our gradients, and columns of one sketch for each size."""
    traker, p = setting.open(), setting.line.options["p"]
    total, weights = 0, []
    for c in range(max(setting.line.counts)):
        rows, targets, own = setting.rows(traker, c)
        if setting.line.needs == "wide":  # sparse; a dense projection of it is dense
            generator = torch.Generator().manual_seed(c)
            dense = torch.randn(rows.shape[1], p, generator=generator)
            rows, targets = rows @ dense, targets @ dense
        weights.append(own)
        total = total + undamped(rows[:, :p], targets[:, :p])
        if c + 1 in setting.line.counts:
            mean = np.mean(weights, axis=0)[:, None]
            scores = total.numpy() * mean / (c + 1)
            yield Step(c + 1, lambda scores=scores: scores, setting.spent(c + 1))


def dot(setting: Setting) -> Lines:
    yield from _products(setting, cosine=False)


def cosine(setting: Setting) -> Lines:
    yield from _products(setting, cosine=True)


def _products(setting: Setting, *, cosine: bool) -> Lines:
    """Compare stored gradients, as ``GradientDot`` and ``GradientCosine`` do."""
    traker = setting.open()
    total: Any = 0
    for c in range(max(setting.line.counts)):
        rows, targets, weights = setting.rows(traker, c)
        if cosine:
            rows, targets = (torch.nn.functional.normalize(x) for x in (rows, targets))
            weights = np.sign(weights)
        total = total + (rows @ targets.T).numpy() * weights[:, None]
        if c + 1 in setting.line.counts:
            scores = total / (c + 1)
            yield Step(c + 1, lambda scores=scores: scores, setting.spent(c + 1))


# -- gradients of training runs -------------------------------------------------------


def tracin(setting: Setting) -> Lines:
    yield from _along(setting, methods.TracIn)


def gas(setting: Setting) -> Lines:
    yield from _along(setting, methods.GAS)


def _along(setting: Setting, kind: Any, most: int = 10) -> Lines:
    """Follow training runs, each a checkpoint of the others' with its epochs kept."""
    total: Any = 0
    for run in range(max(setting.line.counts)):
        states, rates = _trained_again(setting, run, most)
        save_dir = setting.work / "stores" / f"{setting.truth.name}-{kind.name}-{run}"
        shared = methods.ProjectedGradients(
            setting.truth.model,
            setting.truth.task,
            states,
            setting.n,
            save_dir=save_dir,
            proj_dim=8192,
            logging_level=100,
        )
        method = kind(shared, rates).fit(setting.train)
        total = total + method.score(setting.targets)
        shutil.rmtree(save_dir, ignore_errors=True)
        if run + 1 in setting.line.counts:
            # Training was part of the line's own work: none is added.
            yield Step(run + 1, lambda total=total: total, trained=0)


def _trained_again(setting: Setting, run: int, most: int) -> tuple[list, list[float]]:
    truth, states = setting.truth, []
    epochs = truth.recipe.epochs
    chosen = {round(e) for e in np.linspace(0, epochs - 1, min(most, epochs))}

    def keep(epoch: int, model: torch.nn.Module) -> None:
        if epoch in chosen:
            states.append({k: v.clone() for k, v in model.state_dict().items()})

    indices = np.flatnonzero(setting.halves[run])
    data = truth.material
    train(truth.build, truth.loss, data, indices, run, truth.recipe, keep)
    middle = [(epoch + 0.5) / epochs for epoch in sorted(chosen)]
    return states, [truth.recipe.rate * min(x / 0.2, (1 - x) / 0.8) for x in middle]


# -- methods of the library that are means over checkpoints ---------------------------


def _means(setting: Setting, make: Callable[..., Any]) -> Lines:
    total: Any = 0
    for c in range(max(setting.line.counts)):
        method = make(setting.checkpoint(c), setting.halves[c])
        total = total + method.fit(setting.train).score(setting.targets)
        if c + 1 in setting.line.counts:
            scores = total / (c + 1)
            yield Step(c + 1, lambda scores=scores: scores)


def representations(setting: Setting) -> Lines:
    def call(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        ids, kinds, mask, _ = batch
        states = model.bert(ids, token_type_ids=kinds, attention_mask=mask)
        return states.pooler_output

    layer = call if setting.truth.task == "text_classification" else None
    yield from _means(
        setting,
        lambda checkpoint, _: methods.RepresentationSimilarity(
            setting.truth.model, [checkpoint], layer, **setting.line.options
        ),
    )


def _curvature(setting: Setting, kind: Any) -> Lines:
    task = setting.truth.task
    yield from _means(
        setting,
        lambda checkpoint, half: kind(
            setting.truth.model,
            task,
            [checkpoint],
            train_inds=[half],
            **setting.line.options,
        ),
    )


def ekfac(setting: Setting) -> Lines:
    yield from _curvature(setting, methods.EKFAC)


def arnoldi(setting: Setting) -> Lines:
    yield from _curvature(setting, methods.Arnoldi)


def influence(setting: Setting) -> Lines:
    yield from _curvature(setting, methods.InfluenceFunction)


# -- methods that retrain -------------------------------------------------------------


def empirical(setting: Setting) -> Lines:
    yield from _of_bank(setting, methods.EmpiricalInfluence)


def datamodels(setting: Setting) -> Lines:
    yield from _of_bank(setting, methods.Datamodels)


def _of_bank(setting: Setting, kind: Any) -> Lines:
    bank = given(setting.truth, setting.folder, as_stored=setting.as_stored)
    for count in setting.line.counts:
        if count <= bank.n_subsets:
            part = GroundTruth(bank.masks[:count], bank.outputs[:count])
            yield Step(count, lambda part=part: kind(part).score(setting.targets))
