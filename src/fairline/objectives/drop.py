"""What linearization takes from each group as a constraint, after Hashemizadeh et al. (ICLR 2024), who prune."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import group_mean
from fairline.objectives.base import Batch, group_means
from fairline.objectives.constrained import Constrained

logger = logging.getLogger(__name__)

#: What a drop is measured in, and what is lost by it, for messages.
MEASURES = {"loss": "nats", "probability": "probability of the right class", "accuracy": "accuracy"}


class GroupDrop(Constrained):
    """Minimise L subject to ``ρₐ = Jₐ(student) − Jₐ(teacher) ≤ ε`` for each group a, by primal–dual steps.

    For each batch B, a step on ``L(B) + Σₐ λₐ·(ρₐ(B) − ε)`` over the groups in it. After each epoch, in evaluation mode
    and on the validation part, ``λₐ ← max(λₐ + η·(ρₐ − ε), 0)``, from λ = 0: so the first epoch is plain distillation,
    multipliers of groups that the network has come to satisfy fall again, and an ε that it satisfies from the first
    epoch on is plain distillation throughout, bit for bit.

    After *Balancing Act: Constraining Disparate Impact in Sparse Models*, whose constraint is ``ρₐ − ρ ≤ ε`` with
    accuracies (``measure="accuracy", excess=True``), whose gradient is that of the cross-entropy in their place, and
    which moves λ at every step, on the last few training images of each group (as its public code has it, with 40).
    Here λ moves once an epoch, on images that the network has not learned, where a drop is that of use.

    Args:
        epsilon: ε ≥ 0, what any group may lose: nats for a loss, else a share of 1. The strength of this method: the
            smaller, the stronger.
        measure: What J is, the mean over a group's images of ``"loss"``, the cross-entropy −log p(y);
            ``"probability"``, the expected error 1 − p(y), with p the softmax at temperature 1, so that ρₐ is what the
            accuracy loses, smoothed; or ``"accuracy"``, the error itself, which has no gradient: that of the
            cross-entropy stands in for it.
        excess: Take from each ρₐ the drop of all images, so that only what a group loses beyond it counts.
        step: η > 0.
        cap: No multiplier grows beyond it.
        samples: Images of each group, at most, that the training part's violations are measured on; None for all, which
            costs about a fifth of an epoch.
        on: The part whose violations move λ, ``"val"`` or ``"train"``. Both parts' are logged.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Attributes:
        multipliers: λ, float32, (A,).
        violations: ρ − ε of each part after the last epoch, (A,); above 0 where the constraint is not met.

    Raises:
        FairlineError: ε is negative or not finite, the step or the cap is not positive, or there is no such measure.

    >>> index = torch.tensor([0, 0, 1])
    >>> data = GroupedData(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), index, index, ("a", "b"), ("many", "few"))
    >>> batch = Batch(data.normalized(), data.labels, data.groups, torch.arange(3))
    >>> teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    >>> student = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    >>> objective = GroupDrop(epsilon=0.1, measure="probability", step=5.0)
    >>> objective.start(data)
    >>> objective.held_out(student, teacher, batch)
    >>> objective.violations["val"].float()  # p falls from 0.881 to 0.5 in one group
    tensor([-0.1000,  0.2808])
    >>> losses = objective.losses(student, teacher, batch)
    >>> objective.end_epoch(losses, losses.mean())
    >>> objective.multipliers
    tensor([0.0000, 1.4040])
    """

    needs_teacher = True

    def __init__(
        self,
        epsilon: float = 0.0,
        measure: str = "probability",
        excess: bool = False,
        step: float = 10.0,
        cap: float | None = None,
        samples: int | None = 200,
        on: str = "val",
        **options: float,
    ) -> None:
        super().__init__(cap, samples, on, **options)
        if not (epsilon >= 0 and math.isfinite(epsilon)):
            raise FairlineError(f"What a group may lose, ε, must be finite and not negative: epsilon={epsilon}.")
        if measure not in MEASURES:
            raise FairlineError(f"A drop is measured in {', '.join(MEASURES)}, not '{measure}'.")
        if not (step > 0 and math.isfinite(step)):
            raise FairlineError(f"The multipliers' step η must be finite and positive: step={step}.")
        self.epsilon = epsilon
        self.measure = measure
        self.excess = excess
        self.step = step

    def start(self, train_data: GroupedData) -> None:
        """Set every multiplier to 0."""
        super().start(train_data)
        self._images = {"train": torch.bincount(self.groups, minlength=len(self.sizes))}

    def start_held_out(self, val_data: GroupedData | None) -> None:
        """Refuse what violations could not be taken on."""
        super().start_held_out(val_data)
        if val_data is not None:
            self._images["val"] = torch.bincount(val_data.groups, minlength=len(self.sizes))

    def losses(self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch) -> Tensor:
        """What each sample costs beyond the teacher is kept.

        Returns:
            Loss of each sample, (B,), as of plain distillation.

        Raises:
            FairlineError: There is no teacher.
        """
        if teacher_logits is None:
            raise FairlineError("The objective GroupDrop compares with a teacher, and here are no logits of one.")
        labels = batch.labels
        smooth = "loss" if self.measure == "accuracy" else self.measure
        self._drops = cost(smooth, logits, labels) - cost(smooth, teacher_logits, labels)
        self._seen = self._drops
        if smooth != self.measure:
            self._seen = cost(self.measure, logits, labels) - cost(self.measure, teacher_logits, labels)
        self._members = batch.groups
        return super().losses(logits, teacher_logits, batch)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        """``L(B) + Σₐ λₐ·(ρₐ(B) − ε)``."""
        overall = losses.mean()
        if not self._active:
            # All λ are 0; adding 0·ρ would cost time and change nothing.
            return overall
        drops, present = group_means(self._drops, batch.groups, len(self.multipliers))
        if self.excess:
            drops = drops - self._drops.mean()
        # Not a dot product: its last bits depend on where the tensors lie in memory.
        return overall + (self.multipliers * (drops - self.epsilon) * present).sum()

    def held_out(self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch) -> None:
        """Violations over the validation part."""
        self.losses(logits, teacher_logits, batch)
        self._measure("val", torch.bincount(batch.groups, minlength=len(self.sizes)))

    def end_epoch(self, group_losses: Tensor, overall: Tensor) -> None:
        """``λ ← max(λ + η·(ρ − ε), 0)``."""
        # The pass over the training part has just left its drops.
        self._measure("train", self.sizes)
        advice = f"take a smaller step than {self.step:g}, a larger epsilon than {self.epsilon:g}, or a cap"
        self.ascend(self.step * self.violations[self.on].to(self.multipliers), advice)

    def _measure(self, part: str, sizes: Tensor) -> None:
        """Violations of a part, whose groups have these sizes, from what its images cost."""
        drops = group_mean(self._seen.detach(), self._members, len(sizes))
        if self.excess:
            drops = drops - (drops.nan_to_num() * sizes).sum() / sizes.sum()
        self.violations[part] = drops - self.epsilon

    def judge(self, row: Mapping[str, float]) -> None:
        """Warn of each group that has lost more than ε under the network that is kept, and say how much."""
        found = [row.get(f"{self.on}_violation[{name}]", math.nan) for name in self.group_names]
        over = [
            f"“{name}” {violation + self.epsilon:.3f} (of {images})"
            for name, violation, images in zip(self.group_names, found, self._images[self.on].tolist(), strict=True)
            if violation > 0
        ]
        if over:
            logger.warning(
                "GroupDrop: after epoch %d, whose network is kept, these lose more %s than epsilon=%g on %s images: %s."
                " More epochs or a larger step than %g may get them there, unless no network of so few ReLUs does.",
                row["epoch"],
                MEASURES[self.measure],
                self.epsilon,
                "held-out" if self.on == "val" else "training",
                ", ".join(over),
                self.step,
            )


def cost(measure: str, logits: Tensor, labels: Tensor) -> Tensor:
    """What each image costs.

    Args:
        measure: A key of :data:`MEASURES`: ``"loss"`` is −log p(y), in nats, ``"probability"`` 1 − p(y), and
            ``"accuracy"`` 1 where another class is chosen and 0 elsewhere; p is the softmax of the logits.
        logits: (N, K).
        labels: int64, (N,).

    Returns:
        (N,), differentiable but for ``"accuracy"``.

    >>> logits, labels = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    >>> cost("loss", logits, labels), cost("probability", logits, labels), cost("accuracy", logits, labels)
    (tensor([0.1269, 2.1269]), tensor([0.1192, 0.8808]), tensor([0., 1.]))
    """
    if measure == "loss":
        return F.cross_entropy(logits, labels, reduction="none")
    if measure == "probability":
        return 1 - logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    return (logits.argmax(1) != labels).to(logits)
