"""What a comparison says of constraints on groups: how far from met, on the images trained on and on those held out."""

from __future__ import annotations

from typing import Any

import pandas as pd

from fairline.report.figures import budget_order
from fairline.runs import Run

#: Columns of the table, and what they hold.
_SHOWN = ("lambda", "train_violation", "val_violation")


def lacking(run: Run, frame: pd.DataFrame, people: list[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """A table for each budget, from the largest: for each group a row a method and strength, mean over base networks.

    Args:
        run: A compare run; of an earlier version it tells nothing.
        frame: From :func:`fairline.report.comparison.prepare`.
        people: Groups in their order.

    Returns:
        The budget's label, and ``who`` and ``rows``: ``method``, ``taken`` (by how many base networks, of a strength
        that was chosen), and numbers in words.
    """
    if not (run.folder / "constraints.parquet").exists():
        return []
    table = run.table("constraints.parquet")
    budgets = frame.drop_duplicates("relus").set_index("relus")["budget"]
    told = []
    for budget in budget_order(frame):
        own = table[table["relus"].map(budgets) == budget]
        parts = [{"who": who, "rows": _rows(own[own["group"] == who])} for who in people]
        if len(own):
            told.append((budget, [part for part in parts if part["rows"]]))
    return told


def _rows(own: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for (method, strength), part in own.groupby(["method", "strength"], sort=False):
        means = part.groupby("measure")["value"].mean()
        bases = part.drop_duplicates("base")
        rows.append(
            {
                "method": f"{method}: {strength}" if strength else method,
                "taken": f"taken by {int(bases['taken'].sum())} of {len(bases)}" if strength else "",
                **{name: _told(means[name]) if name in means else "" for name in _SHOWN},
            }
        )
    return rows


def _told(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


__all__ = ["lacking"]
