"""Finding a model's ReLUs and putting masks in their place."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fairline.errors import FairlineError
from fairline.masking.layer import (
    MaskedReLU,
    Surrogate,
    masked_relus,
)
from fairline.masking.published import take_over_published


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, MaskedReLU) or super().is_leaf_module(m, module_qualified_name)


_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}


def mask_relus(model: nn.Module, example: Tensor, surrogate: Surrogate | None = None) -> nn.Module:
    """Replace every ReLU of a model by a :class:`MaskedReLU` that keeps all of its units.

    Finds ``nn.ReLU`` modules and calls of ``F.relu``, ``torch.relu`` and ``.relu()`` through ``torch.fx``; a
    module that is called twice gets two masks. A model that cannot be traced is accepted where all its ReLUs
    are ``nn.ReLU`` modules that a forward pass calls once each.

    Args:
        model: Any module that maps a batch to a batch. It is not changed.
        example: Input, (B, …), B ≥ 1, of the shape that the model will see; its values do not matter.
        surrogate: What will stand in a ReLU's place; the identity by default, and what a masked model has already. See
            :meth:`MaskedReLU.use_surrogate`.

    Returns:
        A copy with masks. Its outputs equal the model's exactly, and the names of its weights are the same; a
        quadratic surrogate adds its coefficients.

    Raises:
        FairlineError: The model has no ReLU, or cannot be traced.
    """
    masked = copy.deepcopy(model) if masked_relus(model) else _mask_relus(model, example)
    if surrogate is not None:
        for layer in masked_relus(masked).values():
            layer.use_surrogate(surrogate)
    return masked


def _mask_relus(model: nn.Module, example: Tensor) -> nn.Module:
    device = next((p.device for p in model.parameters()), example.device)
    example = example[:2].to(device)
    copied = copy.deepcopy(model)
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(example.clone())
    except Exception as error:
        # The user's own forward may raise anything.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FairlineError(
            f"{type(model).__name__} fails on an example of shape {tuple(example.shape)} ({reason})."
        ) from None
    take_over_published(copied, example)
    try:
        graph = _Tracer().trace(copied)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        masked = _replace_modules(copy.deepcopy(copied), example, reason)
    else:
        masked = _replace_nodes(copy.deepcopy(copied), graph, example)
    if not masked_relus(masked):
        raise FairlineError(f"{type(model).__name__} has no ReLU to mask.")
    _check_equal(copied, masked, example)
    return masked.train(model.training)


def _check_equal(model: nn.Module, masked: nn.Module, example: Tensor) -> None:
    """Tracing runs one path through a forward; make sure that nothing else was lost."""
    if example.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(example.shape, generator=generator).to(example)
    with torch.no_grad():
        before, after = model.eval()(example), masked.eval()(example)
    if isinstance(before, Tensor) and not torch.equal(before, after):
        raise FairlineError(
            f"{type(model).__name__} computes something else once it is traced; "
            "its forward depends on more than the input."
        )


def _replace_nodes(model: nn.Module, graph: fx.Graph, example: Tensor) -> nn.Module:
    modules = dict(model.named_modules())
    traced = fx.GraphModule(model, graph, class_name=type(model).__name__)
    taken = set(modules)
    sites: list[tuple[fx.Node, str]] = []
    for node in list(graph.nodes):
        path = None
        if node.op == "call_module" and type(modules[node.target]) is nn.ReLU:
            path = node.target
            # The first call of a module takes its name over; the next ones are numbered.
            if any(path == name for _, name in sites):
                path = _free_name(f"{path}_", taken)
        elif (node.op == "call_function" and node.target in _RELU_FUNCTIONS) or (
            node.op == "call_method" and node.target in _RELU_METHODS
        ):
            scope = next(reversed(node.meta.get("nn_module_stack", {"": None})), "")
            path = _free_name(f"{scope}.relu" if scope else "relu", taken)
        elif node.op == "call_function" and node.target is F.dropout:
            _dropout_to_module(traced, node, taken)
        elif node.op == "call_function" and node.target is F.batch_norm:
            raise FairlineError(
                f"{type(model).__name__} calls F.batch_norm, whose training flag tracing would freeze; "
                "use nn.BatchNorm2d."
            )
        if path is not None:
            taken.add(path)
            sites.append((node, path))
    shapes = _Shapes(traced, {node for node, _ in sites})
    with torch.no_grad():
        was_training = traced.training
        traced.eval()
        shapes.run(example)
        traced.train(was_training)
    for node, path in sites:
        shape = shapes.found.get(node)
        if shape is None or shape[0] != len(example):
            raise FairlineError(f"The activation of ReLU '{path}' has no batch axis in front: {shape}.")
        traced.add_submodule(path, MaskedReLU(shape[1:]).to(example.device))
        source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
        with graph.inserting_after(node):
            new = graph.call_module(path, (source,))
        if _in_place(node, modules):
            # Whoever reads the input after an in-place ReLU reads its output.
            order = {each: place for place, each in enumerate(graph.nodes)}
            later = {user for user in source.users if order[user] > order[new]}
            source.replace_all_uses_with(new, later.__contains__)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    traced.graph = graph
    graph.lint()
    traced.recompile()
    return traced


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.target in (F.relu_, torch.relu_, "relu_"):
        return True
    return bool(node.kwargs.get("inplace") or (node.target is F.relu and len(node.args) > 1 and node.args[1]))


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of some nodes' outputs."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.found[n] = tuple(result.shape)
        return result


def _free_name(stem: str, taken: set[str]) -> str:
    if stem not in taken and not stem.endswith("_"):
        return stem
    number = 1
    while f"{stem}{number}" in taken:
        number += 1
    return f"{stem}{number}"


def _dropout_to_module(traced: fx.GraphModule, node: fx.Node, taken: set[str]) -> None:
    """F.dropout(training=self.training) is a constant once traced; a module follows train() and eval()."""
    probability = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    path = _free_name("dropout_", taken)
    taken.add(path)
    traced.add_submodule(path, nn.Dropout(cast(float, probability)))
    with traced.graph.inserting_after(node):
        new = traced.graph.call_module(path, (node.args[0] if node.args else node.kwargs["input"],))
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)


def _replace_modules(model: nn.Module, example: Tensor, reason: str) -> nn.Module:
    """For a model that cannot be traced: swap nn.ReLU modules that are called once each."""
    calls: dict[str, list[tuple[int, ...]]] = {
        name: [] for name, module in model.named_modules(remove_duplicate=False) if type(module) is nn.ReLU
    }
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: calls[name].append(tuple(output.shape))
        )
        for name in calls
    ]
    was_training = model.training
    model.eval()
    functional: list[str] = []
    try:
        with torch.no_grad(), _WatchReLU(functional):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    model.train(was_training)
    in_modules = sum(len(shapes) for shapes in calls.values())
    repeated = [name for name, shapes in calls.items() if len(shapes) > 1]
    if repeated or len(functional) != in_modules:
        what = f"calls '{repeated[0]}' more than once" if repeated else "calls relu outside of nn.ReLU modules"
        raise FairlineError(f"{type(model).__name__} cannot be traced ({reason}) and {what}.")
    for name, shapes in calls.items():
        if not shapes:
            continue
        model.set_submodule(name, MaskedReLU(shapes[0][1:]).to(example.device))
    return model


class _WatchReLU(torch.overrides.TorchFunctionMode):
    """Notes every outermost call of a ReLU."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("relu", "relu_"):
            self.seen.append(name)
            with torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
