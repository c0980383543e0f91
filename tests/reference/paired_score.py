"""Tango's score of a paired change by brute force: the likelihood maximised on a fine grid."""

import math

import numpy as np


def score(lost: float, gained: float, n: float, change: float) -> float:
    """(ĉ − b̂ − δ₀) over its standard error, with the likeliest probabilities whose difference is δ₀."""
    # Probabilities of a loss that leave room for the gain, loss + δ₀, and for all else.
    least, most = max(0.0, -change), min(1.0, (1 - change) / 2)
    losing = np.linspace(least, most, 400_001)
    gaining = losing + change
    staying = 1 - losing - gaining
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = sum(
            np.where(count > 0, count * np.log(np.maximum(share, 0)), 0.0)
            for count, share in ((lost, losing), (gained, gaining), (n - lost - gained, staying))
        )
    best = int(np.nanargmax(likelihood))
    variance = n * (losing[best] + gaining[best] - change**2)
    return (gained - lost - n * change) / math.sqrt(variance)
