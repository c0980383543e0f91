"""Logit adjustment for rare classes (Menon et al., ICLR 2021), of the labels' term or of the teacher's too."""

from __future__ import annotations

import math

from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Batch, Objective


class LogitAdjust(Objective):
    """Cross-entropy on ``z_y + τ·log π_y`` (their Equation 10), π the class shares of the training set.

    Its minimiser ranks classes by ``p(y|x) / π_y^τ``: at τ = 1 it minimises the balanced error, the mean over classes
    of each one's error. It needs no groups and knows classes only, so it helps groups where they are classes.

    The distillation term, T² = 16 times as steep as the cross-entropy, pulls back to the teacher, whose logits hold the
    prior. With ``teacher="adjusted"`` it asks for ``t − τ·log π`` in place of the teacher's t. The shift is one of
    logits, before they are divided by T, so its minimiser is that of the cross-entropy at every temperature where
    the teacher knows p(y|x). Shifting the student in place of the teacher would have the same minimiser, but then both
    terms are plain distillation of ``z + τ·log π``, and the whole is plain training with a shift of the biases after.

    Args:
        tau: τ ≥ 0; 1 is the balanced error, 0 plain cross-entropy.
        teacher: ``"unchanged"``, as in their paper, which has none, or ``"adjusted"``.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Raises:
        FairlineError: τ is negative or not finite, ``teacher`` is neither, or a class has no training image.

    >>> import torch
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
    >>> both = LogitAdjust(teacher="adjusted")
    >>> both.start(data)
    >>> both.distillation(-both.shift.expand(3, 2), logits, batch)  # a teacher that knows nothing, its prior taken out
    tensor([0., 0., 0.])
    """

    def __init__(self, tau: float = 1.0, teacher: str = "unchanged", **options: float) -> None:
        super().__init__(**options)
        if not (tau >= 0 and math.isfinite(tau)):
            raise FairlineError(f"τ must be finite and not negative: tau={tau}.")
        if teacher not in ("unchanged", "adjusted"):
            raise FairlineError(f"The teacher is unchanged or adjusted, not '{teacher}'.")
        self.tau = tau
        self.teacher = teacher

    def start(self, train_data: GroupedData) -> None:
        """Take the class shares."""
        # A class without samples would shift its logit by −∞.
        _, sizes = self.cells(train_data, "class")
        self.shift = self.tau * (sizes / len(train_data)).log()

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """CE of the shifted logits, (B,)."""
        return super().cross_entropy(self._moved(logits, 1), batch)

    def distillation(self, logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """T²·KL from the teacher, or from the teacher without its prior, (B,)."""
        if self.teacher == "adjusted":
            teacher_logits = self._moved(teacher_logits, -1)
        return super().distillation(logits, teacher_logits, batch)

    def _moved(self, logits: Tensor, sign: int) -> Tensor:
        """Logits with the shift of their classes added, or taken away."""
        moved = logits.clone()
        moved[:, : len(self.shift)] += sign * self.shift.to(logits)
        return moved
