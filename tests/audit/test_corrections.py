from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fairline as fl
from fairline.audit import Subject, audit_subject, explaining
from fairline.audit.ablation import Ablation, averaged, part_of, rivals
from fairline.audit.corrections import compared, one_sided, units_for_half
from fairline.data import GroupedData
from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus
from tests.audit.networks import KINDS, network, seen, small_data
from tests.reference import corrections as reference

CPU = torch.device("cpu")
MASKABLE = [kind for kind in KINDS if kind != "linear"]


def linearized(
    kind: str = "perceptron", kept: float = 0.6, *, classes: int = 3, seed: int = 0, quadratic: bool = False
):
    """A network of float32 that keeps some of its ReLUs, with biases that move their inputs about 0."""
    model = mask_relus(network(kind, classes, seed, torch.float32), torch.zeros(2, 1, 4, 4), check=False).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in masked_relus(model).values():
        layer.set_mask(torch.rand(layer.shape, generator=generator) < kept)
        if quadratic:
            layer.use_surrogate("quadratic")
            with torch.no_grad():
                layer.coefficients.copy_(torch.randn(layer.coefficients.shape, generator=generator) * 0.5)
    return model


def subject_of(model: nn.Module, data: GroupedData, reference: nn.Module | None = None) -> Subject:
    before = None if reference is None else Subject(reference, data, None, CPU)
    return Subject(model, data, before, CPU, resamples=200)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000), kind=st.sampled_from(["convolutional", "residual", "perceptron"]), kept=st.floats(0, 1)
)
def test_without_corrections_a_network_is_an_affine_map(seed, kind, kept):
    data, model = small_data(20, seed=seed), linearized(kind, kept, seed=seed)
    ablation = Ablation(model, data, CPU)
    images, _ = seen(data, range(20), torch.float32)
    assert ablation.bends == {}
    with ablation.without(ablation.kept):
        found = ablation.logits(data)
    matrix, offset = reference.affine_map(model, (1, 4, 4))
    torch.testing.assert_close(found, images.flatten(1) @ matrix.T + offset, rtol=1e-3, atol=1e-4)
    # What was taken out is there again.
    torch.testing.assert_close(ablation.logits(data), model(images).detach())


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), kept=st.floats(0.1, 1), quadratic=st.booleans())
def test_whole_is_affine_part_and_corrections(seed, kept, quadratic):
    """One hidden layer, in closed form: logits = W(g(s) + c) + b."""
    data, model = small_data(20, seed=seed), linearized("perceptron", kept, seed=seed, quadratic=quadratic)
    images, _ = seen(data, range(20), torch.float32)
    (layer,) = masked_relus(model).values()
    s = model[1](images.flatten(1)).detach()
    surrogate = layer.substitute(s).detach()
    correction = torch.where(layer.kept, s.clamp_min(0) - surrogate, 0)
    if not quadratic:
        torch.testing.assert_close(correction, torch.where(layer.kept, (-s).clamp_min(0), 0))
    ablation = Ablation(model, data, CPU)
    with ablation.without(ablation.kept):
        torch.testing.assert_close(ablation.logits(data), model[3](surrogate).detach(), rtol=1e-4, atol=1e-5)
    with ablation.centred(data):
        centred = ablation.logits(data)
    mean = torch.stack([correction[data.groups == group].mean(0) for group in data.groups.unique()]).mean(0)
    torch.testing.assert_close(centred, model[3](surrogate + mean).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ablation.logits(data), model[3](surrogate + correction).detach(), rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), kept=st.floats(0.3, 1), quadratic=st.booleans())
