"""A plain graph as a network: its weights are parameters, its ReLUs are masked ReLUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.masking import MaskedReLU
from fairline.private.graph import MASKED, OPERATORS, POLYNOMIALS, Node, PlainGraph, degrees_of, interpret


class GraphNetwork(nn.Module):
    """A plain graph that can be trained, measured and linearized like any other network.

    Args:
        graph: With weights, whose kind of number the parameters have.
    """

    def __init__(self, graph: PlainGraph) -> None:
        super().__init__()
        self._nodes, self._shapes, self._input_shape = graph.nodes, graph.shapes, graph.input_shape
        self.relus = nn.ModuleDict()
        in_relus = set()
        for node in graph.nodes:
            if node.op in MASKED:
                layer = MaskedReLU(node.shape)
                if node.op == "shared_relu":
                    layer.set_mask(graph.masks[str(node.mask)][0] >= 0)
                    layer.share(graph.masks[str(node.mask)])
                elif node.mask is not None:
                    layer.set_mask(graph.masks[node.mask])
                if node.op == "polynomial":
                    layer.use_degrees(torch.tensor(degrees_of(node)))
                for name in node.weights:
                    layer.coefficients = nn.Parameter(graph.weights[name].clone())
                    in_relus.add(name)
                self.relus[_key(node.name)] = layer
        self.weights = nn.ParameterDict(
            {_key(name): graph.weights[name].clone() for name in graph.shapes if name not in in_relus}
        )
        #: Public indices of gathers by name; they move with the network, and are no part of its state.
        self._indices = [str(node.mask) for node in graph.nodes if node.op == "gather"]
        for name in self._indices:
            self.register_buffer(f"_index_{_key(name)}", graph.masks[name].clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, H, W)."""
        if tuple(x.shape[1:]) != self._input_shape:
            raise FairlineError(_other_images(x.shape[1:], self._input_shape))
        indices = {name: self.get_buffer(f"_index_{_key(name)}") for name in self._indices}
        graph = PlainGraph(self._input_shape, self._nodes, self._shapes, indices, {})
        operators = {**OPERATORS, **dict.fromkeys(MASKED, self._relu)}
        return interpret(graph, operators, graph, x, self._weights())

    def _relu(self, _: PlainGraph, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        output: Tensor = self.relus[_key(node.name)](inputs[0])
        return output

    def _weights(self) -> Mapping[str, Tensor]:
        """Parameters by their names in the graph."""
        own: dict[str, Tensor] = {name: self.weights[_key(name)] for name in self._shapes if _key(name) in self.weights}
        for node in self._nodes:
            for name in node.weights:
                if name not in own:
                    own[name] = cast(Tensor, cast(MaskedReLU, self.relus[_key(node.name)]).polynomial)
        return own

    def graph(self, input_shape: Sequence[int] | None = None, dtype: torch.dtype = torch.float32) -> PlainGraph:
        """The plain graph, with the weights and masks of now.

        Args:
            input_shape: Of the images that it is wanted for, (C, H, W); None for those it was made for.
            dtype: Of the weights.

        Returns:
            The graph, on the CPU.

        Raises:
            FairlineError: It was made for images of another shape, or masks are still being learned.
        """
        if input_shape is not None and tuple(input_shape) != self._input_shape:
            raise FairlineError(_other_images(input_shape, self._input_shape))
        weights = {name: value.detach().to("cpu", dtype, copy=True) for name, value in self._weights().items()}
        masks = {name: self.get_buffer(f"_index_{_key(name)}").cpu() for name in self._indices}
        nodes: list[Node] = []
        renamed: dict[str, str] = {}
        for node in self._nodes:
            node = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
            if node.op in MASKED:
                layer = cast(MaskedReLU, self.relus[_key(node.name)])
                if layer.weight is not None:
                    raise FairlineError(f"The masks of '{node.name}' are still being learned; fix them first.")
                if node.op not in POLYNOMIALS and not layer.num_kept and node.name != self._nodes[-1].name:
                    renamed[node.name] = node.inputs[0]
                    continue
                if (signs := layer.effective_signs) is not None:
                    nodes.append(replace(node, op="shared_relu", mask=node.name))
                    masks[node.name] = signs.cpu()
                    continue
                node = replace(node, op="relu") if node.op == "shared_relu" else node
                # A polynomial needs its mask even where it keeps everything.
                whole = node.op == "relu" and layer.num_kept == layer.kept.numel()
                node = replace(node, mask=None if whole else node.name)
                if not whole:
                    masks[node.name] = layer.kept.cpu()
            nodes.append(node)
        ordered = {name: weights[name] for name in self._shapes}
        return PlainGraph(self._input_shape, nodes, self._shapes, masks, ordered)


def _key(name: str) -> str:
    # Neither modules nor parameters may have a dot in their names.
    return name.replace(".", "_")


def _other_images(found: Sequence[int], wanted: Sequence[int]) -> str:
    return f"This network was made for images of shape {tuple(wanted)}, not {tuple(found)}."
