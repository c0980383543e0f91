"""Distillation that does not hand the teacher's bias down: values, gradients and optima that are known."""

from __future__ import annotations

import logging
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import fairline as fl
from fairline.errors import FairlineError
from fairline.objectives import AdaAlpha, AdaMargin, BalancedKD, Batch, LogitAdjust, LongTailKD, Objective, Reweighting
from fairline.objectives.long_tail_kd import split_divergence
from tests.conftest import make_data
from tests.reference import objectives as slow

COUNTS = (40, 20, 10, 5)


def unequal(groups=None) -> fl.GroupedData:
    """Classes of the sizes of ``COUNTS``; groups are the classes, or given."""
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    groups = labels.clone() if groups is None else groups
    names = tuple(f"group {g}" for g in range(int(groups.max()) + 1))
    return fl.GroupedData(torch.zeros(75, 1, 2, 2, dtype=torch.uint8), labels, groups, tuple("abcd"), names)


def crossed() -> fl.GroupedData:
    """The same classes, in three groups that are not the classes."""
    return unequal(torch.tensor([0] * 50 + [1] * 20 + [2] * 5)[torch.randperm(75, generator=rng(5))])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(data, n=7, seed=0):
    """Logits of a student and of a teacher, float64, (n, K), and the batch that they are of."""
    index = torch.randperm(len(data), generator=rng(seed))[:n]
    student, teacher = 3 * torch.randn(2, n, 4, generator=rng(seed), dtype=torch.float64)
    batch = Batch(data.images[index].float(), data.labels[index], data.groups[index], index)
    return student.requires_grad_(), teacher, batch


def started(objective, data, seen=None):
    """An objective at the start of a training; ``seen`` are the teacher's logits of all images."""
    objective.start(data)
    if seen is not None:
        objective.see_teacher(seen, data, held_out=True)
    return objective


def minimiser(objective, teacher, batch, rows):
    """Free logits, one row for the samples of each row number, at the least loss; float64, centred."""
    logits = torch.zeros(int(rows.max()) + 1, teacher.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-11, tolerance_change=1e-15
    )

    def closure():
        optimizer.zero_grad()
        loss = objective.reduce(objective.losses(logits[rows], teacher, batch), batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = logits.detach()
    return found - found.mean(1, keepdim=True)


def centred(logits):
    return logits - logits.mean(1, keepdim=True)


def logit_adjust(data, batch, temperature):
    objective = started(LogitAdjust(tau=1.3, teacher="adjusted", temperature=temperature), data)
    return objective, lambda z, t, i: slow.shifted_loss(z, t, int(batch.labels[i]), COUNTS, 1.3, temperature)


def logit_adjust_alone(data, batch, temperature):
    objective = started(LogitAdjust(tau=0.7, temperature=temperature), data)
    return objective, lambda z, t, i: slow.adjusted_loss(z, t, int(batch.labels[i]), COUNTS, 0.7, temperature)


def balanced_kd(data, batch, temperature):
    objective = started(BalancedKD(strength=0.7, ce_strength=0.4, temperature=temperature), data)
    counts = torch.bincount(data.groups).tolist()
    kd, ce = slow.power_weights(counts, 0.7), slow.power_weights(counts, 0.4)

    def loss(z, t, i):
        g = int(batch.groups[i])
        return slow.weighted_loss(z, t, int(batch.labels[i]), ce[g], kd[g], temperature)

    return objective, loss


def cells_of(images, by):
    """The class or group of each image or of a batch's."""
    return images.labels if by == "class" else images.groups


def ada_alpha(data, batch, temperature, by="class"):
    seen = torch.randn(len(data), 4, generator=rng(3)) + 2 * F.one_hot(data.labels, 4)
    objective = started(AdaAlpha(strength=1.5, by=by, temperature=temperature), data, seen)
    cells = cells_of(data, by)
    margins = slow.mean_margins(seen, data.labels, cells, int(cells.max()) + 1)

    def loss(z, t, i):
        alpha = max(0.0, margins[int(cells_of(batch, by)[i])]) ** 1.5 / 2
        return slow.weighted_loss(z, t, int(batch.labels[i]), 2 * (1 - alpha), 2 * alpha, temperature)

    return objective, loss


def ada_alpha_by_group(data, batch, temperature):
    return ada_alpha(data, batch, temperature, by="group")


def ada_margin(data, batch, temperature, by="group"):
    seen = torch.randn(len(data), 4, generator=rng(4))
    objective = started(AdaMargin(strength=2.0, by=by, temperature=temperature), data, seen)
    cells = cells_of(data, by)
    margins = slow.mean_margins(seen, data.labels, cells, int(cells.max()) + 1)

    def loss(z, t, i):
        margin = 2.0 * (1 - margins[int(cells_of(batch, by)[i])])
        return slow.lowered_loss(z, t, int(batch.labels[i]), margin, temperature)

    return objective, loss


def ada_margin_by_class(data, batch, temperature):
    return ada_margin(data, batch, temperature, by="class")


def reweighted(by, beta):
    """Reweighting, whose weights stand before each sample's whole loss."""

    def make(data, batch, temperature):
        objective = started(Reweighting(beta=beta, by=by, temperature=temperature), data)
        weights = slow.effective_weights(torch.bincount(cells_of(data, by)).tolist(), beta)

        def loss(z, t, i):
            weight = weights[int(cells_of(batch, by)[i])]
            return weight * slow.sample_loss(z, t, int(batch.labels[i]), temperature)

        return objective, loss

    make.__name__ = f"reweighted by {by}, {beta}"
    return make


FORMULAS = [
    logit_adjust,
    logit_adjust_alone,
    balanced_kd,
    ada_alpha,
    ada_alpha_by_group,
    ada_margin,
    ada_margin_by_class,
    *(reweighted(by, beta) for by in ("group", "class") for beta in (None, 0.0, 0.9)),
]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("make", FORMULAS, ids=lambda make: make.__name__)
def test_value_and_gradient_are_those_of_the_formula(make, temperature):
    data = crossed()
    student, teacher, batch = sample(data)
    objective, formula = make(data, batch, temperature)
    mine = objective.losses(student, teacher, batch)
    theirs = torch.stack([formula(z, t, i) for i, (z, t) in enumerate(zip(student, teacher, strict=True))])
    # Shares, weights and margins are kept in float32.
    value = objective.reduce(mine, batch)
    torch.testing.assert_close(value, theirs.mean(), rtol=1e-5, atol=1e-6)
    if not isinstance(objective, Reweighting):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(value, student)
    (expected,) = torch.autograd.grad(theirs.mean(), student)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(lambda z: objective.reduce(objective.losses(z, teacher, batch), batch), student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.7])
