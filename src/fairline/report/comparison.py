"""The comparison page: methods side by side at equal budgets, in one HTML file (paper, Section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from fairline.charts import PALETTE, save_charts, themed
from fairline.data.grouped import OVERALL, WORST
from fairline.report.figures import METHOD_NAMES, budget_labels, budget_order, group_axis
from fairline.report.page import by_groups, settings, write_page
from fairline.runs import Run


def prepare(comparison: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``comparison.parquet`` with ``budget``, a label of ``percent``."""
    return comparison.assign(budget=comparison["percent"].map(budget_labels(comparison["percent"].unique())))


def group_order(frame: pd.DataFrame) -> list[str]:
    """All images and the worst group, then groups from the most to the fewest training images."""
    sizes = frame[frame["measure"] == "accuracy"].groupby("group", sort=False)["train_n"].max()
    own = sizes.drop([OVERALL, WORST]).sort_values(ascending=False, kind="stable")
    return [OVERALL, WORST, *map(str, own.index)]


def colours(methods: Sequence[str]) -> alt.Scale:
    """One colour a method, the same in every figure; beyond fourteen they repeat."""
    palette = [*PALETTE, "#B2182B", "#66C2A5", "#BF812D", "#C51B7D"]
    return alt.Scale(domain=list(methods), range=[palette[i % len(palette)] for i in range(len(methods))])


def differences(frame: pd.DataFrame, measure: str, title: str) -> Any:
    """Points with intervals, a panel a budget: groups along x, methods side by side within each."""
    rows = frame[frame["measure"] == measure]
    methods = list(dict.fromkeys(frame.loc[frame["measure"] == "accuracy", "method"]))
    drawn = [method for method in methods if method in set(rows["method"])]
    groups = [group for group in group_order(frame) if group in set(rows["group"])]
    width = min(880, max(80, 12 * len(drawn)) * len(groups))
    room = width / len(groups)
    panels = []
    for budget in budget_order(rows):
        base = alt.Chart(rows[rows["budget"] == budget])
        x = alt.X("group:N", sort=groups, title=None, axis=group_axis(groups, room, room - 4))
        offset = alt.XOffset("method:N", sort=drawn, scale=alt.Scale(paddingOuter=0.35))
        colour = alt.Color(
            "method:N", sort=drawn, scale=colours(methods), title=None, legend=alt.Legend(values=drawn, labelLimit=320)
        )
        tooltip = [
            alt.Tooltip("method:N"),
            alt.Tooltip("group:N"),
            alt.Tooltip("value:Q", format="+.2f", title=title),
            alt.Tooltip("low:Q", format="+.2f", title="95 % from"),
            alt.Tooltip("high:Q", format="+.2f", title="to"),
        ]
        zero = alt.Chart(pd.DataFrame({"y": [0]})).mark_rule(color="#888", strokeDash=[4, 3]).encode(y="y:Q")
        whiskers = base.mark_rule(strokeWidth=1.6).encode(x=x, xOffset=offset, y="low:Q", y2="high:Q", color=colour)
        points = base.mark_point(filled=True, size=46, opacity=1).encode(
            x=x, xOffset=offset, y=alt.Y("value:Q", title=title), color=colour, tooltip=tooltip
        )
        panels.append(
            alt.layer(zero, whiskers, points).properties(
                width=width,
                height=200,
                title=f"{budget} of the ReLUs",
            )
        )
    return alt.vconcat(*panels).resolve_scale(color="shared")


