"""The paper's mitigation: a Lagrangian-dual term that holds each group's loss to the loss of all (Algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import group_mean
from fairline.objectives.base import Batch, group_means
from fairline.objectives.constrained import Constrained

VIOLATIONS = ("absolute", "signed", "worst_group", "accuracy")


class Lagrangian(Constrained):
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
        on: The part whose violations move λ: ``"train"``, as printed, or ``"val"``, because a network that has learned
            its training images has next to none left on them. Both parts' are logged.
        released: Do as the code published with the paper: the penalty is detached from the graph, so it changes the
            reported loss and no gradient; the KL is divided by the number of classes; the violations that move λ are
            summed over mini-batches. For comparison only.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Attributes:
        multipliers: λ, float32, (A,).
        violations: ρ of each part after the last epoch, (A,).

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
        on: str = "train",
        released: bool = False,
        **options: float,
    ) -> None:
        super().__init__(cap, samples, on, **options)
        if not (mu >= 0 and math.isfinite(mu)):
            raise FairlineError(f"The multipliers' step μ must be finite and not negative: mu={mu}.")
        if violation not in VIOLATIONS:
            raise FairlineError(f"A violation is one of {', '.join(VIOLATIONS)}, not '{violation}'.")
        if released and violation != "absolute":
            raise FairlineError(f"The published code knows absolute violations only, not '{violation}'.")
        if released and on != "train":
            raise FairlineError("The published code sums violations over mini-batches, so it knows on='train' only.")
        self.mu = mu
        self.violation = violation
        self.released = released

    def start(self, train_data: GroupedData) -> None:
        """Set every multiplier to 0."""
        super().start(train_data)
        self._batch_violations = torch.zeros_like(self.multipliers)

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

    def held_out(self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch) -> None:
        """Violations over the validation part."""
        losses = self.losses(logits, teacher_logits, batch)
        constrained = self._errors if self.violation == "accuracy" else losses
        means = group_mean(constrained, batch.groups, len(self.multipliers))
        self._measure("val", means, constrained.double().mean())

    def end_epoch(self, group_losses: Tensor, overall: Tensor) -> None:
        """``λ ← λ + μ·ρ`` over the whole training set, or the validation part."""
        if self.violation == "accuracy":
            # The pass over the training set has just left its errors.
            group_losses = group_mean(self._errors, self.groups, len(self.multipliers))
            overall = (group_losses * self.sizes).sum() / self.sizes.sum()
        self._measure("train", group_losses, overall)
        violations = self.violations[self.on]
        if self.released:
            violations, self._batch_violations = self._batch_violations, torch.zeros_like(self.multipliers)
        step = self.mu * violations.to(self.multipliers)
        self.ascend(step, f"take a smaller mu than {self.mu:g}, or a cap")

    def _measure(self, part: str, group_losses: Tensor, overall: Tensor) -> None:
        violations = self._violations(group_losses, overall)
        if self.violation == "worst_group":
            worst = torch.zeros_like(violations)
            worst[group_losses.nan_to_num(-math.inf).argmax()] = 1
            violations = violations * worst
        self.violations[part] = violations

    @property
    def needs_group_losses(self) -> bool:
        """With μ = 0 nothing is to be updated."""
        return self.mu > 0

    @property
    def needs_held_out(self) -> bool:
        """As for the losses over the training set."""
        return self.needs_group_losses
