"""The one training loop. Base training, mask learning and finetuning differ in what they pass to it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from fairline._io import load_state, resolve_device, save_state
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import group_mean, predict
from fairline.objectives.base import Batch, Objective
from fairline.objectives.erm import ERM

logger = logging.getLogger(__name__)

Select = Literal["accuracy", "loss", "worst_group_accuracy", "last"]


@dataclass(frozen=True)
class Progress:
    """What long work tells whoever watches.

    Attributes:
        stage: What is being done.
        done: Batches done in this stage.
        total: Batches in this stage, at most.
        message: Newest numbers, in a few words.
    """

    stage: str
    done: int
    total: int
    message: str = ""


ProgressCallback = Callable[[Progress], None]


def named_stage(progress: ProgressCallback | None, stage: str) -> ProgressCallback | None:
    """A callback that reports under another stage's name."""
    return None if progress is None else lambda update: progress(replace(update, stage=stage))


@dataclass(frozen=True)
class Epoch:
    """What one epoch brought. Losses are in nats, accuracies in [0, 1]; ``val_*`` is NaN without validation.

    Attributes:
        epoch: From 1.
        loss: Mean of the objective over the epoch's batches.
        learning_rate: At the epoch's end.
        seconds: Of this epoch, validation included.
        val_loss: Mean cross-entropy on the validation part.
        val_accuracy: On the validation part.
        val_worst_group_accuracy: Lowest group accuracy there.
        extra: What the objective logs.
    """

    epoch: int
    loss: float
    learning_rate: float
    seconds: float
    val_loss: float
    val_accuracy: float
    val_worst_group_accuracy: float
    extra: Mapping[str, float]

    def row(self) -> dict[str, float]:
        """One flat row for a table."""
        row = asdict(self)
        return {**{k: v for k, v in row.items() if k != "extra"}, **self.extra}


class Stateful(Protocol):
    """Something that a checkpoint must hold beside the model."""

    def state_dict(self) -> dict[str, Any]:
        """Current state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore it."""
        ...


