"""Figures and tables that explain who pays, for audits that measured more than accuracy. One function a figure.

The paper's Sections 4 and 5: Figures 3, 4, 8 and 14, Theorem 4.4, Proposition 4.5 and Appendix A.1.
"""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from fairline.audit.intervals import wilson_interval
from fairline.charts import PALETTE, themed
from fairline.data.grouped import OVERALL
from fairline.report.figures import (
    bars,
    budget_order,
    group_order,
    main_variants,
    with_base,
)

#: Measures drawn as bars by group: title of the axis, title of the figure.
BARS = {
    "gradient_norm": ("gradient norm ‖gₐ‖, nats per unit of θ", "Gradient norm by group (paper, Figure 3)"),
    "hessian_max": ("λ_max(Hₐ), nats per unit² of θ", "Largest Hessian eigenvalue by group (paper, Figure 4)"),
    "margin": ("softmax margin p₁ − p₂", "Softmax margin by group (paper, Figure 14)"),
    "boundary_distance": ("distance, intensities in [0, 1]", "Minimal L2 distance to the decision boundary by group"),
}

#: Measures that accuracy is plotted against.
SCATTER = {
    "gradient_norm": "gradient norm",
    "margin": "softmax margin p₁ − p₂",
    "boundary_distance": "minimal L2 distance to the boundary",
}


def explains(frame: pd.DataFrame) -> bool:
    """Whether the audit measured more than accuracy."""
    return bool(frame["measure"].isin([*BARS, "parameter_distance", "bound"]).any())


def figures(frame: pd.DataFrame, predictions: pd.DataFrame) -> dict[str, Any]:
    """All explaining figures that the rows allow, by file name.

    Args:
        frame: From :func:`fairline.report.figures.prepare`.
        predictions: Rows of ``predictions.parquet``.

    Returns:
        Altair charts.
    """
    made: dict[str, Any] = {}
    for variant in main_variants(frame):
        slug = "".join(c if c.isalnum() else "_" for c in variant.lower()).strip("_")
        rows = with_base(frame, variant)
        for measure in BARS:
            if (rows["measure"] == measure).any():
                made[f"{measure}_by_group_{slug}"] = themed(measure_by_group(frame, variant, measure))
        if (rows["measure"] == "parameter_distance").any():
            made[f"parameter_distance_{slug}"] = themed(parameter_distance(frame, variant))
        shown = [measure for measure in SCATTER if (rows["measure"] == measure).any()]
        if shown:
            made[f"accuracy_against_groups_{slug}"] = themed(accuracy_against(frame, variant, shown))
        shown = [measure for measure in SCATTER if measure in predictions]
        if shown:
            made[f"accuracy_against_samples_{slug}"] = themed(samples_against(frame, predictions, variant, shown))
    return made


def measure_by_group(frame: pd.DataFrame, variant: str, measure: str, size: int = 860) -> Any:
    """Bars of one measure, a group and budget (paper, Figures 3, 4 and 14)."""
    axis_title, title = BARS[measure]
    chart = bars(
        with_base(frame, variant),
        measure,
        axis_title,
        alt.Axis(),
        "group (number of training images above the bars)",
        size,
    )
    return chart.properties(title=f"{title}: {variant}")


def parameter_distance(frame: pd.DataFrame, variant: str) -> Any:
    """‖θ̃ʳ − θ‖ against the budget, in all and in the layers that moved most (paper, Figure 8, left)."""
    rows = frame[frame["variant"] == variant]
    budgets = budget_order(rows)
    total = rows[rows["measure"] == "parameter_distance"]
    colour = alt.Color(
        "budget:N",
        sort=budgets,
        title="ReLUs kept",
        scale=alt.Scale(domain=budgets, range=PALETTE[: len(budgets)] if len(budgets) <= len(PALETTE) else PALETTE),
    )
    tooltip = [
        alt.Tooltip("budget:N", title="ReLUs kept"),
        alt.Tooltip("value:Q", format=".4~g", title="distance"),
    ]
    left = (
        alt.Chart(total)
        .mark_bar()
        .encode(
            x=alt.X("budget:N", sort=budgets, title="ReLUs kept", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title="‖θ̃ − θ‖, all layers"),
            color=colour,
            tooltip=tooltip,
        )
        .properties(width=max(120, 60 * len(budgets)), height=260)
    )
    layers = rows[rows["measure"].str.startswith("parameter_distance/")].copy()
    if layers.empty:
        return left.properties(title=f"How far the weights moved: {variant}")
    layers["layer"] = layers["measure"].str.partition("/")[2]
    largest = layers.groupby("layer", sort=False)["value"].max().nlargest(12).index
    # In the order of the network.
    names = [str(name) for name in layers["layer"].unique() if name in set(largest)]
    right = (
        alt.Chart(layers[layers["layer"].isin(names)])
        .mark_point(filled=True, size=70, opacity=0.9)
        .encode(
            y=alt.Y("layer:N", sort=names, title=None, axis=alt.Axis(grid=True, labelLimit=220)),
            x=alt.X("value:Q", title="‖θ̃ − θ‖ of the layer"),
            color=colour,
            tooltip=[alt.Tooltip("layer:N"), *tooltip],
        )
        .properties(width=380, height=260)
    )
    return alt.hconcat(left, right, spacing=36).properties(
        title=f"How far the weights moved, in all and in the {len(names)} layers that moved most: {variant}"
    )


