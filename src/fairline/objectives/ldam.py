"""Label-distribution-aware margins with deferred reweighting (LDAM-DRW; Cao et al., NeurIPS 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Batch, Objective, with_mean_one
from fairline.objectives.reweighting import effective_number


def lowered_labels(logits: Tensor, labels: Tensor, margins: Tensor) -> Tensor:
    """Logits with that of each sample's label lowered by its margin; differentiable.

    Args:
        logits: (B, K).
        labels: int64, (B,).
        margins: (B,).

    Returns:
        (B, K).

    >>> import torch
    >>> lowered_labels(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    tensor([[-1.,  0.],
            [ 0., -2.]])
    """
    return logits.scatter_add(1, labels[:, None], -margins[:, None].to(logits))


class LDAM(Objective):
    """Cross-entropy with the label's logit lowered by ``m·(n_min/n_y)^(1/4)``; classes reweighted in the last epochs.

    Rare classes get larger margins, in their ratio (their Equation 13). As in the code published with the paper (read
    for this), the largest margin is given, weights are by effective number of samples, and they come after 80 % of the
    epochs. That code has a last layer of cosines, lowers them by 0.5 at most and multiplies by a scale of 30. A
    network's own logits are that product already, so margin and scale are one number here, in logits.

    The margin is one of the cross-entropy; the weights are of the whole loss, with mean 1 over the training set. Plain
    LDAM-DRW, which has no teacher, is ``kd_weight=0``.

    Args:
        margin: m, the margin of the rarest class, in logits; theirs is 15 of ±30.
        defer: Fraction of the epochs before classes are reweighted, in [0, 1]; 1 never does.
        beta: Of the effective number, in [0, 1).
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Attributes:
        margins: Of each class, float32, (K,).
        seen: Images in the steps so far.

    Raises:
        FairlineError: A setting is out of range, a class has no image, or how many epochs there are is not known.

    >>> import torch
    >>> labels = torch.tensor([0] * 16 + [1])
    >>> images = torch.zeros(17, 1, 1, 1, dtype=torch.uint8)
    >>> data = GroupedData(images, labels, labels, ("a", "b"), ("many", "few"))
    >>> objective = LDAM(margin=2.0)
    >>> objective.start(data)
    >>> objective.margins
    tensor([1., 2.])
    """

    def __init__(self, margin: float = 4.0, defer: float = 0.8, beta: float = 0.9999, **options: float) -> None:
        super().__init__(**options)
        if not (margin >= 0 and math.isfinite(margin)):
            raise FairlineError(f"The largest margin must be finite and not negative: margin={margin}.")
        if not 0 <= defer <= 1:
            raise FairlineError(f"Classes are reweighted after a fraction of the epochs, in [0, 1]: defer={defer}.")
        if not 0 <= beta < 1:
            raise FairlineError(f"β must lie in [0, 1): beta={beta}.")
        self.margin = margin
        self.defer = defer
        self.beta = beta
        self.seen = 0

    def start(self, train_data: GroupedData) -> None:
        """Take margins and weights from the classes' sizes."""
        _, sizes = self.cells(train_data, "class")
        n = sizes.double()
        self.margins = (self.margin * (n.min() / n) ** 0.25).float()
        self.weights = with_mean_one(1 / effective_number(sizes, self.beta), n)
        self.images = len(train_data)
        self.seen = 0

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """CE with the label's logit lowered, (B,)."""
        return super().cross_entropy(lowered_labels(logits, batch.labels, self.margins[batch.labels]), batch)

    def reweights(self, epoch: int) -> bool:
        """Whether classes are weighted in an epoch, counted from 0."""
        if self.defer in (0, 1):
            return self.defer == 0
        if self.total_epochs is None:
            raise FairlineError("LDAM defers its weights to the last epochs, but was not told how many there are.")
        return epoch >= round(self.defer * self.total_epochs)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        """The mean, weighted by class in the last epochs."""
        epoch = self.seen // self.images
        self.seen += len(batch.index)
        return (self.weights[batch.labels].to(losses) * losses).mean() if self.reweights(epoch) else losses.mean()

    def metrics(self) -> dict[str, float]:
        """Whether classes were weighted in the epoch, 0 or 1."""
        return {"reweighted": float(self.seen > 0 and self.reweights((self.seen - 1) // self.images))}

    def state_dict(self) -> dict[str, Any]:
        """How far the run is."""
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """How far a checkpoint was."""
        self.seen = int(state["seen"])