def pareto_front(frame: pd.DataFrame) -> Any:
    """Overall against worst-group accuracy, a panel a budget; the front is filled and joined."""
    accuracy = frame[(frame["measure"] == "accuracy") & frame["group"].isin([OVERALL, WORST])]
    wide = accuracy.pivot_table(index=["budget", "percent", "method"], columns="group", values="value", sort=False)
    front = frame[frame["measure"] == "pareto"].set_index(["budget", "percent", "method"])["value"]
    table = wide.assign(front=front).reset_index().rename(columns={OVERALL: "overall", WORST: "worst"})
    methods = list(dict.fromkeys(table["method"]))
    panels = []
    for budget in budget_order(table):
        rows = table[table["budget"] == budget]
        colour = alt.Color(
            "method:N", sort=methods, scale=colours(methods), title=None, legend=alt.Legend(labelLimit=320)
        )
        x = alt.X(
            "overall:Q",
            title="overall accuracy",
            axis=alt.Axis(format=".1%", tickCount=4),
            scale=alt.Scale(zero=False, nice=True, padding=14),
        )
        y = alt.Y(
            "worst:Q",
            title="worst-group accuracy",
            axis=alt.Axis(format=".0%"),
            scale=alt.Scale(zero=False, nice=True, padding=14),
        )
        tooltip = [
            alt.Tooltip("method:N"),
            alt.Tooltip("overall:Q", format=".1%"),
            alt.Tooltip("worst:Q", format=".1%", title="worst group"),
        ]
        best = alt.Chart(rows[rows["front"] == 1])
        line = best.mark_line(color="#999", strokeDash=[4, 3], strokeWidth=1).encode(x=x, y=y, order="overall:Q")
        filled = best.mark_point(filled=True, size=110, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip)
        hollow = (
            alt.Chart(rows[rows["front"] == 0])
            .mark_point(filled=False, size=80, opacity=1, strokeWidth=2)
            .encode(x=x, y=y, color=colour, tooltip=tooltip)
        )
        panels.append(alt.layer(line, hollow, filled).properties(width=300, height=240, title=f"{budget} of the ReLUs"))
    return alt.concat(*panels, columns=2).resolve_scale(color="shared")


def kept_by_layer(layers: pd.DataFrame) -> Any:
    """Share of each layer's ReLUs that is kept, a panel a budget and a line a way to place them."""
    layers = layers.reset_index(drop=True)
    rows = layers[layers["relus"] < layers["total"]].copy()
    rows["percent"] = 100 * rows["relus"] / rows["total"]
    rows["budget"] = rows["percent"].map(budget_labels(rows["percent"].unique()))
    rows["share"] = rows["kept"] / rows["units"]
    rows["masks"] = masks_of(layers)[rows.index]
    table = rows.groupby(["budget", "percent", "masks", "position", "layer"], as_index=False, sort=False)[
        "share"
    ].mean()
    names = list(dict.fromkeys(table["masks"]))
    panels = []
    for budget in budget_order(table):
        chart = (
            alt.Chart(table[table["budget"] == budget])
            .mark_line(point=True)
            .encode(
                x=alt.X(
                    "layer:N",
                    sort=list(dict.fromkeys(table.sort_values("position")["layer"])),
                    title=None,
                    axis=alt.Axis(labelAngle=-50, labelLimit=120),
                ),
                y=alt.Y("share:Q", title="ReLUs kept", axis=alt.Axis(format="%")),
                color=alt.Color("masks:N", scale=colours(names), title="masks"),
                tooltip=["layer:N", "masks:N", alt.Tooltip("share:Q", format=".1%")],
            )
        )
        panels.append(chart.properties(width=380, height=170, title=f"{budget} of the ReLUs"))
    return alt.concat(*panels, columns=2).resolve_scale(color="shared")


def masks_of(layers: pd.DataFrame) -> pd.Series[str]:
    """What placed the ReLUs: the linearizer where there are several, and under what it learned the masks."""
    placement = layers["placement"].where(layers["placement"] != "", "plain distillation")
    if "linearizer" not in layers or layers["linearizer"].nunique() == 1:
        return placement
    names = layers["linearizer"].map(lambda name: METHOD_NAMES.get(name, name.replace("_", " ")))
    return names.where(layers["placement"] == "", names + ", " + layers["placement"])


