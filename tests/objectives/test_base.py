from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fairline.errors import FairlineError
from fairline.objectives import ERM, REGISTRY, Batch, build, distillation_loss


def batch(n: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return student, teacher, Batch(torch.zeros(n, 1, 2, 2), labels, labels, torch.arange(n))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_divergence_written_out(temperature):
    student, teacher, _ = batch()
    student.requires_grad_()
    p = (teacher / temperature).softmax(1)
    q = (student / temperature).softmax(1)
    expected = (p * (p / q).log()).sum(1) * temperature**2
    mine = distillation_loss(student, teacher, temperature)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(mine.mean(), F.kl_div(q.log(), p, reduction="batchmean") * temperature**2)
    # d/dz of T²·KL is T·(q − p).
    (gradient,) = torch.autograd.grad(mine.sum(), student)
    torch.testing.assert_close(gradient, temperature * (q - p).detach())


def test_distillation_does_not_shrink_with_more_classes():
    student, teacher, _ = batch()
    nowhere = torch.full((6, 50), -1e4, dtype=torch.float64)
    few = distillation_loss(student, teacher, 4.0)
    many = distillation_loss(torch.cat([student, nowhere], 1), torch.cat([teacher, nowhere], 1), 4.0)
    torch.testing.assert_close(few, many)


def test_erm_is_the_mean_of_both_terms():
    student, teacher, samples = batch()
    ce = F.cross_entropy(student, samples.labels)
    kd = distillation_loss(student, teacher, 4.0).mean()
    objective = ERM()
    torch.testing.assert_close(objective.reduce(objective.losses(student, teacher, samples), samples), ce + kd)
    torch.testing.assert_close(objective.reduce(objective.losses(student, None, samples), samples), ce)
    half = ERM(temperature=1.0, ce_weight=0.5, kd_weight=0.5)
    expected = 0.5 * ce + 0.5 * distillation_loss(student, teacher, 1.0).mean()
    torch.testing.assert_close(half.reduce(half.losses(student, teacher, samples), samples), expected)
    assert not objective.needs_group_losses


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("magic", {}, "no objective 'magic'; choose one of erm"),
        ("erm", {"mu": 1}, "Objective 'erm'.*mu"),
        ("erm", {"temperature": 0}, "must be positive"),
        ("erm", {"kd_weight": -1}, "finite and not negative"),
    ],
)
def test_bad_requests(name, options, message):
    with pytest.raises(FairlineError, match=message):
        build(name, **options)


def test_every_registered_objective_builds():
    for name in REGISTRY:
        assert isinstance(build(name), REGISTRY[name])
