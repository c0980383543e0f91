"""The page of an audit of predictions alone: by group, by class, and against a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from fairline.audit.cells import cells
from fairline.audit.verdict import Verdict, verdict
from fairline.charts import BASE, INK, save_charts, themed
from fairline.data.grouped import OVERALL, TOO_SMALL
from fairline.report.page import settings, write_page
from fairline.report.verdict import KINDS, limits_told, reason, sentence, signed
from fairline.runs import Run

#: Charts and what their rows are of.
_SETS = {"groups": "group", "classes": "class"}

#: Rows in a chart at most; tables have all.
_DRAWN = 40

BEFORE, AFTER = "reference", "predictions"


def write_predicted(
    folder: str | Path, out: str | Path | None = None, *, within: float = 5.0, critical: Sequence[str] = ()
) -> Path:
    """Write the page of an audit of predictions.

    Args:
        folder: Of the finished run.
        out: The HTML file; ``report.html`` in that folder by default.
        within: Percentage points that any group or class may lose.
        critical: Classes whose recall may not fall.

    Returns:
        The file.

    Raises:
        FairlineError: The folder holds no such run, or the tolerance or a class is none.
    """
    run = Run.read(folder, "audit-predictions")
    frame = run.table("audit.parquet")
    judged = judge(run, within, critical)
    name = Path(run.config["predictions"]["file"]).name
    predictions = run.table("predictions.parquet")
    same = bool((predictions["group"] == predictions["label"]).all())
    tables = {kind: rows_of(frame, column) for kind, column in _SETS.items()}
    small = [f"“{row['who']}” ({row['n']})" for row in tables["groups"] if row["n"] < TOO_SMALL]
    return write_page(
        Path(out) if out is not None else run.folder / "report.html",
        "predicted.html.j2",
        {name: chart for name, chart in _charts(run).items() if name == "groups" or not same},
        title=f"Who is served how well: {name}",
        verdict=None if judged is None else {"answer": judged.answer, "kind": KINDS[judged.answer]},
        told="" if judged is None else sentence(reason(judged)),
        summary=summary(frame),
        warnings=[f"Too few samples to judge: {', '.join(small)}."] if small else [],
        tables=tables,
        cells=rows_of(frame, "class", in_groups=True),
        same=same,
        compared=run.config["reference"] is not None,
        within=within,
        resamples=run.config["resamples"],
        settings=settings(run),
    )


def write_predicted_figures(folder: str | Path, target: Path) -> list[Path]:
    """Write the figures of an audit of predictions as SVG and PNG."""
    return save_charts(_charts(Run.read(folder, "audit-predictions")), target)


def judge(run: Run, within: float = 5.0, critical: Sequence[str] = ()) -> Verdict | None:
    """Whether what was predicted may stand in place of the reference; None without one.

    Args:
        run: An audit of predictions.
        within: Percentage points that any group or class may lose.
        critical: Classes whose recall may not fall.

    Returns:
        The verdict.

    Raises:
        FairlineError: The tolerance or a class is none.
    """
    if run.config["reference"] is None:
        return None
    return verdict([cells(run.table("predictions.parquet"))], within, critical)


def summary(frame: pd.DataFrame) -> str:
    """Accuracy over all samples and of the worst group, in a sentence."""
    overall = frame[(frame["group"] == OVERALL) & (frame["class"] == "")].set_index("measure")
    groups = frame[(frame["group"] != OVERALL) & (frame["measure"] == "accuracy")].set_index("group")["value"]
    whole, worst, gap = (overall.loc[name] for name in ("accuracy", "worst_group_accuracy", "accuracy_gap"))
    return (
        f"{whole['value']:.1%} of {int(whole['n']):,} samples are right ({_interval(whole)}). Of the groups "
        f"“{groups.idxmin()}” has the lowest accuracy, {worst['value']:.1%} ({_interval(worst)}), and "
        f"“{groups.idxmax()}” the highest, {100 * gap['value']:.1f} points more."
    )


def rows_of(frame: pd.DataFrame, column: str, *, in_groups: bool = False) -> list[dict[str, Any]]:
    """A row a group or a class (or a class in a group): how many are right, and what changed.

    Args:
        frame: Rows of ``audit.parquet``.
        column: ``group`` or ``class``.
        in_groups: Whether classes are taken group by group.

    Returns:
        ``who``, ``n``, ``share`` with ``limits``, ``change`` with ``change_limits`` in points (empty where nothing is
        compared), and ``small``.
    """
    of_class = column == "class"
    rows = frame[(frame["class"] != "") == of_class]
    rows = rows[(rows["group"] == OVERALL) != (in_groups or not of_class)]
    kept, moved = ("recall", "recall_change") if of_class else ("accuracy", "accuracy_change")
    keys = ["group", "class"]
    changes = rows[rows["measure"] == moved].set_index(keys)
    found = []
    for row in rows[rows["measure"] == kept].to_dict("records"):
        key = (row["group"], row["class"])
        change = changes.loc[key] if key in changes.index else None
        found.append(
            {
                "who": row[column] if not in_groups else f"{row['class']} in {row['group']}",
                "n": int(row["n"]),
                "share": f"{row['value']:.1%}",
                "limits": f"{row['low']:.1%} to {row['high']:.1%}",
                "change": "" if change is None else signed(change["value"]),
                "change_limits": "" if change is None else limits_told(change).strip(" ()"),
                "small": row["n"] < TOO_SMALL,
            }
        )
    return found


def _charts(run: Run) -> dict[str, Any]:
    """Shares that are right, with limits; beside the reference's, where there is one."""
    frame = run.table("audit.parquet")
    predictions = run.table("predictions.parquet")
    charts = {}
    for kind, column in _SETS.items():
        measure = "accuracy" if column == "group" else "recall"
        own = frame[(frame["measure"] == measure) & ((frame["group"] == OVERALL) == (column == "class"))]
        if own.empty:
            continue
        table = own.nsmallest(_DRAWN, "value")[[column, "value", "low", "high", "n"]].rename(columns={column: "who"})
        table = table.assign(of=AFTER)
        if "reference_correct" in predictions:
            by = predictions.groupby("group" if column == "group" else "label")["reference_correct"].mean()
            before = table[["who", "n"]].assign(value=table["who"].map(by), of=BEFORE)
            table = pd.concat([before, table], ignore_index=True)
        charts[kind] = themed(_dots(table, "right" if column == "group" else "recall"))
    return charts