def accuracy_against(frame: pd.DataFrame, variant: str, measures: list[str]) -> Any:
    """Each group's accuracy against what explains it, at the smallest budget (paper, Figure 8, middle and right)."""
    rows, label = _smallest(frame, variant)
    table = rows[rows["group"] != OVERALL].pivot_table(
        index="group", columns="measure", values=["value", "low", "high", "train_n"], sort=False
    )
    groups = group_order(frame)
    panels = []
    for measure in measures:
        data = pd.DataFrame(
            {
                "group": table.index,
                "accuracy": table["value"]["accuracy"].to_numpy(),
                "low": table["low"]["accuracy"].to_numpy(),
                "high": table["high"]["accuracy"].to_numpy(),
                "x": table["value"][measure].to_numpy(),
                "train_n": table["train_n"]["accuracy"].to_numpy(),
            }
        )
        x = alt.X("x:Q", title=_unit(measure), scale=alt.Scale(zero=False, padding=18, nice=True))
        base = alt.Chart(data)
        colour = alt.Color(
            "group:N", sort=groups, scale=_group_scale(groups), legend=alt.Legend(title=None, orient="bottom")
        )
        y = alt.Y("accuracy:Q", axis=alt.Axis(format="%"), title="accuracy")
        tooltip = [
            alt.Tooltip("group:N"),
            alt.Tooltip("x:Q", format=".4~g", title=SCATTER[measure]),
            alt.Tooltip("accuracy:Q", format=".1%"),
            alt.Tooltip("train_n:Q", title="training images"),
        ]
        whisker = base.mark_rule().encode(x=x, y=alt.Y("low:Q", title="accuracy"), y2="high:Q", color=colour)
        point = base.mark_point(filled=True, size=90, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip)
        panels.append(
            alt.layer(whisker, point).properties(
                width=222, height=220, title=correlation_text(rows, measure, "groups") or SCATTER[measure]
            )
        )
    return alt.hconcat(*panels, spacing=28).properties(title=f"Groups at {label} of the ReLUs: {variant}")


def samples_against(frame: pd.DataFrame, predictions: pd.DataFrame, variant: str, measures: list[str]) -> Any:
    """Draw the share of right samples against what explains it: ten bins of equal size of all, five of each group.

    A sample is right or wrong, so points of single samples would lie on two lines; a bin's share is what
    Figure 8 (right) is after.

    Args:
        frame: From :func:`fairline.report.figures.prepare`.
        predictions: Rows of ``predictions.parquet``.
        variant: Which networks; those with the fewest ReLUs are drawn.
        measures: Columns of ``predictions``, a panel each.

    Returns:
        An Altair chart.
    """
    rows, label = _smallest(frame, variant)
    own = predictions[predictions["model"] == rows["model"].iloc[0]]
    groups = group_order(frame)
    panels = []
    for measure in measures:
        values = own[np.isfinite(own[measure])]
        together = equal_bins(values, measure, 10)
        apart = pd.concat(
            equal_bins(part, measure, min(5, len(part))).assign(group=group)
            for group, part in values.groupby("group", sort=False)
        )
        x = alt.X("x:Q", title=_unit(measure), scale=_positive(together["x"]), axis=_sparse(together["x"]))
        y = alt.Y("accuracy:Q", axis=alt.Axis(format="%"), title="share right", scale=alt.Scale(domain=[0, 1]))
        tooltip = [
            alt.Tooltip("x:Q", format=".4~g", title=SCATTER[measure]),
            alt.Tooltip("accuracy:Q", format=".1%", title="share right"),
            alt.Tooltip("n:Q", title="samples"),
        ]
        colour = alt.Color(
            "group:N", sort=groups, scale=_group_scale(groups), legend=alt.Legend(title=None, orient="bottom")
        )
        base = alt.Chart(together)
        cloud = (
            alt.Chart(apart)
            .mark_point(filled=True, size=34, opacity=0.75, clip=True)
            .encode(x=x, y=y, color=colour, tooltip=["group:N", *tooltip])
        )
        line = base.mark_line(color="#444").encode(x=x, y=y)
        whisker = base.mark_rule(color="#444").encode(x=x, y=alt.Y("low:Q", title="share right"), y2="high:Q")
        point = base.mark_point(filled=True, size=50, opacity=1, color="#000").encode(x=x, y=y, tooltip=tooltip)
        panels.append(
            alt.layer(line, whisker, point, cloud).properties(
                width=222, height=220, title=correlation_text(rows, measure, "samples") or SCATTER[measure]
            )
        )
    return alt.hconcat(*panels, spacing=28).properties(
        title=f"Samples at {label} of the ReLUs, in bins of equal size (black: all; coloured: a group): {variant}"
    )


