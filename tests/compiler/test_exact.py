"""A compiled network computes what it was compiled from, whatever form its blocks take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fairline as fl
from fairline.compiler import FORMS, Block, Regions, build, outline
from fairline.compiler.dense import SCHEDULES
from fairline.compiler.matrices import Affine, fill
from fairline.errors import FairlineError
from fairline.private import to_graph
from fairline.private.graph import PlainGraph
from tests.compiler.networks import graphs, student
from tests.private.networks import settle
from tests.reference.compiler import dense_logits, jacobians, nonlinear_nodes


def images_of(graph: PlainGraph, count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *graph.input_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


@st.composite
def plans(draw, regions: Regions):
    """A chain of blocks from the first frontier to the last, in any forms that they have."""
    plan, start, count = [], 0, len(regions.frontiers) - 1
    while start < count:
        stop = draw(st.integers(start + 1, min(count, start + draw(st.sampled_from([1, 2, count])))))
        forms = [form for form in FORMS if form != "merged" or regions.mergeable(start, stop)]
        plan.append(Block(start, stop, draw(st.sampled_from(forms)), draw(st.sampled_from(SCHEDULES))))
        start = stop
    return tuple(plan)


@settings(max_examples=80)
@given(st.data())
def test_any_plan_of_any_graph_computes_the_same(data):
    graph = data.draw(graphs())
    regions = Regions(graph)
    plan = data.draw(plans(regions))
    built = regions.build(plan)
    images = images_of(graph, data.draw(st.integers(1, 5)))
    same(built(images), graph(images))
    assert built.relus <= graph.relus
    public = regions.outline(plan)
    assert (public.nodes, public.weights) == (built.nodes, {})
    assert public.shapes == {name: tuple(value.shape) for name, value in built.weights.items()}


@settings(max_examples=40)
@given(graphs(steps=7, size=4), st.sampled_from(SCHEDULES))
def test_the_dense_form_is_the_formula_with_full_jacobians(graph, schedule):
    regions = Regions(graph)
    built = regions.build((Block(0, len(regions.frontiers) - 1, "dense", schedule),))
    images = images_of(graph)
    same(built(images), dense_logits(regions.graph, images))
    assert {node.op for node in built.nodes} <= {
        "linear", "relu", "quadratic", "polynomial", "shared_relu", "max_pool", "gather", "reshape", "concat", "add"
    }  # fmt: skip


@settings(max_examples=40)
@given(graphs(steps=7, size=4))
def test_columns_that_are_left_out_are_zero_and_no_unit_reads_one_of_its_level(graph):
    """Against full Jacobians in which kept units are inputs: u = c where c is the correction of a unit that is cut."""
    regions = Regions(graph)
    dense = regions.dense(0, len(regions.frontiers) - 1)
    (product, *_), affine = dense.products("push"), Affine(regions.anatomy, regions.graph.weights)
    (matrix, _), *_ = fill(dense, dense.products("push"), affine)
    slow, _ = jacobians(regions.graph)
    assert len(dense.levels) <= len(nonlinear_nodes(regions.graph))
    # What the first level reads of the image has passed no nonlinear unit: the corrections stand for themselves.
    column = torch.zeros(matrix.shape[0], dense.column_starts[1], dtype=torch.float64)
    column[:, product.columns] = matrix
    if not dense.levels or dense.sources[0] == []:
        return
    rows = column[: dense.row_starts[1]]
    level = dense.levels[0]
    read = level.reads(regions.anatomy.shapes)
    expected = [slow[name]["x"][units.index] for name, units in zip(level.names, read, strict=True)]
    torch.testing.assert_close(rows, torch.cat(expected), rtol=1e-9, atol=1e-12)
    for name, units in zip(level.names, level.reads(regions.anatomy.shapes), strict=True):
        for other, own in zip(level.names, level.gives(regions.anatomy.shapes), strict=True):
            assert not slow[name][other][units.index][:, own.index].any()


CASES = st.tuples(
    st.sampled_from([0.0, 0.003, 0.05, 0.5, 1.0]),
    st.sampled_from(["pixel", "channel", "layer"]),
    st.sampled_from(["identity", "identity", "quadratic", "cubic", "mixed", "zero"]),
)


@pytest.mark.parametrize("arch", ["cnn", "resnet18", "resnet34", "wide_resnet22_8", "vgg19"])
@settings(max_examples=2)
@given(case=CASES, seed=st.integers(0, 1000), data=st.data())
def test_every_architecture_with_every_kind_of_mask(arch, case, seed, data):
    model = student(arch, *case, seed=seed)
    size = 16 if arch == "vgg19" else 8
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(data.draw(st.integers(1, 4)), 3, size, size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
    # Each quadratic squares what the last one let through.
    assume(bool(expected.abs().max() < 1e6))
    graph = to_graph(model, torch.zeros(1, 3, size, size, dtype=torch.float64), torch.float64)
    regions = Regions(graph)
    built = regions.build(data.draw(plans(regions)))
    same(built(images), expected)
    assert built.relus <= fl.relu_count(model)


@pytest.mark.parametrize("share", [0.01, 0.3])
@pytest.mark.parametrize("arch", ["cnn", "resnet18", "wide_resnet22_8", "vgg19"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_whole_architecture_in_dense_form(arch, share, schedule):
    model = student(arch, share, "pixel")
    size = 16 if arch == "vgg19" else 8
    graph = to_graph(model, torch.zeros(1, 3, size, size, dtype=torch.float64), torch.float64)
    regions = Regions(graph)
    plan = (Block(0, len(regions.frontiers) - 1, "dense", schedule),)
    built, images = build(graph, plan), images_of(graph)
    with torch.no_grad():
        same(built(images), model(images))
    assert built.nodes == outline(graph.public(), plan).nodes
    assert not [node for node in built.nodes if node.op == "conv2d"]


def test_relus_that_nothing_reads_are_dropped():
    """Two strided 1×1 convolutions read every fourth pixel of what the ReLUs give."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(2, 2, 1, stride=2),
        torch.nn.Conv2d(2, 2, 1, stride=2),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 2),
    )
    graph = to_graph(network, torch.zeros(1, 1, 8, 8))
    assert graph.relus == 128
    regions = Regions(graph)
    built = regions.build((Block(0, len(regions.frontiers) - 1, "dense"),))
    assert built.relus == 8
    same(built(images_of(graph)), graph(images_of(graph)))
    # And of the image only what those read: 3×3 pixels around each, less those beyond the border.
    assert next(node for node in built.nodes if node.op == "gather").shape == (25,)


