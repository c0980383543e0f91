"""Shapley values against all orders and the axioms, budgets divided by them, and the networks that come of it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from fairline.errors import FairlineError
from fairline.linearize import Shapley, Taylor
from fairline.linearize.division import divided
from fairline.linearize.shapley import measurements, shapley_values
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from tests.reference.taylor import accuracy_with, shapley


def game(count, seed, linear=False):
    """Players and the worth of each set of them, with what was asked for."""
    generator = torch.Generator().manual_seed(seed)
    players = [f"layer{i}" for i in range(count)]
    table = torch.randn(2**count, generator=generator, dtype=torch.float64).tolist()
    single = torch.randn(count, generator=generator, dtype=torch.float64).tolist()
    asked = Counter()

    def worth(players_in):
        asked[players_in] += 1
        places = [i for i, name in enumerate(players) if name in players_in]
        return sum(single[i] for i in places) if linear else table[sum(2**i for i in places)]

    return players, worth, asked


@given(count=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_enumerated_values_are_means_over_all_orders(count, seed):
    players, worth, _ = game(count, seed)
    values, errors = shapley_values(players, worth, permutations=1000)
    assert values == pytest.approx(shapley(players, worth))
    assert not any(errors.values())


@given(count=st.integers(1, 9), seed=st.integers(0, 10**6), permutations=st.integers(1, 9))
def test_values_add_up(count, seed, permutations):
    """Efficiency, enumerated or drawn; and no set is outside of what was announced."""
    players, worth, asked = game(count, seed)
    values, _ = shapley_values(players, worth, permutations=permutations, seed=seed)
    assert len(asked) <= measurements(count, permutations)
    assert sum(values.values()) == pytest.approx(worth(frozenset(players)) - worth(frozenset()), abs=1e-9)


@given(count=st.integers(2, 9), seed=st.integers(0, 10**6))
def test_what_only_adds_is_its_own_value(count, seed):
    """Linear games are exact from any orders, and nobody's player has the value 0."""
    players, worth, _ = game(count, seed, linear=True)
    values, _ = shapley_values([*players, "nobody"], worth, permutations=2, seed=seed)
    assert values == pytest.approx({**{name: worth(frozenset({name})) for name in players}, "nobody": 0.0}, abs=1e-9)


def test_players_that_do_the_same_have_the_same():
    def worth(players):
        return float(("a" in players or "b" in players) and "c" in players) + 0.1 * len(players) ** 2

    values, _ = shapley_values(["a", "b", "c", "d"], worth)
    assert values["a"] == pytest.approx(values["b"])
    assert values["c"] > values["a"] > values["d"]


def test_drawn_orders_come_near_within_their_standard_error():
    players, worth, _ = game(9, seed=3)
    exact, _ = shapley_values(players, worth, permutations=10**6)
    drawn, errors = shapley_values(players, worth, permutations=60, seed=1)
    assert drawn != exact
    for name in players:
        assert 0 < errors[name] < 1
        assert abs(drawn[name] - exact[name]) < 4.5 * errors[name]
    assert shapley_values(players, worth, permutations=60, seed=1) == (drawn, errors)
    assert shapley_values(players, worth, permutations=60, seed=2)[0] != drawn
    # One pair has no spread.
    assert all(math.isnan(error) for error in shapley_values(players, worth, permutations=2)[1].values())


def test_reverse_orders_help():
    """Where two players' effects interact in pairs, an order and its reverse are exact."""
    names = [str(i) for i in range(8)]
    pairs = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def worth(players):
        index = torch.tensor([int(name) for name in players], dtype=torch.int64)
        return float(pairs[index][:, index].sum())

    exact, _ = shapley_values(names, worth, permutations=10**6)
    drawn, errors = shapley_values(names, worth, permutations=4)
    assert drawn == pytest.approx(exact)
    assert max(errors.values()) < 1e-9


@given(layers=st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 40)), min_size=1, max_size=6), share=st.floats(0, 1))
@example(layers=[(0.0, 1), (5e-324, 1)], share=1.0)
def test_budgets_are_exact_and_in_proportion(layers, share):
    need = {str(i): value for i, (value, _) in enumerate(layers)}
    sizes = {str(i): size for i, (_, size) in enumerate(layers)}
    budget = round(share * sum(sizes.values()))
    given_ = divided(need, sizes, budget)
    assert sum(given_.values()) == budget
    assert all(0 <= given_[name] <= size for name, size in sizes.items())
    wanted = [name for name in need if need[name] > 1e-3]
    if sum(sizes[name] for name in wanted) >= budget and wanted:
        # Nobody who needs nothing gets any, but for what rounding leaves.
        assert sum(given_[name] for name in need if need[name] <= 0) <= len(need)
    for a in wanted:
        for b in wanted:
            if given_[a] < sizes[a] and given_[b] < sizes[b]:
                assert given_[a] <= (given_[b] + 2) * need[a] / need[b] + 2