def _dots(table: pd.DataFrame, title: str) -> Any:
    order = list(table.loc[table["of"] == AFTER, "who"])
    several = table["of"].nunique() > 1
    base = alt.Chart(table)
    y = alt.Y("who:N", sort=order, title=None, axis=alt.Axis(labelLimit=170))
    scale = alt.Scale(domain=[BEFORE, AFTER], range=[BASE, INK])
    legend = alt.Legend(orient="bottom", title=None) if several else None
    colour = alt.Color("of:N", scale=scale, legend=legend)
    tooltip = ["who:N", "of:N", alt.Tooltip("value:Q", format=".1%"), "n:Q"]
    x = alt.X("value:Q", title=f"{title}, with 95 % limits", axis=alt.Axis(format="~%", tickCount=6))
    points = base.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip)
    whiskers = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.6)
    limits = whiskers.encode(x="low:Q", x2="high:Q", y=y, color=colour)
    return alt.layer(limits, points).properties(width="container", height=max(60, 26 * len(order)))


def _interval(row: pd.Series[Any]) -> str:
    low, high = float(row["low"]), float(row["high"])
    return "no limits" if math.isnan(low) else f"95 % interval {low:.1%} to {high:.1%}"


__all__ = ["judge", "rows_of", "summary", "write_predicted", "write_predicted_figures"]
