from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fairline.errors import FairlineError
from fairline.masking import masked_relus
from fairline.report.theory import figure_2, figure_10, rate
from fairline.theory import toy


@pytest.fixture(scope="module")
def small() -> toy.Toy:
    return toy.run(3, majority=150, minority=30, width=6, depth=1, steps=150, grid=12)


def test_points_lie_on_their_side():
    points, labels = toy.sample(300, 40, torch.Generator().manual_seed(0))
    assert len(points) == len(labels) == 340
    assert labels.sum() == 40
    assert (points.abs() <= 1).all()
    assert torch.equal(points[:, 1] > toy.boundary(points[:, 0]), labels > 0.5)


def test_half_of_each_layer_is_linearized():
    cut = toy.linearized(toy.network(0, 8, 2))
    assert [layer.num_kept for layer in masked_relus(cut).values()] == [4, 4]
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (cut, toy.network(0, 8, 2))]
    assert torch.equal(*weights)


def test_training_together_is_training_one_by_one():
    starts = [toy.network(seed, 5, 1) for seed in range(2)]
    points = torch.stack([toy.sample(40, 10, torch.Generator().manual_seed(seed))[0] for seed in range(2)])
    labels = torch.cat([torch.zeros(40), torch.ones(10)])
    template = toy.linearized(starts[0])
    together = toy._train(template, starts, points, labels, 30, 0.01, lambda step: None)
    for seed in range(2):
        model = toy.linearized(toy.network(seed, 5, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        for _ in range(30):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(points[seed])[:, 0], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(
            together(points[seed])[seed], model(points[seed])[:, 0].detach(), rtol=1e-3, atol=1e-4
        )


def test_tables(small):
    assert set(small.accuracy["variant"]) == set(toy.VARIANTS)
    assert len(small.accuracy) == 6
    row = small.accuracy.iloc[0]
    assert row["global"] == pytest.approx((150 * row["majority"] + 30 * row["minority"]) / 180)
    assert set(small.shares) == set(toy.VARIANTS)
    for share in small.shares.values():
        assert share.shape == (12, 12)
        assert ((share >= 0) & (share <= 1)).all()
        # The minority lives above: more networks say so there.
        assert share[-1].mean() > share[0].mean()
    summary = small.summary().set_index(["variant", "measure"])
    wide = small.accuracy.pivot_table(index="seed", columns="variant", values="minority")
    difference = (wide[toy.VARIANTS[1]] - wide[toy.VARIANTS[0]]).to_numpy()
    low, high = stats.t.interval(0.95, 2, difference.mean(), stats.sem(difference))
    found = summary.loc[("difference", "minority")]
    np.testing.assert_allclose(found[["mean", "low", "high"]].astype(float), [difference.mean(), low, high], rtol=1e-6)


def test_the_same_seeds_give_the_same_numbers(small):
    again = toy.run(3, majority=150, minority=30, width=6, depth=1, steps=150, grid=12)
    assert again.accuracy.equals(small.accuracy)


def test_bad_input():
    with pytest.raises(FairlineError, match="needs two of them"):
        toy.run(1)
    with pytest.raises(FairlineError, match="Both groups need a training point"):
        toy.run(2, minority=0)


def test_figures_are_valid_charts(small):
    for chart in (figure_2(small), figure_10(), rate()):
        assert chart.to_dict()["$schema"]


@pytest.mark.slow
def test_over_100_seeds_half_the_relus_cost_the_minority_more():
    summary = toy.run(100).summary().set_index(["variant", "measure"])
    minority, majority = (summary.loc[("difference", group)] for group in ("minority", "majority"))
    assert minority["high"] < 0
    assert minority["mean"] < 3 * majority["mean"]
