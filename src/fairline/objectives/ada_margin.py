"""Margins that are larger where the teacher errs (AdaMargin; Lukasik et al., TMLR 2022)."""

from __future__ import annotations

from torch import Tensor

from fairline.objectives.base import Batch
from fairline.objectives.ldam import lowered_labels
from fairline.objectives.teacher import TeacherAware


class AdaMargin(TeacherAware):
    """``CE + T²·KL`` of the student with its label's logit lowered by ``s·(1 − γ)``.

    γ is the teacher's mean margin on held-out images, of the sample's class or group. The student must put the label
    that much further ahead: further than the cross-entropy asks, and further than the teacher does, whose term has its
    minimum where the label's logit is the teacher's plus the margin. A teacher that is always sure and right
    (γ = 1) leaves plain distillation, and so does s = 0.

    After AdaMargin of Lukasik, Bhojanapalli, Menon and Kumar (*Teacher's pet: understanding and mitigating biases in
    distillation*), of which the abstract could be read and the formula could not. That margins follow the teacher's
    held-out margins is theirs; their form, that of LDAM (Cao et al. 2019) in both terms, is this library's.

    Args:
        strength: s, in logits; a teacher that is wrong throughout asks for 2s.
        by: ``"group"``, or ``"class"``, which needs no groups.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Raises:
        FairlineError: As :class:`~fairline.objectives.teacher.TeacherAware`.

    >>> import torch
    >>> from fairline.data import GroupedData
    >>> index = torch.tensor([0, 0, 1])
    >>> data = GroupedData(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), index, index, ("a", "b"), ("many", "few"))
    >>> teacher = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]]).log()
    >>> objective = AdaMargin(strength=2.0)
    >>> objective.start(data)
    >>> objective.see_teacher(teacher, data, held_out=True)
    >>> batch = Batch(data.images, data.labels, data.groups, torch.arange(3))
    >>> objective.margin(batch)
    tensor([0.8000, 0.8000, 2.4000])
    >>> ahead = lowered_labels(teacher, data.labels, -objective.margin(batch))
    >>> objective.distillation(ahead, teacher, batch).abs() < 1e-6
    tensor([True, True, True])
    """

    def margin(self, batch: Batch) -> Tensor:
        """Of each sample, in logits, (B,)."""
        return self.strength * (1 - self.known(batch))

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """CE with the label lowered, (B,)."""
        return super().cross_entropy(self._lowered(logits, batch), batch)

    def distillation(self, logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """T²·KL to the student with its label lowered, (B,)."""
        return super().distillation(self._lowered(logits, batch), teacher_logits, batch)

    def _lowered(self, logits: Tensor, batch: Batch) -> Tensor:
        return lowered_labels(logits, batch.labels, self.margin(batch))
