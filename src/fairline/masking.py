"""The one place that knows how a ReLU is switched off.

A masked ReLU is ``f(x) = m·relu(x) + (1 − m)·g(x)`` with one mask entry a unit: m = 1 keeps the ReLU, m = 0 puts its
surrogate g in its place, and m between the two (Cho et al. 2022) is what mask learning moves through. The surrogate is
the identity, with which ``f(x) = x − m·min(x, 0)``, or a quadratic polynomial for each channel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fairline._io import load_tensors, save_tensors
from fairline.errors import FairlineError

Granularity = Literal["pixel", "channel", "layer"]
GRANULARITIES: tuple[Granularity, ...] = ("pixel", "channel", "layer")
Surrogate = Literal["identity", "quadratic"]
SURROGATES: tuple[Surrogate, ...] = ("identity", "quadratic")

#: Factor of x² in a quadratic surrogate, as AutoReP's published code has it. Without it a deep network of fitted
#: polynomials overflows: each layer squares what the last one let through.
SQUARE_SCALE = 0.2


class _FixedMaskedReLU(Function):
    """max(x, floor) with floor 0 where the ReLU is kept and −∞ where it is not; saves its output alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, floor: Tensor) -> Tensor:
        return torch.maximum(x, floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])
        ctx.save_for_forward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, floor = ctx.saved_tensors
        # As torch's ReLU, the slope at 0 is 0.
        return grad.masked_fill(y <= floor, 0), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        y, floor = ctx.saved_tensors
        return tangent.masked_fill(y <= floor, 0)


