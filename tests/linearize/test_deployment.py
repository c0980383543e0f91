"""Emptying whole layers: each saves the rounds of a protocol."""

from __future__ import annotations

import pytest
import torch

from fairline import SNL, AutoReP, CoordinateDescent, FairlineError
from fairline.linearize.coordinate_descent import _draw_block
from fairline.linearize.learned import units_of
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from fairline.training import train

FAST = {"lr": 0.02, "lam": 1e-3, "batch_size": 32, "max_epochs": 40}


@pytest.fixture(scope="module")
def deep(parts):
    torch.manual_seed(0)
    model = build("resnet18", 3, in_channels=1, image_size=8, width=2)
    train(model, parts[0], parts[1], epochs=4, batch_size=32, lr=0.05)
    return model


def layers_in_use(cut):
    return sum(layer.num_kept > 0 for layer in masked_relus(cut.model).values())


@pytest.mark.parametrize(
    ("make", "strength"),
    [
        (lambda k: SNL(empty_layers=k, **FAST), 1.0),
        (lambda k: AutoReP(empty_layers=k, mask_lr=0.02, batch_size=32, max_epochs=40), 1.0),
        (
            lambda k: CoordinateDescent(
                empty_layers=k, rate=0.2, blocks=6, candidates=6, batch_size=64, refresh_epochs=0
            ),
            0.2,
        ),
    ],
    ids=["snl", "autorep", "coordinate_descent"],
)
def test_more_layers_are_emptied_at_the_same_budget(parts, deep, make, strength):
    (plain,) = make(0.0).linearize(deep, parts[0], [0.1])
    (aware,) = make(strength).linearize(deep, parts[0], [0.1])
    assert aware.relus == plain.relus
    assert layers_in_use(aware) < layers_in_use(plain)


def test_prices_by_hand(parts, trained):
    """Layers with 256, 128 and 64 ReLUs of which a half, a quarter and none are open."""
    method = SNL(empty_layers=2.0)
    masked = mask_relus(trained, parts[0].normalized(slice(2)))
    method.prepare(masked)
    layers = masked_relus(masked)
    with torch.no_grad():
        for layer, share in zip(layers.values(), (2, 4, 0), strict=True):
            layer.weight.zero_()
            if share:
                layer.weight.view(-1)[: layer.weight.numel() // share] = 1.0
    prices = method._dearer(layers, {})
    # (Nₗ/openₗ)² is 4, 16 and 64² before what 128 + 32 open ReLUs cost in all is set to 160 again.
    scale = 160 / (128 * 4 + 32 * 16)
    expected = (4 * scale, 16 * scale, 64**2 * scale)
    for price, value, layer in zip(prices.values(), expected, layers.values(), strict=True):
        assert units_of(layer) == 1
        torch.testing.assert_close(price, torch.full(layer.shape, value))
    # On top of prices that are there already.
    doubled = method._dearer(layers, {name: torch.full(layer.shape, 2.0) for name, layer in layers.items()})
    for name, price in prices.items():
        torch.testing.assert_close(doubled[name], 2 * price)


def test_it_goes_with_protection(parts, deep):
    history: list[dict[str, float]] = []
    method = SNL(empty_layers=1.0, protect=1.0, **FAST)
    (cut,) = method.linearize(deep, parts[0], [0.3], history=history)
    assert cut.relus == round(0.3 * cut.total)
    assert "layers" in history[-1]
    assert "protected_group" in history[-1]


def test_blocks_are_drawn_evenly(parts, trained):
    masked = mask_relus(trained, parts[0].normalized(slice(2)))
    layers = masked_relus(masked)
    first = next(iter(layers.values()))
    first.set_mask(torch.zeros(first.shape, dtype=torch.bool))
    generator = torch.Generator().manual_seed(0)
    names = [_draw_block(layers, 5, generator, evenly=True)[0] for _ in range(400)]
    # Two layers are left: 200 each, with a standard deviation of 10.
    assert set(names) == set(list(layers)[1:])
    assert abs(names.count(names[0]) - 200) < 50


@pytest.mark.parametrize("method", [SNL, AutoReP, CoordinateDescent])
def test_bad_settings(method):
    with pytest.raises(FairlineError, match="empty_layers ≥ 0, not -1"):
        method(empty_layers=-1.0)
