"""Block ReLU: what sizes do is measured as it is defined, and the knapsack takes the best of all choices."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairline import BlockReLU, FairlineError, Magnitude, Random
from fairline.inference import predict
from fairline.linearize.block_relu import LINEAR, first_order, measured, set_patches
from fairline.linearize.knapsack import choose_options
from fairline.linearize.surrogates import start_masked
from fairline.masking import MaskedReLU, copy_model, masked_relus, relu_count
from tests.reference.sharing import best_choice

TOTAL = 448
CPU = torch.device("cpu")


@st.composite
def problems(draw):
    """Items with options, of which one costs nothing, and a budget."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    unit = draw(st.sampled_from([1, 1, 4]))
    costs = [[0, *draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))] for n in sizes]
    losses = [draw(st.lists(st.integers(0, 20).map(float), min_size=len(cost), max_size=len(cost))) for cost in costs]
    return [[unit * each for each in cost] for cost in costs], losses, draw(st.integers(0, 40))


def solved(problem, **options):
    costs, losses, budget = problem
    chosen, exact = choose_options([np.array(c) for c in costs], [np.array(v) for v in losses], budget, **options)
    cost = sum(own[place] for own, place in zip(costs, chosen, strict=True))
    return cost, sum(own[place] for own, place in zip(losses, chosen, strict=True)), exact


@settings(max_examples=100)
@given(problems())
def test_the_knapsack_loses_least_of_all_choices(problem):
    cost, loss, exact = solved(problem)
    assert exact
    assert cost <= problem[2]
    assert loss == pytest.approx(best_choice(*problem))


@settings(max_examples=100)
@given(problems())
def test_the_rounded_relaxation_fits_and_is_one_step_off_at_most(problem):
    """What it lacks is no more than one option of one item; and nothing that fits would be better."""
    costs, losses, budget = problem
    cost, loss, exact = solved(problem, cells=0)
    assert not exact
    assert cost <= budget
    steps = [max(own) - min(own) for own in losses]
    assert loss - best_choice(*problem) <= max(steps) + 1e-9
    assert solved((costs, losses, sum(map(max, costs))), cells=0)[1] == sum(map(min, losses))


def test_what_fits_no_budget_is_said():
    with pytest.raises(FairlineError, match="A budget of 2 is below 3"):
        choose_options([np.array([1, 4]), np.array([2])], [np.array([1.0, 0.0]), np.array([0.0])], 2)


@pytest.fixture
def student(parts, trained):
    return start_masked(trained, parts[0], "identity", CPU)


def test_first_order_distortions_are_what_their_definition_says(parts, student):
    """With each output as a direction of its own they would be exact; here, over signs, their mean is."""
    data, method = parts[0].select(torch.arange(6)), BlockReLU()
    layers = masked_relus(student)
    options = {name: method.options(layer.shape) for name, layer in layers.items()}
    found = first_order(student.eval(), data, options, probes=400, batch_size=4, seed=1)
    images = data.normalized(slice(None))
    for name, layer in layers.items():
        taken: list[torch.Tensor] = []
        handle = layer.register_forward_hook(
            lambda _, x, y, taken=taken: taken.extend([x[0].detach(), y.requires_grad_()])
        )
        logits = student(images)
        handle.remove()
        x, y = taken
        for place in (0, 2, len(options[name]) - 1):
            other = MaskedReLU(layer.shape)
            set_patches(other, [options[name][place]] * layer.shape[0])
            change, expected = other(x) - y.detach(), torch.zeros(layer.shape[0], dtype=torch.float64)
            for output in range(logits.shape[1]):
                (slope,) = torch.autograd.grad(logits[:, output].sum(), y, retain_graph=True)
                expected += (slope * change).flatten(2).sum(2).double().square().mean(0)
            torch.testing.assert_close(found[name][:, place], expected, rtol=0.3, atol=1e-6)
        assert (found[name][:, 0] == 0).all()


def test_measured_distortions_are_those_of_networks_with_one_channel_changed(parts, student):
    data, options = (
        parts[0].select(torch.arange(20)),
        {name: [(1, 1), (2, 4), LINEAR] for name in masked_relus(student)},
    )
    found = measured(student, data, options, batch_size=7)
    before = predict(student, data)
    name = list(masked_relus(student))[1]
    for place, block in enumerate(options[name]):
        network = copy_model(student)
        layer = masked_relus(network)[name]
        set_patches(layer, [(1, 1), (1, 1), block, *[(1, 1)] * (layer.shape[0] - 3)])
        shift = (predict(network, data) - before).double().square().sum(1).mean()
        assert found[name][2, place] == pytest.approx(float(shift), abs=1e-9)
    assert relu_count(student) == TOTAL


