"""One step on a target's top examples, against the same step by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from trak.errors import (
    GradientError,
    ModelModeError,
    NonFiniteError,
    OptionError,
    TaskError,
)
from trak.evaluation import bootstrap_interval, tail_patch, tail_patch_losses

N, M, K, D, CLASSES, RATE = 20, 5, 3, 4, 3, 0.1


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def data(generator):
    x = torch.randn(N + M, D, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (N + M,), generator=generator)
    return x, y


@pytest.fixture
def model(generator):
    model = torch.nn.Sequential(
        torch.nn.Linear(D, 6),
        torch.nn.Dropout(),
        torch.nn.Tanh(),
        torch.nn.Linear(6, CLASSES),
    ).double()
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(values)
    return model.eval()


@pytest.fixture
def top(generator):
    return torch.randint(N, (M, K), generator=generator)


def loss(model, batch):
    x, y = batch
    return cross_entropy(model(x), y)


def patch(model, data, top, loss=loss, rate=RATE):
    x, y = data
    return tail_patch_losses(
        model,
        loss,
        lambda rows: (x[rows], y[rows]),
        lambda target: (x[N + target : N + target + 1], y[N + target : N + target + 1]),
        top,
        learning_rate=rate,
    )


def reference(model, data, top):
    """Give the losses before and after the step of every target, by functional calls."""
    x, y = data
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def of(weights, rows):
        logits = torch.func.functional_call(model, weights, x[rows])
        return cross_entropy(logits, y[rows])

    before, after = [], []
    for target, rows in enumerate(top.tolist()):
        slopes = torch.func.grad(of)(weights, rows)
        moved = {name: w - RATE * slopes[name] for name, w in weights.items()}
        before.append(of(weights, [N + target]))
        after.append(of(moved, [N + target]))
    return torch.stack(before).numpy(), torch.stack(after).numpy()


@pytest.mark.parametrize("as_type", [lambda x: x, lambda x: x.int().numpy()])
def test_losses_match_functional_steps(model, data, top, as_type):
    before, after = patch(model, data, as_type(top))
    expected = reference(model, data, top)
    torch.testing.assert_close(before, expected[0])
    torch.testing.assert_close(after, expected[1])


@pytest.mark.parametrize("m", [0, 1, 3])
def test_few_targets(model, data, top, m):
    before, after = patch(model, data, top[:m])
    torch.testing.assert_close(before, patch(model, data, top)[0][:m])
    torch.testing.assert_close(after, patch(model, data, top)[1][:m])


def test_the_model_is_as_it_was(model, data, top):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    own = torch.ones_like(model[0].weight)
    model[0].weight.grad = own
    patch(model, data, top)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert model[0].weight.grad is own
    assert (own == 1).all()
    assert model[3].weight.grad is None

    calls = []

    def failing(model, batch):
        calls.append(None)
        if len(calls) == 3:  # after the step
            raise RuntimeError("out of memory")
        return loss(model, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        patch(model, data, top, failing)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_frozen_and_unused_parameters_stay(model, data, top):
    model[0].requires_grad_(False)
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(2)))
    seen = []

    def watching(model, batch):
        seen.append((model[0].weight.clone(), model[3].weight.detach().clone()))
        return loss(model, batch)

    before, after = patch(model, data, top[:1], watching)
    assert before[0] != after[0]
    assert (seen[0][0] == seen[2][0]).all()
    assert (seen[0][1] != seen[2][1]).any()


def test_a_step_on_the_target_itself_helps(model, data):
    x, y = data
    before, after = tail_patch_losses(
        model,
        loss,
        lambda rows: (x[rows], y[rows]),
        lambda target: (x[target : target + 1], y[target : target + 1]),
        np.arange(N)[:, None],
        learning_rate=0.01,
    )
    found = tail_patch(before, after)
    assert (found.per_target > 0).all()
    assert found.interval[0] > 0


def test_works_where_gradients_are_off(model, data, top):
    with torch.no_grad():
        before, after = patch(model, data, top)
    torch.testing.assert_close((before, after), reference(model, data, top))


def test_training_mode_is_refused(model, data, top):
    model[1].train()
    with pytest.raises(ModelModeError, match=r"call model\.eval\(\) first"):
        patch(model, data, top)


def test_a_model_of_frozen_parameters_is_refused(model, data, top):
    with pytest.raises(GradientError, match="no parameter of the model requires"):
        patch(model.requires_grad_(False), data, top)


def test_losses_that_do_not_depend_on_the_model_are_refused(model, data, top):
    def detached(model, batch):
        return loss(model, batch).detach()

    with pytest.raises(GradientError, match="on the top examples of target 0 has no"):
        patch(model, data, top, detached)


def test_a_loss_is_one_number(model, data, top):
    def each(model, batch):
        x, y = batch
        return cross_entropy(model(x), y, reduction="none")

    with pytest.raises(
        TaskError, match=r"shape \(3,\) on the top examples of target 0"
    ):
        patch(model, data, top, each)


def test_nonfinite_losses_name_the_target(model, data, top):
    with pytest.raises(
        NonFiniteError, match="on target 0 after a step of learn"
    ) as err:
        patch(model, data, top, lambda m, b: loss(m, b) * 1e300, rate=1e200)
    assert err.value.index == 0
    data[0][top[2, 1]] = torch.nan
    clean = [i for i in range(M) if top[2, 1] not in top[i]]
    rows = torch.cat([top[clean[:1]], top[2:3]])
    with pytest.raises(NonFiniteError, match="nan on the top examples of target 1"):
        patch(model, data, rows)
    data[0][N] = torch.nan
    with pytest.raises(NonFiniteError, match="nan on target 0; check the batch"):
        patch(model, data, top)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_has_a_length(model, data, top, rate):
    with pytest.raises(OptionError, match="learning_rate="):
        patch(model, data, top, rate=rate)


@pytest.mark.parametrize("top", [np.zeros(3, int), np.zeros((3, 0), int), np.eye(3)])
def test_top_is_indices(model, data, untyped, top):
    with pytest.raises(OptionError, match="top has shape"):
        patch(model, data, top)


def test_negative_indices_do_not_count_from_the_end(model, data, top):
    top[1, 0] = -3
    with pytest.raises(OptionError, match="top has the index -3"):
        patch(model, data, top)


# -- the metric ------------------------------------------------------------------------


def test_fall_of_the_loss_and_its_interval():
    rng = np.random.default_rng(0)
    before, after = rng.random(M), rng.random(M)
    found = tail_patch(before, after, n_bootstrap=50, seed=2)
    torch.testing.assert_close(found.per_target, before - after)
    assert found.mean == pytest.approx((before - after).mean())
    want = bootstrap_interval(before - after, n_bootstrap=50, seed=2)
    assert found.interval == want
    assert str(found).startswith("tail patch ")
    tensors = torch.from_numpy(before), torch.from_numpy(after)
    assert tail_patch(*tensors).mean == found.mean


def test_steps_on_single_examples_are_averaged():
    rng = np.random.default_rng(0)
    before, after = rng.random(M), rng.random((K, M))
    found = tail_patch(before, after)
    torch.testing.assert_close(found.per_target, before - after.mean(axis=0))


def test_no_change_is_zero():
    found = tail_patch(np.ones(M), np.ones(M))
    assert (found.mean, found.interval) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_values_name_the_target(bad):
    values = np.zeros(M)
    values[3] = bad
    with pytest.raises(
        NonFiniteError, match=r"before\[3\] is .* a smaller step"
    ) as err:
        tail_patch(values, np.zeros(M))
    assert err.value.index == 3
    with pytest.raises(NonFiniteError, match=r"after\[0, 3\] is"):
        tail_patch(np.zeros(M), values)


@pytest.mark.parametrize(
    ("before", "after"),
    [((M,), (M + 1,)), ((1, M), (M,)), ((M,), (0, M)), ((M,), (1, 1, M))],
)
def test_shapes_must_agree(before, after):
    with pytest.raises(OptionError, match=r"before has shape .* and after"):
        tail_patch(np.zeros(before), np.zeros(after))


def test_nothing_to_average():
    with pytest.raises(OptionError, match=r"no targets \(m=0\) to average tail patch"):
        tail_patch(np.zeros(0), np.zeros(0))
