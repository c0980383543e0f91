"""The cheap baselines: random, magnitude and layerwise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fairline as fl
from fairline.errors import FairlineError
from fairline.linearize import REGISTRY, Layerwise, Magnitude, Random, build
from fairline.linearize.ranked import Ranked
from fairline.masking import mask_relus, masked_relus, relu_count
from tests.commands import ok

METHODS = [name for name, method in REGISTRY.items() if issubclass(method, Ranked)]


def kept(model):
    return torch.cat([layer.kept.flatten() for layer in masked_relus(model).values()])


@pytest.mark.parametrize("name", METHODS)
def test_budgets_are_exact_and_nested_and_weights_stay(parts, trained, name):
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    cuts = list(build(name).linearize(trained, parts[0], [1.0, 100, 0.5, 0]))
    total = cuts[0].total
    assert [cut.relus for cut in cuts] == [total, total // 2, 100, 0]
    assert all(cut.relus == relu_count(cut.model) for cut in cuts)
    for larger, smaller in pairwise(cuts):
        assert (kept(larger.model) >= kept(smaller.model)).all()
    for cut in cuts:
        assert cut.method == name
        state = cut.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in before.items())
    (again,) = build(name).linearize(trained, parts[0], [100])
    assert torch.equal(kept(again.model), kept(cuts[2].model))


def test_random_spreads_over_all_layers(parts, trained):
    masks = torch.stack(
        [kept(next(iter(Random(seed=seed).linearize(trained, parts[0], [0.25]))).model) for seed in range(60)]
    )
    # Each unit is kept with probability 1/4: 60 draws have a standard deviation of 0.056.
    assert (masks.float().mean(0) - 0.25).abs().max() < 5 * 0.056


def test_magnitude_keeps_what_bends_most(parts, trained):
    (cut,) = Magnitude(samples=10_000).linearize(trained, parts[0], [0.1])
    masked = mask_relus(trained, parts[0].normalized(slice(2))).eval()
    negative = {name: torch.zeros(layer.shape) for name, layer in masked_relus(masked).items()}
    with torch.no_grad():
        for name, layer in masked_relus(masked).items():

            def add(_, inputs, name=name):
                negative[name] += inputs[0][0].clamp_max(0).abs()

            layer.register_forward_pre_hook(add)
        for i in range(len(parts[0])):
            masked(parts[0].normalized(slice(i, i + 1)))
    scores = torch.cat([n.flatten() for n in negative.values()])
    mask = kept(cut.model)
    assert scores[mask].min() >= scores[~mask].max() - 1e-3


def test_relative_magnitudes_leave_every_layer_something(parts, trained):
    (cut,) = Magnitude(relative=True).linearize(trained, parts[0], [0.3])
    assert all(layer.num_kept > 0 for layer in masked_relus(cut.model).values())


def test_layerwise_keeps_the_layers_that_the_loss_needs(parts, trained):
    train = parts[0]
    masked = mask_relus(trained, train.normalized(slice(2))).eval()
    rise = {}
    images = train.normalized()
    with torch.no_grad():
        before = F.cross_entropy(masked(images), train.labels)
        for name, layer in masked_relus(masked).items():
            layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
            rise[name] = float(F.cross_entropy(masked(images), train.labels) - before) / layer.kept.numel()
            layer.set_mask(torch.ones(layer.shape, dtype=torch.bool))
    order = sorted(rise, key=lambda name: -rise[name])
    sizes = {name: layer.kept.numel() for name, layer in masked_relus(masked).items()}
    budget = sizes[order[0]] + 5
    (cut,) = Layerwise(samples=10_000).linearize(trained, train, [budget])
    counts = {name: layer.num_kept for name, layer in masked_relus(cut.model).items()}
    assert counts == {order[0]: sizes[order[0]], order[1]: 5, **dict.fromkeys(order[2:], 0)}


def test_a_method_on_the_command_line(runs, tmp_path):
    out = ok("linearize", runs / "base", "--method", "magnitude", "--budgets", "20", "--out", tmp_path / "cut")
    assert "20 of 448 ReLUs" in out
    ok("finetune", tmp_path / "cut", "--epochs", "1", "--out", tmp_path / "students")
    said = ok("compare", tmp_path / "students", "--resamples", "20", "--out", tmp_path / "compare")
    assert "magnitude: erm" in said


def test_bad_settings(parts, trained):
    with pytest.raises(FairlineError, match="one sample at least"):
        Magnitude(samples=0)
    with pytest.raises(FairlineError, match="one sample at least"):
        Layerwise(samples=0)
    with pytest.raises(FairlineError, match="impossible"):
        list(Random().linearize(trained, parts[0], [10**9]))
    with pytest.raises(FairlineError, match="no ReLU"):
        list(Random().linearize(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), parts[0], [1]))
    with pytest.raises(FairlineError, match=r"Linearizer 'random' knows no option 'objective'"):
        build("random", objective=fl.ERM())
