from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairline import FairlineError, SENet
from fairline.inference import predict
from fairline.linearize.senet import ActivationGap, _Runs, differences, layer_budgets, weights_before
from fairline.masking import mask_relus, masked_relus, relu_count, surrogate_of
from fairline.models import build
from tests.commands import ok

TOTAL = 4 * 64 + 8 * 16 + 16 * 4
FAST = {"sensitivity_epochs": 2, "mask_epochs": 2, "epochs": 1, "beta": 0.1, "batch_size": 64, "samples": 50}


def kept(model):
    return torch.cat([layer.kept.flatten() for layer in masked_relus(model).values()])


def test_weights_before_a_relu_are_those_that_reach_it_linearly():
    masked = mask_relus(build("resnet18", 4, image_size=16, width=2), torch.zeros(2, 3, 16, 16))
    found = weights_before(masked)
    assert found["layer1.0.relu1"] == ["layer1.0.conv1"]
    # No ReLU follows the stem, so it reaches the sum as well.
    assert found["layer1.0.relu2"] == ["conv1", "layer1.0.conv2"]
    assert found["layer1.1.relu2"] == ["layer1.1.conv2"]
    assert found["layer2.0.relu2"] == ["layer2.0.conv2", "layer2.0.shortcut.0"]
    vgg = mask_relus(build("vgg19", 4, width=2), torch.zeros(2, 3, 32, 32))
    assert weights_before(vgg)["stage2.2"] == ["stage2.0"]


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(64, 3), nn.ReLU()

    def forward(self, x):
        x = self.linear(x.flatten(1))
        return self.relu(x) if float(x.sum()) > -1e9 else x


def test_models_that_it_cannot_act_on(parts):
    with pytest.raises(FairlineError, match=r"SENet cannot act on Untraceable: torch.fx cannot trace it"):
        list(SENet(**FAST).linearize(Untraceable(), parts[0], [1]))
    bare = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(64, 3))
    with pytest.raises(FairlineError, match="no ReLU has a layer with weights before it"):
        list(SENet(**FAST).linearize(bare, parts[0], [1]))


def test_budgets_by_hand():
    # Sensitivities 0.9, 0.5 and 0.1 of 150 ReLUs: 90, 50 and 10.
    densities, sizes = {"a": 0.1, "b": 0.5, "c": 0.9}, {"a": 100, "b": 100, "c": 100}
    assert layer_budgets(densities, sizes, 150) == {"a": 90, "b": 50, "c": 10}
    # Of 240, a would get 144: it is full at 100, and 140 go to b and c as 5 : 1, of which b takes 100; c gets the rest.
    assert layer_budgets(densities, sizes, 240) == {"a": 100, "b": 100, "c": 40}
    # By size: 0.9·10, 0.5·100 and 0.1·100 of 69.
    sizes = {"a": 10, "b": 100, "c": 100}
    assert layer_budgets(densities, sizes, 69, "size") == {"a": 9, "b": 50, "c": 10}
    assert layer_budgets({"a": 1.0, "b": 0.2}, {"a": 5, "b": 5}, 8) == {"a": 3, "b": 5}


@settings(max_examples=100)
@given(
    layers=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 200)), min_size=1, max_size=8),
    share=st.floats(0, 1),
    weigh=st.sampled_from(["sensitivity", "size"]),
)
def test_budgets_are_exact_and_fit(layers, share, weigh):
    densities = {str(i): density for i, (density, _) in enumerate(layers)}
    sizes = {str(i): size for i, (_, size) in enumerate(layers)}
    budget = round(share * sum(sizes.values()))
    given_ = layer_budgets(densities, sizes, budget, weigh)
    assert sum(given_.values()) == budget
    assert all(0 <= given_[name] <= sizes[name] for name in sizes)
    # Proportional among layers that are not full, up to rounding.
    free = [name for name in sizes if given_[name] < sizes[name] - 1]
    need = {name: max(1 - densities[name], 1e-9) * (sizes[name] if weigh == "size" else 1) for name in sizes}
    for a in free:
        for b in free:
            assert given_[a] <= (given_[b] + 2) * need[a] / need[b] + 2


