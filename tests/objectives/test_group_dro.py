from __future__ import annotations

import math

import pytest
import torch

from fairline.errors import FairlineError
from fairline.objectives import Batch, GroupDRO
from tests.conftest import make_data
from tests.objectives.problems import solve


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
