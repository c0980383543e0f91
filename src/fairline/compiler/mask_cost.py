"""What a network would cost with other masks, as methods that place ReLUs ask it.

They ask for many masks, and a whole plan (:func:`fairline.compiler.planner.plan`) takes long. So of its blocks only
those are priced that stand as they are and those that are dense to the end: where the nonlinear part ends early, and
where few ReLUs are left, these are the ones that count, and what they cost is never below what a whole plan costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fairline.compiler.planner import Measure, Terms, cheapest, priced_blocks
from fairline.compiler.regions import Regions, weights_of
from fairline.masking import copy_model, masked_relus
from fairline.private.cost import Cost, layer_costs
from fairline.private.export import to_graph
from fairline.private.graph import MASKED, Node, PlainGraph
from fairline.private.wire import network as find_network


@dataclass(frozen=True)
class PredictedCost:
    """Predicts what a private inference of one image costs by how many units each masked layer keeps.

    Attributes:
        protocol: A key of :data:`fairline.private.PROTOCOL_COSTS`.
        network: Between the parties, as for :func:`fairline.private.estimate`.
        minimise: What a cost is: ``"seconds"`` or ``"bytes"`` of a call, or the ``"rounds"`` that must be waited for.
        compiled: Whether the network will be compiled (:func:`fairline.compile`).
    """

    protocol: str = "cheetah"
    network: str = "lan"
    minimise: Measure = "seconds"
    compiled: bool = True

    def __post_init__(self) -> None:
        """Check the settings."""
        self.terms.check()

    @property
    def terms(self) -> Terms:
        """What the network is compiled for."""
        return Terms(self.protocol, find_network(self.network), minimise=self.minimise)

    def __call__(self, model: nn.Module, example: Tensor) -> Callable[[Mapping[str, int]], float]:
        """Prepare to predict the costs of a network under other masks.

        Args:
            model: Masked; not changed. What stands in the place of its ReLUs is part of the cost.
            example: An image of the right shape, (1, C, H, W).

        Returns:
            A function of how many units each masked layer keeps, which are drawn at random: seconds, bytes or rounds.
        """
        partly = copy_model(model)
        for layer in masked_relus(partly).values():
            # Neither whole nor empty, where it can be, so that the graph has the node of each.
            units = layer.kept.numel()
            layer.set_mask(torch.arange(units).view(layer.shape) >= min(1, units - 1))
        graph = to_graph(partly, example).public()
        return lambda kept: self.of(with_kept(graph, kept))

    def of(self, graph: PlainGraph) -> float:
        """What a private inference of a graph costs: seconds, bytes or rounds."""
        terms = self.terms
        if self.compiled:
            regions = Regions(graph)
            limit = max(terms.max_weights, weights_of(graph))
            ways = list(priced_blocks(regions, terms, to_the_end=True))
            parts = [each.cost for each in cheapest(ways, len(regions.frontiers) - 1, limit)]
            parts.append(terms.costs.open(graph.outputs))
        else:
            parts = [cost for _, cost in layer_costs(graph, terms.costs)]
        return terms.price(sum(parts, Cost()), 0)[0]


def with_kept(graph: PlainGraph, kept: Mapping[str, int], seed: int = 0) -> PlainGraph:
    """A plain graph with other masks.

    Args:
        graph: Of a network in which each layer of ReLUs keeps some and cuts some.
        kept: Units that each layer keeps; none where it is not named.
        seed: Of the units.

    Returns:
        The graph, as the export of a network with such masks is.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes: list[Node] = []
    masks: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        if node.op in MASKED:
            count, size = kept.get(node.layer, 0), math.prod(node.shape)
            if count == 0 and node.op == "relu" and node.name != graph.nodes[-1].name:
                renamed[node.name] = node.inputs[0]
                continue
            if count == size:
                node = replace(node, op="relu", weights=(), mask=None, options={})
            else:
                mask = torch.zeros(size, dtype=torch.bool)
                mask[torch.randperm(size, generator=generator)[:count]] = True
                masks[node.name] = mask.view(node.shape)
                node = replace(node, mask=node.name)
        nodes.append(node)
    used = {name for node in nodes for name in node.weights}
    shapes = {name: shape for name, shape in graph.shapes.items() if name in used}
    return PlainGraph(graph.input_shape, nodes, shapes, masks, {})
