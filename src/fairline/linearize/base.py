"""What every linearizer takes and gives: ``Method(...).linearize(model, train, budgets)``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.training import ProgressCallback


@dataclass(frozen=True)
class Linearized:
    """A network at a ReLU budget.

    Attributes:
        model: Masked, masks fixed; finetune it next.
        budget: ReLU count asked for.
        relus: ReLUs kept for each sample.
        total: ReLUs before linearization.
        method: Name of the linearizer.
        seed: Of the run.
        info: What the method wants to say, e.g. the epoch at which the budget was crossed.
    """

    model: nn.Module
    budget: int
    relus: int
    total: int
    method: str
    seed: int | None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """Share of the ReLUs that is kept."""
        return self.relus / self.total


class Linearizer(Protocol):
    """Interface of a method."""

    name: str

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
        """Yield one network a budget, from the largest budget to the smallest.

        Args:
            model: The trained network; not changed.
            train: Training part.
            budgets: Fractions (float, up to 1.0) or counts (int) of ReLUs to keep.
            device: The accelerator if there is one, by default.
            progress: Called after every batch.
            checkpoint: Folder to resume from and to save to.
            history: Rows, one an epoch, are put here before each yield.
        """
        ...


def resolve_budgets(budgets: Sequence[float], total: int) -> list[int]:
    """ReLU counts, from the largest to the smallest, each once.

    Args:
        budgets: A float in [0, 1] is a fraction of ``total``, an int a count.
        total: ReLUs of the whole network.

    Raises:
        FairlineError: There is no budget, or one is outside of the network.
    """
    counts = set()
    for budget in budgets:
        is_count = isinstance(budget, int) and not isinstance(budget, bool)
        count = int(budget) if is_count else budget * total
        if not (0 <= count <= total):
            what = f"{budget} ReLUs" if is_count else f"the fraction {budget}"
            raise FairlineError(f"A budget of {what} is impossible: the network has {total} ReLUs.")
        counts.add(round(count))
    if not counts:
        raise FairlineError("No ReLU budget was given.")
    return sorted(counts, reverse=True)
