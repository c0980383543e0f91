"""How long mask learning takes: from the speed at which ReLUs closed in the last epochs.

ReLUs close about linearly where masks arrive at zero together, and about exponentially where a growing price takes the
dearest of what is left; which of the two, the last epochs say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

#: Epochs that a speed is taken of: what was before, closed at another price.
WINDOW = 6


def epochs_left(counts: Sequence[int], aim: int, most: int) -> float | None:
    """Estimate the epochs until no more ReLUs than a budget are open.

    The speed is the median of those between any two of the last epochs (Theil 1950, Sen 1968), so that an epoch in
    which the count rises or leaps counts for little; of the count or of its logarithm, whichever they describe better.

    Args:
        counts: Open ReLUs at the start, and after each epoch.
        aim: The budget.
        most: Epochs that are left at most; they bound the estimate.

    Returns:
        The estimate in [0, ``most``]; None where fewer than two epochs are known or nothing closes.

    >>> epochs_left([1000, 900, 800, 700], aim=200, most=50)
    5.0
    >>> round(epochs_left([16000, 8000, 4000, 2000], aim=250, most=50), 6)
    3.0
    >>> epochs_left([1000, 1000, 1000], aim=200, most=50)
    """
    now = counts[-1]
    if now <= aim:
        return 0.0
    last = counts[-WINDOW:]
    if len(last) < 3 or last[0] <= now:
        return None
    found = []
    for of, back in ((float, float), (math.log, math.exp)):
        values = [of(max(count, 1)) for count in last]
        speed = -_slope(values)
        # The median is 0 where it closes now and then; the mean is not.
        speed = speed if speed > 0 else (values[0] - values[-1]) / (len(values) - 1)
        start = median(value + speed * place for place, value in enumerate(values))
        off = median(abs(back(start - speed * place) - count) for place, count in enumerate(last))
        # A budget of no ReLU has no logarithm; half a one is none.
        found.append((off, (of(now) - of(max(aim, 0.5))) / speed))
    _, epochs = min(found)
    return min(max(epochs, 0.0), float(most))


def _slope(values: Sequence[float]) -> float:
    """Median of the slopes between any two values."""
    count = len(values)
    return median((values[j] - values[i]) / (j - i) for i in range(count) for j in range(i + 1, count))
