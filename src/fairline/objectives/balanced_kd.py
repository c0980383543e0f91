"""Distillation in which small classes or groups weigh more, apart from the weights of the labels' term."""

from __future__ import annotations

import math

from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Batch, Objective, with_mean_one


class BalancedKD(Objective):
    """``w·CE + v·T²·KL`` a sample, w and v by the sample's class or group.

    The weight of a class or group of n training images is ``n^−s``, with mean 1 over the training set: s = 0 is plain
    distillation, s = 1 weights by inverse frequency, so that all of them count alike, and what lies between is a milder
    version (1/2: the square root, as Mahajan et al., ECCV 2018, sample by). The distillation term has a strength of its
    own, since it is the one that hands a teacher's bias down; what is weighted is the sample, by its label or group,
    not what the teacher says of each class.

    Args:
        strength: s of the distillation term.
        ce_strength: s of the cross-entropy.
        by: ``"group"``, or ``"class"``, which needs no groups.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Attributes:
        kd_weights: v, float32, (C,).
        ce_weights: w, float32, (C,).

    Raises:
        FairlineError: A strength is not finite, ``by`` is neither, or a class or group has no image.

    >>> import torch
    >>> index = torch.tensor([0, 0, 1])
    >>> data = GroupedData(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), index, index, ("a", "b"), ("many", "few"))
    >>> batch = Batch(data.normalized(), data.labels, data.groups, torch.arange(3))
    >>> objective = BalancedKD()
    >>> objective.start(data)
    >>> objective.kd_weights, objective.ce_weights
    (tensor([0.7500, 1.5000]), tensor([1., 1.]))
    >>> teacher, student = torch.tensor([[2.0, 0.0]]).expand(3, 2), torch.zeros(3, 2)
    >>> objective.distillation(student, teacher, batch) / Objective().distillation(student, teacher, batch)
    tensor([0.7500, 0.7500, 1.5000])
    """

    def __init__(self, strength: float = 1.0, ce_strength: float = 0.0, by: str = "group", **options: float) -> None:
        super().__init__(**options)
        for name, value in {"strength": strength, "ce_strength": ce_strength}.items():
            if not math.isfinite(value):
                raise FairlineError(f"The exponent of frequencies must be finite: {name}={value}.")
        if by not in ("group", "class"):
            raise FairlineError(f"Samples are weighted by group or class, not '{by}'.")
        self.strength = strength
        self.ce_strength = ce_strength
        self.by = by

    def start(self, train_data: GroupedData) -> None:
        """Count."""
        _, sizes = self.cells(train_data, self.by)
        n = sizes.double()
        self.kd_weights = with_mean_one(_power(n, -self.strength), n)
        self.ce_weights = with_mean_one(_power(n, -self.ce_strength), n)

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """w·CE, (B,)."""
        losses = super().cross_entropy(logits, batch)
        return losses if self.ce_strength == 0 else self._of(self.ce_weights, batch).to(losses) * losses

    def distillation(self, logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """v·T²·KL, (B,)."""
        losses = super().distillation(logits, teacher_logits, batch)
        return losses if self.strength == 0 else self._of(self.kd_weights, batch).to(losses) * losses

    def _of(self, weights: Tensor, batch: Batch) -> Tensor:
        return weights[batch.groups if self.by == "group" else batch.labels]


def _power(n: Tensor, exponent: float) -> Tensor:
    """N to a power up to a factor, which is cancelled: the largest is 1, so no exponent overflows all."""
    logs = exponent * n.double().log()
    return (logs - logs.max()).exp()
