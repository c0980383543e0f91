"""Masks as parameters, for matrices of the loss in them to be written out; Shapley values by their definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fairline.masking import MaskedReLU, masked_relus


class _Written(nn.Module):
    """m·relu(x) + (1 − m)·g(x)."""

    def __init__(self, layer: MaskedReLU) -> None:
        super().__init__()
        self.m = nn.Parameter(layer.kept.double())
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        g = x
        if self.layer.coefficients is not None:
            constant, linear, square = self.layer.coefficients
            g = constant + linear * x + 0.2 * square * x**2
        return self.m * x.relu() + (1 - self.m) * g


class InMasks(nn.Module):
    """A masked network in float64 whose only parameters are its masks, in evaluation mode."""

    def __init__(self, masked: nn.Module) -> None:
        super().__init__()
        network = masked.double().eval()
        layers = masked_relus(network)
        for name, layer in layers.items():
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, _Written(layer))
        self.masks = nn.ParameterDict({str(i): network.get_submodule(name).m for i, name in enumerate(layers)})
        self.names = {str(i): f"{name}.m" for i, name in enumerate(layers)}
        # Out of sight of parameters().
        self.network = [network]

    def forward(self, images: Tensor) -> Tensor:
        masks = {self.names[key]: mask for key, mask in self.masks.items()}
        return functional_call(self.network[0], masks, (images,))


def shapley(players: Sequence[str], worth: Callable[[frozenset[str]], float]) -> dict[str, float]:
    """The mean over all n! orders of what a player adds to those before it."""
    total = dict.fromkeys(players, 0.0)
    for order in itertools.permutations(players):
        for place, player in enumerate(order):
            total[player] += worth(frozenset(order[: place + 1])) - worth(frozenset(order[:place]))
    return {player: value / math.factorial(len(players)) for player, value in total.items()}


def accuracy_with(masked: nn.Module, names: Sequence[str], images: Tensor, labels: Tensor) -> float:
    """Share of images that a masked network, whose masks change, has right with the ReLUs of some layers alone."""
    for name, layer in masked_relus(masked).items():
        layer.set_mask(layer.kept & (name in names))
    with torch.no_grad():
        right = [int(row.argmax()) == int(label) for row, label in zip(masked.eval()(images), labels, strict=True)]
    return sum(right) / len(right)
