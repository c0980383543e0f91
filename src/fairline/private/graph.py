"""A plain graph: what one private inference computes, in a small set of named operators.

It has two halves. The architecture, with the masks, is public: both parties of a private inference know it. The weights
are the model owner's. :mod:`fairline.private.export` makes graphs from networks. :func:`interpret` walks them: with the
operators below in torch, in JAX with those of :mod:`fairline.private.jax_graph`, and into an ONNX file with those of
:mod:`fairline.private.onnx_graph`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fairline._io import load_tensors, save_tensors
from fairline.errors import FairlineError
from fairline.masking.sharing import Sharing, count_signs, require_signs, shared_relu
from fairline.masking.surrogates import evaluate


@dataclass(frozen=True)
class Node:
    """One operator of a plain graph.

    Attributes:
        op: A key of :data:`OPERATORS`.
        name: Unique in the graph; other nodes call its output so.
        layer: Module that it came from, ``"layer1.0.conv1"``.
        inputs: Names of its inputs.
        shape: Of its output, without the batch axis.
        weights: Names of the private tensors it uses.
        mask: Name of the public mask it uses, of a gather's indices, or of shared signs; None where all ReLUs are kept.
        options: Constants: stride, padding, the ``degrees`` of a polynomial's channels, ….
    """

    op: str
    name: str
    layer: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    weights: tuple[str, ...] = ()
    mask: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class PlainGraph:
    """A network for private inference.

    Attributes:
        input_shape: Of one sample, (C, H, W).
        nodes: In the order of evaluation; the last one gives the logits.
        shapes: Of each private tensor, public.
        masks: Public: bool, of an activation's shape, True where the ReLU is kept; of a gather int64, which units of
            its flattened input it takes, in the order of its flattened output; of a shared ReLU int64, ``(2, *shape)``,
            see :mod:`fairline.masking.sharing`.
        weights: Private: float32, by name; empty in the public half.
    """

    input_shape: tuple[int, ...]
    nodes: list[Node]
    shapes: dict[str, tuple[int, ...]]
    masks: dict[str, Tensor]
    weights: dict[str, Tensor]

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return self.nodes[-1].shape[-1]

    @property
    def relus(self) -> int:
        """ReLUs evaluated for a sample; of units that share a sign, one."""
        return sum(kept_relus(self, node) for node in self.nodes)

    def public(self) -> PlainGraph:
        """The half without weights."""
        return PlainGraph(self.input_shape, self.nodes, self.shapes, self.masks, {})

    def input_shapes(self, node: Node) -> list[tuple[int, ...]]:
        """Shapes of a node's inputs, without the batch axis."""
        known = self.__dict__.setdefault("_by_name", {n.name: n.shape for n in self.nodes} | {"x": self.input_shape})
        return [known[name] for name in node.inputs]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, H, W), in plain torch."""
        weights = {name: value.to(x.dtype) for name, value in self.weights.items()}
        return interpret(self, OPERATORS, self, x, weights)

    def save_public(self, path: str | Path) -> None:
        """Write the public half."""
        described = {
            "format": _FORMAT,
            "input_shape": self.input_shape,
            "nodes": [asdict(node) for node in self.nodes],
            "shapes": self.shapes,
        }
        save_tensors(path, self.masks, described)

    def save_weights(self, path: str | Path) -> None:
        """Write the private half."""
        save_tensors(path, self.weights)

    @classmethod
    def load_public(cls, path: str | Path) -> PlainGraph:
        """Read what :meth:`save_public` wrote.

        Args:
            path: The file.

        Returns:
            The graph, without weights.

        Raises:
            FairlineError: The file is missing, broken or of another kind.
        """
        masks, described = load_tensors(path)
        if not isinstance(described, dict) or described.get("format") != _FORMAT:
            raise FairlineError(f"{path} is not the public part of a network for private inference.")
        try:
            nodes = [
                Node(**{**n, "inputs": tuple(n["inputs"]), "shape": tuple(n["shape"]), "weights": tuple(n["weights"])})
                for n in described["nodes"]
            ]
            shapes = {name: tuple(shape) for name, shape in described["shapes"].items()}
            graph = cls(tuple(described["input_shape"]), nodes, shapes, masks, {})
        except (KeyError, TypeError):
            raise FairlineError(f"{path} is not the public part of a network for private inference.") from None
        unknown = [node.op for node in nodes if node.op not in OPERATORS]
        if unknown:
            raise FairlineError(f"{path} uses the operator '{unknown[0]}', which this version does not know.")
        for node in nodes:
            if node.op == "gather" and not _in_range(graph, node):
                raise FairlineError(f"{path} takes units in '{node.name}' that its input does not have.")
            if node.op == "polynomial" and not _known_degrees(node):
                raise FairlineError(f"{path} has polynomials in '{node.name}' of degrees that there are none of.")
            if node.op == "shared_relu":
                if str(node.mask) not in masks:
                    raise FairlineError(f"{path} does not say which units of '{node.name}' share signs.")
                require_signs(masks[str(node.mask)], node.shape)
        return graph

    def load_weights(self, path: str | Path, dtype: torch.dtype | None = torch.float32) -> None:
        """Read the private half.

        Args:
            path: The file.
            dtype: Of the weights from here on; None for what they are in the file.

        Raises:
            FairlineError: The file is missing, broken, or holds another network's weights.
        """
        weights, _ = load_tensors(path)
        for name in [*self.shapes, *weights]:
            wanted, found = self.shapes.get(name), tuple(weights[name].shape) if name in weights else None
            if wanted != found:
                raise FairlineError(
                    f"{path} holds weights of another network: '{name}' has shape {found or 'none'} there "
                    f"and {wanted or 'none'} in the graph."
                )
        self.weights = {name: weights[name].to(dtype or weights[name].dtype) for name in self.shapes}


_FORMAT = "fairline plain graph 1"


def _in_range(graph: PlainGraph, node: Node) -> bool:
    index = graph.masks.get(str(node.mask))
    if index is None or index.dtype != torch.int64 or index.numel() != math.prod(node.shape):
        return False
    return bool(((index >= 0) & (index < math.prod(graph.input_shapes(node)[0]))).all())


def _known_degrees(node: Node) -> bool:
    degrees = node.options.get("degrees")
    return isinstance(degrees, list) and len(degrees) == node.shape[0] and all(each in (0, 1, 2, 3) for each in degrees)


Context = TypeVar("Context")
Value = TypeVar("Value")


def interpret(
    graph: PlainGraph,
    operators: Mapping[str, Callable[[Context, Node, Sequence[Value], Sequence[Value]], Value]],
    context: Context,
    x: Value,
    weights: Mapping[str, Value],
) -> Value:
    """Walk a graph once, in the order of evaluation.

    Args:
        graph: Its weights are not read.
        operators: What each operator makes of the context, the node, the node's inputs and its weights.
        context: Handed to every operator: the graph, or what is being built from it.
        x: Stands for the input.
        weights: Stand for the private tensors, by name.

    Returns:
        What stands for the logits.
    """
    values = {"x": x}
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        values[node.name] = operators[node.op](context, node, inputs, [weights[name] for name in node.weights])
    return values[graph.nodes[-1].name]


@dataclass(frozen=True)
class Positions:
    """Where in a flattened activation the ReLUs are, as an engine that must not pay for the others needs it.

    Attributes:
        kept: int64, flat indices of the kept ReLUs.
        rest: int64, of all other units: those of higher degree first.
        inverse: int64, where in ``[kept, rest]`` each unit is.
        sizes: How many of the others are of degree 0, 1, 2 and 3.
    """

    kept: Tensor
    rest: Tensor
    inverse: Tensor
    sizes: tuple[int, int, int, int]

    @classmethod
    def of(cls, mask: Tensor, degrees: Sequence[int] | None = None) -> Positions:
        """From a mask of any shape, and the degree of each channel's polynomial; 1, the identity, by default."""
        flat = mask.flatten()
        kept, rest = flat.nonzero().flatten(), (~flat).nonzero().flatten()
        channels = torch.tensor([1] * len(mask) if degrees is None else list(degrees))
        own = channels.repeat_interleave(mask.numel() // max(len(mask), 1))[rest]
        rest = rest[torch.sort(own, descending=True, stable=True).indices]
        zero, one, two, three = torch.bincount(own, minlength=4).tolist()
        return cls(kept, rest, torch.argsort(torch.cat([kept, rest])), (zero, one, two, three))


def kept_relus(graph: PlainGraph, node: Node) -> int:
    """ReLUs that a node evaluates for a sample; 0 for operators without any."""
    if node.op == "shared_relu":
        return count_signs(graph.masks[str(node.mask)])
    if node.op not in MASKED:
        return 0
    return math.prod(node.shape) if node.mask is None else int(graph.masks[node.mask].sum())


#: Operators of masked ReLUs that have a polynomial in the place of those that are cut.
POLYNOMIALS = ("quadratic", "polynomial")
#: Operators of masked ReLUs.
MASKED = ("relu", *POLYNOMIALS, "shared_relu")


def degrees_of(node: Node) -> list[int]:
    """The degree of each channel's polynomial: 0 (zero), 1 (the identity), 2 or 3."""
    return [2] * node.shape[0] if node.op == "quadratic" else [int(each) for each in node.options["degrees"]]


def straight(graph: PlainGraph, node: Node) -> bool:
    """Whether a polynomial keeps no ReLU and squares nothing, so that it is affine."""
    return not kept_relus(graph, node) and max(degrees_of(node)) < 2


def polynomial_units(graph: PlainGraph, node: Node) -> list[int]:
    """How many units are replaced by polynomials of degree 0, 1, 2 and 3."""
    per_channel = math.prod(node.shape[1:])
    replaced = (~graph.masks[str(node.mask)]).view(node.shape[0], per_channel).sum(1)
    units = torch.zeros(4, dtype=torch.int64).index_add_(0, torch.tensor(degrees_of(node)), replaced)
    return [int(each) for each in units]


def _conv2d(_: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    o = node.options
    return F.conv2d(inputs[0], weights[0], weights[1], o["stride"], o["padding"], o["dilation"], o["groups"])


def _linear(_: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return F.linear(inputs[0], *weights)


def _affine(_: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return inputs[0] * weights[0] + weights[1]


def _add(_: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return inputs[0] + node.options["alpha"] * inputs[1]


def _scale(_: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return inputs[0] * node.options["factor"]


def _concat(_: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(inputs), node.options["axis"])


def _relu(graph: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    if node.mask is None:
        return F.relu(inputs[0])
    return torch.where(graph.masks[node.mask], F.relu(inputs[0]), inputs[0])


def _polynomial(graph: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    x = inputs[0]
    coefficients = weights[0] if weights else constant_coefficients(degrees_of(node), x)
    return torch.where(graph.masks[str(node.mask)], F.relu(x), evaluate(coefficients, x))


def constant_coefficients(degrees: Sequence[int], x: Tensor) -> Tensor:
    """Those of channels of which none has any of its own, (2, C, 1, …)."""
    slope = torch.tensor(degrees, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2))
    return torch.stack([torch.zeros_like(slope), slope])


def _shared_relu(graph: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return shared_relu(inputs[0], Sharing.of(graph.masks[str(node.mask)]))


def _avg_pool(_: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return F.avg_pool2d(inputs[0], node.options["kernel"], node.options["stride"], node.options["padding"])


def _max_pool(_: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return F.max_pool2d(inputs[0], node.options["kernel"], node.options["stride"], node.options["padding"])


def _mean(_: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return inputs[0].mean(node.options["axes"]).reshape(-1, *node.shape)


def _reshape(_: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return inputs[0].reshape(-1, *node.shape)


def _gather(graph: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return inputs[0].flatten(1).index_select(1, graph.masks[str(node.mask)]).reshape(-1, *node.shape)


#: Every operator that a plain graph may have, with what it computes.
OPERATORS: dict[str, Callable[[PlainGraph, Node, Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "affine": _affine,
    "add": _add,
    "scale": _scale,
    "concat": _concat,
    "relu": _relu,
    "quadratic": _polynomial,
    "polynomial": _polynomial,
    "shared_relu": _shared_relu,
    "avg_pool": _avg_pool,
    "max_pool": _max_pool,
    "mean": _mean,
    "reshape": _reshape,
    "gather": _gather,
}


def relu_layers(graph: PlainGraph) -> Iterator[tuple[Node, int]]:
    """The nodes that evaluate ReLUs, each with how many."""
    for node in graph.nodes:
        kept = kept_relus(graph, node)
        if kept:
            yield node, kept
