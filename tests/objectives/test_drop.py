from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace

import hypothesis.strategies as st
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from fairline.data import GroupedData
from fairline.errors import FairlineError
from fairline.inference import group_mean, predict
from fairline.linearize import SNL
from fairline.masking import mask_relus
from fairline.objectives import ERM, Batch, GroupDrop, Lagrangian
from fairline.objectives.drop import MEASURES, cost
from fairline.training import finetune, run_epochs, train
from tests.conftest import make_data
from tests.objectives.test_lagrangian import begun, random_batch
from tests.reference.objectives import drop_lagrangian, drops, primal_dual

N = 200


def started(groups: int, multipliers: list[float], **options) -> GroupDrop:
    return begun(GroupDrop(**options), groups, multipliers)


@settings(max_examples=40)
@given(
    n=st.integers(1, 12),
    multipliers=st.lists(st.floats(0, 5), min_size=2, max_size=4),
    epsilon=st.floats(0, 0.5),
    measure=st.sampled_from(list(MEASURES)),
    excess=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient_are_those_of_the_written_out_lagrangian(n, multipliers, epsilon, measure, excess, seed):
    """Groups are not classes here, and small batches lack some groups."""
    logits, targets, batch = random_batch(n, len(multipliers), 3, seed)
    objective = started(len(multipliers), multipliers, epsilon=epsilon, measure=measure, excess=excess)
    mine = objective.reduce(objective.losses(logits, targets, batch), batch)
    exact = objective.multipliers.tolist()
    groups = batch.groups.tolist()
    expected = drop_lagrangian(logits, targets, batch.labels, groups, exact, epsilon, measure, excess)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(mine, logits)
    (reference,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-9)


@settings(max_examples=20)
@given(measure=st.sampled_from(list(MEASURES)), excess=st.booleans(), seed=st.integers(0, 100))
def test_violations_are_those_of_the_measure_itself_on_either_part(measure, excess, seed):
    logits, targets, batch = random_batch(60, 3, 3, seed)
    data = make_data(60, classes=3, groups=3)
    batch = Batch(batch.images, batch.labels, data.groups, batch.index)
    logits = logits.detach()
    expected = torch.tensor(drops(measure, logits, targets, batch.labels, data.groups.tolist(), 3, excess)) - 0.1
    objective = GroupDrop(epsilon=0.1, measure=measure, excess=excess, samples=None)
    objective.start(data)
    objective.held_out(logits, targets, batch)
    objective.end_epoch(torch.zeros(3), torch.zeros(()))
    for part in ("train", "val"):
        torch.testing.assert_close(objective.violations[part], expected.double(), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_smoothed_accuracy():
    """d(1 − p_y)/dz_k = p_y·(p_k − [k = y])."""
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(cost("probability", logits, torch.tensor([1])).sum(), logits)
    p = logits.detach().softmax(1)[0]
    torch.testing.assert_close(gradient[0], p[1] * (p - torch.tensor([0.0, 1.0, 0.0])))


def solve(objective, *, share=0.1, steps=1200, lr=0.5, epoch=5):
    """One logit c for class 1 against 0; a minority of this share is of class 1. The teacher says 0 of either."""
    labels = torch.zeros(N, dtype=torch.int64)
    labels[: int(N * share)] = 1
    data = GroupedData(torch.zeros(N, 1, 2, 2, dtype=torch.uint8), labels, labels, ("a", "b"), ("many", "few"))
    batch = Batch(data.images[:0], labels, labels, torch.arange(N))
    teacher = torch.zeros(N, 2, dtype=torch.float64)
    objective.start(data)
    objective.start_held_out(data)
    c = torch.zeros((), dtype=torch.float64, requires_grad=True)
    path = []
    for step in range(1, steps + 1):
        logits = torch.stack([torch.zeros_like(c), c]).expand(N, 2)
        (gradient,) = torch.autograd.grad(objective.reduce(objective.losses(logits, teacher, batch), batch), c)
        with torch.no_grad():
            c -= lr * gradient
        if step % epoch == 0:
            with torch.no_grad():
                logits = torch.stack([torch.zeros_like(c), c]).expand(N, 2)
                objective.held_out(logits, teacher, batch)
                losses = objective.losses(logits, teacher, batch)
                objective.end_epoch(losses, losses.mean())
        path.append([float(c.detach().sigmoid()), *objective.multipliers.tolist()])
    return torch.tensor(path[-300:]).mean(0).tolist()


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize(
    ("measure", "epsilon", "probability", "slope"),
    [
        # −log σ(c) ≤ log 2 + ε binds; its derivative by c is −(1 − σ).
        ("loss", 0.1, math.exp(-math.log(2) - 0.1), lambda p: 1 - p),
        # 1 − σ(c) ≤ 1/2 + ε binds; its derivative by c is −σ·(1 − σ).
        ("probability", 0.05, 0.45, lambda p: p * (1 - p)),
    ],
)
def test_descent_and_ascent_end_at_the_constrained_optimum_with_its_multiplier(
    measure, epsilon, probability, slope, share
):
    """The loss is −(1 − s)·log(1 − σ(c)) − s·log σ(c), with derivative σ − s; the majority's bound is slack."""
    found = solve(GroupDrop(epsilon=epsilon, measure=measure, step=0.5, kd_weight=0), share=share)
    kkt = (probability - share) / slope(probability)
    assert found == pytest.approx([probability, 0.0, kkt], abs=5e-3)


def test_a_bound_that_is_met_throughout_leaves_the_optimum_alone():
    found = solve(GroupDrop(epsilon=3.0, measure="loss", step=0.5, kd_weight=0))
    assert found == pytest.approx([0.1, 0.0, 0.0], abs=1e-3)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("excess", [False, True])
def test_finetuning_is_the_primal_dual_iteration_written_out(parts, trained, measure, excess):
    """λ after every epoch, from what is held out, and the weights at the end."""
    training, val, _ = parts
    student = hurt(trained, training, label=1, by=10.0)
    reference = copy.deepcopy(student)
    chosen = {"epsilon": 0.01, "measure": measure, "excess": excess, "step": 3.0}
    rest = {"epochs": 3, "lr": 1e-3, "batch_size": 50, "seed": 3}
    expected = primal_dual(reference, trained, training, val, **chosen, **rest)
    objective = GroupDrop(**chosen)
    seen = [
        objective.multipliers.tolist()
        for _ in run_epochs(
            student,
            training,
            val,
            epochs=3,
            optimizer=torch.optim.SGD(student.parameters(), lr=1e-3),
            objective=objective,
            teacher=trained,
            batch_size=50,
            seed=3,
        )
    ]
    assert max(seen[0]) > 0
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    for mine, other in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def hurt(trained, data, label=2, by=4.0) -> nn.Module:
    """A student that says a class, by default the rarest, less often than its teacher."""
    student = mask_relus(trained, data.normalized(slice(2)))
    with torch.no_grad():
        list(student.parameters())[-1][label] -= by
    return student


def run(trained, parts, objective, epochs=4, **rest):
    student, history = hurt(trained, parts[0]), []
    given = {"lr": 1e-3, "batch_size": 32, "select": "last", "history": history, **rest}
    finetune(student, trained, parts[0], parts[1], epochs=epochs, objective=objective, **given)
    return student, history


def weights(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_what_a_bound_never_binds_is_plain_distillation_bit_for_bit(parts, trained):
    plain, slack, tight = (run(trained, parts, it)[0] for it in (ERM(), GroupDrop(epsilon=1.0), GroupDrop()))
    assert torch.equal(weights(plain), weights(slack))
    assert not torch.equal(weights(plain), weights(tight))


def test_the_constrained_group_gets_back_more_than_under_plain_distillation(parts, trained):
    lost = {}
    for name, objective in {"plain": ERM(), "drop": GroupDrop(step=100.0)}.items():
        student, _ = run(trained, parts, objective, epochs=6, lr=5e-3)
        val = parts[1]
        worse = cost("probability", predict(student, val), val.labels) - cost(
            "probability", predict(trained, val), val.labels
        )
        lost[name] = float(group_mean(worse, val.groups, 3)[2])
    assert lost["plain"] > 0.05
    assert lost["drop"] < 0.8 * lost["plain"]


@pytest.mark.parametrize("make", [GroupDrop, lambda: Lagrangian(mu=1.0, on="val")], ids=["drop", "lagrangian"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(parts, trained, tmp_path, make):
    class Killed(Exception):
        pass

    def kill(progress):
        if progress.done > 0.6 * progress.total:
            raise Killed

    whole, rows = run(trained, parts, make())
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        run(trained, parts, make(), checkpoint=file, progress=kill)
    objective = make()
    resumed, again = run(trained, parts, objective, checkpoint=file)
    assert torch.equal(weights(whole), weights(resumed))
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in rows] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in again
    ]
    assert float(objective.multipliers.max()) > 0


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("augment", [False, True])
def test_violations_in_the_history_are_those_of_the_network_that_is_kept(parts, trained, measure, augment):
    """On what is held out, and on the training images that are looked at."""
    objective = GroupDrop(epsilon=0.03, measure=measure, samples=10)
    student, history = run(trained, parts, objective, augment=augment)
    some = parts[0].select(objective.subset)
    assert some.counts()["n"].tolist() == [10, 10, 10]
    for part, data in {"train": some, "val": parts[1]}.items():
        worse = cost(measure, predict(student, data), data.labels) - cost(measure, predict(trained, data), data.labels)
        expected = group_mean(worse, data.groups, 3) - 0.03
        for name, value in zip(data.group_names, expected.tolist(), strict=True):
            assert history[-1][f"{part}_violation[{name}]"] == pytest.approx(value, abs=1e-5)


def test_algorithm_1_reports_both_parts_and_moves_by_the_one_that_is_named(parts, trained):
    rows = {}
    for on in ("train", "val"):
        student, history = run(trained, parts, Lagrangian(mu=0.5, on=on), epochs=1)
        row = rows[on] = history[-1]
        for part, data in {"train": parts[0], "val": parts[1]}.items():
            batch = Batch(data.images, data.labels, data.groups, torch.arange(len(data)))
            losses = ERM().losses(predict(student, data), predict(trained, data), batch)
            expected = (group_mean(losses, data.groups, 3) - losses.mean()).abs()
            found = [row[f"{part}_violation[{name}]"] for name in data.group_names]
            assert found == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
            if part == on:
                moved = [row[f"lambda[{name}]"] for name in data.group_names]
                assert moved == pytest.approx([0.5 * value for value in found], rel=1e-5)
    assert rows["train"]["lambda[class 2]"] != pytest.approx(rows["val"]["lambda[class 2]"])


def test_a_group_that_stays_above_is_named_with_what_it_lost(parts, trained, caplog):
    """Of the epoch that is kept, which need not be the last."""
    with caplog.at_level(logging.WARNING):
        _, history = run(trained, parts, GroupDrop(epsilon=0.01, step=0.1), epochs=2, select="loss")
    best = min(history, key=lambda row: row["val_loss"])
    (said,) = [record.getMessage() for record in caplog.records if "GroupDrop" in record.getMessage()]
    assert f"after epoch {best['epoch']}, whose network is kept" in said
    assert f"“class 2” {best['val_violation[class 2]'] + 0.01:.3f} (of {parts[1].counts()['n'].iloc[2]})" in said
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(trained, parts, GroupDrop(epsilon=1.0), epochs=1)
    assert "GroupDrop" not in caplog.text


def test_a_missing_validation_part_group_or_teacher_is_one_sentence(parts, trained):
    training, val, _ = parts
    student = hurt(trained, training)
    for objective in (GroupDrop(), Lagrangian(on="val")):
        name = type(objective).__name__
        with pytest.raises(FairlineError, match=f"objective {name} takes its violations on a validation part"):
            finetune(student, trained, training, epochs=1, objective=objective)
        with pytest.raises(FairlineError, match=f"validation part of the objective {name} needs every group, but .*2"):
            finetune(student, trained, training, val.select(val.groups < 2), epochs=1, objective=objective)
    with pytest.raises(FairlineError, match="GroupDrop compares with a teacher, and this finetuning has none"):
        finetune(student, None, training, val, epochs=1, objective=GroupDrop())
    with pytest.raises(FairlineError, match="this training has none"):
        train(student, training, val, epochs=1, objective=GroupDrop())
    for without in (GroupDrop(on="train"), Lagrangian()):
        finetune(student, trained, training, epochs=1, objective=without, lr=1e-4)
        assert "val" not in without.violations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.01}, "not negative: epsilon=-0.01"),
        ({"epsilon": math.nan}, "finite"),
        ({"epsilon": math.inf}, "finite"),
        ({"measure": "f1"}, "loss, probability, accuracy, not 'f1'"),
        ({"step": 0.0}, "positive: step=0"),
        ({"step": math.inf}, "finite"),
        ({"cap": -1.0}, "cap of the multipliers must be positive"),
        ({"samples": 0}, "samples=0"),
        ({"on": "test"}, "train or val, not 'test'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        GroupDrop(**options)


def test_the_cap_holds_and_an_explosion_stops(parts, trained):
    objective = GroupDrop(step=1e3, cap=2.0)
    run(trained, parts, objective, epochs=2, lr=1e-6)
    assert float(objective.multipliers.max()) == 2.0
    with pytest.raises(FairlineError, match=r"Epoch \d of finetuning: The multiplier of group “class 2” exploded to"):
        run(trained, parts, GroupDrop(step=1e6), epochs=3, lr=1e-6)


def test_labels_alone_may_teach_while_the_teacher_is_compared_with(parts, trained):
    objective = GroupDrop(kd_weight=0)
    _, history = run(trained, parts, objective, epochs=1)
    logits, targets, batch = random_batch(5, 3, 3, 0)
    torch.testing.assert_close(objective.losses(logits, targets, batch), ERM().losses(logits, None, batch))
    assert "val_violation[class 0]" in history[-1]


def test_from_the_command_line_to_the_metrics(runs, tmp_path, run_here):
    options = ["--objective-option", "epsilon=0.02", "--objective-option", "measure=accuracy"]
    out = tmp_path / "drop"
    done = run_here("finetune", runs / "snl", "--objective", "drop", *options, "--epochs", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    columns = pd.read_parquet(out / "metrics.parquet").columns
    for what in ("lambda", "train_violation", "val_violation"):
        assert any(column.startswith(f"{what}[") for column in columns)


def test_masks_learn_under_it_by_their_training_images(parts, trained):
    def snl(**options):
        method = SNL(lr=0.03, lam=1e-3, max_epochs=2, batch_size=64, objective=GroupDrop(**options))
        return list(method.linearize(trained, parts[0], [0.2]))

    with pytest.raises(FairlineError, match="here is none: give one, or take on=train"):
        snl()
    (cut,) = snl(on="train")
    assert cut.relus > 0


@pytest.mark.parametrize("excess", [False, True])
def test_of_a_group_without_images_nothing_is_said_to_be_met(excess):
    logits, targets, batch = random_batch(60, 3, 3, 0)
    batch = replace(batch, groups=batch.groups % 2)
    objective = begun(GroupDrop(epsilon=0.1, excess=excess, on="train"), 3, [0.0, 0.0, 0.0])
    objective.held_out(logits, targets, batch)
    found = objective.violations["val"]
    assert found[2].isnan()
    assert found[:2].isfinite().all()
