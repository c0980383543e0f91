"""AutoReP: automatic ReLU replacement (Peng et al., ICCV 2023).

The mask is binary in every forward pass. Behind each entry stands an auxiliary weight w; a straight-through estimator
gives it the mask's gradient times softplus(w), and a hysteresis keeps entries from flickering: a ReLU is dropped when
w falls below −h and comes back when w rises above h. The loss is ``CE + T²·KL + λ·(share of ReLUs kept)``; what is
dropped becomes a quadratic polynomial a channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.optim import Adam, Optimizer

from fairline.errors import FairlineError
from fairline.linearize.learned import MaskLearning
from fairline.masking import MaskedReLU, Surrogate, masked_relus


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

    The published code learns each budget anew and stops its penalty when the budget is reached; here one run passes
    through all. Where the count stops falling above a budget, of which the description says nothing, λ grows as SNL's
    does. :class:`MaskLearning` lists all settings; ``threshold`` is h of the hysteresis.

    Attributes:
        lam: λ at the start, weight of the share of ReLUs that are kept.
        mask_lr: Of Adam, for the auxiliary weights, which start uniform in [0, 1]: the last of them close after about
            1/mask_lr steps, so short runs need a larger one.
        lr: Of Adam, for all other weights.
        surrogate: ``"quadratic"``, as published, fitted at the start and learned with the weights.
    """

    name = "autorep"
    title = "AutoReP"

    lam: float = 60.0
    threshold: float = 3e-3
    mask_lr: float = 2e-4
    surrogate: Surrogate = "quadratic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mask_lr > 0 or not self.threshold >= 0:
            raise FairlineError(
                f"AutoReP needs mask_lr > 0 and threshold ≥ 0, not {self.mask_lr} and {self.threshold}."
            )

    def prepare(self, student: nn.Module) -> None:
        """Auxiliary weights uniform in [0, 1] behind a hysteresis that keeps every ReLU."""
        generator = torch.Generator().manual_seed(self.seed)
        for layer in masked_relus(student).values():
            weight = layer.learn(self.granularity)
            with torch.no_grad():
                weight.copy_(torch.rand(weight.shape, generator=generator))
            layer.gate = Hysteresis(tuple(weight.shape), self.threshold).to(weight.device)

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


def _gate(layer: MaskedReLU) -> Hysteresis:
    return cast(Hysteresis, layer.gate)
