from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize import CoordinateDescent, Random
from fairline.linearize.coordinate_descent import _Rounds, cached_forward, draw_anywhere, draw_within_a_layer
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from fairline.objectives import ERM, AdaAlpha, Batch, GroupDRO, Lagrangian
from tests.commands import ok
from tests.test_masking import Branching, ImageNetResNet

FAST = {"step": 1, "rate": 0.4, "blocks": 3, "candidates": 3, "batch_size": 64, "refresh_epochs": 1}
WITHIN = {**FAST, "within_layers": True, "held_out": 0.1}


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


def rounds_of(method, model, data, budget):
    """A run that has only begun."""
    return _Rounds(method, method._start(model, data, [budget], torch.device("cpu"), None, None))


def test_a_round_removes_the_set_that_costs_least_accuracy(parts, trained):
    """By hand, with the same random draws: sets over all layers, accuracy on the whole training part."""
    data = parts[0]
    rounds = rounds_of(CoordinateDescent(step=150, candidates=6, tolerance=0.0), trained, data, 298)
    rounds.remove()
    (row,) = rounds.rows

    generator = torch.Generator().manual_seed(1000)
    found = []
    for _ in range(6):
        other = mask_relus(trained, data.normalized(slice(2))).eval()
        gone = torch.zeros(448, dtype=torch.bool)
        gone[torch.randperm(448, generator=generator)[:150]] = True
        for layer, own in zip(masked_relus(other).values(), gone.split([256, 128, 64]), strict=True):
            layer.set_mask(~own.view(layer.shape))
        with torch.no_grad():
            right = (other(data.normalized()).argmax(1) == data.labels).double().mean()
        found.append((float(right), kept(other)))
    # Of equals the first one.
    best = max(found, key=lambda pair: pair[0])
    assert torch.equal(kept(rounds.run.student), best[1])
    assert row["accuracy_when_removed"] == pytest.approx(best[0])
    with torch.no_grad():
        before = float((trained.eval()(data.normalized()).argmax(1) == data.labels).double().mean())
    assert row["tried"] == next((i for i, (right, _) in enumerate(found, 1) if right > before), 6)


def test_a_set_within_the_tolerance_is_taken_at_once(parts, trained):
    rounds = rounds_of(CoordinateDescent(step=10, candidates=50, tolerance=1.0), trained, parts[0], 438)
    rounds.remove()
    assert rounds.rows[0]["tried"] == 1
    assert (~kept(rounds.run.student)).sum() == 10


def test_sets_are_drawn_over_all_layers():
    masks = {"a": torch.ones(30, dtype=torch.bool), "b": torch.arange(20).view(4, 5) >= 10}
    generator = torch.Generator().manual_seed(0)
    draws = [draw_anywhere(masks, 8, generator) for _ in range(500)]
    gone = torch.stack([torch.cat([(masks[name] & ~draw[name]).flatten() for name in masks]) for draw in draws])
    assert (gone.sum(1) == 8).all()
    assert all((draw[name] <= masks[name]).all() for draw in draws for name in masks)
    # Each of the 40 goes in a fifth of the draws: 100 of 500, with a standard deviation of 9.
    there = torch.cat([mask.flatten() for mask in masks.values()])
    assert (gone.sum(0)[there] - 100).abs().max() < 45


def test_a_round_within_a_layer_removes_the_best_of_its_candidates(parts, trained):
    """By hand, with the same random draws and whole forward passes."""
    data = parts[0]
    method = CoordinateDescent(step=50, candidates=5, batch_size=10_000, within_layers=True)
    rounds = rounds_of(method, trained, data, 398)
    rounds.remove()
    # A block ends where its layer does; the next one then takes what is missing.
    assert rounds.rows[0]["tried"] % 5 == 0

    generator = torch.Generator().manual_seed(1000)
    index = torch.randperm(len(data), generator=generator)
    batch = Batch(data.normalized(index), data.labels[index], data.groups[index], index)
    losses = []
    trained.eval()
    with torch.no_grad():
        for _ in range(5):
            other = mask_relus(trained, data.normalized(slice(2))).eval()
            name, units = draw_within_a_layer(masked_relus(other), 50, generator)
            mask = masked_relus(other)[name].kept.flatten()
            mask[units] = False
            masked_relus(other)[name].set_mask(mask.view(masked_relus(other)[name].shape))
            found = float(ERM().losses(other(batch.images), trained(batch.images), batch).mean())
            losses.append((found, kept(other)))
    best = min(losses, key=lambda pair: pair[0])
    assert rounds.rows[0]["loss_when_removed"] == pytest.approx(best[0], rel=1e-4)
    assert torch.equal(kept(rounds.run.student), best[1])


