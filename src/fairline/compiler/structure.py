"""Which units each unit of a plain graph reads, whatever the weights are.

It is the pattern of the derivative's entries that the architecture allows to be other than zero. It is public, as the
architecture and the masks are: what a compiled network leaves out must not depend on the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fairline.errors import FairlineError
from fairline.masking.sharing import Sharing
from fairline.private.graph import MASKED, OPERATORS, Node, PlainGraph


def _conv2d(graph: PlainGraph, node: Node, inputs: Sequence[Tensor], _: Sequence[Tensor]) -> Tensor:
    o, kernel = node.options, graph.shapes[node.weights[0]][2:]
    groups = int(o["groups"])
    x = inputs[0].unflatten(1, (groups, -1)).sum(2)
    y = F.conv2d(x, torch.ones(groups, 1, *kernel), None, o["stride"], o["padding"], o["dilation"], groups)
    return y.repeat_interleave(node.shape[0] // groups, 1)


def _linear(graph: PlainGraph, node: Node, inputs: Sequence[Tensor], _: Sequence[Tensor]) -> Tensor:
    return inputs[0].sum(1, keepdim=True).expand(-1, *node.shape)


def _each(graph: PlainGraph, node: Node, inputs: Sequence[Tensor], _: Sequence[Tensor]) -> Tensor:
    return inputs[0] * 1


def _add(graph: PlainGraph, node: Node, inputs: Sequence[Tensor], _: Sequence[Tensor]) -> Tensor:
    return inputs[0] + inputs[1]


def _shared_relu(graph: PlainGraph, node: Node, inputs: Sequence[Tensor], _: Sequence[Tensor]) -> Tensor:
    sharing, flat = Sharing.of(graph.masks[str(node.mask)]), inputs[0].flatten(1)
    votes = [flat[:, own.flatten()].unflatten(1, own.shape).sum(2) for own in sharing.voters]
    # A unit that passes has the sign beyond the last, for which nobody votes.
    read = torch.cat([*votes, flat.new_zeros(len(flat), 1)], 1)[:, sharing.gate]
    return (flat + read).view(-1, *node.shape)


#: Of each operator a linear map of counts, positive exactly where a unit reads a unit whose count is positive.
_COUNTS: dict[str, Callable[[PlainGraph, Node, Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "affine": _each,
    "add": _add,
    "scale": _each,
    **dict.fromkeys(MASKED, _each),
    "shared_relu": _shared_relu,
    "max_pool": OPERATORS["avg_pool"],
    **{name: OPERATORS[name] for name in ("concat", "avg_pool", "mean", "reshape", "gather")},
}

#: Operators that pass the units on that they do not keep.
PASSING = frozenset({"relu", "shared_relu"})

#: Operators whose output is affine in their input.
AFFINE = frozenset(_COUNTS) - {*MASKED, "max_pool"}


def require_known(graph: PlainGraph) -> None:
    """Refuse a graph with an operator of which the compiler knows neither what it reads nor that it is affine.

    Raises:
        FairlineError: There is one.
    """
    for node in graph.nodes:
        if node.op not in _COUNTS:
            raise FairlineError(
                f"The operator '{node.op}' of layer '{node.layer}' is not affine, and no ReLU, polynomial or max "
                "pooling; a network with it cannot be compiled."
            )


def readers(graph: PlainGraph, node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Which units of a node's output read a unit that is marked.

    Args:
        graph: Its weights are not read.
        node: One of its nodes.
        inputs: 1 where marked, else 0; (B, *shape) each.

    Returns:
        1 or 0, (B, *shape).
    """
    return (_COUNTS[node.op](graph, node, inputs, ()) > 0).float()


def read_by(graph: PlainGraph, node: Node, output: Tensor) -> list[Tensor]:
    """Which units of a node's inputs are read by a unit of its output that is marked.

    Args:
        graph: Its weights are not read.
        node: One of its nodes.
        output: Positive where marked, else 0; (B, *shape).

    Returns:
        Of each input, positive or 0, (B, *shape).
    """
    marked = (output > 0).float()
    return transposed(lambda inputs: _COUNTS[node.op](graph, node, inputs, ()), graph.input_shapes(node), marked)


def transposed(
    linear: Callable[[Sequence[Tensor]], Tensor], shapes: Sequence[tuple[int, ...]], output: Tensor
) -> list[Tensor]:
    """Products of a linear map's transpose with vectors.

    Args:
        linear: Of a batch of inputs.
        shapes: Of the inputs, without the batch axis.
        output: The vectors, (B, …).

    Returns:
        Of each input, (B, *shape).
    """
    inputs = [output.new_zeros(len(output), *shape, requires_grad=True) for shape in shapes]
    with torch.enable_grad():
        value = linear(inputs)
    return list(torch.autograd.grad(value, inputs, output))


def size(shape: Sequence[int]) -> int:
    """Units of a value of this shape."""
    return math.prod(shape)
