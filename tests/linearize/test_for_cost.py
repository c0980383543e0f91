"""Layers emptied for what a network costs: the search against closed forms, and every method behind it."""

from __future__ import annotations

from dataclasses import fields, replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairline.cli.options import COST_MEASURES
from fairline.compiler import MEASURES, PredictedCost
from fairline.data import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.jobs.linearize import placement_of
from fairline.linearize import ForCost, Magnitude, Random, build, for_cost
from fairline.linearize.for_cost import WORTHWHILE, _Search, spread
from fairline.linearize.structure import blocks_of
from fairline.masking import masked_relus, relu_count
from fairline.models import build as build_model
from fairline.runs import load_info
from tests.commands import LINEARIZE, fairline, ok
from tests.linearize.test_linearized_start import METHODS, TOTAL


def count_layers(model, example):
    """Each layer that keeps a ReLU costs 1."""
    return lambda kept: float(sum(count > 0 for count in kept.values()))


def count_late_layers(model, example):
    """The n-th layer costs n: late ones are dear."""
    order = {name: place for place, name in enumerate(masked_relus(model), start=1)}
    return lambda kept: float(sum(order[name] for name, count in kept.items() if count))


#: Nothing is learned, and every loss of accuracy is allowed.
ANY = {"may_lose": 0.99, "lr": 1e-9, "adapt": 0.2, "batch_size": 64}


