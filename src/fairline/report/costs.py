"""Accuracy of groups against the cost of private inference: the panel of the report, and a page of its own."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from fairline.audit.cells import named
from fairline.audit.control import Control
from fairline.audit.verdict import CANNOT_TELL, MAY, Verdict, require_within
from fairline.charts import PALETTE, palette, save_charts, themed
from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError
from fairline.jobs.costs import COLUMNS
from fairline.private.basis import PREDICTED
from fairline.private.cost import COSTS, PARTS, PROTOCOL_COSTS
from fairline.private.frontier import cheapest, judge, verdicts
from fairline.private.plan import CAVEATS
from fairline.report import cost_parts, figures
from fairline.report.page import settings, write_page
from fairline.report.verdict import KINDS, Candidate, focus, headline, network_name, signed
from fairline.runs import Run

#: As :data:`fairline.report.cost_parts.UNITS`, with room for the word.
AXES = cost_parts.UNITS | {"seconds": ("seconds", 1.0)}


def prepare(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A frontier run's networks with their ``variant``, ``percent`` and ``budget``; and its accuracies, a row a group.

    Returns:
        Rows of ``frontier.parquet``, with the ``name`` that pages call a network by; rows of accuracies and relative
        drops, joined with their network's costs.
    """
    scores = figures.prepare(run.table("accuracy.parquet"), run.table("counts.parquet"))
    about = scores[["model", "variant", "percent", "budget", "stage"]].drop_duplicates("model")
    names = [network_name(variant, budget) for variant, budget in zip(about["variant"], about["budget"], strict=True)]
    about = about.assign(name=pd.Series(names, about.index).where(about["stage"] != "base", figures.BASE_NAME))
    table = _priced(run).merge(about, on="model")
    if "lowest" not in table:
        # In an earlier version classes did not count.
        names = [named({"kind": "group", "group": group}) for group in table["worst_group"]]
        table = table.assign(lowest=table["worst"], lowest_who=names)
    keys = ["model", "protocol", "bytes", "rounds", "seconds", "basis"]
    return table, scores.merge(table[keys], on="model")


