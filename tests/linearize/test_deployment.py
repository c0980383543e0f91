"""Emptying whole layers: each saves the rounds of a protocol."""

from __future__ import annotations

import copy

import pytest
import torch

from fairline import SNL, AutoReP, CoordinateDescent, FairlineError
from fairline.linearize.coordinate_descent import draw_within_a_layer
from fairline.linearize.learned import _State
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
        (lambda k: SNL(empty_layers=k, **{**FAST, "lam": 1e-2}), 0.5),
        (lambda k: AutoReP(empty_layers=k, mask_lr=0.02, hold=2, batch_size=32, max_epochs=40), 0.5),
        (
            lambda k: CoordinateDescent(
                empty_layers=k,
                within_layers=True,
                step=1,
                rate=0.2,
                blocks=6,
                candidates=6,
                batch_size=64,
                refresh_epochs=0,
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


def test_layers_are_emptied_by_their_density(parts, trained):
    """Of 256, 128 and 64 ReLUs a half, an eighth and a quarter are open: 160 of 448 (36 %)."""
    masked = mask_relus(trained, parts[0].normalized(slice(2)))
    SNL().prepare(masked)
    layers = masked_relus(masked)
    with torch.no_grad():
        for layer, share in zip(layers.values(), (2, 8, 4), strict=True):
            layer.weight.zero_()
            layer.weight.view(-1)[: layer.weight.numel() // share] = 1.0
    names = list(layers)
    for strength, closed in ((0.3, []), (0.5, [names[1]]), (0.8, [names[1], names[2]]), (1.0, [names[1], names[2]])):
        method = SNL(empty_layers=strength)
        state = _State(1.0, 448, lambda closed: None)
        copied = copy.deepcopy(masked)
        method._empty(masked_relus(copied), state)
        assert state.closed == closed
        for name, layer in masked_relus(copied).items():
            assert layer.weight.requires_grad == (name not in closed)
            assert bool((layer.weight == 0).all()) == (name in closed)
    # What remains is measured against what remains: 128 + 16 of 320 are 45 %, of which a quarter is more than half.
    method = SNL(empty_layers=0.5)
    state = _State(1.0, 448, lambda closed: None)
    method._empty(layers, state)
    method._empty(layers, state)
    assert state.closed == [names[1]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SNL(empty_layers=0.9, **FAST),
        lambda: AutoReP(empty_layers=0.9, mask_lr=0.02, hold=2, batch_size=32, max_epochs=20),
    ],
    ids=["snl", "autorep"],
)
def test_closed_layers_stay_closed_also_across_a_break(parts, trained, tmp_path, make):
    history: list[dict[str, float]] = []
    whole = list(make().linearize(trained, parts[0], [0.6, 0.2], history=history))
    in_use = [row["layers"] for row in history]
    assert in_use == sorted(in_use, reverse=True)
    assert in_use[-1] < 3
    broken = make().linearize(trained, parts[0], [0.6, 0.2], checkpoint=tmp_path)
    next(broken)
    broken.close()
    resumed = list(make().linearize(trained, parts[0], [0.6, 0.2], checkpoint=tmp_path))
    for a, b in zip(whole, resumed, strict=True):
        assert a.relus == b.relus
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)


def test_it_goes_with_protection(parts, deep):
    history: list[dict[str, float]] = []
    method = SNL(empty_layers=0.5, protect=1.0, **FAST)
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
    names = [draw_within_a_layer(layers, 5, generator, evenly=True)[0] for _ in range(400)]
    # Two layers are left: 200 each, with a standard deviation of 10.
    assert set(names) == set(list(layers)[1:])
    assert abs(names.count(names[0]) - 200) < 50


@pytest.mark.parametrize("method", [SNL, AutoReP, CoordinateDescent])
def test_bad_settings(method):
    with pytest.raises(FairlineError, match=r"empty_layers (≥ 0|in \[0, 1\]), not -1"):
        method(empty_layers=-1.0)