def test_two_parts_are_those_of_the_formula(strength, temperature):
    data = unequal()
    student, teacher, batch = sample(data)
    objective = started(LongTailKD(strength, ce_weight=0, temperature=temperature), data)
    assert objective.part_of.tolist() == [0, 0, 1, 2]
    mine = objective.losses(student, teacher, batch)
    theirs = slow.long_tail_losses(student, teacher, [[0, 1], [2], [3]], strength, temperature)
    torch.testing.assert_close(mine, theirs)
    (gradient,) = torch.autograd.grad(mine.mean(), student)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.mean(), student)[0])
    assert torch.autograd.gradcheck(lambda z: objective.distillation(z, teacher, batch).mean(), student)


PLAIN = {
    "logit_adjust": lambda: LogitAdjust(tau=0.0, teacher="adjusted"),
    "balanced_kd": lambda: BalancedKD(strength=0.0),
    "ada_alpha": lambda: AdaAlpha(strength=0.0),
    "ada_margin": lambda: AdaMargin(strength=0.0),
    "long_tail_kd": lambda: LongTailKD(strength=0.0),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_no_strength_is_plain_distillation_bit_for_bit(make):
    data = unequal()
    student, teacher, batch = sample(data)
    seen = torch.randn(75, 4, generator=rng(1))
    assert torch.equal(
        started(make(), data, seen).losses(student, teacher, batch), Objective().losses(student, teacher, batch)
    )


@settings(max_examples=80)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 10**6), st.floats(0.1, 30))
def test_a_divergence_is_that_across_sets_and_within_them(classes, parts, seed, scale):
    parts = min(parts, classes)
    part_of = torch.cat([torch.arange(parts), torch.randint(0, parts, (classes - parts,), generator=rng(seed))])
    log_p, log_q = (scale * torch.randn(2, 6, classes, generator=rng(seed), dtype=torch.float64)).log_softmax(2)
    mass_p, mass_q, within = split_divergence(log_p, log_q, part_of, parts)
    whole = (log_p.exp() * (log_p - log_q)).sum(1)
    torch.testing.assert_close((mass_p.exp() * (mass_p - mass_q + within)).sum(1), whole)
    torch.testing.assert_close(mass_q.exp().sum(1), torch.ones(6, dtype=torch.float64))
    assert (within > -1e-9).all()


def test_sure_teachers_leave_the_parts_finite():
    """Masses far below the least float are 0 in probability, and still have a logarithm."""
    data = unequal()
    batch = sample(data, 4)[2]
    teacher = 1e3 * torch.eye(4)
    student = (-1e3 * torch.eye(4)).requires_grad_()
    loss = started(LongTailKD(1.0), data).losses(student, teacher, batch).mean()
    (gradient,) = torch.autograd.grad(loss, student)
    assert math.isfinite(loss.detach())
    assert torch.isfinite(gradient).all()


