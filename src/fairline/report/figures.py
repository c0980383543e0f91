"""The figures of accuracy by group and budget (paper, Figures 1, 5 and 6), one function each.

Each takes audit rows (see :func:`prepare`) and returns an Altair chart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import pandas as pd

from fairline.charts import themed
from fairline.data.grouped import OVERALL


def prepare(audit: pd.DataFrame, counts: pd.DataFrame) -> pd.DataFrame:
    """Add what the figures need to the rows of ``audit.parquet``.

    Args:
        audit: Rows of ``audit.parquet``.
        counts: Rows of ``counts.parquet``.

    Returns:
        The rows with ``percent`` (ReLUs kept), ``budget`` (the same, as a label), ``variant`` (method and finetune,
        in words) and ``train_n`` (training images of the group).
    """
    frame = audit.copy()
    frame["percent"] = 100 * frame["relus"] / frame["total_relus"]
    labels = budget_labels(frame["percent"].unique())
    frame["budget"] = frame["percent"].map(labels)
    sizes = counts[counts["part"] == "train"].set_index("group")["n"]
    frame["train_n"] = frame["group"].map(sizes).fillna(sizes.sum()).astype(int)
    for column, usual in (("placement", ""), ("surrogate", "identity"), ("compiled", False)):
        if column not in frame:
            frame[column] = usual
    frame["variant"] = [
        variant_label(*row)
        for row in frame[["stage", "method", "objective", "placement", "surrogate", "compiled"]].itertuples(
            index=False, name=None
        )
    ]
    return frame


def budget_labels(percents: Iterable[float]) -> dict[float, str]:
    """Label percentages, with as few digits as tell them apart.

    >>> budget_labels([100.0, 9.988, 2.009])
    {100.0: '100 %', 9.988: '10 %', 2.009: '2 %'}
    >>> budget_labels([12.31, 12.44])
    {12.31: '12.3 %', 12.44: '12.4 %'}

    Returns:
        Labels by percentage.
    """
    values = list(dict.fromkeys(percents))
    for digits in range(2, 12):
        labels = {value: f"{float(f'{value:.{digits}g}'):g} %" for value in values}
        if len(set(labels.values())) == len(values):
            break
    return labels


#: Methods whose names are not plain words.
METHOD_NAMES = {"snl": "SNL", "senet": "SENet", "autorep": "AutoReP", "deepreduce": "DeepReDuce"}


def variant_label(
    stage: str,
    method: str,
    objective: str,
    placement: str = "",
    surrogate: str = "identity",
    compiled: bool = False,
) -> str:
    """Say what was done to the network.

    >>> variant_label("finetuned", "snl", "erm", placement="lagrangian")
    'SNL (lagrangian) + finetune (erm)'

    Returns:
        A few words.
    """
    if stage == "base":
        return "base network"
    details = ", ".join(filter(None, [placement, "" if surrogate == "identity" else surrogate]))
    masks = METHOD_NAMES.get(method, method.replace("_", " "))
    masks = f"{masks} ({details})" if details else masks
    words = f"{masks}, not finetuned" if stage == "linearized" else f"{masks} + finetune ({objective})"
    return f"{words}, compiled" if compiled else words


def with_base(frame: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Rows of one variant and of the base network, unless the variant keeps all ReLUs itself."""
    own = frame[frame["variant"] == variant]
    base = frame[frame["stage"] == "base"]
    return own if (own["percent"] == 100).any() else pd.concat([base, own])


def group_order(frame: pd.DataFrame) -> list[str]:
    """Groups from the majority to the smallest minority of the training images."""
    sizes = frame[frame["group"] != OVERALL].groupby("group", sort=False)["train_n"].max()
    return [str(name) for name in sizes.sort_values(ascending=False, kind="stable").index]


def _shades(frame: pd.DataFrame) -> alt.Scale:
    """One shade a budget, the darkest for the most ReLUs."""
    labels = budget_order(frame)
    # Light enough to see error bars on.
    ramp = ["#2f6ea8", "#5b94c5", "#8bb8da", "#b5d3e9", "#d8e8f4", "#eef5fa"]
    if len(labels) > len(ramp):
        return alt.Scale(domain=labels, scheme="blues", reverse=True)
    step = (len(ramp) - 1) / max(len(labels) - 1, 1)
    return alt.Scale(domain=labels, range=[ramp[round(i * step)] for i in range(len(labels))])


