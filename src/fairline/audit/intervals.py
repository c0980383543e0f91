"""95 % limits of shares of images, and of what is made of shares, for groups of any size.

One construction throughout. As in the Bayesian bootstrap (Rubin 1981) the images seen are weighted at random, one
exponential weight each. To them comes **one more image** with such a weight, which a coin makes as favourable or as
unfavourable as an image can be: right under one network and wrong under the other, say. The limits are percentiles of
the number over such draws, so they have a width even where all images seen are alike.

Were the added image always unfavourable for the lower limit and favourable for the upper, these would be the limits of
Gaffke (2005; Learned-Miller and Thomas 2019) for the mean of a bounded variable; for one share, the exact ones of
Clopper and Pearson (1934), which hold the truth in 95 % at least. The coin makes them mid-P limits (Lancaster 1961;
Berry and Armitage 1995), which hold it in about 95 %, and in more where images are few. ``benchmarks/coverage.py``
measures how often; the guide has the table.

The lowest or largest of several groups is limited through the limits of all of them, because its own draws are biased:
the lowest of several noisy numbers is too low, and the lowest of their draws once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEVEL = 0.95

#: Normal quantile of limits at that level.
QUANTILE = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Drawn:
    """What M networks get right of the same images, weighted at random B times; from :func:`draw`.

    Attributes:
        right: (M, B): weight of the images that each network gets right.
        total: (B,): weight of all images.
        extra: (B,): weight of the one more.
        favourable: bool, (B,): how the coin fell.
    """

    right: Floats
    total: Floats
    extra: Floats
    favourable: NDArray[np.bool_]

    def shares(self, networks: Sequence[int], signs: Sequence[int]) -> Floats:
        """Shares that networks get right, for a number that is made of them.

        Args:
            networks: Positions among the M.
            signs: For each, 1 if the number grows with its share, −1 if it falls: what a favourable image is.

        Returns:
            (networks, B), in [0, 1].
        """
        helps = self.favourable == (np.asarray(signs)[:, None] > 0)
        return np.minimum((self.right[list(networks)] + self.extra * helps) / (self.total + self.extra), 1)


def draw(correct: NDArray[np.bool_], draws: int, rng: np.random.Generator) -> Drawn:
    """Weight images at random.

    Only how often each pattern of right and wrong networks occurs matters: the weights of k images alike add up to one
    gamma variable. So two networks cost four of them a draw, however many images there are.

    Args:
        correct: (n, M), of M networks on the same n images.
        draws: B.
        rng: Source of randomness.

    Returns:
        The draws.

    >>> rng = np.random.default_rng(0)
    >>> drawn = draw(np.ones((2, 1), bool), 100_000, rng)  # both of two images right
    >>> [round(limit, 2) for limit in percentile_interval(drawn.shares([0], [1])[0])]
    [0.22, 1.0]
    """
    patterns, counts = np.unique(correct, axis=0, return_counts=True)
    weights = rng.standard_gamma(counts[:, None], size=(len(counts), draws))
    return _with_one_more(patterns.T.astype(np.float64) @ weights, weights.sum(0), rng)


def pooled(parts: Sequence[Drawn], rng: np.random.Generator) -> Drawn:
    """The draws of several groups' images together, which have one more image in all.

    Args:
        parts: The groups'.
        rng: Source of randomness.

    Returns:
        The draws.
    """
    return _with_one_more(np.sum([part.right for part in parts], axis=0), np.sum([p.total for p in parts], axis=0), rng)


def _with_one_more(right: Floats, total: Floats, rng: np.random.Generator) -> Drawn:
    draws = len(total)
    # As many heads as tails: a fair coin's chance would only add noise to the limits.
    return Drawn(right, total, rng.standard_exponential(draws), rng.permutation(draws) % 2 == 0)


def percentile_interval(draws: Floats) -> tuple[float, float]:
    """95 % percentile interval of draws.

    Args:
        draws: (B,); those that are not finite are left out.

    Returns:
        The limits; NaN where the draws do not spread, which is no proof that the number is known exactly.

    >>> percentile_interval(np.arange(1001.0))
    (25.00000000000002, 975.0)
    >>> percentile_interval(np.ones(5))
    (nan, nan)
    """
    finite = draws[np.isfinite(draws)]
    if len(finite) == 0:
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return (float(low), float(high)) if low < high else (math.nan, math.nan)


def lowest_interval(draws: Floats) -> tuple[float, float]:
    """95 % limits of the lowest of several groups' numbers.

    The lower limit is the lowest of the groups' lower 97.5 % limits: it is too high only if that of the group which
    truly is the lowest is (an intersection–union test, Berger 1982). The upper limit is the lowest of upper limits that
    hold for all groups together in 95 % (Šidák 1967). Both fail together in 5 % at most: if one group is the lowest by
    far, only its own limits can fail, and if many are equally low, all their lower limits must.

    Args:
        draws: (A, B), independent between groups.

    Returns:
        The limits.

    >>> rng = np.random.default_rng(0)
    >>> rows = [np.arange(40) < right for right in (36, 20)]
    >>> draws = np.stack([draw(row[:, None], 2000, rng).shares([0], [1])[0] for row in rows])
    >>> [round(limit, 2) for limit in lowest_interval(draws)]
    [0.34, 0.65]
    """
    low = np.quantile(draws, (1 - LEVEL) / 2, axis=1).min()
    high = np.quantile(draws, LEVEL ** (1 / max(2, len(draws))), axis=1).min()
    return float(low), float(high)


def gap_interval(draws: Floats) -> tuple[float, float]:
    """95 % limits of the largest less the lowest of several groups' numbers.

    This gap is the largest difference of any two groups in order. Its upper limit is the largest of the differences'
    upper 97.5 % limits; its lower limit, not below 0, is the largest of lower limits that hold for all A·(A − 1) of
    them together in 95 % (Bonferroni); see :func:`lowest_interval` for why. With two groups these are the limits of
    their difference, folded at 0.

    Args:
        draws: (A, B), independent between groups; B should be 20·A·(A − 1) at least, for the tails' sake.

    Returns:
        The limits; NaN of fewer than two groups.

    >>> rng = np.random.default_rng(0)
    >>> rows = [np.arange(40) < right for right in (36, 20)]
    >>> draws = np.stack([draw(row[:, None], 2000, rng).shares([0], [1])[0] for row in rows])
    >>> [round(limit, 2) for limit in gap_interval(draws)]
    [0.21, 0.57]
    """
    groups = len(draws)
    if groups < 2:
        return math.nan, math.nan
    tail = (1 - LEVEL) / (groups * (groups - 1))
    low, high = 0.0, -math.inf
    for group in range(groups):
        others = np.delete(draws, group, axis=0)
        limits = np.quantile(draws[group] - others, [tail, (1 + LEVEL) / 2], axis=1)
        low, high = max(low, float(limits[0].max())), max(high, float(limits[1].max()))
    return low, high


def draws_needed(groups: int, resamples: int) -> int:
    """How many draws :func:`gap_interval` takes of so many groups, ``resamples`` at least."""
    return max(resamples, 20 * groups * (groups - 1))


def wilson_interval(share: float, n: int, z: float = QUANTILE) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927), in closed form: for whatever is one share alone.

    Args:
        share: In [0, 1].
        n: Of how many.
        z: Normal quantile of the level.

    Returns:
        The limits.

    >>> [round(limit, 3) for limit in wilson_interval(1.0, 10)]
    [0.722, 1.0]
    """
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # Rounding must not exclude the share itself.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def student_interval(values: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of independent values (Student 1908).

    Args:
        values: (n,), two at least.
        level: How often it is to hold the mean.

    Returns:
        The limits.

    >>> [round(limit, 2) for limit in student_interval(np.array([1.0, 2.0, 3.0]))]
    [-0.48, 4.48]
    """
    mean = float(values.mean())
    half = _student_quantile((1 + level) / 2, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def agree(values: Floats) -> bool:
    """Whether numbers are all equal but for rounding, so that they say nothing of how far others lie.

    >>> agree(np.array([100 * (0.6 - 0.5), 100 * (0.8 - 0.7)]))
    True

    Args:
        values: (n,), one at least.

    Returns:
        Whether they are.
    """
    return float(np.ptp(values)) <= 1e-12 + 1e-9 * float(np.abs(values).max())


def mean_interval(values: Floats, least: float = -math.inf, most: float = math.inf) -> tuple[float, float]:
    """Student's 95 % interval of the mean of a number that each image has, such as its loss.

    Args:
        values: (n,).
        least: The number is never below it, so neither is the lower limit.
        most: Nor above it.

    Returns:
        The limits; NaN of fewer than two values, and of values all equal: nothing tells how far others lie.

    >>> [round(limit, 2) for limit in mean_interval(np.array([1.0, 2.0, 3.0]), least=0.0)]
    [0.0, 4.48]
    >>> mean_interval(np.array([1.0]))
    (nan, nan)
    """
    if len(values) < 2 or agree(values):
        return math.nan, math.nan
    low, high = student_interval(values)
    return max(low, least), min(high, most)


@cache
def _student_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t; by drawing from it where scipy is not installed (a bare GPU machine), to within 1 %."""
    try:
        from scipy.stats import t
    except ImportError:
        drawn = np.abs(np.random.default_rng(0).standard_t(freedom, 1_000_000))
        return float(np.quantile(drawn, 2 * level - 1))
    return float(t.ppf(level, freedom))
