"""The panel that splits networks into their affine part and corrections, and says who lives on these.

From the measure :mod:`fairline.audit.corrections`; the paper's claim that it tests is that of Section 4: groups in the
minority need the pieces that ReLUs make.
"""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import pandas as pd

from fairline.charts import themed
from fairline.data.grouped import OVERALL
from fairline.report.figures import group_order, main_variants, network_order, of_the_relus, slug, with_base

#: An affine part that gives so large a share of all images to one class hardly classifies.
ONE_CLASS = 0.8

#: Names and colours of what the figure shows of each network.
PARTS = {
    "affine_accuracy": ("affine part", "#D55E00", "circle"),
    "centred_affine_accuracy": ("affine, corrections at their mean", "#999999", "diamond"),
    "accuracy": ("whole network", "#0072B2", "circle"),
}


def figures(frame: pd.DataFrame) -> dict[str, Any]:
    """All figures that the rows allow, by file name.

    Args:
        frame: From :func:`fairline.report.figures.prepare`.

    Returns:
        Altair charts.
    """
    made: dict[str, Any] = {}
    for variant in _measured_variants(frame):
        made[f"corrections_by_group_{slug(variant)}"] = themed(by_group(frame, variant))
        if (rows := _smallest_with_layers(frame, variant)) is not None:
            made[f"corrections_by_layer_{slug(variant)}"] = themed(by_layer(frame, rows, variant))
    return made


def panel(frame: pd.DataFrame, predictions: pd.DataFrame) -> list[dict[str, Any]]:
    """What the page shows beside the figures, one entry a variant; empty if nothing was measured.

    Args:
        frame: From :func:`fairline.report.figures.prepare`.
        predictions: Rows of ``predictions.parquet``.

    Returns:
        ``variant``, ``verdict`` and ``units`` (sentences), ``table``, and ``bends``, names of what is not affine.
    """
    entries = []
    for variant in _measured_variants(frame):
        rows = with_base(frame, variant)
        networks = [(name, rows[rows["network"] == name]) for name in network_order(rows)]
        entries.append(
            {
                "variant": variant,
                # Of the network with the fewest ReLUs; what the others show is in the table.
                "verdict": verdict(networks[-1][1], predictions),
                "units": [text for _, own in reversed(networks) if (text := units_text(own, group_order(frame)))],
                "table": _table(networks, group_order(frame)),
                "bends": sorted({name for _, own in networks for name in _bends(own)}),
            }
        )
    return entries


def by_group(frame: pd.DataFrame, variant: str) -> Any:
    """Accuracy of the affine part and of the whole network, joined by a line; a row a group, a panel a budget."""
    rows = with_base(frame, variant)
    groups, names_in_order = group_order(frame), network_order(rows)
    labels = {name: of_the_relus(name) for name in names_in_order}
    table = rows[(rows["group"] != OVERALL) & rows["measure"].isin(PARTS)]
    ends = table.pivot_table(index=["network", "group"], columns="measure", values="value", sort=False).reset_index()
    table = table.merge(ends, on=["network", "group"])
    table["part"] = table["measure"].map({measure: words for measure, (words, _, _) in PARTS.items()})
    table["network"] = table["network"].map(labels)
    names, colours, shapes = (list(column) for column in zip(*PARTS.values(), strict=True))
    legend = alt.Legend(title=None, orient="bottom", direction="horizontal", labelLimit=300)
    y = alt.Y("group:N", sort=groups, title=None, axis=alt.Axis(labelLimit=160, grid=True))
    scale = alt.Scale(domain=[0, 1])
    line = (
        alt.Chart()
        .transform_filter(alt.datum.measure == "accuracy")
        .mark_rule(color="#9bb7cf", strokeWidth=4)
        .encode(y=y, x=alt.X("affine_accuracy:Q", scale=scale, title="accuracy"), x2="accuracy:Q")
    )
    point = (
        alt.Chart()
        .mark_point(filled=True, size=80, opacity=1)
        .encode(
            y=y,
            x=alt.X("value:Q", title="accuracy", scale=scale, axis=alt.Axis(format="%", values=[0, 0.5, 1])),
            color=alt.Color("part:N", scale=alt.Scale(domain=names, range=colours), legend=legend),
            shape=alt.Shape("part:N", scale=alt.Scale(domain=names, range=shapes), legend=legend),
            tooltip=[
                alt.Tooltip("group:N"),
                alt.Tooltip("part:N", title="what"),
                alt.Tooltip("value:Q", format=".1%", title="accuracy"),
                alt.Tooltip("low:Q", format=".1%", title="95 % from"),
                alt.Tooltip("high:Q", format=".1%", title="to"),
                alt.Tooltip("train_n:Q", title="training images"),
            ],
        )
    )
    return (
        alt.layer(line, point, data=table)
        .properties(width=205, height=max(90, 28 * len(groups)))
        .facet(
            facet=alt.Facet(
                "network:N",
                sort=[labels[name] for name in names_in_order],
                title=None,
                header=alt.Header(labelFontSize=12),
            ),
            columns=4,
            spacing=24,
        )
        .properties(title=f"What the corrections add to the affine part: {variant}")
    )


