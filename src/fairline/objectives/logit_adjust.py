"""Logit adjustment for rare classes (Menon et al., ICLR 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Batch, Objective


class LogitAdjust(Objective):
    """Cross-entropy on ``z_y + τ·log π_y`` (their Equation 10), π the class shares of the training set.

    Its minimiser ranks classes by ``p(y|x) / π_y^τ``: at τ = 1 it minimises the balanced error, the mean over classes
    of each one's error. It needs no groups and knows classes only, so it helps groups where they are classes. The
    distillation term is left as it is.

    Args:
        tau: τ ≥ 0; 1 is the balanced error, 0 plain cross-entropy.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Raises:
        FairlineError: τ is negative.

    >>> index = torch.tensor([0, 0, 1])
    >>> data = GroupedData(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), index, index, ("a", "b"), ("many", "few"))
    >>> batch = Batch(data.normalized(), data.labels, data.groups, torch.arange(3))
    >>> objective = LogitAdjust()
    >>> objective.start(data)
    >>> objective.shift.exp()
    tensor([0.6667, 0.3333])
    >>> logits = torch.zeros(3, 2)
    >>> objective.losses(logits, None, batch).exp()  # 1 over the class shares
    tensor([1.5000, 1.5000, 3.0000])
    """

    def __init__(self, tau: float = 1.0, **options: float) -> None:
        super().__init__(**options)
        if not (tau >= 0 and math.isfinite(tau)):
            raise FairlineError(f"τ must be finite and not negative: tau={tau}.")
        self.tau = tau

    def start(self, train_data: GroupedData) -> None:
        """Take the class shares."""
        sizes = torch.bincount(train_data.labels, minlength=train_data.num_classes)
        # A class without samples would shift its logit by −∞.
        self.shift = self.tau * (sizes.clamp_min(1) / len(train_data)).log()

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """CE of the shifted logits, (B,)."""
        shifted = logits.clone()
        shifted[:, : len(self.shift)] += self.shift.to(logits)
        return super().cross_entropy(shifted, batch)
