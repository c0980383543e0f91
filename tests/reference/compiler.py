"""Slow and obviously right: the dense form of a network from full Jacobians, and all plans that there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fairline.private.graph import MASKED, OPERATORS, POLYNOMIALS, PlainGraph, degrees_of, kept_relus

Jacobians = dict[str, dict[str, Tensor]]


def nonlinear_nodes(graph: PlainGraph) -> list[str]:
    return [
        node.name
        for node in graph.nodes
        if node.op == "max_pool"
        or (node.op in MASKED and kept_relus(graph, node))
        or (node.op in POLYNOMIALS and max(degrees_of(node)) > 1)
    ]


def corrected(graph: PlainGraph, x: Tensor, corrections: dict[str, Tensor]) -> dict[str, Tensor]:
    """All values of a network whose nonlinear nodes are the identity (max poolings the mean) plus a correction."""
    weights = {name: value.double() for name, value in graph.weights.items()}
    values, bent = {"x": x}, nonlinear_nodes(graph)
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        if node.op in ("relu", "shared_relu") or node.name in bent:
            value = OPERATORS["avg_pool"](graph, node, inputs, ()) if node.op == "max_pool" else inputs[0]
            values[node.name] = value + corrections.get(node.name, 0)
        else:
            values[node.name] = OPERATORS[node.op](graph, node, inputs, [weights[name] for name in node.weights])
    return values


def jacobians(graph: PlainGraph) -> tuple[Jacobians, dict[str, Tensor]]:
    """Of what each nonlinear node reads and of the logits: by the image and by all corrections, and at zero."""
    nodes = {node.name: node for node in graph.nodes}
    names = nonlinear_nodes(graph)
    zeros = [torch.zeros(1, *graph.input_shape, dtype=torch.float64)]
    zeros += [torch.zeros(1, *nodes[name].shape, dtype=torch.float64) for name in names]
    wanted = {name: nodes[name].inputs[0] for name in names} | {"logits": graph.nodes[-1].name}

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = corrected(graph, inputs[0], dict(zip(names, inputs[1:], strict=True)))
        return tuple(values[value].flatten() for value in wanted.values())

    found = torch.autograd.functional.jacobian(run, tuple(zeros))
    keys = ["x", *names]
    result = {
        target: {key: part.reshape(len(part), -1) for key, part in zip(keys, parts, strict=True)}
        for target, parts in zip(wanted, found, strict=True)
    }
    return result, dict(zip(wanted, run(*zeros), strict=True))


def dense_logits(graph: PlainGraph, x: Tensor) -> Tensor:
    """Logits (B, K) by the formula: s_l = M_l x + m_l + Σ N_lj c_j, level by level."""
    parts, offsets = jacobians(graph)
    nodes = {node.name: node for node in graph.nodes}
    weights = {name: value.double() for name, value in graph.weights.items()}
    shapes = {"x": graph.input_shape} | {node.name: node.shape for node in graph.nodes}
    known = {"x": x.flatten(1)}
    for target, by in parts.items():
        s = offsets[target] + sum(known[key] @ by[key].T for key in known)
        if target == "logits":
            return s
        node = nodes[target]
        full = s.view(-1, *shapes[node.inputs[0]])
        value = OPERATORS[node.op](graph, node, [full], [weights[name] for name in node.weights])
        plain = OPERATORS["avg_pool"](graph, node, [full], ()) if node.op == "max_pool" else full
        known[target] = (value - plain).flatten(1)
    raise AssertionError("there are always logits")


def all_chains(edges: Sequence[tuple[int, int]], last: int, start: int = 0) -> Iterator[list[int]]:
    """Every way from ``start`` to ``last``, as indices of edges."""
    if start == last:
        yield []
    for place, (first, stop) in enumerate(edges):
        if first == start:
            for rest in all_chains(edges, last, stop):
                yield [place, *rest]
