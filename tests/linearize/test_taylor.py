"""Taylor estimates against full matrices in mask coordinates, closed forms, and what a removal does."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fairline.audit.functional import Functional
from fairline.data import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize import Random, Taylor
from fairline.linearize.surrogates import start_masked
from fairline.linearize.taylor import falling, layer_weights, taylor_terms
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from fairline.objectives import GroupDRO
from tests.commands import ok
from tests.reference import curvature
from tests.reference.taylor import InMasks
from tests.test_masking import ImageNetResNet

FAST = {"rate": 0.4, "batch_size": 64}


def kept(model):
    return torch.cat([layer.kept.flatten() for layer in masked_relus(model).values()])


def flat(terms, which):
    return torch.cat([getattr(own, which).flatten() for own in terms.values()])


def tiny(data, surrogate="identity", seed=0, scale=1.0):
    """A few dozen ReLUs in two layers, with BatchNorm, some of them cut, in float64."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    network(data.normalized())
    masked = start_masked(network.eval(), data, surrogate, torch.device("cpu")).double()
    with torch.no_grad():
        masked[-1].weight.mul_(scale)
        for layer in masked_relus(masked).values():
            if surrogate == "quadratic":
                layer.coefficients.add_(0.3 * torch.randn(layer.coefficients.shape))
            layer.set_mask(torch.rand(layer.shape) < 0.6)
    return masked


@pytest.fixture
def few(parts):
    return parts[0].select(torch.arange(12))


