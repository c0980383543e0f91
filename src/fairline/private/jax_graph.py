"""A plain graph as a JAX function, in which only kept ReLUs are evaluated.

``m·relu(x) + (1 − m)·x`` and ``where`` would pay for every ReLU under encryption. Here the kept positions are gathered
by constant indices, put through the ReLU, and put back by the inverse permutation; moving values costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fairline.masking import POWER_SCALES
from fairline.masking.sharing import Sharing
from fairline.private.graph import Node, PlainGraph, Positions, degrees_of, interpret

Weights = Mapping[str, Any]


def to_jax(graph: PlainGraph) -> Callable[[Weights, Any], Any]:
    """The function ``(weights, x) -> logits`` of a graph.

    Args:
        graph: Its weights are not used: they come as an argument, since they are private.

    Returns:
        A function of a dict of weights by name and normalised images (B, C, H, W) to logits (B, K), in float32.
    """

    def run(weights: Weights, x: Any) -> Any:
        return interpret(graph, OPERATORS, graph, x, weights)

    return run


def _conv2d(_: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    o = node.options
    # SPU has no grouped convolution: one for each group.
    pieces = [
        jax.lax.conv_general_dilated(
            x,
            kernel,
            o["stride"],
            [(p, p) for p in o["padding"]],
            rhs_dilation=o["dilation"],
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )
        for x, kernel in zip(jnp.split(inputs[0], o["groups"], 1), jnp.split(weights[0], o["groups"], 0), strict=True)
    ]
    y = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, 1)
    return y + weights[1].reshape(1, -1, 1, 1)


def _linear(_: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    return inputs[0] @ weights[0].T + weights[1]


def _affine(_: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    return inputs[0] * weights[0] + weights[1]


def _add(_: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    alpha = node.options["alpha"]
    # A product with a public number costs a truncation.
    if alpha == 1:
        return inputs[0] + inputs[1]
    return inputs[0] - inputs[1] if alpha == -1 else inputs[0] + alpha * inputs[1]


def _scale(_: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    return inputs[0] * np.float32(node.options["factor"])


def _concat(_: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    return jnp.concatenate(inputs, node.options["axis"])


def _split(
    graph: PlainGraph, node: Node, x: Any, degrees: Sequence[int] | None = None
) -> tuple[Any, Any, Callable[[Any, Any], Any], Positions]:
    """Kept and other units, (B, n) each, and what puts them back."""
    positions = Positions.of(graph.masks[str(node.mask)], degrees)
    flat = x.reshape(x.shape[0], -1)

    def join(kept: Any, rest: Any) -> Any:
        return _take(jnp.concatenate([kept, rest], 1), positions.inverse).reshape(x.shape)

    return _take(flat, positions.kept), _take(flat, positions.rest), join, positions


def _take(x: Any, index: Any) -> Any:
    # All indices are in range; the default mode would add a selection that is paid for.
    return jnp.take(x, jnp.asarray(index.numpy().astype(np.int32)), axis=1, mode="clip")


def _relu_of(x: Any) -> Any:
    return jnp.maximum(x, 0)


def _relu(graph: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    if node.mask is None:
        return _relu_of(inputs[0])
    kept, rest, join, _ = _split(graph, node, inputs[0])
    return join(_relu_of(kept), rest)


def _polynomial(graph: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    """Horner's rule for the units of degree 2 and 3 at once, since each product of secrets takes rounds."""
    kept, rest, join, positions = _split(graph, node, inputs[0], degrees_of(node))
    zeros, linear, _, cubes = positions.sizes
    bent = rest.shape[1] - zeros - linear
    parts = [rest[:, bent : bent + linear]] if linear else []
    if zeros:
        parts.append(jnp.zeros((rest.shape[0], zeros), rest.dtype))
    if bent:
        per_unit = jnp.broadcast_to(weights[0], (len(weights[0]), *node.shape)).reshape(len(weights[0]), -1)
        taken = _take(per_unit, positions.rest[:bent])
        coefficients = [each if scale == 1 else scale * each for scale, each in zip(POWER_SCALES, taken, strict=False)]

        def of(power: int) -> Any:
            """Coefficients of a power in cubics beside those of one power less in squares."""
            if cubes == 0:
                return coefficients[power - 1]
            return jnp.concatenate([coefficients[power][:cubes], coefficients[power - 1][cubes:]])

        x = rest[:, :bent]
        value = (of(3) * x + of(2)) * x + of(1)
        if cubes:
            third = value[:, :cubes] * x[:, :cubes] + coefficients[0][:cubes]
            value = third if cubes == bent else jnp.concatenate([third, value[:, cubes:]], 1)
        parts.insert(0, value)
    replaced = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1) if parts else rest
    return join(_relu_of(kept) if kept.shape[1] else kept, replaced)


def _shared_relu(graph: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    x, sharing = inputs[0], Sharing.of(graph.masks[str(node.mask)])
    flat = x.reshape(x.shape[0], -1)
    # Sums, of which each party adds its own shares: one comparison a sign.
    sums = [_take(flat, own.flatten()).reshape(-1, *own.shape).sum(2) for own in sharing.voters]
    positive = jnp.concatenate(sums, 1) > 0
    decided = _take(flat, sharing.decided) * _take(positive, sharing.sign)
    if len(sharing.rest):
        decided = jnp.concatenate([decided, _take(flat, sharing.rest)], 1)
    return _take(decided, sharing.inverse).reshape(x.shape)


def _windows(node: Node) -> dict[str, Any]:
    o = node.options
    return {
        "window_dimensions": (1, 1, *o["kernel"]),
        "window_strides": (1, 1, *o["stride"]),
        "padding": ((0, 0), (0, 0), *((p, p) for p in o["padding"])),
    }


def _avg_pool(_: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    total = jax.lax.reduce_window(inputs[0], np.float32(0), jax.lax.add, **_windows(node))
    return total * np.float32(1 / np.prod(node.options["kernel"]))


def _max_pool(_: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    return jax.lax.reduce_window(inputs[0], -np.inf, jax.lax.max, **_windows(node))


def _mean(_: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    return jnp.mean(inputs[0], tuple(node.options["axes"])).reshape(-1, *node.shape)


def _reshape(_: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    return inputs[0].reshape(-1, *node.shape)


def _gather(graph: PlainGraph, node: Node, inputs: Sequence[Any], weights: Sequence[Any]) -> Any:
    flat = inputs[0].reshape(inputs[0].shape[0], -1)
    return _take(flat, graph.masks[str(node.mask)]).reshape(-1, *node.shape)


#: The operators of :data:`fairline.private.graph.OPERATORS`, in JAX.
OPERATORS: dict[str, Callable[[PlainGraph, Node, Sequence[Any], Sequence[Any]], Any]] = {
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
