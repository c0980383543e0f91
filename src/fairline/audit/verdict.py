"""Whether a network may ship: who loses more than is tolerated, how sure that is, and how much would tell.

Every set of images of :mod:`fairline.audit.cells` is asked twice.

- *Does it lose?* The network may not ship if one loses more than the tolerance and it is beyond chance that it loses at
  all. Many sets are looked at, and one of them seems to lose by chance, so these tests are corrected by Holm's method
  (Holm 1979).
- *Does it lose less than is tolerated?* The network may ship if no group and no class can lose more, by its 95 %
  interval. All must pass, so no correction is due (an intersection–union test, Berger 1982).

What is neither is undecided, and so many images, or base networks, would tell. Sets of a class in a group are often
tiny; they can forbid, and what they are too few for is no obstacle. Of a *critical* class the recall may not fall at
all; it was named before it was looked at, so it is tested by itself.

One network: the images are drawn (:mod:`fairline.audit.paired`). Several seeds: each base network gives one number, and
Student's t is used.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fairline.audit.intervals import LEVEL, Floats, agree, student_interval
from fairline.audit.paired import change_interval, images_needed, p_below, score
from fairline.errors import FairlineError

MAY, MAY_NOT, CANNOT_TELL = "may ship", "may not ship", "cannot tell"

#: A class in a group that has fewer images is not asked.
LEAST = 10

_KEYS = ["kind", "group", "class"]


@dataclass(frozen=True, eq=False)
class Verdict:
    """What is known of a network against the one that it was made of.

    Attributes:
        answer: :data:`MAY`, :data:`MAY_NOT` or :data:`CANNOT_TELL`.
        within: Loss that is tolerated, in percentage points.
        cells: A row a set of images: ``kind``, ``group``, ``class``, ``n``, ``before`` and ``after`` (shares that are
            right), ``change`` with ``low`` and ``high`` (percentage points, 95 %), ``p`` (that it does not change, by
            Holm's method), ``flag`` (``loss``, ``gain`` or empty: whether it changes, by that), ``beyond`` (a loss that
            is flagged and more than is tolerated), ``inside`` (its interval ends before the tolerance), ``needed``
            (images, or seeds, that would tell) and ``critical``.
        decisive: The row that decides: of what is lost beyond the tolerance the largest loss; of what is undecided the
            lowest limit; else the group or class that does worst.
        seeds: Base networks that it speaks of; 1 means the one network and its images.
        too_small: Sets of a class in a group that have too few images to be asked.
    """

    answer: str
    within: float
    cells: pd.DataFrame
    decisive: pd.Series[Any]
    seeds: int
    too_small: int

    @property
    def overall(self) -> pd.Series[Any]:
        """The row of all images."""
        return self.cells.iloc[0]

    def balanced(self) -> tuple[float, float]:
        """Balanced accuracy before and after."""
        classes = self.cells[(self.cells["class"] != "") & (self.cells["kind"] != "cell")]
        return float(classes["before"].mean()), float(classes["after"].mean())


def require_within(within: float) -> None:
    """Refuse a tolerance that is none.

    Raises:
        FairlineError: It is not in percentage points, from 0 to 100.
    """
    if not 0 <= within < 100:
        raise FairlineError(f"The loss that is tolerated is in percentage points, from 0 to 100, not {within:g}.")


def verdict(counted: Sequence[pd.DataFrame], within: float = 5.0, critical: Sequence[str] = ()) -> Verdict:
    """Judge a network, or a method over several seeds.

    Args:
        counted: :func:`fairline.audit.cells.cells` of each base network; one for one network.
        within: Loss that is tolerated, in percentage points.
        critical: Classes whose recall may not fall.

    Returns:
        The verdict.

    Raises:
        FairlineError: The tolerance is no percentage, there is no such class, or nothing is compared.
    """
    require_within(within)
    if not counted:
        raise FairlineError("A verdict needs at least one network.")
    asked = counted[0]["kind"].ne("cell") | counted[0]["n"].ge(LEAST)
    one = len(counted) == 1
    table = _of_images(counted[0][asked], within, critical) if one else _of_seeds(counted, within, critical)
    classes = [str(name) for name in table.loc[table["kind"] != "cell", "class"] if name]
    unknown = [name for name in critical if name not in classes]
    if unknown:
        raise FairlineError(
            f"There is no class '{unknown[0]}' to be critical of; the classes are {', '.join(classes)}."
        )
    table["p"] = holm(table["p"].to_numpy())
    table["flag"] = np.where(table["p"] < 1 - LEVEL, np.where(table["change"] < 0, "loss", "gain"), "")
    table["beyond"] = (table["flag"] == "loss") & (table["change"] < -within) | table["critical"] & (table["high"] < 0)
    table["inside"] = (table["low"] >= -within) & (~table["critical"] | (table["change"] >= 0))
    answer, decisive = _decided(table)
    return Verdict(answer, within, table, decisive, len(counted), int((~asked).sum()))


def _critical(table: pd.DataFrame, critical: Sequence[str]) -> pd.Series[bool]:
    """Which sets are classes whose recall may not fall."""
    return table["class"].isin(critical) & table["kind"].ne("cell")


def holm(p: Floats) -> Floats:
    """Probabilities corrected for their number (Holm 1979): any is below 5 % by chance in 5 % at most.

    >>> holm(np.array([0.01, 0.04])).tolist()
    [0.02, 0.04]

    Args:
        p: Probabilities.

    Returns:
        The corrected ones, in their order.
    """
    from statsmodels.stats.multitest import multipletests

    # statsmodels collects garbage in this call, a fifth of a second in a process that holds torch and pandas. What is
    # frozen is not looked through.
    frozen = gc.get_freeze_count() == 0
    if frozen:
        gc.freeze()
    try:
        corrected: Floats = multipletests(p, method="holm")[1]
    finally:
        if frozen:
            gc.unfreeze()
    return corrected


def _decided(table: pd.DataFrame) -> tuple[str, pd.Series[Any]]:
    beyond = table[table["beyond"]]
    if len(beyond):
        return MAY_NOT, beyond.loc[beyond["change"].idxmin()]
    asked = table[table["kind"].isin(["group", "class"])]
    asked = asked if len(asked) else table
    undecided = table[~table["inside"] & table["kind"].ne("cell")]
    if len(undecided):
        return CANNOT_TELL, undecided.loc[undecided["low"].fillna(-math.inf).idxmin()]
    return MAY, asked.loc[asked["change"].idxmin()]


def _of_images(counted: pd.DataFrame, within: float, critical: Sequence[str]) -> pd.DataFrame:
    """Changes of one network, limited by its images."""
    lost, gained, n = (counted[name].to_numpy() for name in ("lost", "gained", "n"))
    low, high = change_interval(lost, gained, n)
    # Without an image that changed nothing speaks for a change.
    still = np.where(lost + gained > 0, score(lost, gained, n, 0), 0)
    table = counted[[*_KEYS, "n"]].reset_index(drop=True)
    table["critical"] = _critical(table, critical)
    needed = [_images_needed(*row, within, len(table)) for row in zip(lost, gained, n, table["critical"], strict=True)]
    return table.assign(
        before=counted["before"].to_numpy() / n,
        after=counted["after"].to_numpy() / n,
        change=100 * (gained - lost) / n,
        low=100 * low,
        high=100 * high,
        p=2 * p_below(-np.abs(still)),
        needed=needed,
    )


def _images_needed(lost: int, gained: int, n: int, critical: bool, within: float, sets: int) -> float:
    """Images until it is beyond chance that there is a loss, if it is more than is tolerated, or that it is less."""
    # Of a critical class no loss is tolerated, and it is asked for by itself.
    if critical and gained < lost:
        return images_needed(lost, gained, n, 0)
    if 100 * (gained - lost) / n < -within:
        return images_needed(lost, gained, n, 0, _quantile(sets))
    return images_needed(lost, gained, n, -within / 100)


def _quantile(sets: int) -> float:
    """Normal quantile of the first of so many tests in Holm's order."""
    from scipy.stats import norm

    return float(norm.isf((1 - LEVEL) / 2 / sets))


