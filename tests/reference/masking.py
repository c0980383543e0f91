"""Masked ReLU as it is defined, for autograd to differentiate, and the entries that fill a budget, of all."""

from __future__ import annotations

import itertools

from torch import Tensor


def masked_relu(x: Tensor, mask: Tensor) -> Tensor:
    """m·relu(x) + (1 − m)·x, written out."""
    return mask * x.relu() + (1 - mask) * x


def fullest_of_all(sizes, budget):
    """Of all choices of entries those with the largest sum that fits; of these the one with the first entry, …"""
    choices = list(itertools.product([True, False], repeat=len(sizes)))
    sums = {choice: sum(itertools.compress(sizes, choice)) for choice in choices}
    most = max(total for total in sums.values() if total <= budget)
    return max(choice for choice in choices if sums[choice] == most)
