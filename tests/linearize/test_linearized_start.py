"""Every method goes on with a network that is linearized already: cuts stay, counted against all it had."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize import REGISTRY, SNL, CoordinateDescent, Magnitude, Random, SENet, build
from fairline.linearize.surrogates import start_masked
from fairline.masking import masked_relus, relu_count
from fairline.models import build as build_model

TOTAL = 448
MASKS = {"lr": 0.02, "batch_size": 32, "max_epochs": 12}
SENET = {"sensitivity_epochs": 1, "mask_epochs": 2, "epochs": 1, "batch_size": 64, "samples": 50}
METHODS = {
    "random": {},
    "magnitude": {},
    "layerwise": {},
    "snl": {**MASKS, "lam": 1e-3},
    "snl channels": {**MASKS, "lam": 1e-3, "granularity": "channel"},
    "snl layers emptied": {**MASKS, "lam": 1e-3, "empty_layers": 0.5, "protect": 1.0},
    "autorep": {**MASKS, "mask_lr": 0.05, "hold": 2},
    "autorep channels": {**MASKS, "mask_lr": 0.05, "hold": 2, "granularity": "channel"},
    "senet": SENET,
    "senet channels": {**SENET, "granularity": "channel"},
    "coordinate_descent": {"step": 60, "candidates": 2, "refresh_epochs": 1},
    "coordinate_descent within": {"step": 60, "candidates": 2, "refresh_epochs": 1, "within_layers": True},
    "taylor": {"rate": 0.5, "batch_size": 64},
    "taylor once": {"rate": 1.0},
    "shapley": {},
    "shapley by stages": {"players": "stage", "stages": "2,5,8", "within": "magnitude"},
    "block_relu": {"samples": 40},
    "block_relu layers": {"samples": 40, "granularity": "layer"},
    "deepreduce": {"stages": "2,5,8", "criticality_epochs": 1, "batch_size": 64, "reshape_epochs": 1},
    "delphi": {"population": 2, "generations": 1, "batch_size": 64},
    "safenet channels": {"population": 2, "generations": 1, "batch_size": 64, "samples": 50},
    "cryptonas": {"layers": 3, "search_epochs": 1, "controller_steps": 1, "samples": 2, "train_epochs": 1},
    "deepreduce warm": {"stages": "2,5,8", "order": "8,2,5", "fresh": False},
}


def kept(model):
    return torch.cat([layer.kept.flatten() for layer in masked_relus(model).values()])


@pytest.fixture
def linearized(parts, trained):
    (cut,) = Random(seed=5).linearize(trained, parts[0], [200])
    return cut.model


def test_all_methods_are_tried():
    assert {name.split()[0] for name in METHODS} == set(REGISTRY)


@pytest.mark.parametrize("name", METHODS)
def test_cuts_stay_and_budgets_count_against_all_relus(parts, trained, linearized, name):
    before, images = kept(linearized), parts[2]
    weights = copy.deepcopy(linearized.state_dict())
    method = build(name.split()[0], **METHODS[name])
    history: list[dict[str, float]] = []
    cuts = list(method.linearize(linearized, parts[0], [1.0, 0.9, 100, 0.05], history=history))
    assert [cut.budget for cut in cuts] == [TOTAL, round(0.9 * TOTAL), 100, 22]
    assert all(cut.total == TOTAL for cut in cuts)
    # What the network meets already is the network.
    for cut in cuts[:2]:
        assert torch.equal(kept(cut.model), before)
        assert cut.relus == 200
        assert cut.info["reached"]
        torch.testing.assert_close(predict(cut.model, images), predict(linearized, images))
    for cut in cuts[2:]:
        # CryptoNAS' networks are others.
        assert name == "cryptonas" or not (kept(cut.model) & ~before).any()
        assert cut.relus == relu_count(cut.model)
        if "channels" in name:
            # Of channels that are partly cut, whole rests are kept.
            assert cut.relus <= cut.budget
            for layer, start in zip(masked_relus(cut.model).values(), masked_relus(linearized).values(), strict=True):
                for channel, rest in zip(layer.kept, start.kept, strict=True):
                    assert not channel.any() or torch.equal(channel, rest)
        elif "layers" in name and "block" in name:
            assert cut.relus <= cut.budget
        else:
            assert cut.relus == cut.budget
        assert predict(cut.model, images).isfinite().all()
    assert all(torch.equal(weights[key], value) for key, value in linearized.state_dict().items())


@pytest.mark.parametrize("name", ["snl", "senet", "coordinate_descent", "deepreduce", "taylor", "shapley", "cryptonas"])
def test_it_resumes(parts, linearized, tmp_path, name):
    def run(**more):
        return build(name, **METHODS[name]).linearize(linearized, parts[0], [300, 120, 40], **more)

    whole = list(run())
    broken = run(checkpoint=tmp_path)
    next(broken)
    next(broken)
    broken.close()
    for a, b in zip(whole, run(checkpoint=tmp_path), strict=True):
        assert a.info == b.info
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("granularity", ["pixel", "channel", "layer"])
def test_mask_learning_starts_as_the_network(parts, linearized, granularity):
    """And counts, from the first epoch on, what is there."""
    history: list[dict[str, float]] = []
    settings = {"lr": 1e-9, "lam": 1e-9, "batch_size": 64, "max_epochs": 1, "granularity": granularity}
    (cut,) = SNL(**settings).linearize(linearized, parts[0], [150], history=history)
    assert history[0]["relus"] == 200
    assert not cut.info["reached"]
    assert not (kept(cut.model) & ~kept(linearized)).any()
    student = copy.deepcopy(linearized)
    for layer in masked_relus(student).values():
        layer.learn(granularity)
    torch.testing.assert_close(predict(student, parts[2]), predict(linearized, parts[2]))


def test_a_given_teacher_is_learned_from(parts, trained, linearized):
    """As coordinate descent's authors do: from an SNL network, with the whole one as the teacher."""
    settings = {"step": 50, "candidates": 2, "refresh_epochs": 2, "lr": 0.02}
    (own,) = CoordinateDescent(**settings).linearize(linearized, parts[0], [150])
    (given,) = CoordinateDescent(**settings, teacher=trained).linearize(linearized, parts[0], [150])
    assert torch.equal(kept(own.model), kept(given.model))
    assert not torch.equal(predict(own.model, parts[2]), predict(given.model, parts[2]))
    assert isinstance(trained, nn.Module)
    with pytest.raises(FairlineError, match="A teacher is a network"):
        CoordinateDescent(teacher="base")


