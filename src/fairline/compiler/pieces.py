"""What a compiled network is put together from: nodes with the shapes of their weights and their public indices."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from fairline.compiler.structure import size
from fairline.private.graph import Node, PlainGraph


class Piece:
    """Nodes that stand in the place of some of a graph's, while they are being made; without weights.

    Args:
        prefix: Of the names of all new values.
        layer: What cost tables call them.
        taken: Names that are not free.
    """

    def __init__(self, prefix: str, layer: str, taken: Collection[str] = ()) -> None:
        while any(name.startswith(f"{prefix}_") for name in taken):
            prefix += "_"
        self.prefix, self.layer = prefix, layer
        self.nodes: list[Node] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.masks: dict[str, Tensor] = {}

    @property
    def weights(self) -> int:
        """Numbers in all new weights."""
        return sum(size(shape) for shape in self.shapes.values())

    def add(
        self,
        op: str,
        inputs: tuple[str, ...],
        shape: tuple[int, ...],
        name: str | None = None,
        *,
        weights: dict[str, tuple[int, ...]] | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> str:
        """Add a node.

        Args:
            op: Its operator.
            inputs: Names of its inputs.
            shape: Of its output, without the batch axis.
            name: Of its output; a new one by default.
            weights: Shapes of its new weights by what they are called.
            mask: Its mask or indices.
            options: Its constants.

        Returns:
            The name of its output.
        """
        name = name or f"{self.prefix}_{len(self.nodes)}"
        own = {f"{self.prefix}_{len(self.nodes)}.{key}": value for key, value in (weights or {}).items()}
        self.shapes |= own
        stored = None
        if mask is not None:
            stored = f"{self.prefix}_{len(self.nodes)}"
            self.masks[stored] = mask
        self.nodes.append(Node(op, name, self.layer, inputs, shape, tuple(own), stored, options))
        return name

    def copy(self, node: Node, graph: PlainGraph) -> None:
        """Add a node of a graph as it is, with its mask and the shapes of its weights."""
        self.nodes.append(node)
        self.shapes |= {name: graph.shapes[name] for name in node.weights}
        if node.mask is not None:
            self.masks[node.mask] = graph.masks[node.mask]

    def take(
        self,
        value: str,
        found: tuple[int, ...],
        index: Tensor,
        wanted: tuple[int, ...] | None = None,
        name: str | None = None,
    ) -> str:
        """Units of a value, in any order; nothing is added where they are the value itself.

        Args:
            value: Its name.
            found: Its shape.
            index: int64, flat.
            wanted: Shape of the result; a vector by default.
            name: Of the result, if it must have one.

        Returns:
            The name of the result.
        """
        wanted = wanted or (len(index),)
        if len(index) == size(found) and bool((index == torch.arange(len(index))).all()):
            if found == wanted and name is None:
                return value
            return self.add("reshape", (value,), wanted, name)
        return self.add("gather", (value,), wanted, name, mask=index)

    @property
    def relus(self) -> int:
        """ReLUs that the nodes evaluate for a sample."""
        return PlainGraph((), self.nodes, self.shapes, self.masks, {}).relus

    def graph(self, whole: PlainGraph, shapes: Mapping[str, tuple[int, ...]]) -> PlainGraph:
        """The nodes as a graph of their own, to be priced: what they take from others costs nothing.

        Args:
            whole: The graph that they are of.
            shapes: Of its values.

        Returns:
            The graph, without weights.
        """
        own = {"x"} | {node.name for node in self.nodes}
        outer = dict.fromkeys(name for node in self.nodes for name in node.inputs if name not in own)
        given = [Node("reshape", name, "", ("x",), shapes[name]) for name in outer]
        return PlainGraph(whole.input_shape, given + self.nodes, self.shapes, self.masks, {})