@pytest.mark.parametrize("options", [{}, {"worth": "loss"}, {"within": "magnitude"}, {"within": "random"}])
def test_networks_have_what_the_values_give(parts, trained, options):
    train, val = parts[:2]
    rows: list[dict[str, float]] = []
    cuts = list(Shapley(**options).linearize(trained, train, [0.5, 100, 20, 0], val=val, history=rows))
    assert [cut.relus for cut in cuts] == [224, 100, 20, 0]
    masked = mask_relus(trained, train.normalized(slice(2)))
    layers = {name: layer.kept.numel() for name, layer in masked_relus(masked).items()}
    values = {row["player"]: row["shapley"] for row in rows}
    assert list(values) == list(layers)
    if options.get("worth") != "loss":

        @cache
        def worth(players):
            return accuracy_with(copy.deepcopy(masked), players, val.normalized(), val.labels)

        assert values == pytest.approx(shapley(list(layers), worth))
    for cut in cuts:
        counts = {name: layer.num_kept for name, layer in masked_relus(cut.model).items()}
        assert counts == cut.info["layer_budgets"] == divided(values, layers, cut.budget)
        state = trained.state_dict()
        assert all(torch.equal(cut.model.state_dict()[key], value) for key, value in state.items())
    scores = Taylor(samples=2000).scores(masked.eval(), val)
    for name, layer in masked_relus(cuts[0].model).items():
        if not options.get("within") and 0 < layer.num_kept < layer.kept.numel():
            assert scores[name][layer.kept].min() >= scores[name][~layer.kept].max()


def test_stages(parts):
    torch.manual_seed(0)
    model = build("resnet18", 3, in_channels=1, image_size=8, width=2)
    (by_stage,) = Shapley(players="stage").linearize(model, parts[0], [0.2], history=(rows := []))
    assert [row["player"] for row in rows] == ["layer1", "layer2", "layer3", "layer4"]
    assert by_stage.relus == by_stage.budget
    assert not any(row["standard_error"] for row in rows)
    names = "layer1,layer2"
    (two,) = Shapley(players="stage", stages=names).linearize(model, parts[0], [0.2], history=(rows := []))
    assert [row["player"] for row in rows] == ["layer1", "layer2"]
    assert two.relus == two.budget
    with pytest.raises(FairlineError, match="no stage 'tail'"):
        list(Shapley(players="stage", stages=["tail"]).linearize(model, parts[0], [0.2]))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(FairlineError, match="named like a stage"):
        list(Shapley(players="stage").linearize(flat, parts[0], [2]))


def test_it_resumes_without_measuring_again(parts, trained, tmp_path):
    class Stop(Exception):
        pass

    updates = []

    def progress(update):
        updates.append(update)
        if len(updates) == 3:
            raise Stop

    def run(**more):
        return Shapley(seed=1).linearize(trained, parts[0], [100, 40], val=parts[1], **more)

    whole = list(run())
    with pytest.raises(Stop):
        list(run(checkpoint=tmp_path, progress=progress))
    again: list = []
    for a, b in zip(whole, run(checkpoint=tmp_path, progress=again.append), strict=True):
        assert a.info == b.info
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)
    values = [update for update in again if update.stage == "shapley values"]
    assert len(values) == 2**3 - 3
    finished: list = []
    list(run(checkpoint=tmp_path, progress=finished.append))
    assert all(update.stage == "shapley masks" for update in finished)


def test_a_loss_without_a_mean(parts, trained):
    with torch.no_grad():
        trained[-1].weight.fill_(float("inf"))
    with pytest.raises(FairlineError, match=r"alone the loss is nan.*worth='accuracy'"):
        list(Shapley(worth="loss").linearize(trained, parts[0], [100]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"players": "channel"}, "players layer or stage, not 'channel'"),
        ({"worth": "recall"}, "worth accuracy or loss"),
        ({"within": "snl"}, "within taylor or magnitude or random"),
        ({"permutations": 0}, "permutations ≥ 1"),
        ({"samples": 0}, "samples ≥ 1"),
        ({"held_out": 0.0}, "held_out in"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        Shapley(**options)
