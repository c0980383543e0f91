"""Methods that rank ReLUs once and keep the first r: the cheap baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairline._io import resolve_device
from fairline.data.grouped import GroupedData
from fairline.linearize.base import Linearized, resolve_budgets
from fairline.linearize.surrogates import require_surrogate, start_masked
from fairline.masking import Surrogate, copy_model, masked_relus, relu_count
from fairline.training import Progress, ProgressCallback


@dataclass(kw_only=True)
class Ranked:
    """Keep the ReLUs with the largest scores. Budgets are exact and nested; subclasses give the scores.

    Attributes:
        surrogate: What stands in the place of the others: ``"identity"`` or ``"quadratic"``, fitted.
        seed: Breaks ties, and what else the method draws.
    """

    name = ""

    surrogate: Surrogate = "identity"
    seed: int = 0

    def __post_init__(self) -> None:
        require_surrogate(self.surrogate)

    def scores(self, model: nn.Module, train: GroupedData) -> Mapping[str, Tensor]:
        """Score of every unit of each masked layer, of the mask's shape; larger ones are kept.

        Args:
            model: With all masks 1, in evaluation mode.
            train: Training part, on the model's device.
        """
        raise NotImplementedError

    def linearize(
        self,
        model: nn.Module,
        train: GroupedData,
        budgets: Sequence[float],
        *,
        device: str | torch.device | None = None,
        progress: ProgressCallback | None = None,
        checkpoint: str | Path | None = None,
        history: list[dict[str, float]] | None = None,
    ) -> Iterator[Linearized]:
        """Yield one network a budget, from the largest budget to the smallest; see :class:`Linearizer`.

        Weights stay as they are: finetune next. ``checkpoint`` and ``history`` are not used; nothing here takes long.

        Raises:
            FairlineError: A budget is impossible, or the model has no ReLU.
        """
        where = resolve_device(device)
        masked = start_masked(model, train, self.surrogate, where, seed=self.seed)
        total = relu_count(masked)
        counts = resolve_budgets(budgets, total)
        found = self.scores(copy_model(masked).eval(), train.to(where))
        flat = torch.cat([found[name].detach().flatten().cpu().double() for name in masked_relus(masked)])
        # A random order first, so that ties do not favour the first layers.
        shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        order = shuffled[torch.sort(flat[shuffled], descending=True, stable=True).indices]
        for position, budget in enumerate(counts, start=1):
            cut = copy_model(masked)
            kept = torch.zeros(total, dtype=torch.bool)
            kept[order[:budget]] = True
            start = 0
            for layer in masked_relus(cut).values():
                layer.set_mask(kept[start : start + layer.kept.numel()].view(layer.shape))
                start += layer.kept.numel()
            if progress is not None:
                progress(Progress(f"{self.name} masks", position, len(counts), f"{budget:,} of {total:,} ReLUs"))
            info: dict[str, Any] = {"reached": True}
            yield Linearized(cut, budget, relu_count(cut), total, self.name, self.seed, info)
