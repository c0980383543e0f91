"""From a linearized network to a plain graph: ``torch.export``, batch norm folded, masks constant."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fairline.errors import FairlineError
from fairline.inference import logits_of
from fairline.masking import MaskedReLU, copy_model, masked_relus
from fairline.masking.published import take_over_published
from fairline.masking.sharing import Sharing, shared_relu
from fairline.masking.surrogates import evaluate
from fairline.private.graph import Node, PlainGraph
from fairline.private.network import GraphNetwork


@torch.library.custom_op("fairline::masked_relu", mutates_args=())
def _masked_relu(x: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, x.clamp_min(0), x)


# Nodes have the names of these operators, and a graph's digest its nodes' names: quadratics keep theirs.
@torch.library.custom_op("fairline::quadratic", mutates_args=())
def _quadratic(x: Tensor, kept: Tensor, coefficients: Tensor) -> Tensor:
    return torch.where(kept, x.clamp_min(0), evaluate(coefficients, x))


@torch.library.custom_op("fairline::polynomial", mutates_args=())
def _polynomial(x: Tensor, kept: Tensor, coefficients: Tensor, degrees: Tensor) -> Tensor:
    return torch.where(kept, x.clamp_min(0), evaluate(coefficients, x))


@torch.library.custom_op("fairline::shared_relu", mutates_args=())
def _shared_relu(x: Tensor, signs: Tensor) -> Tensor:
    return shared_relu(x, Sharing.of(signs))


@_masked_relu.register_fake
def _(x: Tensor, kept: Tensor) -> Tensor:
    return torch.empty_like(x)


@_quadratic.register_fake
def _(x: Tensor, kept: Tensor, coefficients: Tensor) -> Tensor:
    return torch.empty_like(x)


@_polynomial.register_fake
def _(x: Tensor, kept: Tensor, coefficients: Tensor, degrees: Tensor) -> Tensor:
    return torch.empty_like(x)


@_shared_relu.register_fake
def _(x: Tensor, signs: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Leaf(nn.Module):
    """Stands for a masked ReLU while the network is traced, so that it comes out as one node."""

    def __init__(self, layer: MaskedReLU) -> None:
        super().__init__()
        self.surrogate = layer.surrogate
        # Where all ReLUs are kept, no polynomial is left.
        coefficients = None if bool(layer.kept.all()) else layer.polynomial
        if self.surrogate == "identity":
            coefficients = None
        elif self.surrogate == "quadratic" and coefficients is not None:
            coefficients = coefficients[:3]
        self.register_buffer("kept", layer.kept.clone())
        self.register_buffer("coefficients", None if coefficients is None else coefficients.detach().clone())
        self.register_buffer("degrees", layer.channel_degrees.clone())
        # Where no ReLU is kept, no sign is left.
        self.register_buffer("signs", layer.effective_signs if layer.num_kept else None)

    def forward(self, x: Tensor) -> Tensor:
        signs = cast(Tensor | None, self.signs)
        if signs is not None:
            return cast(Tensor, torch.ops.fairline.shared_relu(x, signs))
        kept = cast(Tensor, self.kept)
        coefficients = cast(Tensor | None, self.coefficients)
        if coefficients is not None:
            if self.surrogate == "quadratic":
                return cast(Tensor, torch.ops.fairline.quadratic(x, kept, coefficients))
            return cast(Tensor, torch.ops.fairline.polynomial(x, kept, coefficients, self.degrees))
        return cast(Tensor, torch.ops.fairline.masked_relu(x, kept))


def to_graph(model: nn.Module, example: Tensor, dtype: torch.dtype = torch.float32) -> PlainGraph:
    """The plain graph of a network.

    Batch norm after a convolution or linear layer is folded into it, elsewhere it becomes a scale and a shift.
    A layer that keeps no ReLU leaves no node. A network that is a plain graph, such as a compiled one, says it itself.

    Args:
        model: Maps (B, C, H, W) to logits (B, K); masked by :func:`fairline.mask_relus` or not. Not changed.
        example: An input of the right shape, (B, C, H, W).
        dtype: Of the weights; engines of private inference read float32.

    Returns:
        The graph. Its logits equal the model's to 1e-5 of the largest (1e-10 in float64), which is checked here.

    Raises:
        FairlineError: The network cannot be traced, uses an operator that private inference does not know, or learns
            its masks still.
    """
    if example.ndim not in (2, 4):
        raise FairlineError(
            f"An example input is a batch, (B, C, H, W), not one of shape {tuple(example.shape)}; example[None] makes "
            "one of a single image."
        )
    if isinstance(model, GraphNetwork):
        return model.graph(example.shape[1:], dtype)
    # A sum of votes next to zero may turn with any rounding, so networks with shared signs are compared in float64.
    shares = any(layer.signs is not None for layer in masked_relus(model).values())
    working = torch.float64 if shares else dtype
    model = copy_model(model).cpu().to(working).eval()
    model.register_forward_hook(lambda module, inputs, output: logits_of(output, module, inputs[0]))
    for name, layer in masked_relus(model).items():
        if layer.weight is not None:
            raise FairlineError(f"The masks of '{name}' are still being learned; fix them before the export.")
    # Two different samples: export takes a batch of one for a constant.
    batch = torch.randn((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=working)
    with torch.no_grad():
        # A copy: a network may normalise its input in place.
        expected = _run(model, batch.clone())
        take_over_published(model, batch.clone())
        for name, layer in masked_relus(model).items():
            model.set_submodule(name, _Leaf(layer))
        program = _export(model, batch.clone())
        graph = _Reader(program, tuple(batch.shape[1:]), working).read()
        found = graph(batch)
    error_size = float((found - expected).abs().max() / expected.abs().max().clamp_min(1))
    if not error_size < (1e-10 if working == torch.float64 else 1e-5):
        raise FairlineError(f"The exported {type(model).__name__} computes something else (by {error_size:.1e}).")
    graph.weights = {name: value.to(dtype) for name, value in graph.weights.items()}
    return graph


def _run(model: nn.Module, batch: Tensor) -> Tensor:
    try:
        output: Tensor = model(batch)
    except FairlineError:
        raise
    except Exception as error:
        # The user's own forward may do anything.
        raise FairlineError(
            f"{type(model).__name__} fails on images of shape {tuple(batch.shape[1:])} ({_reason(error)})."
        ) from None
    return output


def _export(model: nn.Module, batch: Tensor) -> torch.export.ExportedProgram:
    sizes = ({0: torch.export.Dim("batch")},)
    try:
        with warnings.catch_warnings():
            # Of attributes that a forward sets; what was exported is compared with the network anyway.
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (batch,), dynamic_shapes=sizes, strict=False)
    except Exception as error:
        raise FairlineError(f"{type(model).__name__} cannot be exported ({_reason(error)}).") from None
    _inline_grad_modes(program.graph_module)
    return program


def _inline_grad_modes(module: fx.GraphModule) -> None:
    """Put what stood in a block of ``enable_grad`` or ``set_grad_enabled`` back among the other nodes."""
    graph = module.graph
    for node in graph.nodes:
        if _operator_name(node) != "wrap_with_set_grad_enabled":
            continue
        _, block, *inputs = node.args
        body = cast(fx.GraphModule, module.get_submodule(str(cast(fx.Node, block).target)))
        _inline_grad_modes(body)
        placeholders = body.graph.find_nodes(op="placeholder")
        with graph.inserting_before(node):
            outputs = graph.graph_copy(body.graph, dict(zip(placeholders, inputs, strict=True)))
        for taken in list(node.users):
            taken.replace_all_uses_with(cast(Any, outputs)[taken.args[1]])
            graph.erase_node(taken)
        graph.erase_node(node)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class _Reader:
    """Turns an exported program into nodes."""

    def __init__(self, program: torch.export.ExportedProgram, input_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.graph = PlainGraph(input_shape, [], {}, {}, {})
        self.program = program
        self.dtype = dtype
        signature = program.graph_signature
        state = {**program.state_dict, **program.constants}
        targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        #: What does not depend on the image: weights, and whatever is computed from them alone.
        self.constants: dict[str, Any] = {name: state[target].detach() for name, target in targets.items()}
        #: What each traced value is called in the plain graph.
        self.names: dict[fx.Node, str] = {}
        #: Traced values that one node of the graph gives, and that no other traced value shares with them.
        self.sole: set[fx.Node] = set()

    def read(self) -> PlainGraph:
        output: fx.Node | None = None
        # What the network returns beside its logits is computed for nobody.
        self.program.graph.eliminate_dead_code()
        for traced in self.program.graph.nodes:
            if traced.op == "placeholder":
                if traced.name not in self.constants:
                    self.names[traced] = "x"
            elif traced.op == "output":
                output = traced.args[0][0]
            elif traced.op == "call_function":
                handler = _HANDLERS.get(traced.target)
                if all(source.name in self.constants for source in traced.all_input_nodes):
                    self._compute(traced)
                elif handler is not None:
                    handler(self, traced)
                elif not _gives_no_tensor(traced):
                    raise FairlineError(
                        f"Private inference has no operator '{_operator_name(traced)}' (layer '{_layer_of(traced)}'); "
                        f"known are {', '.join(sorted({_operator_name(t) for t in _HANDLERS}))}."
                    )
        if output is None or output not in self.names or not self.graph.nodes:
            raise FairlineError("The network's output is not one tensor computed from its input.")
        last = self.names[output]
        if len(_sample_shape(output)) != 1:
            raise FairlineError(f"The network's output has shape {_sample_shape(output)} a sample, not (classes,).")
        self._drop_dead(last)
        return self.graph

    def _compute(self, traced: fx.Node) -> None:
        """A constant from constants: normalised weights, for one."""
        arguments, options = fx.map_arg((traced.args, traced.kwargs), lambda node: self.constants[node.name])
        self.constants[traced.name] = traced.target(*arguments, **options)  # type: ignore[operator]

    def _drop_dead(self, last: str) -> None:
        needed = {last}
        for node in reversed(self.graph.nodes):
            if node.name in needed:
                needed.update(node.inputs)
        nodes = [node for node in self.graph.nodes if node.name in needed]
        used = {name for node in nodes for name in node.weights}
        self.graph.weights = {name: value for name, value in self.graph.weights.items() if name in used}
        self.graph.shapes = {name: tuple(value.shape) for name, value in self.graph.weights.items()}
        # The output comes last, whatever the order of dead branches was.
        self.graph.nodes = [n for n in nodes if n.name != last] + [n for n in nodes if n.name == last]

    def tensor(self, argument: Any) -> Tensor | None:
        """The constant tensor that an argument is or stands for."""
        if isinstance(argument, int | float):
            return torch.tensor(float(argument), dtype=torch.float64)
        value = self.constants.get(argument.name) if isinstance(argument, fx.Node) else None
        return value if isinstance(value, Tensor) else None

    def name_of(self, traced: fx.Node, argument: Any) -> str:
        if isinstance(argument, fx.Node) and argument in self.names:
            return self.names[argument]
        raise FairlineError(
            f"Operator '{_operator_name(traced)}' of layer '{_layer_of(traced)}' has an input that does not come from "
            "the image; private inference needs constants there as weights of a layer."
        )

    def emit(
        self,
        op: str,
        traced: fx.Node,
        inputs: tuple[Any, ...],
        weights: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> None:
        layer = _layer_of(traced)
        names = []
        for key, value in (weights or {}).items():
            name = f"{traced.name}.{key}"
            self.graph.weights[name] = value.detach().to(self.dtype).contiguous()
            names.append(name)
        if mask is not None:
            self.graph.masks[traced.name] = mask
        sources = tuple(self.name_of(traced, each) for each in inputs)
        self.graph.nodes.append(
            Node(
                op,
                traced.name,
                layer,
                sources,
                _sample_shape(traced),
                tuple(names),
                traced.name if mask is not None else None,
                options,
            )
        )
        self.names[traced] = traced.name
        self.sole.add(traced)

    def same(self, traced: fx.Node, source: Any) -> None:
        """The operator changes nothing."""
        self.names[traced] = self.name_of(traced, source)


def _gives_no_tensor(traced: fx.Node) -> bool:
    value = traced.meta.get("val")
    return not any(isinstance(each, Tensor) for each in (value if isinstance(value, list | tuple) else [value]))


def _operator_name(traced: Any) -> str:
    target = traced.target if isinstance(traced, fx.Node) else traced
    return str(getattr(target, "_opname", None) or getattr(target, "__name__", target))


def _layer_of(traced: fx.Node) -> str:
    stack = list(traced.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) or "the network itself" if stack else "the network itself"


def _sample_shape(traced: fx.Node) -> tuple[int, ...]:
    shape = traced.meta["val"].shape
    return tuple(int(size) for size in shape[1:])


def _argument(traced: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by place or keyword."""
    return traced.args[place] if len(traced.args) > place else traced.kwargs.get(name, default)