def test_relus_that_do_not_read_each_other_share_a_level():
    """Kept ReLUs of two layers, in opposite corners."""
    from fairline.masking import mask_relus, masked_relus

    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(64, 2),
    )  # fmt: skip
    model = mask_relus(network, torch.zeros(1, 1, 8, 8))
    first, second = masked_relus(model).values()
    for place, levels in ((7, 1), (1, 2)):
        for layer, (row, column) in ((first, (0, 0)), (second, (place, place))):
            mask = torch.zeros(1, 8, 8, dtype=torch.bool)
            mask[0, row, column] = True
            layer.set_mask(mask)
        graph = to_graph(model, torch.zeros(1, 1, 8, 8))
        regions = Regions(graph)
        plan = (Block(0, len(regions.frontiers) - 1, "dense"),)
        assert [node.op for node in regions.outline(plan).nodes].count("relu") == levels
        same(regions.build(plan)(images_of(graph)), graph(images_of(graph)))


def test_matrices_come_in_chunks_and_say_how_far_they_are(monkeypatch):
    graph = to_graph(student("resnet18", 0.05, "pixel"), torch.zeros(1, 3, 8, 8))
    regions = Regions(graph)
    last = len(regions.frontiers) - 1
    for plan in ((Block(0, last, "dense"),), (Block(0, 7, "dense"), Block(7, last, "dense"))):
        whole = regions.build(plan)
        monkeypatch.setattr("fairline.compiler.matrices.CHUNK_BYTES", 200_000)
        told = []
        pieces = regions.build(plan, told.append)
        monkeypatch.undo()
        for name, value in whole.weights.items():
            torch.testing.assert_close(pieces.weights[name], value, rtol=1e-12, atol=1e-14)
        for stage in {each.stage for each in told}:
            done = [each.done for each in told if each.stage == stage]
            assert len(done) > 2
            assert done == sorted(done)
            assert done[-1] == told[-1].total or stage != told[-1].stage


class Folded(torch.nn.Module):
    """No activation: separable, strided, dilated and unpadded convolutions, a sum, and two pieces joined."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.depthwise = torch.nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.pointwise = torch.nn.Conv2d(8, 4, 1)
        self.left = torch.nn.Conv2d(4, 3, 3, padding=0, dilation=2)
        self.right = torch.nn.Conv2d(4, 3, (5, 5))
        self.shrink = torch.nn.Conv2d(6, 2, 2, stride=2)
        self.last = torch.nn.Linear(2 * 2 * 2, 3)

    def forward(self, x):
        x = self.norm(self.stem(x))
        y = self.pointwise(self.depthwise(x)) * 0.5
        y = y - x
        y = torch.cat([self.left(y), self.right(y)], 1)
        return self.last(F.avg_pool2d(self.shrink(y), 2).flatten(1))


def test_convolutions_of_convolutions_are_merged():
    torch.manual_seed(0)
    model = settle(Folded())
    graph = to_graph(model.double(), torch.zeros(1, 2, 25, 25, dtype=torch.float64), torch.float64)
    regions = Regions(graph)
    last = len(regions.frontiers) - 1
    assert regions.mergeable(0, last)
    plan = (Block(0, last, "merged"),)
    built, images = regions.build(plan), images_of(graph)
    with torch.no_grad():
        same(built(images), model(images))
    # The padded depthwise convolution starts anew after the stem; all that follows is one with it.
    kernels = [built.shapes[node.weights[0]] for node in built.nodes if node.op == "conv2d"]
    assert kernels == [(4, 2, 3, 3), (2, 4, 10, 10)]


@settings(max_examples=40)
@given(graphs(steps=8, size=7, kinds=("conv", "conv", "conv", "add", "concat", "affine", "scale", "avg_pool")))
def test_merged_blocks_compute_the_same(graph):
    regions = Regions(graph)
    last = len(regions.frontiers) - 1
    images = images_of(graph)
    if regions.mergeable(0, last):
        same(regions.build((Block(0, last, "merged"),))(images), graph(images))


def test_a_block_with_relus_has_no_merged_form():
    graph = to_graph(student("cnn", 0.5, "pixel"), torch.zeros(1, 3, 8, 8))
    regions = Regions(graph)
    with pytest.raises(FairlineError, match="more than convolutions between them"):
        regions.outline((Block(0, len(regions.frontiers) - 1, "merged"),))
