"""Small claims of the methods' descriptions that the tests of each method do not make."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairline import SNL, AutoReP, CoordinateDescent, DeepReDuce, Magnitude, SENet
from fairline.linearize.surrogates import least_squares
from fairline.masking import MaskedReLU, mask_relus, masked_relus


@pytest.mark.parametrize(
    ("method", "published"),
    [
        (SNL(), {"lam": 1e-5, "growth": 1.1, "patience": 5, "lr": 1e-3, "threshold": 1e-2, "temperature": 4}),
        (AutoReP(), {"lam": 140, "threshold": 3e-3, "mask_lr": 1e-3, "lr": 1e-3, "lr_min": 1e-5, "hold": 200}),
        (CoordinateDescent(), {"step": 100, "candidates": 50, "tolerance": 3e-3, "refresh_epochs": 20}),
        (SENet(), {"density": 0.1, "literal": False, "granularity": "pixel"}),
        (DeepReDuce(), {"reshape_epochs": 200}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_not_set_is_as_described(method, published):
    assert {name: getattr(method, name) for name in published} == published


@pytest.mark.parametrize("lr", [5e-3, 2e-2])
def test_under_the_price_alone_snl_closes_a_mask_in_its_steps_and_pulls_it_back_to_zero(lr):
    method = SNL(lr=lr)
    student = nn.Sequential(MaskedReLU((3,)))
    method.prepare(student)
    layer, optimizer = student[0], method.optimizer(student)

    def step() -> None:
        optimizer.zero_grad()
        (method.lam * method.sparsity(layer).sum()).backward()
        optimizer.step()

    steps = math.floor(method.steps_to_close())
    for _ in range(steps - 1):
        step()
    assert method.open(layer).all()
    for _ in range(math.ceil(0.1 * steps) + 2):
        step()
    assert not method.open(layer).any()
    lowest = 0.0
    for _ in range(steps):
        step()
        lowest = min(lowest, float(layer.weight.detach().min()))
    # It runs past zero as far as Adam's momentum carries it, some ten steps, and is pulled back.
    assert -20 * lr < lowest < 0
    assert layer.weight.abs().max() < -lowest


def test_magnitude_is_how_far_an_output_moves_when_its_relu_goes(parts, trained):
    images = parts[0].normalized()
    scores = Magnitude(samples=10_000).scores(mask_relus(trained, images[:2]).eval(), parts[0])
    for name, layer in masked_relus(student := mask_relus(trained, images[:2]).eval()).items():
        outputs = []
        layer.register_forward_hook(lambda *arguments, outputs=outputs: outputs.append(arguments[2]))
        with torch.no_grad():
            student(images)
            layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
            student(images)
        layer.set_mask(torch.ones(layer.shape, dtype=torch.bool))
        moved = (outputs[0] - outputs[1]).abs().mean(0)
        torch.testing.assert_close(scores[name].to(moved), moved, rtol=1e-4, atol=1e-5)


@settings(max_examples=30)
@given(mean=st.floats(-2, 2), deviation=st.floats(0.3, 3))
def test_quadratics_are_autoreps_for_the_distribution_of_a_channel(mean, deviation):
    """The closed form for N(μ, σ²), of which AutoReP's paper gives the principle and its code the formula, in σ."""
    x = torch.linspace(mean - 12 * deviation, mean + 12 * deviation, 20_001, dtype=torch.float64)
    density = torch.exp(-(((x - mean) / deviation) ** 2) / 2)
    weights = density / density.sum()
    terms = [x**k for k in range(5)] + [x**k * x.clamp_min(0) for k in range(3)]
    found = least_squares(torch.stack([(weights * term).sum() for term in terms])[None])[0]
    bell = math.exp(-((mean / deviation) ** 2) / 2) / math.sqrt(2 * math.pi)
    square = bell / (2 * deviation)
    linear = 1 - math.erfc(mean / (math.sqrt(2) * deviation)) / 2 - bell * mean / deviation
    constant = bell * (mean**2 + deviation**2) / (2 * deviation)
    torch.testing.assert_close(found, torch.tensor([constant, linear, square]).double(), rtol=1e-4, atol=1e-5)
