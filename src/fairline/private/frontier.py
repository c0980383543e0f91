"""Accuracy against cost: which network is worth its price, and which is the cheapest that no group pays for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError
from fairline.private.cost import COSTS


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


def frontier(audit: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Put accuracies beside costs.

    Args:
        audit: Tidy rows of an audit (``AuditReport.to_frame()``): ``model``, ``group``, ``measure``, ``value``,
            ``low``, ``high``.
        costs: A row for each network and protocol: ``model``, ``protocol``, ``bytes``, ``rounds``, ``seconds``, and
            whatever else is worth keeping.

    Returns:
        The rows of ``costs`` with ``overall`` and ``worst`` accuracy and the ``worst_group``; ``largest_drop``, the
        largest relative accuracy drop of any group in percent, with its ``drop_group`` and ``drop_high``, the largest
        upper 95 % limit of any group's drop; and ``on_bytes_front``, ``on_rounds_front``, ``on_seconds_front``: whether
        no other network on that protocol is as cheap with as high a worst-group accuracy.

    Raises:
        FairlineError: A network has a cost and no accuracy.
    """
    rows = []
    by_model = dict(list(audit.groupby("model", sort=False)))
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
            front.loc[part.index] = pareto(part[cost].tolist(), part["worst"].tolist())
        table[f"on_{cost}_front"] = front
    return table


def require_within(within: float) -> None:
    """Refuse a limit that is no percentage.

    Raises:
        FairlineError: It is negative or no finite number.
    """
    if not within >= 0 or math.isinf(within):
        raise FairlineError(f"The drop that a group may suffer is a percentage from 0 on, not {within:g}.")


def cheapest(table: pd.DataFrame, within: float, *, cost: str = "bytes", sure: bool = False) -> dict[str, Any] | None:
    """The cheapest network that keeps every group's accuracy.

    Args:
        table: From :func:`frontier`, of one protocol.
        within: Largest relative accuracy drop, in percent, that any group may suffer against the base network.
        cost: ``"bytes"``, ``"rounds"`` or ``"seconds"``.
        sure: Hold every group's upper 95 % limit to it, not only the drop that was measured.

    Returns:
        Its row, or None where there is none. Of equally cheap networks, the one whose worst-off group loses least.

    Raises:
        FairlineError: There is no such cost, or the limit is negative.
    """
    if cost not in COSTS:
        raise FairlineError(f"A cost is one of {', '.join(COSTS)}, not '{cost}'.")
    require_within(within)
    kept = table[(table["drop_high" if sure else "largest_drop"] <= within) & table[cost].notna()]
    if kept.empty:
        return None
    row: dict[str, Any] = kept.sort_values([cost, "largest_drop"], kind="stable").iloc[0].to_dict()
    return row