def drop_by_budget(frame: pd.DataFrame) -> Any:
    """Relative accuracy drop against the ReLUs kept, a panel a group and a line a method."""
    rows = frame[(frame["measure"] == "relative_drop") & (frame["percent"] < 100)]
    methods = list(dict.fromkeys(frame.loc[frame["measure"] == "accuracy", "method"]))
    panels = []
    for group in group_order(frame):
        own = rows[rows["group"] == group]
        if own.empty:
            continue
        chart = (
            alt.Chart(own)
            .mark_line(point=alt.OverlayMarkDef(size=36), strokeWidth=1.8)
            .encode(
                x=alt.X(
                    "percent:Q",
                    title="ReLUs kept, %",
                    scale=alt.Scale(type="log", reverse=True),
                    axis=alt.Axis(values=sorted(own["percent"].unique()), format=".3~g"),
                ),
                y=alt.Y("value:Q", title="relative accuracy drop, %", scale=alt.Scale(zero=True)),
                color=alt.Color(
                    "method:N",
                    sort=methods,
                    scale=colours(methods),
                    title=None,
                    legend=alt.Legend(labelLimit=320, orient="bottom", columns=3),
                ),
                tooltip=[
                    "method:N",
                    "budget:N",
                    alt.Tooltip("value:Q", format=".1f", title="drop, %"),
                    alt.Tooltip("low:Q", format=".1f", title="95 % from"),
                    alt.Tooltip("high:Q", format=".1f", title="to"),
                ],
            )
        )
        zero = alt.Chart(pd.DataFrame({"y": [0]})).mark_rule(color="#888", strokeDash=[4, 3]).encode(y="y:Q")
        title: Any = group
        if own["value"].isna().all():
            title = alt.TitleParams(group, subtitle="no drop: the base network gets none right")
        panels.append(alt.layer(zero, chart).properties(width=250, height=190, title=title))
    return alt.concat(*panels, columns=3).resolve_scale(color="shared")


def figures(frame: pd.DataFrame, layers: pd.DataFrame) -> dict[str, Any]:
    """All figures that the rows allow, by file name.

    Args:
        frame: From :func:`prepare`.
        layers: Rows of ``layers.parquet``.

    Returns:
        Altair charts.
    """
    made: dict[str, Any] = {}
    if (frame["measure"] == "gain").any():
        made["gain"] = themed(differences(frame, "gain", "gain, points"))
    made["pareto"] = themed(pareto_front(frame))
    if (frame["measure"] == "beyond_control").any():
        made["beyond_control"] = themed(differences(frame, "beyond_control", "gain beyond the control, points"))
    drops = frame[(frame["measure"] == "relative_drop") & (frame["percent"] < 100)]
    if drops["percent"].nunique() > 1:
        made["drop"] = themed(drop_by_budget(frame))
    if masks_of(layers).nunique() > 1:
        made["layers"] = themed(kept_by_layer(layers))
    return made


