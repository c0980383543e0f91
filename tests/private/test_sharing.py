"""Shared signs under cryptography: every engine computes them, and they cost what is predicted."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fairline as fl
from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus, patches, prototypes, relu_count
from fairline.models import build
from fairline.private import PROTOCOL_COSTS, PlainGraph, estimate, run, to_graph, write_onnx
from fairline.private.cost import Cost, ProtocolCost
from fairline.private.network import GraphNetwork
from fairline.private.plan import graph_digest
from tests.private.networks import Everything, settle

EXAMPLE = torch.zeros(1, 3, 16, 16)
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def shared(model: nn.Module, seed: int = 0) -> nn.Module:
    """Patches of several sizes in the first layers, prototypes in the next, some units cut, one layer without any."""
    result = mask_relus(settle(model), EXAMPLE)
    generator = torch.Generator().manual_seed(seed)
    for place, layer in enumerate(masked_relus(result).values()):
        kept = torch.rand(layer.shape, generator=generator) < 0.7
        if place == 2:
            layer.share(prototypes(layer.shape, [channel // 2 * 2 for channel in range(layer.shape[0])]))
        elif len(layer.shape) == 3:
            sizes = torch.randint(1, 5, (layer.shape[0], 2), generator=generator).tolist()
            layer.share(patches(layer.shape, [(height, width) for height, width in sizes]))
        layer.set_mask(kept & (place != 1))
    return result.eval()


@pytest.fixture(scope="module", params=["everything", "resnet18"])
def case(request):
    torch.manual_seed(0)
    model = shared(Everything() if request.param == "everything" else build("resnet18", 5, 3, 16, width=4))
    return model, to_graph(model, EXAMPLE)


def close(found, model):
    with torch.no_grad():
        expected = model(IMAGES)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_graph_computes_and_counts_what_the_network_does(case, tmp_path):
    model, graph = case
    close(graph(IMAGES), model)
    assert graph.relus == relu_count(model)
    assert {node.op for node in graph.nodes} >= {"shared_relu"}
    graph.save_public(tmp_path / "public.safetensors")
    graph.save_weights(tmp_path / "weights.safetensors")
    again = PlainGraph.load_public(tmp_path / "public.safetensors")
    assert again.relus == graph.relus
    assert graph_digest(again) == graph_digest(graph)
    again.load_weights(tmp_path / "weights.safetensors")
    assert torch.equal(again(IMAGES), graph(IMAGES))


def test_jax_computes_it(case):
    pytest.importorskip("jax")
    from fairline.private.jax_graph import to_jax

    model, graph = case
    weights = {name: value.numpy() for name, value in graph.weights.items()}
    close(np.array(to_jax(graph)(weights, IMAGES.numpy())), model)


def test_onnx_computes_it(case, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, graph = case
    write_onnx(tmp_path / "network.onnx", graph)
    session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    close(session.run(None, {"images": IMAGES.numpy()})[0], model)


def test_a_network_of_the_graph_trains_and_says_it_again(case):
    model, graph = case
    network = GraphNetwork(graph)
    close(network(IMAGES).detach(), model)
    assert relu_count(network) == graph.relus
    network(IMAGES).square().sum().backward()
    assert all(each.grad is not None for each in network.parameters())
    again = to_graph(network, EXAMPLE)
    assert graph_digest(again) == graph_digest(graph)
    # Without a unit that it decides, a sign is gone.
    layer = next(layer for layer in masked_relus(network).values() if layer.signs is not None)
    layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
    assert to_graph(network, EXAMPLE).relus == relu_count(network) < graph.relus


def test_a_compiled_network_computes_it():
    """As a whole, and with more of it dense, where signs are few."""
    torch.manual_seed(0)
    model = shared(build("cnn", 4, 3, 16, width=2)).double()
    layers = list(masked_relus(model).values())
    layers[0].set_mask(torch.arange(2).view(2, 1, 1) < 1)
    images = IMAGES.double()
    for minimise in ("rounds", "bytes", "seconds"):
        compiled = fl.compile(model, EXAMPLE.double(), minimise=minimise)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-9, atol=1e-9)
        assert relu_count(compiled) <= relu_count(model)


def test_files_that_do_not_say_who_votes_are_one_sentence(case, tmp_path):
    _, graph = case
    node = next(node for node in graph.nodes if node.op == "shared_relu")
    for masks, message in (
        ({name: mask for name, mask in graph.masks.items() if name != node.mask}, "does not say which units"),
        ({**graph.masks, str(node.mask): graph.masks[str(node.mask)][:, :1]}, "are integers of shape"),
    ):
        other = PlainGraph(graph.input_shape, graph.nodes, graph.shapes, masks, {})
        other.save_public(tmp_path / "public.safetensors")
        with pytest.raises(FairlineError, match=message):
            PlainGraph.load_public(tmp_path / "public.safetensors")


def one_layer(blocks: tuple[int, int] | None, side: int = 16, channels: int = 4) -> PlainGraph:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU(), nn.Flatten())
    model = mask_relus(network.eval(), torch.zeros(1, 3, side, side))
    (layer,) = masked_relus(model).values()
    if blocks is not None:
        layer.share(patches(layer.shape, blocks))
    return to_graph(model, torch.zeros(1, 3, side, side))


@settings(max_examples=30)
@given(st.integers(1, 10_000), st.sampled_from(sorted(PROTOCOL_COSTS)))
def test_a_relu_is_its_comparison_and_its_product(n, protocol):
    """Where the source tells both; Delphi's is an upper bound."""
    costs = PROTOCOL_COSTS[protocol]()
    both, whole = costs.compare(n) + costs.select(n), costs.relu(n)
    if protocol == "delphi":
        assert (costs.compare(n).bytes, costs.select(n)) == (whole.bytes, costs.product(n))
    else:
        for field in ("bytes", "offline_bytes", "rounds"):
            assert getattr(both, field) == pytest.approx(getattr(whole, field))
    assert costs.select(n).bytes < costs.compare(n).bytes


