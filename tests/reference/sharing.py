"""Slow and obviously right: shared signs unit by unit, and the best choice of a knapsack, of all."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def shared_relu(x: Tensor, signs: Tensor) -> Tensor:
    """Every unit that a sign decides, times whether the sum of its voters is positive."""
    decides, votes = signs.flatten(1).tolist()
    rows = []
    for image in x.flatten(1):
        units = []
        for unit, sign in enumerate(decides):
            vote = sum(float(image[v].detach()) for v, other in enumerate(votes) if other == sign)
            units.append(image[unit] if sign < 0 or vote > 0 else 0 * image[unit])
        rows.append(torch.stack(units))
    return torch.stack(rows).view(x.shape)


def block_relu(x: Tensor, blocks: list[tuple[int, int]]) -> Tensor:
    """``x·[mean of the patch > 0]``, patch by patch."""
    y = torch.zeros_like(x)
    for image in range(len(x)):
        for channel, (height, width) in enumerate(blocks):
            for top in range(0, x.shape[2], height):
                for left in range(0, x.shape[3], width):
                    patch = x[image, channel, top : top + height, left : left + width]
                    if patch.mean() > 0:
                        y[image, channel, top : top + height, left : left + width] = patch
    return y


def best_choice(costs: list[list[int]], losses: list[list[float]], budget: int) -> float:
    """The least that a choice within the budget loses; infinite if there is none."""
    least = float("inf")
    for choice in itertools.product(*(range(len(cost)) for cost in costs)):
        if sum(cost[place] for cost, place in zip(costs, choice, strict=True)) <= budget:
            least = min(least, sum(loss[place] for loss, place in zip(losses, choice, strict=True)))
    return least
