"""Statistics of several tests as they are defined: by loops, bisection and simulation."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats


def random_effects(means: list[float], variances: list[float]) -> dict[str, float]:
    """DerSimonian and Laird (1986); limits of Hartung and Knapp (2001), the model's where those are wider."""
    k = len(means)
    weights = [1 / v for v in variances]
    fixed = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    q = sum(w * (m - fixed) ** 2 for w, m in zip(weights, means, strict=True))
    scaling = sum(weights) - sum(w * w for w in weights) / sum(weights)
    tau2 = max(0.0, (q - (k - 1)) / scaling)
    own = [1 / (v + tau2) for v in variances]
    mean = sum(w * m for w, m in zip(own, means, strict=True)) / sum(own)
    scatter = sum(w * (m - mean) ** 2 for w, m in zip(own, means, strict=True)) / (k - 1)
    half = stats.t.ppf(0.975, k - 1) * math.sqrt(max(1.0, scatter) / sum(own))
    i2 = max(0.0, 1 - (k - 1) / q) if q > 0 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half, "tau": math.sqrt(tau2), "i2": i2}


def holm(p: list[float]) -> list[float]:
    """The smallest level at which Holm's procedure rejects each, found by trying levels."""

    def rejected(level: float) -> set[int]:
        found: set[int] = set()
        for step, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
            if p[place] > level / (len(p) - step):
                break
            found.add(place)
        return found

    corrected = []
    for place in range(len(p)):
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if place in rejected(middle) else (middle, high)
        corrected.append(high)
    return corrected


def power(effect: float, seeds: int, draws: int = 200_000) -> float:
    """How often Student's interval of drawn values excludes 0."""
    values = np.random.default_rng(0).normal(effect, 1, (draws, seeds))
    half = stats.t.ppf(0.975, seeds - 1) * values.std(1, ddof=1) / math.sqrt(seeds)
    return float((np.abs(values.mean(1)) > half).mean())
