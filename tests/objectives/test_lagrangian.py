from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fairline.data import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize import SNL
from fairline.masking import mask_relus
from fairline.objectives import ERM, Batch, Lagrangian
from fairline.objectives.base import group_means
from fairline.training import finetune, run_epochs
from tests.conftest import make_data
from tests.objectives.problems import SHARE, solve, two_groups
from tests.reference.objectives import algorithm_1, algorithm_1_loss


def random_batch(n, groups, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, targets = torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (n,), generator=generator)
    members = torch.randint(0, groups, (n,), generator=generator)
    return logits.requires_grad_(), targets, Batch(torch.zeros(n, 1, 2, 2), labels, members, torch.arange(n))


def begun(objective, groups: int, multipliers: list[float]):
    """The objective after its start, with some multipliers in float64."""
    objective.start(make_data(200, classes=3, groups=groups))
    objective.load_state_dict({"multipliers": torch.tensor(multipliers)})
    objective.multipliers = objective.multipliers.double()
    return objective


def started(groups: int, multipliers: list[float], **options) -> Lagrangian:
    return begun(Lagrangian(mu=0.1, **options), groups, multipliers)


@settings(max_examples=40)
@given(
    n=st.integers(1, 12),
    multipliers=st.lists(st.floats(0, 5), min_size=2, max_size=4),
    distill=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient_are_those_of_the_written_out_formula(n, multipliers, distill, seed):
    """Groups are not classes here, and small batches lack some groups."""
    logits, targets, batch = random_batch(n, len(multipliers), 3, seed)
    objective = started(len(multipliers), multipliers)
    multipliers = objective.multipliers.tolist()
    mine = objective.reduce(objective.losses(logits, targets if distill else None, batch), batch)
    # Without a teacher the divergence from oneself is 0, and so is its gradient.
    teacher = targets if distill else logits.detach()
    _, expected = algorithm_1_loss(logits, teacher, batch.labels, batch.groups.tolist(), multipliers)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(mine, logits)
    (reference,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-9)


def test_the_penalty_moves_the_gradient_and_in_the_published_code_it_does_not():
    logits, targets, batch = random_batch(30, 3, 4, 0)
    plain, _ = algorithm_1_loss(logits, targets, batch.labels, batch.groups.tolist(), [0.5, 1.0, 2.0])
    (of_plain,) = torch.autograd.grad(plain, logits, retain_graph=True)
    objective = started(3, [0.5, 1.0, 2.0])
    losses = objective.losses(logits, targets, batch)
    (gradient,) = torch.autograd.grad(objective.reduce(losses, batch), logits)
    assert (gradient - of_plain).abs().max() > 0.05 * of_plain.abs().max()

    released = started(3, [0.5, 1.0, 2.0], released=True)
    losses = released.losses(logits, targets, batch)
    value = released.reduce(losses, batch)
    mean = losses.mean()
    assert value > mean
    torch.testing.assert_close(torch.autograd.grad(value, logits, retain_graph=True), torch.autograd.grad(mean, logits))


def test_released_divides_the_distillation_by_the_classes_and_sums_over_batches():
    logits, targets, batch = random_batch(8, 2, 4, 1)
    released = started(2, [0.0, 0.0], released=True)
    ce, full = (ERM().losses(logits, t, batch) for t in (None, targets))
    torch.testing.assert_close(released.losses(logits, targets, batch), ce + (full - ce) / 4)
    losses = released.losses(logits, targets, batch).detach()
    means, _ = group_means(losses, batch.groups, 2)
    for _ in range(3):
        released.reduce(losses, batch)
    released.end_epoch(torch.tensor([9.0, 9.0]), torch.tensor(0.0))
    torch.testing.assert_close(released.multipliers, 0.1 * 3 * (means - losses.mean()).abs())
    released.end_epoch(torch.tensor([9.0, 9.0]), torch.tensor(0.0))
    torch.testing.assert_close(released.multipliers, 0.1 * 3 * (means - losses.mean()).abs())


@pytest.mark.parametrize("batch_size", [32, 50])
def test_finetuning_follows_algorithm_1(parts, trained, batch_size):
    """λ after every epoch, and the weights at the end, are those of a plain loop, whatever the batch size."""
    train = parts[0]
    student = mask_relus(trained, train.normalized(slice(2)))
    # Batch statistics would make the two loops round differently within a step.
    reference = copy.deepcopy(student)
    expected = algorithm_1(reference, trained, train, epochs=3, mu=0.5, lr=0.02, batch_size=batch_size, seed=3)
    objective = Lagrangian(mu=0.5)
    seen = [
        objective.multipliers.clone()
        for _ in run_epochs(
            student,
            train,
            epochs=3,
            optimizer=torch.optim.SGD(student.parameters(), lr=0.02),
            objective=objective,
            teacher=trained,
            batch_size=batch_size,
            seed=3,
        )
    ]
    assert seen[0].min() > 0
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-3, atol=1e-5)
    for mine, other in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    # Without a validation part there are no violations on one.
    assert objective.metrics().keys() == {
        f"{what}[class {i}]" for what in ("lambda", "train_violation") for i in range(3)
    }


