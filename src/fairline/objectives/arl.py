"""Adversarially reweighted learning: fairness without group labels (Lahoti et al., NeurIPS 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairline._registry import is_whole
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Batch, Objective


class ARL(Objective):
    """A small adversary finds, from image and label, where the loss is high, and weights those samples up.

    ``λ(x, y) = 1 + n·f(x, y) / Σ f`` over the batch (their Equation 4), f a logistic function of the features; the
    network minimises and the adversary maximises ``mean λ·ℓ``. Since only what a linear function can tell is weighted
    up, noise in single labels is not. The mean of λ is always 2, and the objective is divided by it, so that a learning
    rate means the same as under other objectives.

    Args:
        lr: Of the adversary (Adagrad, as published).
        pixels: The adversary sees the image averaged to this many pixels a side, and the label.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Raises:
        FairlineError: The learning rate or ``pixels`` is not positive.

    >>> index = torch.tensor([0, 0, 1])
    >>> data = GroupedData(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), index, index, ("a", "b"), ("many", "few"))
    >>> batch = Batch(data.normalized(), data.labels, data.groups, torch.arange(3))
    >>> objective = ARL(lr=1.0)
    >>> objective.start(data)
    >>> objective.weights(batch).detach()
    tensor([1., 1., 1.])
    >>> loss = objective.reduce(torch.tensor([1.0, 1.0, 3.0]), batch)
    >>> objective.weights(batch).detach()
    tensor([0.7426, 0.7426, 1.5149])
    """

    def __init__(self, lr: float = 0.01, pixels: int = 8, **options: float) -> None:
        super().__init__(**options)
        if not (lr > 0 and math.isfinite(lr)) or not (is_whole(pixels) and pixels >= 1):
            raise FairlineError(f"ARL needs a finite lr > 0 and a whole number of pixels ≥ 1, not {lr} and {pixels}.")
        self.lr = lr
        self.pixels = int(pixels)

    def start(self, train_data: GroupedData) -> None:
        """An adversary that weights all samples alike."""
        self.num_classes = train_data.num_classes
        features = train_data.images.shape[1] * self.pixels**2 + self.num_classes
        self.adversary = nn.Linear(features, 1).to(train_data.device)
        # A logistic function needs no random start; zero is equal weights.
        nn.init.zeros_(self.adversary.weight)
        nn.init.zeros_(self.adversary.bias)
        self.optimizer = torch.optim.Adagrad(self.adversary.parameters(), lr=self.lr)

    def weights(self, batch: Batch) -> Tensor:
        """λ/2 of each sample, (B,), with mean 1."""
        image = F.adaptive_avg_pool2d(batch.images, self.pixels).flatten(1)
        label = F.one_hot(batch.labels, self.num_classes).to(image)
        scores = self.adversary(torch.cat([image, label], dim=1)).squeeze(1).sigmoid()
        return (1 + scores / scores.mean()) / 2

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        """``mean λ·ℓ / 2``; the adversary takes its own step."""
        weights = self.weights(batch)
        result = (weights.detach() * losses).mean()
        self.optimizer.zero_grad(set_to_none=True)
        gain = -(weights * losses.detach()).mean()
        gain.backward()
        self.optimizer.step()
        return result

    def state_dict(self) -> dict[str, Any]:
        """The adversary and its optimizer."""
        return {"adversary": self.adversary.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Those of a checkpoint."""
        self.adversary.load_state_dict(state["adversary"])
        self.optimizer.load_state_dict(state["optimizer"])