def table():
    """Counts of (x, y), the x and y of every sample, data of them, and a teacher that knows p(y|x)."""
    counts = torch.randint(1, 40, (3, 4), generator=rng()) * torch.tensor([1, 1, 3, 8])
    x = torch.arange(3).repeat_interleave(counts.sum(1))
    y = torch.cat([torch.arange(4).repeat_interleave(row) for row in counts])
    data = fl.GroupedData(torch.zeros(len(y), 1, 2, 2, dtype=torch.uint8), y, y.clone(), tuple("abcd"), tuple("abcd"))
    bayes = (counts.double() / counts.sum(1, keepdim=True)).log()
    return counts, x, data, bayes, Batch(data.images.float(), y, y, torch.arange(len(y)))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_both_adjusted_terms_have_the_balanced_minimiser(tau, temperature):
    counts, x, data, bayes, batch = table()
    priors = (counts.sum(0) / counts.sum()).double()
    objective = started(LogitAdjust(tau, "adjusted", temperature=temperature), data)
    torch.testing.assert_close(
        minimiser(objective, bayes[x], batch, x), centred(bayes - tau * priors.log()), atol=1e-4, rtol=0
    )
    if tau:
        # An unchanged teacher holds the student back.
        plain = minimiser(started(LogitAdjust(tau, temperature=temperature), data), bayes[x], batch, x)
        spread = centred(bayes - tau * priors.log()) - centred(bayes)
        assert (((plain - centred(bayes)) * spread).sum() / spread.square().sum()) < 0.6


def test_every_group_teaches_alike():
    """Of one image's free logits the best are the mean over groups of what the teacher says in each."""
    data = crossed()
    teacher = torch.randn(75, 4, generator=rng(), dtype=torch.float64)
    batch = Batch(data.images.float(), data.labels, data.groups, torch.arange(75))
    rows = torch.zeros(75, dtype=torch.int64)
    objective = started(BalancedKD(ce_weight=0, temperature=1.0), data)
    told = teacher.softmax(1)
    expected = torch.stack([told[data.groups == g].mean(0) for g in range(3)]).mean(0)
    found = minimiser(objective, teacher, batch, rows).softmax(1)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    labels_alone = started(BalancedKD(0.0, 1.0, by="class", kd_weight=0), data)
    found = minimiser(labels_alone, teacher, batch, rows).softmax(1)[0]
    torch.testing.assert_close(found, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-6, rtol=0)