def run_epochs(
    model: nn.Module,
    train: GroupedData,
    val: GroupedData | None = None,
    *,
    epochs: int,
    optimizer: Optimizer,
    objective: Objective,
    scheduler: LRScheduler | None = None,
    teacher: nn.Module | None = None,
    batch_size: int = 256,
    augment: bool = False,
    penalty: Callable[[], Tensor] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    stage: str = "training",
    progress: ProgressCallback | None = None,
    checkpoint: str | Path | None = None,
    stateful: Mapping[str, Stateful] | None = None,
) -> Iterator[Epoch]:
    """Train, yielding after each epoch; the caller may change what it passed, or stop.

    The state is saved when the caller asks for the next epoch, so a checkpoint also holds what the caller did
    with the last one. A run resumed from a checkpoint gives, on the CPU, the same numbers as one without a break.

    Args:
        model: Trained in place.
        train: Training part; it is moved to ``device`` whole.
        val: Validation part, measured after each epoch.
        epochs: At most this many.
        optimizer: Over the model's parameters.
        objective: What to minimise.
        scheduler: Stepped after each epoch.
        teacher: Source of distillation; its logits are computed once where nothing is augmented.
        batch_size: Samples in a step.
        augment: Random crops, and flips where ``train.flip`` allows them.
        penalty: Added to the loss in each step.
        seed: Of shuffling, augmentation and the model's own randomness.
        device: The accelerator if there is one, by default.
        stage: What to call this in progress reports.
        progress: Called after every batch.
        checkpoint: File to resume from and to save to after each epoch.
        stateful: What else the checkpoint holds.

    Yields:
        One :class:`Epoch` for each epoch not already done.

    Raises:
        FairlineError: The loss turns non-finite, or the checkpoint belongs to another run.
    """
    if epochs < 1 or batch_size < 1:
        raise FairlineError(f"Training needs epochs ≥ 1 and batch_size ≥ 1, not {epochs} and {batch_size}.")
    device = resolve_device(device)
    on_gpu = device.type == "cuda"
    memory_format = torch.channels_last if on_gpu else torch.contiguous_format
    model.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    train = train.to(device)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "objective": objective,
        **(stateful or {}),
    }
    if scheduler is not None:
        parts["scheduler"] = scheduler
    objective.start(train)

    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.manual_seed(seed)
        done = 0
        if checkpoint is not None and Path(checkpoint).exists():
            done = _restore(Path(checkpoint), parts, generator)
            logger.info("%s: resumed from %s after epoch %d", stage, checkpoint, done)
        teacher_logits = None
        if teacher is not None:
            teacher.to(device).eval()
            if not augment:
                teacher_logits = predict(teacher, train, device=device)

        batches = math.ceil(len(train) / batch_size)
        message = ""
        for epoch in range(done + 1, epochs + 1):
            began = time.perf_counter()
            model.train()
            order = torch.randperm(len(train), generator=generator).to(device)
            total = torch.zeros((), device=device)
            for step, index in enumerate(order.split(batch_size), start=1):
                images = train.normalized(index)
                if augment:
                    images = random_crop_and_flip(images, generator, flip=train.flip)
                images = images.contiguous(memory_format=memory_format)
                batch = Batch(images, train.labels[index], train.groups[index], index)
                with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                    logits = model(images).float()
                    target = None
                    if teacher_logits is not None:
                        target = teacher_logits[index]
                    elif teacher is not None:
                        with torch.no_grad():
                            target = teacher(images).float()
                loss = objective.reduce(objective.losses(logits, target, batch), batch)
                if penalty is not None:
                    loss = loss + penalty()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(index)
                if progress is not None:
                    progress(Progress(stage, (epoch - 1) * batches + step, epochs * batches, message))
            # Once an epoch: asking earlier would wait for the device at every step.
            mean_loss = float(total) / len(train)
            kept = f"; the checkpoint of epoch {epoch - 1} is kept at {checkpoint}" if checkpoint and epoch > 1 else ""
            if not math.isfinite(mean_loss):
                raise FairlineError(f"The loss became {mean_loss} in epoch {epoch} of {stage}{kept}.")
            if scheduler is not None:
                scheduler.step()
            if objective.needs_group_losses:
                try:
                    objective.end_epoch(*_group_losses(model, train, objective, teacher, teacher_logits))
                except FairlineError as error:
                    raise FairlineError(f"Epoch {epoch} of {stage}: {str(error).rstrip('.')}{kept}.") from None
            result = Epoch(
                epoch=epoch,
                loss=mean_loss,
                learning_rate=optimizer.param_groups[0]["lr"],
                **_validate(model, val, device),
                extra=objective.metrics(),
                seconds=time.perf_counter() - began,
            )
            message = f"epoch {epoch}, loss {mean_loss:.3f}"
            if val is not None:
                message += f", val accuracy {result.val_accuracy:.1%}"
            logger.info("%s: %s (%.1f s)", stage, message, result.seconds)
            yield result
            if checkpoint is not None:
                _save(Path(checkpoint), parts, generator, epoch)


