"""Which part of a network to replace first: one that costs more than its ReLUs do, and what a call costs without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fairline.private.cost import COSTS, Estimate, estimate
from fairline.private.graph import POLYNOMIALS, Node, PlainGraph, kept_relus

#: Parts that may outweigh the ReLUs, those first that something cheaper can stand in for.
RIVALS = ("max_pool", "quadratic", "linear")


def replacement(graph: PlainGraph, told: Estimate) -> dict[str, Any]:
    """Find the part of a network that outweighs its ReLUs, and what a call costs with something else in its place.

    Args:
        graph: The network.
        told: What it is predicted to cost.

    Returns:
        ``replace``, a key of :data:`fairline.private.cost.PARTS`, empty where none outweighs the ReLUs; ``replace_in``,
        in what it does, a comma between; ``replaced_bytes``, ``replaced_rounds`` and ``replaced_seconds``, of a call
        to the network in which average pools stand for max pools, or nothing for polynomials. NaN for linear layers,
        for which nothing can stand.
    """
    row = told.row()
    for part in RIVALS:
        dearer = [c for c in COSTS if row[f"{c}_{part}"] > row[f"{c}_relu"] + row[f"{c}_select"]]
        if not dearer:
            continue
        without = row
        if part != "linear":
            other = estimate(
                without_part(graph, part),
                protocol=told.protocol,
                network=told.network,
                batch_size=told.batch_size,
            )
            without = other.row()
        costs = {f"replaced_{cost}": math.nan if part == "linear" else without[cost] for cost in COSTS}
        return {"replace": part, "replace_in": ", ".join(dearer), **costs}
    return {"replace": "", "replace_in": "", **{f"replaced_{cost}": math.nan for cost in COSTS}}


def without_part(graph: PlainGraph, part: str) -> PlainGraph:
    """A graph with something cheaper in the place of a part, there to be priced.

    Args:
        graph: The network.
        part: ``"max_pool"``, for which average pools stand, or ``"quadratic"``, for which nothing does.

    Returns:
        The graph, without weights.
    """
    nodes: list[Node] = []
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        if node.op == part == "max_pool":
            node = replace(node, op="avg_pool")
        elif part == "quadratic" and node.op in POLYNOMIALS:
            if not kept_relus(graph, node) and node.name != graph.nodes[-1].name:
                renamed[node.name] = node.inputs[0]
                continue
            node = replace(node, op="relu", weights=(), options={})
        nodes.append(node)
    return PlainGraph(graph.input_shape, nodes, _used(nodes, graph.shapes), graph.masks, {})


def _used(nodes: list[Node], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    used = {name for node in nodes for name in node.weights}
    return {name: shape for name, shape in shapes.items() if name in used}
