"""How far each method lies above the null front, and what a bias shift gives back of what linearization took.

The null front of a budget is that of the baseline's network (plain distillation) with its biases shifted, as
:mod:`fairline.audit.null_front` has it. Measures, in percentage points, as rows of ``comparison.parquet``:

- ``above_null`` (``worst group``): w − F(a) of a method with overall accuracy a and worst-group accuracy w: how much
  more its worst group has than the shift gives at the same overall accuracy. The baseline's own is 0 or less: what a
  shift would give it for nothing.
- ``past_null`` (``overall``): a − max_τ a(τ). Where it is positive no shift has as high an overall accuracy, and
  ``above_null`` is counted from the front's end: it is that at least.
- ``above_null_beyond_control`` (``worst group``): ``above_null`` less that of the same finetune at 100 % of the ReLUs,
  above the null front there.
- ``area_above_null`` and ``mean_above_null`` (``worst group``), of methods that occur with several strengths (labels
  that differ in one number, such as ``lagrangian mu=0.005`` and ``lagrangian mu=0.01``, called ``lagrangian mu=*``):
  the area between their front and the null's, in points times points, and divided by the width of that range, in
  points. Seeds whose fronts have no overall accuracy in common are left out of both.
- ``drop_points``, ``undone``, ``undone_beyond_base`` (each group, ``overall``, ``worst group``): the base network's
  accuracy less the method's; what shifting the method's biases by τ̂ gives back, acc(τ̂) − acc(0), with τ̂ as
  :func:`fairline.adjust` chooses it on the validation part; and that less what the *same* shift gives the base network.
  What a shift gives both was in the data; what it gives the linearized network beyond that was moved by linearization
  and by the further training, which the same numbers of the control at 100 % of the ReLUs tell apart. ``tau``
  (``overall``) is τ̂.

One base network: limits are percentiles over draws of the images, the same for all networks in a number. Several: each
gives one number, and limits are Student's over these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairline.audit.comparison import BASE, Column, whole_of
from fairline.audit.intervals import Floats, draw, mean_interval, percentile_interval, pooled
from fairline.audit.null_front import area_between, front, right_at
from fairline.data.grouped import OVERALL, WORST
from fairline.objectives.post_hoc import TAUS

#: A network, shifted by a τ, or by the τ that was chosen for a network.
At = tuple[Column, float | Column]


@dataclass(frozen=True)
class Shiftable:
    """What the networks of one base network get right when their biases are shifted.

    Attributes:
        groups: Group of each sample, int64, (n,).
        between: For each (method, ReLUs kept) the lowest and the highest τ at which each sample is right, (n,) each, as
            of :func:`fairline.audit.null_front.right_between`. The base network under
            :data:`~fairline.audit.comparison.BASE` and its own number of ReLUs.
        taus: For each, the τ chosen on the validation part; empty where none could be.
        total: ReLUs of the base network.
    """

    groups: NDArray[np.int64]
    between: Mapping[Column, tuple[Floats, Floats]]
    taus: Mapping[Column, float]
    total: int

    def right(self, networks: Sequence[At]) -> NDArray[np.bool_]:
        """What each of some shifted networks gets right, (n, M)."""
        taus = [self.taus[tau] if isinstance(tau, tuple) else tau for _, tau in networks]
        return np.stack([right_at(self.between[own], tau) for (own, _), tau in zip(networks, taus, strict=True)], 1)


def above_null(
    replicates: Sequence[Shiftable],
    group_names: Sequence[str],
    baseline: str,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Every method against the null front of its budget, and what a shift undoes.

    Args:
        replicates: One for each base network, with the same methods and budgets.
        group_names: Names by index.
        baseline: The method whose shifted networks are the null front.
        resamples: Draws, where there is one replicate.
        seed: Of the draws.

    Returns:
        Rows as of :func:`fairline.audit.comparison.compare`, with the measures of the module's table. Budgets that the
        baseline does not have are left out.
    """
    columns = list(replicates[0].between)
    total = replicates[0].total
    rows = []
    for number in _numbers(columns, baseline, total, group_names, all(each.taus for each in replicates)):
        points = np.stack([_accuracies(each, number.networks, len(group_names)) for each in replicates], axis=-1)
        values = number.of(points)
        if len(replicates) == 1:
            drawn = _drawn(replicates[0], number, len(group_names), resamples, seed)
            limits = [percentile_interval(each) for each in number.of(drawn)]
        else:
            limits = [mean_interval(each[np.isfinite(each)]) for each in values]
        for who, measure, each, (low, high) in zip(number.who, number.measures, values, limits, strict=True):
            there = each[np.isfinite(each)]
            if len(there):
                told = {"group": who, "class": "", "measure": measure, "value": float(there.mean())}
                rows.append({**number.about, **told, "low": low, "high": high, "replicates": len(there)})
        if number.tau is not None:
            own = np.asarray([each.taus[number.tau] for each in replicates])
            low, high = mean_interval(own, least=TAUS[0], most=TAUS[-1])
            told = {"group": OVERALL, "class": "", "measure": "tau", "value": float(own.mean())}
            rows.append({**number.about, **told, "low": low, "high": high, "replicates": len(own)})
    return pd.DataFrame(rows).assign(n=_sizes(rows, replicates, group_names)) if rows else pd.DataFrame()


