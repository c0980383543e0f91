"""How much several tests say together: corrected for their number, over panels, and how many seeds would decide one.

The unit is the seed: a panel gives the mean m of its n seeds, their standard deviation s, and Student's
t = (m − c) / (s / √n) against a threshold c.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fairline.audit.intervals import LEVEL, Floats
from fairline.audit.verdict import holm

#: Power that is asked for, and the most seeds that a page speaks of.
POWER, MOST = 0.8, 1000


def student_p(mean: float, spread: float, seeds: int, threshold: float = 0.0) -> float:
    """Two-sided probability of a mean as far from a threshold, under Student's t (Student 1908).

    Args:
        mean: Of the seeds.
        spread: Their standard deviation, of n − 1.
        seeds: n.
        threshold: Where the mean would be by chance.

    Returns:
        The probability; below 5 % exactly where Student's 95 % interval excludes the threshold. NaN of one seed.

    >>> round(student_p(2.0, 1.0, 3), 4)
    0.0742
    """
    from scipy.stats import t

    if seeds < 2 or math.isnan(mean):
        return math.nan
    if spread == 0:
        return float(mean == threshold)
    return float(2 * t.sf(abs(mean - threshold) / (spread / math.sqrt(seeds)), seeds - 1))


def corrected(p: Sequence[float]) -> list[float]:
    """Correct probabilities for their number by Holm's method (:func:`fairline.audit.verdict.holm`).

    Args:
        p: Probabilities; NaN where there was no test, which counts as none.

    Returns:
        The corrected ones, in their order.

    >>> corrected([0.01, 0.04, math.nan])
    [0.02, 0.04, nan]
    """
    found = np.array(p, float)
    tested = np.isfinite(found)
    if tested.any():
        found[tested] = holm(found[tested])
    return [float(each) for each in found]


def power(effect: float, seeds: int, tests: int = 1) -> float:
    """How often Student's two-sided test at 5 % decides, under the noncentral t.

    Args:
        effect: Distance of the true mean from the threshold, in standard deviations.
        seeds: How many, two at least.
        tests: Of how many it is one, any of which may decide (Bonferroni).

    Returns:
        The share.
    """
    from scipy.stats import nct, t

    freedom, centre = seeds - 1, abs(effect) * math.sqrt(seeds)
    limit = t.isf((1 - LEVEL) / 2 / tests, freedom)
    found = float(nct.sf(limit, freedom, centre))
    # Where scipy cannot tell it the other side is Φ(−centre) at most, which is nothing there.
    other = float(nct.cdf(-limit, freedom, centre))
    return found if math.isnan(other) else found + other


def seeds_needed(mean: float, spread: float, threshold: float = 0.0, tests: int = 1) -> float:
    """The fewest seeds with which a test would decide in 80 %, were mean and spread the true ones.

    Args:
        mean: Of the seeds that there are.
        spread: Their standard deviation.
        threshold: What the mean is tested against.
        tests: As for :func:`power`.

    Returns:
        The number; infinite beyond :data:`MOST`, NaN where no spread is known.

    >>> seeds_needed(1.0, 1.0), seeds_needed(0.01, 1.0)
    (10.0, inf)
    """
    if not (math.isfinite(mean) and math.isfinite(spread)):
        return math.nan
    if spread == 0:
        return math.inf if mean == threshold else 2.0
    effect, counts = abs(mean - threshold) / spread, range(2, MOST + 1)
    place = bisect_left(counts, POWER, key=lambda seeds: power(effect, seeds, tests))
    return float(counts[place]) if place < len(counts) else math.inf


@dataclass(frozen=True)
class Pooled:
    """A random-effects mean over panels.

    Attributes:
        mean: The mean.
        low: Lower 95 % limit.
        high: Upper limit.
        tau: Standard deviation of the panels' true effects, τ.
        i2: Share of the variance of the panels' means that is between them, I².
        panels: How many.
    """

    mean: float
    low: float
    high: float
    tau: float
    i2: float
    panels: int


def pooled(means: Floats, variances: Floats) -> Pooled | None:
    """Summarise panels under random effects: τ² by DerSimonian and Laird (1986).

    The limits are those of Hartung, Knapp, Sidik and Jonkman: Student's with panels − 1 degrees of freedom, and never
    narrower than the model's own variance makes them (Röver, Knapp and Friede 2015).

    Args:
        means: A number a panel.
        variances: Of each mean, s² / n.

    Returns:
        The summary; None of fewer than two panels whose variance is known and positive.
    """
    from scipy.stats import t
    from statsmodels.stats.meta_analysis import combine_effects

    known = np.isfinite(means) & np.isfinite(variances) & (variances > 0)
    count = int(known.sum())
    if count < 2:
        return None
    # Its τ² may be negative, with weights that do not exist; the estimate is then 0: fixed effects.
    with np.errstate(all="ignore"):
        found = combine_effects(means[known], variances[known], method_re="dl")
    fixed = found.tau2 <= 0
    mean = found.mean_effect_fe if fixed else found.mean_effect_re
    of_model = found.var_eff_w_fe if fixed else found.var_eff_w_re
    of_panels = found.var_hksj_fe if fixed else found.var_hksj_re
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(max(of_model, of_panels))
    q = float(found.q)
    i2 = max(0.0, (q - (count - 1)) / q) if q > 0 else 0.0
    return Pooled(float(mean), float(mean - half), float(mean + half), math.sqrt(max(0.0, found.tau2)), i2, count)


def sign_test(agreeing: int, of: int) -> float:
    """Two-sided probability that so many of some panels lie on one side by chance.

    Args:
        agreeing: Panels on the side.
        of: All panels that have one.

    Returns:
        The probability; NaN of no panel.

    >>> sign_test(10, 10)
    0.001953125
    """
    from scipy.stats import binomtest

    return float(binomtest(agreeing, of).pvalue) if of else math.nan


__all__ = ["MOST", "Pooled", "corrected", "pooled", "power", "seeds_needed", "sign_test", "student_p"]
