"""The multiple-choice knapsack: one option of each item, so that all cost at most a budget and lose least.

Source: dynamic programming over budgets (Dudziński and Walukiewicz 1987 survey it); where its table would be too large,
the greedy solution of the linear relaxation on each item's lower convex hull (Sinha and Zoltners 1979), filled up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fairline.errors import FairlineError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Bytes of the largest table of the exact solution.
CELLS = 200_000_000


def choose_options(
    costs: Sequence[Ints], losses: Sequence[Floats], budget: int, *, cells: int = CELLS
) -> tuple[Ints, bool]:
    """Choose one option of each item.

    Args:
        costs: Of each item's options, at least 0.
        losses: Likewise.
        budget: What all chosen options may cost together.
        cells: Items times budgets up to which the solution is exact.

    Returns:
        The option of each item, and whether no choice within the budget loses less. Of options that lose the same it is
        the cheapest.

    Raises:
        FairlineError: Nothing fits into the budget.

    >>> losses = [np.array([0.0, 1.0, 5.0]), np.array([0.0, 3.0, 4.0])]
    >>> choices, exact = choose_options([np.array([4, 1, 0])] * 2, losses, 5)
    >>> choices.tolist(), exact
    ([1, 0], True)
    """
    orders = [_worthwhile(*each) for each in zip(costs, losses, strict=True)]
    least = sum(int(cost[order[0]]) for cost, order in zip(costs, orders, strict=True))
    if least > budget:
        raise FairlineError(f"A budget of {budget} is below {least}, the least that any choice costs.")
    sizes = [cost[order] for cost, order in zip(costs, orders, strict=True)]
    lost = [loss[order] for loss, order in zip(losses, orders, strict=True)]
    budget = min(budget, sum(int(size[-1]) for size in sizes))
    unit = math.gcd(*(int(size) for own in sizes for size in own)) or 1
    sizes, budget = [size // unit for size in sizes], budget // unit
    exact = len(sizes) * (budget + 1) <= cells
    chosen = _exact(sizes, lost, budget) if exact else _greedy(sizes, lost, budget)
    return np.array([order[place] for order, place in zip(orders, chosen, strict=True)], np.int64), exact


def _worthwhile(cost: Ints, loss: Floats) -> Ints:
    """Options that lose less than every one that costs no more, from the cheapest on."""
    kept: list[int] = []
    for place in np.lexsort((loss, cost)):
        if not kept or loss[place] < loss[kept[-1]]:
            kept.append(int(place))
    return np.array(kept, np.int64)


def _exact(sizes: Sequence[Ints], lost: Sequence[Floats], budget: int) -> list[int]:
    best = np.zeros(budget + 1)
    choices = np.zeros((len(sizes), budget + 1), np.min_scalar_type(max(map(len, sizes))))
    for item, (size, loss) in enumerate(zip(sizes, lost, strict=True)):
        total = np.full(budget + 1, np.inf)
        for place, (own, more) in enumerate(zip(size, loss, strict=True)):
            if own > budget:
                break
            found = best[: budget + 1 - own] + more
            better = found < total[own:]
            total[own:][better] = found[better]
            choices[item, own:][better] = place
        best = total
    chosen, left = [], budget
    for item in reversed(range(len(sizes))):
        chosen.append(int(choices[item, left]))
        left -= int(sizes[item][chosen[-1]])
    return chosen[::-1]


def _greedy(sizes: Sequence[Ints], lost: Sequence[Floats], budget: int) -> list[int]:
    chosen = [0] * len(sizes)
    left = budget - sum(int(size[0]) for size in sizes)
    steps = []
    for item, (size, loss) in enumerate(zip(sizes, lost, strict=True)):
        corners = _hull(size, loss)
        for before, after in pairwise(corners):
            gained = (loss[before] - loss[after]) / (size[after] - size[before])
            steps.append((-gained, item, before, after))
    for _, item, before, after in sorted(steps):
        more = int(sizes[item][after] - sizes[item][before])
        if chosen[item] == before and more <= left:
            chosen[item], left = after, left - more
    while (step := _best_step(sizes, lost, chosen, left)) is not None:
        item, after = step
        left -= int(sizes[item][after] - sizes[item][chosen[item]])
        chosen[item] = after
    return chosen


def _hull(size: Ints, loss: Floats) -> list[int]:
    """Corners of the lower convex hull of options that lose ever less."""
    corners: list[int] = []
    for place in range(len(size)):
        while len(corners) > 1:
            first, second = corners[-2:]
            before = (loss[first] - loss[second]) * (size[place] - size[second])
            after = (loss[second] - loss[place]) * (size[second] - size[first])
            if before > after:
                break
            corners.pop()
        corners.append(place)
    return corners


def _best_step(
    sizes: Sequence[Ints], lost: Sequence[Floats], chosen: Sequence[int], left: int
) -> tuple[int, int] | None:
    """Of one item, the option that fits into what is left and gains most."""
    best, most = None, 0.0
    for item, (size, loss, now) in enumerate(zip(sizes, lost, chosen, strict=True)):
        after = int(np.searchsorted(size, size[now] + left, side="right")) - 1
        if loss[now] - loss[after] > most:
            best, most = (item, after), float(loss[now] - loss[after])
    return best