def test_stage_1_prunes_to_the_density_and_finds_the_needless_layer(parts):
    """Of two layers one has weights near zero: pruning empties it, so its ReLUs matter most."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[3].weight.mul_(1e-3)
    before = copy.deepcopy(model.state_dict())
    (cut,) = SENet(**{**FAST, "lr": 1e-6, "density": 0.1}).linearize(model, parts[0], [20])
    layers = cut.info["layers"]
    assert sum(layers.values()) == 20
    method = SENet(**{**FAST, "lr": 1e-6, "density": 0.1})
    masked = mask_relus(model, parts[0].normalized(slice(2)))
    run = _Runs(method, model, parts[0], torch.device("cpu"), None)
    densities = method.densities(masked, weights_before(masked), run, None)
    # 10 % of 64·16 + 16·16 weights, all in the first layer (the last map stands before no ReLU).
    assert densities["2"] == pytest.approx(0.1 * (64 * 16 + 16 * 16) / (64 * 16), abs=2e-3)
    assert densities["4"] == pytest.approx(0.0, abs=2e-3)
    assert layers["4"] > layers["2"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_stage_2_compares_activations(parts, trained):
    """Against a loop over images, with masks set by hand."""
    example = parts[0].normalized(slice(2))
    teacher, student = mask_relus(trained, example).eval(), mask_relus(trained, example).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in masked_relus(student).values():
        layer.set_mask(torch.rand(layer.shape, generator=generator) < 0.5)
    found = differences(student, teacher, parts[0], samples=10_000)
    outputs: dict[tuple[str, str], torch.Tensor] = {}
    for kind, network in (("s", student), ("t", teacher)):
        for name, layer in masked_relus(network).items():
            layer.register_forward_hook(lambda _, __, y, key=(kind, name): outputs.update({key: y[0]}))
    sums = {name: torch.zeros(layer.shape) for name, layer in masked_relus(student).items()}
    with torch.no_grad():
        for i in range(len(parts[0])):
            student(parts[0].normalized(slice(i, i + 1)))
            teacher(parts[0].normalized(slice(i, i + 1)))
            for name in sums:
                sums[name] += (outputs["s", name] - outputs["t", name]).abs()
    for name, total in sums.items():
        torch.testing.assert_close(found[name], total / len(parts[0]), rtol=1e-3, atol=1e-5)
    # Where nothing differs before it, a kept ReLU has no difference and a linear one its negative part.
    first = next(iter(sums))
    assert (found[first][masked_relus(student)[first].kept] < 1e-6).all()


def test_stage_2_compares_units_as_if_they_were_linear(parts, trained):
    """By hand: where nothing differs before it, every unit is off by its negative part, kept or not."""
    example = parts[0].normalized(slice(2))
    teacher, student = mask_relus(trained, example).eval(), mask_relus(trained, example).eval()
    first, layer = next(iter(masked_relus(student).items()))
    layer.set_mask(torch.rand(layer.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    found = differences(student, teacher, parts[0], samples=10_000, as_linear=True)[first]
    seen = []
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        student(parts[0].normalized())
    torch.testing.assert_close(found, seen[0].clamp_max(0).abs().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [0.5, 0.1])
def test_the_search_settles(parts, trained, budget):
    """Read to the letter, masks alternate between two sets until the last epoch."""
    settings = {**FAST, "mask_epochs": 12, "epochs": 0}
    history: list[dict[str, float]] = []
    (cut,) = SENet(**settings).linearize(trained, parts[0], [budget], history=history)
    changed = [row["changed"] for row in history]
    assert changed[-1] < SENet().tolerance
    assert len(changed) < 12
    assert cut.relus == round(budget * TOTAL)
    literal: list[dict[str, float]] = []
    list(SENet(**settings, literal=True).linearize(trained, parts[0], [budget], history=literal))
    assert len(literal) == 12
    assert literal[-1]["changed"] > 10 * changed[-1]


class OneByOne(nn.Module):
    """Channels of 16, of 1, and of a vector."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(1, 6, 3, 2, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(6, 7, 4), nn.ReLU()
        self.linear, self.relu3, self.out = nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.out(self.relu3(self.linear(x.flatten(1))))


def test_channels_spend_the_budget_where_some_are_single_units(parts):
    torch.manual_seed(0)
    method = SENet(**{**FAST, "mask_epochs": 1, "epochs": 0}, granularity="channel")
    budgets = [97, 96, 63, 60, 45, 29, 13, 5]
    cuts = list(method.linearize(OneByOne(), parts[0], budgets))
    # Sixteens, and twelve ones to fill what they leave.
    assert [cut.relus for cut in cuts] == [97, 96, 60, 60, 44, 28, 12, 5]
    assert all(sum(cut.info["layers"].values()) == cut.budget for cut in cuts)


def test_stage_2_keeps_the_largest_differences_of_each_layer(parts, trained):
    method = SENet(**{**FAST, "mask_epochs": 1, "lr": 1e-9, "epochs": 0, "samples": 10_000})
    (cut,) = method.linearize(trained, parts[0], [100])
    shares = cut.info["layers"]
    assert {name: layer.num_kept for name, layer in masked_relus(cut.model).items()} == shares


