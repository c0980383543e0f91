"""Rank correlation of accuracy with what explains it, over samples and over groups (paper, Figure 8)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairline.audit.accuracy import percentile_interval
from fairline.audit.base import Row, Subject
from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError

Floats = NDArray[np.float64]

#: Numbers that accuracy is correlated with, where another measure has taken them.
EXPLAINING = ("gradient_norm", "margin", "boundary_distance", "first_order_distance")


def spearman(x: Floats, y: Floats) -> Floats:
    """Spearman's ρ of each column pair, ties at their mean rank; NaN where a column is constant.

    Args:
        x: (n, B).
        y: (n, B).

    Returns:
        (B,), in [−1, 1].
    """
    a, b = (pd.DataFrame(values).rank().to_numpy() for values in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    spread = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        rho: Floats = np.where(spread > 0, (a * b).sum(0) / spread, np.nan)
    return rho


def measure(subject: Subject, *, resamples: int = 500) -> list[Row]:
    """Rows of Spearman's ρ between accuracy and each of :data:`EXPLAINING` that was taken before; overall, unitless.

    Measures: ``<name>_correlation_samples``, over samples, between being right (0 or 1) and the sample's number;
    ``<name>_correlation_groups``, over groups, between the group's accuracy and its number. Limits are 95 % percentile
    bootstrap limits over images, resampled within groups. Over groups they speak of the images drawn for these groups,
    not of other groups: with five groups even ρ = 1 comes about by chance in one of 120 orders. A group's gradient
    norm is no mean of per-sample numbers and is kept as measured while its accuracy is resampled.

    Args:
        subject: The model; measures to correlate with must come before this one.
        resamples: Bootstrap resamples.

    Raises:
        FairlineError: Nothing to correlate with has been measured.
    """
    if resamples < 1:
        raise FairlineError(f"The bootstrap needs at least one resample, not {resamples}.")
    by_group = {
        name: {row.group: row.value for row in subject.rows if row.measure == name and row.group != OVERALL}
        for name in EXPLAINING
    }
    taken = [name for name in EXPLAINING if by_group[name] or name in subject.samples]
    if not taken:
        raise FairlineError(f"A correlation needs one of {', '.join(EXPLAINING)} to be measured with it.")
    rng = np.random.default_rng(subject.seed)
    groups = list(subject.group_index())
    correct = subject.predictions.correct.astype(float)
    draws = [[rng.integers(0, len(index), len(index)) for _, index in groups] for _ in range(resamples)]
    accuracy = np.array([correct[index].mean() for _, index in groups])
    drawn_accuracy = np.array(
        [[correct[index[d]].mean() for (_, index), d in zip(groups, draw, strict=True)] for draw in draws]
    ).T
    rows = []
    for name in taken:
        values = subject.samples.get(name)
        if values is not None:
            finite = np.isfinite(values)
            rho = float(spearman(values[finite, None], correct[finite, None])[0])
            drawn = []
            for draw in draws:
                picked = np.concatenate([index[d] for (_, index), d in zip(groups, draw, strict=True)])
                picked = picked[finite[picked]]
                drawn.append(spearman(values[picked, None], correct[picked, None])[0])
            rows.append(
                Row(
                    OVERALL,
                    f"{name}_correlation_samples",
                    rho,
                    *percentile_interval(np.array(drawn)),
                    int(finite.sum()),
                )
            )
        if len(groups) > 2 and by_group[name]:
            own = np.array([by_group[name][group] for group, _ in groups])
            drawn_own = np.repeat(own[:, None], resamples, axis=1)
            if values is not None and name != "gradient_norm":
                masked = np.where(np.isfinite(values), values, np.nan)
                drawn_own = np.array(
                    [
                        [np.nanmean(masked[index[d]]) for (_, index), d in zip(groups, draw, strict=True)]
                        for draw in draws
                    ]
                ).T
            rho = float(spearman(own[:, None], accuracy[:, None])[0])
            limits = percentile_interval(spearman(drawn_own, drawn_accuracy))
            rows.append(Row(OVERALL, f"{name}_correlation_groups", rho, *limits, len(groups)))
    return [row for row in rows if not math.isnan(row.value)]
