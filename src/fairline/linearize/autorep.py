"""AutoReP: automatic ReLU replacement (Peng et al., ICCV 2023).

The mask is binary in every forward pass. Behind each entry stands an auxiliary weight w; a straight-through estimator
gives it the mask's gradient times softplus(w), and a hysteresis keeps entries from flickering: a ReLU is dropped when
w falls below −h and comes back when w rises above h. The loss is ``CE + T²·KL + λ·max(share kept − budget, 0)``; what
is dropped becomes a quadratic polynomial a channel.

The budget is reached within a few epochs, by which time masks are little more than their random start; it is while the
run stays there that ReLUs change places. So settings are those of the published runs, not the options that the
published code has by default:

- masks and weights learn at 1e-3 (Tiny ImageNet: weights at 1e-4), batches of 128, cosine to 1e-5;
- λ is 140 for a ResNet-18 and 80 for a WRN-22-8 on CIFAR-100, 240 on Tiny ImageNet; 140 here;
- a run takes 200 epochs on CIFAR-100, 80 on Tiny ImageNet, nearly all of them at the budget (``hold``).

What differs or is left open:

- The published code learns each budget anew; here one run passes through all and stays at each.
- Its cosine runs over the whole of a run; here learning rates are constant on the way to a budget and fall while the
  run stays there.
- It keeps the best epoch on the test set among those whose count is near the budget; here the last one is kept, with
  the budget filled exactly.
- Where the count stops falling above a budget, of which nothing is said, λ grows as SNL's does.
- Its polynomials are set anew in every tenth of the first 500 forward passes, those over test images among them, from
  running moments of each channel, and learned beside that. The formula is one of mean and standard deviation, and gets
  the variance, taken as 0.5 at least; c₀ is then divided by 5 and c₂ by 10. Here they are fitted once, at the start, by
  least squares, and learned from the first step.
- Its square has another factor (``square``) besides: 0.1 by default and in its CIFAR-100 scripts, 0.2 in those for
  CIFAR-10, and 2 with the coefficient clipped to ±1 for Tiny ImageNet; with the tenth that is 0.01, 0.02 and 0.2. 0.2
  here (:mod:`~fairline.linearize.surrogates` says why).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.optim import Adam, Optimizer

from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.linearize.learned import MaskLearning
from fairline.linearize.surrogates import start_masked
from fairline.masking import SQUARE_SCALE, MaskedReLU, Surrogate, masked_relus


class _StraightThrough(Function):
    """The indicator forward; ∂L/∂w = softplus(w)·∂L/∂m backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indicator: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return indicator.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad * F.softplus(weight), None


