"""Accuracy of groups against the cost of private inference: the panel of the report, and a page of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from fairline.charts import PALETTE, save_charts, themed
from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError
from fairline.jobs.costs import COLUMNS
from fairline.private.basis import PREDICTED
from fairline.private.cost import CALL_PARTS, COSTS, PROTOCOL_COSTS
from fairline.private.frontier import cheapest
from fairline.private.plan import CAVEATS
from fairline.report import figures
from fairline.report.page import settings, write_page
from fairline.runs import Run

#: What a private inference is paid in: column, unit, and what a value is divided by.
AXES = {"bytes": ("MB", 1e6), "rounds": ("rounds", 1.0), "seconds": ("seconds", 1.0)}


def prepare(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A frontier run's networks with their ``variant``, ``percent`` and ``budget``; and its accuracies, a row a group.

    Returns:
        Rows of ``frontier.parquet``; rows of accuracies and relative drops, joined with their network's costs.
    """
    scores = figures.prepare(run.table("accuracy.parquet"), run.table("counts.parquet"))
    named = scores[["model", "variant", "percent", "budget", "stage"]].drop_duplicates("model")
    table = _priced(run).merge(named, on="model")
    keys = ["model", "protocol", "bytes", "rounds", "seconds", "basis"]
    return table, scores.merge(table[keys], on="model")


def _priced(run: Run) -> pd.DataFrame:
    """Rows of ``frontier.parquet``; one of an earlier version gets the columns that it lacks."""
    table = run.table("frontier.parquet")
    if "basis" not in table:
        # On which wire a measurement was made was not written down then, nor what the model says of its parts.
        words = {"measured": "measured, on a wire not written down"}
        table["basis"] = table["source"].replace(words)
        lacking = {name: math.nan for name in COLUMNS if name not in table and name not in ("model", "network")}
        table = table.assign(**lacking | {"compiled": False, "replace": "", "replace_in": ""})
    return table


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
        tables.append(run.table("costs.parquet"))
    if not tables:
        return pd.DataFrame(columns=list(SAVINGS))
    keys = ["model", "protocol", "network"]
    table = pd.concat([each[[*COLUMNS]] for each in tables], ignore_index=True).drop_duplicates(keys)
    for cost in COSTS:
        known = table[[f"{cost}_{part}" for part in CALL_PARTS]].sum(axis=1, skipna=False)
        table[f"{cost}_told"] = known.where(table["basis"] != PREDICTED, table[cost])
    table["rounds"] = table["rounds_told"]
    base = table[table["model"] == "base"].drop(columns=["model", "compiled"])
    both = table.merge(base, on=keys[1:], how="left", suffixes=("", "_base"))
    alike = both["basis"] == both["basis_base"]
    for cost in COSTS:
        left = (both[cost] / both[f"{cost}_base"]).where(alike, both[f"{cost}_told"] / both[f"{cost}_told_base"])
        both[f"{cost}_saved_percent"] = 100 * (1 - left)
    return both.assign(saved_basis=both["basis"].where(alike, PREDICTED))[[*SAVINGS]]


def frontier_chart(table: pd.DataFrame) -> Any:
    """Draw worst-group (filled) and overall (hollow) accuracy against bytes, rounds and seconds, a row a protocol.

    The dashed line joins the networks that no other beats in worst-group accuracy at their price.

    Args:
        table: Rows of ``frontier.parquet``, from :func:`prepare`.

    Returns:
        An Altair chart.
    """
    variants = list(dict.fromkeys(table["variant"]))
    scale = alt.Scale(domain=variants, range=[PALETTE[i % len(PALETTE)] for i in range(len(variants))])
    colour = alt.Color(
        "variant:N",
        sort=variants,
        scale=scale,
        title=None,
        legend=alt.Legend(orient="bottom", columns=2, labelLimit=420),
    )
    y = alt.Scale(zero=False, nice=True, padding=10)
    rows = []
    for protocol, part in table.groupby("protocol", sort=False):
        panels = []
        for cost, (unit, factor) in AXES.items():
            known = part.dropna(subset=[cost]).assign(x=lambda rows, c=cost, f=factor: rows[c] / f)
            if known.empty:
                continue
            title = f"{unit} a call" + (f", over {known['wire'].iloc[0]}" if cost == "seconds" else "")
            x = alt.X(
                "x:Q", title=title, scale=alt.Scale(zero=False, nice=True, padding=12), axis=alt.Axis(tickCount=5)
            )
            tooltip = [
                alt.Tooltip("variant:N"),
                alt.Tooltip("budget:N", title="ReLUs kept"),
                alt.Tooltip("x:Q", format=",.4~g", title=unit),
                alt.Tooltip("basis:N", title="cost"),
                alt.Tooltip("overall:Q", format=".1%"),
                alt.Tooltip("worst:Q", format=".1%", title="worst group"),
                alt.Tooltip("worst_group:N", title="which is"),
            ]
            accuracy = alt.Y("worst:Q", title="accuracy", axis=alt.Axis(format=".0%"), scale=y)
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
            panels.append(alt.layer(line, overall, worst).properties(width=230, height=220, title=str(protocol)))
        rows.append(alt.hconcat(*panels))
    return alt.vconcat(*rows).resolve_scale(color="shared")


