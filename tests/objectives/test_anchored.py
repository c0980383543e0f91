"""Last layers refitted without group labels: AFR and SELF."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import fairline as fl
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.objectives import anchored, last_layer
from fairline.objectives.anchored import anchored_fit, class_balanced
from fairline.objectives.last_layer import half_of_each_group, output_layer
from tests.conftest import make_data


def written_out(features, labels, weights, weight, bias, ridge):
    """The minimum of the weighted loss and the ridge, a sample at a time, by a general solver without gradients."""
    classes, width = weight.shape

    def loss(theta):
        w, b = theta[: classes * width].reshape(classes, width), theta[classes * width :]
        value = ridge * (((w - weight) ** 2).sum() + ((b - bias) ** 2).sum())
        for x, y, mu in zip(features, labels, weights, strict=True):
            z = w @ x + b
            value += mu * (np.log(np.exp(z - z.max()).sum()) + z.max() - z[y])
        return value

    found = minimize(loss, np.concatenate([weight.ravel(), bias]), method="L-BFGS-B", options={"ftol": 1e-14})
    return found.x[: classes * width].reshape(classes, width), found.x[classes * width :]


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_fit_is_the_minimum_of_the_formula(ridge):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (30,), generator=generator)
    weights = torch.rand(30, generator=generator, dtype=torch.float64)
    weights /= weights.sum()
    weight, bias = torch.randn(3, 3, generator=generator).double(), torch.randn(3, generator=generator).double()
    mine = anchored_fit(features, labels, weights, weight, bias, ridge)
    theirs = written_out(*(t.numpy() for t in (features, labels, weights, weight, bias)), ridge)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-4)
    # At the minimum the weighted residuals are balanced by the pull of the ridge.
    residual = (features @ mine[0].T + mine[1]).softmax(1) - torch.nn.functional.one_hot(labels, 3)
    pull = (weights[:, None] * residual).T @ features + 2 * ridge * (mine[0] - weight)
    torch.testing.assert_close(pull, torch.zeros_like(pull), atol=1e-6, rtol=0)


def test_a_heavy_ridge_changes_nothing(parts, trained):
    before = copy.deepcopy(trained.state_dict())
    fl.reweight_last_layer(trained, parts[1], gamma=2.0, ridge=1e8)
    fl.finetune_last_layer(trained, parts[1], points=20, ridge=1e8)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=0)


def refitted(network, data, weights, ridge):
    """What a network's last layer must become under these weights."""
    layer, features, _ = output_layer(network, data)
    start = layer.weight.detach().double(), layer.bias.detach().double()
    return anchored_fit(torch.from_numpy(features), data.labels, weights / weights.sum(), *start, ridge)