def budget_order(frame: pd.DataFrame) -> list[str]:
    """Budget labels, most ReLUs first."""
    table = frame[["percent", "budget"]].drop_duplicates().sort_values("percent", ascending=False)
    return list(dict.fromkeys(table["budget"]))


def group_axis(groups: Sequence[str], room: float, limit: float) -> alt.Axis:
    """An axis of groups, whose names are tilted where they would lie over each other.

    Args:
        groups: Their names.
        room: Pixels of each.
        limit: Pixels that a name may take where it is not tilted.

    Returns:
        The axis.
    """
    # About six pixels a letter.
    tilted = 6 * max(map(len, groups)) > room and min(room, limit) < 90
    return alt.Axis(labelAngle=-40, labelLimit=160) if tilted else alt.Axis(labelAngle=0, labelLimit=limit)


def bars(frame: pd.DataFrame, measure: str, title: str, axis: alt.Axis, reference: str, size: int) -> Any:
    """Bars of a measure, a group and budget, with limits where it has them and group sizes above."""
    rows = frame[(frame["measure"] == measure) & (frame["group"] != OVERALL)]
    groups, budgets = group_order(frame), budget_order(rows)
    # Every value in one column, so that tooltips read the same in all figures.
    base = alt.Chart(rows)
    width = max(46, min(120, 18 * len(budgets)))
    total = max(320, min(size, width * len(groups)))
    x = alt.X("group:N", sort=groups, title=reference, axis=group_axis(groups, total / len(groups), width + 30))
    offset = alt.XOffset("budget:N", sort=budgets)
    tooltip = [
        alt.Tooltip("group:N"),
        alt.Tooltip("budget:N", title="ReLUs kept"),
        alt.Tooltip("value:Q", format=".3~f", title=title),
        alt.Tooltip("low:Q", format=".3~f", title="95 % from"),
        alt.Tooltip("high:Q", format=".3~f", title="to"),
        alt.Tooltip("n:Q", title="images measured"),
        alt.Tooltip("train_n:Q", title="training images"),
    ]
    boxes = base.mark_bar(stroke="#1f4e79", strokeWidth=0.5).encode(
        x=x,
        xOffset=offset,
        y=alt.Y("value:Q", title=title, axis=axis),
        color=alt.Color("budget:N", sort=budgets, scale=_shades(rows), title="ReLUs kept"),
        tooltip=tooltip,
    )
    whiskers = base.mark_rule(color="#222", strokeWidth=1.1).encode(
        x=x, xOffset=offset, y=alt.Y("low:Q"), y2="high:Q", tooltip=tooltip
    )
    top = rows.groupby("group", as_index=False).agg(n=("train_n", "max"), high=("high", "max"), value=("value", "max"))
    # Above the axis where bars hang from it or there is none.
    top["y"] = top[["high", "value"]].max(axis=1).fillna(0).clip(lower=0)
    sizes = (
        alt.Chart(top)
        .mark_text(dy=-8, fontSize=11, color="#444")
        .encode(x=x, y=alt.Y("y:Q"), text=alt.Text("n:Q", format=","))
    )
    return alt.layer(boxes, whiskers, sizes).properties(width=total, height=260)


def accuracy_by_group(frame: pd.DataFrame, variant: str, size: int = 860) -> Any:
    """Accuracy of each group at each budget, 95 % intervals, group sizes above (paper, Figure 1)."""
    axis = alt.Axis(format="%")
    chart = bars(
        with_base(frame, variant),
        "accuracy",
        "accuracy",
        axis,
        "group (number of training images above the bars)",
        size,
    )
    return chart.properties(title=f"Accuracy by group: {variant}")