class Hysteresis(nn.Module):
    """A binary mask that remembers its state, above auxiliary weights; it starts with every ReLU kept.

    Args:
        shape: Of the weights.
        threshold: h ≥ 0, half the width of the loop.
    """

    kept: Tensor

    def __init__(self, shape: tuple[int, ...], threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("kept", torch.ones(shape, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        """The mask, 0 or 1, with a straight-through gradient for the weights."""
        return cast(Tensor, _StraightThrough.apply(weight, self.kept))

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Let entries change whose weight has left the loop."""
        self.kept = torch.where(self.kept, weight > -self.threshold, weight > self.threshold)


@dataclass(kw_only=True)
class AutoReP(MaskLearning):
    """Learn which ReLUs to replace by polynomials, with masks that are binary throughout.

    :class:`MaskLearning` lists all settings; ``threshold`` is h of the hysteresis.

    Attributes:
        lam: λ at the start, weight of the share of ReLUs that are kept beyond the budget.
        hold: Epochs that a run stays at each budget, while ReLUs change places and learning rates fall; with 0 every
            ReLU is charged for, and the network is taken when the budget is crossed.
        lr_min: Where learning rates end.
        mask_lr: Of Adam, for the auxiliary weights, which start uniform in [0, 1]: the last of them close after about
            1/mask_lr steps, so short runs need a larger one.
        lr: Of Adam, for all other weights.
        surrogate: ``"quadratic"``, as published, fitted at the start and learned with the weights.
        square: Factor that the fitted square enters with at the start.
    """

    name = "autorep"
    title = "AutoReP"

    lam: float = 140.0
    threshold: float = 3e-3
    mask_lr: float = 1e-3
    hold: int = 200
    lr_min: float = 1e-5
    surrogate: Surrogate = "quadratic"
    square: float = SQUARE_SCALE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mask_lr > 0 or not self.threshold >= 0:
            raise FairlineError(
                f"AutoReP needs mask_lr > 0 and threshold ≥ 0, not {self.mask_lr} and {self.threshold}."
            )
        if self.hold < 0 or not self.lr_min >= 0 or not self.square >= 0:
            raise FairlineError(
                f"AutoReP needs hold ≥ 0, lr_min ≥ 0 and square ≥ 0, not {self.hold}, {self.lr_min} and {self.square}."
            )

    def start(self, model: nn.Module, train: GroupedData, device: torch.device) -> nn.Module:
        """A masked copy of the network, its quadratics fitted.

        Args:
            model: The network.
            train: Training part, that quadratics are fitted on.
            device: Where to put it.

        Returns:
            The student.
        """
        return start_masked(model, train, self.surrogate, device, seed=self.seed, square=self.square)

    def prepare(self, student: nn.Module) -> None:
        """Auxiliary weights uniform in [0, 1] behind a hysteresis that keeps every ReLU."""
        generator = torch.Generator().manual_seed(self.seed)
        for layer in masked_relus(student).values():
            weight = layer.learn(self.granularity)
            with torch.no_grad():
                weight.copy_(torch.rand(weight.shape, generator=generator))
                weight.masked_fill_(layer.covered() == 0, -1 - self.threshold)
            layer.gate = Hysteresis(tuple(weight.shape), self.threshold).to(weight.device)
            layer.gate.update(weight)

    def optimizer(self, student: nn.Module) -> Optimizer:
        """Adam; the masks follow their weights after each step, as in the published code."""
        layers = list(masked_relus(student).values())
        masks = [cast(nn.Parameter, layer.weight) for layer in layers]
        behind = {id(weight) for weight in masks}
        others = [parameter for parameter in student.parameters() if id(parameter) not in behind]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": masks, "lr": self.mask_lr}]
        adam = Adam(groups, lr=self.lr)

        def follow(*_: Any) -> None:
            for layer in layers:
                _gate(layer).update(cast(Tensor, layer.weight))

        adam.register_step_post_hook(follow)
        return adam

    def sparsity(self, layer: MaskedReLU) -> Tensor:
        """The binary mask, with its straight-through gradient."""
        return layer.compact_mask

    def open(self, layer: MaskedReLU) -> Tensor:
        """Entries that the hysteresis keeps."""
        return _gate(layer).kept

    def close(self, layer: MaskedReLU) -> None:
        """Close all of a layer's masks, and keep them closed."""
        super().close(layer)
        weight = cast(nn.Parameter, layer.weight)
        with torch.no_grad():
            weight.fill_(-1 - self.threshold)
        _gate(layer).update(weight)

    def price_scale(self, total: int) -> float:
        """λ weighs the share of ReLUs, not their number."""
        return 1 / total

    def charged(self, kept: Tensor, budget: int) -> Tensor:
        """What exceeds the budget, at which ReLUs change places for free; everything, if a run does not stay there."""
        # Its slope at the budget itself is 0, as in the published code; that of clamp_min is 1.
        return F.relu(kept - budget) if self.hold else kept

    def epochs_at_budget(self) -> int:
        """``hold``."""
        return self.hold

    def settle(self, optimizer: Optimizer, epochs: int) -> None:
        """Cosine from the learning rates to ``lr_min`` while the run stays at a budget."""
        for group in optimizer.param_groups:
            start = group.setdefault("initial_lr", group["lr"])
            share = min(epochs, self.hold) / self.hold if self.hold else 0.0
            group["lr"] = self.lr_min + (start - self.lr_min) * (1 + math.cos(math.pi * share)) / 2 if share else start


def _gate(layer: MaskedReLU) -> Hysteresis:
    return cast(Hysteresis, layer.gate)
