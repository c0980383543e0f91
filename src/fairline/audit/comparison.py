"""Methods side by side at equal ReLU budgets: paired differences, the paper's second formula, the Pareto front.

One base network: intervals come from a bootstrap that resamples images within each group, the same images for every
method. Several base networks (seeds): a method's number is the mean over them, and the interval is Student's over
their paired differences, which holds what training and split change as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairline.audit.accuracy import percentile_interval, relative_drop, student_interval
from fairline.data.grouped import OVERALL, WORST
from fairline.errors import FairlineError

Floats = NDArray[np.float64]

#: Name of the column of the base network, which belongs to every budget.
BASE = "base network"


@dataclass(frozen=True)
class Scored:
    """What the networks of one base network got right.

    Attributes:
        groups: Group of each sample, int64, (n,).
        correct: For each (method, ReLUs kept) whether each sample was right, bool, (n,); the base network under
            :data:`BASE` and its own number of ReLUs.
        total: ReLUs of the base network.
    """

    groups: NDArray[np.int64]
    correct: Mapping[tuple[str, int], NDArray[np.bool_]]
    total: int


def compare(
    replicates: Sequence[Scored],
    group_names: Sequence[str],
    baseline: str,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Every method's accuracy at each budget, and its difference to the baseline.

    Measures, for each group, for ``overall``, and where marked * for ``worst group`` (the group with the lowest
    accuracy, whichever that is under each method):

    - ``accuracy`` *, in [0, 1];
    - ``gain`` *: accuracy less the baseline's at the same budget, in percentage points;
    - ``relative_drop``: against the base network, in percent (paper, Section 5.1);
    - ``mitigation_drop``: ``(J(θ̃ʳ) − J(θ̃ʳ_mit)) / J(θ̃ʳ) · 100`` against the baseline at the same budget; negative where
      the method helps (paper, Section 6);
    - ``beyond_control`` *: the gain less the gain at 100 % of the ReLUs, in points. What a method gains there
      repairs the imbalance of the data; only what it gains beyond that repairs linearization;
    - ``pareto`` (``overall`` only): 1 where no other method at this budget is at least as good both in overall and in
      worst-group accuracy, and better in one.

    Args:
        replicates: One for each base network.
        group_names: Names by index.
        baseline: Method to compare with.
        resamples: Of the bootstrap, where there is one replicate.
        seed: Of the bootstrap.

    Returns:
        Tidy: ``relus``, ``percent``, ``method``, ``group``, ``measure``, ``value``, ``low``, ``high`` (95 %), ``n``
        (samples in a replicate, on average) and ``replicates``.

    Raises:
        FairlineError: A method or budget is missing in one replicate, or the baseline in all.
    """
    columns = _common_columns(replicates)
    total = replicates[0].total
    budgets = sorted({relus for method, relus in columns if method != BASE}, reverse=True)
    methods = [method for method in dict.fromkeys(method for method, _ in columns) if method != BASE]
    if baseline not in methods:
        raise FairlineError(f"There is no method '{baseline}' to compare with; choose one of {', '.join(methods)}.")
    names = [*group_names, OVERALL, WORST]
    rng = np.random.default_rng(seed)

    tables = []
    for replicate in replicates:
        point, draws = _accuracies(replicate, columns, len(group_names), resamples if len(replicates) == 1 else 0, rng)
        tables.append((point, draws))
    sizes = np.mean([np.bincount(r.groups, minlength=len(group_names)) for r in replicates], axis=0)
    n = {**dict(zip(group_names, sizes, strict=True)), OVERALL: sizes.sum(), WORST: math.nan}

    rows = []
    for relus in budgets:
        for method in methods:
            if (method, relus) not in columns:
                continue
            for measure, needed, scale in (
                ("accuracy", [(method, relus)], 1.0),
                ("gain", [(method, relus), (baseline, relus)], 100.0),
                ("relative_drop", [(BASE, total), (method, relus)], 1.0),
                ("mitigation_drop", [(baseline, relus), (method, relus)], 1.0),
                (
                    "beyond_control",
                    [(method, relus), (baseline, relus), (method, total), (baseline, total)],
                    100.0,
                ),
            ):
                if not all(column in columns for column in needed):
                    continue
                if method == baseline and measure in ("gain", "mitigation_drop", "beyond_control"):
                    continue
                if measure == "beyond_control" and relus == total:
                    continue
                values = [
                    scale * _measure(measure, *(point[:, columns.index(column)] for column in needed))
                    for point, _ in tables
                ]
                drawn = None
                if len(replicates) == 1:
                    own = tables[0][1]
                    drawn = scale * _measure(measure, *(own[:, columns.index(column)] for column in needed))
                for position, name in enumerate(names):
                    if name == WORST and measure in ("relative_drop", "mitigation_drop"):
                        continue
                    each = np.array([value[position] for value in values])
                    if drawn is not None:
                        low, high = percentile_interval(drawn[position])
                    else:
                        low, high = student_interval(each)
                    rows.append(
                        {
                            "relus": relus,
                            "percent": 100 * relus / total,
                            "method": method,
                            "group": name,
                            "measure": measure,
                            "value": float(each.mean()),
                            "low": low,
                            "high": high,
                            "n": n[name],
                            "replicates": len(replicates),
                        }
                    )
    frame = pd.DataFrame(rows)
    return pd.concat([frame, pareto(frame)], ignore_index=True)


