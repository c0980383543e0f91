"""The one training loop. Base training, mask learning and finetuning differ in what they pass to it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fairline._io import resolve_device
from fairline._memory import memory_kept
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import group_mean, logits_of, predict, require_classes
from fairline.objectives.base import Batch, Objective
from fairline.precision import FLOAT32, Arithmetic, Precision
from fairline.ranks import here
from fairline.training import graphs
from fairline.training.augment import random_crop_and_flip
from fairline.training.checkpoint import Stateful, arithmetic_of, restore, save
from fairline.training.progress import Progress, ProgressCallback
from fairline.training.trial import TRIAL_IMAGES, choose

logger = logging.getLogger(__name__)


class Diverged(FairlineError):
    """The loss is not finite any more."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch brought. Losses are in nats, accuracies in [0, 1]; ``val_*`` is NaN without validation.

    Attributes:
        epoch: From 1.
        loss: Mean of the objective over the epoch's batches, by their size; a penalty is no part of it.
        learning_rate: At the epoch's end.
        seconds: Of this epoch, validation included.
        val_loss: Mean cross-entropy on the validation part.
        val_accuracy: On the validation part.
        val_worst_group_accuracy: Lowest group accuracy there.
        extra: What the objective logs, and ``penalty``, its mean, where the run has one.
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


class LoopSettings(TypedDict, total=False):
    """Settings of the loop that whoever trains may pass on; :data:`LOOP_DEFAULTS` where nothing is said.

    Attributes:
        batch_size: Samples in a step; a last one that would be alone joins the step before.
        augment: Random crops, and flips where ``train.flip`` allows them.
        seed: Of shuffling, augmentation and the model's own randomness.
        device: The accelerator if there is one, by default.
        progress: Called after every batch, and with the numbers of each epoch after it.
        checkpoint: File to resume from and to save to after each epoch.
        precision: What to compute in, see :func:`~fairline.training.choose`; float32 on a CPU by default. A
            resumed run goes on in what it began in.
        cuda_graphs: Whether a network on a GPU is captured and replayed, see
            :class:`~fairline.training.graphs.Replay`. Elsewhere it changes nothing. By default what the variable
            ``FAIRLINE_CUDA_GRAPHS`` says (1 or 0), else whether it is made of modules of torch and fairline alone:
            other Python code may decide anew at each batch.
    """

    batch_size: int
    augment: bool
    seed: int
    device: str | torch.device | None
    progress: ProgressCallback | None
    checkpoint: str | Path | None
    precision: Precision | Arithmetic | None
    cuda_graphs: bool | None


LOOP_DEFAULTS = LoopSettings(
    batch_size=256,
    augment=False,
    seed=0,
    device=None,
    progress=None,
    checkpoint=None,
    precision=None,
    cuda_graphs=None,
)


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
    penalty: Callable[[], Tensor] | None = None,
    stage: str = "training",
    stateful: Mapping[str, Stateful] | None = None,
    **settings: Unpack[LoopSettings],
) -> Iterator[Epoch]:
    """Train, yielding after each epoch; the caller may change what it passed, or stop.

    The state is saved when the caller asks for the next epoch, so a checkpoint also holds what the caller did
    with the last one. A run resumed from a checkpoint gives, on the CPU, the same numbers as one without a break.

    Args:
        model: Trained in place.
        train: Training part; it is moved to the device, but for images that would take too much of its memory.
        val: Validation part, measured after each epoch.
        epochs: At most this many.
        optimizer: Over the model's parameters.
        objective: What to minimise.
        scheduler: Stepped after each epoch.
        teacher: Source of distillation; its logits are computed once where nothing is augmented.
        penalty: Added to the objective in each step.
        stage: What to call this in progress reports.
        stateful: What else the checkpoint holds.
        settings: See :class:`LoopSettings`.

    Yields:
        One :class:`Epoch` for each epoch not already done.

    Raises:
        FairlineError: The loss turns non-finite (Diverged), the checkpoint is another run's, or outputs do not fit.
    """
    chosen = LOOP_DEFAULTS | settings
    run = _Run(model, train, val, epochs, optimizer, objective, scheduler, teacher, penalty, stage, stateful, **chosen)
    with run.randomness(), memory_kept(), run.placed():
        for epoch in range(run.resume() + 1, epochs + 1):
            began = time.perf_counter()
            means = run.steps(epoch)
            if scheduler is not None:
                scheduler.step()
            run.look(epoch)
            result = Epoch(
                epoch=epoch,
                loss=means.pop("loss"),
                learning_rate=optimizer.param_groups[0]["lr"],
                **run.validate(),
                extra={**objective.metrics(), **means},
                seconds=time.perf_counter() - began,
            )
            run.log(result)
            yield result
            run.save(epoch)