def random_crop_and_flip(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Shift each image by up to an eighth of its shorter side, zeros moving in, and mirror half of them.

    Args:
        images: (B, C, H, W), normalised.
        generator: On the CPU, so that a seed means the same on every device.
        flip: Whether to mirror.

    Returns:
        (B, C, H, W).
    """
    n, _, height, width = images.shape
    pad = max(1, min(height, width) // 8)
    shifts = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator)
    mirror = torch.rand(n, generator=generator) < 0.5
    rows = shifts[:, :1] + torch.arange(height)
    columns = shifts[:, 1:] + torch.arange(width)
    if flip:
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad))
    rows, columns = rows.to(images.device), columns.to(images.device)
    sample = torch.arange(n, device=images.device)[:, None, None]
    # Advanced indices around the channel axis put it last.
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _group_losses(
    model: nn.Module,
    train: GroupedData,
    objective: Objective,
    teacher: nn.Module | None,
    teacher_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mean loss of each group, and of all, over the whole training set or the objective's subset of it."""
    index = objective.subset
    data = train if index is None else train.select(index)
    logits = predict(model, data)
    if teacher_logits is not None and index is not None:
        teacher_logits = teacher_logits[index]
    elif teacher_logits is None and teacher is not None:
        teacher_logits = predict(teacher, data)
    everything = torch.arange(len(train), device=train.device) if index is None else index
    batch = Batch(data.images, data.labels, data.groups, everything)
    with torch.no_grad():
        losses = objective.losses(logits, teacher_logits, batch)
    means = group_mean(losses, data.groups, data.num_groups)
    if index is None:
        return means, losses.double().mean()
    sizes = torch.bincount(train.groups, minlength=train.num_groups)
    return means, (means * sizes)[sizes > 0].sum() / len(train)


def _validate(model: nn.Module, val: GroupedData | None, device: torch.device) -> dict[str, float]:
    if val is None:
        return dict.fromkeys(("val_loss", "val_accuracy", "val_worst_group_accuracy"), math.nan)
    logits = predict(model, val, device=device).cpu()
    labels, groups = val.labels.cpu(), val.groups.cpu()
    correct = (logits.argmax(1) == labels).double()
    by_group = group_mean(correct, groups, val.num_groups)
    return {
        "val_loss": float(F.cross_entropy(logits, labels)),
        "val_accuracy": float(correct.mean()),
        "val_worst_group_accuracy": float(by_group[~by_group.isnan()].min()),
    }


def _save(path: Path, parts: Mapping[str, Any], generator: torch.Generator, epoch: int) -> None:
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    if "scheduler" in state:
        state["scheduler"] = {k: v for k, v in state["scheduler"].items() if not k.startswith("_")}
        milestones = state["scheduler"].get("milestones")
        if milestones is not None:
            state["scheduler"]["milestones"] = dict(milestones)
    random = {"shuffle": generator.get_state(), "global": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    save_state(path, {**state, "random": random, "epoch": epoch})


def _restore(path: Path, parts: Mapping[str, Any], generator: torch.Generator) -> int:
    state = load_state(path)
    try:
        for name, part in parts.items():
            if name == "scheduler" and "milestones" in state[name]:
                state[name]["milestones"] = type(part.milestones)(state[name]["milestones"])
            part.load_state_dict(state[name])
        generator.set_state(state["random"]["shuffle"])
        torch.set_rng_state(state["random"]["global"])
        if "cuda" in state["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random"]["cuda"])
        return int(state["epoch"])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FairlineError(f"Checkpoint {path} belongs to another run ({reason}).") from None


class Best:
    """Keeps the weights of the best epoch, chosen on the validation part, or of the last one."""

    def __init__(self, model: nn.Module, select: Select) -> None:
        if select not in get_args(Select):
            raise FairlineError(f"Epochs are selected by {', '.join(get_args(Select))}, not '{select}'.")
        self.model = model
        self.select = select
        self.score = [-math.inf, -math.inf]
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}

    def see(self, epoch: Epoch) -> None:
        """Keep the current weights if no earlier epoch was as good; without validation, always."""
        value = math.nan if self.select == "last" else getattr(epoch, f"val_{self.select}")
        # A small validation part has many ties in accuracy; the loss decides them.
        score = [-value if self.select == "loss" else value, -epoch.val_loss]
        if math.isnan(value) or score > self.score:
            self.score, self.epoch = score, epoch.epoch
            self.weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def restore(self) -> None:
        """Put the kept weights into the model."""
        self.model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"score": self.score, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.score, self.epoch, self.weights = state["score"], state["epoch"], state["weights"]


