"""Linear pieces counted on a fine grid, and approximations found by a general optimiser."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from torch import nn


def pieces_on_a_grid(network: nn.Module, low: float, high: float, points: int = 200_001) -> int:
    """Number of runs of equal slope of a network ℝ → ℝ evaluated in float64 on a fine grid."""
    x = torch.linspace(low, high, points, dtype=torch.float64)[:, None]
    with torch.no_grad():
        y = network.double()(x)[:, 0].numpy()
    slope = np.diff(y) / float(x[1] - x[0])
    size = max(1.0, np.abs(slope).max())
    runs, current, length = 0, None, 0
    for value in slope:
        if current is not None and abs(value - current) <= 1e-6 * size:
            length += 1
        else:
            # A cell with a kink inside has a slope of its own; only slopes of two cells or more are pieces.
            runs += length >= 2
            current, length = value, 1
    return runs + (length >= 2)


def best_error(function, low: float, high: float, segments: int) -> float:
    """Largest distance of the best continuous piecewise linear function, by a search over knots and values."""
    x = np.linspace(low, high, 4001)
    y = np.array([function(t) for t in x])

    def error(free: np.ndarray) -> float:
        inner = np.sort(low + (high - low) * free[: segments - 1])
        knots = np.concatenate([[low], inner, [high]])
        return float(np.abs(np.interp(x, knots, free[segments - 1 :]) - y).max())

    best = np.inf
    for attempt in range(6):
        rng = np.random.default_rng(attempt)
        inner = np.sort(rng.uniform(0.1, 0.9, segments - 1)) if attempt else np.arange(1, segments) / segments
        values = [function(t) for t in [low, *(low + (high - low) * inner), high]]
        for _ in range(3):
            found = minimize(
                error, [*inner, *values], method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-9, "fatol": 1e-12}
            )
            inner, values = found.x[: segments - 1], found.x[segments - 1 :]
        best = min(best, found.fun)
    return best
