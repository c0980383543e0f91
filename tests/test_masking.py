from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairline.errors import FairlineError
from fairline.masking import (
    MaskedReLU,
    keep_largest,
    layer_table,
    load_masks,
    mask_relus,
    masked_relus,
    relu_count,
    save_masks,
)
from fairline.masking.budget import fullest
from fairline.models import build
from tests.reference.masking import fullest_of_all, masked_relu


def fixed(mask: torch.Tensor) -> MaskedReLU:
    layer = MaskedReLU(mask.shape)
    layer.set_mask(mask)
    return layer


def learned(mask: torch.Tensor) -> MaskedReLU:
    layer = MaskedReLU(mask.shape)
    layer.learn()
    layer.to(mask.dtype).weight.data.copy_(mask)
    return layer


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_fixed_mask_has_the_definitions_value_and_gradient(seed, share):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, 4, generator=generator) < share
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = fixed(mask)(mine), masked_relu(theirs, mask.double())
    assert torch.equal(y, expected)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(mine.grad, theirs.grad)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_learned_mask_has_the_definitions_value_and_gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    layer = learned(mask)
    mine, theirs, their_mask = x.clone().requires_grad_(), x.clone().requires_grad_(), mask.clone().requires_grad_()
    y, expected = layer(mine), masked_relu(theirs, their_mask)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, their_mask.grad, rtol=1e-12, atol=1e-12)


def test_learned_gradients_by_finite_differences():
    layer = learned(torch.rand(2, 3, 3, dtype=torch.float64))
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64).requires_grad_()

    def function(inputs, mask):
        layer.weight.data = mask.data
        return torch.func.functional_call(layer, {"weight": mask}, (inputs,))

    assert torch.autograd.gradcheck(function, (x, layer.weight.detach().requires_grad_()))


def test_second_derivatives_and_vmap_of_fixed_masks():
    mask = torch.tensor([True, False, True, False])
    layer = fixed(mask)
    x = torch.tensor([1.5, 2.0, -1.0, -3.0], dtype=torch.float64)

    def cube(v):
        return (layer(v[None]) ** 3).sum()

    # d²/dx² of f(x)³ is 6·f(x) where f is the identity, 0 where it is cut.
    expected = torch.diag(torch.tensor([9.0, 12.0, 0.0, -18.0], dtype=torch.float64))
    torch.testing.assert_close(torch.autograd.functional.hessian(cube, x), expected)
    torch.testing.assert_close(torch.func.hessian(cube)(x), expected)
    several = torch.func.vmap(torch.func.grad(cube))(x.expand(3, 4))
    torch.testing.assert_close(several, torch.func.grad(cube)(x).expand(3, 4))


def test_infinite_and_zero_inputs_behave_as_relu():
    x = torch.tensor([[float("inf"), float("-inf"), 0.0, float("nan")]])
    for keep in (torch.tensor([True] * 4), torch.tensor([True, True, True, False])):
        y = fixed(keep)(x)
        assert y[0, :3].tolist() == [float("inf"), 0.0, 0.0]
        assert y[0, 3].isnan()


class Torchvision(nn.Module):
    """In-place ReLUs, one of them shared, as torchvision's residual blocks have them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn1(self.conv3(x)))
        out = self.bn2(self.conv2(out))
        out += x
        out = self.relu(out)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        x = self.conv(x)
        # An in-place ReLU changes what a later reader of its input sees.
        y = F.relu(x, inplace=True)
        x = torch.relu(x + y).mean((2, 3)).relu()
        x = F.dropout(self.inner(x), 0.3, training=self.training)
        return self.fc(F.relu_(x))


class Branching(nn.Module):
    """Cannot be traced: its path depends on a value."""

    def __init__(self, functional: bool = False, twice: bool = False):
        super().__init__()
        self.linear, self.relu, self.out = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)
        self.functional, self.twice = functional, twice

    def forward(self, x):
        if x.sum() > 1e9:
            x = x * 2
        x = F.relu(self.linear(x)) if self.functional else self.relu(self.linear(x))
        return self.out(self.relu(x) if self.twice else x)


class Bottleneck(nn.Module):
    """As torchvision writes it: one in-place ReLU module that is called three times."""

    def __init__(self, inplanes, planes, stride, downsample):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, planes * 4, 1, bias=False), nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ImageNetResNet(nn.Module):
    """The ImageNet form: 7×7 stem with a ReLU, max-pooling, bottleneck blocks; here one block a stage, width 8."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, padding=3, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        inplanes = 8
        for stage in range(4):
            planes, stride = 8 * 2**stage, 1 if stage == 0 else 2
            downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes * 4, 1, stride, bias=False), nn.BatchNorm2d(planes * 4)
            )
            setattr(self, f"layer{stage + 1}", nn.Sequential(Bottleneck(inplanes, planes, stride, downsample)))
            inplanes = planes * 4
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inplanes, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


