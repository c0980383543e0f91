"""DELPHI's planner and SAFENet: plans, their search, gradual exchange."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD

import fairline as fl
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize import Delphi, Random, SAFENet
from fairline.linearize.base import Linearization
from fairline.linearize.delphi import _Orders
from fairline.linearize.exchange import Exchange
from fairline.linearize.population import Member, _Search
from fairline.linearize.safenet import estimated, loss_moments
from fairline.masking import copy_model, mask_relus, masked_relus, relu_count, surrogate_of
from tests.reference.safenet import channel_estimate

SMALL = {"population": 3, "generations": 2, "period": 0.5, "batch_size": 64}
METHODS = {"delphi": Delphi(**SMALL), "safenet": SAFENet(**SMALL, samples=50)}


def layers_of(model):
    return [layer.num_kept for layer in masked_relus(model).values()]


def run_of(method, trained, data, asked=(200,)):
    start = method.start(trained, data, torch.device("cpu"))
    total = relu_count(start)
    return Linearization(trained.eval(), start, data, total, total, tuple(asked), list(asked), torch.device("cpu"))


def test_whole_layers_keep_relus_and_one_a_part(parts, trained):
    sizes = layers_of(mask_relus(trained, parts[0].normalized(slice(2))))
    for cut in Delphi(**SMALL).linearize(trained, parts[0], [0.9, 0.5, 10]):
        kept = layers_of(cut.model)
        assert sum(kept) == cut.relus == cut.budget
        assert sum(0 < own < size for own, size in zip(kept, sizes, strict=True)) <= 1
        assert len(cut.info["partly"].split()) <= 1
        assert surrogate_of(cut.model) == "quadratic"
    (cut,) = Delphi(**SMALL, exact=False).linearize(trained, parts[0], [0.5])
    assert all(own in (0, size) for own, size in zip(layers_of(cut.model), sizes, strict=True))
    assert cut.relus <= cut.budget
    # No layer is small enough: told, and nothing is kept.
    (cut,) = Delphi(**SMALL, exact=False).linearize(trained, parts[0], [min(sizes) - 1])
    assert cut.relus == 0


def test_whole_channels_keep_relus_as_many_as_fit(parts, trained):
    (cut,) = SAFENet(**SMALL).linearize(trained, parts[0], [0.5])
    assert cut.relus <= cut.budget < cut.relus + 16
    counted = 0
    for layer in masked_relus(cut.model).values():
        for channel in layer.kept:
            assert channel.all() or not channel.any()
            counted += not channel.any()
    assert counted == sum(cut.info[f"channels_{kind}"] for kind in ("zero", "quadratic", "cubic"))
    (cut,) = SAFENet(**SMALL, surrogate="quadratic").linearize(trained, parts[0], [0.5])
    assert all(degree in (0, 2) for layer in masked_relus(cut.model).values() for degree in layer.degrees)


@pytest.mark.parametrize("name", METHODS)
def test_the_populations_scores_are_kept(parts, trained, name):
    rows: list[dict] = []
    cuts = list(METHODS[name].linearize(trained, parts[0], [0.5, 0.2], history=rows, val=parts[1]))
    assert [(row["budget"], row["generation"], row["member"]) for row in rows] == [
        (budget, generation, member) for budget in (224, 90) for generation in (1, 2) for member in (1, 2, 3)
    ]
    for cut in cuts:
        last = [row for row in rows if row["budget"] == cut.budget and row["generation"] == 2]
        right = predict(cut.model, parts[1]).argmax(1) == parts[1].labels
        assert cut.info["accuracy"] == max(row["accuracy"] for row in last)
        assert cut.info["accuracy"] == pytest.approx(float(right.double().mean()))
        assert all(row["relus"] <= cut.budget for row in last)
    # The second generation goes on from the best of the first.
    first, second = ([row for row in rows if row["budget"] == 224 and row["generation"] == g] for g in (1, 2))
    worst = min(first, key=lambda row: row["score"])["member"]
    assert worst not in {row["parent"] for row in second if row["member"] != worst} or len(
        {row["score"] for row in first}
    ) < len(first)
    # And the next budget's begins with the last of the one before.
    assert all(row["parent"] > 0 for row in rows if row["budget"] == 90)


@pytest.mark.parametrize("name", METHODS)
def test_it_resumes_with_the_same_bits_wherever_it_was_cut_off(parts, trained, tmp_path, name, monkeypatch):
    method = METHODS[name]
    whole = list(method.linearize(trained, parts[0], [0.5, 0.2]))
    original, steps = _Search._train, {"left": 4}

    def train(self, *arguments):
        if steps["left"] == 0:
            raise KeyboardInterrupt
        steps["left"] -= 1
        return original(self, *arguments)

    monkeypatch.setattr(_Search, "_train", train)
    for left in (4, 3, 6):
        steps["left"] = left
        try:
            again = list(method.linearize(trained, parts[0], [0.5, 0.2], checkpoint=tmp_path))
        except KeyboardInterrupt:
            continue
    for a, b in zip(whole, again, strict=True):
        assert a.info == b.info
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)
    # Members that nothing goes on from are not kept.
    assert not list(tmp_path.glob("population-*"))


def test_masks_move_from_one_end_to_the_other(parts, trained):
    network = mask_relus(trained, parts[0].normalized(slice(2)), "quadratic")
    layers = masked_relus(network)
    generator = torch.Generator().manual_seed(0)
    starts = {name: torch.rand(layer.shape, generator=generator) < 0.7 for name, layer in layers.items()}
    targets = {name: torch.rand(layer.shape, generator=generator) < 0.3 for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.set_mask(starts[name])
    before = predict(network, parts[2])
    exchange = Exchange(network, targets, 4)
    torch.testing.assert_close(predict(network, parts[2]), before)
    optimizer = SGD([p for p in network.parameters() if p.requires_grad], lr=0.0)
    assert all(layer.weight is not None and not layer.weight.requires_grad for layer in layers.values())
    exchange.follow(optimizer)
    for step in range(1, 6):
        optimizer.step()
        share = min(step / 4, 1)
        for name, layer in layers.items():
            torch.testing.assert_close(layer.mask, torch.lerp(starts[name].float(), targets[name].float(), share))
    after = predict(network, parts[2])
    exchange.finish()
    torch.testing.assert_close(predict(network, parts[2]), after)
    assert all(torch.equal(layer.kept, targets[name]) for name, layer in layers.items())
    at_once = Exchange(network, starts, 0)
    at_once.finish()
    assert all(torch.equal(layer.kept, starts[name]) for name, layer in layers.items())


@settings(max_examples=30)
@given(
    scores=st.lists(st.just(-math.inf) | st.floats(0, 1), min_size=2, max_size=7),
    seed=st.integers(0, 100),
    share=st.floats(0.05, 0.95),
)
def test_the_best_stay_and_the_others_descend_from_them(scores, seed, share):
    method = Delphi(population=len(scores), replaced=share, seed=seed)
    search = object.__new__(_Search)
    search.method = method

    class Counting:
        def changed(self, plan, budget, generator):
            return [*plan, "changed"]

    search.planner = Counting()
    members = [Member((1, 1, place), [place], score) for place, score in enumerate(scores, start=1)]
    found = search._succession(members, 1, 2)
    kept = [member for member, (parent, _) in zip(members, found, strict=True) if parent is member]
    gone = [member for member in members if member not in kept]
    assert kept
    assert gone
    assert min(member.score for member in kept) >= max(member.score for member in gone)
    for member, (parent, plan) in zip(members, found, strict=True):
        assert parent in kept
        assert plan == (member.plan if member in kept else [*parent.plan, "changed"])
        # Nothing goes on from a network that diverged, unless all did.
        assert parent.score >= 0 or max(scores) < 0
    assert [plan for _, plan in search._succession(members, 1, 2)] == [plan for _, plan in found]


@settings(max_examples=40)
@given(budget=st.integers(0, 448), seed=st.integers(0, 1000), exact=st.booleans())
def test_an_order_keeps_what_fits_and_a_change_moves_a_layer(budget, seed, exact):
    sizes = {"a": 256, "b": 128, "c": 64}
    orders = object.__new__(_Orders)
    orders.sizes, orders.exact, orders.seed = sizes, exact, 0
    generator = torch.Generator().manual_seed(seed)
    plan = orders.first(1, generator)
    assert sorted(plan) == sorted(sizes)
    kept = orders.kept(plan, budget)
    assert sum(kept.values()) <= budget
    if exact:
        assert sum(kept.values()) == budget
    else:
        left = budget - sum(kept.values())
        assert all(size > left for name, size in sizes.items() if not kept[name])
    changed = orders.changed(plan, budget, generator)
    assert sorted(changed) == sorted(sizes)
    if 0 < budget < 448 and exact:
        assert orders.kept(changed, budget) != kept


def test_estimates_are_what_a_loop_over_images_finds(parts, trained):
    model = mask_relus(trained, parts[0].normalized(slice(2)))
    data = parts[0].select(torch.arange(12))
    plain, weighted = loss_moments(model, data, 3, samples=12, batch_size=5)
    for name in masked_relus(model):
        for degree in (0, 2, 3):
            found = estimated(plain[name], weighted[name], degree)
            for channel in (0, 2):
                slow = channel_estimate(model, data, name, channel, degree)
                assert float(found[channel]) == pytest.approx(slow, rel=1e-3, abs=1e-9)
    assert not any(layer._forward_hooks for layer in masked_relus(model).values())


def test_channels_that_matter_most_keep_their_relus(parts, trained):
    """With no changes the estimates decide alone; of a budget that the first channels fill, those are kept."""
    method = SAFENet(**SMALL)
    planner = method.planner(run_of(method, trained, parts[0]))
    plan = planner.first(1, torch.Generator())
    network = copy_model(planner.student)
    layers = masked_relus(network)
    sizes = torch.cat([torch.full((len(layer.kept),), layer.kept[0].numel()) for layer in layers.values()])
    values = torch.cat([planner.estimates[name].amin(0) for name in layers]) / sizes
    first = values.argsort(descending=True)[:9]
    masks = planner.arrange(network, plan, int(sizes[first].sum()))
    kept = torch.cat([mask.flatten(1).any(1) for mask in masks.values()])
    assert set(kept.nonzero().flatten().tolist()) == set(first.tolist())
    best = {name: planner.estimates[name].amin(0) for name in layers}
    mean = torch.cat(list(best.values()))[~kept].mean()
    for name, layer in layers.items():
        for channel, degree in enumerate(layer.channel_degrees.tolist()):
            own = planner.estimates[name][:, channel]
            enough = [d for d, value in zip(planner.degrees, own, strict=True) if value <= own.min() + 0.1 * mean]
            assert degree == enough[0]
    # A layer that counts for much more keeps all it has.
    last = next(reversed(plan))
    assert planner.arrange(network, {**plan, last: [100.0, 0.1]}, 192)[last].all()


def test_what_was_cut_before_stays(parts, trained):
    (before,) = Random(surrogate="zero").linearize(trained, parts[0], [300])
    reference = copy.deepcopy(before.model)
    (cut,) = SAFENet(**SMALL).linearize(before.model, parts[0], [150])
    for own, start in zip(masked_relus(cut.model).values(), masked_relus(reference).values(), strict=True):
        assert not (own.kept & ~start.kept).any()
        touched = ~start.kept.flatten(1).all(1)
        assert not own.channel_degrees[touched].any()


def test_a_network_that_diverges_is_no_candidate(parts, trained):
    with pytest.raises(FairlineError, match="none could be trained; take a smaller lr or clip"):
        list(Delphi(**SMALL, lr=1e30, clip=1e30).linearize(trained, parts[0], [0.2]))


def test_a_score_may_count_what_the_network_costs(parts, trained):
    rows: list[dict] = []

    def first_layers_are_dear(model, image):
        names = list(masked_relus(model))
        return lambda kept: float(sum(kept[name] * 10**-place for place, name in enumerate(names)))

    list(Delphi(**SMALL, cost=first_layers_are_dear, price=0.5).linearize(trained, parts[0], [0.3], history=rows))
    whole = first_layers_are_dear(mask_relus(trained, parts[0].normalized(slice(2))), None)
    names = list(masked_relus(mask_relus(trained, parts[0].normalized(slice(2)))))
    sizes = dict(zip(names, layers_of(mask_relus(trained, parts[0].normalized(slice(2)))), strict=True))
    for row in rows:
        assert row["score"] == pytest.approx(row["accuracy"] - 0.5 * row["cost"] / whole(sizes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 1}, "needs population ≥ 2"),
        ({"period": 0}, "needs period > 0"),
        ({"replaced": 1.0}, "replaced and held_out between 0 and 1"),
        ({"clip": 0}, "clip > 0"),
        ({"cost": 3}, "needs a model of the cost, not 3"),
    ],
)
@pytest.mark.parametrize("kind", [Delphi, SAFENet])
def test_bad_settings(kind, options, message):
    with pytest.raises(FairlineError, match=f"{kind.title}.*{message}"):
        kind(**options)


def test_safenet_needs_polynomials():
    with pytest.raises(FairlineError, match="up to surrogate='quadratic' or 'cubic', not 'identity'"):
        SAFENet(surrogate="identity")
    with pytest.raises(FairlineError, match="SAFENet needs samples ≥ 1"):
        SAFENet(samples=0)
    assert fl.SAFENet is SAFENet
    assert fl.Delphi is Delphi
