"""A block of a network in dense form: one matrix product for each level of its nonlinear units.

Let x be the values at the block's start, u₁ … u_L the outputs of its nonlinear units, sorted into levels so that no
unit reads another one of its level, and y what the block gives. Everything else is affine:

    s_l = M_l x + Σ_{j<l} N_lj u_j + m_l,    u_l = relu(s_l),    y = A x + Σ_l B_l u_l + b

with nothing approximated. The products can be scheduled in three ways. *Push* multiplies a vector once, as soon as it
is known, with the matrices of all later levels: each value is encrypted or opened once. *Pull* multiplies, before
each level, all earlier vectors at once: each result comes back once. *Mixed* pushes x and pulls the rest. All have one
product a level and as many weights, up to columns that are zero, which are left out; which one is cheapest depends on
the protocol.

Layer Folding (BMVC 2022), Making Models Shallow Again (2023) and CoPriv (2023) merge neighbouring layers that are
linear as a whole, after retraining; here layers are linear in part, and the network stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fairline.compiler.frontiers import Anatomy, Frontier, reaches
from fairline.compiler.pieces import Piece
from fairline.compiler.structure import size
from fairline.masking.sharing import effective
from fairline.private.graph import Node

Schedule = Literal["push", "pull", "mixed"]
SCHEDULES: tuple[Schedule, ...] = ("push", "pull", "mixed")


@dataclass(frozen=True)
class Units:
    """Some units of a value of the original graph: ``index`` is flat, int64."""

    value: str
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)


Shapes = Mapping[str, tuple[int, ...]]


def everything(value: str, shapes: Shapes) -> Units:
    """All units of a value."""
    return Units(value, torch.arange(size(shapes[value])))


@dataclass(frozen=True)
class Level:
    """Nonlinear units that are evaluated at once.

    Attributes:
        relus: Nodes, each with those of its units that are of this level.
        shared: Nodes with shared signs, each with the units that they read, and those of them that signs decide.
        whole: Nodes of other kinds, all of whose units are.
    """

    relus: tuple[tuple[Node, Tensor], ...]
    shared: tuple[tuple[Node, Tensor, Tensor], ...]
    whole: tuple[Node, ...]

    @property
    def names(self) -> list[str]:
        """Of its nodes."""
        nodes = [node for node, _ in self.relus] + [node for node, *_ in self.shared]
        return [node.name for node in (*nodes, *self.whole)]

    @property
    def units(self) -> int:
        """Units that are evaluated."""
        parts = [index for _, index in self.relus] + [decided for _, _, decided in self.shared]
        return sum(map(len, parts)) + sum(size(node.shape) for node in self.whole)

    def within(self, names: set[str]) -> Level:
        """The part of it whose nodes are among these."""
        relus = tuple(each for each in self.relus if each[0].name in names)
        shared = tuple(each for each in self.shared if each[0].name in names)
        return Level(relus, shared, tuple(node for node in self.whole if node.name in names))

    def reads(self, shapes: Shapes) -> list[Units]:
        """What it takes from affine maps: a row for each unit."""
        rows = [Units(node.inputs[0], index) for node, index in self.relus]
        rows += [Units(node.inputs[0], read) for node, read, _ in self.shared]
        return rows + [everything(node.inputs[0], shapes) for node in self.whole]

    def gives(self, shapes: Shapes) -> list[Units]:
        """What it gives to later affine maps: a column for each unit."""
        columns = [Units(node.name, index) for node, index in self.relus]
        columns += [Units(node.name, decided) for node, _, decided in self.shared]
        return columns + [everything(node.name, shapes) for node in self.whole]


class Levels:
    """The nonlinear units from a frontier on, by level, and what they read; wherever a block stops.

    Args:
        anatomy: Of the graph.
        start: The frontier.
    """

    def __init__(self, anatomy: Anatomy, start: Frontier) -> None:
        depths = anatomy.depths(start.position)
        nodes = [node for node in anatomy.nodes[start.position :] if node.name in depths]
        self.levels: list[Level] = []
        for depth in range(1, max((int(each.max()) for each in depths.values()), default=0) + 1):
            chosen = [(node, depths[node.name] == depth) for node in nodes]
            relus = [(node, anatomy.needed[node.name][own]) for node, own in chosen if node.op == "relu" and own.any()]
            others = [node for node, own in chosen if node.op != "relu" and own.any()]
            shared = [(n, anatomy.voters(n), anatomy.needed[n.name]) for n in others if n.op == "shared_relu"]
            whole = [node for node in others if node.op != "shared_relu"]
            self.levels.append(Level(tuple(relus), tuple(shared), tuple(whole)))
        targets: list[dict[str, Tensor]] = []
        #: Which row of ``reach`` is of which level and node.
        self.rows: dict[tuple[int, str], int] = {}
        for place, level in enumerate(self.levels):
            for name, units in zip(level.names, level.reads(anatomy.shapes), strict=True):
                self.rows[place, name] = len(targets)
                targets.append({units.value: units.index})
        self.reach = reaches(anatomy, targets, start.position) if targets else {}


class Outputs:
    """What the values read that are live at frontiers, each as a whole.

    Args:
        anatomy: Of the graph.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        names = {name for frontier in anatomy.frontiers for name in frontier.live if name != "x"}
        #: Which row of ``reach`` is of which value.
        self.rows = {name: place for place, name in enumerate(sorted(names, key=anatomy.made.__getitem__))}
        targets = [{name: everything(name, anatomy.shapes).index} for name in self.rows]
        self.reach = reaches(anatomy, targets, 0, keep=names)


