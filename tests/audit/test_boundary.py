from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fairline as fl
from fairline.audit.boundary import deepfool, first_order_distances, proximities, softmax_margins
from fairline.audit.functional import Functional
from fairline.data import GroupedData
from fairline.errors import FairlineError
from tests.audit.networks import KINDS, network, seen, small_data


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 6))
def test_margin_by_sorting(seed, classes):
    logits = 3 * torch.randn(20, classes, generator=torch.Generator().manual_seed(seed))
    p = np.sort(logits.double().softmax(1).numpy(), axis=1)
    np.testing.assert_allclose(softmax_margins(logits), p[:, -1] - p[:, -2], rtol=1e-12)


def test_proximity_in_closed_form():
    logits = torch.tensor([[0.0, 0.0], [0.0, np.log(3)], [2.0, 2 - np.log(3)]])
    np.testing.assert_allclose(proximities(logits), [0.25, 3 / 16, 3 / 16], rtol=1e-6)


def linear_distances(model: nn.Module, data: GroupedData) -> torch.Tensor:
    """Exact distances for logits W·x + b, in intensities: the nearest of the hyperplanes of all other classes."""
    layer = model[1]
    images, _ = seen(data, torch.arange(len(data)))
    std = torch.tensor(data.normalization()[1], dtype=torch.float64).repeat_interleave(16)
    weight, logits = layer.weight.detach() / std, model(images).detach()
    distances = []
    for z in logits:
        c = int(z.argmax())
        others = [k for k in range(len(z)) if k != c]
        distances.append(min(float((z[c] - z[k]) / (weight[c] - weight[k]).norm()) for k in others))
    return torch.tensor(distances, dtype=torch.float64)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_linear_classifier_exactly(classes):
    data = small_data(50, classes=classes, groups=2)
    model = network("linear", classes)
    functional = Functional(model, data, batch_size=20)
    expected = linear_distances(model, data)
    torch.testing.assert_close(first_order_distances(functional), expected, rtol=1e-4, atol=1e-9)
    found = deepfool(functional)
    torch.testing.assert_close(found.distance, expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.first_order, expected, rtol=1e-4, atol=1e-9)
    assert (found.steps == 1).all()
    single = Functional(network("linear", classes, dtype=torch.float32), data)
    torch.testing.assert_close(deepfool(single).distance.double(), expected, rtol=1e-2, atol=1e-5)


class Sphere(nn.Module):
    """Class 1 outside a sphere of radius r around a grey image: two logits, |x|² and r²."""

    def __init__(self, radius: float):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.radius = radius

    def forward(self, x):
        square = self.scale * x.flatten(1).square().sum(1)
        return torch.stack([torch.full_like(square, self.radius**2), square], dim=1)


