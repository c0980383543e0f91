from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fairline as fl
from fairline.audit.functional import Functional
from fairline.audit.gradients import GroupGradients, group_gradients, per_sample_gradient_norms
from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus
from tests.audit.networks import KINDS, network, seen, small_data
from tests.reference import curvature as reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 1e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_group_norms_by_a_loop_over_samples(kind, dtype, tolerance):
    data, model = small_data(), network(kind, dtype=dtype)
    found = group_gradients(Functional(model, data, batch_size=7))
    total = 0
    for group in range(data.num_groups):
        index = torch.nonzero(data.groups == group).flatten()
        expected = reference.gradient(model, *seen(data, index, dtype))
        assert found.norm[group] == pytest.approx(float(expected.norm()), rel=tolerance)
        assert found.n[group] == len(index)
        total = total + expected.double() * len(index) / len(data)
    assert found.overall == pytest.approx(float(total.norm()), rel=tolerance)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 70), groups=st.integers(1, 4))
def test_the_batch_size_changes_nothing(seed, batch, groups):
    data = small_data(40, classes=2, groups=groups, seed=seed)
    if (data.counts()["n"] == 0).any():
        return
    model = network("perceptron", 2, seed)
    one = group_gradients(Functional(model, data, batch_size=batch))
    other = group_gradients(Functional(model, data, batch_size=1000))
    np.testing.assert_allclose(one.norm, other.norm, rtol=1e-10)


def test_it_is_not_the_mean_of_mini_batch_norms():
    data, model = small_data(), network("perceptron")
    index = torch.nonzero(data.groups == 0).flatten()
    norms = [float(reference.gradient(model, *seen(data, part)).norm()) for part in index.split(4)]
    assert group_gradients(Functional(model, data)).norm[0] < 0.99 * np.mean(norms)


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_norms_by_a_loop(kind):
    data, model = small_data(20), network(kind)
    found = per_sample_gradient_norms(Functional(model, data), batch_size=6)
    expected = [float(reference.gradient(model, *seen(data, [i])).norm()) for i in range(len(data))]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_gradient_by_finite_differences():
    data, model = small_data(), network("masked")
    functional = Functional(model, data)
    index = torch.arange(len(data))
    theta, (images, labels) = reference.flat_parameters(model), seen(data, index)
    found = functional.gradient(index)
    for i in range(0, len(theta), 7):
        step = torch.zeros_like(theta)
        step[i] = 1e-6
        ahead, behind = (float(reference.mean_loss(model, theta + s, images, labels)) for s in (step, -step))
        assert float(found[i]) == pytest.approx((ahead - behind) / 2e-6, abs=1e-7)


def test_the_model_is_left_as_it_was():
    data, model = small_data(), network("convolutional", dtype=torch.float32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    fl.audit(model, data, measures=["gradient_norm", "curvature"], device="cpu")
    assert model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def fit(data, classes: int, steps: int = 60) -> nn.Module:
    """A softmax regression at its minimum, which is unique and finite where the classes overlap."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).double()
    images, labels = seen(data, torch.arange(len(data)))
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=steps * 20, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def overlapping(groups: int, seed: int = 0):
    """Labels that the images hardly tell, in groups of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    n = 400
    shares = torch.tensor([0.7, 0.2, 0.1][:groups])
    group = torch.multinomial(shares, n, replacement=True, generator=generator)
    images = torch.randint(0, 256, (n, 1, 4, 4), generator=generator).to(torch.uint8)
    odds = images[:, 0, 0, 0] / 255 + 0.4 * (group == 1)
    labels = (torch.rand(n, generator=generator) < odds / 1.4).long()
    return fl.GroupedData(images, labels, group, ("no", "yes"), tuple("abc"[:groups]))


def test_two_groups_at_convergence_have_norms_inverse_to_their_sizes():
    """Appendix A.1."""
    data = overlapping(2)
    found = group_gradients(Functional(fit(data, 2), data))
    assert found.residual < 1e-5
    assert found.norm[0] / found.norm[1] == pytest.approx(found.n[1] / found.n[0], rel=1e-4)
    np.testing.assert_allclose(found.share, [0.5, 0.5], rtol=1e-4)


def test_three_groups_at_convergence_only_obey_the_triangle_inequality():
    data = overlapping(3)
    found = group_gradients(Functional(fit(data, 2), data))
    assert found.residual < 1e-5
    assert found.share.max() <= 0.5 + 1e-6
    # Sizes no longer tell the ratio of norms.
    assert found.norm[1] * found.n[1] / (found.norm[2] * found.n[2]) > 1.5


def test_away_from_convergence_the_residual_is_large():
    data = overlapping(2)
    assert group_gradients(Functional(network("linear", 2), data)).residual > 0.2


def test_shares_without_any_gradient_are_undefined():
    none = GroupGradients(np.zeros(2), np.array([1, 2]), 0.0)
    assert np.isnan(none.share).all()
    assert np.isnan(none.residual)


def test_rows_of_an_audit():
    data, model = small_data(), network("perceptron", dtype=torch.float32)
    report = fl.audit(model, data, measures=["gradient_norm"], options={"gradient_norm": {"per_sample": True}})
    functional = Functional(model, data)
    np.testing.assert_allclose(report.by_group["gradient_norm"], group_gradients(functional).norm)
    assert report.overall["gradient_norm"] == pytest.approx(group_gradients(functional).overall)
    assert report.by_group["gradient_share"].sum() == pytest.approx(1)
    assert len(report.predictions["gradient_norm"]) == len(data)


def test_bad_input():
    data = small_data()
    learning = mask_relus(network("perceptron", dtype=torch.float32), torch.zeros(1, 1, 4, 4))
    for layer in masked_relus(learning).values():
        layer.learn()
    with pytest.raises(FairlineError, match="masks are still being learned"):
        Functional(learning, data)
    with pytest.raises(FairlineError, match="has no parameters"):
        Functional(nn.Flatten(), data)
    broken = network("perceptron", dtype=torch.float32)
    with torch.no_grad():
        broken[1].weight[0, 0] = float("inf")
    with pytest.raises(
        FairlineError, match=r"The loss of Sequential is not finite on \d+ of 60 images .* group 'class"
    ):
        fl.audit(broken, data, measures=["gradient_norm"])
    with pytest.raises(FairlineError, match="needs every group"):
        fl.audit(
            network("perceptron", dtype=torch.float32),
            data.select(torch.nonzero(data.groups != 1).flatten()),
            measures=["gradient_norm"],
        )
