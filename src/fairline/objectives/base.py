"""The interface of what a network minimises: a loss for each sample, and how samples make one number.

The loss of a sample is that of knowledge distillation (Hinton, Vinyals and Dean 2015), as in SNL (Cho et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError


@dataclass(frozen=True)
class Batch:
    """What an objective may look at.

    Attributes:
        images: float32, (B, C, H, W), normalised and augmented; none, (0, C, H, W), where the losses over a whole data
            set are asked for.
        labels: int64, (B,).
        groups: int64, (B,).
        index: int64, (B,): positions in the training data; in the validation data for :meth:`Objective.held_out`.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    index: Tensor


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Knowledge distillation (Hinton, Vinyals and Dean 2015) for each sample.

    ``T² · KL(softmax(teacher/T) ‖ softmax(student/T))``. The divergence is summed over classes, so its scale does
    not depend on how many there are, and T² keeps its gradient comparable across temperatures.

    Args:
        logits: Student's, (B, K).
        teacher_logits: Teacher's, (B, K).
        temperature: T > 0.

    Returns:
        (B,), in nats.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> distillation_loss(student, teacher, temperature=2.0)
    tensor([0.4438])
    >>> p = teacher.div(2.0).softmax(1)
    >>> 2.0**2 * (p * (p / 0.5).log()).sum(1)
    tensor([0.4438])
    """
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2


def group_means(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean of ``values`` in each group that a batch holds, by one scatter; differentiable.

    Args:
        values: (B,).
        groups: int64, (B,).
        num_groups: A.

    Returns:
        Means (A,), 0 for an absent group, and which groups are present, bool (A,).

    >>> group_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), num_groups=3)
    (tensor([2., 0., 5.]), tensor([ True, False,  True]))
    """
    columns = torch.stack([values, torch.ones_like(values)], dim=1)
    totals = values.new_zeros(num_groups, 2).index_add(0, groups, columns)
    return totals[:, 0] / totals[:, 1].clamp_min(1), totals[:, 1] > 0


def with_mean_one(weights: Tensor, sizes: Tensor) -> Tensor:
    """Weights of classes or groups, scaled so that their mean over samples is 1.

    Args:
        weights: (C,).
        sizes: Samples of each, (C,).

    Returns:
        float32, (C,).

    >>> with_mean_one(torch.tensor([1.0, 2.0]), torch.tensor([2, 1]))
    tensor([0.7500, 1.5000])
    """
    return (weights * sizes.sum() / (weights * sizes).sum()).float()


