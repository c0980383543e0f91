from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fairline as fl
from fairline.audit.distance import parameter_distance, total_distance
from fairline.errors import FairlineError
from fairline.masking import mask_relus
from tests.audit.networks import network, small_data
from tests.reference.curvature import flat_parameters


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return other


def test_by_the_flat_vectors():
    model = network("convolutional")
    other = moved(model)
    expected = float((flat_parameters(other) - flat_parameters(model)).norm())
    assert total_distance(other, model) == pytest.approx(expected)
    table = parameter_distance(other, model)
    assert (table["distance"] ** 2).sum() == pytest.approx(expected**2)
    assert table["parameters"].sum() == len(flat_parameters(model))
    own = (other[0].weight - model[0].weight).detach().norm()
    assert table.loc["0", "distance"] == pytest.approx(float(own))
    assert table.loc["0", "relative"] == pytest.approx(float(own / model[0].weight.detach().norm()))
    assert total_distance(model, model) == 0


def test_masks_are_no_parameters():
    model = network("convolutional", dtype=torch.float32)
    cut = mask_relus(model, torch.zeros(2, 1, 4, 4))
    assert total_distance(cut, model) == 0
    assert set(parameter_distance(cut, model).index) == set(parameter_distance(model, model).index)


def test_only_what_is_shared_counts():
    model = network("perceptron")
    wider = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    table = parameter_distance(wider, model)
    assert list(table.index) == ["1"]
    with pytest.raises(FairlineError, match="share no parameter of equal name and shape"):
        parameter_distance(nn.Conv2d(1, 1, 1), model)


def test_rows_of_an_audit():
    data, model = small_data(), network("convolutional", dtype=torch.float32)
    other = moved(model)
    report = fl.audit(other, data, model, measures=["accuracy", "parameter_distance"], resamples=10)
    assert report.overall["parameter_distance"] == pytest.approx(total_distance(other, model))
    size = float(flat_parameters(model).norm())
    assert report.overall["parameter_distance_relative"] == pytest.approx(total_distance(other, model) / size)
    assert report.overall["parameters_shared"] == 1
    layers = report.layers["parameter_distance"]
    assert layers["0"] == pytest.approx(parameter_distance(other, model).loc["0", "distance"])
    assert list(layers.index) == list(parameter_distance(other, model).index)
    # Layers are no group comparisons, and no column of the overall row.
    assert set(report.gaps.index) == {"accuracy_gap", "worst_group_accuracy", "relative_drop_gap"}
    with pytest.raises(
        FairlineError, match="'parameter_distance' compares with a reference network, and there is none"
    ):
        fl.audit(other, data, measures=["parameter_distance"])
