"""The board's figures, tables and page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from fairline._io import atomic_path, make_folder
from fairline.charts import BASE, CONTROL, MORE, PALETTE, palette, save_charts, themed
from fairline.report.board import (
    NO_LINEARIZER,
    Entry,
    Panel,
    Published,
    Share,
    cost_told,
    costs_table,
    groups_table,
    panels,
    table,
)
from fairline.report.page import write_page

#: What is drawn of every entry, and how the axis is called.
SHOWN = {"overall": "accuracy, all images", "worst": "accuracy, worst group"}

PUBLISHED = "published by others"

#: How far marks of one budget are moved apart, as a share of it, in all and between two.
_SPREAD, _STEP = 0.3, 0.07


def write_board(entries: Mapping[str, Entry], out: str | Path) -> list[Path]:
    """Write a board's page, tables and figures.

    Args:
        entries: From :func:`fairline.report.board.choose`.
        out: Folder to write: ``board.html``, ``board.csv`` (a row an entry), ``groups.csv`` and ``costs.csv`` (a row an
            entry and group, or protocol), and a PNG a panel.

    Returns:
        The files, the page first.
    """
    folder = make_folder(out)
    found = panels(entries)
    order = method_order(entries)
    colours = [panel_colours(panel, order) for panel in found]
    drawn = {
        f"panel_{place}_{what}": panel_chart(panel, what, colours[place])
        for place, panel in enumerate(found)
        for what in SHOWN
    }
    shown = [_shown(place, panel, colours[place]) for place, panel in enumerate(found)]
    page = write_page(
        folder / "board.html",
        "board.html.j2",
        {name: themed(chart) for name, chart in drawn.items()},
        title="The board: accuracy against ReLUs",
        panels=shown,
        count=sum(not isinstance(entry, Published) for entry in entries.values()),
        studies=len({entry.origin for entry in entries.values() if not isinstance(entry, Published)}),
        sources=sorted({entry.origin for entry in entries.values() if isinstance(entry, Published)}),
        published=PUBLISHED,
    )
    tables = {"board": table(entries), "groups": groups_table(entries), "costs": costs_table(entries)}
    for name, rows in tables.items():
        with atomic_path(folder / f"{name}.csv") as temporary:
            rows.to_csv(temporary, index=False, float_format="%.6g")
    both = {f"board_{place + 1:02d}": _both(panel, colours[place]) for place, panel in enumerate(found)}
    files = save_charts(both, folder, ("png",))
    return [page, *(folder / f"{name}.csv" for name in tables), *files]


def series_of(panel: Panel) -> dict[str, str]:
    """What stands for a method in the charts of a panel, by its name.

    Args:
        panel: What may be set side by side.

    Returns:
        The method itself; of a network that kept all its ReLUs, the one method of the panel that was finetuned alike.
    """
    alike: dict[str, list[str]] = {}
    for entry in panel.entries.values():
        if not _is_whole(entry):
            names = alike.setdefault(entry.method.finetune, [])
            names += [entry.method.name] if entry.method.name not in names else []
    series: dict[str, str] = {}
    for entry in panel.entries.values():
        own = entry.method.name
        beside = alike.get(entry.method.finetune, []) if _is_control(entry) else []
        series.setdefault(own, beside[0] if len(beside) == 1 else own)
    return series


def _is_whole(entry: Entry) -> bool:
    return entry.budget.percent == 100


def _is_control(entry: Entry) -> bool:
    return _is_whole(entry) and entry.method.linearizer != NO_LINEARIZER


def method_order(entries: Mapping[str, Entry]) -> dict[str, int]:
    """Places at which methods get colours: short names first, as the plain ones are drawn most."""
    names = dict.fromkeys(entry.method.name for entry in entries.values() if not _is_whole(entry))
    return {name: place for place, name in enumerate(sorted(names, key=lambda name: name.count(",")))}


def panel_colours(panel: Panel, order: Mapping[str, int]) -> dict[str, str]:
    """A colour of its own for each of a panel's series.

    Args:
        panel: What may be set side by side.
        order: From :func:`method_order`; a method has the same colour in every panel where that is free.

    Returns:
        Colours by series. The base network has its own, and so has the control that no method of the panel goes with.
    """
    entries = {entry.method.name: entry for entry in panel.entries.values()}
    preferred = palette(list(order))
    series = dict.fromkeys(series_of(panel).values())
    chosen: dict[str, str] = {}
    for name in sorted(series, key=lambda name: order.get(name, len(order))):
        free = [colour for colour in [CONTROL, *PALETTE, *MORE] if colour not in chosen.values()]
        if _is_whole(entries[name]) and not _is_control(entries[name]):
            chosen[name] = BASE
        elif _is_control(entries[name]) and CONTROL in free:
            chosen[name] = CONTROL
        else:
            free = [colour for colour in free if colour != CONTROL] or [*PALETTE, *MORE]
            chosen[name] = preferred[name] if preferred.get(name) in free else free[0]
    return {name: chosen[name] for name in series}


def panel_chart(panel: Panel, what: str, colours: Mapping[str, str], *, legend: bool = False) -> Any:
    """Draw accuracy against the share of ReLUs kept.

    Args:
        panel: What may be set side by side.
        what: A key of :data:`SHOWN`.
        colours: Of each series, from :func:`panel_colours`.
        legend: Whether to say the colours in the chart.

    Returns:
        An Altair chart that takes the width of its page: a mark an entry, hollow where others published it, with 95 %
        limits, joined within a study; the dashed line is the base network.
    """
    rows = _points(panel, what)
    names = list(dict.fromkeys(rows["series"]))
    key = alt.Legend(orient="bottom", columns=4, labelLimit=280, symbolLimit=0, symbolType="circle")
    colour = alt.Color(
        "series:N",
        scale=alt.Scale(domain=names, range=[colours[name] for name in names]),
        sort=names,
        title=None,
        legend=key if legend else None,
    )
    least, most = float(rows["x"].min()), float(rows["x"].max())
    ticks = sorted({round(value, 1) for value in rows["percent"]})
    x = alt.X(
        "x:Q",
        title="ReLUs kept, percent",
        scale=alt.Scale(type="log", domain=[least / 1.15, most * 1.15], nice=False),
        axis=alt.Axis(values=ticks, format="~g") if len(ticks) <= 6 else alt.Axis(format="~g", tickCount=5),
    )
    limits = alt.Scale(zero=False, nice=True, padding=8)
    y = alt.Y("value:Q", title=SHOWN[what], axis=alt.Axis(format="~%", tickCount=6), scale=limits)
    base = alt.Chart(rows)
    tooltip = [
        alt.Tooltip("method:N"),
        alt.Tooltip("percent:Q", title="ReLUs kept, %", format=".4~g"),
        alt.Tooltip("value:Q", title="accuracy", format=".1%"),
        alt.Tooltip("limits:N", title="95 %"),
        alt.Tooltip("group:N"),
        alt.Tooltip("origin:N", title="from"),
    ]
    whole = base.transform_filter(alt.datum.whole).mark_rule(strokeDash=[4, 3], strokeWidth=1.2, opacity=0.8)
    marks = [
        whole.encode(y=y, color=colour),
        base.mark_line(strokeWidth=1.2, opacity=0.7).encode(
            x=x, y=y, color=colour, detail="origin:N", order="percent:Q"
        ),
        base.mark_rule(strokeWidth=1.1, opacity=0.45).encode(x=x, y="low:Q", y2="high:Q", color=colour),
        base.transform_filter(~alt.datum.published)
        .mark_point(filled=True, size=52, opacity=1)
        .encode(x=x, y=y, color=colour, shape=alt.Shape("shape:N", scale=None), tooltip=tooltip),
        base.transform_filter(alt.datum.published)
        .mark_point(filled=False, size=95, opacity=1, strokeWidth=2, shape="diamond")
        .encode(x=x, y=y, color=colour, tooltip=tooltip),
    ]
    return alt.layer(*marks).properties(width="container", height=280)


def _points(panel: Panel, what: str) -> pd.DataFrame:
    """A row an entry; marks of one budget stand side by side."""
    series = series_of(panel)
    below = {entry.method.name for entry in panel.entries.values() if not _is_whole(entry)}
    moved = [name for name in dict.fromkeys(series.values()) if name in below]
    step = min(_STEP, _SPREAD / max(1, len(moved) - 1))
    rows = []
    for entry in panel.entries.values():
        share = entry.accuracy.overall if what == "overall" else entry.accuracy.of_worst
        percent = entry.budget.percent
        own = series[entry.method.name]
        place = moved.index(own) - (len(moved) - 1) / 2 if own in moved else 0.0
        rows.append(
            {
                "method": entry.method.name,
                "series": own,
                "origin": entry.origin,
                "percent": percent,
                "x": max(percent, 0.01) * math.exp(place * step),
                "value": share.value,
                "low": share.low if share.low is not None else share.value,
                "high": share.high if share.high is not None else share.value,
                "limits": limits_told(share),
                "group": "all" if what == "overall" else entry.accuracy.lowest,
                "published": isinstance(entry, Published),
                "whole": entry.method.linearizer == NO_LINEARIZER,
                "shape": "square" if _is_whole(entry) else "circle",
            }
        )
    return pd.DataFrame(rows)


def _both(panel: Panel, colours: Mapping[str, str]) -> Any:
    """Both charts of a panel beside each other, with their title and colours, for a file."""
    charts = [panel_chart(panel, what, colours, legend=True).properties(width=420) for what in SHOWN]
    return themed(alt.hconcat(*charts, spacing=36).properties(title=panel.title))


def limits_told(share: Share) -> str:
    """The limits of a share in percent; empty where there are none.

    >>> limits_told(Share(value=0.77, low=0.756, high=0.784))
    '75.6–78.4 %'

    Returns:
        The words.
    """
    return "" if share.low is None or share.high is None else f"{100 * share.low:.1f}–{100 * share.high:.1f} %"


@dataclass(frozen=True)
class ShownRow:
    """An entry as tables show it; texts."""

    method: str
    published: bool
    percent: str
    relus: str
    overall: str
    overall_limits: str
    worst: str
    worst_limits: str
    group: str
    seconds: str
    megabytes: str
    cost_of: str
    seeds: str
    origin: str


def rows_of(entries: Sequence[Entry]) -> list[ShownRow]:
    """Entries as tables show them.

    Args:
        entries: In order.

    Returns:
        A row each.
    """
    rows = []
    for entry in entries:
        cost = next(iter(entry.costs), None)
        worst = entry.accuracy.of_worst
        rows.append(
            ShownRow(
                method=entry.method.name,
                published=isinstance(entry, Published),
                percent=f"{entry.budget.percent:.3g} %",
                relus="" if entry.budget.relus is None else f"{entry.budget.relus:,.0f}",
                overall=f"{entry.accuracy.overall.value:.1%}",
                overall_limits=limits_told(entry.accuracy.overall),
                worst=f"{worst.value:.1%}",
                worst_limits=limits_told(worst),
                group=entry.accuracy.lowest,
                seconds="" if cost is None or cost.seconds is None else f"{cost.seconds:.2f}",
                megabytes="" if cost is None or cost.megabytes is None else f"{cost.megabytes:.1f}",
                cost_of="" if cost is None else cost_told(cost),
                seeds="" if entry.seeds_told is None else str(entry.seeds_told),
                origin=entry.origin,
            )
        )
    return rows


def _shown(place: int, panel: Panel, colours: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows of a panel."""
    entries = list(panel.entries.values())
    rows = rows_of(entries)
    hollow = {entry.method.name for entry in entries if isinstance(entry, Published)}
    notes = {entry.scale for entry in entries if isinstance(entry, Published)} - {panel.scale}
    return {
        "title": panel.title,
        "scale": panel.scale,
        "notes": sorted(notes),
        "charts": [f"panel_{place}_{what}" for what in SHOWN],
        "legend": [(name, colour, name in hollow) for name, colour in colours.items()],
        "rows": rows,
        "costs": list(dict.fromkeys(row.cost_of for row in rows if row.cost_of)),
    }


__all__ = [
    "PUBLISHED",
    "SHOWN",
    "ShownRow",
    "limits_told",
    "method_order",
    "panel_chart",
    "panel_colours",
    "rows_of",
    "series_of",
    "write_board",
]
