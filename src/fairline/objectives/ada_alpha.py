"""Labels and teacher mixed by how well the teacher knows each class or group (AdaAlpha; Lukasik et al., TMLR 2022)."""

from __future__ import annotations

from torch import Tensor

from fairline.objectives.base import Batch
from fairline.objectives.teacher import TeacherAware


class AdaAlpha(TeacherAware):
    """``2·((1 − α)·CE + α·T²·KL)``, α of the sample's class or group.

    ``α = ½·max(0, γ)^s``, γ the teacher's mean margin on held-out images. A teacher that is always sure and right (γ =
    1) leaves plain distillation, ``CE + T²·KL``; where it errs more than it is right (γ ≤ 0), the labels alone teach.
    s = 0 is plain distillation, larger s believe an uncertain teacher less.

    After AdaAlpha of Lukasik, Bhojanapalli, Menon and Kumar (*Teacher's pet: understanding and mitigating biases in
    distillation*). Their abstract was read: the teacher's influence is softened for the subgroups where it is less
    reliable. Their formula could not be; that α is the held-out margin, cut off at 0, is from memory of it, and the
    strength and the ½, which keeps the scale of the loss, are this library's.

    Args:
        strength: s.
        by: ``"group"``, or ``"class"``, which needs no groups.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Raises:
        FairlineError: As :class:`~fairline.objectives.teacher.TeacherAware`.

    >>> import torch
    >>> from fairline.data import GroupedData
    >>> index = torch.tensor([0, 0, 1])
    >>> data = GroupedData(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), index, index, ("a", "b"), ("many", "few"))
    >>> objective = AdaAlpha()
    >>> objective.start(data)
    >>> objective.see_teacher(torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]]).log(), data, held_out=True)
    >>> objective.margins
    tensor([ 0.6000, -0.2000])
    >>> objective.alpha(Batch(data.images, data.labels, data.groups, torch.arange(3)))
    tensor([0.3000, 0.3000, 0.0000])
    """

    def alpha(self, batch: Batch) -> Tensor:
        """α of each sample, in [0, ½], (B,)."""
        return self.known(batch).clamp_min(0) ** self.strength / 2

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """2(1 − α)·CE, (B,)."""
        return 2 * (1 - self.alpha(batch).to(logits)) * super().cross_entropy(logits, batch)

    def distillation(self, logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """2α·T²·KL, (B,)."""
        return 2 * self.alpha(batch).to(logits) * super().distillation(logits, teacher_logits, batch)
