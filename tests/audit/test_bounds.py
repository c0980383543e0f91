from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import fairline as fl
from fairline.audit.bounds import binary_terms
from fairline.audit.distance import total_distance
from fairline.audit.functional import Functional
from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus
from tests.audit.networks import KINDS, network, seen, small_data
from tests.audit.test_distance import moved
from tests.reference import curvature as reference


def test_theorem_4_4_by_the_full_matrices():
    data, before = small_data(), network("convolutional", dtype=torch.float32)
    after = moved(before)
    options = {"excess_loss_bound": {"tolerance": 1e-3}}
    table = fl.audit(after, data, before, measures=["excess_loss_bound"], options=options).by_group
    exact, distance = network("convolutional"), total_distance(after, before)
    for group, name in enumerate(data.group_names):
        images, labels = seen(data, torch.nonzero(data.groups == group).flatten())
        row = table.loc[name]
        gradient = float(reference.gradient(exact, images, labels).norm())
        largest = float(torch.linalg.eigvalsh(reference.hessian(exact, images, labels))[-1])
        assert row["bound_first"] == pytest.approx(gradient * distance, rel=1e-2)
        assert row["bound_second"] == pytest.approx(largest * distance**2 / 2, rel=1e-2)
        assert row["bound"] == pytest.approx(row["bound_first"] + row["bound_second"])
        losses = [
            float(torch.nn.functional.cross_entropy(model.double()(images), labels).detach())
            for model in (copy.deepcopy(after), copy.deepcopy(before))
        ]
        assert row["excess_loss"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
        # Both networks have all ReLUs here, so nothing but the weights moved.
        assert row["excess_loss_weights"] == pytest.approx(row["excess_loss"], abs=1e-5)
        assert row["bound_holds"] == float(row["excess_loss"] <= row["bound"])
        if row["excess_loss"] > 0:
            assert row["bound_looseness"] == pytest.approx(row["bound"] / row["excess_loss"])
        else:
            assert np.isnan(row["bound_looseness"])


def test_for_small_moves_the_bound_holds_and_the_expansion_is_what_it_says():
    data, before = small_data(), network("perceptron", dtype=torch.float32)
    after = copy.deepcopy(before)
    index = torch.nonzero(data.groups == 0).flatten()
    gradient = reference.gradient(network("perceptron"), *seen(data, index)).float()
    start = 0
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += 1e-2 * gradient[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
    row = fl.audit(after, data, before, measures=["excess_loss_bound"]).by_group.iloc[0]
    # Up the gradient the first-order term is attained.
    assert row["bound_holds"] == 1
    assert 1 <= row["bound_looseness"] < 1.5


def test_linearizing_alone_moves_no_weight_and_the_bound_does_not_see_it():
    data, before = small_data(), network("convolutional", dtype=torch.float32)
    after = mask_relus(before, torch.zeros(2, 1, 4, 4))
    for layer in masked_relus(after).values():
        layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
    table = fl.audit(after, data, before, measures=["excess_loss_bound"]).by_group
    assert (table["bound"] == 0).all()
    assert table["excess_loss"].abs().max() > 1e-3
    np.testing.assert_allclose(table["excess_loss_weights"], 0, atol=1e-6)
    assert (table["bound_holds"] == (table["excess_loss"] <= 0)).all()


def full_terms(model: nn.Module, image: torch.Tensor, label: int) -> tuple[float, float, float, float]:
    """Z₁, Z₂, Z₂ as printed and λ_max of the loss of one sample, from full matrices."""
    theta = reference.flat_parameters(model)

    def logit(at):
        out = functional_call(model, reference.with_parameters(model, at), (image[None],))[0]
        return out[1] - out[0]

    gradient = torch.autograd.functional.jacobian(logit, theta)
    spectrum = torch.linalg.eigvalsh(torch.autograd.functional.hessian(logit, theta))
    h = float(torch.sigmoid(logit(theta)))
    z2 = (h - label) * float(spectrum[-1] if h > label else spectrum[0])
    loss = reference.hessian(model, image[None], torch.tensor([label]))
    largest = float(torch.linalg.eigvalsh(loss)[-1])
    return h * (1 - h) * float(gradient.square().sum()), z2, abs(h - label) * float(spectrum[-1]), largest


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 1e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_terms_of_proposition_4_5_by_the_full_matrices(kind, dtype, tolerance):
    data = small_data(12, classes=2)
    model = network(kind, 2)
    found = binary_terms(
        Functional(network(kind, 2, dtype=dtype), data, batch_size=5), torch.arange(12), tolerance=tolerance / 10
    )
    images, labels = seen(data, torch.arange(12))
    for i in range(12):
        z1, z2, printed, largest = full_terms(model, images[i], int(labels[i]))
        assert found.z1[i] == pytest.approx(z1, rel=tolerance)
        assert found.z2[i] == pytest.approx(z2, rel=tolerance, abs=1e-5)
        assert found.z2_printed[i] == pytest.approx(printed, rel=tolerance, abs=1e-5)
        # Weyl's inequality, sample by sample.
        assert largest <= z1 + z2 + 1e-9


@settings(max_examples=6)
@given(seed=st.integers(0, 1000), kind=st.sampled_from(["perceptron", "masked", "linear"]))
@example(seed=151, kind="masked")
def test_proposition_4_5_holds(seed, kind):
    data = small_data(30, classes=2, groups=2, seed=seed)
    if (data.counts()["n"] == 0).any():
        return
    # A residual tells of the nearest eigenvalue alone; only a small one finds the largest of close ones (seed 151).
    options = {"binary_curvature_bound": {"tolerance": 1e-5}, "curvature": {"tolerance": 1e-5}}
    report = fl.audit(
        network(kind, 2, seed, torch.float32), data, measures=["binary_curvature_bound", "curvature"], options=options
    )
    table = report.by_group
    assert (table["z_bound_holds"] == 1).all()
    np.testing.assert_allclose(table["z_bound"], table["z1"] + table["z2"])
    np.testing.assert_allclose(table["z_bound_looseness"], table["z_bound"] / table["hessian_max"], rtol=2e-2)
    assert (table["z_bound_looseness"] >= 1 - 1e-3).all()


def test_a_sample_of_each_group():
    data = small_data(60, classes=2)
    options = {"binary_curvature_bound": {"samples": 5}}
    table = fl.audit(
        network("perceptron", 2, dtype=torch.float32), data, measures=["binary_curvature_bound"], options=options
    ).by_group
    assert (table["n"] == 5).all()
    assert (table["z1_low"] <= table["z1"]).all()
    assert (table["z1"] <= table["z1_high"]).all()
    assert (table["z_bound_holds"] == 1).all()


def test_bad_input():
    data, model = small_data(), network("perceptron", dtype=torch.float32)
    with pytest.raises(FairlineError, match=r"binary classifiers, but model has 3 outputs for 3 classes"):
        fl.audit(model, data, measures=["binary_curvature_bound"])
    with pytest.raises(FairlineError, match="'excess_loss_bound' compares with a reference"):
        fl.audit(model, data, measures=["excess_loss_bound"])
    flat = network("linear", dtype=torch.float32)
    with pytest.raises(FairlineError, match="has no ReLU"):
        fl.audit(flat, data, flat, measures=["excess_loss_bound"])
    with pytest.raises(FairlineError, match="a sample of each group at least, not 0"):
        fl.audit(
            network("perceptron", 2, dtype=torch.float32),
            small_data(classes=2),
            measures=["binary_curvature_bound"],
            options={"binary_curvature_bound": {"samples": 0}},
        )
