"""The null front as it is defined: shifts by argmax, coins by linear programming, areas by thin strips."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog


def right(logits: np.ndarray, labels: np.ndarray, shares: np.ndarray, tau: float) -> np.ndarray:
    """Which images are right when biases are shifted by τ."""
    moved = logits.astype(np.float64).copy()
    moved[:, : len(shares)] -= tau * np.log(shares)
    return moved.argmax(1) == labels


def front(x: float, overall: np.ndarray, worst: np.ndarray) -> float:
    """The best mean of worst-group accuracies under probabilities whose mean overall accuracy is at least x."""
    x = min(x, overall.max())
    ones = np.ones((1, len(overall)))
    found = linprog(-worst, A_ub=-overall[None], b_ub=[-x + 1e-12], A_eq=ones, b_eq=[1], bounds=(0, 1), method="highs")
    return float(-found.fun)


def area(overall: np.ndarray, worst: np.ndarray, null_overall: np.ndarray, null_worst: np.ndarray) -> float:
    """Between two fronts, in strips."""
    low, high = max(overall.min(), null_overall.min()), min(overall.max(), null_overall.max())
    edges = np.linspace(low, high, 61)
    heights = [front(x, overall, worst) - front(x, null_overall, null_worst) for x in (edges[1:] + edges[:-1]) / 2]
    return float(np.mean(heights) * (high - low))


def accuracies(correct: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Overall and of the worst group."""
    return float(correct.mean()), min(float(correct[groups == group].mean()) for group in np.unique(groups))