def test_the_multipliers_do_not_depend_on_the_batches(parts, trained):
    """With a learning rate of 0 nothing but λ changes."""
    found = []
    for batch_size in (7, 64, 1000):
        student = mask_relus(trained, parts[0].normalized(slice(2))).eval()
        for module in student.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0
        objective = Lagrangian(mu=1.0)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        list(
            run_epochs(
                student,
                parts[0],
                epochs=2,
                optimizer=optimizer,
                objective=objective,
                teacher=trained,
                batch_size=batch_size,
            )
        )
        found.append(objective.multipliers)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_without_a_step_it_is_plain_distillation_bit_for_bit(parts, trained):
    weights = []
    for objective in (ERM(), Lagrangian(mu=0.0), Lagrangian(mu=0.3)):
        student = mask_relus(trained, parts[0].normalized(slice(2)))
        finetune(student, trained, parts[0], parts[1], epochs=3, objective=objective, lr=0.02, batch_size=32)
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_interrupted_run_has_the_same_multipliers(parts, trained, tmp_path):
    def go(epochs, checkpoint):
        student = mask_relus(trained, parts[0].normalized(slice(2)))
        objective = Lagrangian(mu=0.5)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
        for _ in run_epochs(
            student,
            parts[0],
            epochs=epochs,
            optimizer=optimizer,
            objective=objective,
            teacher=trained,
            checkpoint=checkpoint,
        ):
            pass
        return objective.multipliers, [p.detach().clone() for p in student.parameters()]

    whole = go(4, None)
    go(2, tmp_path / "c.safetensors")
    resumed = go(4, tmp_path / "c.safetensors")
    assert torch.equal(whole[0], resumed[0])
    assert all(map(torch.equal, whole[1], resumed[1]))


def update(violation, group_losses, overall, **options):
    objective = Lagrangian(mu=0.5, violation=violation, **options)
    objective.start(make_data(200, classes=3))
    objective.end_epoch(torch.tensor(group_losses), torch.tensor(overall))
    return objective


def test_variants_of_the_violation():
    losses, overall = [1.0, 2.0, 4.0], 1.5
    assert update("absolute", losses, overall).multipliers.tolist() == [0.25, 0.25, 1.25]
    assert update("signed", losses, overall).multipliers.tolist() == [0.0, 0.25, 1.25]
    assert update("worst_group", losses, overall).multipliers.tolist() == [0.0, 0.0, 1.25]
    capped = update("absolute", losses, overall, cap=1.0)
    assert capped.multipliers.tolist() == [0.25, 0.25, 1.0]
    batch = Batch(torch.zeros(4, 1, 2, 2), torch.zeros(4).long(), torch.tensor([0, 0, 2, 2]), torch.arange(4))
    values = torch.tensor([0.0, 2.0, 3.0, 5.0])
    # L = 2.5, L₀ = 1, L₂ = 4; group 1 is absent.
    assert float(update("absolute", losses, overall).reduce(values, batch)) == 2.5 + 0.25 * 1.5 + 1.25 * 1.5
    assert float(update("signed", losses, overall).reduce(values, batch)) == 2.5 + 1.25 * 1.5


def test_the_accuracy_proxy_constrains_expected_errors(parts, trained):
    train = parts[0]
    objective = Lagrangian(mu=1.0, violation="accuracy")
    student = mask_relus(trained, train.normalized(slice(2)))
    epochs = run_epochs(
        student,
        train,
        epochs=2,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.01),
        objective=objective,
        teacher=trained,
    )
    next(epochs)
    student.eval()
    with torch.no_grad():
        p = student(train.normalized()).softmax(1)
    errors = 1 - p[torch.arange(len(train)), train.labels]
    expected = torch.stack([(errors[train.groups == g].mean() - errors.mean()).abs() for g in range(3)])
    torch.testing.assert_close(objective.multipliers, expected)
    student.train()
    next(epochs)
    assert (objective.multipliers > expected).all()