class History:
    """The epochs of a run; part of the checkpoint, so that a resumed run has them all."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.rows = state["rows"]


def _fit(
    model: nn.Module, train: GroupedData, val: GroupedData | None, select: Select, **arguments: Any
) -> list[dict[str, float]]:
    """Run all epochs and leave the best weights in the model."""
    best, history = Best(model, select), History()
    for epoch in run_epochs(model, train, val, stateful={"best": best, "history": history}, **arguments):
        best.see(epoch)
        history.rows.append(epoch.row())
    best.restore()
    return history.rows


def train(
    model: nn.Module,
    train: GroupedData,
    val: GroupedData | None = None,
    *,
    epochs: int = 160,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 256,
    milestones: Sequence[float] = (0.5, 0.75),
    augment: bool = False,
    objective: Objective | None = None,
    select: Select = "accuracy",
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: ProgressCallback | None = None,
    checkpoint: str | Path | None = None,
) -> list[dict[str, float]]:
    """Train a network from its current weights, as the published SNL code trains its base models.

    SGD with momentum; the learning rate falls tenfold at each milestone. The epoch with the best validation
    value is kept.

    Args:
        model: Trained in place.
        train: Training part.
        val: Validation part; without it the last epoch is kept.
        epochs: How many.
        lr: Learning rate at the start.
        momentum: Of SGD.
        weight_decay: Of SGD.
        batch_size: Samples in a step.
        milestones: Fractions of ``epochs`` at which the learning rate falls.
        augment: Random crops and flips; the paper uses none.
        objective: :class:`~fairline.objectives.erm.ERM` by default.
        select: What makes an epoch the best on the validation part.
        seed: Of the whole run.
        device: The accelerator if there is one, by default.
        progress: Called after every batch.
        checkpoint: File to resume from and to save to.

    Returns:
        One row an epoch.
    """
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return _fit(
        model,
        train,
        val,
        select,
        epochs=epochs,
        optimizer=optimizer,
        scheduler=MultiStepLR(optimizer, [max(1, round(epochs * fraction)) for fraction in milestones], gamma=0.1),
        objective=objective or ERM(),
        batch_size=batch_size,
        augment=augment,
        seed=seed,
        device=device,
        stage="training",
        progress=progress,
        checkpoint=checkpoint,
    )


def finetune(
    model: nn.Module,
    teacher: nn.Module | None,
    train: GroupedData,
    val: GroupedData | None = None,
    *,
    epochs: int = 100,
    objective: Objective | None = None,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = False,
    batch_size: int = 256,
    augment: bool = False,
    select: Select = "accuracy",
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: ProgressCallback | None = None,
    checkpoint: str | Path | None = None,
    history: list[dict[str, float]] | None = None,
) -> nn.Module:
    """Finetune a linearized network under knowledge distillation (Cho et al. 2022, Algorithm 1, line 12).

    SGD with momentum and a cosine schedule, on ``CE + T²·KL`` by default. Masks stay as they are.

    Args:
        model: With fixed masks; trained in place.
        teacher: The network before linearization; None finetunes on the labels alone.
        train: Training part.
        val: Validation part; without it the last epoch is kept.
        epochs: How many.
        objective: What to minimise; :class:`~fairline.objectives.erm.ERM` by default.
        lr: Learning rate at the start.
        momentum: Of SGD.
        weight_decay: Of SGD.
        nesterov: Whether SGD's momentum is Nesterov's.
        batch_size: Samples in a step.
        augment: Random crops and flips; the paper uses none.
        select: What makes an epoch the best on the validation part. Under an objective that changes its mind while
            it trains (λ of Algorithm 1 is 0 in the first epoch), ``"accuracy"`` may choose an epoch before it acts;
            ``"worst_group_accuracy"`` or ``"last"`` do not.
        seed: Of the whole run.
        device: The accelerator if there is one, by default.
        progress: Called after every batch.
        checkpoint: File to resume from and to save to.
        history: Rows, one an epoch, are appended here.

    Returns:
        The model itself.
    """
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    rows = _fit(
        model,
        train,
        val,
        select,
        epochs=epochs,
        optimizer=optimizer,
        scheduler=CosineAnnealingLR(optimizer, epochs),
        objective=objective or ERM(),
        teacher=teacher,
        batch_size=batch_size,
        augment=augment,
        seed=seed,
        device=device,
        stage="finetuning",
        progress=progress,
        checkpoint=checkpoint,
    )
    if history is not None:
        history.extend(rows)
    return model
