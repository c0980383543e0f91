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
        model = copy_model(run.student).eval()
        yield from first_of(ranking(run.student, self.scores(model, run.train), self.seed), run, self.name)


def ranking(model: nn.Module, scores: Mapping[str, Tensor], seed: int) -> Tensor:
    """The ReLUs that a network has, from the largest score on.

    Args:
        model: Masked, masks fixed.
        scores: Of every unit of each masked layer, kept or not, of the mask's shape.
        seed: Breaks ties.

    Returns:
        Positions in all masks, one after the other, int64, (R,) for the R ReLUs that are kept.
    """
    layers = masked_relus(model)
    flat = torch.cat([scores[name].detach().flatten().cpu().double() for name in layers])
    # A random order first, so that ties do not favour the first layers.
    shuffled = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
    order = shuffled[torch.sort(flat[shuffled], descending=True, stable=True).indices]
    there = torch.cat([layer.kept.flatten().cpu() for layer in layers.values()])
    return order[there[order]]


def keep_only(model: nn.Module, positions: Tensor) -> None:
    """Fix masks so that they keep the ReLUs at these positions, as :func:`ranking` counts them, and no others.

    Args:
        model: Masked.
        positions: int64.
    """
    layers = list(masked_relus(model).values())
    kept = torch.zeros(sum(layer.kept.numel() for layer in layers), dtype=torch.bool)
    kept[positions] = True
    for layer, own in zip(layers, kept.split([layer.kept.numel() for layer in layers]), strict=True):
        layer.set_mask(own.view(layer.shape))


def first_of(order: Tensor, run: Linearization, name: str) -> Iterator[Cut]:
    """Keep the first r of one ranking for each budget r.

    Args:
        order: From :func:`ranking`.
        run: Its budgets are met by copies of its student.
        name: Of the method.

    Yields:
        One network a budget.
    """
    for position, budget in enumerate(run.budgets, start=1):
        network = copy_model(run.student)
        keep_only(network, order[:budget])
        if run.progress is not None:
            message = f"{budget:,} of {run.total:,} ReLUs"
            run.progress(Progress(f"{name} masks", position, len(run.budgets), message))
        yield Cut(budget, network)
