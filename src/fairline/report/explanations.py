"""Figures and tables that explain who pays, for audits that measured more than accuracy. One function a figure.

The paper's Sections 4 and 5: Figures 3, 4, 8 and 14, Theorem 4.4, Proposition 4.5 and Appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from fairline.audit.intervals import wilson_interval
from fairline.charts import PALETTE, themed
from fairline.data.grouped import OVERALL
from fairline.report.figures import (
    budget_order,
    dots,
    group_order,
    main_variants,
    network_order,
    network_scale,
    of_the_relus,
    order_of,
    slug,
    with_base,
)
from fairline.report.verdict import Candidate, focus

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


#: What the paper explains losses with, in words that say which groups should lose more, and the sign for that.
EXPECTED = {
    "gradient_norm": ("larger gradient norm", 1),
    "hessian_max": ("larger curvature", 1),
    "margin": ("smaller margin", -1),
    "boundary_distance": ("smaller distance to the boundary", -1),
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
        drawn: dict[str, Any] = {}
        rows = with_base(frame, variant)
        for measure in BARS:
            if (rows["measure"] == measure).any():
                drawn[f"{measure}_by_group"] = measure_by_group(frame, variant, measure)
        if (rows["measure"] == "parameter_distance").any():
            drawn["parameter_distance"] = parameter_distance(frame, variant)
        if rows["measure"].str.startswith("parameter_distance/").any():
            drawn["parameter_distance_by_layer"] = distance_by_layer(frame, variant)
        for measure in SCATTER:
            if (rows["measure"] == measure).any():
                drawn[f"accuracy_against_groups_{measure}"] = accuracy_against(frame, variant, measure)
            if measure in predictions:
                drawn[f"accuracy_against_samples_{measure}"] = samples_against(frame, predictions, variant, measure)
        made |= {f"{name}_{slug(variant)}": themed(chart) for name, chart in drawn.items()}
    return made


def told(frame: pd.DataFrame, found: Sequence[Candidate]) -> str:
    """Whether what the paper explains losses with goes with the losses here, of the network that a page shows first.

    Losses are of groups, in points; gradients, curvature and margins are the base network's, as in Theorem 4.4. The
    rank correlation is tested by permuting the groups (Pitman 1937).

    Args:
        frame: From :func:`fairline.report.figures.prepare`.
        found: Networks with their verdicts.

    Returns:
        A sentence; empty where nothing is known.
    """
    chosen = focus(found)
    if chosen is None:
        return ""
    cells = chosen.verdict.cells
    lost = -cells[cells["kind"] == "group"].set_index("group")["change"]
    base = frame[frame["stage"] == "base"]
    rows = base if len(base) else frame[frame["model"] == chosen.model]
    sentences = []
    for measure, (words, sign) in EXPECTED.items():
        own = rows[(rows["measure"] == measure) & (rows["group"] != OVERALL)].set_index("group")["value"]
        both = pd.concat([own, lost], axis=1, join="inner").dropna().to_numpy()
        if len(both) >= 3 and (np.ptp(both, axis=0) > 0).all():
            rank, p = rank_correlation(both[:, 0], both[:, 1])
            sentences.append(_goes_with(words, sign, rank, p, len(both)))
    return f"{chosen.name}: {'; '.join(sentences)}." if sentences else ""


def _goes_with(words: str, sign: int, rank: float, p: float, groups: int) -> str:
    measured = f"rank correlation {rank:+.2f} over {groups} groups, permutation p = {p:.2g}".replace("-", "−")
    if p >= 0.05:
        return f"whether groups with a {words} lose more cannot be told ({measured})"
    if rank * sign > 0:
        return f"groups with a {words} do lose more here ({measured}), which does not say that it is the cause"
    return f"groups with a {words} lose less here, against the paper’s explanation ({measured})"


def rank_correlation(x: Any, y: Any, most: int = 10_000) -> tuple[float, float]:
    """Spearman's rank correlation and its probability by chance: how many permutations give one as strong.

    Args:
        x: Numbers.
        y: As many.
        most: Permutations; all of them where there are no more.

    Returns:
        The correlation, and p of both sides.

    >>> rank_correlation([1, 2, 3, 4], [2, 4, 6, 9])
    (1.0, 0.08333333333333333)
    """
    from scipy.stats import permutation_test, rankdata

    ranks, other = rankdata(x), rankdata(y)
    found = permutation_test(
        (ranks,),
        lambda a: float(np.corrcoef(a, other)[0, 1]),
        permutation_type="pairings",
        n_resamples=most,
        vectorized=False,
        rng=np.random.default_rng(0),
    )
    return round(float(found.statistic), 12), min(1.0, float(found.pvalue))


def measure_by_group(frame: pd.DataFrame, variant: str, measure: str) -> Any:
    """One measure of each group, networks side by side (paper, Figures 3, 4 and 14)."""
    axis_title, title = BARS[measure]
    rows = with_base(frame, variant)
    rows = rows[(rows["measure"] == measure) & (rows["group"] != OVERALL)]
    rows = rows.assign(who=[f"{name} ({n:,})" for name, n in zip(rows["group"], rows["n"], strict=True)])
    chart = dots(rows, order_of(frame, rows), network_scale(rows), axis_title)
    return chart.properties(title=alt.Title(title, subtitle=variant))


def parameter_distance(frame: pd.DataFrame, variant: str) -> Any:
    """‖θ̃ʳ − θ‖ against the budget, in all layers (paper, Figure 8, left)."""
    rows = frame[(frame["variant"] == variant) & (frame["measure"] == "parameter_distance")]
    budgets = budget_order(rows)
    return (
        alt.Chart(rows)
        .mark_point(filled=True, size=80, opacity=1)
        .encode(
            y=alt.Y("budget:N", sort=budgets, title="ReLUs kept", axis=alt.Axis(grid=False)),
            x=alt.X("value:Q", title="‖θ̃ − θ‖, all layers", scale=alt.Scale(zero=True)),
            color=alt.Color("network:N", scale=network_scale(rows), legend=None),
            tooltip=[
                alt.Tooltip("budget:N", title="ReLUs kept"),
                alt.Tooltip("value:Q", format=".4~g", title="distance"),
            ],
        )
        .properties(
            width="container",
            height=max(80, 28 * len(budgets)),
            title=alt.Title("How far the weights moved", subtitle=variant),
        )
    )


def distance_by_layer(frame: pd.DataFrame, variant: str) -> Any:
    """The same in the layers that moved most, in the order of the network."""
    rows = frame[(frame["variant"] == variant) & frame["measure"].str.startswith("parameter_distance/")].copy()
    rows["layer"] = rows["measure"].str.partition("/")[2]
    largest = rows.groupby("layer", sort=False)["value"].max().nlargest(12).index
    names = [str(name) for name in rows["layer"].unique() if name in set(largest)]
    legend = alt.Legend(orient="bottom", columns=3)
    colour = alt.Color("network:N", sort=budget_order(rows), title=None, scale=network_scale(rows), legend=legend)
    return (
        alt.Chart(rows[rows["layer"].isin(names)])
        .mark_point(filled=True, size=70, opacity=0.9)
        .encode(
            y=alt.Y("layer:N", sort=names, title=None, axis=alt.Axis(grid=True, labelLimit=160)),
            x=alt.X("value:Q", title="‖θ̃ − θ‖ of the layer"),
            color=colour,
            tooltip=[
                alt.Tooltip("layer:N"),
                alt.Tooltip("budget:N", title="ReLUs kept"),
                alt.Tooltip("value:Q", format=".4~g", title="distance"),
            ],
        )
        .properties(
            width="container",
            height=max(80, 22 * len(names)),
            title=alt.Title(f"The {len(names)} layers that moved most", subtitle=variant),
        )
    )


def accuracy_against(frame: pd.DataFrame, variant: str, measure: str) -> Any:
    """Each group's accuracy against what explains it, at the smallest budget (paper, Figure 8, middle and right)."""
    rows, label = _smallest(frame, variant)
    table = rows[(rows["group"] != OVERALL) & (rows["class"] == "")].pivot_table(
        index="group", columns="measure", values=["value", "low", "high", "train_n"], sort=False
    )
    groups = group_order(frame)
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
    x = alt.X(
        "x:Q", title=_unit(measure), scale=alt.Scale(zero=False, padding=18, nice=True), axis=alt.Axis(tickCount=5)
    )
    base = alt.Chart(data)
    colour = alt.Color("group:N", sort=groups, scale=_group_scale(groups), legend=_below())
    y = alt.Y("accuracy:Q", axis=alt.Axis(format="%"), title="accuracy")
    tooltip = [
        alt.Tooltip("group:N"),
        alt.Tooltip("x:Q", format=".4~g", title=SCATTER[measure]),
        alt.Tooltip("accuracy:Q", format=".1%"),
        alt.Tooltip("train_n:Q", title="training images"),
    ]
    whisker = base.mark_rule().encode(x=x, y=alt.Y("low:Q", title="accuracy"), y2="high:Q", color=colour)
    point = base.mark_point(filled=True, size=90, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip)
    title = [f"Groups at {label}: {SCATTER[measure]}", correlation_text(rows, measure, "groups")]
    return alt.layer(whisker, point).properties(
        width="container", height=220, title=alt.Title([line for line in title if line], subtitle=variant)
    )


