"""Bootstrap by drawing images one at a time."""

from __future__ import annotations

import numpy as np


def paired_accuracies(
    correct: np.ndarray, before: np.ndarray, resamples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies of two models on the same resampled images."""
    first, second = [], []
    for _ in range(resamples):
        picked = [int(rng.integers(len(correct))) for _ in range(len(correct))]
        first.append(np.mean([correct[i] for i in picked]))
        second.append(np.mean([before[i] for i in picked]))
    return np.array(first), np.array(second)