@dataclass(frozen=True)
class Product:
    """A matrix product of a schedule.

    Attributes:
        time: Levels that are evaluated before it.
        stop: The last target that it has rows for, + 1; the first one is ``time``.
        columns: Of the block's columns, int64.
    """

    time: int
    stop: int
    columns: Tensor


class Dense:
    """The affine maps of a block, and the products that compute them.

    Target l < L is what level l reads, target L what the block gives; source 0 is what the block starts from, source
    l + 1 what level l gives. Rows are the units of all targets, columns those of all sources.

    Args:
        anatomy: Of the graph.
        start: The levels from the block's start on.
        outputs: Of the graph.
        first: Where the block starts.
        last: Where it stops.
    """

    def __init__(self, anatomy: Anatomy, start: Levels, outputs: Outputs, first: Frontier, last: Frontier) -> None:
        self.anatomy, self.first, self.last = anatomy, first, last
        nodes = anatomy.nodes[first.position : last.position]
        names, read = {node.name for node in nodes}, {name for node in nodes for name in node.inputs}
        shapes = anatomy.shapes
        self.levels = [level for level in (each.within(names) for each in start.levels) if level.units]
        #: For people: the layers that it spans.
        self.name = " … ".join(dict.fromkeys((nodes[0].layer, nodes[-1].layer)))
        self.outputs = [name for name in last.live if name in names]
        self.targets = [level.reads(shapes) for level in self.levels]
        self.targets.append([everything(name, shapes) for name in self.outputs])
        self.sources = [[everything(name, shapes) for name in first.live if name in read]]
        self.sources += [level.gives(shapes) for level in self.levels]
        #: First row of each target, and first column of each source; with an end.
        self.row_starts = _starts(self.targets)
        self.column_starts = _starts(self.sources)
        rows = [[start.rows[place, name] for name in level.names] for place, level in enumerate(self.levels)]
        #: bool, (targets, columns): which columns each target reads.
        self.reads = torch.stack(
            [self._columns_read(start.reach, own) for own in rows]
            + [self._columns_read(outputs.reach, [outputs.rows[name] for name in self.outputs])]
        )

    def _columns_read(self, reach: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
        return torch.cat(
            [
                reach[units.value][list(rows)].any(0)[units.index]
                if units.value in reach
                else torch.zeros(len(units), dtype=torch.bool)
                for source in self.sources
                for units in source
            ]
        )

    def products(self, schedule: Schedule) -> list[Product]:
        """The products of a schedule, in the order of time; their rows and columns cover all that is read.

        Args:
            schedule: ``"push"``, ``"pull"`` or ``"mixed"``.

        Returns:
            One for each target.
        """
        end = len(self.targets)
        places = torch.arange(self.column_starts[-1])
        products = []
        for time in range(end):
            pushes = schedule == "push" or (schedule == "mixed" and time == 0)
            stop = end if pushes else time + 1
            first = 0 if schedule == "pull" else time if schedule == "push" else min(time, 1)
            own = (places >= self.column_starts[first]) & (places < self.column_starts[time + 1])
            columns = (own & self.reads[time:stop].any(0)).nonzero().flatten()
            # What reads nothing is a constant: a product with one column of zeros.
            products.append(Product(time, stop, columns if len(columns) else own.nonzero().flatten()[:1]))
        return products

    def weights(self, schedule: Schedule) -> int:
        """Numbers in the matrices and offsets of a schedule."""
        return sum(
            (len(each.columns) + 1) * (self.row_starts[each.stop] - self.row_starts[each.time])
            for each in self.products(schedule)
        )

    def piece(self, schedule: Schedule) -> Piece:
        """The nodes that stand in the block's place.

        Args:
            schedule: Of the products.

        Returns:
            Nodes whose outputs carry the names that later nodes read; of its linear ones, the weights of each product
            of the schedule in turn.
        """
        return _Emitter(self, schedule).emit()


def _starts(groups: Sequence[Sequence[Units]]) -> list[int]:
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + sum(map(len, group)))
    return starts


