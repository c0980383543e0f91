"""The cost of a network under masks that it does not have yet is that of the network that gets them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from fairline.private import PredictedCost, estimate
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


@pytest.mark.parametrize("surrogate", ["identity", "quadratic"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_cost_of_the_masked_network(name, surrogate):
    torch.manual_seed(0)
    masked = mask_relus(networks()[name](), IMAGE.expand(2, -1, -1, -1), surrogate)
    layers = list(masked_relus(masked).items())
    sizes = {name: layer.kept.numel() for name, layer in layers}
    cost = PredictedCost("semi2k", "wan", "bytes")(masked, IMAGE)
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
    costs = {measure: PredictedCost("cheetah", "100:40", measure)(masked, image) for measure in ("seconds", "rounds")}
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
        ({"minimise": "relus"}, "A cost is seconds, bytes, rounds, not 'relus'"),
        ({"protocol": "cryptflow2"}, "No source tells the seconds of 'cryptflow2'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        PredictedCost(**options)