def test_a_sphere_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 4, 4), generator=generator).to(torch.uint8)
    labels = torch.arange(40) % 2
    std = 0.5
    data = GroupedData(images, labels, labels, ("in", "out"), ("in", "out"), mean=(0.5,), std=(std,))
    x = seen(data, torch.arange(40))[0].flatten(1)
    radius = float(x.norm(dim=1).median()) * 1.01
    found = deepfool(Functional(Sphere(radius), data))
    expected = (x.norm(dim=1) - radius).abs() * std
    torch.testing.assert_close(found.distance, expected, rtol=1e-3, atol=1e-6)
    outside = x.norm(dim=1) > radius
    promise = (x.norm(dim=1).square() - radius**2).abs() / (2 * x.norm(dim=1)) * std
    torch.testing.assert_close(found.first_order, promise, rtol=1e-4, atol=1e-9)
    # (|x|² − r²)/2|x| is less than |x| − r outside, and more in size inside.
    assert (found.first_order[outside] < expected[outside]).all()
    assert (found.first_order[~outside] > expected[~outside]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_perturbation_reaches_the_boundary_and_no_smaller_one_on_its_way_does(kind):
    data, model = small_data(30), network(kind)
    functional = Functional(model, data)
    found = deepfool(functional)
    # Where every ReLU of the tiny networks is off there is no gradient to follow.
    assert found.distance.isfinite().double().mean() > 0.6
    assert (found.distance >= 0).all()
    promise = first_order_distances(functional)
    torch.testing.assert_close(found.first_order, promise)
    # Random directions are no shorter way out.
    images, _ = seen(data, torch.arange(30))
    std = data.normalization()[1][0]
    own = model(images).argmax(1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        direction /= direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        step = 0.5 * found.distance.nan_to_num(posinf=1.0).view(-1, 1, 1, 1) * direction / std
        assert (model(images + step).argmax(1) == own).float().mean() > 0.95


def test_distances_do_not_depend_on_the_batch():
    data, model = small_data(30), network("convolutional")
    one, other = (deepfool(Functional(model, data, batch_size=b)).distance for b in (4, 100))
    torch.testing.assert_close(one, other)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([2.0, 0.0, 0.0]))

    def forward(self, x):
        return self.bias + 0 * x.flatten(1).sum(1, keepdim=True)


def test_where_no_boundary_can_be_reached():
    data = small_data(30)
    report = fl.audit(Constant(), data, measures=["boundary_distance", "first_order_distance"], resamples=10)
    table = report.by_group
    assert table["boundary_distance"].isna().all()
    assert (table["boundary_distance_missed"] == data.counts()["n"]).all()
    assert np.isinf(report.predictions["first_order_distance"]).all()


class Corner(nn.Module):
    """Three logits whose nearest boundary turns behind a kink, so that one step is not enough."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        u = self.weight * x.flatten(1).mean(1)
        return torch.stack([torch.relu(u - 1) * 0.1 + u.clamp(max=1), torch.full_like(u, 1.2), -u], dim=1)


def test_kinks_take_several_steps():
    images = torch.full((2, 1, 1, 1), 128, dtype=torch.uint8)
    data = GroupedData(
        images, torch.tensor([0, 1]), torch.tensor([0, 0]), ("a", "b", "c"), ("all",), mean=(0.0,), std=(1.0,)
    )
    found = deepfool(Functional(Corner(), data))
    # From class b at u ≈ 0.502 class a promises to be near and is reached at u = 3 after a second step. Class c would
    # be nearer, at u = −1.2: what DeepFool finds is an upper bound.
    assert found.steps[0] == 2
    assert float(found.distance[0]) == pytest.approx(3 - 128 / 255, rel=1e-4)


def test_rows_of_an_audit():
    data, model = small_data(60), network("convolutional", dtype=torch.float32)
    report = fl.audit(model, data, measures=["margin", "boundary_distance", "first_order_distance"], device="cpu")
    table, samples = report.by_group, report.predictions
    for measure in ("margin", "boundary_distance", "first_order_distance"):
        for name in data.group_names:
            own = samples[(samples["group"] == name) & np.isfinite(samples[measure])]
            assert table.loc[name, measure] == pytest.approx(own[measure].mean())
            assert table.loc[name, f"{measure}_low"] <= table.loc[name, measure] <= table.loc[name, f"{measure}_high"]
            for suffix, chosen in (("correct", own[own["correct"]]), ("wrong", own[~own["correct"]])):
                if len(chosen):
                    assert table.loc[name, f"{measure}_{suffix}"] == pytest.approx(chosen[measure].mean())
                    rows = report.frame[(report.frame["measure"] == f"{measure}_{suffix}")]
                    assert rows.set_index("group").loc[name, "n"] == len(chosen)
        assert report.overall[measure] == pytest.approx(samples[measure][np.isfinite(samples[measure])].mean())
    np.testing.assert_allclose(table["margin_normalized"], table["margin"] / table["margin"].max())
    assert "proximity" not in table
    binary = fl.audit(network("perceptron", 2, dtype=torch.float32), small_data(40, classes=2), measures=["margin"])
    assert binary.by_group["proximity"].between(0, 0.25).all()


def test_bad_input():
    data = small_data(20, classes=2)
    one = GroupedData(data.images, torch.zeros_like(data.labels), data.groups, ("only",), data.group_names)
    for measure in ("margin", "boundary_distance", "first_order_distance"):
        with pytest.raises(FairlineError, match="has one output; a decision boundary needs two"):
            fl.audit(network("perceptron", 1, dtype=torch.float32), one, measures=[measure])
    for options in ({"max_steps": 0}, {"overshoot": 0}):
        with pytest.raises(FairlineError, match="DeepFool needs a step and a positive overshoot"):
            fl.audit(
                network("perceptron", 2, dtype=torch.float32),
                data,
                measures=["boundary_distance"],
                options={"boundary_distance": options},
            )
