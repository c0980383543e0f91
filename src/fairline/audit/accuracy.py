"""Accuracy, loss, relative accuracy drop and gaps of each group, with bootstrap intervals.

The bootstrap resamples images within each group. For a drop it is paired: each resample takes the same images
under both models, so what both models find hard does not widen the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairline.audit.base import Row, Subject
from fairline.data.grouped import OVERALL

Floats = NDArray[np.float64]
LEVEL = 0.95


def measure(subject: Subject) -> list[Row]:
    """Rows for accuracy, loss, relative drop (if there is a reference) and gaps.

    Measures: ``accuracy`` in [0, 1]; ``loss``, mean cross-entropy in nats; ``relative_drop``, in percent (paper,
    Section 5.1): ``(accuracy(θ) − accuracy(θ̃)) / accuracy(θ) · 100``; under the group ``overall`` also
    ``accuracy_gap`` (highest minus lowest group accuracy), ``worst_group_accuracy`` and, with a reference,
    ``relative_drop_gap`` (largest minus smallest group drop).
    """
    rng = np.random.default_rng(subject.seed)
    own = subject.predictions
    reference = None if subject.reference is None else subject.reference.predictions
    frame = pd.DataFrame(
        {
            "group": np.asarray(subject.data.group_names)[subject.data.groups.cpu().numpy()],
            "correct": own.correct.astype(float),
            "loss": own.loss,
        }
    )
    if reference is not None:
        frame["reference_correct"] = reference.correct.astype(float)
    means, overall = group_means(frame)

    rows: list[Row] = []
    names = list(subject.data.group_names)
    sizes = frame["group"].value_counts()
    accuracy_draws: dict[str, Floats] = {}
    reference_draws: dict[str, Floats] = {}
    loss_draws: dict[str, Floats] = {}
    for name, index in subject.group_index():
        compared = own if reference is None else reference
        accuracy_draws[name], reference_draws[name] = paired_accuracy_bootstrap(
            own.correct[index], compared.correct[index], subject.resamples, rng
        )
        loss_draws[name] = mean_bootstrap(own.loss[index], subject.resamples, rng)

    # All groups together, each resampled at its own size.
    weights = np.array([sizes[name] for name in names]) / len(frame)

    def together(draws: dict[str, Floats]) -> Floats:
        return np.einsum("g,gb->b", weights, np.stack([draws[name] for name in names]))

    for name in [*names, OVERALL]:
        point = overall if name == OVERALL else means.loc[name]
        n = len(frame) if name == OVERALL else int(sizes[name])
        accuracy = together(accuracy_draws) if name == OVERALL else accuracy_draws[name]
        before = together(reference_draws) if name == OVERALL else reference_draws[name]
        loss = together(loss_draws) if name == OVERALL else loss_draws[name]
        low, high = percentile_interval(accuracy)
        if point["correct"] in (0.0, 1.0):
            # Resampling n equal outcomes shows no spread at all; the score interval does.
            low, high = wilson_interval(float(point["correct"]), n)
        rows.append(Row(name, "accuracy", float(point["correct"]), low, high, n))
        rows.append(Row(name, "loss", float(point["loss"]), *percentile_interval(loss), n))
        if reference is not None:
            value = float(relative_drop(point["reference_correct"], point["correct"]))
            rows.append(Row(name, "relative_drop", value, *percentile_interval(relative_drop(before, accuracy)), n))

    stacked = np.stack([accuracy_draws[name] for name in names])
    values = means.loc[names, "correct"]
    n = len(frame)
    gap = percentile_interval(stacked.max(0) - stacked.min(0))
    worst = percentile_interval(stacked.min(0))
    rows.append(Row(OVERALL, "accuracy_gap", float(values.max() - values.min()), *gap, n))
    rows.append(Row(OVERALL, "worst_group_accuracy", float(values.min()), *worst, n))
    if reference is not None:
        drops = relative_drop(means.loc[names, "reference_correct"].to_numpy(float), values.to_numpy(float))
        drawn = relative_drop(np.stack([reference_draws[name] for name in names]), stacked)
        rows.append(Row(OVERALL, "relative_drop_gap", _spread(drops), *percentile_interval(_spreads(drawn)), n))
    return rows


def group_means(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series[Any]]:
    """Mean of every column of per-sample numbers, a group and overall.

    Through fairlearn's ``MetricFrame``; by pandas alone where fairlearn is not installed (a bare GPU machine),
    with the same result.

    Args:
        frame: A column ``group`` and any number of float columns.

    Returns:
        Group means (indexed by group) and overall means.
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
    """Relative accuracy drop in percent (paper, Section 5.1); NaN where ``before`` is 0."""
    before, after = np.asarray(before, float), np.asarray(after, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        drop = np.where(before > 0, (before - after) / before * 100, np.nan)
    return drop if drop.ndim else float(drop)


def paired_accuracy_bootstrap(
    correct: NDArray[np.bool_], before: NDArray[np.bool_], resamples: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Accuracies of two models on resampled images, the same images for both.

    Only how many images fall into each of the four cells (right or wrong under either model) matters, and
    those counts of a resample are multinomial, so no image is drawn one by one.

    Args:
        correct: (n,), of the first model.
        before: (n,), of the second.
        resamples: B.
        rng: Source of randomness.

    Returns:
        Two arrays (B,).
    """
    n = len(correct)
    cells = np.bincount(2 * correct.astype(int) + before.astype(int), minlength=4)
    drawn = rng.multinomial(n, cells / n, size=resamples)
    return (drawn[:, 2] + drawn[:, 3]) / n, (drawn[:, 1] + drawn[:, 3]) / n


def mean_bootstrap(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Means of resampled values (n,): (B,), drawing at most 4 million indices at a time."""
    n = len(values)
    step = max(1, 4_000_000 // n)
    means = [
        values[rng.integers(0, n, size=(min(step, resamples - start), n))].mean(1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(means)


def student_interval(values: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of independent values, two at least."""
    from scipy.stats import t

    mean = float(values.mean())
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def percentile_interval(draws: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of bootstrap draws; NaN where no draw is finite."""
    finite = draws[np.isfinite(draws)]
    if len(finite) == 0:
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927)."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # Rounding must not exclude the share itself.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def _spread(values: Sequence[float] | Floats) -> float:
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    return float(finite.max() - finite.min()) if len(finite) else math.nan


def _spreads(values: Floats) -> Floats:
    return np.array([_spread(column) for column in values.T])
