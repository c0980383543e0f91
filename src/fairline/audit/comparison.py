"""Methods side by side at equal ReLU budgets: paired differences, the paper's second formula, the Pareto front.

The formulas are those of the paper's Sections 5.1 and 6. One base network: limits are those of
:mod:`fairline.audit.intervals`, which draws the same images for every method. Several base networks (seeds): a method's
number is the mean over them, and the interval is Student's over their paired differences, which holds what training and
split change as well.

The measures of :func:`compare`, for each group, for ``overall``, and where marked * for ``worst group`` (the group with
the lowest accuracy, whichever that is under each method), for each class, and for each class in each group:

- ``accuracy`` *, in [0, 1]; of a class it is called ``recall``;
- ``gain`` *: accuracy less the baseline's at the same budget, in percentage points;
- ``relative_drop``: against the base network, in percent (paper, Section 5.1);
- ``mitigation_drop``: ``(J(θ̃ʳ) − J(θ̃ʳ_mit)) / J(θ̃ʳ) · 100`` against the baseline at the same budget; negative where
  the method helps (paper, Section 6);
- ``beyond_control`` *: the gain less the gain at 100 % of the ReLUs, in points. What a method gains there
  repairs the imbalance of the data; only what it gains beyond that repairs linearization;
- ``balanced_accuracy`` (``overall`` only): the mean of the classes' recalls, in [0, 1];
- ``pareto`` (``overall`` only): 1 where no other method at this budget is at least as good both in overall and in
  worst-group accuracy, and better in one.
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
from fairline.audit.cells import cells
from fairline.audit.intervals import (
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
        labels: Class of each sample, int64, (n,), if classes are compared as well.
    """

    groups: NDArray[np.int64]
    correct: Mapping[Column, NDArray[np.bool_]]
    total: int
    labels: NDArray[np.int64] | None = None

    @property
    def classes(self) -> list[int]:
        """Labels that there are; none where classes are not compared."""
        return [] if self.labels is None else [int(label) for label in np.unique(self.labels)]

    def inside(self, group: int | None, label: int) -> NDArray[np.bool_]:
        """Which samples are of a class, in one group or in all."""
        of_class = self.labels == label
        return np.asarray(of_class if group is None else of_class & (self.groups == group), bool)