def by_name(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of :func:`prepare` whose ``model`` is what pages call the network, in place of its folder."""
    return table.assign(model=table["name"])


def _priced(run: Run) -> pd.DataFrame:
    """Rows of ``frontier.parquet``; one of an earlier version gets the columns that it lacks."""
    table = run.table("frontier.parquet")
    if "basis" not in table:
        # On which wire a measurement was made was not written down then, nor what the model says of its parts.
        words = {"measured": "measured, on a wire not written down"}
        table["basis"] = table["source"].replace(words)
        lacking = {name: math.nan for name in COLUMNS if name not in table and name not in ("model", "network")}
        table = table.assign(**lacking | {"compiled": False, "replace": "", "replace_in": ""})
    return _with_all_parts(table)


def _with_all_parts(table: pd.DataFrame) -> pd.DataFrame:
    """A table with a column for each part; those that an earlier version did not know cost nothing then."""
    lacking = [name for cost in COSTS for part in PARTS if (name := f"{cost}_{part}") not in table]
    return table.assign(**dict.fromkeys(lacking, 0.0))


#: Columns of :func:`savings`.
SAVINGS = (
    *("model", "compiled", "protocol", "network", *COSTS),
    *(f"{cost}_saved_percent" for cost in COSTS),
    *("basis", "saved_basis"),
)


def savings(run: Run, costs_run: Run | None = None) -> pd.DataFrame:
    """What private inference of each network of an audit costs, and what that saves against the base network.

    Args:
        run: The audit, whose ``costs.parquet`` predicts them; it may lack that.
        costs_run: A frontier run of this audit, if any; what it says wins.

    Returns:
        A row for each network, protocol and network between the parties, with :data:`SAVINGS`. ``rounds`` are those
        that the model counts, also where messages were measured, as these need not wait for each other. ``…_percent``
        are of the base network's cost, below 0 where the network is dearer, and NaN where that cost is not known.
        ``basis`` says what ``bytes`` and ``seconds`` stand on, ``saved_basis`` what the percentages of them do: both
        networks were measured alike, or both are predicted. Empty where nothing is known.
    """
    tables = []
    if costs_run is not None:
        tables.append(_priced(costs_run).rename(columns={"wire": "network"}))
    if (run.folder / "costs.parquet").exists():
        tables.append(_with_all_parts(run.table("costs.parquet")))
    if not tables:
        return pd.DataFrame(columns=list(SAVINGS))
    keys = ["model", "protocol", "network"]
    table = pd.concat([each[[*COLUMNS]] for each in tables], ignore_index=True).drop_duplicates(keys)
    table = table.join(cost_parts.told_totals(table).add_suffix("_told"))
    table["rounds"] = table["rounds_told"]
    base = table[table["model"] == "base"].drop(columns=["model", "compiled"])
    both = table.merge(base, on=keys[1:], how="left", suffixes=("", "_base"))
    alike = both["basis"] == both["basis_base"]
    for cost in COSTS:
        left = (both[cost] / both[f"{cost}_base"]).where(alike, both[f"{cost}_told"] / both[f"{cost}_told_base"])
        both[f"{cost}_saved_percent"] = 100 * (1 - left)
    return both.assign(saved_basis=both["basis"].where(alike, PREDICTED))[[*SAVINGS]]


def frontier_charts(table: pd.DataFrame, legend: bool = True) -> dict[str, Any]:
    """Draw accuracy of the worst group or class (filled) and of all (hollow) against bytes, rounds and seconds.

    The dashed line joins the networks that no other beats in the worst at their price.

    Args:
        table: Rows of ``frontier.parquet``, from :func:`prepare`.
        legend: Whether to say the colours in the chart.

    Returns:
        An Altair chart for each protocol and each cost that is known, by file name; without a width.
    """
    return {
        f"cost_frontier_{protocol}_{cost}": _frontier_chart(part, str(protocol), cost, _variants(table, legend))
        for protocol, part in table.groupby("protocol", sort=False)
        for cost in COSTS
        if part[cost].notna().any()
    }


def variant_colours(table: pd.DataFrame) -> dict[str, str]:
    """The colour of each variant."""
    return palette(list(dict.fromkeys(table["variant"])))


def _variants(table: pd.DataFrame, legend: bool) -> alt.Color:
    colours = variant_colours(table)
    return alt.Color(
        "variant:N",
        sort=list(colours),
        scale=alt.Scale(domain=list(colours), range=list(colours.values())),
        title=None,
        legend=alt.Legend(orient="bottom", columns=2, labelLimit=420) if legend else None,
    )


def _frontier_chart(table: pd.DataFrame, protocol: str, cost: str, colour: alt.Color) -> Any:
    unit, factor = AXES[cost]
    known = table.dropna(subset=[cost]).assign(x=lambda rows: rows[cost] / factor)
    title = f"{unit} a call" + (f", over {known['wire'].iloc[0]}" if cost == "seconds" else "")
    scale = alt.Scale(zero=False, nice=True, padding=12)
    x = alt.X("x:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5))
    y = alt.Scale(zero=False, nice=True, padding=10)
    tooltip = [
        alt.Tooltip("variant:N"),
        alt.Tooltip("budget:N", title="ReLUs kept"),
        alt.Tooltip("x:Q", format=",.4~g", title=unit),
        alt.Tooltip("basis:N", title="cost"),
        alt.Tooltip("overall:Q", format=".1%"),
        alt.Tooltip("lowest:Q", format=".1%", title="worst group or class"),
        alt.Tooltip("lowest_who:N", title="which is"),
    ]
    accuracy = alt.Y(
        "lowest:Q", title="all (hollow), worst group or class (filled)", axis=alt.Axis(format=".0%"), scale=y
    )
    line = (
        alt.Chart(known[known[f"on_{cost}_front"]])
        .mark_line(color="#777", strokeDash=[4, 3], strokeWidth=1)
        .encode(x=x, y=accuracy, order="x:Q")
    )
    worst = (
        alt.Chart(known)
        .mark_point(filled=True, size=80, opacity=1)
        .encode(x=x, y=accuracy, color=colour, tooltip=tooltip)
    )
    overall = (
        alt.Chart(known)
        .mark_point(filled=False, size=60, opacity=1, strokeWidth=1.6)
        .encode(x=x, y=alt.Y("overall:Q", scale=y), color=colour, tooltip=tooltip)
    )
    return alt.layer(line, overall, worst).properties(height=220, title=protocol)


def group_colours(scores: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """How each group is called in a figure, with its size, and its colour; all images first."""
    sizes = scores[scores["measure"] == "accuracy"].groupby("group")["n"].max()
    greys = ["#555555", *PALETTE]
    return {
        group: (f"{group} ({sizes[group]:,} images)", greys[i % len(greys)])
        for i, group in enumerate([OVERALL, *figures.group_order(scores)])
    }


def groups_charts(scores: pd.DataFrame, protocol: str, legend: bool = True) -> dict[str, Any]:
    """Accuracy of each group against bytes a call on one protocol, a chart a variant; whiskers are 95 % intervals.

    Args:
        scores: From :func:`prepare`.
        protocol: Which.
        legend: Whether to say the colours in the chart.

    Returns:
        Altair charts by file name; without a width.
    """
    rows = scores[(scores["protocol"] == protocol) & (scores["measure"] == "accuracy")]
    called = group_colours(scores)
    rows = rows.assign(
        x=rows["bytes"] / 1e6, who=rows["group"].map({group: name for group, (name, _) in called.items()})
    )
    low, high = rows["x"].min(), rows["x"].max()
    pad = 0.05 * (high - low) or 1.0
    x = alt.X(
        "x:Q",
        title=f"MB a call, {protocol}",
        scale=alt.Scale(domain=[low - pad, high + pad], nice=False),
        axis=alt.Axis(tickCount=5),
    )
    # One scale for all charts, so that they can be compared.
    limits = alt.Scale(domain=[float(rows["low"].min()), float(rows["high"].max())])
    y = alt.Y("value:Q", title="accuracy", axis=alt.Axis(format=".0%"), scale=limits)
    order, colours = zip(*called.values(), strict=True)
    colour = alt.Color(
        "who:N",
        sort=list(order),
        scale=alt.Scale(domain=list(order), range=list(colours)),
        title=None,
        legend=alt.Legend(labelLimit=260) if legend else None,
    )
    tooltip = [
        alt.Tooltip("group:N"),
        alt.Tooltip("budget:N", title="ReLUs kept"),
        alt.Tooltip("x:Q", format=",.4~g", title="MB"),
        alt.Tooltip("value:Q", format=".1%", title="accuracy"),
        alt.Tooltip("low:Q", format=".1%", title="95 % from"),
        alt.Tooltip("high:Q", format=".1%", title="to"),
    ]
    charts = {}
    for position, variant in enumerate(figures.main_variants(rows)):
        base = alt.Chart(figures.with_base(rows, variant))
        charts[f"cost_groups_{position}"] = alt.layer(
            base.mark_line(strokeWidth=1.4).encode(x=x, y=y, color=colour, order="x:Q"),
            base.mark_rule(strokeWidth=1.2, opacity=0.6).encode(x=x, y="low:Q", y2="high:Q", color=colour),
            base.mark_point(filled=True, size=50, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip),
        ).properties(height=260, title=textwrap.wrap(variant, 34))
    return charts


def cost_figures(run: Run) -> dict[str, Any]:
    """All figures of a frontier run, by file name."""
    table, scores = prepare(run)
    # On every protocol the order of the networks is that of their ReLUs: one is enough for the groups.
    first = str(table["protocol"].iloc[0])
    drawn = {
        "cost_frontier": _side_by_side(frontier_charts(table), 230, 3).resolve_scale(color="shared"),
        "cost_groups": _side_by_side(groups_charts(scores, first), 330, 2).resolve_scale(color="shared"),
    }
    if parts := cost_parts.parts_charts(by_name(table), legend=True):
        drawn["cost_parts"] = _side_by_side(parts, 300, 3).resolve_scale(color="shared")
    return {name: themed(chart) for name, chart in drawn.items()}


def _side_by_side(charts: Mapping[str, Any], width: int, columns: int) -> Any:
    return alt.concat(*(chart.properties(width=width) for chart in charts.values()), columns=columns)


def _page_charts(table: pd.DataFrame, scores: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Charts of the page, each as wide as what it stands in; their colours are said beside them."""
    drawn = {
        "frontier": frontier_charts(table, legend=False),
        "groups": groups_charts(scores, str(table["protocol"].iloc[0]), legend=False),
        "parts": cost_parts.parts_charts(by_name(table)),
    }
    return {
        kind: {name: themed(chart.properties(width="container")) for name, chart in charts.items()}
        for kind, charts in drawn.items()
    }


def judged(run: Run, within: float = 5.0, critical: Sequence[str] = ()) -> tuple[pd.DataFrame, list[Candidate]]:
    """The networks of a frontier run and their verdicts.

    Args:
        run: The frontier run.
        within: Loss of any group or class that is tolerated, in percentage points.
        critical: Classes whose recall may not fall.

    Returns:
        Rows of :func:`prepare`, with the columns of :func:`fairline.private.frontier.judge`; and a candidate for each
        network that was made of the base network. A run of an earlier version, which counted no classes, has none.

    Raises:
        FairlineError: The tolerance is none, or there is no such class.
    """
    table, _ = prepare(run)
    require_within(within)
    if not (run.folder / "cells.parquet").exists():
        return table, []
    counted = run.table("cells.parquet")
    found = verdicts(counted, within, critical)
    about = table.drop_duplicates("model").set_index("model")
    sets = dict(list(counted.groupby("model", sort=False)))
    candidates = [
        Candidate.of(model, about.loc[model], own, _control(own, sets[model], about))
        for model, own in found.items()
        if model in about.index
    ]
    return judge(table, found), candidates


def _control(judged: Verdict, counted: pd.DataFrame, about: pd.DataFrame) -> Control | None:
    """What the control explains; in an earlier version it was not counted."""
    control = str(counted["control"].iloc[0]) if "control" in counted else ""
    return Control.of(str(about.loc[control, "name"]), judged, [counted]) if control else None


def answers(run: Run, within: float = 5.0, critical: Sequence[str] = ()) -> list[str]:
    """The cheapest network that may ship, in a sentence a protocol; see :func:`judged` for what is asked."""
    return _answers(*judged(run, within, critical))


def _answers(table: pd.DataFrame, found: Sequence[Candidate]) -> list[str]:
    if not found:
        return [
            "This frontier was made before classes were counted, so nothing tells whether a network may ship. "
            "Repeat its command, which counts them."
        ]
    names = {each.model: each for each in found}
    undecided = {each.model for each in found if each.answer == CANNOT_TELL and not each.is_control}
    if not any(each.answer == MAY and not each.is_control for each in found):
        shown = focus(found)
        told = [] if shown is None or shown.is_control else [shown.control_told()]
        return [
            headline(found),
            *told,
            *_listed("Undecided", [names[model].name for model in names if model in undecided]),
        ]
    sentences = []
    for protocol, part in table.groupby("protocol", sort=False):
        # As the report chooses: by seconds, where they are known of all.
        cost = "seconds" if part.loc[part["answer"] == MAY, "seconds"].notna().all() else "bytes"
        chosen = cheapest(part, cost=cost)
        assert chosen is not None
        dearest = part[part["relus"] == part["relus"].max()].iloc[0]
        share = f", {chosen['bytes'] / dearest['bytes']:.0%} of the bytes with {dearest['relus']:,} ReLUs"
        own = names[chosen["model"]]
        sentences.append(
            f"On {protocol} {own.name} is the cheapest that may ship, in {cost}: {_price(chosen)}{share}. It may, as "
            f"{own.reason()} {own.control_told()}"
        )
        cheaper = part[part["model"].isin(undecided) & (part[cost] < chosen[cost])].sort_values(cost, kind="stable")
        sentences += _listed("Cheaper there, but undecided", [names[model].name for model in cheaper["model"]])
    return sentences


def _listed(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}: {'; '.join(names)}."] if names else []


def _price(row: dict[str, Any]) -> str:
    seconds = "" if pd.isna(row["seconds"]) else f", {row['seconds']:.2f} s over {row['wire']}"
    return f"{row['bytes'] / 1e6:.1f} MB, {row['rounds']:.0f} rounds{seconds} ({row['basis']})"


def cost_table(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each network and protocol, as the page shows it."""
    rows = []
    for row in table.to_dict("records"):
        seconds = "unknown" if pd.isna(row["seconds"]) else f"{row['seconds']:.2f}"
        rows.append(
            {
                "variant": row["variant"],
                "budget": row["budget"],
                "relus": f"{row['relus']:,}",
                "protocol": row["protocol"],
                "megabytes": f"{row['bytes'] / 1e6:.2f}",
                "rounds": f"{row['rounds']:.0f}",
                "seconds": seconds,
                "basis": row["basis"],
                "overall": f"{row['overall']:.1%}",
                "worst": f"{row['lowest']:.1%} ({row['lowest_who']})",
                "drop": f"drop {row['largest_drop']:+.1f} % ({row['drop_group']})" if row["drop_group"] else "",
                "answer": row.get("answer", ""),
                "kind": KINDS.get(row.get("answer", ""), ""),
                "change": f"{signed(-row['largest_loss'])} ({row['loss_who']})" if row.get("loss_who") else "",
                "front": row["on_bytes_front"],
            }
        )
    return rows


def fixed_point_table(run: Run) -> list[dict[str, str]]:
    """A row for each network and number of fraction bits: agreement of all groups, and of the one that agrees least."""
    if not (run.folder / "fixed_point.parquet").exists():
        return []
    rows = []
    table = run.table("fixed_point.parquet")
    for (network, bits), part in table.groupby(["network", "fraction_bits"], sort=False):
        overall = part[part["group"] == OVERALL].iloc[0]
        groups = part[part["group"] != OVERALL]
        least = groups.loc[groups["agreement"].idxmin()]
        change = 100 * (groups["accuracy_private"] - groups["accuracy_plain"])
        rows.append(
            {
                "network": str(network),
                "bits": str(bits),
                "overall": f"{overall['agreement']:.1%}",
                "least": f"{least['agreement']:.1%} [{least['low']:.1%}, {least['high']:.1%}] ({least['group']})",
                "change": f"{change.min():+.1f} ({groups.loc[change.idxmin(), 'group']})",
                "error": f"{overall['max_abs_error']:.1e}",
            }
        )
    return rows


def panel(
    folder: str | Path, within: float, audit: Run | None = None, critical: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the template ``costs.html.j2`` shows of a frontier run.

    Args:
        folder: Of the frontier run.
        within: Loss of any group or class that is tolerated, in percentage points.
        audit: The audit that it must belong to, if any.
        critical: Classes whose recall may not fall.

    Returns:
        Charts by name, and the panel's content.

    Raises:
        FairlineError: The folder holds no finished frontier run, or that of another audit; the tolerance is none, or
            there is no such class.
    """
    run = Run.read(folder, "frontier")
    if audit is not None and Path(run.config["audit"]["folder"]).resolve() != audit.folder.resolve():
        raise FairlineError(
            f"{folder} is the frontier of the audit {run.config['audit']['folder']}, not of {audit.folder}."
        )
    _, scores = prepare(run)
    table, found = judged(run, within, critical)
    charts = _page_charts(table, scores)
    called = by_name(table)
    names, parts = cost_parts.parts_table(called)
    content = {
        "fixed_point": fixed_point_table(run),
        "answers": _answers(table, found),
        "judged": bool(found),
        "within": f"{within:g}",
        "advice": cost_parts.advice(called),
        "charts": {kind: list(drawn) for kind, drawn in charts.items()},
        "legends": {
            "frontier": list(variant_colours(table).items()),
            "groups": list(group_colours(scores).values()),
            "parts": cost_parts.legend(table),
        },
        "part_names": names,
        "parts": parts,
        "table": cost_table(table),
        "wire": table["wire"].iloc[0],
        "bases": list(dict.fromkeys(table["basis"])),
        "caveats": _caveats(table["protocol"].unique().tolist()),
    }
    return {name: chart for drawn in charts.values() for name, chart in drawn.items()}, content


def _caveats(protocols: Sequence[str]) -> list[str]:
    return [CAVEATS.get(name, f"{name}: predicted from {PROTOCOL_COSTS[name].source}.") for name in protocols]


def write_frontier(
    folder: str | Path, out: str | Path | None = None, *, within: float = 5.0, critical: Sequence[str] = ()
) -> Path:
    """Write the page of a frontier run.

    Args:
        folder: Folder of a finished frontier run.
        out: The HTML file; ``frontier.html`` in that folder by default.
        within: Loss of any group or class that is tolerated, in percentage points.
        critical: Classes whose recall may not fall.

    Returns:
        The file.

    Raises:
        FairlineError: The folder holds no finished frontier run, the tolerance is none, or there is no such class.
    """
    run = Run.read(folder, "frontier")
    charts, content = panel(folder, within, critical=critical)
    return write_page(
        Path(out) if out is not None else run.folder / "frontier.html",
        "frontier.html.j2",
        charts,
        title=f"What private inference costs, and who pays: {run.data.name}",
        costs=content,
        settings=settings(run),
    )


def write_cost_figures(folder: str | Path, target: str | Path) -> list[Path]:
    """Write each figure of a frontier run as SVG and PNG; returns the files."""
    return save_charts(cost_figures(Run.read(folder, "frontier")), Path(target))