def equal_bins(values: pd.DataFrame, measure: str, count: int) -> pd.DataFrame:
    """Samples in bins of as equal size as can be, by rising ``measure``.

    Returns:
        One row a bin: ``x``, the median; ``accuracy`` with Wilson's limits ``low`` and ``high``; ``n``.
    """
    rank = values[measure].rank(method="first").to_numpy() - 1
    numbered = values.assign(bin=(count * rank / max(len(values), 1)).astype(int))
    bins = numbered.groupby("bin").agg(x=(measure, "median"), accuracy=("correct", "mean"), n=("correct", "size"))
    limits = [wilson_interval(float(a), int(n)) for a, n in zip(bins["accuracy"], bins["n"], strict=True)]
    return bins.assign(low=[low for low, _ in limits], high=[high for _, high in limits]).reset_index()


def correlation_text(rows: pd.DataFrame, measure: str, over: str) -> str:
    """Rank correlation with accuracy and its interval, in words; empty if it was not measured."""
    found = rows[rows["measure"] == f"{measure}_correlation_{over}"]
    if found.empty:
        return ""
    value, low, high = (float(found[column].iloc[0]) for column in ("value", "low", "high"))
    limits = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    return f"rank correlation {value:+.2f}{limits}"


def _smallest(frame: pd.DataFrame, variant: str) -> tuple[pd.DataFrame, str]:
    """Rows of the variant at its smallest budget, and that budget's label."""
    own = frame[frame["variant"] == variant]
    rows = own[own["percent"] == own["percent"].min()]
    rows = rows[rows["model"] == rows["model"].iloc[0]]
    return rows, str(rows["budget"].iloc[0])


def _positive(values: pd.Series[Any]) -> alt.Scale:
    """A logarithmic axis where the values span decades."""
    if values.min() > 0 and values.max() / values.min() > 30:
        return alt.Scale(type="log")
    return alt.Scale(zero=False, padding=10)


