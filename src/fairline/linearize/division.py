"""A budget of ReLUs divided among layers by what they need.

Source: none.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping


def divided(need: Mapping[str, float], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Divide a budget among layers in proportion to their need, no layer getting more than it has.

    What a full layer cannot take is divided among the others again. Fractions go to the largest remainders. A layer
    that needs nothing takes what the others cannot hold.

    Args:
        need: Of each layer; negative is none.
        sizes: ReLUs of each layer.
        budget: ReLUs to give, at most the sum of the sizes.

    Returns:
        ReLUs of each layer; their sum is the budget.

    Examples:
        >>> divided({"a": 3.0, "b": 1.0, "c": -2.0}, {"a": 10, "b": 10, "c": 10}, budget=8)
        {'a': 6, 'b': 2, 'c': 0}
        >>> divided({"a": 3.0, "b": 1.0, "c": -2.0}, {"a": 10, "b": 10, "c": 10}, budget=22)
        {'a': 10, 'b': 10, 'c': 2}
    """
    most = max(need.values(), default=0.0)
    # Normal, since the share of a need that vanishes beside all others is divided by their sum.
    least = max(1e-9 * most, sys.float_info.min) if most > 0 else 1.0
    floored = {name: max(need[name], least) for name in sizes}
    exact = dict.fromkeys(sizes, 0.0)
    free = set(sizes)
    left = float(budget)
    while free and left > 1e-9:
        weight = sum(floored[name] for name in free)
        part = {name: left * floored[name] / weight for name in free}
        full = {name for name in free if exact[name] + part[name] >= sizes[name]}
        if not full:
            for name in free:
                exact[name] += part[name]
            break
        for name in full:
            left -= sizes[name] - exact[name]
            exact[name] = float(sizes[name])
        free -= full
    given = {name: min(sizes[name], math.floor(value + 1e-6)) for name, value in exact.items()}
    order = sorted(sizes, key=lambda name: given[name] - exact[name])
    while sum(given.values()) < budget:
        for name in order:
            if given[name] < sizes[name] and sum(given.values()) < budget:
                given[name] += 1
    return given
