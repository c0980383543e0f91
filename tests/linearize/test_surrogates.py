from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairline import SNL, CoordinateDescent, Magnitude, finetune
from fairline.audit.functional import Functional
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize.surrogates import (
    damped,
    fit_surrogates,
    least_squares,
    start_masked,
)
from fairline.masking import MaskedReLU, load_masks, mask_relus, masked_relus, save_masks, surrogate_of
from fairline.runs import ModelSpec, NetworkInfo, load_network, save_network


def moments(x: torch.Tensor, degree: int = 2) -> torch.Tensor:
    """Of values a channel, (C, N)."""
    powers = [x**k for k in range(2 * degree + 1)] + [x**k * x.clamp_min(0) for k in range(degree + 1)]
    return torch.stack([power.sum(1) for power in powers], 1)


def quadratic(shape=(3, 4, 4), mask=None, seed=0) -> MaskedReLU:
    layer = MaskedReLU(shape)
    layer.use_surrogate("quadratic")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.coefficients.copy_(torch.randn(layer.coefficients.shape, generator=generator))
    if mask is not None:
        layer.set_mask(mask)
    return layer.double()


def test_the_fit_to_a_normal_distribution_is_the_closed_form():
    """E[relu] = 1/√(2π), E[x·relu] = 1/2, E[x²·relu] = 2/√(2π): c = (1, √(2π), 1)/√(8π)."""
    gauss = 1 / math.sqrt(2 * math.pi)
    normal = torch.tensor([[1.0, 0.0, 1.0, 0.0, 3.0, gauss, 0.5, 2 * gauss]], dtype=torch.float64)
    expected = torch.tensor([[1 / math.sqrt(8 * math.pi), 0.5, 1 / math.sqrt(8 * math.pi)]], dtype=torch.float64)
    torch.testing.assert_close(least_squares(normal), expected)
    # With a fifth of the square: E[relu − 0.2·c₂x²] = c₀, and the odd part is unmoved.
    constant = gauss - 0.2 / math.sqrt(8 * math.pi)
    torch.testing.assert_close(
        damped(expected, normal), torch.tensor([[constant, 0.5, 1 / math.sqrt(8 * math.pi)]]).double()
    )


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 300.0]), shift=st.floats(-2, 2))
def test_the_fit_is_numpys_least_squares(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    x = scale * (torch.randn(2, 200, generator=generator, dtype=torch.float64) + shift)
    found = least_squares(moments(x))
    for own, values in zip(found, x.numpy(), strict=True):
        design = np.stack([np.ones_like(values), values, values**2], 1)
        fitted = design @ own.numpy()
        best = design @ np.linalg.lstsq(design, np.maximum(values, 0), rcond=None)[0]
        np.testing.assert_allclose(fitted, best, rtol=1e-4, atol=1e-5 * scale)


def test_channels_that_never_bend_or_never_pass():
    x = torch.rand(1, 100, dtype=torch.float64) + 0.5
    torch.testing.assert_close(least_squares(moments(x))[0], torch.tensor([0.0, 1.0, 0.0]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(least_squares(moments(-x))[0], torch.zeros(3).double(), atol=1e-6, rtol=0)
    # A constant leaves the coefficients open; the value there is right.
    c = least_squares(moments(torch.full((1, 50), 2.0, dtype=torch.float64)))[0]
    assert float(c[0] + 2 * c[1] + 4 * c[2]) == pytest.approx(2.0)


def test_a_network_is_fitted_channel_by_channel(parts, trained):
    masked = start_masked(trained, parts[0], "quadratic", torch.device("cpu"), samples=10_000)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in masked_relus(masked)}
    for name, layer in masked_relus(masked).items():
        layer.register_forward_pre_hook(lambda _, arguments, name=name: seen[name].append(arguments[0]))
    masked.eval()
    with torch.no_grad():
        masked(parts[0].normalized())
    for name, layer in masked_relus(masked).items():
        x = torch.cat(seen[name]).double()
        for channel in range(x.shape[1]):
            values = x[:, channel].flatten().numpy()
            design = np.stack([np.ones_like(values), values, values**2], 1)
            square = np.linalg.lstsq(design, np.maximum(values, 0), rcond=None)[0][2]
            rest = np.maximum(values, 0) - 0.2 * square * values**2
            line = np.linalg.lstsq(design[:, :2], rest, rcond=None)[0]
            best = design[:, :2] @ line + 0.2 * square * values**2
            c = layer.coefficients[:, channel, 0, 0].detach().numpy()
            np.testing.assert_allclose(design @ (c * [1, 1, 0.2]), best, atol=1e-4)
            with torch.no_grad():
                np.testing.assert_allclose(layer.substitute(x.float())[:, channel].flatten(), best, atol=1e-4)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.4, 1.0]), learn=st.booleans())
def test_value_and_gradients_are_the_definitions(seed, share, learn):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 4, 4, generator=generator) < share
    layer = quadratic(mask=mask, seed=seed)
    m = mask.double()
    if learn:
        m = torch.rand(3, 4, 4, generator=generator, dtype=torch.float64)
        layer.learn()
        layer.double().weight.data.copy_(m)
    x = torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    c, m2 = layer.coefficients.detach().clone().requires_grad_(), m.clone().requires_grad_()
    y = layer(x1)
    # A mask that is learned opens nothing that was cut before.
    opened = m2 * mask
    expected = opened * x2.relu() + (1 - opened) * (c[0] + c[1] * x2 + 0.2 * c[2] * x2**2)
    torch.testing.assert_close(y, expected)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    if share < 1 or learn:
        torch.testing.assert_close(layer.coefficients.grad, c.grad)
    if learn:
        torch.testing.assert_close(layer.weight.grad, m2.grad)