class _Emitter:
    """Writes the nodes of a dense block."""

    def __init__(self, block: Dense, schedule: Schedule) -> None:
        anatomy = block.anatomy
        self.block, self.shapes = block, anatomy.shapes
        self.piece = Piece(f"dense{block.first.position}", block.name, anatomy.made)
        self.products = block.products(schedule)
        #: Values that columns are taken from: name, shape, first column.
        self.known: list[tuple[str, tuple[int, ...], int]] = []
        column = 0
        for units in block.sources[0]:
            self.known.append((units.value, self.shapes[units.value], column))
            column += len(units)

    def emit(self) -> Piece:
        block = self.block
        waiting: tuple[str, int] | None = None
        for product in self.products:
            rows = block.row_starts[product.stop] - block.row_starts[product.time]
            value = self.multiply(product, rows)
            rest = None
            if waiting is not None:
                name, length = waiting
                head = self.part(name, length, 0, rows)
                value = self.piece.add("add", (value, head), (rows,), alpha=1)
                rest = (self.part(name, length, rows, length), length - rows) if length > rows else None
            own = block.row_starts[product.time + 1] - block.row_starts[product.time]
            waiting = (self.part(value, rows, own, rows), rows - own) if rows > own else rest
            if product.time < len(block.levels):
                self.activate(block.levels[product.time], value, rows, product.time)
            else:
                self.finish(value, rows)
        return self.piece

    def part(self, value: str, length: int, start: int, stop: int) -> str:
        """Elements of a vector."""
        return self.piece.take(value, (length,), torch.arange(start, stop))

    def multiply(self, product: Product, rows: int) -> str:
        pieces, total = [], 0
        for name, shape, start in self.known:
            inside = (product.columns >= start) & (product.columns < start + size(shape))
            index = product.columns[inside] - start
            if len(index):
                pieces.append(self.piece.take(name, shape, index))
                total += len(index)
        joined = pieces[0] if len(pieces) == 1 else self.piece.add("concat", tuple(pieces), (total,), axis=1)
        return self.piece.add("linear", (joined,), (rows,), weights={"weight": (rows, total), "bias": (rows,)})

    def activate(self, level: Level, value: str, length: int, place: int) -> None:
        """Evaluate a level, whose rows stand first in a vector."""
        column, row = self.block.column_starts[place + 1], 0
        count = sum(len(index) for _, index in level.relus)
        if count:
            own = self.part(value, length, 0, count)
            self.known.append((self.piece.add("relu", (own,), (count,)), (count,), column))
            column, row = column + count, count
        for node, read, decided in level.shared:
            taken = self.part(value, length, row, row + len(read))
            signs = self.block.anatomy.graph.masks[str(node.mask)].flatten(1)[:, read]
            kept = torch.isin(read, decided)
            name = self.piece.add("shared_relu", (taken,), (len(read),), mask=effective(signs, kept))
            given = self.piece.take(name, (len(read),), kept.nonzero().flatten())
            self.known.append((given, (len(decided),), column))
            column, row = column + len(decided), row + len(read)
        for node in level.whole:
            shape = self.shapes[node.inputs[0]]
            index = torch.arange(row, row + size(shape))
            taken = self.piece.take(value, (length,), index, shape)
            name = f"{self.piece.prefix}_{len(self.piece.nodes)}"
            self.piece.copy(replace(node, name=name, inputs=(taken,)), self.block.anatomy.graph)
            self.known.append((name, node.shape, column))
            column, row = column + size(node.shape), row + size(shape)

    def finish(self, value: str, length: int) -> None:
        """Give the block's outputs their names."""
        outputs, nodes = self.block.outputs, self.piece.nodes
        if len(outputs) == 1 and self.shapes[outputs[0]] == (length,):
            # The vector is the value.
            nodes[-1] = replace(nodes[-1], name=outputs[0])
            return
        row = 0
        for name in outputs:
            shape = self.shapes[name]
            self.piece.take(value, (length,), torch.arange(row, row + size(shape)), shape, name)
            row += size(shape)
