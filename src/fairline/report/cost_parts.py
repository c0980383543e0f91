"""Of what a private inference consists: its parts stacked, and which of them to replace first."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from fairline.audit.comparison import BASE
from fairline.charts import PALETTE
from fairline.private.basis import PREDICTED, spoken
from fairline.private.cost import CALL_PARTS, COSTS, PARTS
from fairline.private.replacement import RIVALS
from fairline.private.wire import network as find_network

#: What a private inference is paid in: unit, and what a value is divided by.
UNITS = {"bytes": ("MB", 1e6), "rounds": ("rounds", 1.0), "seconds": ("s", 1.0)}

#: The colour of a part, in every figure.
COLOURS = dict(zip(PARTS, [PALETTE[place] for place in (0, 5, 1, 3, 4, 2, 8)], strict=True))

#: Characters of a network's name in a line of a chart, what fits into a third of a page; and a line's height.
_CHARACTERS, _LINE = 42, 13

_DIGITS = {"bytes": 2, "rounds": 0, "seconds": 2}


def told_totals(table: pd.DataFrame) -> pd.DataFrame:
    """What the cost model says of whole calls, also of those that were measured: the sums of their parts.

    Args:
        table: Rows with the columns of ``Estimate.row()`` and a ``basis``.

    Returns:
        Columns ``bytes``, ``rounds`` and ``seconds`` beside the same index.
    """
    predicted = table["basis"] == PREDICTED
    sums = {c: table[[f"{c}_{part}" for part in CALL_PARTS]].sum(axis=1, skipna=False) for c in COSTS}
    return pd.DataFrame({cost: table[cost].where(predicted, sums[cost]) for cost in COSTS})


def occurring(table: pd.DataFrame) -> list[str]:
    """The parts that cost anything in any row, in their order."""
    return [part for part in PARTS if (table[[f"{cost}_{part}" for cost in COSTS]].fillna(0) > 0).any(axis=None)]


def parts_charts(table: pd.DataFrame, legend: bool = False) -> dict[str, Any]:
    """Draw what each call consists of, in bytes, rounds and seconds, stacked from zero.

    A black line is what was measured.

    Args:
        table: Costs, with ``model``, ``protocol``, ``wire``, ``basis`` and the columns of ``Estimate.row()``.
        legend: Whether to say the colours in the chart.

    Returns:
        A chart for each protocol and cost that is known, by file name; without a width.
    """
    parts = occurring(table)
    return {
        f"cost_parts_{protocol}_{cost}": _parts_chart(part, str(protocol), cost, _colour(parts, legend))
        for protocol, part in table.groupby("protocol", sort=False)
        for cost in COSTS
        if parts and part[cost].notna().any()
    }


def _colour(parts: Sequence[str], legend: bool) -> alt.Color:
    return alt.Color(
        "part:N",
        title=None,
        scale=alt.Scale(domain=[PARTS[part] for part in parts], range=[COLOURS[part] for part in parts]),
        legend=alt.Legend(orient="bottom") if legend else None,
    )


def _parts_chart(table: pd.DataFrame, protocol: str, cost: str, colour: alt.Color) -> Any:
    unit, factor = UNITS[cost]
    columns = {f"{cost}_{part}": PARTS[part] for part in occurring(table)}
    rows = table[["model", "basis", *columns]].rename(columns=columns)
    long = rows.melt(["model", "basis"], var_name="part", value_name="value").assign(
        value=lambda each: each["value"] / factor, order=lambda each: each["part"].map(list(columns.values()).index)
    )
    where = f", over {spoken(find_network(table['wire'].iloc[0]))}" if cost == "seconds" else ""
    called = {name: textwrap.wrap(name.replace(" %", "\u00a0%"), _CHARACTERS) for name in table["model"]}
    # The lines of a name stand above its bar, so that a long one takes nothing of the width.
    most = max(map(len, called.values()))
    down = _LINE * most / 2
    y = alt.Y("model:N", sort=list(table["model"]), axis=None)
    x = alt.X(
        "value:Q", stack="zero", title=f"{unit} a call, {protocol}{where}", scale=alt.Scale(zero=True),
        axis=alt.Axis(tickCount=4, grid=True),
    )  # fmt: skip
    tooltip = [
        alt.Tooltip("model:N", title="network"),
        alt.Tooltip("part:N"),
        alt.Tooltip("value:Q", format=",.4~g", title=unit),
    ]
    bars = (
        alt.Chart(long).mark_bar(size=14, yOffset=down).encode(x=x, y=y, color=colour, order="order:Q", tooltip=tooltip)
    )
    names = []
    for above in range(most):
        lines = rows[["model"]].assign(line=[[*[""] * most, *called[name]][-1 - above] for name in rows["model"]])
        text = alt.Chart(lines).mark_text(align="left", baseline="bottom", dy=down - 9 - _LINE * above, fontSize=11)
        names.append(text.encode(x=alt.value(0), y=y, text="line:N"))
    layers = [bars, *names]
    measured = table[(table["basis"] != PREDICTED) & table[cost].notna()]
    # Messages, which are counted, are no rounds.
    if len(measured) and cost != "rounds":
        found = measured[["model", "basis"]].assign(value=measured[cost] / factor)
        told = [alt.Tooltip("basis:N"), alt.Tooltip("value:Q", format=",.4~g", title=unit)]
        tick = alt.Chart(found).mark_tick(color="black", thickness=2, size=20, yOffset=down)
        layers.append(tick.encode(x="value:Q", y=y, tooltip=told))
    return alt.layer(*layers).properties(height=alt.Step(26 + _LINE * most))


def legend(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Names and colours of the parts that occur."""
    return [(PARTS[part], COLOURS[part]) for part in occurring(table)]