class _LearnedMaskedReLU(Function):
    """x − m·min(x, 0) with gradients for x and m; saves min(x, 0) alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        negative = x.clamp_max(0)
        ctx.save_for_backward(negative, mask)
        return torch.addcmul(x, mask.to(x.dtype), negative, value=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        negative, mask = ctx.saved_tensors
        # The gradient where x ≥ 0, and a step of m from the identity's towards it: two vectorised passes.
        kept = torch.ops.aten.threshold_backward(grad, negative, -torch.finfo(grad.dtype).tiny)
        grad_x = torch.lerp(grad, kept, mask.to(grad.dtype))
        grad_mask = (grad * negative).sum(0, dtype=mask.dtype).neg_()
        return grad_x, grad_mask


class _LearnedQuadratic(Function):
    """m·relu(x) + (1 − m)·(c₀ + c₁x + 0.2·c₂x²) with gradients for x, m and c; saves x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, coefficients: Tensor) -> Tensor:
        mask, coefficients = mask.to(x.dtype), coefficients.to(x.dtype)
        ctx.save_for_backward(x, mask, coefficients)
        constant, linear, square = coefficients
        g = torch.addcmul(linear, x, square, value=SQUARE_SCALE).mul_(x).add_(constant)
        return g.lerp_(x.clamp_min(0), mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, mask, coefficients = ctx.saved_tensors
        constant, linear, square = coefficients[0], coefficients[1], SQUARE_SCALE * coefficients[2]
        # Sums over the batch come first: all that follows is as small as the mask.
        passed = torch.ops.aten.threshold_backward(grad, x, 0)
        times_x = grad * x
        sums = [grad.sum(0), times_x.sum(0)]
        replaced = 1 - mask
        grad_x = (replaced * linear) * grad
        grad_x.addcmul_(times_x, 2 * replaced * square).addcmul_(passed, mask)
        sums.append(SQUARE_SCALE * times_x.mul_(x).sum(0))
        grad_mask = passed.mul_(x).sum(0) - (constant * sums[0] + linear * sums[1] + coefficients[2] * sums[2])
        axes = tuple(range(1, mask.ndim))
        pieces = [replaced * total for total in sums]
        grad_coefficients = torch.stack([p.sum(axes, keepdim=True) if axes else p for p in pieces])
        return grad_x, grad_mask, grad_coefficients


class MaskedReLU(nn.Module):
    """A ReLU with one mask entry for each unit of its activation.

    Fixed masks (:meth:`set_mask`) hold 0 or 1 and cost what a plain ReLU costs. Learned masks (:meth:`learn`)
    are real numbers with a gradient, one a unit, a channel or a layer.

    Attributes:
        shape: Shape of the activation without the batch axis.
        kept: bool, ``shape``: which ReLUs a fixed mask keeps.
        weight: The learned mask, compact (``shape``, (C, 1, …) or (1, …)); None while the mask is fixed.
        gate: Turns ``weight`` into the mask, where the two are not the same; of the weight's shape.
        coefficients: Of the quadratic surrogate ``c₀ + c₁x + 0.2·c₂x²``, (3, C, 1, …), trained with the other weights;
            None where the surrogate is the identity.
    """

    kept: Tensor
    _floor: Tensor
    weight: nn.Parameter | None
    gate: nn.Module | None
    coefficients: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("kept", torch.ones(self.shape, dtype=torch.bool))
        self.register_buffer("_floor", torch.zeros(self.shape), persistent=False)
        self.register_parameter("weight", None)
        self.register_module("gate", None)
        self.register_parameter("coefficients", None)
        self._num_kept = math.prod(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the masked ReLU to x, (B, *shape)."""
        if x.shape[1:] != self.shape:
            raise FairlineError(
                f"A mask made for activations of shape {self.shape} met one of shape {tuple(x.shape[1:])}; "
                "mask the model again with an example of the new input size."
            )
        if self.weight is not None:
            if self.coefficients is None:
                return cast(Tensor, _LearnedMaskedReLU.apply(x, self.mask))
            return cast(Tensor, _LearnedQuadratic.apply(x, self.mask, self.coefficients))
        if self._num_kept == 0:
            return self.substitute(x)
        if self._num_kept == self.kept.numel():
            return F.relu(x)
        if self.coefficients is None:
            return cast(Tensor, _FixedMaskedReLU.apply(x, self._floor.to(x.dtype)))
        return torch.where(self.kept, F.relu(x), self.substitute(x))

    def substitute(self, x: Tensor) -> Tensor:
        """The surrogate g(x) of every unit, kept or not; x is (B, *shape)."""
        if self.coefficients is None:
            return x
        constant, linear, square = self.coefficients.to(x.dtype)
        return (SQUARE_SCALE * square * x + linear) * x + constant

    @property
    def surrogate(self) -> Surrogate:
        """What stands in a ReLU's place: ``"identity"`` or ``"quadratic"``."""
        return "identity" if self.coefficients is None else "quadratic"

    def use_surrogate(self, surrogate: Surrogate) -> None:
        """Choose what stands in a ReLU's place; a new quadratic starts as the identity.

        Args:
            surrogate: ``"identity"`` or ``"quadratic"``.

        Raises:
            FairlineError: There is no such surrogate.
        """
        if surrogate not in SURROGATES:
            raise FairlineError(f"A surrogate is {' or '.join(SURROGATES)}, not '{surrogate}'.")
        if surrogate == "identity":
            self.coefficients = None
        elif self.coefficients is None:
            start = torch.zeros(3, self.shape[0], *[1] * (len(self.shape) - 1), device=self.kept.device)
            start[1] = 1
            self.coefficients = nn.Parameter(start)

    @property
    def mask(self) -> Tensor:
        """The mask, float, with the shape of the activation; a view of ``compact_mask`` while it is learned."""
        return self.kept.float() if self.weight is None else self.compact_mask.expand(self.shape)

    @property
    def compact_mask(self) -> Tensor:
        """The learned mask, of the shape of ``weight``: the weight itself, or what the gate makes of it."""
        weight = cast(Tensor, self.weight)
        return weight if self.gate is None else cast(Tensor, self.gate(weight))

    @property
    def num_kept(self) -> int:
        """How many ReLUs a fixed mask keeps for each sample."""
        return self._num_kept

    def set_mask(self, kept: Tensor) -> None:
        """Fix the mask.

        Args:
            kept: bool, broadcastable to ``shape``.
        """
        self.weight = self.gate = None
        self.kept = kept.to(device=self.kept.device, dtype=torch.bool).expand(self.shape).contiguous()
        self._refresh()

    def learn(self, granularity: Granularity = "pixel") -> nn.Parameter:
        """Make the mask learnable, starting from the fixed one.

        Args:
            granularity: One entry a ``"pixel"`` (unit), ``"channel"`` or ``"layer"``.

        Returns:
            The parameter to optimise. An entry that covers several units starts at their mean.
        """
        start = self.kept.float()
        shared = {"pixel": 0, "channel": 1, "layer": None}[granularity]
        if shared != 0:
            axes = tuple(range(shared or 0, len(self.shape)))
            start = start.mean(axes, keepdim=True) if axes else start
        self.weight = nn.Parameter(start.clone())
        return self.weight

    def _refresh(self) -> None:
        self._num_kept = int(self.kept.sum())
        self._floor = torch.where(self.kept, 0.0, -math.inf)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._refresh()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        text = f"shape={self.shape}, " + ("learned" if self.weight is not None else f"kept={self._num_kept}")
        return text if self.coefficients is None else f"{text}, surrogate={self.surrogate}"


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


def masked_relus(model: nn.Module) -> dict[str, MaskedReLU]:
    """The masked ReLUs of a model by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedReLU)}


def surrogate_of(model: nn.Module) -> Surrogate:
    """What stands in the place of a model's ReLUs: quadratic where any layer has coefficients."""
    kinds = {layer.surrogate for layer in masked_relus(model).values()}
    return "quadratic" if "quadratic" in kinds else "identity"


def relu_count(model: nn.Module, example: Tensor | None = None) -> int:
    """How many ReLUs are evaluated for each sample.

    Args:
        model: Masked, or any model if an example is given.
        example: Input (B, …); needed for a model without masks.

    Returns:
        The number of kept ReLUs; all of them for a model without masks.

    Raises:
        FairlineError: The model has no masks and no example is given.
    """
    layers = masked_relus(model)
    if not layers:
        if example is None:
            raise FairlineError(f"{type(model).__name__} has no masks; counting its ReLUs needs an example input.")
        layers = masked_relus(mask_relus(model, example))
    return sum(layer.num_kept for layer in layers.values())


def layer_table(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name, kept ReLUs and all ReLUs of each masked layer."""
    for name, layer in masked_relus(model).items():
        yield name, layer.num_kept, layer.kept.numel()


def keep_largest(model: nn.Module, budget: int, ranks: Mapping[str, Tensor] | None = None) -> int:
    """Fix learned masks so that the ``budget`` largest entries are 1 and all others 0.

    Entries that cover several units (channel- and layer-wise masks) are taken from the largest on, as long as
    they fit into the budget.

    Args:
        model: With learned masks.
        budget: ReLUs to keep for each sample.
        ranks: What to compare in place of the masks, for each layer a tensor of its learned mask's shape.

    Returns:
        ReLUs kept: exactly ``budget`` for pixel-wise masks, else the most that fits.
    """
    named = {name: layer for name, layer in masked_relus(model).items() if layer.weight is not None}
    layers = list(named.values())
    compared = {name: cast(Tensor, layer.weight).detach() for name, layer in named.items()} if ranks is None else ranks
    values = torch.cat([compared[name].flatten() for name in named])
    sizes = [layer.kept.numel() // cast(Tensor, layer.weight).numel() for layer in layers]
    units = torch.cat([torch.full((cast(Tensor, w.weight).numel(),), s) for w, s in zip(layers, sizes, strict=True)])
    # Stable, so that ties fall the same way on every device.
    order = torch.sort(values.cpu(), descending=True, stable=True).indices
    chosen = torch.zeros(len(values), dtype=torch.bool)
    if max(sizes) == 1:
        chosen[order[:budget]] = True
    else:
        left = budget
        for entry, size in zip(order.tolist(), units[order].tolist(), strict=True):
            if size <= left:
                chosen[entry] = True
                left -= size
    _fix(layers, chosen)
    return relu_count(model)


def _fix(layers: list[MaskedReLU], chosen: Tensor) -> None:
    start = 0
    for layer in layers:
        weight = cast(Tensor, layer.weight)
        layer.set_mask(chosen[start : start + weight.numel()].view(weight.shape))
        start += weight.numel()


@dataclass(frozen=True)
class MaskInfo:
    """What a mask file says of itself."""

    method: str
    budget: int
    seed: int | None
    layers: dict[str, list[int]]
    surrogate: str = "identity"


def save_masks(path: str | Path, model: nn.Module, *, method: str, budget: int, seed: int | None) -> None:
    """Write fixed masks to a safetensors file; the coefficients of a quadratic surrogate are weights, and not in it.

    Args:
        path: The file.
        model: With fixed masks.
        method: What chose them.
        budget: The ReLU count asked for.
        seed: Of the run.

    Raises:
        FairlineError: The model has no masks, or they are still being learned.
    """
    layers = masked_relus(model)
    if not layers or any(layer.weight is not None for layer in layers.values()):
        raise FairlineError(f"{type(model).__name__} has no fixed masks to save.")
    shapes = {name: list(layer.shape) for name, layer in layers.items()}
    info = MaskInfo(method, budget, seed, shapes, surrogate_of(model))
    save_tensors(path, {name: layer.kept for name, layer in layers.items()}, asdict(info))


def load_masks(path: str | Path, model: nn.Module) -> MaskInfo:
    """Set a masked model's masks from a file.

    Args:
        path: Written by :func:`save_masks`.
        model: Returned by :func:`mask_relus`; changed in place.

    Returns:
        What the file says of itself.

    Raises:
        FairlineError: The file is broken, or belongs to another model.
    """
    tensors, metadata = load_tensors(path)
    if not isinstance(metadata, dict) or not {"method", "budget", "seed", "layers"} <= metadata.keys():
        raise FairlineError(f"{path} is not a mask file.")
    layers = masked_relus(model)
    unknown = sorted(tensors.keys() - layers.keys()) or sorted(layers.keys() - tensors.keys())
    if unknown:
        where = "the model" if unknown[0] in tensors else "the file"
        raise FairlineError(
            f"{path} belongs to another model: layer '{unknown[0]}' is not in {where} "
            f"({len(tensors)} masks in the file, {len(layers)} in the model)."
        )
    for name, layer in layers.items():
        if tuple(tensors[name].shape) != layer.shape:
            raise FairlineError(
                f"{path} belongs to another model: mask '{name}' has shape {tuple(tensors[name].shape)}, "
                f"the model's activation {layer.shape}."
            )
    surrogate = metadata.get("surrogate", "identity")
    if surrogate != surrogate_of(model):
        raise FairlineError(
            f"{path} was made for {surrogate} surrogates, but the model's are {surrogate_of(model)}; "
            f"mask it with surrogate='{surrogate}'."
        )
    for name, layer in layers.items():
        layer.set_mask(tensors[name])
    return MaskInfo(metadata["method"], metadata["budget"], metadata["seed"], metadata["layers"], surrogate)
