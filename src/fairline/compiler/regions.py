"""A graph cut into blocks, each in one of several forms: what its compiled network computes, and its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fairline.compiler.dense import Dense, Levels, Outputs, Schedule
from fairline.compiler.frontiers import Anatomy, restricted
from fairline.compiler.matrices import Affine, fill
from fairline.compiler.merged import Merged, merge, mergeable
from fairline.compiler.pieces import Piece
from fairline.errors import FairlineError
from fairline.private.graph import PlainGraph
from fairline.training.progress import ProgressCallback

Form = Literal["as it stands", "dense", "merged"]
FORMS: tuple[Form, ...] = ("as it stands", "dense", "merged")


@dataclass(frozen=True)
class Block:
    """A part of a network, in the form that it takes.

    Attributes:
        start: Index of the frontier where it starts.
        stop: Index of the frontier where it stops.
        form: ``"as it stands"``, ``"dense"``, or, where nothing but affine nodes is, ``"merged"``.
        schedule: Of a dense block's products.
    """

    start: int
    stop: int
    form: Form = "as it stands"
    schedule: Schedule = "push"


Plan = tuple[Block, ...]


class Regions:
    """A graph whose blocks can take other forms.

    Args:
        graph: With or without weights; only :meth:`build` reads them.

    Raises:
        FairlineError: It has an operator that the compiler does not know.
    """

    def __init__(self, graph: PlainGraph) -> None:
        self.anatomy = Anatomy(graph)
        self.graph = self.anatomy.graph
        self.frontiers = self.anatomy.frontiers
        self._levels: dict[int, Levels] = {}

    @cached_property
    def _outputs(self) -> Outputs:
        return Outputs(self.anatomy)

    def dense(self, start: int, stop: int) -> Dense:
        """The affine maps of a block between two frontiers, by index."""
        first = self.frontiers[start]
        if start not in self._levels:
            self._levels[start] = Levels(self.anatomy, first)
        return Dense(self.anatomy, self._levels[start], self._outputs, first, self.frontiers[stop])

    def merged(self, start: int, stop: int, weights: Mapping[str, Tensor] | None = None) -> Merged:
        """The nodes between two frontiers, by index, with their convolutions merged; see :func:`merge`."""
        return merge(self.anatomy, self.frontiers[start], self.frontiers[stop], weights)

    def mergeable(self, start: int, stop: int) -> bool:
        """Whether the nodes between two frontiers, by index, have a merged form."""
        return mergeable(self.anatomy, self.frontiers[start], self.frontiers[stop])

    def piece(self, block: Block) -> Piece:
        """What stands in a block's place, without weights."""
        if block.form == "dense":
            return self.dense(block.start, block.stop).piece(block.schedule)
        if block.form == "merged":
            return self.merged(block.start, block.stop).piece
        piece = Piece("", "", ())
        for node in self.anatomy.nodes[self.frontiers[block.start].position : self.frontiers[block.stop].position]:
            piece.copy(node, self.graph)
        return piece

    def check(self, plan: Plan) -> None:
        """Refuse what is no plan of this graph.

        Raises:
            FairlineError: Its blocks do not lead from the input to the output, or one has an unknown form.
        """
        ends = [0, *(block.stop for block in plan)]
        last = len(self.frontiers) - 1
        joined = all(block.start == end and block.start < block.stop for block, end in zip(plan, ends, strict=False))
        if not joined or ends[-1] != last or any(block.form not in FORMS for block in plan):
            raise FairlineError(f"A plan is a chain of blocks from frontier 0 to {last}, not {plan}.")
        for block in plan:
            if block.form == "merged" and not self.mergeable(block.start, block.stop):
                raise FairlineError(
                    f"Frontiers {block.start} and {block.stop} have more than convolutions between them."
                )

    def outline(self, plan: Plan) -> PlainGraph:
        """The public half of a compiled network.

        Args:
            plan: A chain of blocks.

        Returns:
            The graph, without weights.
        """
        self.check(plan)
        return self._joined([self.piece(block) for block in plan])

    def _joined(self, pieces: list[Piece]) -> PlainGraph:
        graph = PlainGraph(self.graph.input_shape, [], {}, {}, {})
        for piece in pieces:
            graph.nodes += piece.nodes
            graph.shapes |= piece.shapes
            graph.masks |= piece.masks
        return graph

    def build(self, plan: Plan, progress: ProgressCallback | None = None) -> PlainGraph:
        """A compiled network.

        Args:
            plan: A chain of blocks.
            progress: Told how far the matrices are.

        Returns:
            The graph; its weights are float64.

        Raises:
            FairlineError: It is no plan of this graph, or a matrix does not fit into memory.
        """
        self.check(plan)
        pieces = [self.piece(block) for block in plan]
        graph = self._joined(pieces)
        affine = Affine(self.anatomy, self.graph.weights)
        for block, piece in zip(plan, pieces, strict=True):
            if block.form == "dense":
                with _enough_memory(self.dense(block.start, block.stop).name, piece.weights):
                    graph.weights.update(self._matrices(block, piece, affine, progress))
            elif block.form == "merged":
                graph.weights.update(self.merged(block.start, block.stop, affine.weights).weights)
        for name in graph.shapes:
            if name in affine.weights:
                graph.weights[name] = affine.weights[name]
        graph.weights = {name: graph.weights[name] for name in graph.shapes}
        return graph

    def _matrices(
        self, block: Block, piece: Piece, affine: Affine, progress: ProgressCallback | None
    ) -> Iterator[tuple[str, Tensor]]:
        dense = self.dense(block.start, block.stop)
        linear = [node for node in piece.nodes if node.op == "linear"]
        filled = fill(dense, dense.products(block.schedule), affine, progress)
        for node, tensors in zip(linear, filled, strict=True):
            yield from zip(node.weights, tensors, strict=True)

    def whole(self) -> Plan:
        """The plan that changes nothing."""
        return tuple(Block(start, stop) for start, stop in pairwise(range(len(self.frontiers))))


@contextmanager
def _enough_memory(where: str, weights: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # What torch says is no MemoryError.
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        raise FairlineError(
            f"The matrices of {where}, {8 * weights / 1e9:.1f} GB while they are made, do not fit into memory; set a "
            "lower max_weights."
        ) from None


def outline(graph: PlainGraph, plan: Plan) -> PlainGraph:
    """The public half of a compiled network: shapes, masks and indices; see :meth:`Regions.outline`."""
    return Regions(graph).outline(plan)


def build(graph: PlainGraph, plan: Plan, progress: ProgressCallback | None = None) -> PlainGraph:
    """A compiled network, its weights in float64; see :meth:`Regions.build`."""
    return Regions(graph).build(plan, progress)


def weights_of(graph: PlainGraph) -> int:
    """Numbers in all weights of a graph."""
    return sum(torch.Size(shape).numel() for shape in graph.shapes.values())


__all__ = ["FORMS", "Block", "Form", "Plan", "Regions", "build", "outline", "restricted", "weights_of"]
