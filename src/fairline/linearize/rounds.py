"""The loop of methods that remove ReLUs in rounds and train the weights in between.

Source: none.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from fairline.data.grouped import GroupedData
from fairline.linearize.base import Cut, Linearization
from fairline.masking import copy_model
from fairline.objectives.base import Objective
from fairline.objectives.erm import ERM
from fairline.training import Epoch, Progress, run_epochs


def falling(count: int, budgets: Sequence[int], rate: float, least: int = 1) -> list[int]:
    """ReLUs after each round; every budget is among them.

    Args:
        count: ReLUs at the start.
        budgets: Counts below it, from the largest on.
        rate: Share of the remaining ReLUs that a round removes, in [0, 1).
        least: ReLUs that a round removes at least, unless a budget is nearer.

    Returns:
        The counts, falling.

    Examples:
        >>> falling(1000, [600, 100], rate=0.5)
        [600, 300, 150, 100]
    """
    plan = []
    for budget in budgets:
        while count > budget:
            count = max(budget, min(int(count * (1 - rate)), count - least))
            plan.append(count)
    return plan


class Rounds(ABC):
    """The rounds of a run: a removal, then epochs of the one training loop, whose checkpoint holds it all.

    Args:
        name: Of the method, and of its checkpoint.
        run: Its student is changed.
        plan: ReLUs after each round, falling; every budget is among them.
        training: What the weights are trained on in between.
        epochs: Of training after each round: SGD with momentum 0.9, weight decay 5e-4 and a cosine of its own.
        lr: Of it.
        batch_size: Images in a step.
        objective: Of the training, copied; CE + T²·KL by default. Its state lives through all rounds.
        seed: Of the whole run.
    """

    def __init__(
        self,
        name: str,
        run: Linearization,
        plan: list[int],
        training: GroupedData,
        *,
        epochs: int,
        lr: float,
        batch_size: int,
        objective: Objective | None,
        seed: int,
    ) -> None:
        self.name = name
        self.run = run
        self.plan = plan
        self.training = training
        self.refresh_epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.seed = seed
        self.objective = copy.deepcopy(objective) or ERM()
        self.objective.start(training)
        self.removed = 0
        self.rows: list[dict[str, float]] = []

    @abstractmethod
    def remove(self) -> None:
        """Remove the next round's ReLUs from the student, count it in ``removed``, and begin its row."""

    def cuts(self) -> Iterator[Cut]:
        """A network for each budget, after the round that ends at it."""
        run = self.run
        for number in self.done():
            target = self.plan[number - 1]
            run.rows = self.rows
            if run.progress is not None:
                message = f"round {number}, {target:,} of {run.total:,} ReLUs, aim {self.plan[-1]:,}"
                run.progress(Progress(self._stage, number, len(self.plan), message))
            if target in run.budgets:
                run.budgets.remove(target)
                yield Cut(target, copy_model(run.student))
            if not run.budgets:
                return

    def state_dict(self) -> dict[str, Any]:
        """What changes from round to round, beside the student."""
        return {"removed": self.removed, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.removed, self.rows = state["removed"], state["rows"]

    def done(self) -> Iterator[int]:
        """Do all rounds that an interrupted run has not done; the number of each, from 1, when it is done."""
        if not self.refresh_epochs:
            for number in range(1, len(self.plan) + 1):
                self.remove()
                yield number
            return
        file = self.run.file(self.name)
        # A checkpoint is written after the removal that follows an epoch.
        if file is None or not file.exists():
            self.remove()
        optimizer = SGD(self.run.student.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        for epoch in self.epochs(optimizer):
            if epoch.epoch % self.refresh_epochs:
                continue
            self.rows[-1] |= {key: value for key, value in epoch.row().items() if not key.startswith("val_")}
            yield self.removed
            if self.removed < len(self.plan):
                self.remove()
                # Each refresh is a training of its own.
                optimizer.state.clear()

    def epochs(self, optimizer: SGD) -> Iterator[Epoch]:
        """The training loop through all rounds."""
        run = self.run
        return run_epochs(
            run.student,
            self.training,
            epochs=self.refresh_epochs * len(self.plan),
            optimizer=optimizer,
            scheduler=CosineAnnealingWarmRestarts(optimizer, self.refresh_epochs),
            objective=self.objective,
            teacher=run.teacher,
            batch_size=self.batch_size,
            seed=self.seed,
            device=run.device,
            precision=run.arithmetic,
            stage=self._stage,
            checkpoint=run.file(self.name),
            stateful={self.name: self},
        )

    @property
    def _stage(self) -> str:
        return self.name.replace("_", " ")