def by_layer(frame: pd.DataFrame, rows: pd.DataFrame, variant: str) -> Any:
    """Accuracy that each group loses where one layer's corrections are taken out, in points.

    Args:
        frame: From :func:`fairline.report.figures.prepare`.
        rows: Those of one network.
        variant: Its name.

    Returns:
        An Altair chart.
    """
    drops = _by_layer(rows, "correction_drop")
    drops = drops[drops["group"] != OVERALL].copy()
    counts = _by_layer(rows, "layer_corrections").set_index("layer")["value"]
    drops["points"] = 100 * drops["value"]
    sure = (drops["low"] > 0) | (drops["high"] < 0)
    drops["text"] = [f"{points:.0f}" if clear else "" for points, clear in zip(drops["points"], sure, strict=True)]
    drops["name"] = [f"{layer} ({counts[layer]:,.0f})" for layer in drops["layer"]]
    layers, groups = list(dict.fromkeys(drops["name"])), group_order(frame)
    largest = max(1.0, float(drops["points"].abs().max()))
    x = alt.X("name:N", sort=layers, title="layer (ReLUs kept)", axis=alt.Axis(labelAngle=-45, labelLimit=160))
    y = alt.Y("group:N", sort=groups, title=None, axis=alt.Axis(labelLimit=160, grid=False))
    base = alt.Chart(drops)
    box = base.mark_rect(stroke="white").encode(
        x=x,
        y=y,
        color=alt.Color(
            "points:Q",
            title="points lost",
            scale=alt.Scale(scheme="blueorange", domain=[-largest, largest], domainMid=0),
        ),
        tooltip=[
            alt.Tooltip("layer:N"),
            alt.Tooltip("group:N"),
            alt.Tooltip("value:Q", format=".1%", title="accuracy lost"),
            alt.Tooltip("low:Q", format=".1%", title="95 % from"),
            alt.Tooltip("high:Q", format=".1%", title="to"),
            alt.Tooltip("n:Q", title="images measured"),
        ],
    )
    text = base.mark_text(fontSize=11).encode(
        x=x,
        y=y,
        text="text:N",
        color=alt.condition(f"abs(datum.points) > {0.7 * largest}", alt.value("white"), alt.value("#222")),
    )
    budget = rows["budget"].iloc[0]
    return alt.layer(box, text).properties(
        width=max(200, min(760, 44 * len(layers))),
        height=max(60, 28 * len(groups)),
        title=f"Accuracy lost without one layer’s corrections, {budget} of the ReLUs: {variant}",
    )