@pytest.mark.parametrize("surrogate", ["identity", "quadratic"])
def test_terms_are_gradient_and_diagonal_in_mask_coordinates(few, surrogate):
    masked = tiny(few, surrogate)
    found = taylor_terms(masked, few, batch_size=7)
    twin = InMasks(copy.deepcopy(masked))
    images, labels = few.normalized().double(), few.labels
    there = kept(masked)
    first, second = flat(found, "first"), flat(found, "second")
    assert there.any()
    assert not there.all()
    assert not first[~there].any()
    assert not second[~there].any()
    gradient = -curvature.gradient(twin, images, labels)
    torch.testing.assert_close(first[there], gradient[there])
    ggn = curvature.ggn(twin, images)
    torch.testing.assert_close(second[there], ggn.diagonal()[there] / 2)
    # The products of the audit see the same matrix.
    product = Functional(twin, few).ggn_product(torch.arange(len(few)))
    unit = torch.eye(len(there), dtype=torch.float64)
    torch.testing.assert_close(torch.stack([product(v) for v in unit]), ggn)
    hessian = curvature.hessian(twin, images, labels).diagonal()[there] / 2
    if surrogate == "identity":
        # The logits are piecewise linear in one mask entry.
        torch.testing.assert_close(second[there], hessian)
    else:
        assert (second[there] - hessian).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: build("resnet18", 4, width=2), (3, 16, 16)),
        (lambda: build("vgg19", 4, width=2), (3, 32, 32)),
        (ImageNetResNet, (3, 64, 64)),
    ],
)
def test_first_order_is_the_gradient_that_learned_masks_get(make, shape):
    """Whatever the network, also where activations are changed in place."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    network = make().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Without it inputs are exactly 0, where a ReLU has no one slope.
            nn.init.normal_(module.bias)
    classes = network(images.float()).shape[1]
    labels = torch.arange(6) % classes
    names = tuple(map(str, range(classes)))
    data = GroupedData(images, labels, torch.zeros(6, dtype=torch.int64), names, ("all",), name="images")
    masked = mask_relus(network, data.normalized(slice(2))).eval()
    found = taylor_terms(masked, data, probes=0)
    masks = [layer.learn() for layer in masked_relus(masked).values()]
    loss = F.cross_entropy(masked(data.normalized()), labels)
    for own, gradient in zip(found.values(), torch.autograd.grad(loss, masks), strict=True):
        torch.testing.assert_close(own.first.float(), -gradient, rtol=1e-3, atol=1e-7)
        assert not own.second.any()


def test_the_error_of_one_removal_is_of_third_order(few):
    """Before the last layer, where no kink is crossed: halving how far the logits move divides it by about eight."""
    errors = []
    for scale in (0.5, 0.25, 0.125):
        masked = tiny(few, scale=scale)
        terms = taylor_terms(masked, few)
        images, labels = few.normalized().double(), few.labels
        masked.requires_grad_(False)
        before = F.cross_entropy(masked(images), labels)
        worst = 0.0
        name, layer = list(masked_relus(masked).items())[-1]
        estimate, mask = terms[name].first + terms[name].second, layer.kept
        for unit in mask.nonzero().flatten().tolist():
            without = mask.clone()
            without[unit] = False
            layer.set_mask(without)
            worst = max(worst, float((F.cross_entropy(masked(images), labels) - before - estimate[unit]).abs()))
        errors.append(worst)
    assert errors[-1] > 1e-9
    for larger, smaller in pairwise(errors):
        assert 5 < larger / smaller < 12


def toy(weights, inputs, labels, bias=0.0):
    """Units x ↦ relu(x), one a channel, and two logits: 0, and one that is linear in the units."""
    network = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(len(weights), 2))
    with torch.no_grad():
        network[2].weight.copy_(torch.tensor([[0.0] * len(weights), weights]))
        network[2].bias.copy_(torch.tensor([0.0, bias]))
    images = (10 * torch.tensor(inputs) + 100).round().to(torch.uint8)[:, :, None, None]
    count = len(weights)
    data = GroupedData(
        images,
        torch.tensor(labels),
        torch.zeros(len(labels), dtype=torch.int64),
        ("no", "yes"),
        ("all",),
        mean=(100 / 255,) * count,
        std=(10 / 255,) * count,
    )
    torch.testing.assert_close(data.normalized().flatten(1), torch.tensor(inputs))
    return network, data


def test_closed_form_of_two_classes():
    """(p − y)·w·d + p(1 − p)·(w·d)²/2 of each image."""
    w, bias = [0.7, -1.2], 0.3
    inputs, labels = [[-1.0, 2.0], [-0.5, -3.0], [4.0, -1.0]], [1, 0, 1]
    network, data = toy(w, inputs, labels, bias)
    (found,) = taylor_terms(mask_relus(network, data.normalized()), data).values()
    x = torch.tensor(inputs)
    p = torch.sigmoid(x.relu() @ torch.tensor(w) + bias)[:, None]
    moved = torch.tensor(w) * x.clamp_max(0)
    first = (p - torch.tensor(labels)[:, None]) * moved
    torch.testing.assert_close(found.first.flatten().float(), first.mean(0))
    torch.testing.assert_close(found.per_image.flatten().float(), first.abs().mean(0))
    torch.testing.assert_close(found.second.flatten().float(), (p * (1 - p) * moved**2 / 2).mean(0))


def test_rounds_see_what_two_removals_cost_together():
    """Units 0 and 1 push the same way: either is cheap, both are dear. Unit 2 is dearer, and makes up for 0."""
    network, data = toy([1.0, 1.1, -1.2], [[-1.0, -1.0, -1.0]] * 2, [0, 1])
    masked = mask_relus(network, data.normalized())
    (before,) = taylor_terms(masked, data).values()
    cost = (before.first + before.second).flatten().float()
    torch.testing.assert_close(cost, torch.tensor([1.0, 1.21, 1.44]) / 8)
    (layer,) = masked_relus(masked).values()
    layer.set_mask(torch.tensor([False, True, True])[:, None, None])
    (after,) = taylor_terms(masked, data).values()
    again = (after.first + after.second).flatten().float()
    # What is between two units is w₀·w₁·p(1 − p), to third order.
    torch.testing.assert_close(again[1:] - cost[1:], torch.tensor([1.1, -1.2]) / 4, rtol=0.25, atol=0)
    for rate, left in ((1.0, [False, False, True]), (0.01, [False, True, False])):
        (cut,) = Taylor(rate=rate, refresh_epochs=0, first="signed").linearize(network, data, [1], val=data)
        assert kept(cut.model).tolist() == left


def test_probes_are_unbiased_and_exact_where_there_are_enough(few):
    masked = tiny(few)
    exact = flat(taylor_terms(masked, few, probes=3), "second")
    torch.testing.assert_close(flat(taylor_terms(masked, few, probes=50), "second"), exact)
    draws = torch.stack([flat(taylor_terms(masked, few, probes=1, seed=seed), "second") for seed in range(100)])
    error = draws.std(0) / 10
    assert error.max() > 0
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    again = flat(taylor_terms(masked, few, probes=1, seed=7), "second")
    assert torch.equal(again, draws[7])


def test_batches_change_nothing_and_the_network_stays(few):
    masked = tiny(few)
    state = copy.deepcopy(masked.state_dict())
    whole, pieces = taylor_terms(masked, few), taylor_terms(masked, few, batch_size=3)
    for which in ("first", "per_image", "second"):
        torch.testing.assert_close(flat(whole, which), flat(pieces, which))
    for name, own in whole.items():
        assert own.gradient_norm == pytest.approx(pieces[name].gradient_norm)
        assert own.gradient_square == pytest.approx(pieces[name].gradient_square)
    assert all(torch.equal(state[key], value) for key, value in masked.state_dict().items())
    assert all(parameter.requires_grad for parameter in masked.parameters())


def test_nothing_is_left_to_remove(few):
    masked = tiny(few)
    for layer in masked_relus(masked).values():
        layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
    assert not flat(taylor_terms(masked, few), "first").any()


def test_weights_of_layers(few):
    terms = taylor_terms(tiny(few), few)
    names = list(terms)
    weights = layer_weights(terms, names)
    assert sorted(weights.values()) == pytest.approx([0.1, 1.1])
    raw = [terms[n].gradient_norm * (terms[n].gradient_square + 1e-8) ** 0.5 * (1, 1.2)[i] for i, n in enumerate(names)]
    assert (weights[names[0]] > weights[names[1]]) == (raw[0] > raw[1])
    assert layer_weights({names[0]: terms[names[0]]}, names[:1]) == {names[0]: 1.0}


@given(
    count=st.integers(1, 10**6), shares=st.lists(st.floats(0, 1), min_size=1, max_size=4), rate=st.floats(0.01, 0.99)
)
def test_a_plan_falls_through_every_budget(count, shares, rate):
    budgets = sorted({int(share * count) for share in shares} - {count}, reverse=True)
    if not budgets:
        return
    plan = falling(count, budgets, rate)
    assert set(budgets) <= set(plan)
    assert plan[-1] == budgets[-1]
    for larger, smaller in pairwise([count, *plan]):
        assert smaller < larger
        assert smaller in budgets or smaller >= min(larger * (1 - rate), larger - 1) - 1


@pytest.mark.parametrize(
    "options", [{"rate": 1.0}, {"rate": 0.3, "refresh_epochs": 0}, {"rate": 0.5, "batch_size": 64}]
)
def test_budgets_are_exact_and_nested(parts, trained, options):
    before = copy.deepcopy(trained.state_dict())
    history: list[dict[str, float]] = []
    cuts = list(Taylor(**options).linearize(trained, parts[0], [0.5, 100, 0.1, 0], val=parts[1], history=history))
    assert [cut.relus for cut in cuts] == [224, 100, 45, 0]
    for larger, smaller in pairwise(cuts):
        assert (kept(larger.model) >= kept(smaller.model)).all()
    states = [cut.model.state_dict() for cut in cuts]
    stays = [all(torch.equal(state[key], value) for key, value in before.items()) for state in states]
    assert stays == [options["rate"] == 1 or options.get("refresh_epochs") == 0] * 4
    assert [row["relus"] for row in history] == (
        [] if options["rate"] == 1 else falling(448, [224, 100, 45, 0], options["rate"])
    )


def test_once_is_the_ranking_of_the_estimate(parts, trained):
    train, val = parts[:2]
    (cut,) = Taylor(rate=1.0, samples=10**6).linearize(trained, train, [100], val=val)
    masked = mask_relus(trained, train.normalized(slice(2))).eval()
    terms = taylor_terms(masked, val)
    scores = flat(terms, "first").abs() + flat(terms, "second")
    mask = kept(cut.model)
    assert scores[mask].min() >= scores[~mask].max()


def test_order_first_terms_and_weights(parts, trained):
    val = parts[1]
    masked = mask_relus(trained, val.normalized(slice(2))).eval()
    terms = taylor_terms(masked, val)
    names = list(terms)
    weights = layer_weights(terms, names)
    expected = {
        (): [t.first.abs() + t.second for t in terms.values()],
        (("order", 1),): [t.first.abs() for t in terms.values()],
        (("first", "signed"),): [t.first + t.second for t in terms.values()],
        (("first", "per_image"),): [t.per_image + t.second for t in terms.values()],
        (("weigh_layers", True),): [(terms[name].first.abs() + terms[name].second) * weights[name] for name in names],
    }
    for options, scores in expected.items():
        found = Taylor(**dict(options)).scores(masked, val)
        torch.testing.assert_close(list(found.values()), scores)
    assert len({tuple(torch.cat([t.flatten() for t in scores]).tolist()) for scores in expected.values()}) == 5


def test_a_sample_is_measured_on(parts, trained):
    masks = [
        tuple(
            kept(next(iter(Taylor(rate=1.0, samples=8, seed=seed).linearize(trained, parts[0], [100]))).model).tolist()
        )
        for seed in (0, 0, 1)
    ]
    assert masks[0] == masks[1] != masks[2]


def test_rounds_say_what_was_estimated_and_what_came(parts, trained):
    """One ReLU a round: the two go together."""
    history: list[dict[str, float]] = []
    val = parts[1]
    (cut,) = Taylor(rate=1e-3, refresh_epochs=0, first="signed").linearize(
        trained, parts[0], [400], val=val, history=history
    )
    before = float(F.cross_entropy(predict(trained, val), val.labels))
    after = float(F.cross_entropy(predict(cut.model, val), val.labels))
    assert [row["relus"] for row in history] == list(range(447, 399, -1))
    assert history[0]["held_out_loss"] == pytest.approx(before, abs=1e-5)
    assert sum(row["rise"] for row in history) == pytest.approx(after - before, abs=1e-4)
    assert after < before - 0.05
    # Kinks that one removal crosses are in neither order.
    found = torch.tensor([[row["estimated_rise"], row["rise"]] for row in history])
    assert torch.corrcoef(found.T)[0, 1] > 0.8
    assert (found[:, 0] - found[:, 1]).abs().sum() < 0.5 * found[:, 1].abs().sum()


def test_what_is_measured_on_is_not_trained_on(parts, trained):
    """Labels of the images that are measured on do not reach the weights but through the masks, and others' do."""
    train, val = parts[:2]
    options = {"refresh_epochs": 1, "rate": 0.9, "batch_size": 64}
    (a,) = Taylor(**options).linearize(trained, train, [300], val=val)
    shuffled = replace(val, labels=val.labels.roll(1))
    (b,) = Taylor(**options).linearize(trained, train, [300], val=shuffled)
    assert not torch.equal(kept(a.model), kept(b.model))
    # Without a validation part a share of the training images is set aside.
    (c,) = Taylor(**options).linearize(trained, train, [300])
    assert not torch.equal(next(a.model.parameters()), next(c.model.parameters()))