def test_stage_3_the_gap_and_its_gradient(parts, trained):
    example = parts[0].normalized(slice(6))
    teacher, student = mask_relus(trained, example), mask_relus(trained, example)
    for layer in masked_relus(student).values():
        layer.set_mask(torch.rand(layer.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    with ActivationGap(student.eval(), teacher) as gap:
        student(example)
        value = gap()
        value.backward()
    found = student.get_submodule("0").weight.grad.clone()

    def by_hand(network):
        x, y, total = example, example, 0.0
        layers = dict(network.named_children())
        for name, module in trained.eval().named_children():
            x, y = layers[name](x), module(y)
            if isinstance(module, nn.ReLU):
                rows = [
                    F.normalize(a.flatten(), dim=0) - F.normalize(b.flatten(), dim=0) for a, b in zip(x, y, strict=True)
                ]
                total = total + torch.stack([row.norm() for row in rows]).mean()
        return total

    assert value.item() == pytest.approx(by_hand(student).item(), rel=1e-5)
    student.zero_grad()
    by_hand(student).backward()
    torch.testing.assert_close(found, student.get_submodule("0").weight.grad, rtol=1e-4, atol=1e-6)
    # Without masks there is no gap.
    with ActivationGap(mask_relus(trained, example).eval(), teacher) as gap:
        gap.student(example)
        assert gap().item() == 0


def test_the_gap_closes_in_training(parts, trained):
    example = parts[0].normalized()

    def gap_of(beta):
        options = {**FAST, "epochs": 15, "lr": 0.02, "beta": beta, "sensitivity_epochs": 1, "mask_epochs": 1}
        (cut,) = SENet(**options).linearize(trained, parts[0], [60])
        with ActivationGap(cut.model.eval(), mask_relus(trained, example)) as gap, torch.no_grad():
            cut.model(example)
            return float(gap())

    assert gap_of(1.0) < gap_of(0.0)


def test_budgets_are_exact(parts, trained):
    before = copy.deepcopy(trained.state_dict())
    cuts = list(SENet(**FAST).linearize(trained, parts[0], [0.1, 1.0, 0.5, 7, 0]))
    assert [cut.relus for cut in cuts] == [TOTAL, TOTAL // 2, round(0.1 * TOTAL), 7, 0]
    assert all(relu_count(cut.model) == cut.relus for cut in cuts)
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    assert all(predict(cut.model, parts[2]).isfinite().all() for cut in cuts)


def test_channels_are_kept_whole(parts, trained):
    (cut,) = SENet(**FAST, granularity="channel", surrogate="quadratic").linearize(trained, parts[0], [0.5])
    smallest = min(layer.kept[0].numel() for layer in masked_relus(cut.model).values())
    assert TOTAL // 2 - smallest < cut.relus <= TOTAL // 2
    assert surrogate_of(cut.model) == "quadratic"
    for layer in masked_relus(cut.model).values():
        assert all(int(channel.sum()) in (0, channel.numel()) for channel in layer.kept)


def test_a_broken_run_resumes_to_the_same_networks(parts, trained, tmp_path):
    budgets, history, again = [0.5, 0.2], [], []
    whole = list(SENet(**FAST).linearize(trained, parts[0], budgets, history=history))
    broken = SENet(**FAST).linearize(trained, parts[0], budgets, checkpoint=tmp_path)
    next(broken)
    broken.close()

    class Stop(Exception):
        pass

    def breaker(update):
        if update.stage.startswith("SENet training (90") and update.done:
            raise Stop

    with pytest.raises(Stop):
        list(SENet(**FAST).linearize(trained, parts[0], budgets, checkpoint=tmp_path, progress=breaker))
    resumed = list(SENet(**FAST).linearize(trained, parts[0], budgets, checkpoint=tmp_path, history=again))
    for a, b in zip(whole, resumed, strict=True):
        assert a.info == b.info
        assert sum(b.info["layers"].values()) == b.budget
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)
    assert [row["loss"] for row in history] == [row["loss"] for row in again]


def test_on_the_command_line(runs, tmp_path):
    options = ["--method", "senet", "--budgets", "20", "--batch-size", "64"]
    fast = [f"--option={key}={FAST[key]}" for key in ("sensitivity_epochs", "mask_epochs", "epochs", "beta")]
    assert "20 of 448 ReLUs" in ok("linearize", runs / "base", *options, *fast, "--out", tmp_path / "cut")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "layer"}, "pixel or channel, not 'layer'"),
        ({"weigh": "depth"}, "sensitivity or size, not 'depth'"),
        ({"density": 1.0}, "density between 0 and 1"),
        ({"mask_epochs": 0}, "mask_epochs ≥ 1"),
        ({"beta": -1.0}, "beta ≥ 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        SENet(**options)


def test_a_teacher_with_other_relus_is_refused_before_anything_is_trained(parts, trained):
    for teacher in (build("cnn", 3, 1, 8, width=8), build("resnet18", 3, 1, 8, width=2)):
        history: list[dict[str, float]] = []
        with pytest.raises(FairlineError, match="which must have the same ReLUs"):
            list(SENet(**FAST, teacher=teacher).linearize(trained, parts[0], [60], history=history))
        assert not history
