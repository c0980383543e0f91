"""Weights against imbalance: inverse frequency, or the effective number of samples (Cui et al., CVPR 2019)."""

from __future__ import annotations

from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Batch, Objective, with_mean_one


def effective_number(sizes: Tensor, beta: float | None) -> Tensor:
    """How many samples a class or group of n is worth (Cui et al., Proposition 1).

    Args:
        sizes: n, (C,).
        beta: β in [0, 1); none for n itself.

    Returns:
        ``(1 − β^n)/(1 − β)``, 1 at least, float64, (C,).

    >>> import torch
    >>> effective_number(torch.tensor([1, 2, 1000]), 0.9)
    tensor([ 1.0000,  1.9000, 10.0000], dtype=torch.float64)
    """
    n = sizes.double()
    # A class without samples is never looked up.
    return (n if beta is None else (1 - beta**n) / (1 - beta)).clamp_min(1)


class Reweighting(Objective):
    """Weight each sample by its group, so that small groups count as much as large ones.

    The weight is ``1/nₐ``, or ``(1 − β)/(1 − β^nₐ)``: a group's effective number of samples, which lies between 1
    (β = 0, no reweighting) and nₐ (β → 1, inverse frequency). Weights have mean 1 over the training set.

    Args:
        beta: β in [0, 1); none for inverse frequency.
        by: ``"group"``, or ``"class"``, which needs no groups.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Raises:
        FairlineError: β or ``by`` is out of range.

    >>> import torch
    >>> index = torch.tensor([0, 0, 1])
    >>> data = GroupedData(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), index, index, ("a", "b"), ("many", "few"))
    >>> batch = Batch(data.normalized(), data.labels, data.groups, torch.arange(3))
    >>> objective = Reweighting()
    >>> objective.start(data)
    >>> objective.weights
    tensor([0.7500, 1.5000])
    >>> objective.reduce(torch.tensor([1.0, 1.0, 3.0]), batch)
    tensor(2.)
    """

    def __init__(self, beta: float | None = None, by: str = "group", **options: float) -> None:
        super().__init__(**options)
        if beta is not None and not 0 <= beta < 1:
            raise FairlineError(f"β must lie in [0, 1): beta={beta}.")
        if by not in ("group", "class"):
            raise FairlineError(f"Samples are weighted by group or class, not '{by}'.")
        self.beta = beta
        self.by = by

    def start(self, train_data: GroupedData) -> None:
        """Count."""
        _, counts = self.cells(train_data, self.by)
        sizes = counts.double()
        self.weights = with_mean_one(1 / effective_number(sizes, self.beta), sizes)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        """Weighted mean."""
        index = batch.groups if self.by == "group" else batch.labels
        return (self.weights[index].to(losses) * losses).mean()
