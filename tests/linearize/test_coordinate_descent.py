from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from fairline.errors import FairlineError
from fairline.linearize import CoordinateDescent, Random
from fairline.linearize.coordinate_descent import _draw_block, cached_forward
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from fairline.objectives import ERM, Batch, GroupDRO
from tests.commands import ok
from tests.test_masking import Branching, ImageNetResNet

FAST = {"rate": 0.4, "blocks": 3, "candidates": 3, "batch_size": 64}


def kept(model):
    return torch.cat([layer.kept.flatten() for layer in masked_relus(model).values()])


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: build("resnet18", 4, width=2), (3, 16, 16)),
        (lambda: build("vgg19", 4, width=2), (3, 32, 32)),
        (ImageNetResNet, (3, 64, 64)),
        (Branching, (4,)),
    ],
)
def test_a_cached_pass_equals_a_whole_one(make, shape):
    """Whatever layer changes, several times over; the ImageNet form adds in place."""
    torch.manual_seed(0)
    masked = mask_relus(make(), torch.zeros(2, *shape)).eval()
    images = torch.randn(3, *shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in masked_relus(masked).values():
            layer.set_mask(torch.rand(layer.shape, generator=generator) < 0.5)
        evaluate = cached_forward(masked, images)
        for _ in range(2):
            for name, layer in masked_relus(masked).items():
                before = layer.kept.clone()
                layer.set_mask(torch.rand(layer.shape, generator=generator) < 0.5)
                torch.testing.assert_close(evaluate(name), masked(images))
                layer.set_mask(before)


def test_what_comes_before_the_layer_is_not_computed_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    masked = mask_relus(model, torch.zeros(2, 1, 8, 8)).eval()
    calls = dict.fromkeys(("1", "3", "5"), 0)
    for name in calls:
        masked.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    evaluate = cached_forward(masked, torch.randn(4, 1, 8, 8))
    # The graph is compared with the network once.
    calls.update(dict.fromkeys(calls, 1))
    evaluate("2")
    evaluate("4")
    assert calls == {"1": 1, "3": 2, "5": 3}


def test_a_round_removes_the_best_of_its_candidates(parts, trained):
    """By hand, with the same random draws and whole forward passes."""
    data = parts[0]
    method = CoordinateDescent(blocks=1, candidates=5, batch_size=10_000)
    student = mask_relus(trained, data.normalized(slice(2)))
    tried, loss = method._remove(student, trained.eval(), data, ERM(), 50, torch.Generator().manual_seed(3))
    assert tried == 5

    generator = torch.Generator().manual_seed(3)
    index = torch.randperm(len(data), generator=generator)
    batch = Batch(data.normalized(index), data.labels[index], data.groups[index], index)
    losses = []
    with torch.no_grad():
        for _ in range(5):
            other = mask_relus(trained, data.normalized(slice(2))).eval()
            name, units = _draw_block(masked_relus(other), 50, generator)
            mask = masked_relus(other)[name].kept.flatten()
            mask[units] = False
            masked_relus(other)[name].set_mask(mask.view(masked_relus(other)[name].shape))
            found = float(ERM().losses(other(batch.images), trained(batch.images), batch).mean())
            losses.append((found, kept(other)))
    best = min(losses, key=lambda pair: pair[0])
    assert loss == pytest.approx(best[0], rel=1e-4)
    assert torch.equal(kept(student), best[1])


def test_budgets_are_exact_and_nested_without_training(parts, trained):
    method = CoordinateDescent(refresh_epochs=0, **FAST)
    history: list = []
    cuts = list(method.linearize(trained, parts[0], [1.0, 0.5, 33, 0], history=history))
    total = cuts[0].total
    assert [cut.relus for cut in cuts] == [total, total // 2, 33, 0]
    for larger, smaller in pairwise(cuts):
        assert (kept(larger.model) >= kept(smaller.model)).all()
    counts = [row["relus"] for row in history]
    assert counts == sorted(counts, reverse=True)
    assert {total // 2, 33, 0} <= set(counts)
    assert all(torch.equal(a, b) for a, b in zip(cuts[-1].model.parameters(), trained.parameters(), strict=True))


def test_it_beats_removing_at_random(parts, trained):
    def loss(model):
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model.eval()(parts[0].normalized()), parts[0].labels))

    greedy = CoordinateDescent(refresh_epochs=0, rate=0.2, blocks=8, candidates=24, batch_size=64)
    (best,) = greedy.linearize(trained, parts[0], [0.3])
    chance = [loss(next(Random(seed=seed).linearize(trained, parts[0], [0.3])).model) for seed in range(5)]
    assert loss(best.model) < sum(chance) / len(chance)


def test_an_interrupted_run_goes_on(parts, trained, tmp_path):
    budgets = [0.6, 0.3, 0.1]

    def method():
        return CoordinateDescent(**FAST)

    whole = list(method().linearize(trained, parts[0], budgets))
    interrupted = method().linearize(trained, parts[0], budgets, checkpoint=tmp_path)
    next(interrupted)
    interrupted.close()
    resumed = list(method().linearize(copy.deepcopy(trained), parts[0], budgets, checkpoint=tmp_path))
    assert [cut.relus for cut in resumed] == [cut.relus for cut in whole]
    for a, b in zip(whole, resumed, strict=True):
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)
    finished = list(method().linearize(trained, parts[0], budgets, checkpoint=tmp_path))
    assert [cut.relus for cut in finished] == [cut.relus for cut in whole]


def test_it_refreshes_under_an_objective(parts, trained):
    (fair,) = CoordinateDescent(objective=GroupDRO(), **FAST).linearize(trained, parts[0], [0.5])
    (plain,) = CoordinateDescent(**FAST).linearize(trained, parts[0], [0.5])
    weights = [torch.cat([p.flatten() for p in cut.model.parameters()]) for cut in (fair, plain)]
    assert not torch.equal(*weights)


def test_on_the_command_line(runs, tmp_path):
    options = ["--method", "coordinate_descent", "--budgets", "0.5,20", "--option", "rate=0.5"]
    out = ok("linearize", runs / "base", *options, "--out", tmp_path / "cut")
    assert "20 of 448 ReLUs" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.0}, "between 0 and 1"),
        ({"held_out": 0.0}, "between 0 and 1"),
        ({"candidates": 0}, "candidates ≥ 1"),
        ({"lr": 0.0}, "lr > 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        CoordinateDescent(**options)


def test_too_few_images(parts, trained):
    with pytest.raises(FairlineError, match="5 images are too few"):
        list(CoordinateDescent().linearize(trained, parts[0].select(torch.arange(5)), [0.5]))
