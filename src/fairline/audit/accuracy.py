"""Accuracy, loss, relative accuracy drop and gaps of each group (paper, Section 5.1), with 95 % limits.

Limits are those of :mod:`fairline.audit.intervals`, of images drawn within each group. For a drop they are paired: each
draw weights the same images under both models, so what both models find hard does not widen the interval.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from fairline.audit.base import Row, Subject
from fairline.audit.intervals import (
    Drawn,
    Floats,
    draw,
    draws_needed,
    gap_interval,
    lowest_interval,
    mean_interval,
    percentile_interval,
    pooled,
)
from fairline.data.grouped import OVERALL

#: Positions of the two networks among those drawn.
OWN, REFERENCE = 0, 1


def measure(subject: Subject) -> list[Row]:
    """Rows for accuracy, loss, relative drop (if there is a reference) and gaps.

    Measures: ``accuracy`` in [0, 1]; ``loss``, mean cross-entropy in nats; ``relative_drop``, in percent (paper,
    Section 5.1): ``(accuracy(θ) − accuracy(θ̃)) / accuracy(θ) · 100``; under the group ``overall`` also
    ``accuracy_gap`` (highest minus lowest group accuracy), ``worst_group_accuracy`` and, with a reference,
    ``relative_drop_gap`` (largest minus smallest group drop).

    Args:
        subject: The model.

    Returns:
        The rows.
    """
    rng = np.random.default_rng(subject.seed)
    networks = [subject.predictions, *([] if subject.reference is None else [subject.reference.predictions])]
    correct = np.stack([network.correct for network in networks], axis=1)
    frame = pd.DataFrame(
        {
            "group": np.asarray(subject.data.group_names)[subject.data.groups.cpu().numpy()],
            "loss": networks[OWN].loss,
            **{f"correct_{network}": column for network, column in enumerate(correct.T.astype(float))},
        }
    )
    means, overall = group_means(frame)
    draws = draws_needed(subject.data.num_groups, subject.resamples)
    index = dict(subject.group_index())
    drawn = {name: draw(correct[own], draws, rng) for name, own in index.items()}
    rows = []
    for name, own in index.items():
        rows += _rows_of(name, means.loc[name], networks[OWN].loss[own], drawn[name])
    rows += _rows_of(OVERALL, overall, networks[OWN].loss, pooled(list(drawn.values()), rng))
    return rows + _across_groups(means.loc[list(index)], list(drawn.values()), len(frame))


def _rows_of(name: str, point: pd.Series[Any], losses: Floats, drawn: Drawn) -> list[Row]:
    """Rows of one group, or of all images."""
    n = len(losses)
    limits = percentile_interval(_accuracies(drawn))
    rows = [
        Row(name, "accuracy", float(point[f"correct_{OWN}"]), *limits, n),
        Row(name, "loss", float(point["loss"]), *mean_interval(losses, least=0), n),
    ]
    if f"correct_{REFERENCE}" in point:
        value = float(relative_drop(point[f"correct_{REFERENCE}"], point[f"correct_{OWN}"]))
        limits = (math.nan, math.nan) if math.isnan(value) else percentile_interval(_drops(drawn))
        rows.append(Row(name, "relative_drop", value, *limits, n))
    return rows


def _across_groups(means: pd.DataFrame, drawn: list[Drawn], n: int) -> list[Row]:
    """Rows of what compares groups."""
    accuracy = means[f"correct_{OWN}"].to_numpy(float)
    draws = np.stack([_accuracies(own) for own in drawn])
    rows = [
        Row(OVERALL, "accuracy_gap", float(np.ptp(accuracy)), *gap_interval(draws), n),
        Row(OVERALL, "worst_group_accuracy", float(accuracy.min()), *lowest_interval(draws), n),
    ]
    if f"correct_{REFERENCE}" in means:
        drops = relative_drop(means[f"correct_{REFERENCE}"].to_numpy(float), accuracy)
        defined = [group for group, drop in enumerate(drops) if not math.isnan(drop)]
        value, limits = math.nan, (math.nan, math.nan)
        if defined:
            value = float(np.ptp(drops[defined]))
            limits = gap_interval(np.stack([_drops(drawn[group]) for group in defined]))
        rows.append(Row(OVERALL, "relative_drop_gap", value, *limits, n))
    return rows


def _accuracies(drawn: Drawn) -> Floats:
    """Drawn accuracies of the audited network, (B,)."""
    return drawn.shares([OWN], [1])[0]


def _drops(drawn: Drawn) -> Floats:
    """Drawn relative drops, (B,): they grow with the reference's accuracy and fall with the network's own."""
    return np.asarray(relative_drop(*drawn.shares([REFERENCE, OWN], [1, -1])))


def group_means(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series[Any]]:
    """Mean of every column of per-sample numbers, a group and overall.

    Through fairlearn's ``MetricFrame``; by pandas alone where fairlearn is not installed (a bare GPU machine),
    with the same result.

    Args:
        frame: A column ``group`` and any number of float columns.

    Returns:
        Group means (indexed by group) and overall means.

    >>> frame = pd.DataFrame({"group": ["a", "a", "b"], "correct": [1.0, 0.0, 1.0]})
    >>> by_group, overall = group_means(frame)
    >>> by_group["correct"].to_dict()
    {'a': 0.5, 'b': 1.0}
    """
    columns = [column for column in frame.columns if column != "group"]
    try:
        from fairlearn.metrics import MetricFrame
    except ImportError:
        return frame.groupby("group")[columns].mean(), frame[columns].mean()

    def mean(y_true: Any, y_pred: Any, values: Any) -> float:
        return float(np.mean(values))

    zeros = np.zeros(len(frame))
    metrics = MetricFrame(
        metrics=dict.fromkeys(columns, mean),
        y_true=zeros,
        y_pred=zeros,
        sensitive_features=frame["group"],
        sample_params={column: {"values": frame[column]} for column in columns},
    )
    return metrics.by_group.astype(float), metrics.overall.astype(float)


def relative_drop(before: Any, after: Any) -> Any:
    """Relative accuracy drop in percent (paper, Section 5.1).

    Args:
        before: Accuracies, a number or an array.
        after: Likewise.

    Returns:
        A number, or an array; NaN where ``before`` is 0.

    >>> relative_drop(0.8, 0.4)
    50.0
    >>> relative_drop(0.0, 0.6)
    nan
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        drop = np.where(before > 0, (before - after) / before * 100, np.nan)
    return drop if drop.ndim else float(drop)