def write_comparison(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a compare run.

    Args:
        run_folder: Folder of a finished compare run.
        out: The HTML file; ``comparison.html`` in that folder by default.

    Returns:
        The file.

    Raises:
        FairlineError: The folder holds no finished comparison.
    """
    run = Run.read(run_folder, "compare")
    frame = prepare(run.table("comparison.parquet"))
    groups = group_order(frame)
    return write_page(
        Path(out) if out is not None else run.folder / "comparison.html",
        "comparison.html.j2",
        figures(frame, run.table("layers.parquet")),
        title=f"Methods at equal ReLU budgets: {run.data.name}{by_groups(run)}",
        baseline=frame["baseline"].iloc[0],
        headline=headline(frame),
        warnings=warnings(frame, run),
        interval=_interval(frame, run),
        groups=groups,
        tables=[(budget, table(frame, budget, groups)) for budget in budget_order(frame)],
        settings=settings(run),
    )


def write_comparison_figures(run_folder: str | Path, folder: str | Path) -> list[Path]:
    """Write each figure of a compare run as SVG and PNG; returns the files."""
    run = Run.read(run_folder, "compare")
    charts = figures(prepare(run.table("comparison.parquet")), run.table("layers.parquet"))
    return save_charts(charts, Path(folder))


def headline(frame: pd.DataFrame) -> list[str]:
    """What happened at the smallest budget, and whether the gains are repairs of linearization."""
    baseline = str(frame["baseline"].iloc[0])
    # Only some methods may have gone on to smaller budgets.
    budget = budget_order(frame[(frame["method"] == baseline) & (frame["measure"] == "accuracy")])[-1]
    here = frame[(frame["budget"] == budget)].set_index(["measure", "group", "method"]).sort_index()
    worst = here.loc["accuracy", WORST]["value"]
    best = str(worst.idxmax())
    before, after = (here.loc["accuracy", OVERALL]["value"][method] for method in (baseline, best))
    if best == baseline:
        sentences = [
            f"With {budget} of the ReLUs no method has a higher worst-group accuracy than “{baseline}” "
            f"({worst[best]:.1%})."
        ]
    else:
        row = here.loc[("gain", WORST, best)]
        sure = "" if row["low"] > 0 else ", which does not exclude chance"
        sentences = [
            f"With {budget} of the ReLUs “{best}” has the highest worst-group accuracy: {worst[best]:.1%}, where "
            f"“{baseline}” has {worst[baseline]:.1%} (gain {row['value']:+.1f} points, {_interval_of(row)}"
            f"{sure}). Overall accuracy goes from {before:.1%} to {after:.1%}."
        ]
    front = frame[(frame["measure"] == "pareto") & (frame["budget"] == budget) & (frame["value"] == 1)]["method"]
    sentences.append(f"On the Pareto front there: {', '.join(f'“{name}”' for name in front)}.")
    control = frame[(frame["measure"] == "beyond_control") & (frame["group"] == WORST) & (frame["budget"] == budget)]
    if len(control) and best in set(control["method"]):
        row = control[control["method"] == best].iloc[0]
        told = "more than" if row["low"] > 0 else ("less than" if row["high"] < 0 else "not told apart from")
        sentences.append(
            f"That gain is {told} what the same method gains with all ReLUs ({row['value']:+.1f} points beyond it, "
            f"{_interval_of(row)})."
        )
    return sentences


def limits(row: Mapping[str, Any]) -> str:
    """``[-0.4, +1.2]``; seeds that agree wholly do not tell how far others would be."""
    return "no limits" if math.isnan(row["low"]) else f"[{row['low']:+.1f}, {row['high']:+.1f}]"


def _interval_of(row: Mapping[str, Any]) -> str:
    if math.isnan(row["low"]):
        return "the same for every seed, hence without limits"
    return f"95 % interval {row['low']:+.1f} to {row['high']:+.1f}"


def warnings(frame: pd.DataFrame, run: Run) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    replicates = int(frame["replicates"].iloc[0])
    if replicates == 1:
        found.append(
            "One base network: the intervals speak of the test images drawn, not of training again. Compare several "
            "seeds before choosing a method."
        )
    elif replicates < 5:
        found.append(
            f"{replicates} base networks: Student’s interval from so few is wide, and what it does not exclude is not "
            "shown to be absent."
        )
    pairs = int(frame["measure"].eq("gain").sum())
    if pairs > 20:
        found.append(
            f"{pairs} differences are shown. At 95 % about one in twenty excludes zero by chance alone; trust what "
            "holds at several budgets."
        )
    if run.config["split"] != "test":
        found.append(f"These numbers are from the {run.config['split']} part, which training or selection has seen.")
    return found


def table(frame: pd.DataFrame, budget: str, groups: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the page's table of one budget: methods, with a cell a group."""
    rows = frame[frame["budget"] == budget]
    cells = rows.set_index(["method", "group", "measure"]).sort_index()
    made = []
    for method in dict.fromkeys(rows["method"]):
        row: dict[str, Any] = {"method": method, "cells": []}
        row["pareto"] = bool(cells.loc[(method, OVERALL, "pareto"), "value"])
        for group in groups:
            cell = {"accuracy": f"{cells.loc[(method, group, 'accuracy'), 'value']:.1%}"}
            if (method, group, "gain") in cells.index:
                gain = cells.loc[(method, group, "gain")]
                cell["gain"] = f"{gain['value']:+.1f}"
                cell["interval"] = limits(gain)
                cell["sure"] = "gain" if gain["low"] > 0 else ("loss" if gain["high"] < 0 else "")
            if (method, group, "mitigation_drop") in cells.index:
                cell["mitigation"] = f"drop {cells.loc[(method, group, 'mitigation_drop'), 'value']:+.1f} %"
            row["cells"].append(cell)
        made.append(row)
    return made


def _interval(frame: pd.DataFrame, run: Run) -> str:
    replicates = int(frame["replicates"].iloc[0])
    if replicates == 1:
        return (
            f"Whiskers are 95 % bootstrap intervals over the {run.config['split']} images "
            f"({run.config['resamples']:,} resamples within each group, the same images for every method)."
        )
    return (
        f"Points are means over {replicates} base networks; whiskers are Student’s 95 % intervals of the paired "
        "differences, which hold what training, split and test images change."
    )
