"""Objectives that are told no groups."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fairline.errors import FairlineError
from fairline.masking import mask_relus
from fairline.objectives import ARL, Batch, Chi2DRO
from fairline.objectives.chi2_dro import worst_weights
from fairline.training import run_epochs
from tests.objectives.problems import SHARE, solve, two_groups
from tests.reference.objectives import worst_reweighting


@settings(max_examples=60)
@given(
    losses=st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=12),
    factor=st.floats(1.0, 6.0),
)
def test_worst_weights_are_those_of_a_general_solver(losses, factor):
    values = torch.tensor(losses, dtype=torch.float64)
    q = worst_weights(values, factor)
    assert (q >= 0).all()
    assert float(q.sum()) == pytest.approx(1)
    assert float((len(losses) * q - 1).square().mean()) <= factor**2 - 1 + 1e-6
    assert float(q @ values) == pytest.approx(worst_reweighting(losses, factor), rel=1e-4, abs=1e-5)


def test_the_value_is_the_dual_and_the_gradient_the_weights():
    objective = Chi2DRO(alpha_min=0.3)
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    batch = Batch(torch.zeros(50, 1, 2, 2), torch.zeros(50).long(), torch.zeros(50).long(), torch.arange(50))
    value = objective.reduce(losses, batch)
    etas = np.linspace(-5, 1, 60001)
    excess = np.clip(losses.detach().numpy() - etas[:, None], 0, None)
    dual = objective.factor * np.sqrt((excess**2).mean(1)) + etas
    assert float(value.detach()) == pytest.approx(dual.min(), rel=1e-6)
    (gradient,) = torch.autograd.grad(value, losses)
    # The gradient of a maximum over q is the best q: by finite differences.
    for i in (0, 7):
        moved = losses.detach().clone()
        moved[i] += 1e-6
        other = objective.reduce(moved, batch)
        assert float((other - value).detach()) / 1e-6 == pytest.approx(float(gradient[i]), abs=1e-5)


def test_a_group_as_large_as_alpha_is_bounded():
    """Hashimoto et al., Proposition 2: no group of at least that share has a larger mean loss."""
    losses = torch.rand(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 4
    worst_fifth = losses.sort(descending=True).values[:20].mean()
    q = worst_weights(losses, Chi2DRO(alpha_min=0.2).factor)
    assert q @ losses >= worst_fifth
    assert Chi2DRO(alpha_min=1.0).factor == 1.0
    assert worst_weights(losses, 1.0) @ losses == pytest.approx(float(losses.mean()))


def test_ties_and_points():
    assert torch.equal(worst_weights(torch.full((4,), 2.0), 3.0), torch.full((4,), 0.25))
    assert worst_weights(torch.tensor([1.0, 5.0, 5.0, 2.0]), 10.0).tolist() == [0.0, 0.5, 0.5, 0.0]
    assert worst_weights(torch.tensor([3.0]), 2.0).tolist() == [1.0]


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, SHARE), (0.1, 0.5)])
def test_chi2_ends_at_its_optimum(alpha, expected):
    # A ball that holds the minority alone makes the larger of both losses the objective.
    assert solve(Chi2DRO(alpha_min=alpha)) == pytest.approx(expected, abs=0.02)


def test_chi2_between_the_two_extremes():
    """The optimum for 1/2 by brute force over c, with the worst weights from a general solver."""
    labels = two_groups().labels.numpy()[::10]
    factor = Chi2DRO(alpha_min=0.5).factor
    grid = np.linspace(0.05, 0.6, 56)
    best = grid[np.argmin([worst_reweighting((c - labels) ** 2, factor) for c in grid])]
    assert SHARE < best < 0.5 or best == pytest.approx(0.5, abs=0.01)
    assert solve(Chi2DRO(alpha_min=0.5)) == pytest.approx(best, abs=0.02)


def test_the_adversary_finds_the_minority():
    assert solve(ARL(lr=0.05), steps=6000, average=3000) == pytest.approx(0.5, abs=0.03)


def test_one_step_of_arl_written_out():
    data = two_groups()
    objective = ARL(lr=0.1, pixels=2)
    objective.start(data)
    index = torch.arange(10, 40)
    batch = Batch(data.normalized(index), data.labels[index], data.groups[index], index)
    losses = torch.rand(30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.equal(objective.weights(batch), torch.ones(30))
    value = objective.reduce(losses, batch)
    torch.testing.assert_close(value, losses.mean())
    with torch.no_grad():
        objective.adversary.weight.normal_(generator=torch.Generator().manual_seed(0))
    before = objective.adversary.weight.detach().clone()
    features = torch.cat(
        [
            torch.nn.functional.adaptive_avg_pool2d(batch.images, 2).flatten(1),
            torch.nn.functional.one_hot(batch.labels, 2).float(),
        ],
        dim=1,
    )
    f = (features @ before[0] + objective.adversary.bias.detach()).sigmoid()
    weights = (1 + 30 * f / f.sum()) / 2
    value = objective.reduce(losses, batch)
    torch.testing.assert_close(value, (weights * losses).mean())
    (gradient,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(gradient, weights / 30)
    # The adversary climbed.
    after = (objective.weights(batch) * losses).mean()
    assert after > value


def test_arl_resumes(parts, trained, tmp_path):
    def go(epochs, checkpoint):
        student = mask_relus(trained, parts[0].normalized(slice(2)))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
        objective = ARL(lr=0.1)
        for _ in run_epochs(
            student, parts[0], epochs=epochs, optimizer=optimizer, objective=objective, checkpoint=checkpoint
        ):
            pass
        return [p.detach().clone() for p in (*student.parameters(), *objective.adversary.parameters())]

    whole = go(3, None)
    go(1, tmp_path / "c.safetensors")
    assert all(map(torch.equal, whole, go(3, tmp_path / "c.safetensors")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chi2DRO(alpha_min=0.0), "alpha_min=0"),
        (lambda: Chi2DRO(alpha_min=1.5), r"\(0, 1\]"),
        (lambda: ARL(lr=0.0), "ARL needs a finite lr > 0"),
        (lambda: ARL(pixels=0), "pixels ≥ 1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(FairlineError, match=message):
        make()