def _below() -> alt.Legend:
    return alt.Legend(title=None, orient="bottom", columns=3, labelLimit=120)


def samples_against(frame: pd.DataFrame, predictions: pd.DataFrame, variant: str, measure: str) -> Any:
    """Draw the share of right samples against what explains it: ten bins of equal size of all, five of each group.

    A sample is right or wrong, so points of single samples would lie on two lines; a bin's share is what
    Figure 8 (right) is after.

    Args:
        frame: From :func:`fairline.report.figures.prepare`.
        predictions: Rows of ``predictions.parquet``.
        variant: Which networks; those with the fewest ReLUs are drawn.
        measure: A column of ``predictions``.

    Returns:
        An Altair chart.
    """
    rows, label = _smallest(frame, variant)
    own = predictions[predictions["model"] == rows["model"].iloc[0]]
    groups = group_order(frame)
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
    colour = alt.Color("group:N", sort=groups, scale=_group_scale(groups), legend=_below())
    base = alt.Chart(together)
    cloud = (
        alt.Chart(apart)
        .mark_point(filled=True, size=34, opacity=0.75, clip=True)
        .encode(x=x, y=y, color=colour, tooltip=["group:N", *tooltip])
    )
    line = base.mark_line(color="#444").encode(x=x, y=y)
    whisker = base.mark_rule(color="#444").encode(x=x, y=alt.Y("low:Q", title="share right"), y2="high:Q")
    point = base.mark_point(filled=True, size=50, opacity=1, color="#000").encode(x=x, y=y, tooltip=tooltip)
    title = [f"Samples at {label}: {SCATTER[measure]}", correlation_text(rows, measure, "samples")]
    return alt.layer(line, whisker, point, cloud).properties(
        width="container", height=220, title=alt.Title([each for each in title if each], subtitle=variant)
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
    columns: list[str] = []
    residuals: list[str] = []
    cells: dict[str, list[str]] = {group: [] for group in group_order(frame)}
    for name in network_order(rows):
        here = rows[rows["network"] == name]
        columns.append(of_the_relus(name))
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