@dataclass(frozen=True)
class _Number:
    """Numbers that are made of the accuracies of some shifted networks.

    Attributes:
        about: Budget and method, as in the table.
        measures: What each number is called.
        who: Whom each speaks of.
        networks: M of them.
        signs: For each, 1 where the numbers grow with its accuracy, −1 where they fall.
        of: The numbers, (numbers, B), of accuracies (A + 2, M, B): each group's, all's, the worst group's.
        tau: Whose chosen τ belongs to them.
    """

    about: Mapping[str, Any]
    measures: Sequence[str]
    who: Sequence[str]
    networks: Sequence[At]
    signs: Sequence[int]
    of: Callable[[Floats], Floats]
    tau: Column | None = None


def _numbers(
    columns: Sequence[Column], baseline: str, total: int, group_names: Sequence[str], chosen: bool
) -> Iterator[_Number]:
    """All that the table has rows of."""
    methods = list(dict.fromkeys(method for method, _ in columns if method != BASE))
    for relus in sorted({relus for method, relus in columns if method != BASE}, reverse=True):
        here = [method for method in methods if (method, relus) in columns]
        about = {"relus": relus, "percent": 100 * relus / total}
        null = _family((baseline, relus))
        for method in here:
            own = (method, relus)
            if baseline in here:
                yield _distance({**about, "method": method}, own, null, method == baseline)
                wholes = [whole_of(each, columns, total) for each in (method, baseline)]
                if relus != total and all(whole in columns for whole in wholes):
                    yield _beyond_control({**about, "method": method}, own, null, wholes[0], _family(wholes[1]))
            if chosen:
                yield _undone({**about, "method": method}, own, (BASE, total), group_names)
        if baseline in here:
            for name, alike in curves(here).items():
                yield _area({**about, "method": name}, [((method, relus), 0.0) for method in alike], null)


def _family(own: Column) -> list[At]:
    """A network under every strength."""
    return [(own, tau) for tau in TAUS]


def _above(levels: Floats, own: int, null: slice) -> Floats:
    """How far a network lies above a front, in points."""
    overall, worst = levels[-2], levels[-1]
    return np.asarray(100 * (worst[own] - front(overall[own], overall[null], worst[null])))


def _distance(about: Mapping[str, Any], own: Column, null: Sequence[At], itself: bool) -> _Number:
    """Of one method from the null front, whose part the baseline itself is."""

    def of(levels: Floats) -> Floats:
        above, past = _above(levels, 0, slice(1, None)), 100 * (levels[-2, 0] - levels[-2, 1:].max(0))
        return np.minimum([above, past], 0) if itself else np.stack([above, past])

    signs = [1, *[-1] * len(null)]
    return _Number(about, ("above_null", "past_null"), (WORST, OVERALL), [(own, 0.0), *null], signs, of)


def _beyond_control(
    about: Mapping[str, Any], own: Column, null: Sequence[At], whole: Column, null_whole: Sequence[At]
) -> _Number:
    """That distance less the control's."""
    second = 1 + len(null)

    def of(levels: Floats) -> Floats:
        return _above(levels, 0, slice(1, second))[None] - _above(levels, second, slice(second + 1, None))

    networks = [(own, 0.0), *null, (whole, 0.0), *null_whole]
    signs = [1, *[-1] * len(null), -1, *[1] * len(null_whole)]
    return _Number(about, ("above_null_beyond_control",), (WORST,), networks, signs, of)


