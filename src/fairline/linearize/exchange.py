"""Gradual exchange of activations: a network is trained while its masks move from what they are to what they will be.

A unit that changes computes ``m·relu(x) + (1 − m)·g(x)``, and m goes linearly from one end to the other, a step of the
optimizer at a time (DELPHI, Mishra et al. 2020).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fairline.masking import masked_relus


class Exchange:
    """Moves a network's masks while an optimizer steps.

    Args:
        network: Masked, masks fixed; changed in place.
        targets: The masks to come, bool, of each layer's shape.
        steps: Of the optimizer until they are there; with 0 they are at once.
    """

    def __init__(self, network: nn.Module, targets: Mapping[str, Tensor], steps: int) -> None:
        self.layers = masked_relus(network)
        self.targets = {name: mask.to(self.layers[name].kept.device) for name, mask in targets.items()}
        self.steps, self.done = steps, 0
        self.moving: dict[str, tuple[Tensor, Tensor]] = {}
        for name, target in self.targets.items():
            layer, start = self.layers[name], self.layers[name].kept
            if steps == 0 or torch.equal(start, target):
                layer.set_mask(target)
                continue
            layer.set_mask(start | target)
            weight = layer.learn("pixel").requires_grad_(False)
            weight.copy_(start)
            self.moving[name] = (start.to(weight), target.to(weight))

    def follow(self, optimizer: Optimizer) -> None:
        """Move the masks after each step of an optimizer."""
        optimizer.register_step_post_hook(lambda *_: self.step())

    @torch.no_grad()
    def step(self) -> None:
        """One step of the way; the last one fixes the masks' values, not yet the masks."""
        self.done += 1
        share = min(self.done / self.steps, 1.0) if self.steps else 1.0
        for name, (start, target) in self.moving.items():
            weight = self.layers[name].weight
            assert weight is not None
            torch.lerp(start, target, share, out=weight)

    def finish(self) -> None:
        """Fix the masks."""
        for name in self.moving:
            self.layers[name].set_mask(self.targets[name])
        self.moving.clear()