@dataclass(eq=False)
class _Run:
    """A run of the loop on its device; fields as in :func:`run_epochs` and :class:`LoopSettings`."""

    model: nn.Module
    train: GroupedData
    val: GroupedData | None
    epochs: int
    optimizer: Optimizer
    objective: Objective
    scheduler: LRScheduler | None
    teacher: nn.Module | None
    penalty: Callable[[], Tensor] | None
    stage: str
    stateful: Mapping[str, Stateful] | None
    batch_size: int
    augment: bool
    seed: int
    device: str | torch.device | None
    progress: ProgressCallback | None
    checkpoint: str | Path | None
    precision: Precision | Arithmetic | None
    cuda_graphs: bool | None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise FairlineError(
                f"Training needs epochs ≥ 1 and batch_size ≥ 1, not {self.epochs} and {self.batch_size}."
            )
        self.where = resolve_device(self.device)
        self.ranks = here()
        if not self.ranks.is_first:
            self.progress = None
        self.train = self.train.to(self.where)
        self.batch_sizes = _batch_sizes(len(self.train), self.batch_size)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "objective": self.objective}
        self.parts |= self.stateful or {}
        if self.scheduler is not None:
            self.parts["scheduler"] = self.scheduler
        self.start_objective()
        self.teacher_logits: Tensor | None = None
        self.held_out: Tensor | None = None
        self.teacher_held_out: Tensor | None = None
        self.message = ""

    def start_objective(self) -> None:
        """Show it the data; what it needs and does not get is refused. One of the user's own may lack newer parts."""
        if isinstance(self.objective, Objective):
            self.objective.total_epochs = self.epochs
        self.objective.start(self.train)
        self.shown_held_out = bool(getattr(self.objective, "needs_held_out", False))
        if self.shown_held_out:
            self.objective.start_held_out(self.val)
        if self.teacher is None and getattr(self.objective, "needs_teacher", False):
            raise FairlineError(
                f"The objective {type(self.objective).__name__} compares with a teacher, and this {self.stage} has "
                "none (kd_weight=0 lets the labels alone teach)."
            )

    @contextmanager
    def randomness(self) -> Iterator[None]:
        """The run's own global random numbers; those of the caller are left as they are."""
        with torch.random.fork_rng(devices=[self.where] if self.where.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Model and teacher on the device, in the memory order of the arithmetic as long as the run lasts."""
        kept = None if self.checkpoint is None else arithmetic_of(Path(self.checkpoint))
        images = self.train.normalized(slice(TRIAL_IMAGES))
        self.arithmetic = kept or self.ranks.first(lambda: choose(self.precision, self.model, images, self.where))
        networks = [network for network in (self.model, self.teacher) if network is not None]
        for network in networks:
            self.arithmetic.place(network, self.where)
        # A graph holds no statistics of other processes' images.
        usable = self.ranks.size == 1 and graphs.can_capture(self.where)
        self.replay = graphs.Replay(self.model) if usable and graphs.wanted(self.cuda_graphs, self.model) else None
        try:
            yield
        finally:
            for network in networks:
                FLOAT32.place(network, self.where)

    def resume(self) -> int:
        """Restore a checkpoint if there is one, and prepare the teacher; returns the last epoch done."""
        done = 0
        if self.checkpoint is not None and Path(self.checkpoint).exists():
            done = restore(Path(self.checkpoint), self.parts, self.generator)
            logger.info("%s: resumed from %s after epoch %d", self.stage, self.checkpoint, done)
        self.ranks.agree(self.model, self.objective)
        if self.teacher is not None:
            self.teacher.eval()
            if not self.augment:
                self.teacher_logits = self.predict(self.teacher, self.train)
            sees = getattr(self.objective, "sees_teacher", False)
            if self.val is not None and (self.shown_held_out or sees):
                self.teacher_held_out = self.predict(self.teacher, self.val)
            if sees:
                self.show_teacher(self.teacher)
        return done

    def show_teacher(self, teacher: nn.Module) -> None:
        """Show an objective what the teacher makes of the validation part, else of the training part."""
        if self.val is not None and self.teacher_held_out is not None:
            self.objective.see_teacher(self.teacher_held_out, self.val.to(self.where), True)
            return
        known = self.teacher_logits
        self.objective.see_teacher(self.predict(teacher, self.train) if known is None else known, self.train, False)

    def steps(self, epoch: int) -> dict[str, float]:
        """One pass over the training part, a step a batch; means of the objective and of the penalty over samples."""
        self.model.train()
        total, total_penalty = torch.zeros((), device=self.where), torch.zeros((), device=self.where)
        for step, batch in enumerate(self.batches(), start=1):
            logits, teacher_logits = self.forward(batch)
            loss = self.objective.reduce(self.objective.losses(logits, teacher_logits, batch), batch)
            total += loss.detach() * len(batch.index)
            if self.penalty is not None:
                penalty = self.penalty()
                total_penalty += penalty.detach() * len(batch.index)
                loss = loss + penalty
            self.optimizer.zero_grad(set_to_none=True)
            self.ranks.backward(loss, self.optimizer)
            self.optimizer.step()
            if self.progress is not None:
                batches = len(self.batch_sizes)
                done = (epoch - 1) * batches + step
                self.progress(Progress(self.stage, done, self.epochs * batches, self.message))
        # Once an epoch: asking earlier would wait for the device at every step.
        means = {"loss": float(total) / len(self.train)}
        if self.penalty is not None:
            means["penalty"] = float(total_penalty) / len(self.train)
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise Diverged(f"The {name} became {mean} in epoch {epoch} of {self.stage}{self.kept(epoch)}.")
        return means

    def batches(self) -> Iterator[Batch]:
        """The training part once, in random order, normalised and augmented."""
        order = torch.randperm(len(self.train), generator=self.generator)
        for index, images in self.train.batches(order, self.batch_sizes):
            if self.augment:
                images = random_crop_and_flip(images, self.generator, flip=self.train.flip)
            yield Batch(self.arithmetic.order(images), self.train.labels[index], self.train.groups[index], index)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits (B, K) of the model, and of the teacher if there is one; each rank computes some."""
        count = len(batch.index)
        images = batch.images[self.ranks.part(count)]
        with self.arithmetic.autocast(self.where), self.ranks.dividing(count, self.where):
            own = self.logits(self.model, images, self.replay)
            known = None if self.teacher_logits is None else self.teacher_logits[batch.index]
            if self.teacher is not None and known is None:
                with torch.no_grad():
                    known = self.ranks.gather(self.logits(self.teacher, images), count)
        logits, teacher_logits = self.ranks.gather(own, count), known
        if teacher_logits is None:
            return logits, None
        if logits.shape != teacher_logits.shape:
            raise FairlineError(
                f"{type(self.model).__name__} has {logits.shape[1]} outputs, but its teacher "
                f"{type(self.teacher).__name__} has {teacher_logits.shape[1]}."
            )
        return logits, teacher_logits

    def logits(self, network: nn.Module, images: Tensor, replay: graphs.Replay | None = None) -> Tensor:
        """Logits (B, K) of a network, of all classes of the data at least."""
        try:
            output = (replay or network)(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise FairlineError(
                f"{type(network).__name__} normalises over the images of a batch and cannot train on one alone; "
                f"batch_size is {self.batch_size}, and {self.train.name} has {len(self.train)} training images."
            ) from None
        return require_classes(logits_of(output, network, images).float(), self.train)

    def look(self, epoch: int) -> None:
        """Compute the validation part's logits, and show an objective what it asks for: those, and the losses."""
        self.held_out = None if self.val is None else self.predict(self.model, self.val)
        objective = self.objective
        try:
            if self.shown_held_out and self.val is not None and self.held_out is not None:
                objective.held_out(self.held_out, self.teacher_held_out, self.whole(self.val))
            if objective.needs_group_losses:
                objective.end_epoch(*self.group_losses())
        except FairlineError as error:
            reason = str(error).rstrip(".")
            raise FairlineError(f"Epoch {epoch} of {self.stage}: {reason}{self.kept(epoch)}.") from None
        if self.shown_held_out or objective.needs_group_losses:
            self.ranks.agree(objective)

    def whole(self, data: GroupedData, index: Tensor | None = None) -> Batch:
        """A whole data set as one batch without images; ``index`` where it is a selection of the training part."""
        index = torch.arange(len(data)) if index is None else index
        where = self.where
        return Batch(data.images[:0], data.labels.to(where), data.groups.to(where), index.to(where))

    def kept(self, epoch: int) -> str:
        """What is left if this epoch fails, as the end of a sentence."""
        if not self.checkpoint or epoch == 1:
            return ""
        return f"; the checkpoint of epoch {epoch - 1} is kept at {self.checkpoint}"

    def log(self, result: Epoch) -> None:
        """Say what an epoch brought, in the log and in the progress reports of the next."""
        self.message = f"epoch {result.epoch}, loss {result.loss:.3f}"
        if not math.isnan(result.val_accuracy):
            self.message += f", val accuracy {result.val_accuracy:.1%}"
        logger.info("%s: %s (%.1f s)", self.stage, self.message, result.seconds)
        if self.progress is not None:
            batches = len(self.batch_sizes)
            done, total = result.epoch * batches, self.epochs * batches
            self.progress(Progress(self.stage, done, total, self.message, result.row()))

    def save(self, epoch: int) -> None:
        """Write the checkpoint, where there is one."""
        if self.checkpoint is not None:
            save(Path(self.checkpoint), self.parts, self.generator, epoch, self.arithmetic)

    def predict(self, network: nn.Module, data: GroupedData) -> Tensor:
        """Logits over a whole data set, in the run's arithmetic."""
        return predict(network, data, device=self.where, arithmetic=self.arithmetic, ranks=self.ranks)

    def group_losses(self) -> tuple[Tensor, Tensor]:
        """Mean loss of each group, and of all, over the whole training set or the objective's subset of it."""
        index, train, teacher_logits = self.objective.subset, self.train, self.teacher_logits
        data = train if index is None else train.select(index)
        logits = self.predict(self.model, data)
        if teacher_logits is not None and index is not None:
            teacher_logits = teacher_logits[index]
        elif teacher_logits is None and self.teacher is not None:
            teacher_logits = self.predict(self.teacher, data)
        with torch.no_grad():
            losses = self.objective.losses(logits, teacher_logits, self.whole(data, index))
        means = group_mean(losses, data.groups, data.num_groups)
        if index is None:
            return means, losses.double().mean()
        sizes = torch.bincount(train.groups, minlength=train.num_groups)
        return means, (means * sizes)[sizes > 0].sum() / len(train)

    def validate(self) -> dict[str, float]:
        """Loss and accuracies on the validation part, from its logits; NaN without one."""
        val = self.val
        if val is None or self.held_out is None:
            return dict.fromkeys(("val_loss", "val_accuracy", "val_worst_group_accuracy"), math.nan)
        logits = self.held_out.cpu()
        labels, groups = val.labels.cpu(), val.groups.cpu()
        correct = (logits.argmax(1) == labels).double()
        by_group = group_mean(correct, groups, val.num_groups)
        return {
            "val_loss": float(F.cross_entropy(logits, labels)),
            "val_accuracy": float(correct.mean()),
            "val_worst_group_accuracy": float(by_group[~by_group.isnan()].min()),
        }


def _batch_sizes(images: int, batch_size: int) -> list[int]:
    """Sizes of an epoch's batches; a last image that would be alone joins the batch before, as BatchNorm needs two.

    Args:
        images: In the training part.
        batch_size: Asked for.

    Returns:
        The sizes; their sum is ``images``.

    >>> _batch_sizes(9, 4), _batch_sizes(10, 4), _batch_sizes(2, 1)
    ([4, 5], [4, 4, 2], [1, 1])
    """
    full, rest = divmod(images, batch_size)
    if rest == 1 and full and batch_size > 1:
        return [batch_size] * (full - 1) + [batch_size + 1]
    return [batch_size] * full + [rest] * (rest > 0)
