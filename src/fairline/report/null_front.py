"""What a comparison says of the null front: how far each method lies above it, and what a bias shift undoes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from fairline.audit.comparison import BASE
from fairline.audit.null_front import front
from fairline.charts import BASE as OF_BASE
from fairline.charts import INK
from fairline.data.grouped import OVERALL, WORST
from fairline.report.figures import budget_order
from fairline.report.verdict import limits_told, signed

#: What a distance from the line is called.
ABOVE, BELOW, UNTOLD = "above", "below", "not told apart"

#: Strengths that are marked on a front, and of them those that are written beside it.
_MARKED, _WRITTEN = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0), (0.0, 1.0, 2.0)

#: Overall accuracy left of all methods that figures still show of a front.
_MARGIN = 0.004
#: And right of them.
_BESIDE = 0.03


def answer(row: Mapping[str, Any]) -> str:
    """Whether a distance is beyond chance, by its 95 % limits; without limits nothing tells."""
    if row["low"] > 0:
        return ABOVE
    return BELOW if row["high"] < 0 else UNTOLD


def distances(frame: pd.DataFrame) -> list[dict[str, str]]:
    """A sentence for each method and budget on where it lies, the smallest budget last.

    Args:
        frame: From :func:`fairline.report.comparison.prepare`.

    Returns:
        ``method``, ``budget``, ``answer``, ``distance`` (points with limits) and ``said``.
    """
    baseline = str(frame["baseline"].iloc[0])
    told = []
    for budget in budget_order(frame[frame["measure"] == "above_null"]):
        own = frame[(frame["budget"] == budget) & (frame["class"] == "")]
        found = own.set_index(["measure", "group", "method"]).sort_index()
        for method in own.loc[own["measure"] == "above_null", "method"]:
            row = found.loc["above_null", WORST, method]
            # The baseline is a part of the line; where it lies is no verdict on it.
            said = _free(row, method) if method == baseline else _said(found, method, baseline)
            kind = "" if method == baseline else answer(row)
            points = f"{signed(row['value'])}{limits_told(row)}"
            told.append({"method": method, "budget": budget, "answer": kind, "distance": points, "said": said})
        for row in own[own["measure"] == "mean_above_null"].to_dict("records"):
            points = f"{signed(row['value'])}{limits_told(row)}"
            told.append(
                {
                    "method": row["method"],
                    "budget": budget,
                    "answer": answer(row),
                    "distance": points,
                    "said": _curve(row),
                }
            )
    return told


def _said(found: pd.DataFrame, method: str, baseline: str) -> str:
    """Where one method lies, in a sentence."""
    row = found.loc["above_null", WORST, method]
    overall, worst = (float(found.loc["accuracy", group, method]["value"]) for group in (OVERALL, WORST))
    past = found.loc["past_null", OVERALL, method]
    line = worst - row["value"] / 100
    at = f"at its overall accuracy of {overall:.1%}"
    if past["value"] > 0:
        at = f"counted from the line's end, {past['value']:.1f} points below its overall accuracy of {overall:.1%}"
    verb = {ABOVE: "lies above the free line", BELOW: "lies below the free line"}
    where = verb.get(answer(row), "cannot be told apart from the free line")
    beyond = ""
    if ("above_null_beyond_control", WORST, method) in found.index:
        other = found.loc["above_null_beyond_control", WORST, method]
        beyond = f" Beyond its control at 100 % of the ReLUs: {signed(other['value'])}{limits_told(other)}."
    return (
        f"It {where}: {at}, shifting the biases of “{baseline}” gives the worst group {line:.1%}; it has {worst:.1%}, "
        f"{signed(row['value'])} points{_limits(row)}.{beyond}"
    )


def _free(row: Mapping[str, Any], method: str) -> str:
    """What the shift gives the baseline."""
    low, high = -row["high"], -row["low"]
    limits = "" if math.isnan(low) else f" (95 % interval {signed(low)} to {signed(high)})"
    return (
        f"It is a point of the free line: the best shift, chosen in hindsight, gives the worst group of “{method}” "
        f"{signed(-row['value'])} points{limits} at no lower overall accuracy."
    )


def _curve(row: Mapping[str, Any]) -> str:
    """Where a method with several strengths lies, in a sentence."""
    verb = {ABOVE: "lies above the free line", BELOW: "lies below it"}.get(answer(row), "cannot be told apart from it")
    return (
        f"Over all its strengths, where it has overall accuracies that a shift has too, it {verb}: "
        f"{signed(row['value'])} points on average{_limits(row)}."
    )


def _limits(row: Mapping[str, Any]) -> str:
    if math.isnan(row["low"]):
        return ", without limits"
    return f" (95 % interval {signed(row['low'])} to {signed(row['high'])})"


def summary(frame: pd.DataFrame, budget: str) -> str:
    """How many methods of a budget lie where, in a sentence; empty where there is no line."""
    baseline = str(frame["baseline"].iloc[0])
    rows = frame[(frame["measure"] == "above_null") & (frame["budget"] == budget) & (frame["method"] != baseline)]
    found: dict[str, list[str]] = {}
    for row in rows.to_dict("records"):
        found.setdefault(answer(row), []).append(f"“{row['method']}” ({signed(row['value'])}{limits_told(row)})")
    words = {ABOVE: "above it", UNTOLD: "not told apart from it", BELOW: "below it"}
    parts = [f"{words[kind]}: {', '.join(found[kind])}" for kind in words if kind in found]
    if not parts:
        return ""
    return f"Free line at {budget} of the ReLUs (“{baseline}” with shifted biases): {'; '.join(parts)}."


def undoing(frame: pd.DataFrame) -> list[str]:
    """What a shift gives back to the group that the baseline's network lost most of, a sentence for each budget."""
    baseline = str(frame["baseline"].iloc[0])
    rows = frame[(frame["method"] == baseline) & ~frame["group"].isin([OVERALL, WORST]) & (frame["class"] == "")]
    told = []
    for budget in budget_order(frame[frame["measure"] == "undone"]):
        own = rows[(rows["budget"] == budget) & (rows["percent"] < 100)].set_index(["measure", "group"]).sort_index()
        if "undone" not in own.index.get_level_values(0):
            continue
        lost = own.loc["drop_points"]
        group = str(lost["value"].idxmax())
        drop, back, beyond = (own.loc[name, group] for name in ("drop_points", "undone", "undone_beyond_base"))
        if drop["value"] <= 0:
            continue
        tau = frame[(frame["measure"] == "tau") & (frame["budget"] == budget) & (frame["method"] == baseline)]
        told.append(
            f"With {budget} of the ReLUs “{group}” loses {drop['value']:.1f} points under “{baseline}”{_limits(drop)}. "
            f"A shift by τ = {tau['value'].iloc[0]:.3g}, chosen on validation images, gives it {signed(back['value'])} "
            f"points{_limits(back)}; {signed(beyond['value'])} beyond what it gives the base network{_limits(beyond)}."
        )
    return told


