"""What to replace first, and what a cost stands on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fairline.private import NETWORKS, Network, estimate, to_graph
from fairline.private.basis import basis
from fairline.private.cost import COSTS
from fairline.private.replacement import replacement, without_part
from tests.private.networks import masked

EXAMPLE = torch.zeros(1, 3, 16, 16)
POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


def stem(pool: str, classes: int = 2) -> nn.Module:
    """The stem of torchvision's ResNets, and a head."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.ReLU(), POOLS[pool](3, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, classes)).eval()


@pytest.mark.parametrize("protocol", ["cheetah", "semi2k", "delphi", "cryptflow2"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_max_pool_that_outweighs_the_relus_is_named_with_what_an_average_pool_costs(protocol, share):
    graph = to_graph(masked(stem("max"), EXAMPLE, share), EXAMPLE)
    told = estimate(graph, protocol=protocol, network="wan", batch_size=2)
    found = replacement(graph, told)
    assert found["replace"] == "max_pool"
    # A window of 9 takes a tree of 4 comparisons, and 8 of them a value: 128 values of 512 ReLUs.
    assert found["replace_in"].split(", ")[:2] == ["bytes", "rounds"]
    other = to_graph(masked(stem("avg"), EXAMPLE, share), EXAMPLE)
    expected = estimate(other, protocol=protocol, network="wan", batch_size=2).row()
    for cost in COSTS:
        assert found[f"replaced_{cost}"] == pytest.approx(expected[cost], nan_ok=True)
    assert found["replaced_bytes"] < told.row()["bytes"]


def test_an_average_pool_is_no_rival_and_linear_layers_have_no_substitute():
    graph = to_graph(stem("avg"), EXAMPLE)
    found = replacement(graph, estimate(graph))
    assert found["replace"] == "linear"
    assert all(math.isnan(found[f"replaced_{cost}"]) for cost in COSTS)


def test_where_relus_cost_most_nothing_is_to_be_replaced():
    graph = to_graph(nn.Sequential(*[nn.ReLU()] * 3, nn.Flatten(), nn.Linear(768, 1)).eval(), EXAMPLE)
    assert replacement(graph, estimate(graph, protocol="semi2k", network="wan"))["replace"] == ""


def test_without_quadratics_a_layer_keeps_its_relus_alone():
    plain, squared = (to_graph(masked(stem("avg"), EXAMPLE, share, "quadratic"), EXAMPLE) for share in (1.0, 0.0))
    assert "quadratic" in {node.op for node in squared.nodes}
    bare = without_part(squared, "quadratic")
    assert not {"quadratic", "relu"} & {node.op for node in bare.nodes}
    assert estimate(bare).rounds < estimate(plain).rounds
    found = replacement(squared, estimate(squared, protocol="semi2k"))
    assert found["replace"] == "quadratic"
    assert found["replaced_bytes"] == estimate(bare, protocol="semi2k").bytes


def test_a_cost_is_measured_on_its_own_wire_only():
    lan, wan, loopback = (NETWORKS[name] for name in ("lan", "wan", "loopback"))
    assert basis(wan) == "predicted"
    assert basis(wan, wan) == basis(wan, Network("100:40", 0.04, 1e8)) == "measured over an emulated WAN"
    assert basis(Network("5:7", 0.007, 5e6), Network("5:7", 0.007, 5e6)) == "measured over an emulated 5:7"
    assert basis(wan, loopback) == "loopback measured, WAN added by the model"
    assert basis(loopback, loopback) == "measured over loopback"
    assert basis(wan, lan) is basis(loopback, lan) is None
