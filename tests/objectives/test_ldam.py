from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fairline as fl
from fairline.errors import FairlineError
from fairline.objectives import LDAM, Batch
from fairline.training import run_epochs
from tests.conftest import make_data
from tests.objectives.problems import SHARE, N, two_groups
from tests.reference.objectives import sample_loss


@pytest.mark.parametrize(
    ("defer", "epoch", "weighted"), [(0.0, 0, True), (0.5, 0, False), (0.5, 1, False), (0.5, 2, True), (1.0, 3, False)]
)
def test_value_and_gradient_written_out_before_and_after_the_weights_come(defer, epoch, weighted):
    data = make_data(300, classes=3)
    objective = LDAM(margin=2.0, defer=defer)
    objective.total_epochs = 4
    objective.start(data)
    objective.load_state_dict({"seen": epoch * len(data)})
    n = torch.bincount(data.labels).double()
    assert objective.margins.tolist() == pytest.approx([2.0 * float((n.min() / k) ** 0.25) for k in n], rel=1e-6)
    index = torch.arange(9)
    student, teacher = 3 * torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student.requires_grad_()
    batch = Batch(data.images[index].float(), data.labels[index], data.groups[index], index)
    effective = (1 - 0.9999**n) / (1 - 0.9999)
    weights = 1 / effective / (n / effective).sum() * n.sum() if weighted else torch.ones(3)
    losses = []
    for z, t, y in zip(student, teacher, batch.labels.tolist(), strict=True):
        margin = 2.0 * float((n.min() / n[y]) ** 0.25)
        lowered = torch.stack([value - margin if k == y else value for k, value in enumerate(z)])
        kd = sample_loss(z, t, y, 4.0) + z.softmax(0)[y].log()
        losses.append(float(weights[y]) * (kd - lowered.softmax(0)[y].log()))
    theirs = torch.stack(losses).mean()
    mine = objective.reduce(objective.losses(student, teacher, batch), batch)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(mine, student, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, student)[0], rtol=1e-5, atol=1e-6)


def best_lead(p, margins):
    """The lead m of class 1 that minimises ``p·softplus(Δ₁ − m) + (1 − p)·softplus(Δ₀ + m)``, in closed form.

    With u = eᵐ its derivative is 0 where ``(1 − p)·e^(−Δ₁)·u² + (1 − 2p)·u − p·e^(−Δ₀) = 0``.
    """
    a, b, c = (1 - p) * math.exp(-margins[1]), 1 - 2 * p, -p * math.exp(-margins[0])
    return math.log((-b + math.sqrt(b * b - 4 * a * c)) / (2 * a))


@pytest.mark.parametrize("margin", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("defer", [0.0, 1.0])
def test_it_ends_at_the_lead_that_is_known(margin, defer):
    """One image that is of class 1 in a share of its samples: the best two logits have a closed form."""
    data = two_groups()
    objective = LDAM(margin=margin, defer=defer, beta=1 - 1e-9)
    objective.start(data)
    batch = Batch(data.images.float(), data.labels, data.groups, torch.arange(N))
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-11)

    def closure():
        optimizer.zero_grad()
        loss = objective.reduce(objective.losses(logits.expand(N, 2), None, batch), batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    margins = [margin * (SHARE / (1 - SHARE)) ** 0.25, margin]
    found = float((logits[0, 1] - logits[0, 0]).detach())
    assert found == pytest.approx(best_lead(0.5 if defer == 0 else SHARE, margins), abs=1e-4)


def test_the_weights_come_in_the_last_epochs_also_after_a_kill(parts, trained, tmp_path):
    def go(epochs, checkpoint, stop=None):
        student = fl.mask_relus(trained, parts[0].normalized(slice(2)))
        objective = LDAM(defer=0.5)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
        rows = []
        for epoch in run_epochs(
            student, parts[0], epochs=epochs, optimizer=optimizer, objective=objective, checkpoint=checkpoint
        ):
            rows.append(epoch.row()["reweighted"])
            if epoch.epoch == stop:
                break
        return rows, [p.detach().clone() for p in student.parameters()]

    rows, whole = go(4, None)
    assert rows == [0, 0, 1, 1]
    # A loop that is left at its third epoch has saved the second.
    assert go(4, tmp_path / "c.safetensors", stop=3)[0] == [0, 0, 1]
    rows, resumed = go(4, tmp_path / "c.safetensors")
    assert rows == [1, 1]
    assert all(map(torch.equal, whole, resumed))


def test_without_margin_and_weights_it_is_the_mean():
    data = two_groups()
    objective = LDAM(margin=0.0, defer=1.0)
    objective.start(data)
    logits = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    batch = Batch(data.images.float(), data.labels, data.groups, torch.arange(N))
    value = objective.reduce(objective.losses(logits, None, batch), batch)
    assert torch.equal(value, F.cross_entropy(logits, data.labels, reduction="none").mean())


@pytest.mark.parametrize("options", [{"margin": math.inf}, {"margin": -1.0}, {"defer": 1.5}, {"beta": 1.0}])
def test_bad_settings(options):
    (name,) = options
    with pytest.raises(FairlineError, match=f"{name}="):
        LDAM(**options)


def test_it_asks_how_many_epochs_there_are():
    data = two_groups()
    objective = LDAM()
    objective.start(data)
    batch = Batch(data.images.float(), data.labels, data.groups, torch.arange(N))
    with pytest.raises(FairlineError, match="not told how many"):
        objective.reduce(torch.ones(N), batch)
