"""What a claim says of one panel: a number of each seed, its mean with Student's interval, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fairline.audit.intervals import agree, student_interval
from fairline.data.grouped import OVERALL
from fairline.report.evidence import seeds_needed, student_p
from fairline.report.panels import Panel, finetuned, panels, rows_of

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Finding:
    """One claim in one panel.

    Attributes:
        claim: Its number.
        panel: Where it was tested, in words.
        effect: Mean over seeds.
        low: Lower 95 % limit, Student's.
        high: Upper limit.
        seeds: How many.
        verdict: ``holds``, ``does not hold`` or ``undecided``.
        note: Which groups and budgets it is about.
        agrees: Whether the mean, whatever its interval, lies on the claim's side; None where there is none or where
            it is the threshold.
        variant: Which other number of the claim this is; empty for the claim's own.
        spread: Standard deviation over seeds; of a ratio, that of its logarithm.
        p: Two-sided probability under Student's t that the mean is at the threshold; NaN of one seed, or if all agree.
        p_holm: The same after Holm's correction for all tests of the table.
        corrected: The verdict if that is below 5 %, else ``undecided``.
        needed: Seeds with which an undecided panel would be decided in 80 %, were mean and spread the true ones;
            infinite beyond 1,000, NaN where no spread is known and where it is decided.
    """

    claim: int
    panel: str
    effect: float
    low: float
    high: float
    seeds: int
    verdict: str
    note: str = ""
    agrees: bool | None = None
    variant: str = ""
    spread: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    corrected: str = UNDECIDED
    needed: float = math.nan


def judge(
    claim: int,
    panel: str,
    values: Sequence[float] | pd.Series,
    above: float = 0.0,
    note: str = "",
    sign: int = 1,
    variant: str = "",
) -> Finding:
    """Test whether a mean lies above a threshold.

    Args:
        claim: Number of the claim.
        panel: Where.
        values: One number a seed; those that are not finite are left out. Where all seeds agree, nothing tells how far
            others lie, so nothing is decided, as of one seed.
        above: The threshold.
        note: What the numbers are about.
        sign: −1 tests whether it lies below.
        variant: Which of the claim's numbers they are.

    Returns:
        The finding, with the numbers as they were given.
    """
    own = np.asarray(values, float)
    own = own[np.isfinite(own)]
    mean = float(own.mean()) if len(own) else math.nan
    agrees = None if math.isnan(mean) or mean == above else sign * mean > sign * above
    if len(own) < 2 or agree(own):
        return Finding(claim, panel, mean, math.nan, math.nan, len(own), UNDECIDED, note, agrees, variant)
    low, high = student_interval(own)
    near, far = (low, high) if sign > 0 else (-high, -low)
    verdict = HOLDS if near > sign * above else FAILS if far < sign * above else UNDECIDED
    spread = float(own.std(ddof=1))
    return Finding(
        *(claim, panel, mean, low, high, len(own), verdict, note, agrees, variant, spread),
        p=student_p(mean, spread, len(own), above),
        needed=seeds_needed(mean, spread, above) if verdict == UNDECIDED else math.nan,
    )


@dataclass(frozen=True)
class Extreme:
    """The group with the most or the fewest training images; or those, where several have as many to 1 %."""

    groups: tuple[str, ...]
    which: str

    def __str__(self) -> str:
        return self.groups[0] if len(self.groups) == 1 else f"the {len(self.groups)} {self.which} groups"

    def of(self, wide: pd.DataFrame) -> pd.Series:
        """Their mean in a table with a column a group."""
        return wide.reindex(columns=list(self.groups)).mean(axis=1)


def comparable(table: pd.DataFrame) -> list[Panel]:
    """Tested panels whose smallest group is not also one of the largest."""
    found = []
    for panel in tested_panels(table):
        largest, smallest = extremes(rows_of(table, panel))
        if not set(largest.groups) & set(smallest.groups):
            found.append(panel)
    return found


def extremes(rows: pd.DataFrame) -> tuple[Extreme, Extreme]:
    """The largest and the smallest group."""
    sizes = rows[rows["group"] != OVERALL].groupby("group", sort=False)["train_n"].mean()
    largest, smallest = sizes.index[sizes >= 0.99 * sizes.max()], sizes.index[sizes <= 1.01 * sizes.min()]
    return Extreme(tuple(map(str, largest)), "largest"), Extreme(tuple(map(str, smallest)), "smallest")


def wide_of(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Values of a measure, a row a seed and budget and a column a group."""
    own = rows[rows["measure"] == measure]
    return own.groupby(["seed", "percent", "group"], sort=False)["value"].mean().unstack("group")


def lowest(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the smallest share of ReLUs."""
    return rows[rows["percent"] == rows["percent"].min()]


def tested_panels(table: pd.DataFrame) -> list[Panel]:
    """Panels that have groups to compare and plain finetunes of networks that lost ReLUs: what claims speak of."""
    held = []
    for panel in panels(table):
        rows = rows_of(table, panel)
        own = finetuned(rows)
        if (own["relus"] < own["total_relus"]).any() and rows.loc[rows["group"] != OVERALL, "group"].nunique() > 1:
            held.append(panel)
    return held
