"""Small networks, and the layer of SNL's published code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Small(nn.Module):
    """Two convolutions with batch norm, in a submodule and not."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.relu1(self.stem(x))).mean((2, 3)))


def small(seed: int, width: int = 4) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Small(width)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.copy_(torch.rand(value.shape) * 9)
    return model


class Alpha(nn.Module):
    """As in SNL's published code."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.alphas = nn.Parameter(torch.ones(1, channels, size, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) * self.alphas.expand_as(x) + (1 - self.alphas.expand_as(x)) * x


def published(seed: int) -> Small:
    """A :class:`Small` that SNL's published code has linearized."""
    model = small(seed)
    generator = torch.Generator().manual_seed(seed)
    model.relu1, model.block[2] = Alpha(4, 8), Alpha(4, 8)
    for layer in (model.relu1, model.block[2]):
        layer.alphas.data = (torch.rand(1, 4, 8, 8, generator=generator) < 0.3).float()
        layer.alphas.requires_grad_(False)
    return model
