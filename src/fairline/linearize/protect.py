"""Which ReLUs the group that suffers most has use for: a price of each ReLU for fair placement.

Linearizing ReLU i changes the activation of a sample by ``−min(xᵢ, 0)``, so ``uₐ(i) = mean |min(xᵢ, 0)|`` over group
a is what a ReLU does for that group. Sparsity then costs ``wᵢ·|mᵢ|`` with ``wᵢ ∝ (ū(i) / u_worst(i))^κ``: a ReLU that
bends more for the suffering group than for the average one is cheaper to keep.

Source: none; the idea is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import group_mean, predict
from fairline.linearize.activations import watched
from fairline.masking import MaskedReLU, masked_relus
from fairline.precision import FLOAT32, Arithmetic


class Protection:
    """Prices of ReLUs, measured on a fixed sample of each group.

    Args:
        data: Training part.
        teacher: The network before linearization.
        strength: κ ≥ 0; 0 gives every ReLU the price 1.
        samples: Images of each group, at most.
        seed: Of their choice.
        arithmetic: What passes compute in.

    Raises:
        FairlineError: κ is negative, or the data have fewer than two groups.
    """

    def __init__(
        self,
        data: GroupedData,
        teacher: nn.Module,
        strength: float,
        samples: int,
        seed: int,
        arithmetic: Arithmetic = FLOAT32,
    ) -> None:
        if data.num_groups < 2:
            raise FairlineError(f"{data.name}: protecting the group that suffers most needs two groups.")
        data.require_groups("protecting the group that suffers most")
        self.data = data.select(torch.cat(data.sample_by_group(samples, seed)))
        self.strength = strength
        self.arithmetic = arithmetic
        self.before = self._group_losses(teacher)

    def prices(self, model: nn.Module) -> tuple[int, dict[str, Tensor]]:
        """The group whose loss has risen most above the teacher's, and the prices, of mean 1 over all ReLUs.

        Args:
            model: The student, masks learned or fixed.

        Returns:
            Index of the group, and for each masked layer float32 of the mask's shape.
        """
        layers = masked_relus(model)
        groups = self.data.num_groups
        totals = {name: torch.zeros(groups, *layer.shape, device=self.data.device) for name, layer in layers.items()}
        seen = dict.fromkeys(layers, 0)

        def add(name: str, x: Tensor) -> None:
            groups = self.data.groups[seen[name] : seen[name] + len(x)]
            totals[name].index_add_(0, groups, x.clamp_max(0).neg().float())
            seen[name] += len(x)

        with watched(model, add):
            after = self._group_losses(model)
        worst = int((after - self.before).argmax())
        sizes = torch.bincount(self.data.groups, minlength=groups)
        prices = {}
        for name, layer in layers.items():
            use = totals[name] / sizes.view(-1, *[1] * len(layer.shape))
            # A unit that no group bends is nobody's: the floor keeps its price near 1.
            floor = use.mean().clamp_min(1e-12) * 1e-2
            prices[name] = ((use.mean(0) + floor) / (use[worst] + floor)) ** self.strength
        scale = sum(float(p.sum()) for p in prices.values()) / sum(p.numel() for p in prices.values())
        return worst, {name: p / scale for name, p in prices.items()}

    def _group_losses(self, model: nn.Module) -> Tensor:
        logits = predict(model, self.data, arithmetic=self.arithmetic)
        losses = F.cross_entropy(logits, self.data.labels, reduction="none")
        return group_mean(losses, self.data.groups, self.data.num_groups)


def covered(price: Tensor, layer: MaskedReLU) -> Tensor:
    """Sum of the prices of the ReLUs that each entry of a learned mask covers, in the mask's compact shape."""
    price = price * layer.kept
    shape = price.shape if layer.weight is None else layer.weight.shape
    axes = [axis for axis, size in enumerate(shape) if size != price.shape[axis]]
    return price.sum(axes, keepdim=True) if axes else price