def test_ada_alpha_mixes_labels_and_teacher():
    """At T = 1 the best free logits of one image are the mean of ``(1 − α)·label + α·teacher``."""
    data = crossed()
    teacher = (torch.randn(75, 4, generator=rng(), dtype=torch.float64) + 2 * F.one_hot(data.labels, 4)).detach()
    batch = Batch(data.images.float(), data.labels, data.groups, torch.arange(75))
    objective = started(AdaAlpha(temperature=1.0), data, teacher)
    alpha = objective.alpha(batch).double()[:, None]
    assert 0.05 < alpha.min() < alpha.max() < 0.5
    expected = ((1 - alpha) * F.one_hot(data.labels, 4) + alpha * teacher.softmax(1)).mean(0)
    found = minimiser(objective, teacher, batch, torch.zeros(75, dtype=torch.int64)).softmax(1)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_teacher_that_is_wrong_is_not_heard():
    data = unequal()
    wrong = 5 * F.one_hot((data.labels + (data.labels == 3)) % 4, 4).float()
    objective = started(AdaAlpha(), data, wrong)
    student, teacher, batch = sample(data, 60)
    few = batch.labels == 3
    labels_alone = 2 * F.cross_entropy(student, batch.labels, reduction="none")
    mine = objective.losses(student, teacher, batch)
    torch.testing.assert_close(mine[few], labels_alone[few])
    torch.testing.assert_close(mine[~few], Objective().losses(student, teacher, batch)[~few], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_ada_margin_asks_for_the_teachers_label_and_a_margin(temperature):
    data = unequal()
    teacher = torch.randn(75, 4, generator=rng(), dtype=torch.float64)
    batch = Batch(data.images.float(), data.labels, data.groups, torch.arange(75))
    objective = started(AdaMargin(1.5, temperature=temperature, ce_weight=0), data, teacher)
    margins = torch.tensor(slow.mean_margins(teacher, data.labels, data.labels, 4))
    expected = teacher + 1.5 * (1 - margins)[data.labels, None] * F.one_hot(data.labels, 4)
    found = minimiser(objective, teacher, batch, torch.arange(75))
    torch.testing.assert_close(found, centred(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_rebalanced_masses_and_the_teacher_within(strength, temperature):
    """The best free logits: the teacher within each set, and its masses over their means to the power s across."""
    data = unequal()
    _, teacher, batch = sample(data)
    objective = started(LongTailKD(strength, ce_weight=0, temperature=temperature), data)
    parts = [[0, 1], [2], [3]]
    p = (teacher / temperature).softmax(1)
    mass = torch.stack([p[:, part].sum(1) for part in parts], 1)
    target = mass / mass.mean(0) ** strength
    target = target / target.sum(1, keepdim=True)
    expected = torch.cat(
        [p[:, part] / m[:, None] * t[:, None] for part, m, t in zip(parts, mass.T, target.T, strict=True)], 1
    )
    found = minimiser(objective, teacher, batch, torch.arange(len(p)))
    torch.testing.assert_close((found / temperature).softmax(1), expected, atol=1e-5, rtol=0)
    if strength == 1:
        balanced = mass / mass.mean(0)
        torch.testing.assert_close(balanced.mean(0), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitAdjust(tau=math.inf), "tau=inf"),
        (lambda: LogitAdjust(teacher="gone"), "unchanged or adjusted, not 'gone'"),
        (lambda: BalancedKD(strength=math.nan), "strength=nan"),
        (lambda: BalancedKD(ce_strength=math.inf), "ce_strength=inf"),
        (lambda: BalancedKD(by="hair"), "group or class, not 'hair'"),
        (lambda: AdaAlpha(strength=-1.0), "strength=-1"),
        (lambda: AdaMargin(strength=math.inf), "strength=inf"),
        (lambda: AdaMargin(by="hair"), "group or class, not 'hair'"),
        (lambda: LongTailKD(strength=math.nan), "strength=nan"),
        (lambda: LongTailKD(parts=1), "parts=1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(FairlineError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        LogitAdjust,
        lambda: fl.Reweighting(by="class"),
        lambda: BalancedKD(by="class"),
        lambda: AdaAlpha(by="class"),
        lambda: AdaMargin(by="class"),
        LongTailKD,
        fl.LDAM,
    ],
)
def test_a_class_without_images_is_named(make):
    data = unequal().select(torch.arange(70))
    with pytest.raises(FairlineError, match="“d” has no image"):
        make().start(data)


@pytest.mark.parametrize("make", [BalancedKD, AdaAlpha, AdaMargin])
def test_a_group_without_images_is_named(make):
    with pytest.raises(FairlineError, match="group 3"):
        make().start(unequal().select(torch.arange(70)))


def test_the_teacher_is_judged_on_the_validation_part(parts, trained, caplog):
    train, val, _ = parts
    student = fl.mask_relus(trained, train.normalized(slice(2)))
    objective = AdaAlpha()
    fl.finetune(student, trained, train, val, epochs=1, objective=objective, batch_size=64)
    expected = slow.mean_margins(fl.predict(trained, val), val.labels, val.groups, val.num_groups)
    assert objective.margins.tolist() == pytest.approx(expected, abs=1e-6)
    assert "no validation part" not in caplog.text
    with caplog.at_level(logging.WARNING):
        fl.finetune(student, trained, train, epochs=1, objective=objective, batch_size=64)
    expected = slow.mean_margins(fl.predict(trained, train), train.labels, train.groups, train.num_groups)
    assert objective.margins.tolist() == pytest.approx(expected, abs=1e-6)
    assert "AdaAlpha judges the teacher on its own training images" in caplog.text
    with pytest.raises(FairlineError, match="AdaAlpha needs a teacher"):
        fl.finetune(student, None, train, val, epochs=1, objective=objective)
    with pytest.raises(FairlineError, match="class 2"):
        fl.finetune(student, trained, train, val.select(torch.nonzero(val.groups != 2).flatten()), objective=objective)


@pytest.mark.parametrize("name", ["balanced_kd", "ada_alpha", "ada_margin", "long_tail_kd", "ldam"])
def test_each_trains_a_network(name, parts, trained):
    train, val, _ = parts
    student = fl.mask_relus(trained, train.normalized(slice(2)))
    rows = []
    objective = fl.objectives.build(name)
    fl.finetune(student, trained, train, val, epochs=2, lr=0.02, objective=objective, history=rows, batch_size=64)
    assert rows[1]["loss"] < rows[0]["loss"]
    assert rows[1]["val_accuracy"] > 0.5


def test_margins_count_crossed_groups():
    data = make_data(200, classes=3, groups=2)
    objective = AdaMargin()
    objective.start(data)
    objective.see_teacher(torch.randn(200, 3, generator=rng()), data, held_out=True)
    assert set(objective.metrics()) == {"margin[group 0]", "margin[group 1]"}
