"""Group distributionally robust optimisation (Sagawa, Koh, Hashimoto and Liang, ICLR 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Batch, Objective, group_means


class GroupDRO(Objective):
    """Minimise the loss of the worst group, by exponentiated-gradient ascent on group weights q (their Algorithm 1).

    For each batch ``qₐ ← qₐ·exp(step·(Lₐ(B) + C/√nₐ))`` for the groups in it, q is normalised, and the step is on
    ``Σₐ qₐ·(Lₐ(B) + C/√nₐ)`` over them. A group that many batches lack counts for less than it should, so take batches
    that nearly always hold every group.

    Args:
        step: Of q, 0.01 as published; it acts once a batch.
        adjustment: C ≥ 0, which asks more of small groups because they generalise worse (their Section 3.3).
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Attributes:
        weights: q, float32, (A,), summing to 1.

    Raises:
        FairlineError: The step is not positive, or C is negative.

    >>> index = torch.tensor([0, 0, 1])
    >>> data = GroupedData(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), index, index, ("a", "b"), ("many", "few"))
    >>> batch = Batch(data.normalized(), data.labels, data.groups, torch.arange(3))
    >>> objective = GroupDRO(step=1.0)
    >>> objective.start(data)
    >>> objective.reduce(torch.tensor([1.0, 1.0, 3.0]), batch)
    tensor(2.7616)
    >>> objective.weights
    tensor([0.1192, 0.8808])
    """

    def __init__(self, step: float = 0.01, adjustment: float = 0.0, **options: float) -> None:
        super().__init__(**options)
        if not (step > 0 and adjustment >= 0 and math.isfinite(step + adjustment)):
            raise FairlineError(f"GroupDRO needs finite step > 0 and adjustment ≥ 0, not {step} and {adjustment}.")
        self.step = step
        self.adjustment = adjustment
        self.weights = torch.zeros(0)

    def start(self, train_data: GroupedData) -> None:
        """Equal weights."""
        self.require_groups(train_data)
        self.group_names = train_data.group_names
        sizes = torch.bincount(train_data.groups, minlength=train_data.num_groups)
        self.margin = self.adjustment / sizes.sqrt()
        self.weights = torch.full_like(self.margin, 1 / train_data.num_groups)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        """``Σₐ qₐ·Lₐ(B)``, after q has taken its step."""
        means, present = group_means(losses, batch.groups, len(self.weights))
        adjusted = (means + self.margin) * present
        # In logarithms: the exponential of a large loss overflows.
        self.weights = (self.weights.log() + self.step * adjusted.detach()).softmax(0)
        return (self.weights * adjusted).sum()

    def metrics(self) -> dict[str, float]:
        """Weight of each group."""
        values = self.weights.tolist()
        return {f"weight[{name}]": value for name, value in zip(self.group_names, values, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The weights."""
        return {"weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The weights of a checkpoint."""
        self.weights = state["weights"].to(self.weights)
