"""χ²-ball distributionally robust optimisation: fairness without group labels (Hashimoto et al., ICML 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairline.errors import FairlineError
from fairline.objectives.base import Batch, Objective


class Chi2DRO(Objective):
    """Minimise the worst mean loss over all reweightings of the samples within a χ² ball; no group is named.

    Every group with a share of at least ``alpha_min`` is such a reweighting, so the worst of them is bounded. The
    dual (their Proposition 2) is ``min_η C·√(mean (ℓᵢ − η)₊²) + η`` with ``C = √(2(1/α_min − 1)² + 1)``, which is the
    largest ``Σ qᵢℓᵢ`` under ``mean (n·qᵢ − 1)² ≤ C² − 1``. It is solved exactly on each batch; they solve η on the
    whole training set, so here the bound is that of a batch (as in Levy et al. 2020), and larger batches bias it less.

    Args:
        alpha_min: Share of the smallest group to be protected, in (0, 1]; 1 is plain distillation.
        options: ``temperature``, ``ce_weight``, ``kd_weight``.

    Raises:
        FairlineError: ``alpha_min`` is outside of (0, 1].

    >>> batch = Batch(*4 * [torch.zeros(4)])  # it looks at the losses alone
    >>> losses = torch.tensor([1.0, 2.0, 3.0, 6.0])
    >>> for share in (1.0, 0.5, 0.2):
    ...     print(f"{share}: {Chi2DRO(share).reduce(losses, batch):.2f}")
    1.0: 3.00
    0.5: 5.56
    0.2: 6.00
    """

    def __init__(self, alpha_min: float = 0.2, **options: float) -> None:
        super().__init__(**options)
        if not 0 < alpha_min <= 1:
            raise FairlineError(f"The smallest share must lie in (0, 1]: alpha_min={alpha_min}.")
        self.alpha_min = alpha_min
        self.factor = math.sqrt(2 * (1 / alpha_min - 1) ** 2 + 1)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        """``Σ qᵢℓᵢ`` at the worst q, whose gradient is that of the maximum (Danskin)."""
        return (worst_weights(losses.detach(), self.factor) * losses).sum()


def worst_weights(losses: Tensor, factor: float) -> Tensor:
    """The weights q ≥ 0, Σq = 1, that make ``Σ qᵢℓᵢ`` largest under ``mean (n·qᵢ − 1)² ≤ factor² − 1``.

    They are ``(ℓᵢ − η)₊`` up to scale. If the k largest losses lie above η, with mean m and variance v, the
    condition of optimality is ``(m − η)²·(factor²·k/n − 1) = v``; every k is tried at once.

    Args:
        losses: (n,).
        factor: C ≥ 1.

    Returns:
        (n,).

    >>> losses = torch.tensor([1.0, 2.0, 3.0, 6.0])
    >>> q = worst_weights(losses, factor=math.sqrt(1.5))
    >>> q
    tensor([0.0610, 0.1555, 0.2500, 0.5335])
    >>> torch.isclose((4 * q - 1).square().mean(), torch.tensor(0.5))  # on the ball's edge
    tensor(True)
    """
    n = len(losses)
    if factor == 1:
        return torch.full_like(losses, 1 / n)
    ordered = losses.double().sort(descending=True).values
    counts = torch.arange(1, n + 1, device=losses.device, dtype=torch.float64)
    # Sums of deviations from the largest: squares of large losses would cancel.
    deviations = ordered - ordered[0]
    means = deviations.cumsum(0) / counts
    variances = (deviations.square().cumsum(0) / counts - means.square()).clamp_min(0)
    freedom = factor**2 * counts / n - 1
    eta = means - (variances / freedom.clamp_min(1e-12)).sqrt()
    following = torch.cat([deviations[1:], deviations.new_full((1,), -math.inf)])
    # η must part the k largest from the others; rounding may leave it just outside.
    outside = torch.maximum(eta - deviations, following - eta).clamp_min(0)
    position = torch.where(freedom > 0, outside, math.inf).argmin()
    excess = (losses.double() - ordered[0] - eta[position]).clamp_min(0)
    # All losses are equal, or the ball is so large that all weight may lie on the largest.
    top = (losses == losses.max()).double()
    weights = torch.where(excess.sum() > 0, excess, top)
    weights = weights / weights.sum()
    return weights.to(losses)