@pytest.mark.parametrize("settings", [FAST, WITHIN])
def test_budgets_are_exact_and_nested_without_training(parts, trained, settings):
    method = CoordinateDescent(**{**settings, "refresh_epochs": 0})
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
    """Each rule by what it goes by: accuracy, and within layers the loss."""

    def measured(model):
        logits = predict(model, parts[0])
        loss = float(nn.functional.cross_entropy(logits, parts[0].labels))
        return float((logits.argmax(1) == parts[0].labels).double().mean()), -loss

    anywhere = CoordinateDescent(refresh_epochs=0, step=40, candidates=12, tolerance=0.0)
    within = CoordinateDescent(
        refresh_epochs=0, step=1, rate=0.2, blocks=8, candidates=24, batch_size=64, within_layers=True, held_out=0.1
    )
    for place, (method, budget) in enumerate([(anywhere, 0.05), (within, 0.3)]):
        (best,) = method.linearize(trained, parts[0], [budget])
        chance = [next(Random(seed=seed).linearize(trained, parts[0], [budget])).model for seed in range(5)]
        assert measured(best.model)[place] > sum(measured(model)[place] for model in chance) / len(chance)


@pytest.mark.parametrize("settings", [{**FAST, "refresh_epochs": 3}, WITHIN])
def test_an_interrupted_run_goes_on(parts, trained, tmp_path, settings):
    budgets = [0.6, 0.3, 0.1]

    def method():
        return CoordinateDescent(**settings, objective=Lagrangian(mu=0.1))

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


def test_a_refresh_is_distillation_with_a_cosine(parts, trained):
    """One round, against a loop written out."""
    data = parts[0]
    method = CoordinateDescent(step=50, candidates=1, refresh_epochs=3, lr=0.02, batch_size=64)
    (cut,) = method.linearize(trained, data, [398])

    rounds = rounds_of(method, trained, data, 398)
    rounds.remove()
    student = rounds.run.student.train()
    targets = trained.eval()(data.normalized()).detach()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 + math.cos(math.pi * epoch / 3)) / 2
        for index in torch.randperm(len(data), generator=generator).split(64):
            batch = Batch(data.normalized(index), data.labels[index], data.groups[index], index)
            optimizer.zero_grad()
            ERM().losses(student(batch.images), targets[index], batch).mean().backward()
            optimizer.step()
    for mine, theirs in zip(cut.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [FAST, WITHIN])
def test_an_objective_remembers_through_all_rounds(parts, trained, settings):
    """λ of Algorithm 1 and the weights of GroupDRO; they would be 0 and equal again in every round."""
    history: list[dict[str, float]] = []
    (fair,) = CoordinateDescent(**settings, objective=Lagrangian(mu=0.5)).linearize(
        trained, parts[0], [0.2], history=history
    )
    names = [key for key in history[0] if key.startswith("lambda[")]
    lambdas = torch.tensor([[row[name] for name in names] for row in history])
    assert len(history) > 2
    assert (lambdas.diff(dim=0) >= 0).all()
    assert (lambdas[-1] > lambdas[0]).all()
    (plain,) = CoordinateDescent(**settings).linearize(trained, parts[0], [0.2])
    weights = [torch.cat([p.flatten() for p in cut.model.parameters()]) for cut in (fair, plain)]
    assert not torch.equal(*weights)
    rows: list[dict[str, float]] = []
    list(CoordinateDescent(**settings, objective=GroupDRO(step=0.1)).linearize(trained, parts[0], [0.2], history=rows))
    spread = [max(w) - min(w) for w in ([v for k, v in row.items() if k.startswith("weight[")] for row in rows)]
    assert spread == sorted(spread)
    assert spread[-1] > 2 * spread[0]


def test_on_the_command_line(runs, tmp_path):
    options = ["--method", "coordinate_descent", "--budgets", "0.5,20", "--option", "step=100"]
    options += ["--option", "refresh_epochs=1", "--option", "candidates=5"]
    out = ok("linearize", runs / "base", *options, "--out", tmp_path / "cut")
    assert "20 of 448 ReLUs" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.0}, r"rate and held_out in \[0, 1\)"),
        ({"held_out": -0.1}, r"rate and held_out in \[0, 1\)"),
        ({"step": 0}, "step ≥ 1"),
        ({"tolerance": 2.0}, r"tolerance in \[0, 1\]"),
        ({"samples": 0}, "samples ≥ 1"),
        ({"empty_layers": 0.2}, "set within_layers beside empty_layers"),
        ({"candidates": 0}, "candidates ≥ 1"),
        ({"lr": 0.0}, "lr > 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        CoordinateDescent(**options)


def test_too_few_images(parts, trained):
    with pytest.raises(FairlineError, match="5 images are too few"):
        list(CoordinateDescent(held_out=0.1).linearize(trained, parts[0].select(torch.arange(5)), [0.5]))


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("with_val", [False, True])
def test_blocks_are_tried_under_an_objective_that_sees_the_teacher(parts, trained, epochs, with_val):
    """Before any training has shown it."""
    method = CoordinateDescent(**{**WITHIN, "refresh_epochs": epochs, "step": 100}, objective=AdaAlpha())
    val = parts[1] if with_val else None
    (cut,) = method.linearize(trained, parts[0], [200], val=val)
    assert cut.relus == 200