def pareto(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the measure ``pareto`` for the accuracies of a comparison."""
    accuracy = frame[frame["measure"] == "accuracy"]
    rows = []
    for _, part in accuracy.groupby("relus", sort=False):
        wide = part.pivot_table(index="method", columns="group", values="value", sort=False)
        points = wide[[OVERALL, WORST]].to_numpy()
        for position, method in enumerate(wide.index):
            as_good = (points >= points[position]).all(1) & (points > points[position]).any(1)
            first = part[(part["method"] == method) & (part["group"] == OVERALL)].iloc[0]
            rows.append({**first, "measure": "pareto", "value": float(not as_good.any()), "low": None, "high": None})
    found = pd.DataFrame(rows)
    return found.assign(low=math.nan, high=math.nan)


def _common_columns(replicates: Sequence[Scored]) -> list[tuple[str, int]]:
    columns = list(replicates[0].correct)
    for position, replicate in enumerate(replicates[1:], start=2):
        for column in [*columns, *replicate.correct]:
            if (column in columns) != (column in replicate.correct):
                method, relus = column
                raise FairlineError(
                    f"'{method}' with {relus:,} ReLUs is missing for one of the base networks 1 and {position}; "
                    "compare the same methods and budgets for each."
                )
    return columns


def _accuracies(
    scored: Scored, columns: Sequence[tuple[str, int]], num_groups: int, resamples: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Accuracy of each group, of all, and of the worst: (A + 2, columns), and resampled, (A + 2, columns, B)."""
    correct = np.stack([scored.correct[column] for column in columns], axis=1).astype(np.float64)
    members = [np.flatnonzero(scored.groups == group) for group in range(num_groups)]
    shares = np.array([len(m) for m in members]) / len(correct)

    def whole(by_group: Floats) -> Floats:
        overall = np.tensordot(shares, by_group, axes=1)
        return np.concatenate([by_group, overall[None], by_group.min(0)[None]])

    point = whole(np.stack([correct[m].mean(0) for m in members]))
    drawn = [
        (rng.multinomial(len(m), np.full(len(m), 1 / len(m)), size=resamples) @ correct[m] / len(m)).T
        for m in members
        if resamples
    ]
    return point, whole(np.stack(drawn)) if drawn else np.empty(0)


def _measure(measure: str, *accuracy: Floats) -> Floats:
    if measure in ("relative_drop", "mitigation_drop"):
        return np.asarray(relative_drop(accuracy[0], accuracy[1]))
    if measure == "accuracy":
        return accuracy[0]
    gain = accuracy[0] - accuracy[1]
    return gain if measure == "gain" else gain - (accuracy[2] - accuracy[3])