def groups_chart(scores: pd.DataFrame, protocol: str) -> Any:
    """Accuracy of each group against bytes a call on one protocol, a panel a variant; whiskers are 95 % intervals."""
    rows = scores[(scores["protocol"] == protocol) & (scores["measure"] == "accuracy")]
    groups = [OVERALL, *figures.group_order(scores)]
    sizes = rows.groupby("group")["n"].max()
    labels = {group: f"{group} ({sizes[group]:,} images)" for group in groups}
    rows = rows.assign(x=rows["bytes"] / 1e6, who=rows["group"].map(labels))
    order = [labels[group] for group in groups]
    palette = ["#555555", *PALETTE]
    scale = alt.Scale(domain=order, range=[palette[i % len(palette)] for i in range(len(order))])
    low, high = rows["x"].min(), rows["x"].max()
    pad = 0.05 * (high - low) or 1.0
    panels = []
    for variant in figures.main_variants(rows):
        base = alt.Chart(figures.with_base(rows, variant))
        x = alt.X(
            "x:Q",
            title=f"MB a call, {protocol}",
            scale=alt.Scale(domain=[low - pad, high + pad], nice=False),
            axis=alt.Axis(tickCount=5),
        )
        y = alt.Y("value:Q", title="accuracy", axis=alt.Axis(format=".0%"), scale=alt.Scale(zero=False))
        colour = alt.Color("who:N", sort=order, scale=scale, title=None, legend=alt.Legend(labelLimit=260))
        tooltip = [
            alt.Tooltip("group:N"),
            alt.Tooltip("budget:N", title="ReLUs kept"),
            alt.Tooltip("x:Q", format=",.4~g", title="MB"),
            alt.Tooltip("value:Q", format=".1%", title="accuracy"),
            alt.Tooltip("low:Q", format=".1%", title="95 % from"),
            alt.Tooltip("high:Q", format=".1%", title="to"),
        ]
        panels.append(
            alt.layer(
                base.mark_line(strokeWidth=1.4).encode(x=x, y=y, color=colour, order="x:Q"),
                base.mark_rule(strokeWidth=1.2, opacity=0.6).encode(x=x, y="low:Q", y2="high:Q", color=colour),
                base.mark_point(filled=True, size=50, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip),
            ).properties(width=330, height=260, title=variant)
        )
    return alt.concat(*panels, columns=2).resolve_scale(color="shared", y="shared")


def cost_figures(run: Run) -> dict[str, Any]:
    """All figures of a frontier run, by file name."""
    table, scores = prepare(run)
    # On every protocol the order of the networks is that of their ReLUs: one is enough for the groups.
    return {
        "cost_frontier": themed(frontier_chart(table)),
        "cost_groups": themed(groups_chart(scores, str(table["protocol"].iloc[0]))),
    }


def answers(table: pd.DataFrame, within: float) -> list[str]:
    """The cheapest network that keeps every group within a drop, in a sentence a protocol."""
    sentences = []
    for protocol, part in table.groupby("protocol", sort=False):
        dearest = part[part["relus"] == part["relus"].max()].iloc[0]
        found = cheapest(part, within)
        if found is None:
            sentences.append(f"On {protocol} no network keeps every group within {within:g} % of its accuracy.")
            continue
        told = (
            f"On {protocol} the cheapest network that keeps every group within {within:g} % of its accuracy is "
            f"{found['model']}: {found['relus']:,} of {found['total_relus']:,} ReLUs, {_price(found)}"
        )
        if found["bytes"] < dearest["bytes"]:
            told += f" ({found['bytes'] / dearest['bytes']:.0%} of the bytes with {dearest['relus']:,} ReLUs)"
        if found["drop_group"]:
            loss = found["largest_drop"]
            told += f"; “{found['drop_group']}” {'loses' if loss > 0 else 'gains'} {abs(loss):.1f} %, at worst"
        sure = cheapest(part, within, sure=True)
        if sure is None:
            told += ". With 95 % confidence in every group none does."
        elif sure["model"] != found["model"]:
            told += f". With 95 % confidence in every group it is {sure['model']}, {_price(sure)}."
        else:
            told += ", and with 95 % confidence in every group."
        sentences.append(told)
    return sentences


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
                "worst": f"{row['worst']:.1%} ({row['worst_group']})",
                "drop": f"{row['largest_drop']:+.1f} % ({row['drop_group']})" if row["drop_group"] else "",
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


def panel(folder: str | Path, within: float, audit: Run | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the template ``costs.html.j2`` shows of a frontier run.

    Args:
        folder: Of the frontier run.
        within: Drop in percent that any group may suffer.
        audit: The audit that it must belong to, if any.

    Returns:
        Charts by name, and the panel's content.

    Raises:
        FairlineError: The folder holds no finished frontier run, or that of another audit.
    """
    run = Run.read(folder, "frontier")
    if audit is not None and Path(run.config["audit"]["folder"]).resolve() != audit.folder.resolve():
        raise FairlineError(
            f"{folder} is the frontier of the audit {run.config['audit']['folder']}, not of {audit.folder}."
        )
    table, _ = prepare(run)
    charts = cost_figures(run)
    content = {
        "fixed_point": fixed_point_table(run),
        "answers": answers(table, within),
        "charts": list(charts),
        "table": cost_table(table),
        "wire": table["wire"].iloc[0],
        "bases": list(dict.fromkeys(table["basis"])),
        "caveats": _caveats(table["protocol"].unique().tolist()),
    }
    return charts, content


def _caveats(protocols: Sequence[str]) -> list[str]:
    return [CAVEATS.get(name, f"{name}: predicted from {PROTOCOL_COSTS[name].source}.") for name in protocols]


def write_frontier(folder: str | Path, out: str | Path | None = None, *, within: float = 5.0) -> Path:
    """Write the page of a frontier run.

    Args:
        folder: Folder of a finished frontier run.
        out: The HTML file; ``frontier.html`` in that folder by default.
        within: Drop in percent that any group may suffer.

    Returns:
        The file.

    Raises:
        FairlineError: The folder holds no finished frontier run.
    """
    run = Run.read(folder, "frontier")
    charts, content = panel(folder, within)
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