MODELS = {
    "resnet18": (lambda: build("resnet18", 5, width=4), (3, 32, 32), 16),
    "resnet34 with stem": (lambda: build("resnet34", 5, width=2, stem_relu=True), (3, 16, 16), 1 + 32),
    "cnn": (lambda: build("cnn", 4, width=4), (3, 16, 16), 3),
    "cnet": (lambda: build("cnet", 4, width=2, layers=4, skips="1 01 101", skip_relus="once"), (3, 16, 16), 4 + 3 + 3),
    "vgg19": (lambda: build("vgg19", 5, width=2), (3, 32, 32), 16),
    "wide": (lambda: build("wide_resnet22_8", 5, width=4, final_relu=True), (3, 16, 16), 19),
    "imagenet": (ImageNetResNet, (3, 64, 64), 1 + 4 * 3),
    "torchvision": (Torchvision, (3, 6, 6), 3),
    "functional": (Functional, (3, 6, 6), 5),
    "branching": (Branching, (4,), 1),
    "branching, a function": (lambda: Branching(functional=True), (4,), 1),
    "branching, a module twice": (lambda: Branching(twice=True), (4,), 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_masking_changes_nothing(name):
    make, shape, layers = MODELS[name]
    torch.manual_seed(0)
    model = make()
    x = torch.randn(4, *shape)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.weight)
    masked = mask_relus(model, x)
    assert len(masked_relus(masked)) == layers
    assert torch.equal(masked.eval()(x.clone()), model.eval()(x.clone()))
    assert set(model.state_dict()) <= set(masked.state_dict())
    # Gradients of every weight, in training mode as well (dropout off: its randomness is not shared).
    for network in (model, masked):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if name != "functional":
            network(x.clone()).square().sum().backward()
    if name != "functional":
        gradients = dict(masked.named_parameters())
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, gradients[key].grad), key


def test_functional_dropout_follows_train_and_eval():
    masked = mask_relus(Functional().train(), torch.zeros(2, 3, 6, 6))
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(masked.eval()(x), masked(x))
    outputs = {tuple(masked.train()(x).flatten().tolist()) for _ in range(8)}
    assert len(outputs) > 1


def test_masking_again_keeps_the_masks():
    x = torch.zeros(1, 3, 16, 16)
    model = mask_relus(build("cnn", 4, width=4), x)
    next(iter(masked_relus(model).values())).set_mask(torch.tensor(False))
    assert relu_count(mask_relus(model, x)) == relu_count(model)


@pytest.mark.parametrize(
    ("name", "options", "size", "count"),
    [
        ("resnet18", {}, 32, 491_520),
        ("resnet18", {"stem_relu": True}, 32, 557_056),
        ("resnet18", {"stem_stride": 2}, 32, 491_520 // 4),
        ("resnet18", {"width": 8}, 32, 61_440),
        ("resnet18", {}, 64, 4 * 491_520),
        # Stages of 3, 4, 6 and 3 blocks, two ReLUs each, at 65536, 32768, 16384 and 8192 units.
        ("resnet34", {}, 32, 2 * (3 * 65536 + 4 * 32768 + 6 * 16384 + 3 * 8192)),
        # Two, two, four, four and four convolutions, at 32, 16, 8, 4 and 2 pixels.
        ("vgg19", {}, 32, 2 * 64 * 1024 + 2 * 128 * 256 + 4 * 256 * 64 + 4 * 512 * 16 + 4 * 512 * 4),
        ("vgg19", {"width": 8}, 32, 303_104 // 8),
        # As published for SNL; a group's first block reads the channels and pixels of the one before.
        ("wide_resnet22_8", {}, 32, 1_359_872),
        (
            "wide_resnet22_8",
            {"final_relu": True},
            32,
            (16 + 5 * 128) * 1024 + 128 * 1024 + 5 * 256 * 256 + 256 * 256 + 5 * 512 * 64 + 512 * 64,
        ),
        ("wide_resnet22_8", {"width": 16}, 32, (16 + 5 * 16 + 16) * 1024 + 5 * 32 * 256 + 32 * 256 + 5 * 64 * 64),
        ("cnet", {"width": 14}, 32, 86_016),
        ("cnn", {"width": 16}, 8, 16 * 64 + 32 * 16 + 64 * 4),
    ],
)
def test_relu_counts(name, options, size, count):
    model = build(name, 10, image_size=size, **options)
    assert relu_count(model, torch.zeros(1, 3, size, size)) == count
    masked = mask_relus(model, torch.zeros(1, 3, size, size))
    assert relu_count(masked) == count
    assert sum(total for _, _, total in layer_table(masked)) == count


def test_counting_needs_masks_or_an_example():
    with pytest.raises(FairlineError, match="needs an example"):
        relu_count(nn.Sequential(nn.ReLU()))


def soft(values: list[float], granularity: str = "pixel") -> nn.Module:
    model = mask_relus(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.zeros(1, 1, 1, 3))
    layer = masked_relus(model)["1"]
    layer.learn(granularity).data.copy_(torch.tensor(values).view(layer.weight.shape))
    return model


@settings(max_examples=50)
@given(values=st.lists(st.floats(-1, 2, width=32), min_size=6, max_size=6), budget=st.integers(0, 6))
def test_keep_largest_is_exact_and_keeps_the_largest(values, budget):
    model = soft(values)
    assert keep_largest(model, budget) == budget
    kept = masked_relus(model)["1"].kept.flatten()
    chosen = [v for v, k in zip(values, kept, strict=True) if k]
    dropped = [v for v, k in zip(values, kept, strict=True) if not k]
    assert min(chosen, default=9) >= max(dropped, default=-9)


def test_channels_are_kept_whole_and_fit_the_budget():
    model = soft([0.2, 0.9], "channel")
    assert masked_relus(model)["1"].mask.shape == (2, 1, 3)
    assert keep_largest(model, 5) == 3
    assert masked_relus(model)["1"].kept.tolist() == [[[False] * 3], [[True] * 3]]
    assert keep_largest(soft([0.7], "layer"), 5) == 0
    assert keep_largest(soft([0.7], "layer"), 6) == 6


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9), budget=st.integers(0, 80), unit=st.integers(1, 16))
def test_the_most_that_fits_and_the_first_that_can_be(sizes, budget, unit):
    """Against all choices: the largest sum, then the first entry, then the second, …"""
    sizes = [unit * size for size in sizes]
    assert tuple(fullest(sizes, budget).tolist()) == fullest_of_all(sizes, budget)


