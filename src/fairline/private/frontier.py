"""Accuracy against cost: which network is worth its price, and which is the cheapest that may ship."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fairline.audit.cells import named
from fairline.audit.verdict import MAY, Verdict, require_within, verdict
from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError
from fairline.private.cost import COSTS

#: Name of the base network in an audit.
BASE = "base"


def pareto(cost: Sequence[float], score: Sequence[float]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which points no other point beats: at most the cost and at least the score, and better in one.

    Args:
        cost: Less is better, (N,); a point of unknown cost (NaN) is on no front.
        score: More is better, (N,).

    Returns:
        bool, (N,).

    >>> pareto([1, 2, 2, float("nan")], [0.6, 0.9, 0.8, 1.0]).tolist()
    [True, True, False, False]
    """
    costs, scores = np.asarray(cost, float)[:, None], np.asarray(score, float)[:, None]
    beats = (costs <= costs.T) & (scores >= scores.T) & ((costs < costs.T) | (scores > scores.T))
    return ~beats.any(0) & ~np.isnan(costs[:, 0]) & ~np.isnan(scores[:, 0])


def frontier(audit: pd.DataFrame, costs: pd.DataFrame, counted: pd.DataFrame | None = None) -> pd.DataFrame:
    """Put accuracies beside costs.

    Args:
        audit: Tidy rows of an audit (``AuditReport.to_frame()``): ``model``, ``group``, ``measure``, ``value``,
            ``low``, ``high``.
        costs: A row for each network and protocol: ``model``, ``protocol``, ``bytes``, ``rounds``, ``seconds``, and
            whatever else is worth keeping.
        counted: :func:`fairline.audit.cells.cells` of each network with its ``model``, of the base network too, if
            classes are to count.

    Returns:
        The rows of ``costs`` with ``overall`` and ``worst`` accuracy and the ``worst_group``; ``lowest`` and
        ``lowest_who``, the lowest accuracy of any group or recall of any class, and whose it is; ``largest_drop``, the
        largest relative accuracy drop of any group in percent, with its ``drop_group`` and ``drop_high``, the largest
        upper 95 % limit of any group's drop; and ``on_bytes_front``, ``on_rounds_front``, ``on_seconds_front``: whether
        no other network on that protocol is as cheap with as high a ``lowest``.

    Raises:
        FairlineError: A network has a cost and no accuracy.
    """
    rows = []
    by_model = dict(list(audit.groupby("model", sort=False)))
    sets = {} if counted is None else dict(list(counted.groupby("model", sort=False)))
    for cost in costs.to_dict("records"):
        own = by_model.get(cost["model"])
        if own is None:
            raise FairlineError(f"The audit has no network '{cost['model']}'.")
        accuracy = own[own["measure"] == "accuracy"].set_index("group")["value"]
        groups = accuracy.drop(OVERALL)
        drops = own[(own["measure"] == "relative_drop") & (own["group"] != OVERALL)].set_index("group")
        drops = drops.dropna(subset=["value"])
        rows.append(
            {
                **cost,
                "overall": accuracy[OVERALL],
                "worst": groups.min(),
                "worst_group": groups.idxmin(),
                **_lowest(groups, sets.get(cost["model"])),
                # The base network itself loses nothing.
                "largest_drop": drops["value"].max() if len(drops) else 0.0,
                "drop_group": drops["value"].idxmax() if len(drops) else "",
                "drop_high": drops["high"].max() if len(drops) else 0.0,
            }
        )
    table = pd.DataFrame(rows)
    for cost in COSTS:
        front = pd.Series(False, index=table.index)
        for _, part in table.groupby("protocol", sort=False):
            front.loc[part.index] = pareto(part[cost].tolist(), part["lowest"].tolist())
        table[f"on_{cost}_front"] = front
    return table


def _lowest(groups: pd.Series[float], counted: pd.DataFrame | None) -> dict[str, Any]:
    """The lowest of groups and, where they were counted, classes."""
    found = {"lowest": groups.min(), "lowest_who": named({"kind": "group", "group": groups.idxmin()})}
    classes = None if counted is None else counted[counted["kind"] == "class"]
    if classes is None or classes.empty:
        return found
    recall = classes["after"] / classes["n"]
    if recall.min() < found["lowest"]:
        found = {"lowest": recall.min(), "lowest_who": named(classes.loc[recall.idxmin()])}
    return found


def verdicts(counted: pd.DataFrame, within: float = 5.0, critical: Sequence[str] = ()) -> dict[str, Verdict]:
    """Judge each network that was made of the base network.

    Args:
        counted: :func:`fairline.audit.cells.cells` of each network, with its ``model``; the base network's own have
            none lost and are passed over.
        within: Loss that is tolerated, in percentage points.
        critical: Classes whose recall may not fall.

    Returns:
        Verdicts by network.

    Raises:
        FairlineError: The tolerance is none, or there is no such class.
    """
    require_within(within)
    made = counted[counted["model"] != BASE]
    return {
        str(name): verdict([part.reset_index(drop=True)], within, critical)
        for name, part in made.groupby("model", sort=False)
    }


def judge(table: pd.DataFrame, judged: Mapping[str, Verdict]) -> pd.DataFrame:
    """Put verdicts beside costs.

    Args:
        table: From :func:`frontier`.
        judged: From :func:`verdicts`.

    Returns:
        The rows with ``answer`` (``may ship``, ``may not ship``, ``cannot tell``; empty for the base network) and, of
        the set of images that decides it, ``largest_loss``, what it loses in percentage points (below 0 where it
        gains), its 95 % limits ``loss_low`` and ``loss_high``, and ``loss_who``, which set it is.
    """
    rows = []
    for model in table["model"]:
        own = judged.get(model)
        cell = None if own is None else own.decisive
        rows.append(
            {
                "answer": "" if own is None else own.answer,
                "largest_loss": math.nan if cell is None else -cell["change"],
                "loss_low": math.nan if cell is None else -cell["high"],
                "loss_high": math.nan if cell is None else -cell["low"],
                "loss_who": "" if cell is None else named(cell),
            }
        )
    return table.assign(**pd.DataFrame(rows, index=table.index))


def cheapest(table: pd.DataFrame, *, cost: str = "bytes") -> dict[str, Any] | None:
    """The cheapest network that may ship.

    Args:
        table: From :func:`judge`, of one protocol.
        cost: ``"bytes"``, ``"rounds"`` or ``"seconds"``.

    Returns:
        Its row, or None where there is none. A network that keeps all its ReLUs is none to choose. Of equally cheap
        networks, the one that loses least.

    Raises:
        FairlineError: There is no such cost.
    """
    if cost not in COSTS:
        raise FairlineError(f"A cost is one of {', '.join(COSTS)}, not '{cost}'.")
    kept = table[(table["answer"] == MAY) & table[cost].notna() & (table["relus"] < table["total_relus"])]
    if kept.empty:
        return None
    row: dict[str, Any] = kept.sort_values([cost, "largest_loss"], kind="stable").iloc[0].to_dict()
    return row