def _area(about: Mapping[str, Any], own: Sequence[At], null: Sequence[At]) -> _Number:
    """Between a method's front over its strengths and the null's."""
    count = len(own)

    def of(levels: Floats) -> Floats:
        overall, worst = levels[-2], levels[-1]
        area, width = area_between(overall[:count], worst[:count], overall[count:], worst[count:])
        return np.stack([1e4 * area, 100 * area / width])

    signs = [*[1] * count, *[-1] * len(null)]
    return _Number(about, ("area_above_null", "mean_above_null"), (WORST, WORST), [*own, *null], signs, of)


def _undone(about: Mapping[str, Any], own: Column, base: Column, group_names: Sequence[str]) -> _Number:
    """What the chosen shift gives back to everyone."""
    who = [*group_names, OVERALL, WORST]

    def of(levels: Floats) -> Floats:
        plain, moved, before, before_moved = 100 * levels.transpose(1, 0, 2)
        return np.concatenate([before - plain, moved - plain, moved - plain - (before_moved - before)])

    measures = np.repeat(["drop_points", "undone", "undone_beyond_base"], len(who)).tolist()
    networks: list[At] = [(own, 0.0), (own, own), (base, 0.0), (base, own)]
    return _Number(about, measures, who * 3, networks, [-1, 1, 1, -1], of, own)


def curves(methods: Sequence[str]) -> dict[str, list[str]]:
    """Methods that are one with several strengths.

    >>> curves(["erm", "lagrangian mu=0.005", "lagrangian mu=0.01", "lagrangian mu=0.01 cap=1"])
    {'lagrangian mu=*': ['lagrangian mu=0.005', 'lagrangian mu=0.01']}

    Args:
        methods: Labels; see :func:`fairline.jobs.method_names.method_label`.

    Returns:
        Labels that differ in one number, by their label with a star there.
    """
    found: dict[str, list[str]] = {}
    for method in methods:
        for number in re.finditer(r"(?<==)-?\d[\d.]*(?:e[-+]?\d+)?(?=[ ,:]|$)", method):
            found.setdefault(f"{method[: number.start()]}*{method[number.end() :]}", []).append(method)
    return {name: alike for name, alike in found.items() if len(alike) > 1}


def _with_all(by_group: Floats, overall: Floats) -> Floats:
    """Accuracies of each group, of all and of the worst group, (A + 2, M, …)."""
    return np.concatenate([by_group, overall[None], by_group.min(0)[None]])


def _accuracies(each: Shiftable, networks: Sequence[At], num_groups: int) -> Floats:
    """Of each group, all and the worst group, (A + 2, M)."""
    right = each.right(networks)
    by_group = np.stack([right[each.groups == group].mean(0) for group in range(num_groups)])
    return _with_all(by_group, right.mean(0))


def _drawn(each: Shiftable, number: _Number, num_groups: int, draws: int, seed: int) -> Floats:
    """Of each group, all and the worst group over draws of the images, (A + 2, M, draws)."""
    rng = np.random.default_rng(seed)
    right = each.right(number.networks)
    parts = [draw(right[each.groups == group], draws, rng) for group in range(num_groups)]
    every = range(len(number.networks))
    by_group = np.stack([part.shares(every, number.signs) for part in parts])
    return _with_all(by_group, pooled(parts, rng).shares(every, number.signs))


def _sizes(
    rows: Sequence[Mapping[str, Any]], replicates: Sequence[Shiftable], group_names: Sequence[str]
) -> list[float]:
    """Samples that each row speaks of, on average over the replicates; nothing of the worst group."""
    counts = np.mean([np.bincount(each.groups, minlength=len(group_names)) for each in replicates], axis=0)
    sizes = {**dict(zip(group_names, counts, strict=True)), OVERALL: counts.sum(), WORST: math.nan}
    return [float(sizes[row["group"]]) for row in rows]


__all__ = ["At", "Shiftable", "above_null", "curves"]