def verdict(rows: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """Whether one network's smallest groups live on its corrections more than its largest does, in words.

    Args:
        rows: Those of the network.
        predictions: Rows of ``predictions.parquet``, of it among others.

    Returns:
        A few sentences.
    """
    told = f"{rows['budget'].iloc[0]} of the ReLUs"
    if _overall(rows, "corrections")[0] == 0:
        return (
            f"{told}: no ReLU is left to take out, so the network is its affine part and there is nothing to compare."
        )
    gap = _overall(rows, "minority_correction_share_gap")
    if math.isnan(gap[0]):
        return f"{told}: cannot tell, as groups are of one size, or the network is right on too few images of them."
    small, largest = _compared(rows)
    shares = _wide(rows)["correction_share"]
    words = ("groups", "their accuracy on average") if len(small) > 1 else ("group", "its accuracy")
    told += (
        f": without the corrections {_listed(small)}, the smallest {words[0]}, would {_lose(shares[small].mean())} of "
        f"{words[1]}, and “{largest}”, the largest, would {_lose(shares[largest])}; the difference is {_points(gap)}. "
    )
    centred = _overall(rows, "centred_minority_correction_share_gap")
    told += f"With every correction at its mean instead of 0 it is {_points(centred)}. "
    return told + _answer(_sign(gap), _sign(centred)) + _one_class(rows, predictions)


def _compared(rows: pd.DataFrame) -> tuple[list[str], str]:
    """The smallest groups and the largest, as the audit compared them."""
    role = _wide(rows)["correction_compared"]
    return [str(name) for name in role.index[role > 0]], str(role.index[role < 0][0])


def _lose(share: float) -> str:
    """What a share of accuracy that corrections bring means without them.

    >>> _lose(12.3), _lose(-4.0)
    ('lose 12 %', 'gain 4 %')

    Returns:
        A verb and a percentage.
    """
    return f"{'lose' if share >= 0 else 'gain'} {abs(share):.0f} %"


def _answer(plain: int, centred: int) -> str:
    """What the signs of both differences say, 0 where the interval holds 0."""
    if plain == centred == 0:
        return "Both intervals hold 0: these images cannot tell."
    if plain == centred:
        return (
            "So here the smallest groups live on the corrections more than the largest does."
            if plain > 0
            else "So here the smallest groups live on the corrections less than the largest does, against the story."
        )
    if 0 in (plain, centred):
        return "Only one of the two intervals excludes 0: weak evidence at best."
    return "The two disagree, so the answer hangs on how the corrections are taken out."


def _one_class(rows: pd.DataFrame, predictions: pd.DataFrame) -> str:
    share = _overall(rows, "affine_one_class")[0]
    if share < ONE_CLASS:
        return ""
    own = predictions[predictions["model"] == rows["model"].iloc[0]]
    name = own["affine_prediction"].value_counts().index[0]
    return (
        f" Mind that the affine part calls {share:.0%} of all images “{name}”: it hardly classifies, and a group keeps "
        "the accuracy that this one answer gives it."
    )


def units_text(rows: pd.DataFrame, groups: list[str]) -> str:
    """Which units of one network serve whom, in words; empty if it has none."""
    share, chance = (_overall(rows, name)[0] for name in ("units_one_group", "units_one_group_chance"))
    if math.isnan(share):
        return ""
    wide = _wide(rows).loc[groups]
    agreement = _overall(rows, "unit_agreement")[0]
    how = (
        "Every unit was taken out by itself"
        if _overall(rows, "units_exact")[0]
        else "First-order estimates, of which some were checked by taking the unit out"
    )
    agreed = "" if math.isnan(agreement) else f" (rank correlation of estimate and removal {agreement:.2f})"
    rest = ", ".join(f"{wide.loc[group, 'units_for_half']:,.0f} for “{group}”" for group in groups)
    return (
        f"{of_the_relus(rows['network'].iloc[0])}, {_overall(rows, 'corrections')[0]:,.0f} units: {share:.0%} of those "
        f"that help a group mainly serve one ({chance:.0%} if the same images were dealt out to groups at random). "
        f"Half of what units do for a group’s margin rests on {rest} of them. {how}{agreed}."
    )


def _table(networks: list[tuple[str, pd.DataFrame]], groups: list[str]) -> dict[str, Any]:
    """Rows: groups; columns: networks; cells: affine and whole accuracy, gain and share; and gaps between groups."""
    body = []
    for group in [*groups, OVERALL]:
        cells = []
        for _, own in networks:
            here = own[own["group"] == group].set_index("measure")
            gain, share = here.loc["correction_gain"], here.loc["correction_share"]
            cell = {
                "affine": f"{here.loc['affine_accuracy', 'value']:.1%}",
                "whole": f"{here.loc['accuracy', 'value']:.1%}",
                "gain": f"{100 * gain['value']:+.1f} points{_between(100 * gain['low'], 100 * gain['high'])}",
                "sure": "gain" if gain["low"] > 0 else "loss" if gain["high"] < 0 else "",
            }
            if not math.isnan(share["value"]):
                cell["share"] = f"{share['value']:.0f} % of it{_between(share['low'], share['high'], 0)}"
            cells.append(cell)
        body.append({"group": group, "cells": cells})
    gaps = []
    for prefix in ("", "centred_"):
        found = [_overall(own, f"{prefix}minority_correction_share_gap") for _, own in networks]
        gaps.append(["" if math.isnan(gap[0]) else f"{gap[0]:+.0f}{_between(gap[1], gap[2], 0)}" for gap in found])
    return {"networks": [of_the_relus(name) for name, _ in networks], "rows": body, "gaps": gaps}


def _between(low: float, high: float, digits: int = 1) -> str:
    return "" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"


def _measured_variants(frame: pd.DataFrame) -> list[str]:
    measured = set(frame.loc[frame["measure"] == "affine_accuracy", "variant"])
    return [variant for variant in main_variants(frame) if variant in measured]


def _smallest_with_layers(frame: pd.DataFrame, variant: str) -> pd.DataFrame | None:
    """Rows of the variant's network with the fewest ReLUs of those that have any, or None."""
    own = frame[frame["variant"] == variant]
    own = own[own["model"].isin(own.loc[own["measure"].str.startswith("correction_drop/"), "model"])]
    return own[own["percent"] == own["percent"].min()] if len(own) else None


def _by_layer(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    own = rows[rows["measure"].str.startswith(f"{measure}/")].copy()
    return own.assign(layer=own["measure"].str.partition("/")[2])


def _bends(rows: pd.DataFrame) -> list[str]:
    """What stays of a network beside its affine part, in the names of torch."""
    names = rows["measure"][rows["measure"].str.startswith("bends_")]
    return [str(name).removeprefix("bends_").replace("_", " ") for name in names]


def _wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a group, a column a measure, and ``n``."""
    own = rows[(rows["group"] != OVERALL) & ~rows["measure"].str.contains("/")]
    table = own.pivot_table(index="group", columns="measure", values="value", sort=False)
    return table.assign(n=own[own["measure"] == "affine_accuracy"].set_index("group")["n"])


def _overall(rows: pd.DataFrame, measure: str) -> tuple[float, float, float]:
    """Value and limits of what a network has one of; NaN if it was not measured."""
    own = rows[(rows["group"] == OVERALL) & (rows["measure"] == measure)]
    if own.empty:
        return math.nan, math.nan, math.nan
    value, low, high = (float(own[column].iloc[0]) for column in ("value", "low", "high"))
    return value, low, high


def _sign(number: tuple[float, float, float]) -> int:
    """Of a number whose interval excludes 0; else 0."""
    return 1 if number[1] > 0 else -1 if number[2] < 0 else 0


def _points(number: tuple[float, float, float]) -> str:
    value, low, high = number
    return f"{value:+.0f} points" + ("" if math.isnan(low) else f" (95 % interval {low:+.0f} to {high:+.0f})")


def _listed(names: list[str]) -> str:
    quoted = [f"“{name}”" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