def test_afr_weighs_by_class_and_by_the_probability_of_the_label(parts, trained):
    val = parts[1]
    p = fl.predict(trained, val).double().softmax(1)
    n = torch.bincount(val.labels).tolist()
    weights = torch.tensor(
        [math.exp(-3.0 * float(row[y])) / n[y] for row, y in zip(p, val.labels.tolist(), strict=True)],
        dtype=torch.float64,
    )
    weight, bias = refitted(trained, val, weights, 0.05)
    said = fl.reweight_last_layer(trained, val, gamma=3.0, ridge=0.05)
    assert said == {"strength": 3.0, "worst_group_accuracy": {}, "accuracy": {}}
    layer = output_layer(trained, val)[0]
    torch.testing.assert_close(layer.weight.double(), weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(layer.bias.double(), bias, atol=1e-4, rtol=0)


@pytest.mark.parametrize("disagree", [False, True])
def test_self_takes_the_points_that_are_furthest(parts, trained, disagree):
    val = parts[1]
    other = copy.deepcopy(trained)
    with torch.no_grad():
        [m for m in other.modules() if isinstance(m, nn.Linear)][-1].bias += torch.tensor([2.0, 0.0, -2.0])
    own, theirs = (fl.predict(network, val).double().softmax(1) for network in (trained, other))
    divergence = (theirs * (theirs / own).log()).sum(1)
    wrong = -own[torch.arange(len(val)), val.labels].log()
    chosen = sorted(range(len(val)), key=lambda i: -float((divergence if disagree else wrong)[i]))[:15]
    weights = torch.zeros(len(val), dtype=torch.float64)
    weights[chosen] = class_balanced(val.labels[chosen])
    weight, _ = refitted(trained, val, weights, 0.02)
    fl.finetune_last_layer(trained, val, reference=other if disagree else None, points=15, ridge=0.02)
    torch.testing.assert_close(output_layer(trained, val)[0].weight.double(), weight, atol=1e-4, rtol=0)


def shortcut(n, crossed, seed):
    """Two labels, and two groups that share features with them: most of a label is of one group."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    odd = torch.rand(n, generator=generator) < crossed
    spurious = torch.where(odd, 1 - labels, labels)
    images = torch.full((n, 1, 1, 2), 128.0)
    images[:, 0, 0, 0] += (2.0 * labels - 1) * 20 + 20 * torch.randn(n, generator=generator)
    images[:, 0, 0, 1] += (2.0 * spurious - 1) * 40 + 10 * torch.randn(n, generator=generator)
    images = images.clamp(0, 255).to(torch.uint8)
    return fl.GroupedData(images, labels, odd.long(), ("a", "b"), ("as most", "crossed"), name="shortcut")


class Linear(nn.Module):
    """A network that looks at the shortcut alone, so that the crossed group is wrong."""

    def __init__(self, scale):
        super().__init__()
        self.out = nn.Linear(2, 2)
        with torch.no_grad():
            self.out.weight.copy_(torch.tensor([[0.0, -scale], [0.0, scale]]))
            self.out.bias.zero_()

    def forward(self, x):
        return self.out(x.flatten(1))


@pytest.mark.parametrize("how", ["afr", "self", "self, two networks"])
def test_they_find_a_group_that_is_not_named(how):
    """The crossed group is no class and is not told: one group holds all, and the strength is given."""
    held_out, test = shortcut(1500, 0.1, 1), shortcut(1500, 0.5, 2)
    unnamed = fl.GroupedData(
        held_out.images, held_out.labels, torch.zeros_like(held_out.groups), held_out.class_names, ("all",)
    )
    network = Linear(2.0)
    before = fl.audit(network, test).by_group["accuracy"]
    if how == "afr":
        fl.reweight_last_layer(network, unnamed, gamma=2.0)
    else:
        milder = copy.deepcopy(network)
        with torch.no_grad():
            milder.out.weight.copy_(torch.tensor([[-1.0, -0.3], [1.0, 0.3]]))
        reference = milder if how.endswith("networks") else None
        fl.finetune_last_layer(network, unnamed, reference=reference, points=400)
    after = fl.audit(network, test).by_group["accuracy"]
    assert before["crossed"] < 0.2
    assert after["crossed"] > before["crossed"] + 0.3
    assert after["as most"] > 0.6


def test_the_strength_is_that_of_the_best_worst_group(parts, trained):
    first, second = copy.deepcopy(trained), copy.deepcopy(trained)
    said = fl.reweight_last_layer(first, parts[1])
    assert len(said["worst_group_accuracy"]) > 2
    assert said["worst_group_accuracy"][said["strength"]] == max(said["worst_group_accuracy"].values())
    fl.reweight_last_layer(second, parts[1], gamma=said["strength"])
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert fl.finetune_last_layer(first, parts[1])["strength"] in (20, 100, 500)
    alone = make_data(200, classes=3, groups=1)
    assert fl.reweight_last_layer(second, alone)["worst_group_accuracy"]


WAYS = {
    "dfr": lambda network, val, **given: fl.retrain_last_layer(network, val, repeats=1, **given),
    "afr": fl.reweight_last_layer,
    "self": fl.finetune_last_layer,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("within", [None, 0.0, 1.0, 5.0, 30.0])
def test_a_strength_costs_no_more_overall_than_it_may(parts, trained, way, within):
    val = parts[1]
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    groups = val.groups.numpy()
    second = ~half_of_each_group(groups, np.random.default_rng(0))
    right = (predict(trained, val).argmax(1) == val.labels).numpy()[second].mean()
    said = WAYS[way](trained, val, within=within)
    worst, overall = said["worst_group_accuracy"], said["accuracy"]
    allowed = [s for s in worst if within is None or 100 * (right - overall[s]) <= within + 1e-9]
    assert set(worst) == set(overall)
    if not allowed:
        assert said["strength"] is None
        assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    else:
        best = [s for s in allowed if worst[s] == max(worst[s] for s in allowed)]
        assert said["strength"] == (min(best) if way == "dfr" else best[0])


@pytest.mark.parametrize("way", WAYS)
def test_where_no_strength_is_within_the_layer_stays(parts, trained, way, monkeypatch):
    """Every fit names the first class."""
    first = np.zeros((3, output_layer(trained, parts[1])[0].in_features)), np.array([1.0, 0.0, 0.0])
    monkeypatch.setattr(last_layer, "_fit", lambda *given: first)
    monkeypatch.setattr(anchored, "anchored_fit", lambda *given: tuple(map(torch.from_numpy, first)))
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    said = WAYS[way](trained, parts[1], within=0)
    assert said["strength"] is None
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    with pytest.raises(FairlineError, match="percentage points, 0 or more, not -1"):
        WAYS[way](trained, parts[1], within=-1)
    assert WAYS[way](trained, parts[1])["strength"] is not None
    assert not output_layer(trained, parts[1])[0].weight.any()


def test_what_cannot_be_refitted(parts, trained):
    val = parts[1]
    with pytest.raises(FairlineError, match=r"AFR's γ is a finite number, .* not nan"):
        fl.reweight_last_layer(trained, val, gamma=math.nan)
    with pytest.raises(FairlineError, match="must be positive and finite, not 0"):
        fl.reweight_last_layer(trained, val, gamma=1.0, ridge=0)
    for points in (math.nan, math.inf, 1.5, "many", True):
        with pytest.raises(FairlineError, match=rf"^SELF('s| takes a) number of points.* not {points}\.$"):
            fl.finetune_last_layer(trained, val, points=points)
    with pytest.raises(FairlineError, match=r"AFR's γ is a finite number, .* not some"):
        fl.reweight_last_layer(trained, val, gamma="some")
    with pytest.raises(FairlineError, match="one point at least, not 0"):
        fl.finetune_last_layer(trained, val, points=0)
    with pytest.raises(FairlineError, match="3 and 4 outputs"):
        fl.finetune_last_layer(trained, val, reference=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), points=5)
    few = val.select(torch.cat([torch.nonzero(val.groups != 2).flatten(), torch.nonzero(val.groups == 2)[0]]))
    with pytest.raises(FairlineError, match="“class 2” has one held-out image"):
        fl.finetune_last_layer(trained, few)
