"""A plain graph as ONNX, for other engines; masked ReLUs are gathered as in :mod:`fairline.private.jax_graph`.

Needs the extra ``fairline[onnx]``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairline._io import atomic_path
from fairline.errors import FairlineError
from fairline.masking import POWER_SCALES
from fairline.masking.sharing import Sharing
from fairline.private.graph import Node, PlainGraph, Positions, degrees_of, interpret

#: Old enough for every engine, new enough for axes as attributes of all operators used.
OPSET = 17


def require_onnx() -> None:
    """Refuse to go on without the package onnx.

    Raises:
        FairlineError: It is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise FairlineError("ONNX files take the extra: pip install 'fairline[onnx]'.")


def write_onnx(path: str | Path, graph: PlainGraph) -> None:
    """Write a graph with its weights as an ONNX file.

    Args:
        path: The file.
        graph: With weights. The input is ``images`` (batch, C, H, W), normalised; the output ``logits`` (batch, K).

    Raises:
        FairlineError: The package onnx is missing.
    """
    require_onnx()
    model = to_onnx(graph)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def to_onnx(graph: PlainGraph) -> Any:
    """The ``onnx.ModelProto`` of a graph."""
    import onnx
    from onnx import TensorProto, helper

    builder = _Builder(graph)
    last = interpret(graph, OPERATORS, builder, "images", {name: name for name in graph.weights})
    builder.add("Identity", [last], "logits")
    model = helper.make_model(
        helper.make_graph(
            builder.nodes,
            "fairline",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *graph.input_shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", graph.outputs])],
            builder.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="fairline",
    )
    # What the oldest engines with this operator set read.
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model


class _Builder:
    """The nodes and constants of an ONNX graph that is being made; values are the names of tensors."""

    def __init__(self, graph: PlainGraph) -> None:
        self.graph = graph
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        for name, value in graph.weights.items():
            self.constant(name, value.numpy())

    def constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def split(self, node: Node, x: str, degrees: Sequence[int] | None = None) -> tuple[str, str, Positions]:
        """Kept and other units, flattened."""
        positions = Positions.of(self.graph.masks[str(node.mask)], degrees)
        flat = self.add("Flatten", [x], f"{node.name}.flat", axis=1)
        names = []
        for kind in ("kept", "rest"):
            index = self.constant(f"{node.name}.{kind}.index", getattr(positions, kind).numpy())
            names.append(self.add("Gather", [flat, index], f"{node.name}.{kind}", axis=1))
        return names[0], names[1], positions

    def join(self, node: Node, kept: str, rest: str, positions: Positions) -> str:
        both = self.add("Concat", [kept, rest], f"{node.name}.both", axis=1)
        index = self.constant(f"{node.name}.inverse", positions.inverse.numpy())
        ordered = self.add("Gather", [both, index], f"{node.name}.ordered", axis=1)
        return self.reshape(ordered, node)

    def reshape(self, x: str, node: Node) -> str:
        shape = self.constant(f"{node.name}.shape", np.array([-1, *node.shape], np.int64))
        return self.add("Reshape", [x, shape], node.name)


def _conv2d(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    o = node.options
    return builder.add(
        "Conv",
        [*inputs, *weights],
        node.name,
        strides=o["stride"],
        pads=[*o["padding"], *o["padding"]],
        dilations=o["dilation"],
        group=o["groups"],
    )


def _linear(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    return builder.add("Gemm", [*inputs, *weights], node.name, transB=1)


def _affine(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    scaled = builder.add("Mul", [inputs[0], weights[0]], f"{node.name}.scaled")
    return builder.add("Add", [scaled, weights[1]], node.name)


def _number(builder: _Builder, name: str, value: float) -> str:
    return builder.constant(name, np.array(value, np.float32))


def _add(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    if node.options["alpha"] == 1:
        return builder.add("Add", inputs, node.name)
    alpha = _number(builder, f"{node.name}.alpha", node.options["alpha"])
    scaled = builder.add("Mul", [inputs[1], alpha], f"{node.name}.scaled")
    return builder.add("Add", [inputs[0], scaled], node.name)


def _scale(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    return builder.add("Mul", [inputs[0], _number(builder, f"{node.name}.factor", node.options["factor"])], node.name)


def _concat(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    return builder.add("Concat", inputs, node.name, axis=node.options["axis"])


def _relu(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    if node.mask is None:
        return builder.add("Relu", inputs, node.name)
    kept, rest, positions = builder.split(node, inputs[0])
    return builder.join(node, builder.add("Relu", [kept], f"{node.name}.relu"), rest, positions)


def _polynomial(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    kept, rest, positions = builder.split(node, inputs[0], degrees_of(node))
    parts, start = [], 0
    # ONNX knows no privacy: the coefficients can be spread over their units here.
    coefficients = builder.graph.weights[weights[0]] if weights else torch.zeros(1, *[1] * len(node.shape))
    per_unit = coefficients.expand(-1, *node.shape).reshape(len(coefficients), -1)[:, positions.rest]
    for degree, count in reversed(list(enumerate(positions.sizes))):
        if not count:
            continue
        name = f"{node.name}.{degree}"
        index = builder.constant(f"{name}.index", np.arange(start, start + count))
        x = builder.add("Gather", [rest, index], f"{name}.x", axis=1)
        if degree == 0:
            x = builder.add("Mul", [x, _number(builder, f"{name}.zero", 0)], name)
        elif degree > 1:
            x = _horner(builder, name, degree, x, per_unit[:, start : start + count])
        parts.append(x)
        start += count
    replaced = builder.add("Concat", parts, f"{node.name}.replaced", axis=1) if parts else rest
    return builder.join(node, builder.add("Relu", [kept], f"{node.name}.relu"), replaced, positions)


def _horner(builder: _Builder, name: str, degree: int, x: str, per_unit: Tensor) -> str:
    """Polynomials of some units, of their coefficients (degree + 1 or more, units)."""
    value = builder.constant(f"{name}.c{degree}", (POWER_SCALES[degree] * per_unit[degree]).numpy())
    for power in reversed(range(degree)):
        own = builder.constant(f"{name}.c{power}", (POWER_SCALES[power] * per_unit[power]).numpy())
        product = builder.add("Mul", [value, x], f"{name}.times{power}")
        value = builder.add("Add", [product, own], f"{name}.plus{power}")
    return value


def _shared_relu(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    sharing, name = Sharing.of(builder.graph.masks[str(node.mask)]), node.name
    flat = builder.add("Flatten", inputs, f"{name}.flat", axis=1)
    sums = []
    for place, own in enumerate(sharing.voters):
        index = builder.constant(f"{name}.voters{place}", own.numpy())
        taken = builder.add("Gather", [flat, index], f"{name}.taken{place}", axis=1)
        axis = builder.constant(f"{name}.axis{place}", np.array([2], np.int64))
        sums.append(builder.add("ReduceSum", [taken, axis], f"{name}.sum{place}", keepdims=0))
    both = builder.add("Concat", sums, f"{name}.sums", axis=1)
    positive = builder.add("Greater", [both, _number(builder, f"{name}.zero", 0.0)], f"{name}.positive")
    units = {}
    for kind in ("decided", "rest", "sign"):
        index = builder.constant(f"{name}.{kind}.index", getattr(sharing, kind).numpy())
        units[kind] = builder.add("Gather", [positive if kind == "sign" else flat, index], f"{name}.{kind}", axis=1)
    gate = builder.add("Cast", [units["sign"]], f"{name}.gate", to=1)
    through = builder.add("Mul", [units["decided"], gate], f"{name}.through")
    joined = builder.add("Concat", [through, units["rest"]], f"{name}.joined", axis=1)
    index = builder.constant(f"{name}.inverse", sharing.inverse.numpy())
    return builder.reshape(builder.add("Gather", [joined, index], f"{name}.ordered", axis=1), node)


def _pool(kind: str) -> Callable[[_Builder, Node, Sequence[str], Sequence[str]], str]:
    def place(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
        o = node.options
        extra = {"count_include_pad": 1} if kind == "AveragePool" else {}
        pads = [*o["padding"], *o["padding"]]
        return builder.add(kind, inputs, node.name, kernel_shape=o["kernel"], strides=o["stride"], pads=pads, **extra)

    return place


def _mean(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    mean = builder.add("ReduceMean", inputs, f"{node.name}.mean", axes=list(node.options["axes"]), keepdims=0)
    return builder.reshape(mean, node)


def _reshape(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    return builder.reshape(inputs[0], node)


def _gather(builder: _Builder, node: Node, inputs: Sequence[str], weights: Sequence[str]) -> str:
    flat = builder.add("Flatten", inputs, f"{node.name}.flat", axis=1)
    index = builder.constant(f"{node.name}.index", builder.graph.masks[str(node.mask)].numpy())
    return builder.reshape(builder.add("Gather", [flat, index], f"{node.name}.taken", axis=1), node)


#: The operators of :data:`fairline.private.graph.OPERATORS`, each told what to add to the ONNX graph.
OPERATORS: dict[str, Callable[[_Builder, Node, Sequence[str], Sequence[str]], str]] = {
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
    "avg_pool": _pool("AveragePool"),
    "max_pool": _pool("MaxPool"),
    "mean": _mean,
    "reshape": _reshape,
    "gather": _gather,
}
