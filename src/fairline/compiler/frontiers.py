"""Where a network is nonlinear, which of its ReLUs matter, and where a block of it may start and stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from fairline.compiler.structure import AFFINE, PASSING, read_by, readers, require_known, size
from fairline.private.graph import POLYNOMIALS, Node, PlainGraph, kept_relus, straight

#: What takes derivatives back through one affine node: from its output's to those of its inputs.
Transpose = Callable[[PlainGraph, Node, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Frontier:
    """A place between two nodes, in the order of evaluation.

    Attributes:
        position: Nodes that stand before it.
        live: Values that are computed before it and read after it, in the order of evaluation; after the last node, the
            logits.
    """

    position: int
    live: tuple[str, ...]


class Anatomy:
    """A plain graph as the compiler sees it.

    Nonlinear nodes are ReLUs that keep any unit that matters, polynomials that bend and max poolings; all others are
    affine. A ReLU passes on the units that it does not keep; one with shared signs keeps those
    that a sign decides.

    Args:
        graph: Its weights are not read.

    Raises:
        FairlineError: It has an operator that the compiler does not know.
    """

    def __init__(self, graph: PlainGraph) -> None:
        require_known(graph)
        self.graph = tidy(graph)
        self.nodes = self.graph.nodes
        self.shapes = {"x": graph.input_shape} | {node.name: node.shape for node in self.nodes}
        self.made = {"x": -1} | {node.name: place for place, node in enumerate(self.nodes)}
        self.read = {name: place for place, node in enumerate(self.nodes) for name in node.inputs}
        self.read[self.nodes[-1].name] = len(self.nodes)

    @cached_property
    def kept(self) -> dict[str, Tensor]:
        """Of each ReLU, bool, flat: which units it keeps."""
        return {
            node.name: torch.ones(size(node.shape), dtype=torch.bool)
            if node.mask is None
            else self.graph.masks[node.mask].flatten()
            if node.op == "relu"
            else self.graph.masks[node.mask][0].flatten() >= 0
            for node in self.nodes
            if node.op in PASSING
        }

    @cached_property
    def needed(self) -> dict[str, Tensor]:
        """Of each ReLU, int64: the kept units on a path to the logits, whatever the weights are."""
        marked = {self.nodes[-1].name: torch.ones(1, *self.nodes[-1].shape)}
        for node in reversed(self.nodes):
            for name, value in zip(node.inputs, read_by(self.graph, node, marked[node.name]), strict=True):
                marked[name] = marked[name] + value if name in marked else value
        return {name: ((marked[name].flatten() > 0) & kept).nonzero().flatten() for name, kept in self.kept.items()}

    def voters(self, node: Node) -> Tensor:
        """Units that a node with shared signs reads: those that it needs, and those that vote for their signs."""
        decides, votes = self.graph.masks[str(node.mask)].flatten(1)
        needed = self.needed[node.name]
        reads = torch.isin(votes, decides[needed])
        reads[needed] = True
        return reads.nonzero().flatten()

    def nonlinear(self, node: Node) -> bool:
        """Whether a node is one."""
        if node.op in PASSING:
            return len(self.needed[node.name]) > 0
        return node.op not in AFFINE and not (node.op in POLYNOMIALS and straight(self.graph, node))

    def passes(self, node: Node, value: Tensor) -> Tensor:
        """The units of a nonlinear node's input, (B, *shape), that its output repeats; 0 in the place of all others."""
        if node.op not in PASSING:
            return value.new_zeros(len(value), *node.shape)
        return value.masked_fill(self.kept[node.name].view(node.shape), 0)

    def live(self, position: int) -> tuple[str, ...]:
        """Values that are computed before a position and read from there on; at the end, the logits."""
        return tuple(name for name, made in self.made.items() if made < position <= self.read[name])

    @cached_property
    def frontiers(self) -> list[Frontier]:
        """The places where a block may start or stop, in the order of evaluation.

        They are the input, the output, the places before and after each nonlinear node, and between two of those the
        narrowest, if fewer values pass there than at either.
        """
        ends = {0, len(self.nodes)}
        for place, node in enumerate(self.nodes):
            if self.nonlinear(node):
                ends |= {place, place + 1}
        places = sorted(ends)
        for start, stop in pairwise(places):
            inner = min(range(start + 1, stop), key=self.width, default=start)
            if self.width(inner) < min(self.width(start), self.width(stop)):
                ends.add(inner)
        return [Frontier(place, self.live(place)) for place in sorted(ends)]

    def width(self, position: int) -> int:
        """Units that are live at a position."""
        return sum(size(self.shapes[name]) for name in self.live(position))

    def back(
        self,
        marked: Mapping[str, Tensor],
        start: int,
        stop: int,
        transpose: Transpose = read_by,
        keep: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Take derivatives back from values to all values before them, through what nodes pass on unchanged.

        Outputs of nonlinear nodes count as inputs: derivatives stop there, except for the units that a ReLU repeats.

        Args:
            marked: Derivatives by (or marks on) values, (B, *shape), by name.
            start: Position where to stop.
            stop: Position before which the marked values are computed.
            transpose: Of one affine node; the default finds which units are read.
            keep: Other values that the result is wanted for.

        Returns:
            For the values that are live at ``start``, the outputs of nonlinear nodes, and those to keep, as far as they
            are reached: (B, *shape), by name.
        """
        reached: dict[str, Tensor] = dict(marked)
        found = {}
        for node in reversed(self.nodes[start:stop]):
            output = reached.pop(node.name, None)
            if output is None:
                continue
            if node.name in keep:
                found[node.name] = output
            if self.nonlinear(node):
                found[node.name] = output
                if node.op not in PASSING:
                    continue
                inputs = [self.passes(node, output)]
            elif node.op in PASSING:
                # Of its kept units none matters.
                inputs = [output]
            else:
                inputs = transpose(self.graph, node, output)
            for name, value in zip(node.inputs, inputs, strict=True):
                reached[name] = reached[name] + value if name in reached else value
        return found | reached

    def depths(self, start: int) -> dict[str, Tensor]:
        """How long the longest chain of nonlinear units is that ends in each unit, from a position on.

        Two ReLUs of which none reads the other, through whatever lies between, can be evaluated at once. Those of one
        node with shared signs always are.

        Args:
            start: What is live there has depth 0.

        Returns:
            Of each later ReLU's needed units, int64, in their order; of other nonlinear nodes one number.
        """
        most = sum(self.nonlinear(node) for node in self.nodes[start:])
        # Row d: whether a unit's depth is more than d.
        beyond = {name: torch.zeros(most, *self.shapes[name]) for name in self.live(start)}
        depths = {}
        for place, node in enumerate(self.nodes[start:], start):
            inputs = [beyond[name] for name in node.inputs]
            if not self.nonlinear(node):
                beyond[node.name] = inputs[0] if node.op in PASSING else readers(self.graph, node, inputs)
            elif node.op == "shared_relu":
                flat = inputs[0].flatten(1)
                deepest = int(flat[:, self.voters(node)].amax(1).sum()) + 1
                output = flat.clone()
                output[:, self.kept[node.name]] = 0
                output[:deepest, self.needed[node.name]] = 1
                beyond[node.name] = output.view(-1, *node.shape)
                depths[node.name] = torch.tensor([deepest])
            elif node.op == "relu":
                flat = inputs[0].flatten(1)
                output, needed = flat.clone(), self.needed[node.name]
                output[:, self.kept[node.name]] = 0
                output[0, needed] = 1
                output[1:, needed] = flat[:-1, needed]
                beyond[node.name] = output.view(-1, *node.shape)
                depths[node.name] = output[:, needed].sum(0).long()
            else:
                deepest = int(inputs[0].flatten(1).amax(1).sum()) + 1
                beyond[node.name] = torch.zeros(most, *node.shape)
                beyond[node.name][:deepest] = 1
                depths[node.name] = torch.tensor([deepest])
            for name in [name for name in beyond if self.read[name] <= place]:
                del beyond[name]
        return depths


def tidy(graph: PlainGraph) -> PlainGraph:
    """The graph without ReLUs that keep nothing, and without what its logits do not read."""
    renamed: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        if node.op in PASSING and not kept_relus(graph, node) and node is not graph.nodes[-1]:
            renamed[node.name] = node.inputs[0]
        else:
            nodes.append(node)
    last = graph.nodes[-1].name
    alive = {last}
    for node in reversed(nodes):
        if node.name in alive:
            alive.update(node.inputs)
    return restricted(graph, [node for node in nodes if node.name in alive])


def restricted(graph: PlainGraph, nodes: list[Node]) -> PlainGraph:
    """Nodes as a graph, with those shapes, masks and weights of another that they use."""
    names = {name for node in nodes for name in node.weights}
    masks = {str(node.mask) for node in nodes}
    return PlainGraph(
        graph.input_shape,
        nodes,
        {name: shape for name, shape in graph.shapes.items() if name in names},
        {name: mask for name, mask in graph.masks.items() if name in masks},
        {name: value for name, value in graph.weights.items() if name in names},
    )


def reaches(
    anatomy: Anatomy, targets: Sequence[Mapping[str, Tensor]], start: int, keep: Collection[str] = ()
) -> dict[str, Tensor]:
    """Which units each target reads.

    Args:
        anatomy: Of the graph.
        targets: Each names values, with the flat indices of the units that it has of them.
        start: Position from which on the graph is looked at.
        keep: Values that are looked for, beside those that are live at ``start`` and nonlinear nodes' outputs.

    Returns:
        For each of these values that any target reads: bool, (targets, units).
    """
    marked: dict[str, Tensor] = {}
    for row, target in enumerate(targets):
        for name, units in target.items():
            shape = anatomy.shapes[name]
            if name not in marked:
                marked[name] = torch.zeros(len(targets), size(shape))
            marked[name][row, units] = 1
    marked = {name: value.view(-1, *anatomy.shapes[name]) for name, value in marked.items()}
    found = anatomy.back(marked, start, len(anatomy.nodes), keep=keep)
    return {name: value.flatten(1) > 0 for name, value in found.items()}