@pytest.mark.parametrize("violation", ["absolute", "accuracy"])
def test_multipliers_from_a_sample_of_each_group(parts, trained, violation):
    """With more samples than a group has it is the whole set; with fewer, the first step is that of those images."""
    train = parts[0]

    def first(samples):
        student = mask_relus(trained, train.normalized(slice(2)))
        objective = Lagrangian(mu=1.0, violation=violation, samples=samples)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
        next(run_epochs(student, train, epochs=1, optimizer=optimizer, objective=objective, teacher=trained))
        return objective, student

    whole, _ = first(None)
    everyone, _ = first(10_000)
    torch.testing.assert_close(everyone.multipliers, whole.multipliers)
    some, student = first(10)
    assert torch.bincount(train.groups[some.subset]).tolist() == [10, 10, 10]
    losses = ERM().losses(
        predict(student, train), predict(trained, train), Batch(train.images, train.labels, train.groups, None)
    )
    if violation == "accuracy":
        losses = 1 - predict(student, train).softmax(1)[torch.arange(len(train)), train.labels]
    means = torch.stack([losses[some.subset][train.groups[some.subset] == g].mean() for g in range(3)])
    overall = (means * torch.bincount(train.groups)).sum() / len(train)
    torch.testing.assert_close(some.multipliers, (means - overall).abs(), rtol=1e-4, atol=1e-6)


def test_descent_equalises_the_groups():
    assert solve(ERM()) == pytest.approx(SHARE, abs=1e-3)
    assert solve(Lagrangian(mu=0.0)) == pytest.approx(SHARE, abs=1e-3)
    for violation in ("absolute", "signed", "worst_group"):
        # Equal losses are at 1/2, where |·| has a kink: descent stays near it.
        assert solve(Lagrangian(mu=0.05, violation=violation)) == pytest.approx(0.5, abs=0.03)


def test_group_means_by_one_scatter():
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    means, present = group_means(values, torch.tensor([2, 0, 2]), 4)
    assert means.tolist() == [2.0, 0.0, 3.5, 0.0]
    assert present.tolist() == [True, False, True, False]
    means.sum().backward()
    assert values.grad.tolist() == [0.5, 1.0, 0.5]


def test_masks_learn_under_algorithm_1_too(parts, trained):
    cuts = list(
        SNL(lr=0.03, lam=1e-3, max_epochs=3, batch_size=64, objective=Lagrangian(mu=1.0)).linearize(
            trained, parts[0], [0.2]
        )
    )
    plain = list(SNL(lr=0.03, lam=1e-3, max_epochs=3, batch_size=64).linearize(trained, parts[0], [0.2]))
    weights = [torch.cat([p.flatten() for p in cut[0].model.parameters()]) for cut in (cuts, plain)]
    assert cuts[0].relus == plain[0].relus
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": -0.1}, "not negative: mu=-0.1"),
        ({"mu": float("nan")}, "finite"),
        ({"violation": "odd"}, "not 'odd'"),
        ({"samples": 0}, "samples=0"),
        ({"cap": 0.0}, "cap of the multipliers must be positive"),
        ({"released": True, "violation": "signed"}, "absolute violations only"),
        ({"released": True, "on": "val"}, "knows on='train' only"),
        ({"on": "test"}, "train or val, not 'test'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        Lagrangian(**options)


def test_an_exploding_multiplier_stops_and_keeps_the_checkpoint(parts, trained, tmp_path):
    student = mask_relus(trained, parts[0].normalized(slice(2)))
    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(FairlineError, match=r"Epoch \d of finetuning: The multiplier of group “class .” exploded to"):
        finetune(student, trained, parts[0], epochs=9, objective=Lagrangian(mu=1e5), lr=1e-6, checkpoint=checkpoint)


def test_data_without_groups():
    data = two_groups()
    one = GroupedData(data.images, data.labels, torch.zeros_like(data.groups), data.class_names, ("all",), name="faces")
    with pytest.raises(FairlineError, match="faces: the objective Lagrangian needs groups"):
        Lagrangian().start(one)
    empty = GroupedData(data.images, data.labels, data.groups, data.class_names, ("a", "b", "c"), name="faces")
    with pytest.raises(FairlineError, match=r"needs every group, but .*c"):
        Lagrangian().start(empty)