def _sparse(values: pd.Series[Any]) -> alt.Axis:
    """Ticks at powers of ten alone where the axis is logarithmic."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > 30:
        return alt.Axis(values=[10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)])
    return alt.Axis()


def _short(value: float) -> str:
    """Round to three digits, in full.

    >>> _short(12345.6), _short(0.12345)
    ('12,300', '0.123')

    Returns:
        The number as a text.
    """
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _group_scale(groups: list[str]) -> alt.Scale:
    if len(groups) <= len(PALETTE):
        return alt.Scale(domain=groups, range=PALETTE[: len(groups)])
    return alt.Scale(domain=groups, scheme="tableau20")


def _unit(measure: str) -> str:
    return {"gradient_norm": "gradient norm, nats per unit of θ", "boundary_distance": "minimal L2 distance"}.get(
        measure, SCATTER[measure]
    )


def bound_table(frame: pd.DataFrame, variant: str) -> list[dict[str, str]]:
    """Theorem 4.4, one row a budget and group; empty if it was not measured."""
    rows = frame[(frame["variant"] == variant) & (frame["group"] != OVERALL)]
    if not (rows["measure"] == "bound").any():
        return []
    table = []
    for budget in budget_order(rows):
        here = rows[rows["budget"] == budget].pivot_table(index="group", columns="measure", values="value", sort=False)
        for group in group_order(frame):
            row = here.loc[group]
            # A measure that is nowhere defined has no column.
            weights, loose = (row.get(name, math.nan) for name in ("excess_loss_weights", "bound_looseness"))
            table.append(
                {
                    "budget": budget,
                    "group": group,
                    "excess": f"{row['excess_loss']:+.3f}",
                    "weights": "" if math.isnan(weights) else f"{weights:+.2f}",
                    "first": _short(row["bound_first"]),
                    "second": _short(row["bound_second"]),
                    "bound": _short(row["bound"]),
                    "holds": "yes" if row["bound_holds"] else "no",
                    "loose": "" if math.isnan(loose) else f"{_short(loose)} ×",
                }
            )
    return table


def binary_table(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Proposition 4.5, one row a network and group; empty if it was not measured."""
    rows = frame[frame["group"] != OVERALL]
    if not (rows["measure"] == "z_bound").any():
        return []
    table = []
    for (variant, budget), part in rows.groupby(["variant", "budget"], sort=False):
        here = part.pivot_table(index="group", columns="measure", values="value", sort=False)
        for group in group_order(frame):
            row = here.loc[group]
            largest = row["z_bound"] / row.get("z_bound_looseness", math.nan)
            table.append(
                {
                    "network": f"{variant}, {budget}",
                    "group": group,
                    "z1": f"{row['z1']:.4g}",
                    "z2": f"{row['z2']:.4g}",
                    "bound": f"{row['z_bound']:.4g}",
                    "largest": "" if math.isnan(largest) else f"{largest:.4g}",
                    "holds": "yes" if row["z_bound_holds"] else "no",
                    "printed": f"{row['z2_printed']:.4g}",
                }
            )
    return table


def balance_table(frame: pd.DataFrame) -> dict[str, Any]:
    """Appendix A.1: each group's share of the pull on the parameters, one column a network; empty if not measured."""
    rows = frame[frame["measure"].isin(["gradient_norm", "gradient_share", "gradient_residual"])]
    if rows.empty:
        return {}
    # Of several variants the one that the figures show first.
    rows = with_base(rows, main_variants(frame)[0])
    networks = rows[["variant", "budget"]].drop_duplicates().itertuples(index=False)
    columns: list[str] = []
    residuals: list[str] = []
    cells: dict[str, list[str]] = {group: [] for group in group_order(frame)}
    for network in networks:
        here = rows[(rows["variant"] == network.variant) & (rows["budget"] == network.budget)]
        columns.append("base network" if (here["stage"] == "base").all() else f"{network.budget} of ReLUs")
        table = here.pivot_table(index="group", columns="measure", values="value", sort=False)
        for group, row in cells.items():
            row.append(f"{table.loc[group, 'gradient_norm']:.3g} ({table.loc[group, 'gradient_share']:.0%})")
        residuals.append(f"{table.loc[OVERALL, 'gradient_residual']:.2f}")
    sizes = frame[frame["measure"] == "gradient_norm"].groupby("group", sort=False)["n"].max()
    return {
        "columns": columns,
        "rows": [{"group": group, "n": f"{int(sizes[group]):,}", "cells": row} for group, row in cells.items()],
        "residuals": residuals,
    }


def warnings(frame: pd.DataFrame) -> list[str]:
    """What a reader must know before trusting the explaining numbers."""
    found = []
    for matrix, words in (
        ("hessian", "The largest Hessian eigenvalue"),
        ("ggn", "The largest Gauss–Newton eigenvalue"),
    ):
        open_ = frame[(frame["measure"] == f"{matrix}_converged") & (frame["value"] == 0)]
        if len(open_):
            names = ", ".join(
                dict.fromkeys(
                    f"“{group}” at {budget}" for group, budget in zip(open_["group"], open_["budget"], strict=True)
                )
            )
            found.append(
                f"{words} did not reach its tolerance for {names}; the value shown is too low. Raise max_products."
            )
    missed = frame[(frame["measure"] == "boundary_distance_missed") & (frame["group"] == OVERALL)]
    if len(missed):
        found.append(
            f"DeepFool reached no boundary for up to {int(missed['value'].max())} of {int(missed['n'].max()):,} images "
            "of a network; distances are means over the others."
        )
    return found