def test_the_first_order_is_exact_behind_one_hidden_layer(seed, kept, quadratic):
    data, model = small_data(20, seed=seed), linearized("perceptron", kept, seed=seed, quadratic=quadratic)
    ablation = Ablation(model, data, CPU)
    if not ablation.count:
        return
    images, labels = seen(data, range(20), torch.float32)
    estimated = ablation.first_order(images, labels).double()
    exact = ablation.exact(data, range(ablation.count))
    torch.testing.assert_close(estimated, exact, rtol=1e-3, atol=1e-5)
    rows = torch.arange(20)
    rival = rivals(model(images).detach(), labels)[:, 0]
    s = model[1](images.flatten(1)).detach()
    (layer,) = masked_relus(model).values()
    lead = model[3].weight.detach()[labels] - model[3].weight.detach()[rival]
    expected = (lead * (s.clamp_min(0) - layer.substitute(s).detach()))[:, layer.kept]
    torch.testing.assert_close(estimated[rows].float(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("kind", ["convolutional", "residual", "masked"])
def test_units_taken_out_by_a_loop_over_images(kind, quadratic):
    data, model = small_data(8), linearized(kind, quadratic=quadratic)
    ablation = Ablation(model, data, CPU)
    tried = list(range(0, ablation.count, max(1, ablation.count // 6)))
    found = ablation.exact(data, tried)
    images, labels = seen(data, range(8), torch.float32)
    units = ablation.units()
    for column, unit in enumerate(tried):
        for i in range(8):
            expected = reference.fall(model, images[i], int(labels[i]), [units[unit]])
            assert float(found[i, column]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["convolutional", "residual"])
def test_the_first_order_by_finite_differences(kind):
    """A small part of a correction taken away moves the margin by that part of the estimate."""
    data, model = small_data(6), linearized(kind)
    ablation = Ablation(model, data, CPU)
    images, labels = seen(data, range(6), torch.float32)
    estimated = ablation.first_order(images, labels)
    doubled = model.double()
    layers = masked_relus(doubled)
    step = 1e-6
    for unit in range(0, ablation.count, max(1, ablation.count // 10)):
        name, position = ablation.units()[unit]

        def shrink(layer, inputs, output, position=position):
            output = output.clone()
            bent = (output - layer.substitute(inputs[0])).flatten(1)[:, position]
            output.flatten(1)[:, position] -= step * bent
            return output

        with torch.no_grad():
            whole = doubled(images.double())
            handle = layers[name].register_forward_hook(shrink)
            less = doubled(images.double())
            handle.remove()
        rival = rivals(whole, labels)
        before, after = (z.gather(1, labels[:, None]) - z.gather(1, rival) for z in (whole, less))
        slope = (before - after)[:, 0] / step
        torch.testing.assert_close(slope.float(), estimated[:, unit], rtol=1e-3, atol=1e-4)


def test_services_are_means_by_group_and_by_other_groups():
    data, model = small_data(37), linearized("convolutional")
    ablation = Ablation(model, data, CPU)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(3))
    found = ablation.services(data, [order], batch_size=10)
    images, labels = seen(data, range(37), torch.float32)
    every = ablation.first_order(images, labels).double()
    for group in range(data.num_groups):
        torch.testing.assert_close(found.by_group[group], every[data.groups == group].mean(0), rtol=1e-4, atol=1e-6)
        dealt = every[data.groups[order] == group].mean(0)
        torch.testing.assert_close(found.by_chance[0, group], dealt, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.total, every.sum(1), rtol=1e-4, atol=1e-5)
    whole = averaged([(torch.arange(37), every)], data)
    torch.testing.assert_close(whole.by_group, found.by_group, rtol=1e-4, atol=1e-6)


@settings(max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 30))
def test_concentration_by_counting(seed, groups, units):
    service = torch.randn(groups, units, generator=torch.Generator().manual_seed(seed)).double()
    mainly, share = one_sided(service)
    counts, helpful = [0] * groups, 0
    for unit in range(units):
        helps = [max(0.0, float(v)) for v in service[:, unit]]
        helpful += any(helps)
        for group in range(groups):
            counts[group] += helps[group] > 2 * (sum(helps) - helps[group]) and helps[group] > 0
    assert mainly.tolist() == counts
    assert (share == sum(counts) / helpful) if helpful else np.isnan(share)
    for group in range(groups):
        helps = sorted((max(0.0, float(v)) for v in service[group]), reverse=True)
        least = next(k for k in range(units + 1) if sum(helps[:k]) >= sum(helps) / 2)
        assert units_for_half(service[group]) == least


def test_smallest_groups_and_the_largest():
    right = dict.fromkeys("abcde", 20)
    assert compared({"a": 9, "b": 8, "c": 5, "d": 3, "e": 4}, right) == (["d", "e"], "a")
    assert compared({"a": 9, "b": 8, "c": 5, "d": 3, "e": 4}, right | {"d": 9}) == (["e"], "a")
    assert compared({"a": 9, "b": 8, "c": 5, "d": 3, "e": 4}, right | {"a": 9}) == ([], "a")
    assert compared({"a": 9}, {"a": 9}) == ([], "a")


@pytest.fixture(scope="module")
def told():
    data, model = small_data(400, groups=3), linearized("residual")
    base = network("residual", 3, 0, torch.float32)
    report = fl.audit(model, data, base, measures=["accuracy", "corrections"], device="cpu", resamples=200)
    return data, model, base, report


def test_rows_of_parts(told):
    data, model, base, report = told
    images, labels = seen(data, range(len(data)), torch.float32)
    for name, prefix, own in ((None, "", model), (None, "reference_", mask_relus(base, images[:2]).eval())):
        matrix, offset = reference.affine_map(own, (1, 4, 4))
        right = ((images.flatten(1) @ matrix.T + offset).argmax(1) == labels).numpy()
        whole = (own(images).argmax(1) == labels).numpy()
        for group, name in enumerate(data.group_names):
            here = data.groups.numpy() == group
            row = report.by_group.loc[name]
            assert row[f"{prefix}affine_accuracy"] == pytest.approx(right[here].mean())
            gain = whole[here].mean() - right[here].mean()
            assert row[f"{prefix}correction_gain"] == pytest.approx(gain)
            assert row[f"{prefix}correction_gain_low"] <= gain <= row[f"{prefix}correction_gain_high"]
            assert row[f"{prefix}correction_share"] == pytest.approx(100 * gain / whole[here].mean())
        assert report.overall[f"{prefix}affine_accuracy"] == pytest.approx(right.mean())
    assert set(report.predictions["affine_prediction"]) <= set(data.class_names)
    most = report.predictions["affine_prediction"].value_counts(normalize=True).iloc[0]
    assert report.overall["affine_one_class"] == pytest.approx(most)


def test_the_gap_of_shares_names_its_groups(told):
    report = told[-1]
    sizes = report.by_group["n"]
    gap = report.gaps.loc["minority_correction_share_gap"]
    share = report.by_group["correction_share"]
    assert gap["group"] == f"{sizes.idxmax()} to {sizes.idxmin()}"
    assert gap["value"] == pytest.approx(share[sizes.idxmin()] - share[sizes.idxmax()])
    assert gap["low"] <= gap["value"] <= gap["high"]


def test_training_images_say_which_group_is_small_where_they_are_known():
    data, model = small_data(400, groups=3), linearized("residual")
    subject = subject_of(model, data)
    subject.sizes = {"group 0": 10, "group 1": 5, "group 2": 30}
    gaps = audit_subject(subject, ["corrections"]).gaps
    assert set(gaps["group"]) == {"group 2 to group 1"}


def test_rows_of_layers_and_units(told):
    data, model, _, report = told
    images, labels = seen(data, range(len(data)), torch.float32)
    layers = {name: layer for name, layer in masked_relus(model).items() if layer.num_kept}
    assert report.layers["layer_corrections"].dropna().to_dict() == {
        name: layer.num_kept for name, layer in layers.items()
    }
    whole = (model(images).argmax(1) == labels).numpy()
    for name, layer in layers.items():
        kept = layer.kept.clone()
        layer.set_mask(torch.zeros_like(kept))
        left = (model(images).argmax(1) == labels).numpy()
        layer.set_mask(kept)
        for group, group_name in enumerate(data.group_names):
            here = data.groups.numpy() == group
            found = report.layers_by_group.loc[(name, group_name), "correction_drop"]
            assert found == pytest.approx(whole[here].mean() - left[here].mean())
        assert report.layers.loc[name, "correction_drop"] == pytest.approx(whole.mean() - left.mean())
    named = report.layers_by_group["unit_service"].dropna()
    assert len(named) == 10 * data.num_groups
    best = named.groupby(level="layer", sort=False).max()
    assert best.is_monotonic_decreasing
    # Measures of layers are no columns of groups.
    assert not report.by_group.columns.str.contains("/").any()
    assert (report.by_group["units_for_half"] >= 1).all()
    assert 0 <= report.overall["units_one_group"] <= 1
    assert report.overall["corrections"] == sum(layer.num_kept for layer in layers.values())


def test_exact_and_estimated_units_agree_where_they_must():
    data, model = small_data(100), linearized("perceptron")
    rows = fl.audit(model, data, measures=["corrections"], device="cpu").overall
    assert rows["units_exact"] == 1
    assert rows["unit_agreement"] == pytest.approx(1)


def test_samples_bound_the_cost(monkeypatch):
    data, model = small_data(400, groups=3), linearized("residual")
    passed = []
    original = Ablation.logits
    monkeypatch.setattr(Ablation, "logits", lambda self, d: (passed.append(len(d)), original(self, d))[1])
    options = {"corrections": {"samples": 20, "unit_samples": 5, "exact_units": 0}}
    report = fl.audit(model, data, measures=["corrections"], options=options, device="cpu")
    kept = [layer for layer in masked_relus(model).values() if layer.num_kept]
    assert passed == [400, 400, *[60] * len(kept), *[15] * 33]
    assert report.overall["units_exact"] == 0
    layers = report.frame[report.frame["measure"].str.startswith("correction_drop/")]
    assert set(layers["n"]) == {20, 60}


def test_the_same_seed_gives_the_same_rows_and_the_model_stays():
    data, model = small_data(60), linearized("convolutional")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, other = (fl.audit(model, data, measures=["corrections"], device="cpu", seed=4).frame for _ in range(2))
    assert one.equals(other)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_without_masks_keeps_all_its_relus():
    data, model = small_data(60), network("convolutional", dtype=torch.float32)
    masked = mask_relus(model, torch.zeros(2, 1, 4, 4)).eval()
    one, other = (fl.audit(m, data, measures=["corrections"], device="cpu").frame for m in (model, masked))
    total = sum(layer.num_kept for layer in masked_relus(masked).values())
    assert one[one["measure"] == "corrections"]["value"].tolist() == [total]
    np.testing.assert_allclose(one["value"], other["value"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", [linearized("perceptron", 0.0), network("linear", dtype=torch.float32)])
def test_a_network_without_a_kept_relu_has_no_corrections(model):
    data = small_data(60)
    report = fl.audit(model, data, measures=["accuracy", "corrections"], device="cpu")
    assert report.overall["corrections"] == 0
    assert (report.by_group["affine_accuracy"] == report.by_group["accuracy"]).all()
    assert (report.by_group["correction_gain"] == 0).all()
    assert "correction_gain_low" not in report.by_group
    assert report.layers.empty
    assert "units_one_group" not in report.overall.index


class Bent(nn.Module):
    """ReLUs as functions, an in-place sum behind one, and activations that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.gelu = nn.GELU()

    def forward(self, x):
        x = F.relu(self.first(x.flatten(1)))
        x += 1
        x = self.gelu(torch.sigmoid(self.second(x)) + x)
        return self.last(F.relu(x))


def test_other_activations_stay_and_are_named():
    torch.manual_seed(0)
    data, model = small_data(40), Bent().eval()
    report = fl.audit(model, data, measures=["corrections"], device="cpu")
    assert report.overall["bends_gelu"] == report.overall["bends_sigmoid"] == 1
    assert report.overall["corrections"] == 12
    ablation = Ablation(model, data, CPU)
    with ablation.without(ablation.kept):
        found = ablation.logits(data)
    images, _ = seen(data, range(40), torch.float32)
    x = model.first(images.flatten(1)) + 1
    torch.testing.assert_close(found, model.last(model.gelu(torch.sigmoid(model.second(x)) + x)).detach())
    quadratic = fl.audit(linearized("residual", quadratic=True), data, measures=["corrections"], device="cpu")
    assert quadratic.overall["bends_quadratic_surrogate"] == 4


def test_a_part_of_the_images_is_normalised_as_all():
    data = small_data(60)
    index = torch.tensor([5, 2, 9])
    torch.testing.assert_close(part_of(data, index).normalized(), data.normalized(index))


def test_bad_input():
    data = small_data(40)
    learning = mask_relus(network("perceptron", dtype=torch.float32), torch.zeros(1, 1, 4, 4))
    for layer in masked_relus(learning).values():
        layer.learn()
    with pytest.raises(FairlineError, match="masks are still being learned"):
        fl.audit(learning, data, measures=["corrections"], device="cpu")
    model = linearized("perceptron")
    for options, message in (
        ({"samples": 0}, "need a sample of each group"),
        ({"unit_samples": 0}, "need a sample of each group"),
        ({"exact_units": -1}, "a number from 0"),
        ({"exact_units": "all"}, "is a whole number or none, not 'all'"),
        ({"levels": 3}, "knows no option 'levels'; it takes samples, unit_samples, exact_units"),
    ):
        with pytest.raises(FairlineError, match=message):
            fl.audit(model, data, measures=["corrections"], options={"corrections": options}, device="cpu")
    exploding = linearized("perceptron")
    with torch.no_grad():
        exploding[1].bias.fill_(-1e38)
        exploding[1].weight.mul_(0)
        exploding[3].weight.fill_(1e3)
    (layer,) = masked_relus(exploding).values()
    layer.set_mask(torch.ones(layer.shape, dtype=torch.bool))
    with pytest.raises(FairlineError, match="Without some of its ReLUs the logits of Sequential are not finite on 40"):
        fl.audit(exploding, data, measures=["corrections"], device="cpu")


class Recurrent(nn.Module):
    """ReLUs that no mask enters."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.RNN(4, 6, nonlinearity="relu", batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.rnn(x[:, 0])[0][:, -1])


def test_explaining_leaves_out_what_masks_cannot_reach(caplog):
    data = small_data(40)
    with caplog.at_level(logging.WARNING):
        assert "corrections" not in explaining(subject_of(Recurrent().eval(), data))
    assert "model: its corrections are not measured (Recurrent has ReLUs inside 'rnn'" in caplog.text
    whole = network("perceptron", dtype=torch.float32)
    assert {"corrections", "parameter_distance"} <= explaining(subject_of(linearized(), data, whole)).keys()
    other = network("convolutional", dtype=torch.float32)
    assert not {"parameter_distance", "excess_loss_bound"} & explaining(subject_of(linearized(), data, other)).keys()
    with pytest.raises(FairlineError, match="has ReLUs inside 'rnn'"):
        fl.audit(Recurrent().eval(), data, measures=["corrections"], device="cpu")
