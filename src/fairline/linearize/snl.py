"""SNL, Selective Network Linearization (Cho, Joshi, Garg, Reagen and Hegde, ICML 2022), Algorithm 1.

Weights and masks are learned together on ``CE + T²·KL + λ·Σ|m|``; λ grows whenever the number of ReLUs stops
falling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from fairline.linearize.learned import MaskLearning
from fairline.masking import MaskedReLU


@dataclass(kw_only=True)
class SNL(MaskLearning):
    """Learn which ReLUs to keep, by masks that are real numbers until the end.

    A mask above ``threshold`` counts as a ReLU. The defaults are the published ones; :class:`MaskLearning` lists
    them all. With few steps an epoch or little data, a larger ``lr`` reaches the budgets sooner: Adam moves a mask by
    about ``lr`` a step, so a mask needs at least ``1/lr`` steps to close.

    Example:
        >>> for cut in SNL(seed=0).linearize(teacher, train, budgets=[0.5, 0.1]):  # doctest: +SKIP
        ...     print(cut.relus)
    """

    name = "snl"
    title = "SNL"

    lam: float = 1e-5
    threshold: float = 1e-2

    def steps_to_close(self) -> float:
        """From one to the threshold: Adam moves a mask by about the learning rate a step."""
        return (1 - self.threshold) / self.lr

    def sparsity(self, layer: MaskedReLU) -> Tensor:
        """``|m|``."""
        return cast(Tensor, layer.weight).abs()

    def open(self, layer: MaskedReLU) -> Tensor:
        """Masks above the threshold."""
        return cast(Tensor, layer.weight).detach() > self.threshold
