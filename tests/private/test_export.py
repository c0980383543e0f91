from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairline.errors import FairlineError
from fairline.masking import SURROGATES, mask_relus, masked_relus
from fairline.models import build
from fairline.private import PlainGraph, to_graph, write_onnx
from fairline.private.graph import Positions, kept_relus
from tests.private.networks import Everything, Theirs, masked, settle, swapped

EXAMPLE = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(
    scope="module",
    params=[
        (share, kind) for share in (0.0, 0.3, 1.0) for kind in (*SURROGATES, "mixed") if share < 1 or kind != "zero"
    ],
    ids=str,
)
def case(request):
    torch.manual_seed(0)
    model = masked(settle(Everything()), EXAMPLE, *request.param)
    return model, to_graph(model, EXAMPLE)


def close(found, model, images):
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_graph_computes_what_the_network_computes(case, images):
    model, graph = case
    close(graph(images), model, images)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_class_of_ones_own_with_masks_swapped_in_place(share, images, tmp_path):
    torch.manual_seed(0)
    model = swapped(settle(Theirs()), EXAMPLE, share)
    graph = to_graph(model, EXAMPLE)
    close(graph(images), model, images)
    assert graph.relus == sum(layer.num_kept for layer in masked_relus(model).values())
    # Normalised weights, scales and shifts are weights of the layers before; before the first there is none.
    assert [node.inputs for node in graph.nodes if node.op == "affine"] == [("x",), ("sub",)]
    assert type(model) is Theirs
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    write_onnx(tmp_path / "network.onnx", graph)
    session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    close(session.run(None, {"images": images.numpy()})[0], model, images)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, c: x + c,
        lambda x, c: c + x,
        lambda x, c: x - c,
        lambda x, c: c - x,
        lambda x, c: torch.sub(x, c, alpha=3),
        lambda x, c: torch.add(c, x, alpha=-2),
        lambda x, c: x * c,
        lambda x, c: c * x,
        lambda x, c: x / c,
        lambda x, c: 2 - x,
        lambda x, c: 0.5 + x,
        lambda x, c: -x,
    ],
)
@pytest.mark.parametrize("folded", [True, False])
def test_constants_scale_and_shift(forward, folded, images):
    """One branch for each shape of the constant, which an export takes together."""
    shapes = [(), (1,), (3, 1, 1), (1, 3, 1, 1), (3, 16, 16), (16,), (1, 1, 16)]

    class Constants(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.ParameterList([torch.rand(shape) + 0.5 for shape in shapes])
            self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in shapes])
            self.heads = nn.ModuleList([nn.Linear(3, 2) for _ in shapes])

        def forward(self, x):
            total = 0
            for c, conv, head in zip(self.c, self.convs, self.heads, strict=True):
                y = forward(conv(x), c) if folded else conv(forward(x, c))
                total = total + head(y.mean((2, 3)))
            return total

    torch.manual_seed(0)
    model = Constants()
    graph = to_graph(model, EXAMPLE)
    close(graph(images), model, images)
    if folded:
        # A number for each channel is one of the convolution's; one for each pixel is none.
        uses = not torch.equal(forward(torch.ones(1), torch.ones(1)), forward(torch.ones(1), 2 * torch.ones(1)))
        assert sum(node.op == "affine" for node in graph.nodes) == (3 if uses else 0)


