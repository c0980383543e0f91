"""Methods side by side at equal ReLU budgets: paired differences, the paper's second formula, the Pareto front.

The formulas are those of the paper's Sections 5.1 and 6. One base network: limits are those of
:mod:`fairline.audit.intervals`, which draws the same images for every method. Several base networks (seeds): a method's
number is the mean over them, and the interval is Student's over their paired differences, which holds what training and
split change as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairline.audit.accuracy import relative_drop
from fairline.audit.intervals import (
    Drawn,
    Floats,
    draw,
    lowest_interval,
    mean_interval,
    percentile_interval,
    pooled,
)
from fairline.data.grouped import OVERALL, WORST
from fairline.errors import FairlineError

#: Method and ReLUs kept.
Column = tuple[str, int]

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
    correct: Mapping[Column, NDArray[np.bool_]]
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
        resamples: Draws, where there is one replicate.
        seed: Of the draws.

    Returns:
        Tidy: ``relus``, ``percent``, ``method``, ``group``, ``measure``, ``value``, ``low``, ``high`` (95 %), ``n``
        (samples in a replicate, on average) and ``replicates``.

    Raises:
        FairlineError: A method or budget is missing in one replicate, or the baseline in all.
    """
    columns = _common_columns(replicates)
    names = [*group_names, OVERALL, WORST]
    points = [_accuracies(replicate, columns, len(group_names)) for replicate in replicates]
    drawn = _drawn(replicates[0], columns, len(group_names), resamples, seed) if len(replicates) == 1 else None
    sizes = np.mean([np.bincount(r.groups, minlength=len(group_names)) for r in replicates], axis=0)
    n = {**dict(zip(group_names, sizes, strict=True)), OVERALL: sizes.sum(), WORST: math.nan}
    rows = []
    for own, measure, needed in _contrasts(columns, baseline, replicates[0].total):
        networks = [columns.index(column) for column in needed]
        values = np.stack([measure.of(*point[:, networks].T) for point in points], axis=1)
        for position, name in enumerate(names):
            if name == WORST and not measure.of_worst:
                continue
            each = values[position]
            low, high = mean_interval(each) if drawn is None else _limits(measure, networks, drawn, position)
            row = {**own, "group": name, "measure": measure.name, "value": float(each.mean()), "low": low, "high": high}
            rows.append({**row, "n": n[name], "replicates": len(replicates)})
    frame = pd.DataFrame(rows)
    return pd.concat([frame, pareto(frame)], ignore_index=True)


@dataclass(frozen=True)
class _Measure:
    """A number that is made of the accuracies of some networks on the same images.

    Attributes:
        name: As in the table.
        of: The number, from the networks' accuracies, arrays of one shape.
        networks: Which networks, in the words of :func:`_contrasts`.
        signs: For each network, 1 where the number grows with its accuracy, −1 where it falls.
        of_worst: Whether it speaks of the worst group as well.
        of_baseline: Whether the baseline has it.
    """

    name: str
    of: Callable[..., Floats]
    networks: tuple[str, ...]
    signs: tuple[int, ...]
    of_worst: bool = True
    of_baseline: bool = False


_MEASURES = (
    _Measure("accuracy", lambda own: own, ("own",), (1,), of_baseline=True),
    _Measure("gain", lambda own, other: 100 * (own - other), ("own", "other"), (1, -1)),
    _Measure("relative_drop", relative_drop, ("base", "own"), (1, -1), of_worst=False, of_baseline=True),
    _Measure("mitigation_drop", relative_drop, ("other", "own"), (1, -1), of_worst=False),
    _Measure(
        "beyond_control",
        lambda own, other, own_whole, other_whole: 100 * ((own - other) - (own_whole - other_whole)),
        ("own", "other", "own whole", "other whole"),
        (1, -1, -1, 1),
    ),
)


def _contrasts(
    columns: Sequence[Column], baseline: str, total: int
) -> Iterator[tuple[dict[str, Any], _Measure, list[Column]]]:
    """What the table has rows of: budget and method, a measure, and the networks that it needs."""
    methods = [method for method in dict.fromkeys(method for method, _ in columns) if method != BASE]
    if baseline not in methods:
        raise FairlineError(f"There is no method '{baseline}' to compare with; choose one of {', '.join(methods)}.")
    budgets = sorted({relus for method, relus in columns if method != BASE}, reverse=True)
    for relus, method, measure in product(budgets, methods, _MEASURES):
        named = {
            "own": (method, relus),
            "other": (baseline, relus),
            "base": (BASE, total),
            "own whole": (method, total),
            "other whole": (baseline, total),
        }
        needed = [named[network] for network in measure.networks]
        if (method == baseline and not measure.of_baseline) or not all(column in columns for column in needed):
            continue
        # At 100 % of the ReLUs a method is its own control.
        if len(set(needed)) == len(needed):
            yield {"relus": relus, "percent": 100 * relus / total, "method": method}, measure, needed


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


def _common_columns(replicates: Sequence[Scored]) -> list[Column]:
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


def _accuracies(scored: Scored, columns: Sequence[Column], num_groups: int) -> Floats:
    """Accuracy of each group, of all, and of the worst, (A + 2, columns)."""
    correct = np.stack([scored.correct[column] for column in columns], axis=1).astype(np.float64)
    by_group = np.stack([correct[scored.groups == group].mean(0) for group in range(num_groups)])
    return np.concatenate([by_group, correct.mean(0)[None], by_group.min(0)[None]])


def _drawn(scored: Scored, columns: Sequence[Column], num_groups: int, draws: int, seed: int) -> list[Drawn]:
    """Draws of the images of each group, and of all."""
    rng = np.random.default_rng(seed)
    correct = np.stack([scored.correct[column] for column in columns], axis=1)
    groups = [draw(correct[scored.groups == group], draws, rng) for group in range(num_groups)]
    return [*groups, pooled(groups, rng)]


def _limits(measure: _Measure, networks: list[int], drawn: list[Drawn], position: int) -> tuple[float, float]:
    """95 % limits over images for the group at a position, all images, or the worst group."""
    if position < len(drawn):
        return percentile_interval(measure.of(*drawn[position].shares(networks, measure.signs)))
    by_group = np.stack([group.shares(networks, measure.signs) for group in drawn[:-1]])
    if len(networks) == 1:
        return lowest_interval(measure.of(by_group[:, 0]))
    # The worst groups of several networks: what biases each of them cancels in their difference.
    return percentile_interval(measure.of(*by_group.min(0)))
