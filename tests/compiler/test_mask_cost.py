"""The cost of a network under masks that it does not have yet is that of the network that gets them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fairline.compiler import MEASURES, PredictedCost, Regions
from fairline.compiler.mask_cost import with_kept
from fairline.compiler.planner import plan
from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from fairline.private import estimate, to_graph
from tests.architectures import ARCHITECTURES

IMAGE = torch.zeros(1, 3, 16, 16)
#: Networks that private inference takes, whose ReLUs are modules, functions, shared or in place.
NAMES = ("ResNet, torchvision's", "ResNet v2", "ResNet of functions", "DenseNet with checkpoints", "VGG with BatchNorm")


def networks():
    found = {name: ARCHITECTURES[full][0] for full in ARCHITECTURES for name in NAMES if full.startswith(name)}
    assert set(found) == set(NAMES)
    return found


def thinned(masked: nn.Module, counts: dict[str, int]) -> nn.Module:
    for name, layer in masked_relus(masked).items():
        flat = torch.zeros(layer.kept.numel(), dtype=torch.bool)
        flat[: counts[name]] = True
        layer.set_mask(flat.view(layer.shape))
    return masked


@pytest.mark.parametrize("surrogate", ["identity", "quadratic", "cubic", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_cost_of_the_masked_network(name, surrogate):
    torch.manual_seed(0)
    masked = mask_relus(networks()[name](), IMAGE.expand(2, -1, -1, -1), surrogate)
    layers = list(masked_relus(masked).items())
    sizes = {name: layer.kept.numel() for name, layer in layers}
    cost = PredictedCost("semi2k", "wan", "bytes", compiled=False)(masked, IMAGE)
    assert all(layer.num_kept == layer.kept.numel() for _, layer in layers)
    some = {name: (size if place % 3 == 0 else place % 3 - 1) for place, (name, size) in enumerate(sizes.items())}
    for counts in (sizes, dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 1), some):
        told = estimate(thinned(masked, counts), IMAGE, protocol="semi2k", network="wan")
        assert cost(counts) == pytest.approx(told.bytes + told.offline_bytes)


def test_each_measure():
    masked = mask_relus(build("cnn", 3, 1, 8, width=4), torch.zeros(2, 1, 8, 8))
    image = torch.zeros(1, 1, 8, 8)
    counts = dict.fromkeys(masked_relus(masked), 5)
    told = estimate(thinned(masked, counts), image, protocol="cheetah", network="100:40")
    costs = {
        measure: PredictedCost("cheetah", "100:40", measure, compiled=False)(masked, image)
        for measure in ("seconds", "rounds")
    }
    assert costs["seconds"](counts) == pytest.approx(told.seconds)
    assert costs["rounds"](counts) == told.rounds
    # A layer that is not named keeps nothing.
    first, *_ = counts
    assert costs["rounds"]({first: 5}) == costs["rounds"]({**dict.fromkeys(counts, 0), first: 5}) < told.rounds
    assert PredictedCost("delphi", minimise="bytes")(masked, image)(counts) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "morse"}, "no cost model of 'morse'"),
        ({"network": "string"}, "Network 'string' is not one of"),
        ({"minimise": "relus"}, "one of seconds, bytes, rounds, not 'relus'"),
        ({"protocol": "cryptflow2"}, "No source tells how long cryptflow2 takes"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        PredictedCost(**options)


def test_compiled_it_is_between_the_whole_plan_and_the_network_as_it_stands():
    torch.manual_seed(0)
    masked = mask_relus(build("cnn", 3, 1, 8, width=4), torch.zeros(2, 1, 8, 8))
    image = torch.zeros(1, 1, 8, 8)
    layers = list(masked_relus(masked))
    partly = to_graph(thinned(masked, dict.fromkeys(layers, 1)), image)
    for minimise in MEASURES:
        compiled, standing = (PredictedCost("cheetah", "lan", minimise, compiled) for compiled in (True, False))
        asked = compiled(masked, image)
        for kept, each in ((layers[:1], 4), (layers, 1), (layers, 60)):
            counts = dict.fromkeys(kept, each)
            graph = with_kept(partly, counts)
            whole = PredictedCost("cheetah", "lan", minimise, compiled=False).of(
                Regions(graph).outline(plan(Regions(graph), compiled.terms).plan)
            )
            assert whole <= compiled.of(graph) * (1 + 1e-12)
            assert compiled.of(graph) <= standing.of(graph) * (1 + 1e-12)
            assert asked(counts) == pytest.approx(compiled.of(graph), rel=1e-12)


def test_an_early_end_makes_a_compiled_network_cheap():
    """What follows the last ReLU is one matrix: of as many ReLUs those in early layers cost less."""
    torch.manual_seed(0)
    masked = mask_relus(build("resnet18", 3, 1, 8, width=2), torch.zeros(2, 1, 8, 8))
    layers = list(masked_relus(masked))
    for minimise in MEASURES:
        cost = PredictedCost("cheetah", "lan", minimise)(masked, torch.zeros(1, 1, 8, 8))
        early, late, everywhere = (
            cost(kept)
            for kept in (
                dict.fromkeys(layers[:2], 16),
                dict.fromkeys(layers[2:4], 16),
                dict.fromkeys(layers, 2),
            )
        )
        assert early <= late <= everywhere
        assert early < everywhere
