"""What a network takes in the clear: multiply-adds and bytes of its file."""

from __future__ import annotations

import math

from fairline.compiler.regions import weights_of
from fairline.private.graph import POLYNOMIALS, PlainGraph, polynomial_units


def multiply_adds(graph: PlainGraph) -> int:
    """Products of an activation with a weight, for a sample.

    Args:
        graph: With or without weights.

    Returns:
        Those of convolutions, linear layers, scales of single units and polynomials.
    """
    total = 0
    for node in graph.nodes:
        if node.op == "conv2d":
            total += math.prod(node.shape[1:]) * math.prod(graph.shapes[node.weights[0]])
        elif node.op == "linear":
            total += math.prod(graph.shapes[node.weights[0]])
        elif node.op in ("affine", "scale"):
            total += math.prod(node.shape)
        elif node.op in POLYNOMIALS:
            *_, squares, cubes = polynomial_units(graph, node)
            total += 2 * squares + 3 * cubes
    return total


def file_bytes(graph: PlainGraph) -> int:
    """Bytes of the weights, four each, and of the public masks and indices."""
    return 4 * weights_of(graph) + sum(mask.numel() * mask.element_size() for mask in graph.masks.values())
