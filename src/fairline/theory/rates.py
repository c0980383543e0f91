"""How fast the optimal piecewise linear approximation of a strictly convex function gets better (Proposition 4.1)."""

from __future__ import annotations

import math
from functools import cache

import pandas as pd

from fairline.theory.pieces import approximation_rate


@cache
def rates() -> tuple[pd.DataFrame, pd.DataFrame, list[int]]:
    """Errors of the optimal approximations of three strictly convex functions, their limits, and the values of n."""
    functions = {
        "x² on [0, 1]": (lambda x: x * x, 0.0, 1.0, 1 / 8),
        "eˣ on [0, 2]": (math.exp, 0.0, 2.0, (2 * (math.e - 1)) ** 2 / 16),
        "−log x on [0.05, 1]": (lambda x: -math.log(x), 0.05, 1.0, math.log(20) ** 2 / 16),
    }
    segments = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    tables, limits = [], []
    for name, (function, low, high, constant) in functions.items():
        tables.append(approximation_rate(function, low, high, segments).reset_index().assign(function=name))
        limits.append(
            pd.DataFrame({"segments": segments, "limit": [constant / n**2 for n in segments], "function": name})
        )
    return pd.concat(tables), pd.concat(limits), segments