def test_many_entries_of_unequal_size_fill_a_budget():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1024, 256, 64, 15])[torch.randint(0, 4, (4000,), generator=generator)].tolist()
    kept = fullest(sizes, 491_527)
    assert int((torch.tensor(sizes) * kept).sum()) == 491_527
    # Only the last entries give way: greedily, the first are kept as well.
    greedy = int((torch.tensor(sizes).cumsum(0) <= 491_527).sum())
    assert kept[: greedy - 100].all()


@pytest.mark.parametrize("granularity", ["pixel", "channel", "layer"])
def test_what_was_cut_before_learning_stays_cut(granularity):
    model = mask_relus(nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU()), torch.zeros(1, 1, 2, 2))
    layer = masked_relus(model)["1"]
    cut = torch.tensor([[[1, 0], [1, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 1]]], dtype=torch.bool)
    layer.set_mask(cut)
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    before = model(x)
    weight = layer.learn(granularity)
    torch.testing.assert_close(model(x), before)
    model(x).square().sum().backward()
    assert (weight.grad[layer.covered() == 0] == 0).all()
    assert int(layer.covered().sum()) == 4
    with torch.no_grad():
        weight.fill_(1.0)
    torch.testing.assert_close(model(x), before)
    assert keep_largest(model, 12) == 4
    assert torch.equal(masked_relus(model)["1"].kept, cut)


def test_masks_survive_a_file_and_refuse_another_model(tmp_path):
    x = torch.zeros(1, 3, 16, 16)
    model = mask_relus(build("cnn", 4, width=4), x)
    for layer in masked_relus(model).values():
        layer.set_mask(torch.rand(layer.shape) < 0.4)
    save_masks(tmp_path / "m", model, method="snl", budget=7, seed=3)
    other = mask_relus(build("cnn", 4, width=4), x)
    info = load_masks(tmp_path / "m", other)
    assert (info.method, info.budget, info.seed) == ("snl", 7, 3)
    assert list(info.layers) == list(masked_relus(model))
    for name, layer in masked_relus(other).items():
        assert torch.equal(layer.kept, masked_relus(model)[name].kept)
    assert relu_count(other) == relu_count(model)
    wider = mask_relus(build("cnn", 4, width=8), x)
    before = relu_count(wider)
    with pytest.raises(FairlineError, match=r"belongs to another model: mask '2' has shape \(4, 16, 16\)"):
        load_masks(tmp_path / "m", wider)
    assert relu_count(wider) == before
    with pytest.raises(FairlineError, match="belongs to another model: layer '2' is not in the model"):
        load_masks(tmp_path / "m", mask_relus(build("resnet18", 4, width=4), x))
    with pytest.raises(FairlineError, match="no fixed masks"):
        save_masks(tmp_path / "n", soft([0.0] * 6), method="snl", budget=7, seed=3)


def test_state_dict_carries_masks_and_their_effect():
    x = torch.randn(3, 3, 16, 16)
    model = mask_relus(build("cnn", 4, width=4), x)
    for layer in masked_relus(model).values():
        layer.set_mask(torch.rand(layer.shape) < 0.5)
    other = mask_relus(build("cnn", 4, width=4), x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert relu_count(other) == relu_count(model)


def test_another_input_size_is_one_sentence():
    model = mask_relus(build("cnn", 4, width=4), torch.zeros(1, 3, 16, 16))
    with pytest.raises(FairlineError, match="mask the model again"):
        model(torch.zeros(1, 3, 24, 24))