def test_it_moves_the_loss_less_than_chance_does(parts, trained):
    """This network gains from being linear; what matters to it stays all the same."""
    train, val, test = parts
    before = float(F.cross_entropy(predict(trained, test), test.labels))

    def moved(method):
        (cut,) = method.linearize(trained, train, [0.5], val=val)
        return abs(float(F.cross_entropy(predict(cut.model, test), test.labels)) - before)

    chance = sorted(moved(Random(seed=seed)) for seed in range(5))[2]
    assert moved(Taylor(rate=0.2, refresh_epochs=0)) < chance


@pytest.mark.parametrize(
    ("options", "after"),
    [({}, 1), ({}, 4), ({"refresh_epochs": 0}, 3), ({"rate": 1.0}, 2), ({"objective": GroupDRO()}, 3)],
)
def test_it_resumes_wherever_it_is_broken_off(parts, trained, tmp_path, options, after):
    def run(**more):
        method = Taylor(**{**FAST, **options})
        return method.linearize(trained, parts[0], [300, 120, 40], val=parts[1], **more)

    whole_rows: list[dict[str, float]] = []
    whole = list(run(history=whole_rows))
    seen = []

    class Stop(Exception):
        pass

    def stop(update):
        seen.append(update)
        if len(seen) == after:
            raise Stop

    with pytest.raises(Stop):
        list(run(checkpoint=tmp_path, progress=stop))
    rows: list[dict[str, float]] = []
    for a, b in zip(whole, run(checkpoint=tmp_path, history=rows), strict=True):
        assert a.info == b.info
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)
    timed = {"seconds"}
    strip = [
        [{key: value for key, value in row.items() if key not in timed} for row in table]
        for table in (whole_rows, rows)
    ]
    assert strip[0] == strip[1]


