"""The matrices of a block in dense form: derivatives of affine maps, taken a few rows or columns at a time in float64.

A row is a vector–Jacobian product, a column a Jacobian–vector product; whichever are fewer are computed. Both cut the
block open at its nonlinear units, whose outputs become inputs, so that what is differentiated is affine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from fairline.compiler.dense import Dense, Product, Units
from fairline.compiler.frontiers import Anatomy
from fairline.compiler.structure import size, transposed
from fairline.private.graph import OPERATORS, Node, PlainGraph
from fairline.training.progress import Progress, ProgressCallback

#: Bytes that derivatives in flight may take.
CHUNK_BYTES = 2**28


class Affine:
    """The affine maps of a graph's nodes in float64.

    Args:
        anatomy: Of the graph.
        weights: Private tensors of the graph by name.
    """

    def __init__(self, anatomy: Anatomy, weights: Mapping[str, Tensor]) -> None:
        self.anatomy, self.graph = anatomy, anatomy.graph
        self.weights = {name: value.detach().double().cpu() for name, value in weights.items()}
        self.linear = {name: value.clone() for name, value in self.weights.items()}
        for node in anatomy.nodes:
            # Second is always what is added.
            for name in node.weights[1:]:
                self.linear[name].zero_()

    def back(self, marked: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Vector–Jacobian products; see :meth:`Anatomy.back`."""
        return self.anatomy.back(marked, start, stop, self._transpose)

    def _transpose(self, graph: PlainGraph, node: Node, output: Tensor) -> list[Tensor]:
        weights = [self.linear[name] for name in node.weights]
        if node.op == "conv2d":
            # Much faster than autograd, which first convolves zeros.
            o, shape = node.options, (len(output), *graph.input_shapes(node)[0])
            spatial = [o["stride"], o["padding"], o["dilation"], o["groups"]]
            return [conv2d_input(shape, weights[0], output, *spatial)]
        if node.op == "linear":
            return [output @ weights[0]]
        return transposed(
            lambda inputs: OPERATORS[node.op](graph, node, inputs, weights), graph.input_shapes(node), output
        )

    def forward(self, known: Mapping[str, Tensor], start: int, stop: int, *, constants: bool) -> dict[str, Tensor]:
        """Values of the nodes between two positions, in which every nonlinear unit is an input.

        Args:
            known: Values that are live at ``start``, and outputs of nonlinear nodes, (B, *shape); those that are
                missing are 0.
            start: First node.
            stop: Last node + 1.
            constants: Whether to add what does not depend on any input.

        Returns:
            Values that are not 0, by name.
        """
        batch = len(next(iter(known.values())))
        shapes, weights = self.anatomy.shapes, self.weights if constants else self.linear
        values = dict(known)
        for node in self.anatomy.nodes[start:stop]:
            inputs = [values.get(name) for name in node.inputs]
            if self.anatomy.nonlinear(node):
                passed = None if inputs[0] is None else self.anatomy.passes(node, inputs[0])
                parts = [part for part in (passed, known.get(node.name)) if part is not None]
                if parts:
                    values[node.name] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            elif constants or any(value is not None for value in inputs):
                full = [
                    torch.zeros(batch, *shapes[name], dtype=torch.float64) if value is None else value
                    for name, value in zip(node.inputs, inputs, strict=True)
                ]
                if node.op == "relu":
                    values[node.name] = full[0]
                else:
                    own = [weights[name] for name in node.weights]
                    values[node.name] = OPERATORS[node.op](self.graph, node, full, own)
        return values


