"""What objectives with a multiplier for each group share: where violations are taken, the dual step, what is logged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fairline._registry import is_whole
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Objective

#: A multiplier beyond it leaves nothing of the loss itself.
EXPLODED = 1e4
#: What violations are taken on.
PARTS = ("train", "val")


class Constrained(Objective):
    """A loss, and constraints on groups that multipliers enforce; subclasses say what a violation is.

    Args:
        cap: No multiplier grows beyond it.
        samples: Images of each group, at most, that violations on the training part are taken on; None for all. The
            same images after every epoch.
        on: The part whose violations move the multipliers, one of :data:`PARTS`.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Attributes:
        multipliers: λ, float32, (A,).
        violations: Those of each part after the last epoch, (A,).

    Raises:
        FairlineError: An option is out of its range.
    """

    def __init__(self, cap: float | None, samples: int | None, on: str, **options: float) -> None:
        super().__init__(**options)
        if cap is not None and not (cap > 0 and math.isfinite(cap)):
            raise FairlineError(f"The cap of the multipliers must be positive and finite: cap={cap}.")
        if samples is not None and not (is_whole(samples) and samples >= 1):
            raise FairlineError(f"λ needs one image of each group at least, and whole ones: samples={samples}.")
        if on not in PARTS:
            raise FairlineError(f"Violations are taken on train or val, not '{on}'.")
        self.cap = cap
        self.samples = None if samples is None else int(samples)
        self.on = on
        self.multipliers = torch.zeros(0)
        self.violations: dict[str, Tensor] = {}

    def start(self, train_data: GroupedData) -> None:
        """Set every multiplier to 0."""
        self.require_groups(train_data)
        self.group_names = train_data.group_names
        self.groups = train_data.groups
        self.sizes = torch.bincount(train_data.groups, minlength=train_data.num_groups)
        if self.samples is not None:
            self.subset = torch.cat(train_data.sample_by_group(self.samples)).sort().values
            self.groups = self.groups[self.subset]
        self.multipliers = torch.zeros(train_data.num_groups, device=train_data.device)
        self.violations = {}
        self._active = False

    def start_held_out(self, val_data: GroupedData | None) -> None:
        """Refuse what violations could not be taken on.

        Raises:
            FairlineError: They are to be taken on the validation part, and there is none, or a group of it is empty.
        """
        if self.on == "train":
            return
        name = type(self).__name__
        if val_data is None:
            raise FairlineError(
                f"The objective {name} takes its violations on a validation part (on=val), and here is none: give "
                "one, or take on=train."
            )
        val_data.require_groups(f"the validation part of the objective {name}")

    def ascend(self, step: Tensor, advice: str) -> None:
        """A projected step of gradient ascent, ``λ ← min(max(λ + step, 0), cap)``.

        Args:
            step: The violations times their step size, (A,).
            advice: What to do where a multiplier explodes, as the end of the sentence.

        Raises:
            FairlineError: One explodes, or is no number.
        """
        self.multipliers = (self.multipliers + step).clamp(min=0, max=self.cap)
        largest = int(self.multipliers.argmax())
        value = float(self.multipliers[largest])
        if not value <= EXPLODED:
            raise FairlineError(
                f"The multiplier of group “{self.group_names[largest]}” exploded to {value:.3g}; {advice}."
            )
        self._active = value > 0

    def metrics(self) -> dict[str, float]:
        """λ of each group, and its violations on both parts."""
        columns = {"lambda": self.multipliers}
        columns |= {f"{part}_violation": self.violations[part] for part in PARTS if part in self.violations}
        return {
            f"{column}[{name}]": value
            for column, values in columns.items()
            for name, value in zip(self.group_names, values.tolist(), strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """The multipliers."""
        return {"multipliers": self.multipliers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The multipliers of a checkpoint."""
        self.multipliers = state["multipliers"].to(self.multipliers)
        self._active = bool((self.multipliers > 0).any())
