"""Keep the ReLUs that change their input most.

Source: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.linearize.activations import each_activation
from fairline.linearize.ranked import Ranked
from fairline.masking import masked_relus


@dataclass
class Magnitude(Ranked):
    """Score each ReLU by ``mean |min(x, 0)|``: how far its output moves when it becomes the identity.

    Attributes:
        samples: Training images to measure on, at most.
        relative: Divide by the layer's mean, so that a layer of large activations does not keep everything.

    Raises:
        FairlineError: There is no sample.
    """

    name = "magnitude"

    samples: int = 2000
    relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise FairlineError(f"Magnitudes need one sample at least, not {self.samples}.")

    def scores(self, model: nn.Module, train: GroupedData) -> Mapping[str, Tensor]:
        """Mean negative part of each unit."""
        totals = {name: torch.zeros(layer.shape, device=train.device) for name, layer in masked_relus(model).items()}

        def add(name: str, x: Tensor, index: Tensor) -> None:
            totals[name] += x.clamp_max(0).neg().sum(0)

        seen = each_activation(model, train, add, samples=self.samples, seed=self.seed)
        means = {name: total / seen for name, total in totals.items()}
        if self.relative:
            means = {name: mean / mean.mean().clamp_min(1e-12) for name, mean in means.items()}
        return means
