"""A block whose convolutions of convolutions are single ones, wherever that is exact.

A convolution with kernel K₂, stride s₂ and dilation d₂ of one with kernel K₁ and stride s₁ is one with the kernel

    K[a₁ + s₁·d₂·a₂] = Σ_{a₁, a₂} K₂[a₂] K₁[a₁]

and stride s₁s₂, if the outer one pads nothing: what it pads with is zero, and what the inner one's kernel gives there
is not. (Correcting the border would take a matrix from the border's inputs to its outputs; docs/compile.md tells what
that costs.) Unpadded convolutions of any one are merged, pointwise and grouped ones too, average pooling, scales,
sums and concatenations of such; a convolution that cannot be merged starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairline.compiler.frontiers import Anatomy, Frontier
from fairline.compiler.pieces import Piece
from fairline.compiler.structure import size
from fairline.private.graph import Node


@dataclass(frozen=True)
class Kernel:
    """A convolution of a value.

    Attributes:
        weight: (C', C, h, w), float64; without data while only shapes matter.
        stride: Of both axes.
        origin: How far the first output's window starts before the first input, on both axes.
        plain: Whether it is the identity.
    """

    weight: Tensor
    stride: tuple[int, int] = (1, 1)
    origin: tuple[int, int] = (0, 0)
    plain: bool = False


@dataclass(frozen=True)
class Sum:
    """A value as a sum of convolutions of others: ``offset`` is (C',)."""

    kernels: Mapping[str, Kernel]
    offset: Tensor


@dataclass
class Merged:
    """The nodes of a merged block, and their weights.

    Attributes:
        piece: The nodes.
        weights: Float64, by name; without data while only shapes matter.
        folded: How many operators have become part of a later one.
    """

    piece: Piece
    weights: dict[str, Tensor] = field(default_factory=dict)
    folded: int = 0


def mergeable(anatomy: Anatomy, first: Frontier, last: Frontier) -> bool:
    """Whether all nodes between two frontiers are affine, and one of them is a convolution."""
    nodes = anatomy.nodes[first.position : last.position]
    return not any(map(anatomy.nonlinear, nodes)) and any(node.op == "conv2d" for node in nodes)


def merge(anatomy: Anatomy, first: Frontier, last: Frontier, weights: Mapping[str, Tensor] | None = None) -> Merged:
    """A block of affine nodes with its convolutions merged.

    Args:
        anatomy: Of the graph.
        first: Where the block starts.
        last: Where it stops.
        weights: Of the graph, float64; None where only shapes matter.

    Returns:
        Nodes whose outputs carry the names that later nodes read, and their weights.
    """
    return _Merger(anatomy, first, last, weights).run()


class _Merger:
    def __init__(self, anatomy: Anatomy, first: Frontier, last: Frontier, weights: Mapping[str, Tensor] | None) -> None:
        graph = anatomy.graph
        self.anatomy, self.shapes = anatomy, anatomy.shapes
        self.nodes = anatomy.nodes[first.position : last.position]
        self.device = torch.device("meta" if weights is None else "cpu")
        self.given = (
            {name: torch.empty(shape, dtype=torch.float64, device="meta") for name, shape in graph.shapes.items()}
            if weights is None
            else weights
        )
        inside = {node.name for node in self.nodes}
        self.outputs = [name for name in last.live if name in inside]
        layer = " … ".join(dict.fromkeys((self.nodes[0].layer, self.nodes[-1].layer)))
        self.result = Merged(Piece(f"merged{first.position}", layer, anatomy.made))
        #: Values that are not computed yet.
        self.sums: dict[str, Sum] = {}

    def run(self) -> Merged:
        for node in self.nodes:
            made = _HANDLERS[node.op](self, node) if node.op in _HANDLERS else None
            if made is not None:
                self.sums[node.name] = made
            else:
                self.keep(node)
        for name in self.outputs:
            self.value(name)
        return self.result

    def sum_of(self, name: str) -> Sum:
        """A value as a sum of convolutions: one that is computed is that of its own with 1."""
        if name in self.sums:
            return self.sums[name]
        channels = self.shapes[name][0]
        weight = torch.eye(channels, dtype=torch.float64, device=self.device)[:, :, None, None]
        return Sum({name: Kernel(weight, plain=True)}, torch.zeros(channels, dtype=torch.float64, device=self.device))

    def value(self, name: str) -> None:
        """Compute a value, unless it is."""
        made = self.sums.pop(name, None)
        if made is None:
            return
        shape = self.shapes[name]
        parts = []
        offset = made.offset
        for source, kernel in made.kernels.items():
            if kernel.plain:
                parts.append(source)
            else:
                parts.append(self.convolve(source, kernel, shape, offset))
                offset = torch.zeros_like(offset)
        while len(parts) > 1:
            parts[:2] = [self.result.piece.add("add", (parts[0], parts[1]), shape, alpha=1)]
        node = self.result.piece.nodes[-1]
        self.result.piece.nodes[-1] = replace(node, name=name)

    def convolve(self, source: str, kernel: Kernel, shape: tuple[int, ...], offset: Tensor) -> str:
        """Add a convolution of a value, of which a part of this shape is wanted."""
        piece = self.result.piece
        channels, _, *sides = kernel.weight.shape
        pads, outs, skips = [], [], []
        for axis in range(2):
            length, stride, origin = self.shapes[source][axis + 1], kernel.stride[axis], kernel.origin[axis]
            skip = 0
            # Padding is the same on both sides; what that gives too much is cut off.
            while (length + 2 * (origin + stride * skip) - sides[axis]) // stride + 1 < shape[axis + 1] + skip:
                skip += 1
            pads.append(origin + stride * skip)
            outs.append((length + 2 * pads[-1] - sides[axis]) // stride + 1)
            skips.append(skip)
        own = {"weight": tuple(kernel.weight.shape), "bias": (channels,)}
        options: dict[str, Any] = {"stride": list(kernel.stride), "padding": pads, "dilation": [1, 1], "groups": 1}
        name = piece.add("conv2d", (source,), (channels, *outs), weights=own, **options)
        self.result.weights.update(zip(piece.nodes[-1].weights, (kernel.weight, offset), strict=True))
        if tuple(outs) == shape[1:]:
            return name
        index = torch.arange(channels * outs[0] * outs[1]).view(channels, *outs)
        rows, columns = (slice(skip, skip + side) for skip, side in zip(skips, shape[1:], strict=True))
        return piece.add("gather", (name,), shape, mask=index[:, rows, columns].flatten())

    def keep(self, node: Node) -> None:
        """Add a node as it is."""
        for name in node.inputs:
            self.value(name)
        self.result.piece.copy(node, self.anatomy.graph)
        self.result.weights.update({name: self.given[name] for name in node.weights})

    def composed(self, node: Node, weight: Tensor, offset: Tensor) -> Sum:
        """A convolution (C', C, h, w) of the node's input, with the node's stride, padding and dilation."""
        o, name = node.options, node.inputs[0]
        if any(o["padding"]):
            self.value(name)
        self.result.folded += name in self.sums
        inner = self.sum_of(name)
        weight = _dilated(weight, o.get("dilation", (1, 1)))
        kernels = {}
        for source, kernel in inner.kernels.items():
            (s1, s2), (o1, o2) = kernel.stride, kernel.origin
            joined = F.conv_transpose2d(weight, kernel.weight, stride=kernel.stride)
            strides = (s1 * o["stride"][0], s2 * o["stride"][1])
            kernels[source] = Kernel(joined, strides, (o1 + s1 * o["padding"][0], o2 + s2 * o["padding"][1]))
        return Sum(kernels, offset + weight.sum((2, 3)) @ inner.offset)

    def scaled(self, name: str, scale: Tensor, shift: Tensor) -> Sum:
        """A sum times (C,) plus (C,)."""
        inner = self.sums[name]
        self.result.folded += 1
        kernels = {
            source: replace(kernel, weight=kernel.weight * scale[:, None, None, None], plain=False)
            for source, kernel in inner.kernels.items()
        }
        return Sum(kernels, inner.offset * scale + shift)


def _dilated(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """The kernel with zeros between its elements."""
    sides = [(side - 1) * d + 1 for side, d in zip(weight.shape[2:], dilation, strict=True)]
    result = weight.new_zeros(*weight.shape[:2], *sides)
    result[:, :, :: dilation[0], :: dilation[1]] = weight
    return result


def _origin(kernels: Sequence[Kernel]) -> tuple[int, int]:
    return max(kernel.origin[0] for kernel in kernels), max(kernel.origin[1] for kernel in kernels)


def _aligned(kernels: Sequence[Kernel]) -> list[Tensor] | None:
    """Kernels of one value as those of one origin and size; None if their strides differ."""
    if len({kernel.stride for kernel in kernels}) > 1:
        return None
    origin = _origin(kernels)
    before = [[origin[axis] - kernel.origin[axis] for axis in range(2)] for kernel in kernels]
    sides = [
        max(b[axis] + kernel.weight.shape[2 + axis] for b, kernel in zip(before, kernels, strict=True))
        for axis in range(2)
    ]
    return [
        F.pad(
            kernel.weight,
            (b[1], sides[1] - b[1] - kernel.weight.shape[3], b[0], sides[0] - b[0] - kernel.weight.shape[2]),
        )
        for b, kernel in zip(before, kernels, strict=True)
    ]


def _conv2d(merger: _Merger, node: Node) -> Sum | None:
    weight, offset = (merger.given[name] for name in node.weights)
    groups = int(node.options["groups"])
    if groups > 1:
        outputs, inputs = weight.shape[0] // groups, weight.shape[1]
        full = weight.new_zeros(len(weight), inputs * groups, *weight.shape[2:])
        for group in range(groups):
            rows = slice(group * outputs, (group + 1) * outputs)
            full[rows, group * inputs : (group + 1) * inputs] = weight[rows]
        weight = full
        merger.result.folded += 1
    return merger.composed(node, weight, offset)


def _avg_pool(merger: _Merger, node: Node) -> Sum | None:
    if node.inputs[0] not in merger.sums or any(node.options["padding"]):
        return None
    channels, kernel = node.shape[0], node.options["kernel"]
    eye = torch.eye(channels, dtype=torch.float64, device=merger.device)[:, :, None, None]
    weight = (eye / size(kernel)).expand(-1, -1, *kernel)
    return merger.composed(node, weight, torch.zeros(channels, dtype=torch.float64, device=merger.device))


def _affine(merger: _Merger, node: Node) -> Sum | None:
    shape = merger.anatomy.graph.shapes[node.weights[0]]
    if node.inputs[0] not in merger.sums or len(shape) != 3 or shape[1:] != (1, 1):
        return None
    scale, shift = (merger.given[name].flatten().expand(node.shape[0]) for name in node.weights)
    return merger.scaled(node.inputs[0], scale, shift)


def _scale(merger: _Merger, node: Node) -> Sum | None:
    if node.inputs[0] not in merger.sums:
        return None
    scale = torch.full((node.shape[0],), node.options["factor"], dtype=torch.float64, device=merger.device)
    return merger.scaled(node.inputs[0], scale, torch.zeros_like(scale))


def _mergeable_inputs(merger: _Merger, node: Node) -> list[Sum] | None:
    if len(node.shape) != 3 or not any(name in merger.sums for name in node.inputs):
        return None
    return [merger.sum_of(name) for name in node.inputs]


def _add(merger: _Merger, node: Node) -> Sum | None:
    parts = _mergeable_inputs(merger, node)
    if parts is None:
        return None
    alpha = float(node.options["alpha"])
    left, right = parts
    if alpha != 1:
        right = Sum(
            {n: replace(k, weight=alpha * k.weight, plain=False) for n, k in right.kernels.items()}, right.offset
        )
    kernels = dict(left.kernels) | dict(right.kernels)
    for source in left.kernels.keys() & right.kernels.keys():
        own = (left.kernels[source], right.kernels[source])
        aligned = _aligned(own)
        if aligned is None:
            return None
        kernels[source] = Kernel(aligned[0] + aligned[1], own[0].stride, _origin(own))
    merger.result.folded += 1
    return Sum(kernels, left.offset + alpha * right.offset)


def _concat(merger: _Merger, node: Node) -> Sum | None:
    parts = _mergeable_inputs(merger, node) if node.options["axis"] == 1 else None
    if parts is None:
        return None
    kernels = {}
    for source in dict.fromkeys(name for part in parts for name in part.kernels):
        known = next(part.kernels[source] for part in parts if source in part.kernels)
        # Where a part does not read the source, zeros.
        own = [
            part.kernels.get(source)
            or replace(known, weight=known.weight.new_zeros(len(part.offset), *known.weight.shape[1:]))
            for part in parts
        ]
        aligned = _aligned(own)
        if aligned is None:
            return None
        kernels[source] = Kernel(torch.cat(aligned), known.stride, _origin(own))
    merger.result.folded += 1
    return Sum(kernels, torch.cat([part.offset for part in parts]))


#: What may become part of a convolution; each returns None where it does not.
_HANDLERS: dict[str, Callable[[_Merger, Node], Sum | None]] = {
    "conv2d": _conv2d,
    "avg_pool": _avg_pool,
    "affine": _affine,
    "scale": _scale,
    "add": _add,
    "concat": _concat,
}
