"""Rank correlation of accuracy with what explains it, over samples and over groups (paper, Figure 8)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairline.audit.base import Row, Subject
from fairline.audit.intervals import percentile_interval
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

    >>> x = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    >>> y = np.array([[0.0, 5.0], [1.0, 5.0], [0.0, 5.0]])
    >>> spearman(x, y)
    array([ 0., nan])
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

    Returns:
        The rows; a correlation with a constant has none.

    Raises:
        FairlineError: Nothing to correlate with has been measured, or there is no resample.
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
    correct = subject.predictions.correct.astype(float)
    images = _Resampled([index for _, index in subject.group_index()], resamples, subject.seed)
    rows = []
    for name in taken:
        values = subject.samples.get(name)
        if values is not None:
            rows.append(_over_samples(name, values, correct, images))
        if len(by_group[name]) > 2:
            own = np.array([by_group[name][group] for group in subject.data.group_names])
            # A gradient norm is that of the group's gradient, not the mean of the samples' norms.
            rows.append(_over_groups(name, own, None if name == "gradient_norm" else values, correct, images))
    return [row for row in rows if not math.isnan(row.value)]


class _Resampled:
    """The images of each group, and those of each resample; the same for all measures.

    Args:
        groups: Sample positions of each group.
        resamples: B.
        seed: Of the resamples.
    """

    def __init__(self, groups: list[NDArray[np.int64]], resamples: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.groups = groups
        self.draws = [[index[rng.integers(0, len(index), len(index))] for index in groups] for _ in range(resamples)]

    def group_means(self, values: Floats) -> tuple[Floats, Floats]:
        """Means of ``values`` (N,) over each group, (A,), and over each resampled group, (A, B); NaN is left out."""
        drawn = [[np.nanmean(values[index]) for index in draw] for draw in self.draws]
        return np.array([np.nanmean(values[index]) for index in self.groups]), np.array(drawn).T


def _over_samples(name: str, values: Floats, correct: Floats, images: _Resampled) -> Row:
    finite = np.isfinite(values)
    drawn = []
    for draw in images.draws:
        picked = np.concatenate(draw)
        picked = picked[finite[picked]]
        drawn.append(spearman(values[picked, None], correct[picked, None])[0])
    rho = float(spearman(values[finite, None], correct[finite, None])[0])
    limits = percentile_interval(np.array(drawn))
    return Row(OVERALL, f"{name}_correlation_samples", rho, *limits, int(finite.sum()))


def _over_groups(name: str, own: Floats, values: Floats | None, correct: Floats, images: _Resampled) -> Row:
    """``own`` (A,) are the groups' numbers, means of ``values`` (N,) where those are given."""
    accuracy, drawn_accuracy = images.group_means(correct)
    drawn_own = np.broadcast_to(own[:, None], drawn_accuracy.shape)
    if values is not None:
        drawn_own = images.group_means(np.where(np.isfinite(values), values, np.nan))[1]
    rho = float(spearman(own[:, None], accuracy[:, None])[0])
    limits = percentile_interval(spearman(drawn_own, drawn_accuracy))
    return Row(OVERALL, f"{name}_correlation_groups", rho, *limits, len(own))