def _pair(value: Any) -> list[int]:
    pair = [int(value)] * 2 if isinstance(value, int) else [int(v) for v in value]
    return pair * 2 if len(pair) == 1 else pair


def _refuse(traced: fx.Node, what: str) -> FairlineError:
    return FairlineError(
        f"Private inference has no '{_operator_name(traced)}' with {what} (layer '{_layer_of(traced)}')."
    )


def _read_conv2d(reader: _Reader, traced: fx.Node) -> None:
    weight, bias = reader.tensor(traced.args[1]), reader.tensor(_argument(traced, 2, "bias"))
    if weight is None:
        raise _refuse(traced, "weights that are computed")
    padding = _argument(traced, 4, "padding", 0)
    dilation = _pair(_argument(traced, 5, "dilation", 1))
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if padding == "same" and any(span % 2 for span in spans):
            raise _refuse(traced, "padding that is not the same on both sides")
        padding = [span // 2 for span in spans] if padding == "same" else 0
    reader.emit(
        "conv2d",
        traced,
        (traced.args[0],),
        {"weight": weight, "bias": bias if bias is not None else torch.zeros(len(weight))},
        stride=_pair(_argument(traced, 3, "stride", 1)),
        padding=_pair(padding),
        dilation=dilation,
        groups=int(_argument(traced, 6, "groups", 1)),
    )


def _read_linear(reader: _Reader, traced: fx.Node) -> None:
    weight, bias = reader.tensor(traced.args[1]), reader.tensor(_argument(traced, 2, "bias"))
    if weight is None:
        raise _refuse(traced, "weights that are computed")
    if len(_sample_shape(traced)) != 1:
        raise _refuse(traced, "an input that is not flat")
    reader.emit(
        "linear",
        traced,
        (traced.args[0],),
        {"weight": weight, "bias": bias if bias is not None else torch.zeros(len(weight))},
    )


def _read_batch_norm(reader: _Reader, traced: fx.Node) -> None:
    weight, bias, mean, variance = (reader.tensor(each) for each in traced.args[1:5])
    if mean is None or variance is None:
        raise _refuse(traced, "statistics of the batch")
    epsilon = float(cast(float, _argument(traced, 7, "eps", 1e-5)))
    # In double precision: the folded weights should err by one rounding.
    scale = (variance.double() + epsilon).rsqrt() * (1 if weight is None else weight.double())
    shift = (0 if bias is None else bias.double()) - mean.double() * scale
    axes = [-1] + [1] * (len(_sample_shape(traced)) - 1)
    _scale_and_shift(reader, traced, traced.args[0], scale.view(axes), shift.view(axes))


def _scale_and_shift(reader: _Reader, traced: fx.Node, source: Any, scale: Tensor, shift: Tensor) -> None:
    """``source·scale + shift``, both broadcast to a sample's shape; folded into the layer before where it can be."""
    shape = _sample_shape(traced)
    channels = torch.Size([shape[0]] + [1] * (len(shape) - 1))
    node = next((node for node in reader.graph.nodes if node.name == reader.names.get(source)), None)
    alone = node is not None and node.op in ("conv2d", "linear") and source in reader.sole and len(source.users) == 1
    if node is not None and alone and torch.broadcast_shapes(scale.shape, shift.shape, channels) == channels:
        weights = reader.graph.weights
        kernel, offset = (weights[name].double() for name in node.weights)
        scale, shift = (each.double().expand(channels).flatten() for each in (scale, shift))
        weights[node.weights[0]] = (kernel * scale.view(-1, *[1] * (kernel.ndim - 1))).to(reader.dtype)
        weights[node.weights[1]] = (offset * scale + shift).to(reader.dtype)
        reader.names[traced] = node.name
        reader.sole.add(traced)
        return
    scale, shift = torch.broadcast_tensors(scale, shift)
    reader.emit("affine", traced, (source,), {"scale": scale, "shift": shift})


def _constant(reader: _Reader, traced: fx.Node, argument: Any) -> Tensor | None:
    """A constant operand, double, of the shape of a sample or broadcast to it; None for what comes from the image."""
    value = reader.tensor(argument)
    if value is None:
        return None
    shape = _sample_shape(traced)
    if value.ndim == len(shape) + 1 and len(value) == 1:
        value = value[0]
    if value.ndim > len(shape) or torch.broadcast_shapes(value.shape, shape) != shape:
        raise _refuse(traced, f"a constant of shape {tuple(value.shape)}")
    return value.double()


def _read_add(reader: _Reader, traced: fx.Node) -> None:
    left, right = traced.args[:2]
    if traced.target in _REVERSED:
        left, right = right, left
    # Beside a number it stands in a place of its own.
    alpha = float(cast(float, traced.kwargs.get("alpha", traced.args[2] if len(traced.args) > 2 else 1)))
    if traced.target in _SUBTRACTIONS:
        alpha = -alpha
    before, after = (_constant(reader, traced, each) for each in (left, right))
    for each in (left, right):
        if isinstance(each, fx.Node) and each in reader.names and _sample_shape(each) != _sample_shape(traced):
            raise _refuse(traced, "inputs of different shapes")
    if before is not None:
        _scale_and_shift(reader, traced, right, torch.tensor(alpha, dtype=torch.float64).expand_as(before), before)
    elif after is not None:
        _scale_and_shift(reader, traced, left, torch.ones_like(after), alpha * after)
    else:
        reader.emit("add", traced, (left, right), alpha=alpha)


def _read_scale(reader: _Reader, traced: fx.Node) -> None:
    left, right = traced.args[:2]
    divides = traced.target in _DIVISIONS
    if reader.tensor(left) is not None and not divides:
        left, right = right, left
    factor = _constant(reader, traced, right)
    if factor is None or reader.tensor(left) is not None:
        raise _refuse(traced, "a factor that comes from the image")
    if _sample_shape(cast(fx.Node, left)) != _sample_shape(traced):
        raise _refuse(traced, "inputs of different shapes")
    factor = 1 / factor if divides else factor
    if isinstance(right, int | float):
        reader.emit("scale", traced, (left,), factor=float(factor))
    else:
        _scale_and_shift(reader, traced, left, factor, torch.zeros_like(factor))


def _read_scale_and_shift(reader: _Reader, traced: fx.Node) -> None:
    """``a + value·b·c`` or ``a + value·b/c``, of which one is computed from the image."""
    value = float(cast(float, traced.kwargs.get("value", 1)))
    left, right = traced.args[1:3]
    if traced.target in _PRODUCTS and reader.tensor(left) is not None:
        left, right = right, left
    base, source, factor = (_constant(reader, traced, each) for each in (traced.args[0], left, right))
    if factor is None or (base is None) == (source is None):
        raise _refuse(traced, "inputs of which not just one comes from the image")
    factor = value * (factor if traced.target in _PRODUCTS else 1 / factor)
    if base is None:
        shift = cast(Tensor, source) * factor
        _scale_and_shift(reader, traced, traced.args[0], torch.ones_like(shift), shift)
        return
    if _sample_shape(cast(fx.Node, left)) != _sample_shape(traced):
        raise _refuse(traced, "inputs of different shapes")
    _scale_and_shift(reader, traced, left, factor, base)


def _read_like(reader: _Reader, traced: fx.Node) -> None:
    """A constant of the shape of what comes from the image."""
    template = torch.empty((1, *_sample_shape(cast(fx.Node, traced.args[0]))), dtype=reader.dtype)
    options = {key: value for key, value in traced.kwargs.items() if key != "memory_format"}
    reader.constants[traced.name] = traced.target(template, *traced.args[1:], **options)  # type: ignore[operator]


def _read_form(reader: _Reader, traced: fx.Node) -> None:
    """Another shape of equal numbers, or another kind of number, as what comes from the image has."""
    value, form = reader.tensor(traced.args[0]), traced.meta["val"]
    if not form.dtype.is_floating_point:
        raise _refuse(traced, f"numbers of kind {form.dtype}")
    if value is not None:
        # Whoever reads it repeats it as often.
        reader.constants[traced.name] = value
    elif _sample_shape(cast(fx.Node, traced.args[0])) == _sample_shape(traced):
        reader.same(traced, traced.args[0])
    else:
        raise _refuse(traced, "inputs of different shapes")


def _read_negative(reader: _Reader, traced: fx.Node) -> None:
    reader.emit("scale", traced, (traced.args[0],), factor=-1.0)


def _read_concat(reader: _Reader, traced: fx.Node) -> None:
    pieces = tuple(cast(list[fx.Node], traced.args[0]))
    axis = int(_argument(traced, 1, "dim", 0))
    axis = axis + len(_sample_shape(traced)) + 1 if axis < 0 else axis
    if axis == 0:
        raise _refuse(traced, "the batch as its axis")
    reader.emit("concat", traced, pieces, axis=axis)


def _read_relu(reader: _Reader, traced: fx.Node) -> None:
    reader.emit("relu", traced, (traced.args[0],))


def _read_masked_relu(reader: _Reader, traced: fx.Node) -> None:
    kept = cast(Tensor, reader.tensor(traced.args[1]))
    if not kept.any():
        reader.same(traced, traced.args[0])
    else:
        reader.emit("relu", traced, (traced.args[0],), mask=None if kept.all() else kept)


def _read_shared_relu(reader: _Reader, traced: fx.Node) -> None:
    reader.emit("shared_relu", traced, (traced.args[0],), mask=cast(Tensor, reader.tensor(traced.args[1])))


def _read_quadratic(reader: _Reader, traced: fx.Node) -> None:
    kept, coefficients = (cast(Tensor, reader.tensor(each)) for each in traced.args[1:3])
    reader.emit("quadratic", traced, (traced.args[0],), {"coefficients": coefficients}, mask=kept)


def _read_polynomial(reader: _Reader, traced: fx.Node) -> None:
    kept, coefficients, chosen = (cast(Tensor, reader.tensor(each)) for each in traced.args[1:4])
    degrees = chosen.tolist()
    # Where nothing bends, coefficients are what the degrees say.
    weights = {"coefficients": coefficients} if max(degrees) > 1 else {}
    reader.emit("polynomial", traced, (traced.args[0],), weights, mask=kept, degrees=degrees)


def _read_pool(op: str) -> Callable[[_Reader, fx.Node], None]:
    def read(reader: _Reader, traced: fx.Node) -> None:
        kernel = _pair(traced.args[1])
        stride = _pair(_argument(traced, 2, "stride") or kernel)
        padding = _pair(_argument(traced, 3, "padding", 0))
        ceil = _argument(traced, 5 if op == "max_pool" else 4, "ceil_mode", False)
        if op == "max_pool":
            odd = _pair(_argument(traced, 4, "dilation", 1)) != [1, 1]
        else:
            odd = (any(padding) and not _argument(traced, 5, "count_include_pad", True)) or (
                _argument(traced, 6, "divisor_override") is not None
            )
        if ceil or odd:
            raise _refuse(traced, "these options")
        reader.emit(op, traced, (traced.args[0],), kernel=kernel, stride=stride, padding=padding)

    return read


def _read_adaptive_avg_pool(reader: _Reader, traced: fx.Node) -> None:
    sizes = _sample_shape(cast(fx.Node, traced.args[0]))[-2:]
    wanted = _sample_shape(traced)[-2:]
    if any(size % out for size, out in zip(sizes, wanted, strict=True)):
        raise _refuse(traced, f"output {wanted} from {sizes}, which does not divide it")
    kernel = [size // out for size, out in zip(sizes, wanted, strict=True)]
    if wanted == (1, 1):
        reader.emit("mean", traced, (traced.args[0],), axes=[2, 3])
    else:
        reader.emit("avg_pool", traced, (traced.args[0],), kernel=kernel, stride=kernel, padding=[0, 0])


def _read_mean(reader: _Reader, traced: fx.Node) -> None:
    rank = len(_sample_shape(cast(fx.Node, traced.args[0]))) + 1
    axes = sorted(int(axis) % rank for axis in cast(list[int], _argument(traced, 1, "dim") or [0]))
    if 0 in axes:
        raise _refuse(traced, "the batch as an axis")
    reader.emit("mean", traced, (traced.args[0],), axes=axes)


def _read_reshape(reader: _Reader, traced: fx.Node) -> None:
    source = cast(fx.Node, traced.args[0])
    before, after = _sample_shape(source), _sample_shape(traced)
    if math.prod(before) != math.prod(after):
        raise _refuse(traced, "the batch axis moved")
    if before == after:
        reader.same(traced, source)
    else:
        reader.emit("reshape", traced, (source,))


def _read_identity(reader: _Reader, traced: fx.Node) -> None:
    reader.same(traced, traced.args[0])


def _read_copy(reader: _Reader, traced: fx.Node) -> None:
    """An in-place ReLU that has been masked: whoever reads its input later reads its output."""
    overwritten, source = cast(tuple[fx.Node, fx.Node], traced.args[:2])
    if _sample_shape(overwritten) != _sample_shape(source):
        raise _refuse(traced, "inputs of different shapes")
    reader.same(traced, source)
    reader.same(overwritten, source)


def _read_dropout(reader: _Reader, traced: fx.Node) -> None:
    if _argument(traced, 2, "train", False):
        raise _refuse(traced, "training=True")
    reader.same(traced, traced.args[0])


_aten = torch.ops.aten
_REVERSED = {_aten.rsub.Scalar, _aten.rsub.Tensor}


def _forms(*names: str) -> set[Any]:
    """Operators of these names on two tensors, or a tensor and a number, in place or not."""
    packets = [getattr(_aten, name + place) for name in names for place in ("", "_")]
    return {getattr(packet, form) for packet in packets for form in ("Tensor", "Scalar") if form in packet.overloads()}


_SUBTRACTIONS = {*_forms("sub", "subtract"), *_REVERSED}
_DIVISIONS = _forms("div", "divide", "true_divide")
_PRODUCTS = {_aten.addcmul.default, _aten.addcmul_.default}

#: The operators of PyTorch that a network may use.
_HANDLERS: dict[Any, Callable[[_Reader, fx.Node], None]] = {
    _aten.conv2d.default: _read_conv2d,
    _aten.conv2d.padding: _read_conv2d,
    _aten.linear.default: _read_linear,
    _aten.batch_norm.default: _read_batch_norm,
    **dict.fromkeys((*_forms("add"), *_SUBTRACTIONS), _read_add),
    **dict.fromkeys((*_forms("mul", "multiply"), *_DIVISIONS), _read_scale),
    **dict.fromkeys((*_PRODUCTS, _aten.addcdiv.default, _aten.addcdiv_.default), _read_scale_and_shift),
    **dict.fromkeys((_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default), _read_like),
    **dict.fromkeys(
        (
            _aten.expand_as.default,
            _aten.expand.default,
            _aten.type_as.default,
            _aten.to.dtype,
            _aten.to.dtype_layout,
            _aten.to.device,
            _aten.to.other,
            _aten._to_copy.default,
        ),
        _read_form,
    ),
    _aten.neg.default: _read_negative,
    _aten.cat.default: _read_concat,
    _aten.relu.default: _read_relu,
    _aten.relu_.default: _read_relu,
    torch.ops.fairline.masked_relu.default: _read_masked_relu,
    torch.ops.fairline.quadratic.default: _read_quadratic,
    torch.ops.fairline.polynomial.default: _read_polynomial,
    torch.ops.fairline.shared_relu.default: _read_shared_relu,
    _aten.avg_pool2d.default: _read_pool("avg_pool"),
    _aten.max_pool2d.default: _read_pool("max_pool"),
    _aten.adaptive_avg_pool2d.default: _read_adaptive_avg_pool,
    _aten.mean.dim: _read_mean,
    **dict.fromkeys(
        (
            _aten.flatten.using_ints,
            _aten.view.default,
            _aten.reshape.default,
            _aten.squeeze.dims,
            _aten.squeeze.dim,
            _aten.unflatten.int,
        ),
        _read_reshape,
    ),
    _aten.copy_.default: _read_copy,
    **dict.fromkeys((_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default), _read_dropout),
    **dict.fromkeys((_aten.alias.default, _aten.clone.default, _aten.contiguous.default), _read_identity),
}