def parts_table(table: pd.DataFrame) -> tuple[list[str], list[dict[str, Any]]]:
    """What each call consists of, in words.

    Returns:
        Names of the parts that occur; a row for each network and protocol, with a cell for each part.
    """
    parts = occurring(table)
    rows = [
        {"model": row["model"], "protocol": row["protocol"], "cells": [_amounts(row, part) for part in parts]}
        for row in table.to_dict("records")
    ]
    return [PARTS[part] for part in parts], rows


def _amounts(row: dict[str, Any], part: str) -> str:
    known = {cost: row[f"{cost}_{part}"] for cost in COSTS}
    return ", ".join(amount(cost, value) for cost, value in known.items() if not math.isnan(value)) or "unknown"


def amount(cost: str, value: float) -> str:
    """A cost with its unit.

    >>> amount("bytes", 2.5e6), amount("rounds", 1), amount("seconds", 0.123)
    ('2.50 MB', '1 round', '0.12 s')

    Returns:
        The words.
    """
    unit, factor = UNITS[cost]
    word = "round" if cost == "rounds" and round(value) == 1 else unit
    return f"{value / factor:,.{_DIGITS[cost]}f} {word}"


def advice(table: pd.DataFrame) -> list[str]:
    """Say what to replace first, where something costs more than the ReLUs: a sentence for each protocol and part.

    Args:
        table: Costs of one or several networks between the parties: ``model``, ``protocol``, ``wire``, ``compiled``,
            ``basis``, and the columns of ``Estimate.row()`` and of
            :func:`~fairline.private.replacement.replacement`.

    Returns:
        The sentences; none where ReLUs cost most.
    """
    rows = table.assign(**{f"told_{cost}": values for cost, values in told_totals(table).items()})
    sentences = []
    for protocol, own in rows.groupby("protocol", sort=False):
        for part in RIVALS:
            # What is compiled has been given all that compiling can.
            found = own[(own["replace"] == part) & ~((part == "linear") & own["compiled"].astype(bool))]
            if len(found):
                sentences.append(_advice(found, str(protocol), part))
    return sentences


def _advice(found: pd.DataFrame, protocol: str, part: str) -> str:
    models = list(dict.fromkeys(found["model"]))
    first = found[found["model"] == models[0]].to_dict("records")
    whose = f"the {BASE}" if models[0] == BASE else models[0]
    more = f" and {len(models) - 1} other network{'s' if len(models) > 2 else ''}" if len(models) > 1 else ""
    verb = "outweigh" if part in ("linear", "quadratic") else "outweighs"
    dearer = _dearer(first, part)
    if part == "linear":
        return (
            f"On {protocol} linear layers {verb} the ReLUs of {whose}{more}: {dearer}. No mask goes below that; "
            "'fairline compile' may, and so do narrower networks."
        )
    instead = "average pooling in its place" if part == "max_pool" else "nothing in their place"
    after = [_less(first[0], cost) for cost in ("bytes", "rounds")]
    after += [
        _less(row, "seconds") + f" over {spoken(find_network(row['wire']))}"
        for row in first
        if not math.isnan(row["replaced_seconds"])
    ]
    return (
        f"Replace this first: on {protocol} {PARTS[part]} {verb} the ReLUs of {whose}{more}: {dearer}. With "
        f"{instead}, a call to {whose} would take {'; '.join(after)}, by the cost model. Its accuracy would have "
        "to be trained and audited anew."
    )


def _dearer(rows: Sequence[dict[str, Any]], part: str) -> str:
    """In what a part costs more than the ReLUs: "5.00 MB for 2.00 MB"."""
    told = []
    for cost in COSTS:
        for row in rows if cost == "seconds" else rows[:1]:
            if cost in row["replace_in"].split(", "):
                wire = f" over {spoken(find_network(row['wire']))}" if cost == "seconds" else ""
                told.append(f"{amount(cost, row[f'{cost}_{part}'])} for {amount(cost, row[f'{cost}_relu'])}{wire}")
    return ", ".join(told)


def _less(row: dict[str, Any], cost: str) -> str:
    before, after = row[f"told_{cost}"], row[f"replaced_{cost}"]
    return f"{amount(cost, after)} in place of {amount(cost, before)} ({100 * (after / before - 1):+.0f} %)"
