"""Empirical risk minimisation: the mean loss, blind to groups; the finetune of SNL (Cho et al. 2022, Algorithm 1)."""

from __future__ import annotations

from fairline.objectives.base import Objective


class ERM(Objective):
    """Minimise the mean of ``CE + T²·KL`` over samples.

    Args:
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    >>> import torch
    >>> from fairline.objectives.base import Batch
    >>> labels = torch.tensor([0, 1])
    >>> batch = Batch(torch.zeros(2, 1, 1, 1), labels, labels, torch.arange(2))
    >>> objective, logits = ERM(temperature=4.0), torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    >>> losses = objective.losses(logits, logits, batch)  # a student that equals its teacher
    >>> objective.reduce(losses, batch)
    tensor(0.7201)
    """