@pytest.mark.parametrize("protocol", PROTOCOL_COSTS)
@pytest.mark.parametrize("blocks", [(1, 1), (2, 2), (3, 5), (16, 16)])
def test_signs_are_compared_and_units_multiplied(protocol, blocks):
    costs, units = PROTOCOL_COSTS[protocol](), 4 * 16 * 16
    signs = 4 * math.ceil(16 / blocks[0]) * math.ceil(16 / blocks[1])
    told = estimate(one_layer(blocks), protocol=protocol, batch_size=2)
    assert told.relus == signs
    assert told.parts.loc["relu", "bytes"] == told.relu_bytes == costs.compare(2 * signs).bytes
    assert told.parts.loc["select", "bytes"] == costs.select(2 * units).bytes
    assert told.parts.loc[["relu", "select"], "rounds"].sum() == (costs.compare(1) + costs.select(1)).rounds
    assert (told.layers[told.layers["op"] == "shared_relu"]["relus"]).tolist() == [signs, 0]
    assert told.row()["bytes_select"] == (costs.select(2 * units).bytes + costs.select(2 * units).offline_bytes)
    plain = estimate(one_layer(None), protocol=protocol, batch_size=2)
    assert plain.parts.loc["select", "bytes"] == 0
    if blocks == (1, 1) and protocol != "delphi":
        assert told.bytes == pytest.approx(plain.bytes)
    elif signs < units:
        assert told.bytes < plain.bytes


def test_a_protocol_of_ones_own_needs_no_more_than_before():
    class Mine(ProtocolCost):
        def relu(self, n: int) -> Cost:
            return Cost(10 * n)

        def product(self, n: int) -> Cost:
            return Cost(3 * n)

        matmul = truncate = product_with_private = lambda self, *_: Cost()

    assert Mine().compare(5) == Cost(50)
    assert Mine().select(5) == Cost(15)


@pytest.mark.skipif(importlib.util.find_spec("spu") is None, reason="SPU is not installed")
@pytest.mark.parametrize("protocol", ["cheetah", pytest.param("semi2k", marks=pytest.mark.slow)])
def test_a_private_inference_gives_the_plain_logits_at_the_predicted_price(protocol):
    """At equal units and at equal signs, beside plain ReLUs."""
    from fairline.private import measure

    quarter = mask_relus(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten()).eval(), EXAMPLE)
    torch.manual_seed(0)
    (layer,) = masked_relus(quarter).values()
    layer.set_mask(torch.arange(1024).view(layer.shape) % 4 == 0)
    graphs = {
        "units": one_layer(None),
        "signs": to_graph(quarter, EXAMPLE),
        "patches": one_layer((2, 2)),
        "ragged": one_layer((3, 5)),
        "channels": one_layer((16, 16)),
    }
    found = measure(graphs, IMAGES[:1], protocols=[protocol], repeats=1).table.set_index("network")
    told = {name: estimate(graph, protocol=protocol) for name, graph in graphs.items()}
    for name in graphs:
        assert found.loc[name, "bytes"] == pytest.approx(told[name].bytes, rel=0.02)
        assert found.loc[name, "max_abs_error"] < 1e-3
    # As many comparisons as the quarter, as many products as all units.
    costs, cost = PROTOCOL_COSTS[protocol](), found["bytes"]
    assert cost["patches"] - cost["signs"] == pytest.approx(costs.select(1024 - 256).bytes, rel=0.05)
    assert cost["units"] - cost["patches"] == pytest.approx(costs.compare(1024 - 256).bytes, rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("spu") is None, reason="SPU is not installed")
def test_a_whole_network_runs_privately():
    torch.manual_seed(0)
    model = shared(build("cnn", 4, 3, 16, width=4))
    found = run(model, IMAGES[:2], protocol="semi2k", repeats=1)
    with torch.no_grad():
        torch.testing.assert_close(found.outputs, model(IMAGES[:2]), rtol=0, atol=1e-2)
    assert found.bytes == pytest.approx(estimate(model, EXAMPLE, protocol="semi2k", batch_size=2).bytes, rel=0.1)