def _of_seeds(counted: Sequence[pd.DataFrame], within: float, critical: Sequence[str]) -> pd.DataFrame:
    """Changes of a method, limited by its base networks."""
    shares = pd.concat(
        [
            each[[*_KEYS, "n"]].assign(before=each["before"] / each["n"], after=each["after"] / each["n"])
            for each in counted
        ]
    )
    shares["change"] = 100 * (shares["after"] - shares["before"])
    grouped = shares.groupby(_KEYS, sort=False)
    # A split may leave a base network without an image of a small set.
    table = grouped[["n", "before", "after", "change"]].mean()[grouped.size() == len(counted)]
    table = table[(table.index.get_level_values("kind") != "cell") | (table["n"] >= LEAST)]
    table["critical"] = _critical(table.index.to_frame(), critical)
    limits = [
        _seed_limits(grouped.get_group(key)["change"].to_numpy(), within, len(table), may_not_fall)
        for key, may_not_fall in table["critical"].items()
    ]
    columns = ["low", "high", "p", "needed"]
    return table.assign(**pd.DataFrame(limits, columns=columns, index=table.index)).reset_index()


def _seed_limits(
    changes: np.ndarray[Any, np.dtype[np.float64]], within: float, sets: int, critical: bool
) -> tuple[float, ...]:
    """Limits of the mean, the probability of one so far from 0, and the seeds that would tell."""
    from scipy.stats import t

    spread, mean = float(changes.std(ddof=1)), float(changes.mean())
    if agree(changes):
        # Seeds that agree wholly do not tell how far others would be.
        return math.nan, math.nan, 1.0, math.inf
    level = (1 - LEVEL) / 2
    if critical and mean < 0:
        away = abs(mean)
    else:
        away, level = (abs(mean), level / sets) if mean < -within else (mean + within, level)
    p = 2 * t.sf(abs(mean) / spread * math.sqrt(len(changes)), len(changes) - 1)
    return *student_interval(changes), float(p), _seeds_needed(away / spread, level)


def _seeds_needed(away: float, level: float, most: int = 10_000) -> float:
    """Seeds whose mean tells itself from a value that is so many standard deviations away."""
    from scipy.stats import t

    seeds = np.arange(2, most)
    enough = away * np.sqrt(seeds) >= t.isf(level, seeds - 1)
    return float(seeds[enough.argmax()]) if enough.any() else math.inf


__all__ = ["CANNOT_TELL", "LEAST", "MAY", "MAY_NOT", "Verdict", "require_within", "verdict"]
