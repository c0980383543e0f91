"""Two networks on the same images: what a group lost, how sure that is, and how many images would tell.

Of n images the second network lost b (right before, wrong after) and gained c. The change of accuracy is
``δ = (c − b)/n``. Whether it can be δ₀ is asked by Tango's score (Tango 1998, *Statistics in Medicine* 17, eq. 6)

    Z(δ₀) = (c − b − n·δ₀) / √(n·(2·q̃ + δ₀·(1 − δ₀))),

with q̃ the likeliest probability of a loss if the change is δ₀. For δ₀ = 0 this is McNemar's statistic. The limits of
the change are where |Z| is the normal quantile, so a test and its interval never contradict each other, and they have a
width where no image changed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fairline.audit.intervals import QUANTILE, Floats


def score(lost: Any, gained: Any, n: Any, change: Any) -> Floats:
    """Tango's score of a change.

    Args:
        lost: Images that only the first network gets right; numbers or arrays, as all others.
        gained: Images that only the second gets right.
        n: All images, 1 at least.
        change: δ₀, in [−1, 1].

    Returns:
        Z: normal if the change is δ₀; grows with what was gained and falls with δ₀.

    >>> round(float(score(10, 2, 50, 0)), 6)  # McNemar's (2 − 10)/√12
    -2.309401
    """
    b, c, n, d = np.broadcast_arrays(*(np.asarray(value, float) for value in (lost, gained, n, change)))
    # q̃ solves 2n·q² + linear·q + constant = 0 (Tango 1998, eq. 5).
    linear = -b - c + (2 * n - c + b) * d
    constant = -b * d * (1 - d)
    root = np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0))
    # Of the two forms of a quadratic's root the one without cancellation.
    with np.errstate(divide="ignore", invalid="ignore"):
        losing = np.where(linear > 0, -2 * constant / (root + linear), (root - linear) / (4 * n))
    variance = n * (2 * np.maximum(losing, np.maximum(-d, 0)) + d * (1 - d))
    away = c - b - n * d
    with np.errstate(divide="ignore", invalid="ignore"):
        # Without variance what is away from δ₀ is impossible.
        z = np.where(variance > 1e-12 * n, away / np.sqrt(variance), np.sign(np.round(away, 9)) * np.inf)
    return np.where(np.abs(away) < 1e-9, 0.0, z)


def change_interval(lost: Any, gained: Any, n: Any, quantile: Any = QUANTILE) -> tuple[Floats, Floats]:
    """Limits of the change of accuracy.

    Args:
        lost: Images that only the first network gets right; numbers or arrays, as all others.
        gained: Images that only the second gets right.
        n: All images, 1 at least.
        quantile: Normal quantile of the level, 95 % by default.

    Returns:
        Lower and upper limits, in [−1, 1].

    >>> [round(float(limit), 3) for limit in change_interval(10, 2, 50)]
    [-0.301, -0.028]
    >>> [round(float(limit), 3) for limit in change_interval(0, 0, 50)]
    [-0.071, 0.071]
    """
    b, c, n, z = np.broadcast_arrays(*(np.asarray(value, float) for value in (lost, gained, n, quantile)))
    limits = []
    for sign in (1, -1):
        # Z falls with δ₀: the lower limit is where it is +z, the upper where it is −z.
        low, high = np.full(b.shape, -1.0), np.full(b.shape, 1.0)
        for _ in range(60):
            middle = (low + high) / 2
            left = score(b, c, n, middle) > sign * z
            low, high = np.where(left, middle, low), np.where(left, high, middle)
        limits.append((low + high) / 2)
    point = (c - b) / n
    return np.minimum(limits[0], point), np.maximum(limits[1], point)


def p_below(z: Any) -> Floats:
    """How probable a score as low as this is, if the change is δ₀: small where more was lost.

    Args:
        z: From :func:`score`.

    Returns:
        The normal distribution up to it.

    >>> round(float(p_below(-1.96)), 3)
    0.025
    """
    return np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)), otypes=[float])(z)


def images_needed(lost: int, gained: int, n: int, change: float, quantile: float = QUANTILE) -> float:
    """How many images would tell whether the change is less or more than δ₀, if their shares stay as they are.

    Z grows with the root of the images, all shares being equal.

    Args:
        lost: Images that only the first network gets right.
        gained: Images that only the second gets right.
        n: All images.
        change: δ₀.
        quantile: Normal quantile that must be passed.

    Returns:
        Their number; infinite where the measured change is δ₀ itself.

    >>> images_needed(10, 2, 50, -0.05)
    70.0
    """
    z = abs(float(score(lost, gained, n, change)))
    return math.inf if z < 1e-9 else float(math.ceil(n * (quantile / z) ** 2))


__all__ = ["QUANTILE", "change_interval", "images_needed", "p_below", "score"]
