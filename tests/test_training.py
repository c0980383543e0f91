from __future__ import annotations

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from fairline.errors import FairlineError
from fairline.inference import group_mean, predict
from fairline.masking import mask_relus, masked_relus, relu_count
from fairline.models import build
from fairline.objectives import ERM, Objective
from fairline.objectives import REGISTRY as OBJECTIVES
from fairline.objectives import build as build_objective
from fairline.training import Best, Epoch, Progress, best_epoch, finetune, random_crop_and_flip, run_epochs, train
from tests.conftest import make_data


def fresh(seed: int = 0, dropout: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = build("cnn", 3, 1, 8, width=4)
    if dropout:
        model.append(nn.Dropout(0.3))
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def arguments(model: nn.Module, **changes):
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    settings = {"epochs": 3, "optimizer": optimizer, "objective": ERM(), "batch_size": 32, "seed": 0}
    return {**settings, **changes}


def test_training_learns(parts):
    model = fresh()
    rows = train(model, parts[0], parts[1], epochs=6, batch_size=32, lr=0.05)
    accuracy = (predict(model, parts[2]).argmax(1) == parts[2].labels).float().mean()
    assert accuracy > 0.9
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["learning_rate"] == pytest.approx(0.05)
    assert rows[-1]["learning_rate"] == pytest.approx(0.0005)


def test_one_step_is_the_step_of_the_textbook(parts):
    """One full-batch step equals SGD on the mean loss, written out."""
    data = parts[0]
    model = fresh()
    other = copy.deepcopy(model)
    list(run_epochs(model, data, **arguments(model, epochs=1, batch_size=len(data))))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    optimizer = SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loss = F.cross_entropy(other.train()(data.normalized(order)), data.labels[order])
    loss.backward()
    optimizer.step()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_same_seed_same_network_and_the_global_generator_is_left_alone(parts):
    results = []
    for seed in (0, 0, 1):
        model = fresh(dropout=True)
        torch.manual_seed(123)
        state = torch.get_rng_state()
        train(model, parts[0], parts[1], epochs=2, batch_size=32, augment=True, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(weights(model))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


class Counting(Objective):
    """Has state that changes what is minimised."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0
        self.seen = []

    def reduce(self, losses, batch):
        return self.scale * losses.mean()

    def end_epoch(self, group_losses, overall):
        self.scale += float(group_losses.max() - overall)
        self.seen.append((group_losses, overall))

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        self.scale = state["scale"]


@pytest.mark.parametrize("stop_after", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["cosine", "steps"])
def test_a_resumed_run_equals_an_unbroken_one(parts, trained, tmp_path, stop_after, schedule):
    def run(checkpoint, stop=None):
        model = fresh(dropout=True)
        settings = arguments(model, epochs=5, objective=Counting())
        optimizer = settings["optimizer"]
        settings["scheduler"] = (
            CosineAnnealingLR(optimizer, 5) if schedule == "cosine" else MultiStepLR(optimizer, [2, 3], gamma=0.1)
        )
        epochs = run_epochs(model, parts[0], parts[1], teacher=trained, augment=True, checkpoint=checkpoint, **settings)
        rows = [epoch.row() for epoch in itertools.islice(epochs, stop)]
        return weights(model), [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    whole, rows = run(None)
    file = tmp_path / "checkpoint.safetensors"
    # Stopping inside an epoch loses that epoch: it is not in the checkpoint.
    run(file, stop_after)
    resumed, more = run(file)
    assert equal(whole, resumed)
    assert rows[5 - len(more) :] == more
    assert len(more) == 5 - (stop_after - 1)


def test_checkpoint_of_another_run_is_refused(parts, tmp_path):
    file = tmp_path / "c"
    model = fresh()
    list(run_epochs(model, parts[0], checkpoint=file, **arguments(model, epochs=1)))
    wider = build("cnn", 3, 1, 8, width=8)
    with pytest.raises(FairlineError, match="belongs to another run"):
        list(run_epochs(wider, parts[0], checkpoint=file, **arguments(wider)))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(FairlineError, match="not a whole safetensors file"):
        list(run_epochs(model, parts[0], checkpoint=file, **arguments(model)))


class Spy(ERM):
    def __init__(self):
        super().__init__()
        self.targets = []
        self.batches = []

    def losses(self, logits, teacher_logits, batch):
        self.targets.append(teacher_logits.detach().clone())
        self.batches.append(batch)
        return super().losses(logits, teacher_logits, batch)


def test_teacher_logits_computed_once_are_those_of_each_batch(parts, trained):
    model, spy = fresh(), Spy()
    list(run_epochs(model, parts[0], teacher=trained, **arguments(model, epochs=1, objective=spy)))
    for target, batch in zip(spy.targets, spy.batches, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(target, trained.eval()(batch.images), rtol=1e-4, atol=1e-5)
        assert torch.equal(batch.labels, parts[0].labels[batch.index])
        assert torch.equal(batch.groups, parts[0].groups[batch.index])
        torch.testing.assert_close(batch.images, parts[0].normalized(batch.index))
    seen = torch.cat([batch.index for batch in spy.batches]).sort().values
    assert torch.equal(seen, torch.arange(len(parts[0])))


def test_teacher_sees_the_augmented_images(parts, trained):
    model, spy = fresh(), Spy()
    list(run_epochs(model, parts[0], teacher=trained, augment=True, **arguments(model, epochs=1, objective=spy)))
    with torch.no_grad():
        torch.testing.assert_close(spy.targets[0], trained.eval()(spy.batches[0].images))


def test_group_losses_cover_the_whole_training_set(parts, trained):
    model, objective = fresh(), Counting()
    list(run_epochs(model, parts[0], teacher=trained, **arguments(model, epochs=1, objective=objective)))
    (group_losses, overall) = objective.seen[0]
    data = parts[0]
    logits, targets = predict(model, data), predict(trained, data)
    losses = F.cross_entropy(logits, data.labels, reduction="none") + 16 * F.kl_div(
        (logits / 4).log_softmax(1), (targets / 4).softmax(1), reduction="none"
    ).sum(1)
    torch.testing.assert_close(overall.float(), losses.mean())
    for group in range(data.num_groups):
        torch.testing.assert_close(group_losses[group].float(), losses[data.groups == group].mean())
    assert torch.isnan(group_mean(losses, data.groups, 9)[8])


def test_penalty_is_minimised(parts):
    model = fresh()
    last = model[-1].weight

    def penalty():
        return 100 * last.square().sum()

    before = penalty().item()
    list(run_epochs(model, parts[0], penalty=penalty, **arguments(model, epochs=1, optimizer=SGD([last], lr=1e-3))))
    assert penalty().item() < 0.3 * before


def test_the_loss_of_an_epoch_is_the_objective_and_the_penalty_is_logged_apart(parts):
    """Weights that do not move: both means are known."""
    model = fresh()
    weight = model[-1].weight
    losses = {}
    for name, penalty in (("without", None), ("with", lambda: 3 * weight.abs().sum())):
        settings = arguments(model, epochs=1, optimizer=SGD(model.parameters(), lr=0.0))
        (epoch,) = run_epochs(model, parts[0], penalty=penalty, **settings)
        losses[name] = epoch
    assert losses["with"].loss == losses["without"].loss
    assert losses["with"].row()["penalty"] == pytest.approx(3 * float(weight.detach().abs().sum()), rel=1e-5)
    assert "penalty" not in losses["without"].row()


def test_settings_that_training_does_not_know(parts):
    for fit in (
        lambda **more: train(fresh(), parts[0], **more),
        lambda **more: finetune(fresh(), None, parts[0], **more),
    ):
        for name in ("learning_rate", "penalty", "stage"):
            with pytest.raises(TypeError, match=f"no setting '{name}'; settings are batch_size, augment, seed"):
                fit(**{name: 1})


def test_non_finite_loss_stops_and_keeps_the_checkpoint(parts, tmp_path):
    model = fresh()
    file = tmp_path / "c"
    list(run_epochs(model, parts[0], checkpoint=file, **arguments(model, epochs=1)))
    kept = file.read_bytes()
    settings = arguments(model, epochs=4)
    with pytest.raises(
        FairlineError, match=r"became (nan|inf) in epoch 2 of training; the checkpoint of epoch 1 is kept"
    ):
        list(run_epochs(model, parts[0], checkpoint=file, penalty=lambda: torch.tensor(math.nan), **settings))
    assert file.read_bytes() == kept


def epoch_of(number: int, accuracy: float, loss: float, worst: float = 0.0) -> Epoch:
    return Epoch(number, 0.0, 0.0, 0.0, loss, accuracy, worst, {})


def test_best_epoch_by_each_criterion():
    history = [
        epoch_of(1, 0.8, 0.9, 0.2),
        epoch_of(2, 0.9, 0.8, 0.1),
        epoch_of(3, 0.9, 0.7, 0.15),
        epoch_of(4, 0.7, 0.6, 0.1),
    ]
    for select, expected in (("accuracy", 3), ("loss", 4), ("worst_group_accuracy", 1), ("last", 4)):
        model = nn.Linear(1, 1)
        best = Best(model, select)
        for epoch in history:
            model.weight.data.fill_(epoch.epoch)
            best.see(epoch)
        best.restore()
        assert model.weight.item() == expected
        assert best_epoch([epoch.row() for epoch in history], select) + 1 == expected
    assert best_epoch([epoch_of(number, math.nan, math.nan).row() for number in (1, 2)], "accuracy") + 1 == 2
    best = Best(nn.Linear(1, 1), "accuracy")
    best.see(epoch_of(1, math.nan, math.nan))
    best.see(epoch_of(2, math.nan, math.nan))
    assert best.epoch == 2
    with pytest.raises(FairlineError, match="selected by"):
        Best(nn.Linear(1, 1), "luck")


def test_finetune_keeps_masks_and_moves_towards_the_teacher(parts, trained):
    student = mask_relus(trained, parts[0].normalized(slice(2)))
    generator = torch.Generator().manual_seed(0)
    for layer in masked_relus(student).values():
        layer.set_mask(torch.rand(layer.shape, generator=generator) < 0.2)
    before = {name: layer.kept.clone() for name, layer in masked_relus(student).items()}
    count = relu_count(student)

    def divergence():
        return float(
            (predict(student, parts[0]).log_softmax(1) - predict(trained, parts[0]).log_softmax(1)).square().mean()
        )

    start = divergence()
    history: list[dict[str, float]] = []
    returned = finetune(student, trained, parts[0], parts[1], epochs=8, lr=0.02, batch_size=32, history=history)
    assert returned is student
    assert divergence() < start
    assert relu_count(student) == count
    assert all(torch.equal(layer.kept, before[name]) for name, layer in masked_relus(student).items())
    rates = [row["learning_rate"] for row in history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_augmentation_shifts_and_mirrors():
    images = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(400, 1, 8, 8)
    out = random_crop_and_flip(images, torch.Generator().manual_seed(0), flip=True)
    assert out.shape == images.shape
    padded = F.pad(images[:1], (1, 1, 1, 1))
    allowed = {
        tuple(view.flatten().tolist())
        for dy in range(3)
        for dx in range(3)
        for view in (padded[..., dy : dy + 8, dx : dx + 8], padded[..., dy : dy + 8, dx : dx + 8].flip(3))
    }
    found = {tuple(image.flatten().tolist()) for image in out}
    assert found == allowed
    unflipped = random_crop_and_flip(images, torch.Generator().manual_seed(0), flip=False)
    assert len({tuple(image.flatten().tolist()) for image in unflipped}) == 9


def test_progress_counts_every_batch(parts):
    reports: list[Progress] = []
    model = fresh()
    list(run_epochs(model, parts[0], parts[1], progress=reports.append, **arguments(model, epochs=2)))
    batches = math.ceil(len(parts[0]) / 32)
    assert [report.done for report in reports if not report.metrics] == list(range(1, 2 * batches + 1))
    assert {report.total for report in reports} == {2 * batches}
    assert "val accuracy" in reports[-1].message
    ended = [report for report in reports if report.metrics]
    assert [report.done for report in ended] == [batches, 2 * batches]
    assert [report.metrics["epoch"] for report in ended] == [1, 2]
    assert {"loss", "val_accuracy", "learning_rate"} <= set(ended[0].metrics)


def test_predict_refuses_what_is_no_classifier(parts):
    with pytest.raises(FairlineError, match="logits of shape"):
        predict(nn.Flatten(0), parts[2])
    with pytest.raises(FairlineError, match="2 outputs, but synthetic has 3 classes"):
        predict(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), parts[2])


def test_impossible_settings(parts):
    model = fresh()
    with pytest.raises(FairlineError, match="epochs ≥ 1"):
        list(run_epochs(model, parts[0], **arguments(model, epochs=0)))
    with pytest.raises(FairlineError, match="batch_size ≥ 1"):
        list(run_epochs(model, parts[0], **arguments(model, batch_size=0)))


class Normalised(nn.Sequential):
    """Normalises one number a channel over the batch, as a ResNet does in its last layers on small images."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize("n", [2, 9, 10, 11, 12, 13])
@pytest.mark.parametrize("batch_size", [3, 4, 5, 12])
def test_every_image_is_seen_once_and_none_is_alone(parts, n, batch_size):
    """Whatever is left over for the last batch, a network with BatchNorm trains."""
    data, spy, reports = parts[0].select(torch.arange(n)), Spy(), []
    model = Normalised()
    settings = arguments(model, epochs=2, objective=spy, batch_size=batch_size)
    list(run_epochs(model, data, teacher=fresh(), progress=reports.append, **settings))
    sizes = [len(batch.index) for batch in spy.batches]
    epoch = sizes[: len(sizes) // 2]
    assert sum(epoch) == n
    assert torch.equal(torch.cat([batch.index for batch in spy.batches[: len(epoch)]]).sort().values, torch.arange(n))
    assert min(epoch) >= 2
    assert epoch[:-1] == [batch_size] * (len(epoch) - 1)
    assert epoch[-1] <= batch_size + 1
    assert [report.done for report in reports if not report.metrics] == list(range(1, len(sizes) + 1))
    assert {report.total for report in reports} == {len(sizes)}


@pytest.mark.parametrize(("n", "batch_size"), [(1, 32), (5, 1)])
def test_batchnorm_without_company_is_a_sentence(parts, n, batch_size):
    data = parts[0].select(torch.arange(n))
    with pytest.raises(FairlineError, match="Normalised normalises over the images of a batch and cannot train on one"):
        train(Normalised(), data, epochs=1, batch_size=batch_size)
    train(fresh(), data, epochs=1, batch_size=batch_size)


def linear(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))


def test_outputs_that_do_not_fit(parts, trained):
    few = "The model has 2 outputs, but synthetic has 3 classes"
    for call in (
        partial(train, linear(2), parts[0]),
        partial(finetune, linear(2), trained, parts[0]),
        partial(finetune, trained, linear(2), parts[0]),
        partial(finetune, trained, linear(2), parts[0], augment=True),
    ):
        with pytest.raises(FairlineError, match=few):
            call(epochs=1)
    with pytest.raises(FairlineError, match="Sequential has 3 outputs, but its teacher Sequential has 5"):
        finetune(linear(3), linear(5), parts[0], epochs=1)
    train(linear(5), parts[0], epochs=1)


#: Objectives that need every group or class of the training part, and those that need them of the validation part too.
NEED = {
    "groups": {"lagrangian", "drop", "group_dro", "reweighting", "balanced_kd", "ada_alpha", "ada_margin"},
    "labels": {"long_tail_kd", "ldam", "logit_adjust"},
}
JUDGE = {"drop", "ada_alpha", "ada_margin"}


@pytest.mark.parametrize("what", ["labels", "groups"])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_class_or_group_absent_from_a_part(what, name):
    """A part without it is trained and chosen on; an objective that needs it says so, by its name."""
    data = make_data(120, classes=3, groups=3)
    lacking = data.select(torch.nonzero(getattr(data, what) != 2).flatten())
    said = {
        "groups": "needs every group, but 'group 2' has no image",
        "labels": "needs every class, but “class 2” has no",
    }
    for training, val in ((lacking, data), (data, lacking)):
        model = linear(3)
        run = partial(finetune, model, linear(3), training, val, epochs=2, lr=0.01, objective=build_objective(name))
        if name in NEED[what] and (training is lacking or name in JUDGE):
            with pytest.raises(FairlineError, match=said[what]):
                run()
            continue
        rows: list[dict[str, float]] = []
        run(history=rows)
        assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "val_loss", "val_worst_group_accuracy"))
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_network_without_weights_is_a_sentence(parts):
    with pytest.raises(FairlineError, match="Flatten has no weights to train"):
        train(nn.Flatten(), parts[0], epochs=1)


def test_gradients_are_cut_to_a_norm(parts):
    """One step of plain SGD moves the weights by the learning rate times the norm at most, along the gradient."""

    def moved(**more):
        model = fresh()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        data = parts[0].select(torch.arange(32))
        train(model, data, epochs=1, lr=0.1, batch_size=32, momentum=0.0, weight_decay=0.0, milestones=(), **more)
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    free, cut, loose = moved(), moved(clip=0.01), moved(clip=1e6)
    assert torch.equal(free, loose)
    assert cut.norm().item() == pytest.approx(0.001, rel=1e-3)
    torch.testing.assert_close(cut / cut.norm(), free / free.norm(), rtol=1e-3, atol=1e-4)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(FairlineError, match="positive norm"):
            moved(clip=wrong)
