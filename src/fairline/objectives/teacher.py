"""What a teacher knows of each class or group: its margins, on data that it was not trained on."""

from __future__ import annotations

import logging
import math

from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import group_mean
from fairline.objectives.base import Batch, Objective

logger = logging.getLogger(__name__)


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the label is ahead of every other class, in probability.

    Args:
        logits: (N, K).
        labels: int64, (N,).

    Returns:
        ``p_y − max_{c ≠ y} p_c``, in [−1, 1], (N,); negative where the class is not the label.

    >>> import torch
    >>> margins_of(torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]]).log(), torch.tensor([0, 1]))
    tensor([ 0.7000, -0.7000])
    """
    probabilities = logits.softmax(1)
    label = labels[:, None]
    others = probabilities.scatter(1, label, -1.0).amax(1)
    return probabilities.gather(1, label).squeeze(1) - others


class TeacherAware(Objective):
    """What is weighted by how well the teacher knows each class or group.

    Its mean margin γ is taken once, before the first step, on the validation part; on the training part where there is
    none, which flatters a teacher that has learned it, and is said so in the log. It costs one pass over that part, no
    step costs more.

    Args:
        strength: Of what follows from γ; 0 is plain distillation.
        by: ``"group"``, or ``"class"``, which needs no groups.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Attributes:
        margins: γ of each class or group, in [−1, 1], (C,).

    Raises:
        FairlineError: The strength is negative or not finite, ``by`` is neither, there is no teacher, or a class or
            group has no image in the part.
    """

    def __init__(self, strength: float = 1.0, by: str = "group", **options: float) -> None:
        super().__init__(**options)
        if not (strength >= 0 and math.isfinite(strength)):
            raise FairlineError(f"The strength must be finite and not negative: strength={strength}.")
        if by not in ("group", "class"):
            raise FairlineError(f"A teacher is judged by group or class, not '{by}'.")
        self.strength = strength
        self.by = by
        self.margins: Tensor | None = None

    def start(self, train_data: GroupedData) -> None:
        """Refuse a class or group without images."""
        _, sizes = self.cells(train_data, self.by)
        self.names = train_data.group_names if self.by == "group" else train_data.class_names
        self.count = len(sizes)
        self.margins = None

    def see_teacher(self, logits: Tensor, data: GroupedData, held_out: bool) -> None:
        """Take the teacher's mean margins."""
        if not held_out:
            logger.warning(
                "%s judges the teacher on its own training images, as there is no validation part.", type(self).__name__
            )
        index, _ = self.cells(data, self.by)
        margins = margins_of(logits, data.labels.to(logits.device))
        self.margins = group_mean(margins, index.to(logits.device), self.count).float()

    def known(self, batch: Batch) -> Tensor:
        """γ of each sample's class or group, (B,)."""
        if self.margins is None:
            raise FairlineError(f"{type(self).__name__} needs a teacher, and there is none.")
        return self.margins[batch.groups if self.by == "group" else batch.labels]

    def metrics(self) -> dict[str, float]:
        """γ of each class or group."""
        if self.margins is None:
            return {}
        return {f"margin[{name}]": m for name, m in zip(self.names, self.margins.tolist(), strict=True)}
