"""ReLUs kept at random: what every method must beat.

Source: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.linearize.ranked import Ranked
from fairline.masking import masked_relus


@dataclass
class Random(Ranked):
    """Keep every set of r ReLUs with the same probability."""

    name = "random"

    def scores(self, model: nn.Module, train: GroupedData) -> Mapping[str, Tensor]:
        """Uniform numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        return {name: torch.rand(layer.shape, generator=generator) for name, layer in masked_relus(model).items()}