def bent(images: int = 400) -> tuple[nn.Module, GroupedData]:
    """A network that knows whether |x| > 1/2 through the ReLUs of its second layer; what enters the others is positive.

    Each of the four layers has eight units. Images are two equal pixels, so x is their value.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (images, 1, 1, 1), generator=generator, dtype=torch.uint8).expand(-1, 1, 1, 2)
    names = ("near", "far"), ("negative", "positive")
    nothing = torch.zeros(images, dtype=torch.long)
    x = GroupedData(values.contiguous(), nothing, nothing, *names).normalized(slice(None)).flatten(1)[:, 0]
    data = GroupedData(values.contiguous(), (x.abs() > 0.5).long(), (x > 0).long(), *names, name="bent")
    first, both_ways, sums = torch.zeros(8, 2), torch.zeros(8, 8), torch.zeros(8, 8)
    first[:, 0] = 1
    both_ways[:4, 0], both_ways[4:, 0] = 1, -1
    sums[:, 0] = sums[:, 4] = 1
    last = torch.zeros(2, 8)
    last[1, 0] = 1
    layers = [
        dense(first, 9.0),  # x + 9
        nn.ReLU(),
        dense(both_ways, torch.tensor([-9.0] * 4 + [9.0] * 4)),  # x and −x
        nn.ReLU(),
        dense(sums, 1.0),  # |x| + 1
        nn.ReLU(),
        dense(torch.eye(8), 1.0),  # |x| + 2
        nn.ReLU(),
        dense(last, torch.tensor([0.0, -2.5])),
    ]
    return nn.Sequential(nn.Flatten(), *layers), data


def dense(weight: torch.Tensor, bias: torch.Tensor | float) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.as_tensor(bias).expand(len(weight)))
    return layer


def test_what_does_nothing_is_emptied_and_what_bends_stays():
    """The cheapest set that loses nothing is the second of four layers alone; how it was found is on record."""
    model, data = bent()
    assert bool((predict(model, data).argmax(1) == data.labels).all())
    history: list[dict[str, object]] = []
    method = Magnitude(for_cost=ForCost(count_layers, may_lose=0.0, lr=1e-9, held_out=0.25))
    cuts = list(method.linearize(model, data, [1.0, 8, 4], history=history))
    assert [cut.relus for cut in cuts] == [32, 8, 4]
    assert cuts[0].info["emptied"] == []
    for cut in cuts[1:]:
        assert cut.info["emptied"] == ["2", "6", "8"]
        assert masked_relus(cut.model)["4"].num_kept == cut.relus
    assert bool((predict(cuts[1].model, data).argmax(1) == data.labels).all())
    # The end, by bisection: two layers may go, three may not. Then the others, each alone, and the best of them.
    assert [(row["emptied"], row["allowed"]) for row in history] == [
        ("", True),
        ("6 8", True),
        ("4 6 8", False),
        ("2 6 8", True),
    ]
    assert [row["measurement"] for row in history] == [1, 2, 3, 4]
    assert [row["layers"] for row in history] == [4, 2, 1, 1]
    assert [row["relus"] for row in history] == [32, 16, 8, 8]
    assert [row["cost[8]"] for row in history] == [row["cost[4]"] for row in history] == [4, 2, 1, 1]
    assert [row["cost"] for row in history] == [1, 0.5, 0.25, 0.25]


def test_candidates_are_measured_on_the_validation_part_where_there_is_one():
    model, data = bent()
    # The same images, all of them told wrongly: what is right there is wrong here.
    mean, std = data.normalization()
    val = replace(data.select(torch.arange(90)), mean=mean, std=std)
    val = replace(val, labels=1 - val.labels)
    history: list[dict[str, object]] = []
    method = Magnitude(for_cost=ForCost(count_layers, may_lose=0.0, lr=1e-9))
    (cut,) = method.linearize(model, data, [8], val=val, history=history)
    assert history[0]["accuracy"] == 0.0
    # Emptied layers lose nothing there.
    assert cut.info["emptied"] == ["4", "6", "8"]
    assert max(row["lost"] for row in history) <= 0


def test_a_record_says_who_pays():
    model, data = bent()
    history: list[dict[str, float]] = []
    method = Random(for_cost=ForCost(count_late_layers, may_lose=0.0, lr=1e-9, held_out=0.25))
    list(method.linearize(model, data, [8], history=history))
    aside = for_cost.set_aside(data, 0.25, 0)[0]
    shares = torch.bincount(aside.groups) / len(aside)
    for row in history:
        groups = [row["accuracy[negative]"], row["accuracy[positive]"]]
        assert row["accuracy"] == pytest.approx(float(shares @ torch.tensor(groups).float()))
        assert row["lost"] == pytest.approx(1 - row["accuracy"])
    # Without the bend x and −x add up to nothing, and every image is near.
    broken = next(row for row in history if "4" in str(row["emptied"]).split())
    for group, name in enumerate(aside.group_names):
        near = (aside.labels[aside.groups == group] == 0).float().mean()
        assert broken[f"accuracy[{name}]"] == pytest.approx(float(near))


@settings(max_examples=60)
@given(st.data())
def test_the_search_against_brute_force(drawn):
    """With losses and costs that add up over layers the end is the furthest that is allowed, and nothing exceeds it."""
    layers = [f"layer{stage}.{block}.relu{n}" for stage in (1, 2, 3) for block in (0, 1) for n in (1, 2)]
    lost = {name: drawn.draw(st.integers(0, 30), label=name) for name in layers}
    price = {name: drawn.draw(st.integers(2, 9), label=name) for name in layers}
    limit = drawn.draw(st.integers(0, 100), label="may lose")
    measurements = drawn.draw(st.integers(1, 40), label="measurements")
    search = fake_search(layers, lost, price, limit, measurements)
    search.choose()
    emptied = search.emptied
    assert sum(lost[name] for name in emptied) <= limit
    assert emptied < set(layers)
    assert len(search.measured) == len(set(search.measured)) <= measurements
    # Interrupted after some measurements, it makes the others and chooses the same.
    kept = drawn.draw(st.integers(0, len(search.rows)), label="kept")
    again = fake_search(layers, lost, price, limit, measurements)
    again.saved = {row["emptied"]: row for row in search.rows[:kept]}
    again.choose()
    assert (again.emptied, again.rows, again.measured) == (emptied, search.rows, search.measured[kept:])
    if measurements < 40:
        return
    # The furthest tail of layers that is allowed is within what was emptied.
    tail = 0
    while tail + 1 < len(layers) and sum(lost[name] for name in layers[-tail - 1 :]) <= limit:
        tail += 1
    assert set(layers[len(layers) - tail :]) <= emptied


def fake_search(layers, lost, price, limit, measurements):
    """A search whose accuracies and costs are given."""

    class Fake(_Search):
        def __init__(self) -> None:
            self.layers, self.sizes = layers, dict.fromkeys(layers, 4)
            self.stages = [frozenset(n for n in layers if n.startswith(f"layer{s}")) for s in (1, 2, 3)]
            self.blocks = [frozenset(block) for block in blocks_of(layers)]
            self.emptied, self.known, self.measured = frozenset(), {}, []
            self.rows, self.saved = [], {}
            self.settings = ForCost(count_layers, may_lose=limit / 1000, measurements=measurements)
            self.measuring = range(1000)

        def _enough(self, emptied):
            return emptied < set(layers)

        def price(self, emptied):
            return sum(price[name] for name in layers if name not in emptied) / sum(price.values())

        def _measure(self, emptied, key):
            self.measured.append(key)
            self.known[key] = {"emptied": key, "accuracy": 1 - sum(lost[name] for name in emptied) / 1000}
            self.rows.append(self.known[key])

    return Fake()


def test_few_costly_layers_go_before_many_cheap_ones():
    """Of two blocks that lose as much the dear one goes."""
    layers = ["layer1.0.a", "layer2.0.a", "layer3.0.a"]
    lost = dict(zip(layers, (10, 10, 99), strict=True))
    search = fake_search(layers, lost, dict(zip(layers, (1, 5, 9), strict=True)), limit=10, measurements=20)
    search.choose()
    assert search.emptied == {"layer2.0.a"}


# CryptoNAS builds networks of its own, and refuses.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "cryptonas"])
def test_every_method_works_in_what_is_left(parts, trained, name):
    """The cheapest end keeps the first of three layers, of 256 ReLUs."""
    method = build(name.split()[0], **METHODS[name], for_cost=ForCost(count_late_layers, **ANY))
    cuts = list(method.linearize(trained, parts[0], [1.0, 256, 100, 22]))
    assert [cut.budget for cut in cuts] == [TOTAL, 256, 100, 22]
    assert cuts[0].relus == TOTAL
    for cut in cuts[1:]:
        assert cut.info["emptied"] == ["5", "8"]
        assert masked_relus(cut.model)["2"].num_kept == cut.relus == relu_count(cut.model)
        # Whole channels, or patches, need not fill a budget.
        coarse = "channels" in name or name.startswith("block_relu")
        assert cut.relus <= cut.budget if coarse else cut.relus == cut.budget
        assert cut.total == TOTAL
        assert predict(cut.model, parts[2]).isfinite().all()


def test_the_largest_budget_bounds_what_is_emptied(parts, trained):
    """Of 256, 128 and 64 ReLUs: 300 need the first two layers."""
    (large, _) = Random(for_cost=ForCost(count_layers, **ANY)).linearize(trained, parts[0], [300, 10])
    assert large.info["emptied"] == ["8"]
    with pytest.raises(FairlineError, match=r"400 ReLUs leaves no layer to empty: .* smallest layer has 64"):
        list(Random(for_cost=ForCost(count_layers, **ANY)).linearize(trained, parts[0], [400, 10]))
    # A network that meets its budgets as it is, and one without any ReLU, ask for no choice.
    history: list[dict[str, float]] = []
    whole, none = Random(for_cost=ForCost(count_layers, **ANY)).linearize(
        trained, parts[0], [1.0, 0.0], history=history
    )
    assert (whole.relus, none.relus) == (TOTAL, 0)
    assert history == []


def test_layers_that_are_closed_already_stay_so_and_cost_nothing(parts, trained):
    (half,) = Random(seed=1).linearize(trained, parts[0], [200])
    closed = list(masked_relus(half.model))[1]
    layer = masked_relus(half.model)[closed]
    layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
    history: list[dict[str, float]] = []
    (cut,) = Magnitude(for_cost=ForCost(count_layers, **ANY)).linearize(half.model, parts[0], [20], history=history)
    assert history[0]["layers"] == 2
    assert history[0]["cost[20]"] == 2
    assert cut.info["emptied"] == [list(masked_relus(half.model))[2]]


@pytest.mark.parametrize("name", ["snl", "deepreduce", "magnitude"])
def test_it_resumes_with_the_same_choice(parts, trained, tmp_path, monkeypatch, name):
    def run(history, **more):
        method = build(name, **METHODS[name], for_cost=ForCost(count_layers, **{**ANY, "lr": 0.02}))
        return method.linearize(trained, parts[0], [200, 60], history=history, **more)

    expected: list[dict[str, float]] = []
    whole = list(run(expected))
    adapted = []
    original = _Search._adapt

    def counted(self, network, stage):
        if len(adapted) == 2 and broken:
            raise KeyboardInterrupt
        adapted.append(stage)
        original(self, network, stage)

    monkeypatch.setattr(_Search, "_adapt", counted)
    broken = True
    with pytest.raises(KeyboardInterrupt):
        list(run([], checkpoint=tmp_path))
    broken = False
    again = run([], checkpoint=tmp_path)
    next(again)
    again.close()
    # Two measurements were kept, and what came after was done once.
    assert len(adapted) == 1 + sum("measurement" in row for row in expected)
    history: list[dict[str, float]] = []
    resumed = list(run(history, checkpoint=tmp_path))
    assert len(adapted) == 1 + sum("measurement" in row for row in expected)
    for a, b in zip(whole, resumed, strict=True):
        assert a.info == b.info
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)
    for row in (*history, *expected):
        row.pop("seconds", None)
    pd.testing.assert_frame_equal(pd.DataFrame(history), pd.DataFrame(expected))


def test_a_folder_of_another_choice_is_refused(parts, trained, tmp_path):
    costs = PredictedCost("semi2k", minimise="rounds")

    def run(**more):
        given = {"cost": costs, **ANY, **more}
        return list(Magnitude(for_cost=ForCost(**given)).linearize(trained, parts[0], [50], checkpoint=tmp_path))

    run()
    run()
    for more in ({"may_lose": 0.5}, {"cost": PredictedCost("semi2k", minimise="bytes")}):
        with pytest.raises(FairlineError, match=r"holds checkpoints of another run \(for_cost is"):
            run(**more)
    with pytest.raises(FairlineError, match=r"holds checkpoints of another run \(for_cost is"):
        list(Magnitude().linearize(trained, parts[0], [50], checkpoint=tmp_path))


def test_a_reshaped_network_loses_the_same_layers(parts):
    torch.manual_seed(0)
    model = build_model("resnet18", 3, in_channels=1, image_size=8, width=4)
    order = ["layer4", "layer3", "layer2", "layer1"]
    method = build(
        "deepreduce",
        order=order,
        alphas=(1, 0.5),
        reshape_epochs=0,
        for_cost=ForCost(count_late_layers, measurements=4, **ANY),
    )
    (cut,) = method.linearize(model, parts[0], [150])
    assert "α = 0.5" in cut.info["configuration"]
    emptied = set(cut.info["emptied"])
    assert {"layer2.0.relu1", "layer4.1.relu2"} <= emptied
    assert "layer1.0.relu1" not in emptied
    assert all(layer.num_kept == 0 for name, layer in masked_relus(cut.model).items() if name in emptied)
    assert cut.relus > 0


def test_the_precision_is_the_runs(parts, trained, monkeypatch):
    seen = []
    original = for_cost.finetune

    def finetune(*arguments, precision, **more):
        seen.append(precision)
        return original(*arguments, precision=precision, **more)

    monkeypatch.setattr(for_cost, "finetune", finetune)
    method = Random(precision="bf16", for_cost=ForCost(count_layers, **ANY))
    next(iter(method.linearize(trained, parts[0], [50])))
    assert seen
    assert all(precision.bf16 for precision in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"may_lose": 1.0}, r"may_lose in \[0, 1\)"),
        ({"adapt": 0}, r"adapt in \(0, 1\]"),
        ({"held_out": 0.0}, "held_out between 0 and 1"),
        ({"measurements": 0}, "measurements ≥ 1"),
        ({"lr": 0.0}, "lr > 0"),
        ({"batch_size": 0}, "batch_size ≥ 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        ForCost(count_layers, **options)


def test_what_is_no_choice_of_layers():
    with pytest.raises(FairlineError, match=r"'for_cost' says which layers are emptied \(ForCost\), not 'cheetah'"):
        Magnitude(for_cost="cheetah")
    with pytest.raises(FairlineError, match="need a model of it, not 'cheetah'"):
        ForCost("cheetah")


@given(st.dictionaries(st.text(min_size=1), st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_spreading(sizes, drawn):
    """Every layer gets its share to the next whole ReLU, and never more than it has."""
    total = sum(sizes.values())
    budget = drawn.draw(st.integers(0, total))
    kept = spread(sizes, budget)
    assert sum(kept.values()) == budget
    for name, size in sizes.items():
        assert 0 <= kept[name] <= size
        assert abs(kept[name] - size * budget / total) < 1


def rounded(least, most):
    return st.floats(least, most).map(lambda value: round(value, 4))


DIFFERENT = {
    "may_lose": rounded(0, 0.99),
    "adapt": rounded(0.01, 1),
    "measurements": st.integers(1, 99),
    "held_out": rounded(0.01, 0.99),
    "lr": rounded(0.0001, 1),
    "batch_size": st.integers(1, 999),
    "protocol": st.sampled_from(["cheetah", "semi2k"]),
    "network": st.sampled_from(["lan", "wan"]),
    "minimise": st.sampled_from(["seconds", "bytes", "rounds"]),
    "compiled": st.booleans(),
}


def test_every_setting_of_the_choice_can_differ():
    named = {each.name for kind in (ForCost, PredictedCost) for each in fields(kind)}
    assert named - {"cost"} == DIFFERENT.keys()


@given(*[st.fixed_dictionaries({}, optional=DIFFERENT)] * 2)
def test_placements_are_called_alike_only_if_they_are(one, other):
    """Whatever differs is told; a setting that is given as it is by default is not."""
    first, second = (placement_of({"settings": {}, "for_cost": options}) for options in (one, other))
    assert first.startswith(f"for {one.get('protocol', 'cheetah')}'s {one.get('minimise', 'seconds')}")
    usual = {each.name: each.default for kind in (ForCost, PredictedCost) for each in fields(kind)}
    told = [{k: f"{v:g}" if isinstance(v, float) else v for k, v in (usual | o).items()} for o in (one, other)]
    assert (first == second) == (told[0] == told[1])
    assert placement_of({"settings": {}, "for_cost": {k: usual[k] for k in DIFFERENT}}) == "for cheetah's seconds"


def test_on_the_command_line(runs, tmp_path):
    costs = ["--for-cost", "semi2k", "--minimise", "rounds", "--network", "wan", "--cost-option", "may_lose=0.9"]
    ok("linearize", runs / "base", *LINEARIZE, "--budgets", "0.2,20", *costs, "--out", tmp_path / "early")
    (info, *_) = [load_info(folder) for folder in sorted((tmp_path / "early" / "networks").iterdir())]
    assert info.placement == "for semi2k's rounds network=wan may_lose=0.9"
    rows = pd.read_parquet(tmp_path / "early" / "metrics.parquet")
    measured = rows[rows["measurement"].notna()]
    assert len(measured) > 1
    assert measured["cost"].iloc[0] == 1
    assert {"accuracy[0]", "accuracy[9]"} <= set(rows)
    assert rows["epoch"].notna().any()
    for options, message in (
        (["--network", "wan"], "network: options of masks for a cost need a protocol, --for-cost."),
        (["--for-cost", "morse"], "There is no cost model of 'morse'"),
        (["--for-cost", "delphi"], "No source tells how long delphi takes"),
        (
            ["--for-cost", "cheetah", "--minimise", "relus"],
            "option 'minimise' is seconds, bytes or rounds, not 'relus'.",
        ),
        (["--for-cost", "cheetah", "--cost-option", "loss=1"], "knows no option 'loss'; it takes "),
        (["--for-cost", "cheetah", "--cost-option", "may_lose=some"], "option 'may_lose' is a number, not 'some'"),
        (["--for-cost", "cheetah", "--budgets", "0.99"], "leaves no layer to empty"),
    ):
        done = fairline("linearize", runs / "base", *LINEARIZE, *options, "--out", tmp_path / "bad")
        assert done.returncode == 2
        assert message in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr


def test_what_help_says_is_what_a_cost_may_be():
    assert COST_MEASURES == MEASURES


def test_what_saves_nothing_is_not_tried(parts, trained):
    """Bytes of a cost that knows no layers stay the same."""
    history: list[dict[str, float]] = []
    flat = ForCost(lambda model, example: lambda kept: float(sum(kept.values())), **ANY)
    (cut,) = Random(for_cost=flat).linearize(trained, parts[0], [50], history=history)
    assert cut.info["emptied"] == []
    assert len(history) == 1
    assert 0 < WORTHWHILE < 0.1