def test_quadratics_on_the_way(parts, trained, linearized):
    """What is cut computes what it did: the identity stays where it is, and a quadratic is not replaced by it."""
    device = torch.device("cpu")
    masked = start_masked(linearized, parts[0], "quadratic", device)
    torch.testing.assert_close(predict(masked, parts[2]), predict(linearized, parts[2]))
    (quadratic,) = Magnitude(surrogate="quadratic").linearize(trained, parts[0], [200])
    again = start_masked(quadratic.model, parts[0], "quadratic", device)
    assert torch.equal(predict(again, parts[2]), predict(quadratic.model, parts[2]))
    with pytest.raises(FairlineError, match=r"replaced by quadratics, .* with surrogate='quadratic'"):
        list(Magnitude().linearize(quadratic.model, parts[0], [100]))
    # SENet compares with the teacher as it is, quadratics and all.
    (cut,) = SENet(**SENET, surrogate="quadratic").linearize(quadratic.model, parts[0], [100])
    assert cut.relus == 100


def test_a_network_that_has_lost_whole_stages(parts):
    torch.manual_seed(0)
    model = build_model("resnet18", 3, in_channels=1, image_size=8, width=2)
    order = ["layer1", "layer2", "layer3", "layer4"]
    warm = {"order": order, "fresh": False}
    (half,) = build("deepreduce", **warm, exact=False).linearize(model, parts[0], [0.5])
    left = {name: layer.num_kept for name, layer in masked_relus(half.model).items()}
    assert sum(count == 0 for count in left.values()) > 0
    for name, options in (
        ("deepreduce", warm),
        ("deepreduce", {"criticality_epochs": 1, "reshape_epochs": 1}),
        ("layerwise", {}),
        ("senet", SENET),
        ("snl", {**MASKS, "lam": 1e-2, "empty_layers": 0.5}),
    ):
        (cut,) = build(name, **options).linearize(half.model, parts[0], [0.1])
        assert cut.relus == cut.budget
        assert not (kept(cut.model) & ~kept(half.model)).any()
