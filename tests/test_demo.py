"""The demo on the digits, at a size that takes seconds; once in full."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from trak.evaluation import bootstrap_interval

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def demo():
    """The demo's module; its siblings are found as when it runs as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setenv("OMP_WAIT_POLICY", "passive")  # so that importing sets nothing
        yield importlib.import_module("digits")


@pytest.fixture(scope="module")
def plan(demo):
    return demo.Plan(
        n_train=300,
        n_test=30,
        epochs=3,
        n_checkpoints=2,
        n_subsets=4,
        n_repeats=2,
        n_removals=2,
        n_removed=10,
        n_removal_repeats=2,
        n_pictured=3,
    )


@pytest.fixture(scope="module")
def outcome(demo, plan):
    return demo.run(plan)


def test_stacked_training_is_training_one_by_one(demo):
    model = demo.digits_model
    data = model.load(200, 20)
    subsets = [np.arange(100), np.arange(100, 200)]
    together = model.train(data.train, subsets, [3, 4], epochs=2)
    alone = [
        model.train(data.train, [subset], [seed], epochs=2)[0]
        for subset, seed in zip(subsets, [3, 4], strict=True)
    ]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_training_agrees_with_the_optimizer_of_torch(demo):
    model = demo.digits_model
    images, labels = model.load(64, 20).train
    (weights,) = model.train((images, labels), [np.arange(64)], [5], epochs=4)
    plain = model.make_model(5)
    sgd = torch.optim.SGD(
        plain.parameters(),
        lr=model.LEARNING_RATE,
        momentum=model.MOMENTUM,
        weight_decay=model.WEIGHT_DECAY,
        nesterov=True,
    )
    for step in range(4):
        # One batch of the whole set an epoch, so the order does not matter.
        sgd.param_groups[0]["lr"] = model.LEARNING_RATE * model._triangle(
            (step + 1) / 4
        )
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(plain(images), labels).backward()
        sgd.step()
    expected = {name: value.detach() for name, value in plain.named_parameters()}
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-4)


def test_margins_are_log_odds_of_the_label(demo):
    model = demo.digits_model
    images, labels = model.load(200, 20).test
    network = model.make_model(1)
    p = network(images).softmax(dim=1).gather(1, labels[:, None])[:, 0].detach()
    margins = model.margins([dict(network.named_parameters())], (images, labels))
    torch.testing.assert_close(margins[0], (p / (1 - p)).log(), atol=1e-5, rtol=1e-5)


def test_making_a_model_leaves_the_global_generator_alone(demo):
    before = torch.random.get_rng_state()
    demo.digits_model.make_model(7)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_train_and_test_digits_are_apart(demo):
    data = demo.digits_model.load()
    whole = demo.digits_model.load(1797, 0)
    both = torch.cat([data.train[0], data.test[0]])
    torch.testing.assert_close(both, whole.train[0])


def test_every_method_is_scored_and_checked(demo, plan, outcome):
    results, data = outcome
    assert results.scores.every.shape == (plan.n_train, plan.n_test)
    assert np.isfinite(results.scores.every).all()
    names = {demo.TRAK.name, demo.PIXELS, demo.DOT_PRODUCT.name}
    assert set(results.table) == names | {method.name for method in demo.UNDAMPED}
    for pair in results.table.values():
        assert [r.n_targets for r in pair] == [plan.n_test] * 2
    assert results.removal.by_trak.shape == (plan.n_removals,)
    assert len(data.train[0]) == plan.n_train


def test_same_seeds_same_results(demo, plan, outcome):
    again, _ = demo.run(plan)
    torch.testing.assert_close(again.scores.every, outcome[0].scores.every)


def test_results_are_written(demo, plan, outcome, tmp_path):
    results, data = outcome
    path = demo.save(tmp_path / "new", plan, results, data)
    assert path.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((path.parent / "results.json").read_text())
    assert numbers["lds"].keys() == results.table.keys()
    written = np.load(path.parent / "scores.npy")
    torch.testing.assert_close(written, results.scores.every)
    text = (path.parent / "report.txt").read_text()
    assert all(name in text for name in results.table)
    assert max(map(len, text.splitlines())) <= demo.WIDTH


def test_pictured_digits_are_of_different_classes(demo):
    labels = np.array([0, 0, 1, 1, 2])
    scores = np.array([[0.1, -0.5, 0.2, 0.0, 0.3]])
    assert demo.picture.pick_targets(labels, scores, 2) == [1, 4]


@pytest.mark.slow
def test_the_demo_shows_what_it_claims(demo):
    results, _ = demo.run(demo.Plan())
    ours = results.table[demo.TRAK.name]
    undamped = [results.table[method.name] for method in demo.UNDAMPED]
    for column, times in ((0, 2.0), (1, 1.4)):
        best = max(pair[column].mean for pair in undamped)
        assert ours[column].mean >= times * best
    low, high = results.scores.expected.interval
    assert low < ours[1].mean < high
    assert bootstrap_interval(results.removal.by_trak)[0] > 0
    assert results.read_right.mean() > 0.94