def compare(
    replicates: Sequence[Scored],
    group_names: Sequence[str],
    baseline: str,
    *,
    class_names: Sequence[str] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Every method's accuracy at each budget, and its difference to the baseline.

    Measures are those of the module's table.

    Args:
        replicates: One for each base network.
        group_names: Names by index.
        baseline: Method to compare with.
        class_names: Names by index of :attr:`Scored.labels`, if there are any.
        resamples: Draws, where there is one replicate.
        seed: Of the draws.

    Returns:
        Tidy: ``relus``, ``percent``, ``method``, ``group``, ``class`` (empty for all; a class has rows under
        ``overall``, and under each group that it does not fill or that does not fill it), ``measure``, ``value``,
        ``low``, ``high`` (95 %), ``n`` (samples in a replicate, on average) and ``replicates``.

    Raises:
        FairlineError: A method or budget is missing in one replicate, or the baseline in all.
    """
    columns = _common_columns(replicates)
    sets = _class_sets(replicates)
    labelled = all(replicate.classes for replicate in replicates)
    names = [(name, "") for name in (*group_names, OVERALL, WORST)]
    names += [(OVERALL if group is None else group_names[group], class_names[label]) for group, label in sets]
    points = [_shares(replicate, columns, len(group_names), sets) for replicate in replicates]
    drawn = _Draws(replicates[0], columns, len(group_names), sets, resamples, seed) if len(replicates) == 1 else None
    sizes = np.mean([_sizes(replicate, len(group_names), sets) for replicate in replicates], axis=0)
    rows = []
    for own, measure, needed in _contrasts(columns, baseline, replicates[0].total):
        networks = [columns.index(column) for column in needed]
        values = np.stack([measure.of(*point[:, networks].T) for point in points], axis=1)
        found = [
            (
                *names[at],
                measure.called(names[at][1]),
                values[at],
                None if drawn is None else drawn.limits(measure, networks, at),
                sizes[at],
            )
            for at in range(len(names))
            if measure.speaks_of(*names[at])
        ]
        if labelled and measure.name == "accuracy":
            each = np.asarray([_recalls(replicate, needed[0]).mean() for replicate in replicates])
            limits = None if drawn is None else drawn.balanced_limits(networks)
            found.append((OVERALL, "", "balanced_accuracy", each, limits, sizes[len(group_names)]))
        rows += [_row(own, *one) for one in found]
    frame = pd.DataFrame(rows)
    return pd.concat([frame, pareto(frame)], ignore_index=True)


def _row(
    own: Mapping[str, Any],
    group: str,
    label: str,
    measure: str,
    each: Floats,
    limits: tuple[float, float] | None,
    n: float,
) -> dict[str, Any]:
    """A row of the table; ``each`` is a value a replicate, between which the limits lie where images give none."""
    low, high = mean_interval(each) if limits is None else limits
    value = float(each.mean())
    low, high = (math.nan, math.nan) if math.isnan(value) else (low, high)
    row = {**own, "group": group, "class": label, "measure": measure, "value": value}
    return {**row, "low": low, "high": high, "n": n, "replicates": len(each)}


@dataclass(frozen=True)
class _Measure:
    """A number that is made of the accuracies of some networks on the same images.

    Attributes:
        name: As in the table.
        of: The number, from the networks' accuracies, arrays of one shape.
        networks: Which networks, in the words of :func:`_contrasts`.
        signs: For each network, 1 where the number grows with its accuracy, −1 where it falls.
        of_more: Whether it speaks of the worst group and of classes as well.
        of_baseline: Whether the baseline has it.
    """

    name: str
    of: Callable[..., Floats]
    networks: tuple[str, ...]
    signs: tuple[int, ...]
    of_more: bool = True
    of_baseline: bool = False

    def called(self, label: str) -> str:
        """Its name of a class, or of all."""
        return "recall" if label and self.name == "accuracy" else self.name

    def speaks_of(self, group: str, label: str) -> bool:
        """Whether it has a row for a group, and a class or all."""
        return self.of_more or (group != WORST and not label)


_MEASURES = (
    _Measure("accuracy", lambda own: own, ("own",), (1,), of_baseline=True),
    _Measure("gain", lambda own, other: 100 * (own - other), ("own", "other"), (1, -1)),
    _Measure("relative_drop", relative_drop, ("base", "own"), (1, -1), of_more=False, of_baseline=True),
    _Measure("mitigation_drop", relative_drop, ("other", "own"), (1, -1), of_more=False),
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
            "own whole": whole_of(method, columns, total),
            "other whole": whole_of(baseline, columns, total),
        }
        needed = [named[network] for network in measure.networks]
        if (method == baseline and not measure.of_baseline) or not all(column in columns for column in needed):
            continue
        # At 100 % of the ReLUs a method is its own control.
        if len(set(needed)) == len(needed):
            yield {"relus": relus, "percent": 100 * relus / total, "method": method}, measure, needed


def whole_of(method: str, columns: Sequence[Column], total: int) -> Column:
    """The network that kept all its ReLUs and was finetuned as a method does.

    With all ReLUs kept nothing is left of how masks were found, so one control does for all ways to place them.

    >>> whole_of("masks for cheetah's seconds, erm", [("random: lagrangian mu=0.5", 90), ("random: erm", 90)], 90)
    ('random: erm', 90)

    Args:
        method: As :func:`fairline.jobs.method_names.method_label` calls it.
        columns: Those that there are.
        total: ReLUs of the base network.

    Returns:
        Its column; where there is none, a column that does not exist.
    """
    alike = [each for each, relus in columns if relus == total and _finetune(each) == _finetune(method)]
    return (method if method in alike or not alike else alike[0]), total


def _finetune(method: str) -> str:
    """What a method does beside placing ReLUs: the end of its name.

    >>> _finetune("random: masks layers emptied=0.3, lagrangian mu=0.5, labels only")
    'lagrangian mu=0.5, labels only'

    Returns:
        It; see :func:`fairline.jobs.method_names.method_label`.
    """
    parts = method.rpartition(": ")[2].split(", ")
    return ", ".join(parts[1:] if parts[0].startswith("masks ") else parts)


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


def _class_sets(replicates: Sequence[Scored]) -> list[tuple[int | None, int]]:
    """The sets of :func:`fairline.audit.cells.cells` that are no groups: a group, or None for all, and a class."""
    if not all(replicate.classes for replicate in replicates):
        return []
    images = [
        pd.DataFrame({"group": each.groups, "label": each.labels, "correct": False, "reference_correct": False})
        for each in replicates
    ]
    found = cells(pd.concat(images))
    found = found[found["kind"].isin(["class", "cell"])]
    pairs = found[["kind", "group", "class"]].itertuples(index=False, name=None)
    sets = [(None if kind == "class" else int(group), int(label)) for kind, group, label in pairs]
    # What a split leaves without an image in one replicate is not compared.
    return [own for own in sets if all(replicate.inside(*own).any() for replicate in replicates)]


def _shares(
    scored: Scored, columns: Sequence[Column], num_groups: int, sets: Sequence[tuple[int | None, int]]
) -> Floats:
    """What is right of each group, of all, of the worst group and of each class set, (A + 2 + sets, columns)."""
    correct = _stacked(scored, columns).astype(np.float64)
    by_group = np.stack([correct[scored.groups == group].mean(0) for group in range(num_groups)])
    others = [correct[scored.inside(*own)].mean(0) for own in sets]
    return np.stack([*by_group, correct.mean(0), by_group.min(0), *others])


def _sizes(scored: Scored, num_groups: int, sets: Sequence[tuple[int | None, int]]) -> Floats:
    """Samples of each group, all, nothing of the worst, and of each class set."""
    sizes = np.bincount(scored.groups, minlength=num_groups)
    return np.asarray([*sizes, sizes.sum(), math.nan, *(scored.inside(*own).sum() for own in sets)], float)


def _recalls(scored: Scored, column: Column) -> Floats:
    """Recall of each class that has a sample."""
    correct = scored.correct[column]
    return np.asarray([correct[scored.inside(None, label)].mean() for label in scored.classes])


def _stacked(scored: Scored, columns: Sequence[Column]) -> NDArray[np.bool_]:
    return np.stack([scored.correct[column] for column in columns], axis=1)


class _Draws:
    """Draws of the images of each group, of all, of each class set and of each class, for one base network."""

    def __init__(
        self,
        scored: Scored,
        columns: Sequence[Column],
        num_groups: int,
        sets: Sequence[tuple[int | None, int]],
        draws: int,
        seed: int,
    ) -> None:
        rng = np.random.default_rng(seed)
        correct = _stacked(scored, columns)
        self._groups = [draw(correct[scored.groups == group], draws, rng) for group in range(num_groups)]
        self._all = pooled(self._groups, rng)
        self._sets = [draw(correct[scored.inside(*own)], draws, rng) for own in sets]
        self._classes = [draw(correct[scored.inside(None, label)], draws, rng) for label in scored.classes]

    def limits(self, measure: _Measure, networks: list[int], position: int) -> tuple[float, float]:
        """95 % limits over images of what stands at a position of :func:`_shares`."""
        if position == len(self._groups) + 1:
            return self._worst(measure, networks)
        drawn = [*self._groups, self._all, None, *self._sets][position]
        assert drawn is not None
        return percentile_interval(measure.of(*drawn.shares(networks, measure.signs)))

    def _worst(self, measure: _Measure, networks: list[int]) -> tuple[float, float]:
        by_group = np.stack([group.shares(networks, measure.signs) for group in self._groups])
        if len(networks) == 1:
            return lowest_interval(measure.of(by_group[:, 0]))
        # The worst groups of several networks: what biases each of them cancels in their difference.
        return percentile_interval(measure.of(*by_group.min(0)))

    def balanced_limits(self, networks: list[int]) -> tuple[float, float]:
        """95 % limits over images of the mean of the classes' recalls."""
        return percentile_interval(np.mean([own.shares(networks, [1])[0] for own in self._classes], axis=0))