class Objective:
    """Cross-entropy, plus distillation where there is a teacher; subclasses override what they change.

    Args:
        temperature: T of the distillation; SNL and the paper use 4.
        ce_weight: Weight of the cross-entropy.
        kd_weight: Weight of the distillation term.

    Attributes:
        total_epochs: How many there are at most; the training loop says it before :meth:`start`.
        needs_teacher: Whether it cannot do without a teacher's logits.

    Raises:
        FairlineError: The temperature is not positive, a weight is negative, or one of them is not finite.
    """

    total_epochs: int | None = None
    needs_teacher = False

    def __init__(self, temperature: float = 4.0, ce_weight: float = 1.0, kd_weight: float = 1.0) -> None:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise FairlineError(f"The distillation temperature must be positive and finite, not {temperature}.")
        if not all(weight >= 0 and math.isfinite(weight) for weight in (ce_weight, kd_weight)):
            raise FairlineError(
                f"Loss weights must be finite and not negative: ce_weight={ce_weight}, kd_weight={kd_weight}."
            )
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        #: Positions in the training data that :meth:`end_epoch` is told the losses of; None for all.
        self.subset: Tensor | None = None

    def start(self, train_data: GroupedData) -> None:
        """Look at the training data once, before the first step."""

    def see_teacher(self, logits: Tensor, data: GroupedData, held_out: bool) -> None:
        """Look at the teacher's outputs once, before the first step.

        Only an objective that overrides this pays for the pass that computes them.

        Args:
            logits: (N, K), in evaluation mode without augmentation.
            data: What they are of: the validation part, or the training part where there is none.
            held_out: Whether it is the former.
        """

    def losses(self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch) -> Tensor:
        """Loss of each sample, (B,): ``CE + T²·KL``, or CE without a teacher."""
        losses = self.cross_entropy(logits, batch)
        if self.ce_weight != 1:
            losses = losses * self.ce_weight
        if teacher_logits is not None and self.kd_weight != 0:
            losses = losses + self.kd_weight * self.distillation(logits, teacher_logits, batch)
        return losses

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """What the labels ask of each sample, (B,)."""
        return F.cross_entropy(logits, batch.labels, reduction="none")

    def distillation(self, logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """What the teacher asks of each sample, (B,): T²·KL."""
        return distillation_loss(logits, teacher_logits, self.temperature)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        """One number to minimise, from the losses (B,); their mean by default."""
        return losses.mean()

    def end_epoch(self, group_losses: Tensor, overall: Tensor) -> None:
        """Look at the losses over the whole training set after an epoch.

        Only an objective that overrides this pays for the pass that computes them.

        Args:
            group_losses: Mean loss of each group, (A,), in evaluation mode without augmentation.
            overall: Mean loss of all samples, scalar; with a ``subset``, the mean of ``group_losses`` by group size.
        """

    def start_held_out(self, val_data: GroupedData | None) -> None:
        """Look at the validation part once, after :meth:`start`; only where :attr:`needs_held_out`.

        Args:
            val_data: The validation part; None where there is none.
        """

    def held_out(self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch) -> None:
        """Look at the outputs over the whole validation part after an epoch, before :meth:`end_epoch`.

        They are computed for the validation accuracy anyway. Where there is no validation part it is not called.

        Args:
            logits: Of the network, (N, K), in evaluation mode.
            teacher_logits: Of the teacher if there is one, (N, K).
            batch: All of the validation part, without images.
        """

    def judge(self, row: Mapping[str, float]) -> None:
        """Say, after a training, what is to be said of the network that is kept.

        Args:
            row: Of the epoch that it is of: what :class:`~fairline.training.loop.Epoch` holds, and :meth:`metrics`.
        """

    def require_groups(self, train_data: GroupedData) -> None:
        """Refuse data without groups, or with a group that has no sample.

        Raises:
            FairlineError: There is one group only, or one is empty.
        """
        name = type(self).__name__
        if train_data.num_groups < 2:
            raise FairlineError(
                f"{train_data.name}: the objective {name} needs groups, but all samples are in "
                f"“{train_data.group_names[0]}”; name a column with --groups, or take chi2_dro or arl, which need none."
            )
        train_data.require_groups(f"the objective {name}")

    def require_classes(self, train_data: GroupedData) -> None:
        """Refuse data with a class that has no sample.

        Raises:
            FairlineError: Names the first such class.
        """
        sizes = torch.bincount(train_data.labels, minlength=train_data.num_classes)
        if (empty := torch.nonzero(sizes == 0)).numel():
            raise FairlineError(
                f"{train_data.name}: the objective {type(self).__name__} needs every class, but "
                f"“{train_data.class_names[int(empty[0])]}” has no image."
            )

    def cells(self, train_data: GroupedData, by: str) -> tuple[Tensor, Tensor]:
        """What samples are told apart by, ``"class"`` or ``"group"``, each of them with samples.

        Returns:
            Of each sample, int64, (N,), and how many there are of each, (C,).

        Raises:
            FairlineError: A class or group is empty, or there is one group only.
        """
        if by == "group":
            self.require_groups(train_data)
            return train_data.groups, torch.bincount(train_data.groups, minlength=train_data.num_groups)
        self.require_classes(train_data)
        return train_data.labels, torch.bincount(train_data.labels, minlength=train_data.num_classes)

    @property
    def needs_group_losses(self) -> bool:
        """Whether :meth:`end_epoch` is overridden."""
        return type(self).end_epoch is not Objective.end_epoch

    @property
    def sees_teacher(self) -> bool:
        """Whether :meth:`see_teacher` is overridden."""
        return type(self).see_teacher is not Objective.see_teacher

    @property
    def needs_held_out(self) -> bool:
        """Whether :meth:`held_out` is overridden."""
        return type(self).held_out is not Objective.held_out

    def metrics(self) -> dict[str, float]:
        """What to log after each epoch."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What changes while training, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
