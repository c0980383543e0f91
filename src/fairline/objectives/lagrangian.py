"""The paper's mitigation: a Lagrangian-dual term that holds each group's loss to the loss of all (Algorithm 1)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import group_mean
from fairline.objectives.base import Batch, Objective, group_means

logger = logging.getLogger(__name__)

VIOLATIONS = ("absolute", "signed", "worst_group", "accuracy")

#: A multiplier beyond it leaves nothing of the loss itself.
EXPLODED = 1e4


class Lagrangian(Objective):
    """Algorithm 1 of Das, Romanelli and Fioretto (ICML 2024), after Fioretto et al. (2020).

    For each batch B, with ``L = CE + T²·KL`` a sample and ``ρₐ = |L(B) − Lₐ(B)|`` for the groups in B, a step on
    ``L(B) + Σₐ λₐ·ρₐ``. After each epoch, over the whole training set S and in evaluation mode,
    ``λₐ ← λₐ + μ·|L(S) − Lₐ(S)|``, from λ = 0. So the first epoch is plain distillation, and after E epochs λₐ is
    about μ·E times the violation: a short finetune needs a larger μ. Say μ and E together.

    Args:
        mu: μ ≥ 0, the step of the multipliers; the paper takes 5e-4, 5e-3 and 1e-2 over 100 epochs. With 0 this is
            plain distillation, bit for bit.
        violation: What ρₐ is. ``"absolute"``: as printed. ``"signed"``: ``max(Lₐ − L, 0)``, so that a group better off
            than the whole is not pushed down. ``"worst_group"``: signed, and only the multiplier of the group with the
            largest loss grows. ``"accuracy"``: ``|e − eₐ|`` of the expected error ``e = 1 − p(y)``, a proxy of
            accuracy that one far outlier cannot dominate.
        cap: No multiplier grows beyond it.
        samples: Images of each group, at most, that λ is updated on. None, the algorithm as printed, takes the whole
            training set, whose forward pass costs about a fifth of an epoch; a few hundred images a group cost next to
            nothing, and small groups are still taken whole. The same images after every epoch.
        released: Do as the code published with the paper: the penalty is detached from the graph, so it changes the
            reported loss and no gradient; the KL is divided by the number of classes; the violations that move λ are
            summed over mini-batches. For comparison only.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Attributes:
        multipliers: λ, float32, (A,).

    Raises:
        FairlineError: μ or the cap is negative, the violation is unknown, or a multiplier explodes.

    >>> index = torch.tensor([0, 0, 1])
    >>> data = GroupedData(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), index, index, ("a", "b"), ("many", "few"))
    >>> batch = Batch(data.normalized(), data.labels, data.groups, torch.arange(3))
    >>> objective, losses = Lagrangian(mu=0.5), torch.tensor([1.0, 1.0, 4.0])
    >>> objective.start(data)
    >>> objective.reduce(losses, batch)  # λ = 0: the mean
    tensor(2.)
    >>> objective.end_epoch(torch.tensor([1.0, 4.0]), losses.mean())
    >>> objective.multipliers  # μ·|Lₐ − L|
    tensor([0.5000, 1.0000])
    >>> objective.reduce(losses, batch)  # 2 + 0.5·1 + 1·2
    tensor(4.5000)
    """

    def __init__(
        self,
        mu: float = 5e-3,
        violation: str = "absolute",
        cap: float | None = None,
        samples: int | None = None,
        released: bool = False,
        **options: float,
    ) -> None:
        super().__init__(**options)
        if not (mu >= 0 and math.isfinite(mu)):
            raise FairlineError(f"The multipliers' step μ must be finite and not negative: mu={mu}.")
        if violation not in VIOLATIONS:
            raise FairlineError(f"A violation is one of {', '.join(VIOLATIONS)}, not '{violation}'.")
        if cap is not None and not cap > 0:
            raise FairlineError(f"The cap of the multipliers must be positive: cap={cap}.")
        if samples is not None and samples < 1:
            raise FairlineError(f"λ needs one image of each group at least: samples={samples}.")
        if released and violation != "absolute":
            raise FairlineError(f"The published code knows absolute violations only, not '{violation}'.")
        self.mu = mu
        self.violation = violation
        self.cap = cap
        self.samples = samples
        self.released = released
        self.multipliers = torch.zeros(0)

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
        self._batch_violations = torch.zeros_like(self.multipliers)
        self._active = False

    def losses(self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch) -> Tensor:
        """Loss of each sample, (B,); the expected errors are kept where they are what is constrained."""
        if self.violation == "accuracy":
            self._errors = 1 - logits.softmax(1).gather(1, batch.labels[:, None]).squeeze(1)
        return super().losses(logits, teacher_logits, batch)

    def distillation(self, logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """T²·KL, (B,); divided by the number of classes where that is what the published code does."""
        kd = super().distillation(logits, teacher_logits, batch)
        return kd / logits.shape[1] if self.released else kd

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        """``L(B) + Σₐ λₐ·ρₐ``."""
        overall = losses.mean()
        if not self._active and not self.released:
            # All λ are 0; adding 0·ρ would cost time and change nothing.
            return overall
        constrained = self._errors if self.violation == "accuracy" else losses
        means, present = group_means(constrained, batch.groups, len(self.multipliers))
        violations = self._violations(means, constrained.mean()) * present
        # Not a dot product: its last bits depend on where the tensors lie in memory.
        penalty = (self.multipliers * violations).sum()
        if self.released:
            self._batch_violations += violations.detach()
            penalty = penalty.detach()
        return overall + penalty

    def _violations(self, group_losses: Tensor, overall: Tensor) -> Tensor:
        worse = group_losses - overall
        return worse.abs() if self.violation in ("absolute", "accuracy") else worse.clamp_min(0)

    def end_epoch(self, group_losses: Tensor, overall: Tensor) -> None:
        """``λ ← λ + μ·ρ`` over the whole training set."""
        if self.violation == "accuracy":
            # The pass over the training set has just left its errors.
            group_losses = group_mean(self._errors, self.groups, len(self.multipliers))
            overall = (group_losses * self.sizes).sum() / self.sizes.sum()
        violations = self._violations(group_losses, overall)
        if self.violation == "worst_group":
            worst = torch.zeros_like(violations)
            worst[group_losses.argmax()] = 1
            violations = violations * worst
        if self.released:
            violations, self._batch_violations = self._batch_violations, torch.zeros_like(self.multipliers)
        self.multipliers = self.multipliers + self.mu * violations.to(self.multipliers)
        if self.cap is not None:
            self.multipliers = self.multipliers.clamp_max(self.cap)
        largest = int(self.multipliers.argmax())
        value = float(self.multipliers[largest])
        if not value <= EXPLODED:
            raise FairlineError(
                f"The multiplier of group “{self.group_names[largest]}” exploded to {value:.3g}; take a smaller mu "
                f"than {self.mu:g}, or a cap."
            )
        self._active = value > 0

    @property
    def needs_group_losses(self) -> bool:
        """With μ = 0 nothing is to be updated."""
        return self.mu > 0

    def metrics(self) -> dict[str, float]:
        """λ of each group."""
        values = self.multipliers.tolist()
        return {f"lambda[{name}]": value for name, value in zip(self.group_names, values, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The multipliers."""
        return {"multipliers": self.multipliers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The multipliers of a checkpoint."""
        self.multipliers = state["multipliers"].to(self.multipliers)
        self._active = bool((self.multipliers > 0).any())