def drop_by_group(frame: pd.DataFrame, variant: str, size: int = 860) -> Any:
    """Relative accuracy drop of each group at each budget, 95 % paired intervals (paper, Figure 6)."""
    own = frame[frame["variant"] == variant]
    chart = bars(
        own,
        "relative_drop",
        "relative accuracy drop, %",
        alt.Axis(),
        "group (number of training images above the bars)",
        size,
    )
    return chart.properties(title=f"Relative accuracy drop by group: {variant}")


def accuracy_by_budget(frame: pd.DataFrame, variant: str) -> Any:
    """Overall accuracy, and the best and the worst group's, against the budget (paper, Figure 5)."""
    rows = with_base(frame, variant)
    accuracy = rows[rows["measure"] == "accuracy"]
    groups = accuracy[accuracy["group"] != OVERALL]
    lines: list[pd.DataFrame] = [accuracy[accuracy["group"] == OVERALL].assign(line="all images")]
    for label, pick in (("best group", "idxmax"), ("worst group", "idxmin")):
        chosen = groups.loc[getattr(groups.groupby("percent")["value"], pick)()]
        lines.append(chosen.assign(line=label))
    table = pd.concat(lines)
    domain = ["all images", "best group", "worst group"]
    smallest = table.loc[table["percent"] > 0, "percent"].min()
    # A network without ReLUs has no place on a logarithmic axis.
    table = table[table["percent"] > 0].copy()
    table["kept"] = [float(label.split()[0]) for label in table["budget"]]
    values = sorted(table["kept"].unique())
    x = alt.X(
        "kept:Q",
        scale=alt.Scale(type="log", domain=[smallest / 1.25, 125]),
        axis=alt.Axis(values=values, labelExpr="datum.value + ' %'", labelOverlap="parity"),
        title="ReLUs kept (logarithmic)",
    )
    colour = alt.Color("line:N", scale=alt.Scale(domain=domain, range=["#000000", "#0072B2", "#D55E00"]), title=None)
    tooltip = [
        alt.Tooltip("line:N", title="line"),
        alt.Tooltip("group:N"),
        alt.Tooltip("budget:N", title="ReLUs kept"),
        alt.Tooltip("value:Q", format=".1%", title="accuracy"),
        alt.Tooltip("low:Q", format=".1%", title="95 % from"),
        alt.Tooltip("high:Q", format=".1%", title="to"),
    ]
    base = alt.Chart(table)
    line = base.mark_line().encode(x=x, y=alt.Y("value:Q"), color=colour)
    whisker = base.mark_rule(strokeWidth=1.4).encode(x=x, y="low:Q", y2="high:Q", color=colour)
    point = base.mark_point(filled=True, size=55, opacity=1).encode(
        x=x,
        y=alt.Y("value:Q", title="accuracy", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False)),
        color=colour,
        tooltip=tooltip,
    )
    return alt.layer(line, whisker, point).properties(
        width=520, height=260, title=f"Accuracy against ReLU budget: {variant}"
    )


def figures(frame: pd.DataFrame) -> dict[str, Any]:
    """All figures that the rows allow, by file name."""
    made: dict[str, Any] = {}
    for variant in main_variants(frame):
        slug = "".join(c if c.isalnum() else "_" for c in variant.lower()).strip("_")
        made[f"accuracy_by_group_{slug}"] = themed(accuracy_by_group(frame, variant))
        if (frame.loc[frame["variant"] == variant, "measure"] == "relative_drop").any():
            made[f"drop_by_group_{slug}"] = themed(drop_by_group(frame, variant))
        if with_base(frame, variant)["percent"].nunique() > 1:
            made[f"accuracy_by_budget_{slug}"] = themed(accuracy_by_budget(frame, variant))
    return made


def main_variants(frame: pd.DataFrame) -> list[str]:
    """What to draw: finetuned networks first; the base network alone if there is nothing else."""
    rank = {"finetuned": 0, "linearized": 1, "base": 2}
    table = frame[["variant", "stage"]].drop_duplicates()
    ordered = sorted(table.itertuples(index=False), key=lambda row: rank[str(row.stage)])
    names = [str(row.variant) for row in ordered if row.stage != "base"]
    return names or ["base network"]