def test_another_validation_part_is_another_run(parts, trained, tmp_path):
    def run(val):
        return list(Taylor(rate=1.0).linearize(trained, parts[0], [100], val=val, checkpoint=tmp_path))

    run(parts[1])
    with pytest.raises(FairlineError, match=r"another run \(its validation images were another"):
        run(parts[1].select(torch.arange(10)))
    with pytest.raises(FairlineError, match=r"another run \(its validation images were another"):
        run(None)


def test_on_the_command_line(runs, tmp_path):
    options = ["--option", "rate=0.6", "--option", "batch_size=64", "--budgets", "100,20"]
    out = ok("linearize", runs / "base", "--method", "taylor", *options, "--out", tmp_path / "cut")
    assert "20 of 448 ReLUs" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "rate in"),
        ({"rate": 1.5}, "rate in"),
        ({"held_out": 1.0}, "held_out in"),
        ({"lr": 0.0}, "lr > 0"),
        ({"order": 3}, "of order 1 or 2, not 3"),
        ({"first": "abs"}, "absolute, per_image, signed, not 'abs'"),
        ({"probes": 0}, "probes ≥ 1"),
        ({"samples": 0}, "samples ≥ 1"),
        ({"batch_size": 0}, "batch_size ≥ 1"),
        ({"refresh_epochs": -1}, "refresh_epochs ≥ 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        Taylor(**options)


def test_too_few_images_to_set_aside(parts, trained):
    with pytest.raises(FairlineError, match="too few to set 10% aside"):
        list(Taylor().linearize(trained, parts[0].select(torch.arange(5)), [100]))
