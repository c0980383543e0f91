"""Random weights of images and of one more, image by image."""

from __future__ import annotations

import numpy as np


def paired_shares(
    correct: np.ndarray, before: np.ndarray, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of two models on the same weighted images; a favourable image is right under the first alone."""
    first, second = [], []
    for _ in range(draws):
        pairs = [*zip(correct, before, strict=True), (True, False) if rng.random() < 0.5 else (False, True)]
        weights = [rng.exponential() for _ in pairs]
        first.append(sum(w for w, (right, _) in zip(weights, pairs, strict=True) if right) / sum(weights))
        second.append(sum(w for w, (_, right) in zip(weights, pairs, strict=True) if right) / sum(weights))
    return np.array(first), np.array(second)
