"""Keep whole layers, the most critical first.

Source: none; DeepReDuce's Cull (Jha et al. 2021) goes by stages and by accuracy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.linearize.ranked import Ranked
from fairline.masking import masked_relus

logger = logging.getLogger(__name__)


@dataclass
class Layerwise(Ranked):
    """Score a layer by the rise of the training loss, for each of its ReLUs, when it alone becomes linear.

    The layer at which the budget ends keeps a random part of its units. Emptied layers save protocol rounds, which thin
    masks over all layers do not.

    Attributes:
        samples: Training images to measure the loss on, at most.

    Raises:
        FairlineError: There is no sample.
    """

    name = "layerwise"

    samples: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise FairlineError(f"Layerwise needs one sample at least, not {self.samples}.")

    def scores(self, model: nn.Module, train: GroupedData) -> Mapping[str, Tensor]:
        """One number a layer."""
        generator = torch.Generator().manual_seed(self.seed)
        data = train.select(torch.randperm(len(train), generator=generator)[: self.samples])
        before = float(F.cross_entropy(predict(model, data), data.labels))
        rises = {}
        for name, layer in masked_relus(model).items():
            kept, count = layer.kept, layer.num_kept
            layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
            rise = float(F.cross_entropy(predict(model, data), data.labels)) - before
            layer.set_mask(kept)
            logger.info("%s alone linear: loss %+.4f nats, %d ReLUs", name, rise, count)
            rises[name] = torch.full(layer.shape, rise / max(count, 1), dtype=torch.float64)
        return rises