def fill(
    block: Dense,
    products: Sequence[Product],
    affine: Affine,
    progress: ProgressCallback | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The matrices of a block's products.

    Args:
        block: Its affine maps.
        products: From :meth:`Dense.products`.
        affine: Of the graph, with its weights.
        progress: Told how many rows or columns are done.

    Yields:
        For each product its matrix (rows, columns) and its offset (rows,), float64.
    """
    spans = [(block.row_starts[each.time], block.row_starts[each.stop]) for each in products]
    matrices = [
        torch.zeros(stop - start, len(each.columns), dtype=torch.float64)
        for (start, stop), each in zip(spans, products, strict=True)
    ]
    rows, columns = block.row_starts[-1], block.column_starts[-1]
    by_rows = rows <= columns
    total = rows if by_rows else columns
    stage = f"Matrices of {block.name}"
    for done, place, part in _row_chunks(block, affine) if by_rows else _column_chunks(block, affine):
        for matrix, (start, stop), product in zip(matrices, spans, products, strict=True):
            if by_rows:
                first, last = max(start, place), min(stop, place + len(part))
                if first < last:
                    matrix[first - start : last - start] = part[first - place : last - place, product.columns]
            else:
                inside = ((product.columns >= place) & (product.columns < place + part.shape[1])).nonzero().flatten()
                matrix[:, inside] = part[start:stop, product.columns[inside] - place]
        if progress is not None:
            progress(Progress(stage, done, total, f"{done:,} of {total:,} {'rows' if by_rows else 'columns'}"))
    offsets = _offsets(block, affine)
    added = [False] * len(block.targets)
    for matrix, (start, stop), product in zip(matrices, spans, products, strict=True):
        offset = torch.zeros(stop - start, dtype=torch.float64)
        # A target's offset is added by the first product that has rows for it.
        for target in range(product.time, product.stop):
            if not added[target]:
                own = slice(block.row_starts[target], block.row_starts[target + 1])
                offset[own.start - start : own.stop - start] = offsets[own]
                added[target] = True
        yield matrix, offset


def _offsets(block: Dense, affine: Affine) -> Tensor:
    shapes = block.anatomy.shapes
    known = {name: torch.zeros(1, *shapes[name], dtype=torch.float64) for name in block.first.live}
    values = affine.forward(known, block.first.position, block.last.position, constants=True)
    return _gathered(block, values, 1)[:, 0]


def _gathered(block: Dense, values: Mapping[str, Tensor], batch: int) -> Tensor:
    """Of all rows the values, (rows, B); those that are missing are 0."""
    return torch.cat(
        [
            values[units.value].flatten(1)[:, units.index].T
            if units.value in values
            else torch.zeros(len(units), batch, dtype=torch.float64)
            for target in block.targets
            for units in target
        ]
    )


def _chunk(block: Dense) -> int:
    """Rows or columns that fit into memory at once."""
    inside = block.anatomy.nodes[block.first.position : block.last.position]
    per_sample = 8 * (sum(size(node.shape) for node in inside) + block.column_starts[-1] + block.row_starts[-1])
    return max(1, CHUNK_BYTES // per_sample)


def _pieces(groups: Sequence[Sequence[Units]], chunk: int) -> Iterator[tuple[int, Units]]:
    """Units of one value at a time, at most ``chunk``, with the number of units before them."""
    place = 0
    for group in groups:
        for units in group:
            for start in range(0, len(units), chunk):
                part = units.index[start : start + chunk]
                yield place, Units(units.value, part)
                place += len(part)


def _one_hot(units: Units, shape: tuple[int, ...]) -> Tensor:
    """(units, *shape), 1 at one unit each."""
    hot = torch.zeros(len(units), size(shape), dtype=torch.float64)
    hot[torch.arange(len(units)), units.index] = 1
    return hot.view(-1, *shape)


def _row_chunks(block: Dense, affine: Affine) -> Iterator[tuple[int, int, Tensor]]:
    """Rows done, the first new one, and the new ones (n, columns)."""
    shapes = block.anatomy.shapes
    for place, units in _pieces(block.targets, _chunk(block)):
        marked = {units.value: _one_hot(units, shapes[units.value])}
        found = affine.back(marked, block.first.position, block.last.position)
        parts = [
            found[source.value].flatten(1)[:, source.index]
            if source.value in found
            else torch.zeros(len(units), len(source), dtype=torch.float64)
            for sources in block.sources
            for source in sources
        ]
        yield place + len(units), place, torch.cat(parts, 1)


def _column_chunks(block: Dense, affine: Affine) -> Iterator[tuple[int, int, Tensor]]:
    """Columns done, the first new one, and the new ones (rows, n)."""
    shapes = block.anatomy.shapes
    for place, units in _pieces(block.sources, _chunk(block)):
        known = {units.value: _one_hot(units, shapes[units.value])}
        values = affine.forward(known, block.first.position, block.last.position, constants=False)
        yield place + len(units), place, _gathered(block, values, len(units))
