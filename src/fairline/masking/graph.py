"""The graph of a masked network, for methods that ask what stands before a ReLU (``torch.fx``; Reed et al. 2022)."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from fairline.masking.copying import copy_model
from fairline.masking.equal import same_random, tensors_of
from fairline.masking.layer import MaskedReLU, masked_relus
from fairline.masking.watch import RELU_LIKE, is_plain_relu


class _Root(nn.Module):
    """Calls a network with its images alone: whatever else its forward takes keeps its default."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A plain ReLU may hand its input to a mask.
        return isinstance(m, MaskedReLU) or (not is_plain_relu(m) and super().is_leaf_module(m, module_qualified_name))

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        # A method of a proxy passes modes by, a function does not.
        if kind == "call_method" and target.strip("_") in RELU_LIKE and hasattr(torch, target):
            return getattr(torch, target)(*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)


def masked_graph(model: nn.Module, images: Tensor | None = None) -> fx.GraphModule | None:
    """What a masked network computes in evaluation mode, as a graph of its own modules.

    Args:
        model: From :func:`~fairline.masking.mask_relus`. Not changed; the graph shares its modules and weights.
        images: (B, C, H, W), on which graph and network are compared; they are not by default.

    Returns:
        A graph in which each masked ReLU is one call of a module, under its name. None where ``torch.fx`` cannot trace
        the network, does not see its masks, or computes something else.
    """
    # Of a copy, since a forward may keep what it computes.
    root = _Root(copy_model(model)).eval()
    try:
        graph = _Tracer().trace(root)
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = node.target.removeprefix("network.")
        if images is not None and not _same(root, _over(root, graph, root.network), images):
            return None
        traced = _over(root, graph, model)
    except Exception:
        # The user's own forward may do anything.
        return None
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    return traced if all(calls.count(name) == 1 for name in masked_relus(model)) else None


def _over(root: nn.Module, graph: fx.Graph, network: nn.Module) -> fx.GraphModule:
    """A graph of the modules and weights of a network, and of the constants that tracing has left on the root."""
    names = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    held = {name: attrgetter(name)(root if name in vars(root) or name in root._buffers else network) for name in names}
    return fx.GraphModule(held, graph, class_name=type(network).__name__)


def _same(model: nn.Module, traced: nn.Module, images: Tensor) -> bool:
    with torch.no_grad(), same_random(0):
        pairs = zip(tensors_of(model(images)), tensors_of(traced(images)), strict=True)
        return all(torch.allclose(*pair, rtol=1e-4, atol=1e-5, equal_nan=True) for pair in pairs)