class Normalised(nn.Module):
    """A small network behind a normalization of its own."""

    def __init__(self, normalise) -> None:
        super().__init__()
        self.normalise = normalise
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.std = nn.Parameter(torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1))

    def forward(self, x):
        return self.head(self.conv(self.normalise(x, self.mean, self.std)).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "normalise",
    [
        lambda x, m, s: x.sub_(m).div_(s),
        lambda x, m, s: x.float().subtract(m).true_divide(s),
        lambda x, m, s: (x.to(torch.float32) - m.type_as(x)) / s.to(x),
        lambda x, m, s: (x - torch.tensor([0.4, 0.5, 0.6], device=x.device).view(1, 3, 1, 1)) / s,
        lambda x, m, s: (x - x.new_tensor([0.4, 0.5, 0.6])[:, None, None]).multiply(1 / s),
        lambda x, m, s: (x - m.expand_as(x)) / s.expand(x.shape[0], 3, x.shape[2], x.shape[3]),
        lambda x, m, s: x - m * torch.ones_like(x) + torch.full_like(x, 0.25),
        lambda x, m, s: torch.addcmul(-m / s, x, 1 / s),
        lambda x, m, s: torch.addcmul(m, 1 / s, x, value=0.5),
        lambda x, m, s: torch.addcdiv(m, x, s, value=2),
        lambda x, m, s: torch.addcmul(x, m, s, value=3),
        lambda x, m, s: (255 * x - 255 * m) / (255 * s),
    ],
)
def test_a_normalization_inside_the_network_is_affine(normalise, images, tmp_path):
    torch.manual_seed(0)
    model = Normalised(normalise)
    graph = to_graph(model, EXAMPLE)
    with torch.no_grad():
        expected = model(images.clone())
    torch.testing.assert_close(graph(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert {node.op for node in graph.nodes} <= {"affine", "scale", "conv2d", "relu", "mean", "linear"}
    assert "affine" in {node.op for node in graph.nodes}
    onnxruntime = pytest.importorskip("onnxruntime")
    write_onnx(tmp_path / "network.onnx", graph)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    close(session.run(None, {"images": images.numpy()})[0], graph, images)


@pytest.mark.parametrize(
    ("normalise", "said"),
    [
        (lambda x, m, s: torch.addcmul(x, x, s), "inputs of which not just one"),
        (lambda x, m, s: torch.addcdiv(m, s, x), "inputs of which not just one|from the image"),
        (lambda x, m, s: x.to(torch.int64).float(), "numbers of kind torch.int64"),
        (lambda x, m, s: x[:, :1].expand_as(x), "no operator 'slice'"),
    ],
)
def test_what_is_not_a_scale_and_a_shift_is_refused(normalise, said):
    with pytest.raises(FairlineError, match=said):
        to_graph(Normalised(normalise), EXAMPLE)


def test_an_operator_with_several_outputs_is_refused_by_its_name():
    class Halves(nn.Module):
        def forward(self, x):
            left, _ = x.mean((2, 3)).relu().chunk(2, 1)
            return left

    with pytest.raises(FairlineError, match="no operator 'chunk'"):
        to_graph(Halves(), EXAMPLE)


def test_constants_that_change_the_shape_are_refused():
    class Grown(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Parameter(torch.rand(4))
            self.head = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return (self.head(x).mean((2, 3), keepdim=True) * self.c).mean((2, 3))

    with pytest.raises(FairlineError, match="of different shapes"):
        to_graph(Grown(), EXAMPLE[:, :1])


def test_images_of_another_shape_are_one_sentence():
    model = settle(Everything())
    with pytest.raises(FairlineError, match=r"Everything fails on images of shape \(1, 16, 16\)"):
        to_graph(model, EXAMPLE[:, :1])
    with pytest.raises(FairlineError, match=r"not one of shape \(3, 16, 16\); example\[None\]"):
        to_graph(model, EXAMPLE[0])


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_other_floats_are_cast(kind, images):
    model = masked(settle(Everything()), EXAMPLE, 0.3)
    graph = to_graph(copy.deepcopy(model).to(kind), EXAMPLE.to(kind))
    assert all(weight.dtype == torch.float32 for weight in graph.weights.values())
    close(graph(images), copy.deepcopy(model).to(kind).float(), images)


def test_every_engine_knows_every_operator():
    from fairline.private import cost, graph, onnx_graph

    assert graph.OPERATORS.keys() == onnx_graph.OPERATORS.keys() == cost.OPERATORS.keys()
    jax_graph = pytest.importorskip("fairline.private.jax_graph", exc_type=ImportError)
    assert graph.OPERATORS.keys() == jax_graph.OPERATORS.keys()


def test_jax_computes_what_the_network_computes(case, images):
    pytest.importorskip("jax")
    import numpy as np

    from fairline.private.jax_graph import to_jax

    model, graph = case
    weights = {name: value.numpy() for name, value in graph.weights.items()}
    close(np.array(to_jax(graph)(weights, images.numpy())), model, images)


def test_onnx_computes_what_the_network_computes(case, images, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, graph = case
    write_onnx(tmp_path / "network.onnx", graph)
    session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    close(session.run(None, {"images": images.numpy()})[0], model, images)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cnet", {"width": 2, "skips": "101010101010101"}),
        ("cnn", {"width": 4}),
        ("resnet18", {"width": 4}),
        ("resnet34", {"width": 4, "stem_relu": True}),
        ("vgg19", {"width": 4}),
        ("wide_resnet22_8", {"width": 2}),
    ],
)
def test_the_networks_of_the_registry(name, options):
    torch.manual_seed(0)
    example = torch.randn(2, 3, 32, 32)
    model = masked(settle(build(name, 5, 3, 32, **options)), example, 0.2)
    graph = to_graph(model, example)
    close(graph(example), model, example)
    assert graph.relus == sum(layer.num_kept for layer in masked_relus(model).values())


def test_an_unmasked_network_keeps_all_its_relus():
    model = settle(build("resnet18", 5, 3, 16, width=2))
    graph = to_graph(model, EXAMPLE)
    assert graph.relus == sum(layer.kept.numel() for layer in masked_relus(mask_relus(model, EXAMPLE)).values())
    assert all(node.mask is None for node in graph.nodes)


def relus_in_jax(graph: PlainGraph) -> int:
    """Elements that go through a maximum with 0, for a batch of one, in the traced program."""
    import jax
    import numpy as np

    from fairline.private.jax_graph import to_jax

    weights = {name: value.numpy() for name, value in graph.weights.items()}
    program = jax.make_jaxpr(to_jax(graph))(weights, np.zeros((1, *graph.input_shape), np.float32))

    def count(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            for inner in equation.params.values():
                if hasattr(inner, "jaxpr"):
                    total += count(inner.jaxpr)
            if equation.primitive.name == "max":
                total += equation.outvars[0].aval.size
        return total

    return count(program.jaxpr)


@pytest.mark.parametrize("surrogate", ["identity", "quadratic", "mixed"])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_only_kept_relus_are_evaluated(share, surrogate):
    pytest.importorskip("jax")
    # Random quadratics overflow in a deep network.
    name = "resnet18" if surrogate == "identity" else "cnn"
    model = masked(settle(build(name, 5, 3, 16, width=2)), EXAMPLE, share, surrogate)
    graph = to_graph(model, EXAMPLE)
    kept = masked_relus(model)
    assert relus_in_jax(graph) == graph.relus == sum(layer.num_kept for layer in kept.values())
    gathered = {node.layer for node in graph.nodes if node.op == "relu" and node.mask is not None}
    for name, layer in kept.items():
        if layer.num_kept in (0, layer.kept.numel()):
            assert name not in gathered
    if share == 0 and surrogate == "identity":
        assert not any(node.op == "relu" for node in graph.nodes)


@settings(max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_gathering_and_putting_back_moves_nothing(flags):
    mask = torch.tensor(flags)
    positions = Positions.of(mask)
    x = torch.arange(len(flags))
    assert torch.equal(torch.cat([x[positions.kept], x[positions.rest]])[positions.inverse], x)
    degrees = [place * 7 % 4 for place in range(len(flags))]
    ordered = Positions.of(mask, degrees)
    assert torch.equal(torch.cat([x[ordered.kept], x[ordered.rest]])[ordered.inverse], x)
    assert [degrees[unit] for unit in ordered.rest] == sorted((degrees[unit] for unit in ordered.rest), reverse=True)
    assert ordered.sizes == tuple(sum(degrees[unit] == degree for unit in ordered.rest) for degree in range(4))
    assert mask[positions.kept].all()
    assert not mask[positions.rest].any()


class Odd(nn.Module):
    def __init__(self, odd) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.odd = odd
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.odd(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        (nn.Sigmoid(), ("sigmoid", "odd")),
        (nn.GELU(), ("gelu", "odd")),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), ("avg_pool2d", "odd")),
        (nn.MaxPool2d(3, ceil_mode=True), ("max_pool2d", "odd")),
        (nn.AdaptiveAvgPool2d(4), ("adaptive_avg_pool2d", "does not divide")),
    ],
)
def test_an_operator_outside_the_set_is_named_with_its_layer(odd, named):
    with pytest.raises(FairlineError) as refused:
        to_graph(Odd(odd), EXAMPLE)
    for word in named:
        assert word in str(refused.value)


class Product(nn.Module):
    def forward(self, x):
        return (x * x).mean((2, 3))


class Image(nn.Module):
    def forward(self, x):
        return F.relu(x)


class Branching(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


@pytest.mark.parametrize(
    ("model", "words"),
    [(Product(), "factor"), (Image(), "shape (batch, classes)"), (Branching(), "cannot be exported")],
)
def test_what_cannot_be_exported_is_one_sentence(model, words):
    with pytest.raises(FairlineError, match=r"^[^\n]*$") as refused:
        to_graph(model, EXAMPLE)
    assert words in str(refused.value)


def test_learned_masks_are_refused_and_the_network_is_left_alone():
    model = masked(settle(build("cnn", 5, 3, 16, width=2)), EXAMPLE, 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    to_graph(model, EXAMPLE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    next(iter(masked_relus(model).values())).learn()
    with pytest.raises(FairlineError, match="still being learned"):
        to_graph(model, EXAMPLE)


def test_the_two_halves_are_files_of_their_own(case, images, tmp_path):
    _, graph = case
    graph.save_public(tmp_path / "public.safetensors")
    graph.save_weights(tmp_path / "weights.safetensors")
    loaded = PlainGraph.load_public(tmp_path / "public.safetensors")
    assert not loaded.weights
    assert loaded.relus == graph.relus
    loaded.load_weights(tmp_path / "weights.safetensors")
    assert torch.equal(loaded(images), graph(images))
    public = (tmp_path / "public.safetensors").read_bytes()
    large = [value for value in graph.weights.values() if value.count_nonzero() >= 16]
    assert large
    for value in large:
        assert value.numpy().tobytes() not in public


def test_wrong_files_are_named(case, tmp_path):
    _, graph = case
    graph.save_public(tmp_path / "public.safetensors")
    graph.save_weights(tmp_path / "weights.safetensors")
    other = to_graph(settle(build("cnn", 4, 3, 16, width=2)), EXAMPLE)
    with pytest.raises(FairlineError, match="weights of another network"):
        other.load_weights(tmp_path / "weights.safetensors")
    with pytest.raises(FairlineError, match="not the public part"):
        PlainGraph.load_public(tmp_path / "weights.safetensors")
    with pytest.raises(FairlineError, match=r"missing\.safetensors"):
        PlainGraph.load_public(tmp_path / "missing.safetensors")


def test_kept_relus_counts_by_node(case):
    model, graph = case
    assert sum(kept_relus(graph, node) for node in graph.nodes) == sum(
        layer.num_kept for layer in masked_relus(model).values()
    )