def test_masking_with_quadratics_changes_nothing_until_a_relu_goes(parts, trained):
    masked = mask_relus(trained, parts[0].normalized(slice(2)), "quadratic")
    assert torch.equal(predict(masked, parts[2]), predict(trained, parts[2]))
    assert surrogate_of(masked) == "quadratic"
    assert surrogate_of(mask_relus(masked, parts[0].normalized(slice(2)))) == "quadratic"
    back = mask_relus(masked, parts[0].normalized(slice(2)), "identity")
    assert surrogate_of(back) == "identity"
    # A new quadratic is the identity, until it is fitted.
    plain = mask_relus(trained, parts[0].normalized(slice(2)))
    for model in (masked, plain):
        for layer in masked_relus(model).values():
            layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
    torch.testing.assert_close(predict(masked, parts[2]), predict(plain, parts[2]))
    fit_surrogates(mask_relus(trained, parts[0].normalized(slice(2)), "quadratic"), parts[0], samples=50)


def test_quadratics_fit_better_than_the_identity(parts, trained):
    """Mean squared distance to the ReLU, for every layer; by construction."""
    masked = start_masked(trained, parts[0], "quadratic", torch.device("cpu"), samples=10_000)
    errors = {}

    def compare(name, layer, x):
        relu = x.relu()
        errors[name] = (float((layer.substitute(x) - relu).square().mean()), float((x - relu).square().mean()))

    for name, layer in masked_relus(masked).items():
        layer.register_forward_pre_hook(lambda own, arguments, name=name: compare(name, own, arguments[0]))
    with torch.no_grad():
        masked.eval()(parts[0].normalized())
    assert all(fitted < identity for fitted, identity in errors.values())


@pytest.mark.parametrize(
    "method",
    [
        Magnitude(surrogate="quadratic"),
        SNL(surrogate="quadratic", lr=0.02, lam=1e-3, batch_size=32, max_epochs=20),
        CoordinateDescent(surrogate="quadratic", step=100, candidates=2, refresh_epochs=1),
    ],
    ids=lambda method: method.name,
)
def test_every_method_takes_them(parts, trained, tmp_path, method):
    (cut,) = method.linearize(trained, parts[0], [0.2])
    assert surrogate_of(cut.model) == "quadratic"
    before = {name: layer.coefficients.detach().clone() for name, layer in masked_relus(cut.model).items()}
    student = finetune(cut.model, trained, parts[0], parts[1], epochs=2, batch_size=32, lr=0.01)
    assert predict(student, parts[2]).isfinite().all()
    after = {name: layer.coefficients for name, layer in masked_relus(student).items() if layer.num_kept < 16}
    assert after
    assert all(not torch.equal(before[name], coefficients) for name, coefficients in after.items())
    # A run folder brings them back.
    spec = ModelSpec("cnn", 3, 1, 8, {"width": 4})
    info = NetworkInfo(spec, "finetuned", cut.relus, cut.total, cut.budget, method.name, surrogate="quadratic")
    save_network(tmp_path / "network", student, info)
    loaded, said = load_network(tmp_path / "network")
    assert said.surrogate == "quadratic"
    assert torch.equal(predict(loaded, parts[2]), predict(student, parts[2]))


def test_curvature_of_quadratics_by_finite_differences(parts, trained):
    (cut,) = Magnitude(surrogate="quadratic").linearize(trained, parts[0], [0.3])
    functional = Functional(cut.model.double(), parts[0])
    index = torch.arange(20)
    names = list(functional.parameters)
    assert any(name.endswith("coefficients") for name in names)
    direction = torch.randn(functional.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction /= direction.norm()
    product = functional.hessian_product(index)(direction)
    step = 1e-6
    gradients = []
    for sign in (1, -1):
        moved = copy.deepcopy(cut.model)
        pieces = functional.unflat(sign * step * direction)
        with torch.no_grad():
            for parameter, piece in zip(moved.parameters(), pieces, strict=True):
                parameter.add_(piece)
        gradients.append(Functional(moved, parts[0]).gradient(index))
    torch.testing.assert_close(product, (gradients[0] - gradients[1]) / (2 * step), rtol=1e-3, atol=1e-5)


def test_mask_files_name_their_surrogate(parts, trained, tmp_path):
    example = parts[0].normalized(slice(2))
    masked = mask_relus(trained, example, "quadratic")
    save_masks(tmp_path / "masks.safetensors", masked, method="test", budget=1, seed=0)
    assert (
        load_masks(tmp_path / "masks.safetensors", mask_relus(trained, example, "quadratic")).surrogate == "quadratic"
    )
    with pytest.raises(FairlineError, match="made for quadratic surrogates, but the model's are identity"):
        load_masks(tmp_path / "masks.safetensors", mask_relus(trained, example))


def test_an_unknown_surrogate(parts, trained):
    told = "identity, quadratic, cubic or zero, not 'quartic'"
    with pytest.raises(FairlineError, match=told):
        mask_relus(trained, parts[0].normalized(slice(2)), "quartic")
    with pytest.raises(FairlineError, match=told):
        Magnitude(surrogate="quartic")
    layer = MaskedReLU((3, 4, 4))
    with pytest.raises(FairlineError, match="no surrogate of degree 4; degrees are 0 to 3"):
        layer.use_degrees(torch.tensor([1, 4, 2]))
    with pytest.raises(FairlineError, match=r"3 channels need as many degrees, not \(2,\)"):
        layer.use_degrees(torch.tensor([1, 2]))
    assert isinstance(trained, nn.Module)
