"""Networks to compile: random plain graphs with odd skips, and the architectures with masks of every kind."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from fairline.masking import mask_relus, masked_relus, patches, prototypes
from fairline.masking.sharing import effective
from fairline.masking.surrogates import held
from fairline.models import build
from fairline.private.graph import Node, PlainGraph
from tests.private.networks import settle

STEPS = (
    "conv",
    "conv",
    "relu",
    "relu",
    "relu",
    "add",
    "concat",
    "affine",
    "scale",
    "avg_pool",
    "max_pool",
    "quadratic",
    "polynomial",
    "shared_relu",
)


class Maker:
    """Adds random nodes to a graph."""

    def __init__(self, draw: Any, size: int) -> None:
        self.draw = draw
        self.graph = PlainGraph((2, size, size), [], {}, {}, {})
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        self.values: dict[str, tuple[int, ...]] = {"x": (2, size, size)}

    def weight(self, name: str, *shape: int) -> str:
        value = torch.randn(shape, generator=self.generator) / max(1.0, math.prod(shape[1:])) ** 0.5
        self.graph.weights[name], self.graph.shapes[name] = value, shape
        return name

    def emit(self, op: str, inputs: tuple[str, ...], shape: tuple[int, ...], weights=(), mask=None, **options) -> str:
        name = f"n{len(self.graph.nodes)}"
        if mask is not None:
            self.graph.masks[name] = mask
        self.graph.nodes.append(
            Node(op, name, f"layer {name}", inputs, shape, tuple(weights), None if mask is None else name, options)
        )
        self.values[name] = shape
        return name

    def mask(self, shape: tuple[int, ...]) -> torch.Tensor:
        share = self.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        return torch.rand(shape, generator=self.generator) < share

    def step(self, kind: str) -> None:
        source = self.draw(st.sampled_from(list(self.values)[-4:]))
        shape = self.values[source]
        name = f"n{len(self.graph.nodes)}"
        if kind == "conv":
            kernel = self.draw(st.sampled_from([1, 3]))
            stride, padding = self.draw(st.sampled_from([1, 1, 2])), self.draw(st.integers(0, kernel // 2))
            groups = self.draw(st.sampled_from([1, shape[0]]))
            channels = groups * self.draw(st.integers(1, 2)) if groups > 1 else self.draw(st.integers(1, 3))
            sides = [(side + 2 * padding - kernel) // stride + 1 for side in shape[1:]]
            if min(sides) < 1:
                return
            weights = [
                self.weight(f"{name}.weight", channels, shape[0] // groups, kernel, kernel),
                self.weight(f"{name}.bias", channels),
            ]
            pair = {"stride": [stride] * 2, "padding": [padding] * 2, "dilation": [1, 1], "groups": groups}
            self.emit("conv2d", (source,), (channels, *sides), weights, **pair)
        elif kind == "relu":
            mask = None if self.draw(st.booleans()) and math.prod(shape) < 20 else self.mask(shape)
            self.emit("relu", (source,), shape, mask=mask)
        elif kind == "shared_relu":
            mask, draw = self.mask(shape), self.draw
            blocks = [draw(st.tuples(*[st.integers(1, 3)] * 2)) for _ in range(shape[0])]
            prototype = draw(st.integers(0, shape[0] - 1))
            signs = patches(shape, blocks) if draw(st.booleans()) else prototypes(shape, [prototype] * shape[0])
            self.emit("shared_relu", (source,), shape, mask=effective(signs, mask))
        elif kind == "quadratic":
            weight = self.weight(f"{name}.coefficients", 3, shape[0], 1, 1)
            self.emit("quadratic", (source,), shape, [weight], self.mask(shape))
        elif kind == "polynomial":
            most = self.draw(st.sampled_from([1, 3]))
            degrees = [self.draw(st.integers(0, most)) for _ in range(shape[0])]
            weights = [self.weight(f"{name}.coefficients", 4, shape[0], 1, 1)] if max(degrees) > 1 else []
            if weights:
                value = self.graph.weights[weights[0]]
                self.graph.weights[weights[0]] = held(value, torch.tensor(degrees))
            self.emit("polynomial", (source,), shape, weights, self.mask(shape), degrees=degrees)
        elif kind == "add":
            other = self.draw(st.sampled_from([key for key, value in self.values.items() if value == shape]))
            self.emit("add", (source, other), shape, alpha=self.draw(st.sampled_from([1, -1, 0.5])))
        elif kind == "concat":
            same = [key for key, value in self.values.items() if value[1:] == shape[1:] and value[0] + shape[0] < 7]
            if same:
                other = self.draw(st.sampled_from(same))
                self.emit("concat", (source, other), (shape[0] + self.values[other][0], *shape[1:]), axis=1)
        elif kind == "affine":
            weights = [self.weight(f"{name}.{part}", shape[0], 1, 1) for part in ("scale", "shift")]
            self.emit("affine", (source,), shape, weights)
        elif kind == "scale":
            self.emit("scale", (source,), shape, factor=0.75)
        elif min(shape[1:]) > 1:
            sides = [side // 2 for side in shape[1:]]
            self.emit(kind, (source,), (shape[0], *sides), kernel=[2, 2], stride=[2, 2], padding=[0, 0])


@st.composite
def graphs(draw: Any, steps: int = 10, size: int = 5, kinds: tuple[str, ...] = STEPS) -> PlainGraph:
    """A plain graph whose logits read its last value and perhaps an earlier one; float32 weights."""
    maker = Maker(draw, size)
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=steps)):
        maker.step(kind)
    ends = [list(maker.values)[-1]]
    if draw(st.booleans()):
        ends.append(draw(st.sampled_from(list(maker.values))))
    flat = [maker.emit("reshape", (end,), (math.prod(maker.values[end]),)) for end in ends]
    width = sum(maker.values[name][0] for name in flat)
    joined = flat[0] if len(flat) == 1 else maker.emit("concat", tuple(flat), (width,), axis=1)
    weights = [maker.weight("last.weight", 3, width), maker.weight("last.bias", 3)]
    maker.emit("linear", (joined,), (3,), weights)
    return maker.graph


def student(
    arch: str, share: float, kind: str, surrogate: str = "identity", seed: int = 0, width: int = 2
) -> nn.Module:
    """A float64 network of an architecture with random masks of one kind, ``pixel``, ``channel`` or ``layer``."""
    torch.manual_seed(seed)
    size = 16 if arch == "vgg19" else 8
    uniform = "identity" if surrogate == "mixed" else surrogate
    model = mask_relus(settle(build(arch, 3, 3, size, width=width), seed), torch.zeros(1, 3, size, size), uniform)
    generator = torch.Generator().manual_seed(seed)
    for layer in masked_relus(model).values():
        whole = (*layer.shape[: {"pixel": 3, "channel": 1, "layer": 0}[kind]],)
        rolls = torch.rand(whole + (1,) * (len(layer.shape) - len(whole)), generator=generator)
        layer.set_mask(rolls < share)
        if surrogate == "mixed":
            layer.use_degrees(torch.randint(4, layer.shape[:1], generator=generator))
        if layer.coefficients is not None:
            with torch.no_grad():
                layer.coefficients.add_(torch.randn(layer.coefficients.shape, generator=generator) * 0.02)
    return model.double().eval()