def test_both_distortions_rank_alike(parts, student):
    data = parts[0].select(torch.arange(60))
    method = BlockReLU(blocks="1x1,2x2,4x4")
    options = {name: method.options(layer.shape) for name, layer in masked_relus(student).items()}
    fast, slow = first_order(student, data, options, probes=8), measured(student, data, options)
    both = pd.DataFrame({"fast": torch.cat([t[:, 1:].flatten() for t in fast.values()]),
                         "slow": torch.cat([t[:, 1:].flatten() for t in slow.values()])})  # fmt: skip
    assert both.corr("spearman").iloc[0, 1] > 0.8


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "layer"}, {"distortion": "measured", "blocks": "2x2", "samples": 8}]
)
def test_budgets_count_signs_and_the_network_is_what_info_says(parts, trained, options):
    method = BlockReLU(**{"samples": 40, **options})
    cuts = list(method.linearize(trained, parts[0], [1.0, 0.4, 100, 7, 0]))
    assert [cut.budget for cut in cuts] == [TOTAL, 179, 100, 7, 0]
    assert cuts[0].relus == TOTAL
    assert relu_count(cuts[-1].model) == 0
    for cut in cuts[1:]:
        layers = masked_relus(cut.model)
        assert cut.relus == relu_count(cut.model) <= cut.budget
        if not options:
            assert cut.relus == cut.budget
        assert sum(cut.info["blocks"].values()) == sum(layer.shape[0] for layer in layers.values())
        assert cut.info["units"] == sum(int(layer.kept.sum()) for layer in layers.values())
        assert cut.info["exact"]
        if options.get("granularity") == "layer":
            assert all(layer.kept.all() or not layer.kept.any() for layer in layers.values())
    assert cuts[2].info["units"] > cuts[2].relus


def test_fewer_signs_never_distort_less(parts, trained):
    """And shared signs distort less than as many of one unit each."""
    cuts = list(BlockReLU(samples=100, distortion="first_order").linearize(trained, parts[0], [300, 100, 30]))
    before = predict(trained, parts[2])
    shifts = [float((predict(cut.model, parts[2]) - before).square().sum()) for cut in cuts]
    assert shifts == sorted(shifts)
    (alone,) = BlockReLU(samples=100, blocks="1x1").linearize(trained, parts[0], [100])
    assert float((predict(alone.model, parts[2]) - before).square().sum()) > shifts[1]


def test_what_is_cut_stays_cut_and_takes_no_sign(parts, trained):
    (half,) = Random(seed=1).linearize(trained, parts[0], [200])
    (cut,) = BlockReLU(samples=40).linearize(half.model, parts[0], [60])
    assert cut.relus == 60
    for before, after in zip(masked_relus(half.model).values(), masked_relus(cut.model).values(), strict=True):
        assert not (after.kept & ~before.kept).any()


def test_no_method_goes_on_from_shared_signs(parts, trained):
    (cut,) = BlockReLU(samples=40).linearize(trained, parts[0], [100])
    for method in (Magnitude(), Random(), BlockReLU()):
        (same,) = method.linearize(cut.model, parts[0], [0.5])
        assert torch.equal(predict(same.model, parts[2]), predict(cut.model, parts[2]))
        with pytest.raises(FairlineError, match="share signs, 100 for each image; no method goes on from there"):
            list(method.linearize(cut.model, parts[0], [50]))


def test_an_interrupted_run_measures_nothing_again(parts, trained, tmp_path, monkeypatch):
    whole = list(BlockReLU(samples=40).linearize(trained, parts[0], [200, 50]))
    broken = BlockReLU(samples=40).linearize(trained, parts[0], [200, 50], checkpoint=tmp_path)
    next(broken)
    broken.close()
    monkeypatch.setattr("fairline.linearize.block_relu.first_order", None)
    for a, b in zip(
        whole, BlockReLU(samples=40).linearize(trained, parts[0], [200, 50], checkpoint=tmp_path), strict=True
    ):
        assert a.info == b.info
        assert a.model.state_dict().keys() == b.model.state_dict().keys()
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "quadratic"}, "the identity stands, no quadratic"),
        ({"granularity": "pixel"}, "by channel or layer, not 'pixel'"),
        ({"distortion": "l2"}, "first_order or measured, not 'l2'"),
        ({"samples": 0}, "at least 1, not 0, 4 and 64"),
        ({"blocks": "2y2"}, "blocks such as 1x1,2x2,4x4, not 2y2"),
        ({"blocks": [(2, 0)]}, "blocks such as"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(FairlineError, match=message):
        BlockReLU(**options)


def test_sizes_are_those_that_fit():
    assert BlockReLU().options((3, 4, 2))[:4] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert BlockReLU().options((3, 4, 2))[-2:] == [(4, 2), LINEAR]
    assert BlockReLU(blocks="3x3,2x4").options((3, 4, 4)) == [(1, 1), (3, 3), (2, 4), LINEAR]
    assert BlockReLU(blocks=[(3, 3)]).options((3, 2, 2)) == BlockReLU().options((10,)) == [(1, 1), LINEAR]