def undone_table(frame: pd.DataFrame, budget: str, people: Sequence[str]) -> list[dict[str, Any]]:
    """For everyone, a row a method: the drop, what the shift gives back, and how much of that beyond the base network.

    Args:
        frame: From :func:`fairline.report.comparison.prepare`.
        budget: Its label.
        people: Groups in their order.

    Returns:
        ``who`` and ``rows``.
    """
    own = frame[(frame["budget"] == budget) & (frame["class"] == "")]
    found = own.set_index(["group", "measure", "method"]).sort_index()
    methods = list(dict.fromkeys(own.loc[own["measure"] == "undone", "method"]))
    made = []
    for who in people:
        rows = []
        for method in methods:
            three = [found.loc[who, measure, method] for measure in ("drop_points", "undone", "undone_beyond_base")]
            cells = [{"value": signed(row["value"]), "limits": limits_told(row).strip()} for row in three]
            tau = found.loc[OVERALL, "tau", method]["value"]
            rows.append({"method": method, "tau": f"{tau:.2g}", "cells": cells})
        made.append({"who": who, "rows": rows})
    return made


def lines(shifts: pd.DataFrame, frame: pd.DataFrame, split: str) -> pd.DataFrame:
    """The fronts to draw behind methods, mean over base networks.

    Args:
        shifts: Rows of ``null_front.parquet``.
        frame: From :func:`fairline.report.comparison.prepare`.
        split: The part that was compared on.

    Returns:
        ``budget``, ``of`` (the baseline or the base network), ``tau``, ``overall``, ``worst`` and ``front``: F there.
    """
    baseline = str(frame["baseline"].iloc[0])
    rows = shifts[(shifts["part"] == split) & shifts["group"].isin([OVERALL, WORST])]
    wide = rows.pivot_table(index=["method", "relus", "tau"], columns="group", values="accuracy").reset_index()
    accuracy = frame[(frame["measure"] == "accuracy") & (frame["group"] == OVERALL)]
    tables = []
    for (budget, relus), own in accuracy.groupby(["budget", "relus"], sort=False):
        for name in (baseline, BASE):
            part = wide[(wide["method"] == name) & ((wide["relus"] == relus) | (name == BASE))]
            if part.empty:
                continue
            overall, worst = part[OVERALL].to_numpy(), part[WORST].to_numpy()
            best = front(overall, *(np.tile(each[:, None], len(overall)) for each in (overall, worst)))
            table = pd.DataFrame({"tau": part["tau"], "overall": overall, "worst": worst, "front": best})
            table = table[table["overall"] >= own["value"].min() - _MARGIN]
            if name == BASE:
                # What lies beside the methods; the rest would fill the panel.
                table = table[table["overall"] <= own["value"].max() + _BESIDE]
            tables.append(table.assign(budget=budget, of=name))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def behind(rows: pd.DataFrame, x: Any, y: Any) -> list[Any]:
    """Layers of a panel: the baseline's front and, thin, its curve with some strengths; the base network's, dotted.

    Args:
        rows: From :func:`lines`, of one budget.
        x: Scale and axis of overall accuracy, of a field ``overall``.
        y: Those of worst-group accuracy, of a field ``worst``.

    Returns:
        Altair layers.
    """
    layers = []
    for name, own in rows.groupby("of", sort=False):
        colour, dash = (OF_BASE, [2, 3]) if name == BASE else (INK, [1, 0])
        line = own.sort_values("overall")[["overall", "front"]].rename(columns={"front": "worst"})
        drawn = alt.Chart(line).mark_line(color=colour, strokeDash=dash, strokeWidth=1.4, opacity=0.8)
        layers.append(drawn.encode(x=x, y=y, order="overall:Q"))
        if name == BASE:
            continue
        path = alt.Chart(own[["tau", "overall", "worst"]]).mark_line(color=colour, strokeWidth=0.8, opacity=0.35)
        layers.append(path.encode(x=x, y=y, order="tau:Q"))
        marked = own[own["tau"].isin(_MARKED)]
        tooltip = [alt.Tooltip("tau:Q", title="τ"), alt.Tooltip("overall:Q", format=".1%")]
        tooltip.append(alt.Tooltip("worst:Q", format=".1%", title="worst group"))
        points = alt.Chart(marked).mark_point(filled=True, size=16, opacity=0.9, color=colour)
        layers.append(points.encode(x=x, y=y, tooltip=tooltip))
        written = marked[marked["tau"].isin(_WRITTEN)].assign(text=lambda each: each["tau"].map("τ={:g}".format))
        text = alt.Chart(written).mark_text(align="left", dx=6, dy=9, fontSize=10, color=colour)
        layers.append(text.encode(x=x, y=y, text="text:N"))
    return layers


