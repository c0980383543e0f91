"""Methods that rank ReLUs once and keep the first r: the cheap baselines.

Source: none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.linearize.base import Cut, Linearization, Linearizer
from fairline.masking import copy_model, masked_relus
from fairline.training import Progress


@dataclass(kw_only=True)
class Ranked(Linearizer):
    """Keep the ReLUs with the largest scores. Budgets are exact and nested; subclasses give the scores.

    Weights stay as they are: finetune next. Nothing is put into the checkpoint folder; nothing here takes long.

    Attributes:
        surrogate: What stands in the place of the others: ``"identity"`` or another, polynomials fitted.
        seed: Breaks ties, and what else the method draws.
    """

    keeps_snapshots: ClassVar[bool] = False

    @abstractmethod
    def scores(self, model: nn.Module, train: GroupedData) -> Mapping[str, Tensor]:
        """Score of every unit of each masked layer, of the mask's shape; larger ones are kept.

        Args:
            model: Masked as it is given, in evaluation mode; may be changed. What it has cut already stays cut,
                whatever its score.
            train: Training part, on the model's device.
        """

    def cuts(self, run: Linearization) -> Iterator[Cut]:
        """Keep the first r of the ranking for each budget r.

        Args:
            run: What there is to work with.

        Yields:
            One network a budget.
        """
        order = self._ranking(run)
        for position, budget in enumerate(run.budgets, start=1):
            network = copy_model(run.student)
            kept = torch.zeros(run.total, dtype=torch.bool)
            kept[order[:budget]] = True
            layers = list(masked_relus(network).values())
            for layer, own in zip(layers, kept.split([layer.kept.numel() for layer in layers]), strict=True):
                layer.set_mask(own.view(layer.shape))
            if run.progress is not None:
                message = f"{budget:,} of {run.total:,} ReLUs"
                run.progress(Progress(f"{self.name} masks", position, len(run.budgets), message))
            yield Cut(budget, network)

    def _ranking(self, run: Linearization) -> Tensor:
        """Positions of the ReLUs that are there, from the largest score on; int64, (open,)."""
        found = self.scores(copy_model(run.student).eval(), run.train)
        flat = torch.cat([found[name].detach().flatten().cpu().double() for name in masked_relus(run.student)])
        # A random order first, so that ties do not favour the first layers.
        shuffled = torch.randperm(run.total, generator=torch.Generator().manual_seed(self.seed))
        order = shuffled[torch.sort(flat[shuffled], descending=True, stable=True).indices]
        there = torch.cat([layer.kept.flatten().cpu() for layer in masked_relus(run.student).values()])
        return order[there[order]]
