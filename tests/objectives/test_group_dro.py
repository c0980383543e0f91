from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairline.errors import FairlineError
from fairline.objectives import Batch, GroupDRO
from tests.conftest import make_data
from tests.objectives.problems import solve
from tests.reference import objectives as slow


def test_it_ends_where_the_worst_group_is_best_off():
    assert solve(GroupDRO(step=0.05)) == pytest.approx(0.5, abs=0.01)
    assert solve(GroupDRO(step=0.05), batch_size=50, average=1000) == pytest.approx(0.5, abs=0.03)


def test_one_step_written_out():
    objective = GroupDRO(step=0.5, adjustment=2.0)
    data = make_data(300, classes=3)
    objective.start(data)
    sizes = data.counts()["n"].tolist()
    batch = Batch(torch.zeros(3, 1, 2, 2), torch.zeros(3).long(), torch.tensor([0, 2, 2]), torch.arange(3))
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    adjusted = {0: 1.0 + 2 / math.sqrt(sizes[0]), 2: 3.0 + 2 / math.sqrt(sizes[2])}
    q = [math.exp(0.5 * adjusted.get(g, 0.0)) / 3 for g in range(3)]
    q = [value / sum(q) for value in q]
    value = objective.reduce(losses, batch)
    assert float(value.detach()) == pytest.approx(q[0] * adjusted[0] + q[2] * adjusted[2], rel=1e-5)
    assert objective.weights.tolist() == pytest.approx(q, rel=1e-5)
    value.backward()
    assert losses.grad.tolist() == pytest.approx([q[0], q[2] / 2, q[2] / 2], rel=1e-5)
    assert sum(objective.metrics().values()) == pytest.approx(1)
    other = GroupDRO()
    other.start(data)
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.weights, objective.weights)


@given(
    step=st.sampled_from([0.01, 0.5]),
    adjustment=st.sampled_from([0.0, 2.0]),
    n=st.integers(1, 12),
    temperature=st.sampled_from([1.0, 4.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_value_and_gradient_are_those_of_the_formula_batch_after_batch(step, adjustment, n, temperature, seed):
    data = make_data(300, classes=3)
    objective = GroupDRO(step=step, adjustment=adjustment, temperature=temperature)
    objective.start(data)
    generator = torch.Generator().manual_seed(seed)
    batches, mine = [], []
    for _ in range(3):
        index = torch.randperm(len(data), generator=generator)[:n]
        student, teacher = 2 * torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
        batch = Batch(data.images[index].float(), data.labels[index], data.groups[index], index)
        batches.append((student.requires_grad_(), teacher, batch.labels.tolist(), batch.groups.tolist()))
        value = objective.reduce(objective.losses(student, teacher, batch), batch)
        mine.append((value, objective.weights.double()))
    sizes = data.counts()["n"].tolist()
    for (value, q), theirs, weights, (student, *_) in zip(
        mine, *slow.group_dro(batches, sizes, step, adjustment, temperature), batches, strict=True
    ):
        # q and the margins are kept in float32.
        torch.testing.assert_close(value.double(), theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(q, torch.tensor(weights, dtype=torch.float64), rtol=1e-4, atol=1e-6)
        (gradient,) = torch.autograd.grad(value, student)
        (expected,) = torch.autograd.grad(theirs, student)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_large_losses_do_not_overflow():
    objective = GroupDRO(step=1.0)
    objective.start(make_data(200, classes=3))
    batch = Batch(torch.zeros(2, 1, 2, 2), torch.zeros(2).long(), torch.tensor([0, 1]), torch.arange(2))
    value = objective.reduce(torch.tensor([1e4, 2e4]), batch)
    assert float(value) == pytest.approx(2e4)


@pytest.mark.parametrize("options", [{"step": 0.0}, {"adjustment": -1.0}])
def test_bad_settings(options):
    with pytest.raises(FairlineError, match="GroupDRO needs finite step > 0 and adjustment ≥ 0"):
        GroupDRO(**options)