def above(frame: pd.DataFrame, colour: Any) -> list[Any]:
    """Distances above the line with intervals, a panel a budget and a row a method.

    Args:
        frame: From :func:`fairline.report.comparison.prepare`.
        colour: Of methods.

    Returns:
        Altair charts without a width.
    """
    baseline = str(frame["baseline"].iloc[0])
    rows = frame[(frame["measure"] == "above_null") & (frame["method"] != baseline)]
    panels = []
    for budget in budget_order(rows):
        own = rows[rows["budget"] == budget]
        base = alt.Chart(own[["method", "value", "low", "high"]])
        y = alt.Y("method:N", sort=list(own["method"]), title=None, axis=alt.Axis(labels=False, ticks=False, grid=True))
        tooltip = ["method:N", alt.Tooltip("value:Q", format="+.2f", title="above the free line, points")]
        tooltip += [
            alt.Tooltip("low:Q", format="+.2f", title="95 % from"),
            alt.Tooltip("high:Q", format="+.2f", title="to"),
        ]
        zero = alt.Chart(pd.DataFrame({"x": [0]})).mark_rule(color="#888", strokeDash=[4, 3]).encode(x="x:Q")
        whiskers = base.mark_rule(strokeWidth=1.6).encode(y=y, x="low:Q", x2="high:Q", color=colour)
        x = alt.X("value:Q", title="points above the free line", axis=alt.Axis(tickCount=6))
        points = base.mark_point(filled=True, size=46, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip)
        panel = alt.layer(zero, whiskers, points)
        panels.append(panel.properties(height=max(50, 24 * len(own)), title=f"{budget} of the ReLUs"))
    return panels


def acts_on_groups(predictions: pd.DataFrame) -> bool:
    """Whether each class lies within one group, so that a shift of classes is one of groups."""
    return bool("label" not in predictions or (predictions.groupby("label")["group"].nunique() <= 1).all())


__all__ = ["above", "acts_on_groups", "answer", "behind", "distances", "lines", "summary", "undoing", "undone_table"]
