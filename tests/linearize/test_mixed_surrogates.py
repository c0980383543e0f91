"""Surrogates of every degree, and several in one layer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairline import Magnitude, Random, finetune
from fairline.audit.ablation import Ablation
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize.surrogates import cut, errors, fit, fit_surrogates, moments_of, of_degree, start_masked
from fairline.masking import (
    SURROGATES,
    MaskedReLU,
    copy_model,
    load_masks,
    mask_relus,
    masked_relus,
    save_masks,
    surrogate_of,
)
from fairline.private import estimate, to_graph
from fairline.runs import ModelSpec, NetworkInfo, load_network, save_network

SHAPE = (4, 3, 3)
FACTORS = (1, 1, 0.2, 0.04)


def mixed(degrees, mask=None, seed=0) -> MaskedReLU:
    layer = MaskedReLU(SHAPE)
    layer.use_degrees(torch.tensor(degrees))
    if layer.coefficients is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            layer.coefficients.copy_(torch.randn(layer.coefficients.shape, generator=generator))
    if mask is not None:
        layer.set_mask(mask)
    return layer.double()


def formula(x, m, coefficients, degrees):
    """m·relu(x) + (1 − m)·g(x), channel by channel."""
    columns = []
    for channel, degree in enumerate(degrees):
        own = x[:, channel]
        if degree < 2:
            g = own * degree
        else:
            g = sum(FACTORS[k] * coefficients[k, channel] * own**k for k in range(degree + 1))
        columns.append(m[channel] * own.relu() + (1 - m[channel]) * g)
    return torch.stack(columns, 1)


@settings(max_examples=40)
@given(
    degrees=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    learn=st.sampled_from(["", "pixel", "channel"]),
)
def test_value_and_gradients_are_the_formula(degrees, seed, share, learn):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(SHAPE, generator=generator) < share
    layer = mixed(degrees, mask, seed)
    m = mask.double()
    if learn:
        weight = layer.learn(learn)
        layer.double()
        drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
        layer.weight.data.copy_(drawn)
        m = drawn.clone().requires_grad_()
    x = torch.randn(5, *SHAPE, generator=generator, dtype=torch.float64)
    toward = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    c = torch.zeros(4, 4, 1, 1).double() if layer.coefficients is None else layer.coefficients.detach().clone()
    c.requires_grad_()
    y = layer(x1)
    expected = formula(x2, m.expand(SHAPE) * mask, c, degrees)
    torch.testing.assert_close(y, expected)
    (y * toward).sum().backward()
    (expected * toward).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    if learn:
        torch.testing.assert_close(layer.weight.grad, m.grad)
    if layer.coefficients is not None and (learn or share < 1):
        torch.testing.assert_close(layer.coefficients.grad, torch.zeros_like(c) if c.grad is None else c.grad)
        # What a degree rules out is never moved.
        for channel, degree in enumerate(degrees):
            assert not layer.coefficients.grad[(degree + 1 if degree > 1 else 0) :, channel].any()


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_uniform_ones_are_the_formula(surrogate):
    layer = MaskedReLU(SHAPE)
    layer.use_surrogate(surrogate)
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5
    layer.set_mask(mask)
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    degree = SURROGATES[surrogate].degree
    # A polynomial starts as the identity.
    start = torch.zeros(4, 4, 1, 1)
    start[1] = 1
    torch.testing.assert_close(layer(x), formula(x, mask.float(), start, [degree] * 4))
    assert layer.surrogate == surrogate
    assert (layer.coefficients is not None) == SURROGATES[surrogate].learned
    assert (layer.degrees is not None) == (surrogate == "zero")


def test_the_identity_keeps_its_fast_path_and_its_state():
    layer = MaskedReLU(SHAPE)
    assert set(layer.state_dict()) == {"kept"}
    layer.use_surrogate("quadratic")
    assert set(layer.state_dict()) == {"kept", "coefficients"}
    assert layer.coefficients.shape == (3, 4, 1, 1)


@settings(max_examples=30)
@given(before=st.lists(st.integers(0, 3), min_size=4, max_size=4), seed=st.integers(0, 1000))
def test_a_higher_degree_starts_as_what_stood_there(before, seed):
    layer = mixed(before, seed=seed)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed)).double()
    was = layer.substitute(x)
    layer.use_degrees(torch.tensor([max(degree, 2) for degree in before]))
    torch.testing.assert_close(layer.substitute(x), was)
    layer.use_surrogate("cubic")
    torch.testing.assert_close(layer.substitute(x), was)


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), shift=st.floats(-1, 1), degree=st.integers(1, 3))
def test_the_fit_of_each_degree_and_its_error_are_least_squares(seed, shift, degree):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 2, 4, 4, generator=generator) + shift
    weight = torch.rand(x.shape, generator=generator)
    sums = of_degree(moments_of(x, 3), degree)
    found = fit(sums, square=1.0) * torch.tensor([1, 1, 0.2, 0.04][: degree + 1])
    for channel in range(2):
        values, w = x[:, channel].flatten().double().numpy(), weight[:, channel].flatten().double().numpy()
        design = np.stack([values**k for k in range(degree + 1)], 1)
        best = np.linalg.lstsq(design, np.maximum(values, 0), rcond=None)[0]
        np.testing.assert_allclose(design @ found[channel].numpy(), design @ best, atol=1e-6)
        error = errors(fit(sums, square=1.0), moments_of(x, 3, weight))[channel]
        np.testing.assert_allclose(error, (w * (np.maximum(values, 0) - design @ best) ** 2).sum(), rtol=1e-5)
        # Smaller powers: the line is fitted to what they leave.
        c = fit(sums)[channel].numpy() * np.array([1, 1, 0.2, 0.04][: degree + 1])
        higher = design[:, 2:] @ c[2:]
        line = np.linalg.lstsq(design[:, :2], np.maximum(values, 0) - higher, rcond=None)[0]
        np.testing.assert_allclose(design[:, :2] @ c[:2], design[:, :2] @ line, atol=1e-6)
    zero = errors(torch.zeros(2, 1, dtype=torch.float64), moments_of(x, 3))
    torch.testing.assert_close(zero, x.double().relu().square().sum((0, 2, 3)))


def given_degrees(trained, data, seed=0):
    """A network that keeps half of its ReLUs, with surrogates of every degree, fitted."""
    model = mask_relus(trained, data.normalized(slice(2)))
    generator = torch.Generator().manual_seed(seed)
    for layer in masked_relus(model).values():
        layer.use_degrees(torch.randint(4, layer.shape[:1], generator=generator))
    fit_surrogates(model, data, samples=200)
    for layer in masked_relus(model).values():
        layer.set_mask(torch.rand(layer.shape, generator=generator) < 0.5)
    return model


def test_files_of_a_mixed_network(parts, trained, tmp_path):
    model = given_degrees(trained, parts[0])
    assert surrogate_of(model) == "mixed"
    finetune(model, trained, parts[0], epochs=1, batch_size=64, lr=0.01)
    spec = ModelSpec("cnn", 3, 1, 8, {"width": 4})
    info = NetworkInfo(spec, "finetuned", 224, 448, 224, "safenet", surrogate="mixed")
    save_network(tmp_path / "network", model, info)
    loaded, said = load_network(tmp_path / "network")
    assert said.surrogate == "mixed"
    assert torch.equal(predict(loaded, parts[2]), predict(model, parts[2]))
    masks = tmp_path / "network" / "masks.safetensors"
    plain = mask_relus(trained, parts[0].normalized(slice(2)))
    about = load_masks(masks, plain)
    for (name, own), other in zip(masked_relus(plain).items(), masked_relus(model).values(), strict=True):
        assert about.degrees[name] == other.degrees.tolist() == own.degrees.tolist()
    # A state says the degrees itself.
    other = mask_relus(trained, parts[0].normalized(slice(2)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(predict(other, parts[2]), predict(model, parts[2]))
    assert torch.equal(predict(copy_model(model), parts[2]), predict(model, parts[2]))


def test_files_of_a_network_with_zeros(parts, trained, tmp_path):
    (found,) = Random(surrogate="zero").linearize(trained, parts[0], [100])
    spec = ModelSpec("cnn", 3, 1, 8, {"width": 4})
    info = NetworkInfo(spec, "linearized", 100, 448, 100, "random", surrogate=surrogate_of(found.model))
    save_network(tmp_path / "network", found.model, info)
    loaded, said = load_network(tmp_path / "network")
    assert said.surrogate == "zero"
    assert torch.equal(predict(loaded, parts[2]), predict(found.model, parts[2]))
    with pytest.raises(FairlineError, match="made for zero surrogates, but the model's are identity"):
        load_masks(tmp_path / "network" / "masks.safetensors", mask_relus(trained, parts[0].normalized(slice(2))))


def test_masks_of_an_earlier_version(parts, trained, tmp_path):
    """Their files do not know of degrees."""
    masked = mask_relus(trained, parts[0].normalized(slice(2)), "quadratic")
    save_masks(tmp_path / "masks.safetensors", masked, method="test", budget=1, seed=0)
    assert b"degrees" not in (tmp_path / "masks.safetensors").read_bytes()


@pytest.mark.parametrize("surrogate", ["cubic", "zero"])
def test_methods_take_them(parts, trained, surrogate):
    (found,) = Magnitude(surrogate=surrogate).linearize(trained, parts[0], [0.3])
    assert surrogate_of(found.model) == surrogate
    before = copy.deepcopy(found.model.state_dict())
    finetune(found.model, trained, parts[0], epochs=1, batch_size=64, lr=0.01)
    assert predict(found.model, parts[2]).isfinite().all()
    moved = [name for name, value in found.model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.endswith("coefficients") for name in moved) == (surrogate == "cubic")


def test_what_was_cut_stays_and_is_not_replaced_by_less(parts, trained):
    device = torch.device("cpu")
    model = given_degrees(trained, parts[0])
    again = start_masked(model, parts[0], "cubic", device)
    torch.testing.assert_close(predict(again, parts[2]), predict(model, parts[2]))
    (zero,) = Random(surrogate="zero").linearize(trained, parts[0], [200])
    (square,) = Random(surrogate="quadratic").linearize(trained, parts[0], [200])
    for start, wanted, message in (
        (model, "quadratic", "replaced by cubics, which quadratics cannot stand for; .* surrogate='cubic'"),
        (model, "identity", "replaced by cubics, which the identity cannot stand for; .* surrogate='cubic'"),
        (zero.model, "identity", "replaced by zero, which the identity cannot stand for; .* surrogate='zero'"),
        (square.model, "zero", "replaced by quadratics, which zero cannot stand for; .* surrogate='quadratic'"),
    ):
        with pytest.raises(FairlineError, match=message):
            start_masked(start, parts[0], wanted, device)
    assert all(cut(layer).any() for layer in masked_relus(model).values())


def test_the_cost_counts_the_squares_and_cubes_that_channels_need(parts, trained):
    image = torch.zeros(1, 1, 8, 8)
    model = mask_relus(trained, parts[0].normalized(slice(2)))
    name, layer = next(iter(masked_relus(model).items()))
    layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
    per_channel = layer.kept[0].numel()

    def told(degrees):
        layer.use_degrees(torch.tensor(degrees))
        found = estimate(model, image, protocol="semi2k").layers
        rows = found[found["part"] == "quadratic"]
        return rows["bytes"].sum(), rows["rounds"].sum()

    # A product of secrets and one with a private value take 40 bytes and two rounds each.
    assert told([0, 1, 0, 1]) == (0, 0)
    assert told([2, 0, 1, 0]) == (2 * 40 * per_channel, 4)
    assert told([2, 0, 2, 0]) == (4 * 40 * per_channel, 4)
    assert told([3, 0, 1, 0]) == (3 * 40 * per_channel, 6)
    # Squares and cubes share their rounds.
    assert told([3, 2, 1, 0]) == (5 * 40 * per_channel, 6)
    assert told([2, 2, 2, 2]) == (8 * 40 * per_channel, 4)
    graph = to_graph(model, image)
    assert {node.op for node in graph.nodes if node.layer == name} == {"quadratic"}
    layer.use_degrees(torch.tensor([3, 2, 1, 0]))
    graph = to_graph(model, image)
    assert {node.op for node in graph.nodes if node.layer == name} == {"polynomial"}


def test_audits_say_what_bends(parts, trained):
    model = given_degrees(trained, parts[0])
    layers = list(masked_relus(model).values())
    layers[0].use_surrogate("zero")
    assert Ablation(model, parts[0], torch.device("cpu")).bends == {"mixed_surrogate": len(layers) - 1}
