"""Distillation in two parts, across and within sets of classes, each rebalanced (Kim, CVPR 2026)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fairline._registry import is_whole
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.objectives.base import Batch, Objective


def split_divergence(log_p: Tensor, log_q: Tensor, part_of: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A KL divergence across and within sets of classes.

    With P_g the mass that p puts on set g, ``KL(p ‖ q) = KL(P ‖ Q) + Σ_g P_g·KL(p within g ‖ q within g)``, exactly.
    Two sets, the label and all other classes, give decoupled distillation (Zhao et al., CVPR 2022).

    Args:
        log_p: (B, K).
        log_q: (B, K); differentiable.
        part_of: The set of each class, int64, (K,); none is empty.
        parts: How many sets, G.

    Returns:
        ``log P`` and ``log Q``, (B, G), and the divergence within each set, (B, G), in nats.

    >>> p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.4, 0.4]])
    >>> log_p, log_q, within = split_divergence(p.log(), q.log(), torch.tensor([0, 1, 1]), 2)
    >>> log_p.exp(), within
    (tensor([[0.5000, 0.5000]]), tensor([[0.0000, 0.0201]]))
    >>> (log_p.exp() * (log_p - log_q + within)).sum(1), (p * (p / q).log()).sum(1)
    (tensor([0.2332]), tensor([0.2332]))
    """
    inside = part_of[:, None] == torch.arange(parts, device=part_of.device)
    # (B, K, G), classes outside of a set at −∞.
    mass_p, mass_q = (log.unsqueeze(2).masked_fill(~inside, -math.inf).logsumexp(1) for log in (log_p, log_q))
    own_p, own_q = log_p - mass_p[:, part_of], log_q - mass_q[:, part_of]
    return mass_p, mass_q, (own_p.exp() * (own_p - own_q)) @ inside.to(log_p)


class LongTailKD(Objective):
    """``CE + T²·(KL across + Σ_g w_g·KL within g)`` over sets of classes by frequency: head, medium, tail.

    The divergence splits exactly (:func:`split_divergence`), and a teacher's bias sits in two places: it puts too much
    mass P on the head, and P weights what is learned within each set. Both are rebalanced with a strength s: the
    teacher's masses become ``P_g / P̄_g^s``, normalised, P̄ their means over the batch, so that with s = 1 no set is
    favoured on the whole; and the weights become ``w_g ∝ P_g^(1−s)``, with s = 1 alike, their sum 1 as before. s = 0
    is plain distillation. For every s the minimiser is the teacher within each set, and the rebalanced masses
    across them.

    The two parts, the sets and both aims are Kim's (*Distilling Balanced Knowledge from a Biased Teacher*, as its
    abstract states them); its formulas and its weights of the two parts could not be read, so how masses and weights
    are rebalanced here is this library's.

    Args:
        strength: s; 0 is plain distillation, 1 balances fully.
        parts: Sets of as many classes each as can be, by their training images; as many as there are classes at most.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Attributes:
        part_of: The set of each class, 0 the head, int64, (K,).

    Raises:
        FairlineError: The strength is not finite or negative, there are fewer than two sets, or a class has no image.

    >>> labels = torch.tensor([0, 0, 0, 1, 1, 2])
    >>> images = torch.zeros(6, 1, 1, 1, dtype=torch.uint8)
    >>> data = GroupedData(images, labels, labels, ("a", "b", "c"), ("a", "b", "c"))
    >>> objective = LongTailKD(parts=2)
    >>> objective.start(data)
    >>> objective.part_of
    tensor([0, 0, 1])
    """

    def __init__(self, strength: float = 1.0, parts: int = 3, **options: float) -> None:
        super().__init__(**options)
        if not (strength >= 0 and math.isfinite(strength)):
            raise FairlineError(f"The strength of rebalancing must be finite and not negative: strength={strength}.")
        if not (is_whole(parts) and parts >= 2):
            raise FairlineError(f"Classes are parted in 2 sets at least, and whole ones: parts={parts}.")
        self.strength = strength
        self.parts = int(parts)

    def start(self, train_data: GroupedData) -> None:
        """Part the classes by their frequencies."""
        _, sizes = self.cells(train_data, "class")
        order = sizes.argsort(descending=True, stable=True)
        self.part_of = torch.empty_like(order)
        for part, classes in enumerate(order.tensor_split(min(self.parts, len(order)))):
            self.part_of[classes] = part

    def distillation(self, logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """The two parts, times T², (B,)."""
        if self.strength == 0:
            return super().distillation(logits, teacher_logits, batch)
        # Outputs for classes that the data do not have are rarer than any.
        spare = logits.shape[1] - len(self.part_of)
        parts = int(self.part_of.max()) + 1
        part_of = F.pad(self.part_of, (0, spare), value=parts - 1)
        log_p, log_q = ((z / self.temperature).log_softmax(1) for z in (teacher_logits, logits))
        mass_p, mass_q, within = split_divergence(log_p, log_q, part_of, parts)
        mean = mass_p.logsumexp(0) - math.log(len(mass_p))
        target = (mass_p - self.strength * mean).log_softmax(1)
        across = (target.exp() * (target - mass_q)).sum(1)
        weights = ((1 - self.strength) * mass_p).softmax(1)
        return self.temperature**2 * (across + (weights * within).sum(1))
