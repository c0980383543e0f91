"""Every architecture of a small search space, and what CryptoNAS' networks hold, counted unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from fairline.linearize.macro_search import Architecture, Controller


def architectures(layers: int, kernels: Sequence[int]) -> Iterator[Architecture]:
    for chosen in product(kernels, repeat=layers):
        for skips in product((False, True), repeat=layers * (layers - 1) // 2):
            yield Architecture(chosen, skips)


def expected_reward(controller: Controller, reward: Callable[[Architecture], float]) -> Tensor:
    """Σ p(a)·R(a), differentiable."""
    terms = [
        controller(given=each).log_prob.exp() * reward(each)
        for each in architectures(controller.layers, controller.kernels)
    ]
    return torch.stack(terms).sum()


def relus(
    sides: tuple[int, int], layers: int, width: int, balance: int, stem_stride: int, rows, skip_relus: str
) -> int:
    """ReLUs of a CNet: of the layers, then of what its skip paths read, as often as they are computed."""
    height, wide = (-(-side // stem_stride) for side in sides)
    channels, stage, total = width, 0, 0
    computed: set[tuple[int, int]] = set()
    for layer in range(layers):
        if layer in (layers // 3, 2 * (layers // 3)):
            height, wide, channels, stage = -(-height // 2), -(-wide // 2), channels * balance, stage + 1
        units = channels * height * wide
        total += units
        computed.add((stage, layer))
        if layer == 0 or skip_relus == "none":
            continue
        # Of its own convolution.
        total += units
        for output, bit in enumerate(rows[layer]):
            if bit and (skip_relus == "each" or (stage, output) not in computed):
                total += units
                computed.add((stage, output))
    return total
