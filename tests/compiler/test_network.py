"""``fl.compile``: a module again, a graph again, files; and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import fairline as fl
from fairline.compiler import Block, CompiledNetwork, Regions, file_bytes, multiply_adds
from fairline.errors import FairlineError
from fairline.masking import copy_model, mask_relus, masked_relus
from fairline.private import PlainGraph, estimate, to_graph, write_onnx
from fairline.private.plan import graph_digest
from tests.compiler.networks import student

EXAMPLE = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module", params=["identity", "quadratic", "mixed"])
def pair(request):
    """A student in float32 and its compiled form; the quadratic one keeps a layer of polynomials."""
    model = student("cnn", 0.1, "pixel", request.param, width=4).float()
    return model, fl.compile(model, EXAMPLE, minimise="rounds")


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_it_is_a_network_with_the_same_logits(pair, images):
    model, compiled = pair
    with torch.no_grad():
        close(compiled(images), model(images))
        close(compiled(images[:1]), model(images[:1]))
    assert {value.dtype for value in compiled.parameters()} == {torch.float32}
    assert 0 < fl.relu_count(compiled) <= fl.relu_count(model)
    assert list(compiled.plan["form"])
    assert compiled.plan["rounds"].sum() <= compiled.plan["rounds_before"].sum()


def test_in_float64_it_is_exact():
    model = student("resnet18", 0.02, "pixel")
    compiled = fl.compile(model, EXAMPLE.double())
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-10)
    assert {value.dtype for value in compiled.parameters()} == {torch.float64}


def test_gradients_by_the_image_are_the_same_and_parameters_learn(images):
    model = student("cnn", 0.1, "pixel", width=4)
    compiled = fl.compile(model, EXAMPLE.double())
    x = images.double().requires_grad_()
    weights = torch.randn(5, 3, dtype=torch.float64)
    expected, found = (torch.autograd.grad((net(x) * weights).sum(), x)[0] for net in (model, compiled))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    loss = compiled(x.detach()).square().mean()
    loss.backward()
    assert all(value.grad is not None for value in compiled.parameters())
    with torch.no_grad():
        for value in compiled.parameters():
            value -= 1e-3 * value.grad
        assert compiled(x).square().mean() < loss


def test_its_graph_needs_no_export_and_runs_everywhere(pair, images, tmp_path, monkeypatch):
    _, compiled = pair
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("exported"))
    graph = to_graph(compiled, EXAMPLE)
    with torch.no_grad():
        expected = compiled(images)
    assert graph.relus == fl.relu_count(compiled)
    close(graph(images), expected)
    graph.save_public(tmp_path / "public")
    graph.save_weights(tmp_path / "weights")
    loaded = PlainGraph.load_public(tmp_path / "public")
    loaded.load_weights(tmp_path / "weights")
    assert graph_digest(loaded) == graph_digest(graph)
    close(loaded(images), expected)
    told = estimate(compiled, EXAMPLE)
    assert told.rounds == pytest.approx(compiled.plan["rounds"].sum() + 1)


def test_jax_computes_the_same(pair, images):
    pytest.importorskip("jax")
    from fairline.private.jax_graph import to_jax

    _, compiled = pair
    graph = to_graph(compiled, EXAMPLE)
    weights = {name: value.numpy() for name, value in graph.weights.items()}
    import numpy as np

    found = torch.from_numpy(np.array(to_jax(graph)(weights, images.numpy())))
    with torch.no_grad():
        close(found, compiled(images))


def test_onnx_computes_the_same(pair, images, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    _, compiled = pair
    write_onnx(tmp_path / "network.onnx", to_graph(compiled, EXAMPLE))
    session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        with torch.no_grad():
            close(session.run(None, {"images": batch.numpy()})[0], compiled(batch))


def test_copies_and_states(pair, images):
    _, compiled = pair
    with torch.no_grad():
        torch.testing.assert_close(copy_model(compiled)(images), compiled(images), rtol=0, atol=0)
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        for value in twin.parameters():
            value.mul_(0.5)
        assert not torch.allclose(twin(images), compiled(images))
        twin.load_state_dict(compiled.state_dict())
        torch.testing.assert_close(twin(images), compiled(images), rtol=0, atol=0)


def test_an_audit_takes_it_like_any_other_network(data, trained):
    """Accuracies are those of the student; measures that need gradients, copies and pieces run."""
    model = mask_relus(trained, torch.zeros(1, 1, 8, 8)).eval()
    for layer in masked_relus(model).values():
        layer.set_mask(torch.rand(layer.shape, generator=torch.Generator().manual_seed(0)) < 0.2)
    compiled = fl.compile(model, torch.zeros(1, 1, 8, 8), protocol="semi2k")
    options = {"measures": ["accuracy", "margin", "gradient_norm", "curvature", "boundary_distance"], "resamples": 10}
    before, after = (fl.audit(network, data, trained, **options).to_frame() for network in (model, compiled))
    same = before["measure"].isin(["accuracy", "relative_drop", "gap", "loss"])
    assert same.any()
    assert after.loc[same, "value"].tolist() == pytest.approx(before.loc[same, "value"].tolist(), rel=1e-4, nan_ok=True)
    assert after["measure"].tolist() == before["measure"].tolist()


def test_it_is_saved_and_loaded(pair, images, tmp_path):
    model, compiled = pair
    compiled.save(tmp_path / "compiled")
    original = to_graph(model, EXAMPLE)
    loaded = CompiledNetwork.load(tmp_path / "compiled", original)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), compiled(images), rtol=0, atol=0)
    assert loaded.plan.equals(compiled.plan)
    assert (loaded.terms, loaded.left_out) == (compiled.terms, compiled.left_out)
    assert fl.relu_count(loaded) == fl.relu_count(compiled)


def test_files_of_another_network_are_refused(tmp_path):
    models = [student("cnn", 0.1, "pixel", seed=seed, width=4).float() for seed in (0, 1)]
    for place, model in enumerate(models):
        fl.compile(model, EXAMPLE).save(tmp_path / str(place))
    with pytest.raises(FairlineError, match="compiled from another one"):
        CompiledNetwork.load(tmp_path / "0", to_graph(models[1], EXAMPLE))
    other = copy.deepcopy(models[0])
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    with pytest.raises(FairlineError, match="or from other weights"):
        CompiledNetwork.load(tmp_path / "0", to_graph(other, EXAMPLE))
    for name in ("weights.safetensors", "graph.safetensors"):
        mixed = tmp_path / f"mixed {name}"
        fl.compile(models[0], EXAMPLE).save(mixed)
        (mixed / name).write_bytes((tmp_path / "1" / name).read_bytes())
        with pytest.raises(FairlineError, match=r"do not belong together|another network"):
            CompiledNetwork.load(mixed)
    (tmp_path / "1" / "compiled.json").write_text("{}")
    with pytest.raises(FairlineError, match=r"compiled\.json does not describe a compiled network"):
        CompiledNetwork.load(tmp_path / "1")


def test_an_operator_that_is_not_affine_is_named(monkeypatch):
    graph = to_graph(student("cnn", 0.1, "pixel"), EXAMPLE)
    place = next(i for i, node in enumerate(graph.nodes) if node.op == "relu")
    graph.nodes[place] = replace(graph.nodes[place], op="sigmoid", layer="gate")
    with pytest.raises(FairlineError, match="operator 'sigmoid' of layer 'gate' is not affine"):
        fl.compile(graph)


def test_what_cannot_be_compiled_is_one_sentence():
    model = student("cnn", 0.1, "pixel").float()
    graph = to_graph(model, EXAMPLE)
    with pytest.raises(FairlineError, match="needs an example input"):
        fl.compile(model)
    with pytest.raises(FairlineError, match="with its weights, not the public half"):
        fl.compile(graph.public())
    with pytest.raises(FairlineError, match="pigeon"):
        fl.compile(graph, network="pigeon")
    compiled = fl.compile(graph)
    with pytest.raises(FairlineError, match=r"made for images of shape \(3, 8, 8\), not \(3, 9, 9\)"):
        compiled(torch.zeros(1, 3, 9, 9))
    with pytest.raises(FairlineError, match=r"made for images of shape \(3, 8, 8\), not \(1, 8, 8\)"):
        to_graph(compiled, torch.zeros(1, 1, 8, 8))
    for relu in masked_relus(compiled).values():
        relu.learn()
    with pytest.raises(FairlineError, match="still being learned"):
        to_graph(compiled, EXAMPLE)


def test_a_result_that_differs_is_refused(monkeypatch):
    graph = to_graph(student("cnn", 0.1, "pixel"), EXAMPLE)
    original = Regions.build

    def wrong(self, plan, progress=None):
        built = original(self, plan, progress)
        built.weights[next(iter(built.weights))] += 1e-6
        return built

    monkeypatch.setattr(Regions, "build", wrong)
    with pytest.raises(FairlineError, match="computes something else: logits differ by"):
        fl.compile(graph)


def test_a_plan_that_leads_nowhere_is_refused():
    regions = Regions(to_graph(student("cnn", 0.1, "pixel"), EXAMPLE))
    last = len(regions.frontiers) - 1
    for plan in (
        (),
        (Block(0, last - 1),),
        (Block(1, last),),
        (Block(0, last, "folded"),),
        (Block(0, 1), Block(2, last)),
    ):
        with pytest.raises(FairlineError, match="A plan is a chain of blocks from frontier 0"):
            regions.outline(plan)


def test_masks_that_change_after_compiling_are_in_the_graph():
    compiled = fl.compile(student("cnn", 0.5, "pixel").float(), EXAMPLE)
    layers = list(masked_relus(compiled).values())
    layers[0].set_mask(torch.zeros(layers[0].shape, dtype=torch.bool))
    images = torch.randn(2, 3, 8, 8)
    graph = to_graph(compiled, EXAMPLE)
    assert graph.relus == fl.relu_count(compiled)
    with torch.no_grad():
        close(graph(images), compiled(images))


def test_size_in_the_clear_by_hand():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 2),
    )
    graph = to_graph(network, EXAMPLE)
    assert multiply_adds(graph) == 16 * 4 * 27 + 128
    assert file_bytes(graph) == 4 * (108 + 4 + 128 + 2)
    regions = Regions(graph)
    last = len(regions.frontiers) - 1
    # All units are kept, so the logits read the image through them alone; to push it makes zeros of their rows.
    for schedule, rows in (("pull", 64), ("push", 64 + 2)):
        dense = regions.outline((Block(0, last, "dense", schedule),))
        assert multiply_adds(dense) == 192 * rows + 64 * 2


def test_a_file_that_takes_units_that_are_not_there_is_refused(tmp_path):
    compiled = fl.compile(student("cnn", 0.05, "pixel").float(), EXAMPLE, minimise="rounds")
    graph = to_graph(compiled, EXAMPLE)
    name = next(node.mask for node in graph.nodes if node.op == "gather")
    graph.masks[name] = graph.masks[name] + 10**6
    graph.save_public(tmp_path / "graph")
    with pytest.raises(FairlineError, match=r"takes units in .* that its input does not have"):
        PlainGraph.load_public(tmp_path / "graph")
