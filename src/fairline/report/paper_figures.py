"""What studies measured, drawn, from their table (:mod:`fairline.study.store`): any panels, or the paper's selection.

Each figure of the paper is a function of all rows; :data:`KINDS` draws the same for any panels. Both return an Altair
chart, or None where no study holds what it shows; panels that are missing are left out. Means and Student's 95 %
intervals over seeds; with one seed, the audit's own interval. Figures 2 and 10 are of theory and in
:mod:`fairline.report.theory`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from fairline.charts import PALETTE, themed
from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError
from fairline.report.figures import BASE_NAME, bars, budget_order, group_order
from fairline.report.moved_prior import drops, shifted_panels
from fairline.report.panels import (
    AGE,
    CIFAR,
    DR,
    R18,
    R34,
    RACE,
    SNL,
    SVHN,
    VGG,
    WRN,
    Panel,
    bases,
    finetuned,
    mitigation_drop,
    one_of_several,
    over_seeds,
    panels,
    recipes,
    reference,
    rows_of,
    variants_of_mu,
)

#: Data of which the paper shows the two most and the two least represented classes of the test part; of others too,
#: where there are more groups than a panel has room for.
_EXTREMES = frozenset({SVHN, CIFAR})
_ROOM = 8
_GROUP_AXIS = "group (training images above the bars)"


def _shown_groups(rows: pd.DataFrame, data: str) -> pd.DataFrame:
    if data not in _EXTREMES and rows["group"].nunique() <= _ROOM:
        return rows
    sizes = rows[rows["group"] != OVERALL].groupby("group")["n"].max().sort_values(ascending=False, kind="stable")
    names = list(sizes.index)
    return rows[rows["group"].isin([OVERALL, *names[:2], *names[-2:]])]


def _panel_title(text: str) -> alt.TitleParams:
    return alt.TitleParams(text, fontSize=12, fontWeight="normal")


def _drawn(means: pd.DataFrame, measure: str, axis_title: str, title: str, axis: alt.Axis | None = None) -> Any:
    """Bars of means over seeds, groups along x and a shade a budget."""
    chart = bars(means, measure, axis_title, axis or alt.Axis(), _GROUP_AXIS, 460)
    return chart.properties(height=200, title=_panel_title(title))


def _group_bars(rows: pd.DataFrame, panel: Panel, measure: str, axis_title: str, axis: alt.Axis) -> Any:
    means = over_seeds(_shown_groups(rows[rows["measure"] == measure], panel.data))
    return _drawn(means, measure, axis_title, panel.title, axis)


def _arranged(
    charts: Sequence[Any],
    columns: int,
    title: str,
    used: Sequence[pd.DataFrame],
    *,
    of_images: bool = True,
    note: str = "",
) -> Any:
    """Panels side by side under one title that says what they are of, and whether a single seed has an interval."""
    seeds = [rows["seed"].nunique() for rows in used]
    count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    scales = " / ".join(dict.fromkeys(scale for rows in used for scale in rows["scale"]))
    single = "95 % interval of the images" if of_images else "no interval"
    interval = "mean and 95 % interval over seeds" if max(seeds) > 1 else single
    if min(seeds) == 1 < max(seeds):
        interval += f" ({single} where there is one)"
    words = f"{scales} {count} seed{'' if count == '1' else 's'}; {interval}. {note}".strip()
    subtitle = textwrap.wrap(words, 62 * min(columns, len(charts)) + 28)
    whole = alt.concat(*charts, columns=columns, spacing=28).resolve_scale(color="independent", xOffset="independent")
    return themed(
        whole.properties(title=alt.TitleParams(title, subtitle=subtitle, subtitleColor="#555", anchor="start"))
    )


def _by_group(
    table: pd.DataFrame,
    wanted: Sequence[Panel],
    title: str,
    measure: str,
    axis_title: str,
    *,
    columns: int = 2,
    pick: Callable[[pd.DataFrame], pd.DataFrame] = finetuned,
    with_base: bool = False,
    axis: Callable[[], alt.Axis] = alt.Axis,
) -> Any:
    """A figure of group bars, a panel each; None if no study holds any."""
    charts, used, undefined = [], [], False
    for panel in wanted:
        rows = rows_of(table, panel)
        own = pick(rows) if len(rows) else rows
        if len(own) and with_base:
            own = pd.concat([_beside(_of_seeds(bases(rows), own), own), own])
        if not len(own) or measure not in set(own["measure"]):
            continue
        charts.append(_group_bars(own, panel, measure, axis_title, axis()))
        used.append(_of_seeds(rows, own[own["measure"] == measure]))
        shown = _shown_groups(own[own["measure"] == measure], panel.data)
        undefined |= bool((shown.groupby("group")["value"].count() == 0).any())
    if not charts:
        return None
    note = "No bars where the base network gets none of a group right." if undefined else ""
    of_images = measure != "mitigation_drop"
    return _arranged(charts, columns, title, used, of_images=of_images, note=note)


def _of_seeds(rows: pd.DataFrame, drawn: pd.DataFrame) -> pd.DataFrame:
    """Rows of the seeds that are drawn: a base network of others would shift what it is compared with."""
    return rows[rows["seed"].isin(drawn["seed"])]


def _beside(base: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """Rows of base networks, under a name of their own where a control has all ReLUs, too."""
    return base.assign(budget=BASE_NAME) if base["budget"].isin(own["budget"]).any() else base


def _percent_axis() -> alt.Axis:
    return alt.Axis(format="%")


DROP = "relative accuracy drop, %"
MITIGATION_DROP = "drop after mitigation, % (below 0: helped)"


def figure_1(table: pd.DataFrame) -> Any:
    """Accuracy of each race at each budget; ResNet-18, SNL."""
    return _by_group(
        table,
        [Panel(RACE)],
        "Figure 1: accuracy by group",
        "accuracy",
        "accuracy",
        with_base=True,
        axis=_percent_axis,
    )


def figure_3(table: pd.DataFrame) -> Any:
    """Group gradient norms ‖∇J(θ̃; Sᵃ)‖ at each budget; races, ResNet-18, SNL."""
    return _by_group(
        table, [Panel(RACE)], "Figure 3: gradient norms by group", "gradient_norm", "gradient norm", with_base=True
    )


def figure_4(table: pd.DataFrame) -> Any:
    """Largest Hessian eigenvalue of each race for the base network; ResNet-18."""
    return _by_group(
        table,
        [Panel(RACE)],
        "Figure 4: largest Hessian eigenvalue by group, base network",
        "hessian_max",
        "λ_max of the group Hessian",
        pick=bases,
    )


def figure_5(table: pd.DataFrame) -> Any:
    """Overall accuracy at each budget, and the base network's as a red line; ages, ResNet-18, SNL and DeepReDuce."""
    wanted = [Panel(AGE), Panel(AGE, method=DR)]
    return _overall(table, wanted, "Figure 5: overall accuracy by budget (red: all ReLUs, not finetuned)")


def _overall(table: pd.DataFrame, wanted: Sequence[Panel], title: str) -> Any:
    charts, used = [], []
    for panel in wanted:
        rows = rows_of(table, panel)
        rows = rows[(rows["measure"] == "accuracy") & (rows["group"] == OVERALL)]
        if not len(rows):
            continue
        drawn = _reference(rows)
        base = over_seeds(_of_seeds(bases(rows), drawn))
        own = over_seeds(drawn)
        if own.empty or base.empty:
            continue
        line = alt.Chart(base).mark_rule(color="#C00000", strokeWidth=2).encode(y="value:Q")
        x = alt.X("budget:N", sort=budget_order(own), title="ReLUs kept", axis=alt.Axis(labelAngle=0))
        boxes = alt.Chart(own).mark_bar(color="#8bb8da", stroke="#1f4e79", strokeWidth=0.5, width=34)
        whiskers = alt.Chart(own).mark_rule(color="#222").encode(x=x, y="low:Q", y2="high:Q")
        y = alt.Y("value:Q", title="overall accuracy", axis=_percent_axis())
        charts.append(
            alt.layer(boxes.encode(x=x, y=y), whiskers, line).properties(
                width=alt.Step(64),
                height=200,
                title=_panel_title(panel.title),
            )
        )
        used.append(drawn)
    return _arranged(charts, 2, title, used) if charts else None


def figure_6(table: pd.DataFrame) -> Any:
    """Relative accuracy drop: data sets, models and methods, in the paper's two rows of four."""
    wanted = [
        Panel(SVHN),
        Panel(AGE),
        Panel(AGE, R34),
        Panel(AGE, method=DR),
        Panel(CIFAR),
        Panel(RACE),
        Panel(RACE, R34),
        Panel(RACE, method=DR),
    ]
    held = [panel for panel in wanted if len(rows_of(table, panel))]
    top = sum(panel in wanted[:4] for panel in held)
    # The paper's columns stand only where both rows are whole.
    columns = 4 if top == len(held) - top == 4 else 2
    return _by_group(table, held, "Figure 6: relative accuracy drop", "relative_drop", DROP, columns=columns)


def figure_7(table: pd.DataFrame) -> Any:
    """Relative accuracy drop of VGG-19 and WRN-22-8, races and ages, SNL."""
    wanted = [Panel(data, model) for model in (VGG, WRN) for data in (RACE, AGE)]
    return _by_group(table, wanted, "Figure 7: VGG-19 and WRN-22-8", "relative_drop", DROP)


def figure_8(table: pd.DataFrame) -> Any:
    """‖θ̃ʳ − θ‖ against the budget; group accuracy against gradient norm and margin at the lowest budget."""
    panel = Panel(RACE)
    rows = rows_of(table, panel)
    if not len(rows):
        return None
    drawn = _reference(rows)
    charts = _distance_and_scatters(over_seeds(drawn))
    title = f"Figure 8: distance of the weights, gradient norms and margins ({panel.title})"
    return _arranged(charts, 3, title, [drawn]) if charts else None


def _reference(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the finetune that others are set beside."""
    return rows[(rows["stage"] == "finetuned") & (rows["finetune"] == reference(rows))]


def _distance_and_scatters(own: pd.DataFrame) -> list[Any]:
    """Distance of the weights by budget; accuracy against what may explain it, at the lowest."""
    charts: list[Any] = []
    distance = own[(own["measure"] == "parameter_distance") & (own["percent"] > 0)]
    if len(distance):
        x = alt.X(
            "percent:Q",
            scale=alt.Scale(type="log", domain=[distance["percent"].min() / 1.3, 125]),
            axis=alt.Axis(values=sorted(distance["percent"]), labelExpr="format(datum.value, '.2~r') + ' %'"),
            title="ReLUs kept (logarithmic)",
        )
        y = alt.Y("value:Q", title="‖θ̃ − θ‖", scale=alt.Scale(zero=False))
        # The control was trained on for as long as the lowest budget, so it is no end of the line.
        cut, whole = alt.Chart(distance[distance["percent"] < 100]), alt.Chart(distance[distance["percent"] == 100])
        points: dict[str, Any] = {"size": 60, "color": PALETTE[0], "opacity": 1}
        layers = [
            cut.mark_line(color=PALETTE[0]).encode(x=x, y=y),
            alt.Chart(distance).mark_rule(color=PALETTE[0]).encode(x=x, y="low:Q", y2="high:Q"),
            cut.mark_point(filled=True, **points).encode(x=x, y=y),
            whole.mark_point(fill="white", **points).encode(x=x, y=y),
        ]
        charts.append(alt.layer(*layers).properties(width=240, height=220))
    lowest = own[(own["percent"] == own["percent"].min()) & (own["group"] != OVERALL)]
    for measure, title in (("gradient_norm", "gradient norm"), ("margin", "softmax margin p₁ − p₂")):
        if measure in set(lowest["measure"]):
            charts.append(_scatter(lowest, measure, f"{title}, {lowest['budget'].iloc[0]} of the ReLUs"))
    return charts


def _scatter(rows: pd.DataFrame, measure: str, title: str) -> Any:
    """Group accuracy against a measure, with both intervals."""
    wide = rows[rows["measure"] == "accuracy"].merge(
        rows.loc[rows["measure"] == measure, ["group", "value", "low", "high"]], on="group", suffixes=("", "_x")
    )
    order = group_order(rows)
    x = alt.X("value_x:Q", title=title, scale=alt.Scale(zero=False, padding=24))
    y = alt.Y("value:Q", title="group accuracy", axis=_percent_axis(), scale=alt.Scale(padding=14))
    shades = [PALETTE[place % len(PALETTE)] for place in range(len(order))]
    colour = alt.Color("group:N", sort=order, scale=alt.Scale(domain=order, range=shades), title="group")
    drawn = alt.Chart(wide)
    return alt.layer(
        drawn.mark_rule(opacity=0.5).encode(x=x, y="low:Q", y2="high:Q", color=colour),
        drawn.mark_rule(opacity=0.5).encode(x=alt.X("low_x:Q"), x2="high_x:Q", y=y, color=colour),
        drawn.mark_point(filled=True, size=90, opacity=1).encode(
            x=x, y=y, color=colour, tooltip=["group:N", "value_x:Q", "value:Q", "train_n:Q"]
        ),
    ).properties(width=240, height=220)


def figure_9(table: pd.DataFrame) -> Any:
    """What Algorithm 1 changes: ages and races, SNL and DeepReDuce, ResNet-18."""
    wanted = [Panel(data, method=method) for data in (AGE, RACE) for method in (SNL, DR)]
    return _by_group(table, wanted, "Figure 9: mitigation", "mitigation_drop", MITIGATION_DROP, pick=mitigation_drop)


def figure_11(table: pd.DataFrame) -> Any:
    """Relative accuracy drop on CIFAR-10 and SVHN, ResNet-18 and -34, SNL."""
    wanted = [Panel(data, model) for model in (R18, R34) for data in (CIFAR, SVHN)]
    return _by_group(table, wanted, "Figure 11: CIFAR-10 and SVHN", "relative_drop", DROP)


def figure_12(table: pd.DataFrame) -> Any:
    """What Algorithm 1 changes: ResNet-34 on ages, races and CIFAR-10, ResNet-18 on CIFAR-10; SNL."""
    wanted = [Panel(AGE, R34), Panel(RACE, R34), Panel(CIFAR, R34), Panel(CIFAR)]
    return _by_group(
        table, wanted, "Figure 12: mitigation, more networks", "mitigation_drop", MITIGATION_DROP, pick=mitigation_drop
    )


def figure_13(table: pd.DataFrame) -> Any:
    """Accuracy, and gradient norms (of which the paper's text speaks there), without and with Algorithm 1; ages."""
    return _without_and_with(
        table,
        "Figure 13: accuracy and gradient norms, without (left) and with mitigation (right)",
        [("accuracy", "accuracy", _percent_axis), ("gradient_norm", "gradient norm", alt.Axis)],
    )


def figure_14(table: pd.DataFrame) -> Any:
    """Normalized distance to the decision boundary, without and with Algorithm 1; ages, ResNet-18, SNL."""
    return _without_and_with(
        table,
        "Figure 14: normalized margin, without (left) and with mitigation (right)",
        [("margin_normalized", "margin, largest group = 1", alt.Axis)],
    )


def _without_and_with(
    table: pd.DataFrame, title: str, measures: Sequence[tuple[str, str, Callable[[], alt.Axis]]]
) -> Any:
    panel = Panel(AGE)
    rows = rows_of(table, panel)
    if not len(rows) or not len(finetuned(rows, "lagrangian")):
        return None
    charts = []
    pair = [finetuned(rows), finetuned(rows, "lagrangian")]
    for measure, axis_title, axis in measures:
        if any(measure not in set(own["measure"]) for own in pair):
            continue
        charts.append(
            alt.hconcat(*(_group_bars(own, panel, measure, axis_title, axis()) for own in pair)).resolve_scale(
                y="shared"
            )
        )
    return _arranged(charts, 1, title, pair) if charts else None


def figure_15(table: pd.DataFrame) -> Any:
    """What Algorithm 1 changes under each μ, where there are several; races, ResNet-18, SNL."""
    rows = rows_of(table, Panel(RACE))
    charts, used = [], []
    for mu, finetune in variants_of_mu(rows):
        drops = mitigation_drop(rows, finetune)
        charts.append(_drawn(over_seeds(drops), "mitigation_drop", MITIGATION_DROP, f"μ = {mu:g}"))
        used.append(_of_seeds(rows, drops))
    if len(charts) < 2:
        return None
    shared = alt.hconcat(*charts).resolve_scale(y="shared")
    return _arranged(
        [shared], 1, f"Figure 15: the step μ of the multipliers ({Panel(RACE).title})", used, of_images=False
    )


#: Every empirical figure, by its number in the paper.
FIGURES: dict[int, Callable[[pd.DataFrame], Any]] = {
    1: figure_1,
    3: figure_3,
    4: figure_4,
    5: figure_5,
    6: figure_6,
    7: figure_7,
    8: figure_8,
    9: figure_9,
    11: figure_11,
    12: figure_12,
    13: figure_13,
    14: figure_14,
    15: figure_15,
}


#: What the paper's figures show.
PAPER = frozenset(
    (data, model, method)
    for data, model, method in (
        *((data, model, SNL) for data in (RACE, AGE) for model in (R18, R34, VGG, WRN)),
        *((data, R18, DR) for data in (RACE, AGE)),
        *((data, model, SNL) for data in (SVHN, CIFAR) for model in (R18, R34)),
    )
)


def _kind(measure: str, title: str, axis_title: str, **more: Any) -> Callable[[pd.DataFrame, Sequence[Panel]], Any]:
    return lambda table, wanted: _by_group(table, wanted, title, measure, axis_title, **{"pick": _reference, **more})


#: Figures of any panels, by name of the file.
KINDS: dict[str, Callable[[pd.DataFrame, Sequence[Panel]], Any]] = {
    "accuracy_by_group": _kind("accuracy", "Accuracy by group", "accuracy", with_base=True, axis=_percent_axis),
    "overall_accuracy": lambda table, wanted: _overall(
        table, wanted, "Overall accuracy by budget (red: all ReLUs, not finetuned)"
    ),
    "relative_drop": _kind("relative_drop", "Relative accuracy drop", DROP),
    "gradient_norm": _kind("gradient_norm", "Gradient norms by group", "gradient norm", with_base=True),
    "hessian_max": _kind(
        "hessian_max",
        "Largest Hessian eigenvalue by group, base network",
        "λ_max of the group Hessian",
        pick=bases,
    ),
    "margin": _kind("margin", "Softmax margin by group", "softmax margin p₁ − p₂", with_base=True),
}


def _mitigations(table: pd.DataFrame, wanted: Sequence[Panel]) -> dict[str, Any]:
    """What each other finetune changes, a figure each."""
    held = [(panel, rows_of(table, panel)) for panel in wanted]
    others: dict[str, list[Panel]] = {}
    for panel, rows in held:
        # Of a sweep what was chosen is drawn; its table has the rest.
        for name in rows.loc[(rows["stage"] == "finetuned") & ~one_of_several(rows), "finetune"].unique():
            if name != reference(rows):
                others.setdefault(str(name), []).append(panel)
    return {
        f"mitigation_{slug(name)}": _by_group(
            table,
            own,
            f"What {name} changes",
            "mitigation_drop",
            "drop after it, % (below 0: helped)",
            pick=partial(mitigation_drop, finetune=name),
        )
        for name, own in others.items()
    }


def _explained(table: pd.DataFrame, wanted: Sequence[Panel]) -> dict[str, Any]:
    """Distance of the weights, and what may explain who pays, a figure a panel."""
    found: dict[str, Any] = {}
    for place, panel in enumerate(wanted, start=1):
        rows = rows_of(table, panel)
        drawn = _reference(rows)
        charts = _distance_and_scatters(over_seeds(drawn))
        title = f"Distance of the weights, gradient norms and margins ({panel.title})"
        name = "explanations" if len(wanted) == 1 else f"explanations_{place}"
        found[name] = _arranged(charts, 3, title, [drawn]) if charts else None
    return found


def slug(name: str) -> str:
    """A name as part of a file's.

    >>> slug("erm, last layer")
    'erm_last_layer'

    Returns:
        Small letters, digits and underscores.
    """
    return "_".join("".join(c if c.isalnum() else " " for c in name).split()).lower()


def papers_part(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of which the paper's figures can be drawn: without those of panels that several recipes hold."""
    mixed = [panel for kind in sorted(PAPER) if len(recipes(table, panel := Panel(*kind))) > 1]
    for panel in mixed:
        table = table[~panel.made(table)]
    return table


def draw_others(table: pd.DataFrame) -> dict[str, Any]:
    """Draw every panel that no figure of the paper shows: of any data, groups, network and masks.

    Args:
        table: The table of one or more studies.

    Returns:
        The charts by name; empty if there is no such panel.
    """
    taken = {held[0] for kind in PAPER if len(held := recipes(table, Panel(*kind))) == 1}
    wanted = [p for p in panels(table, plain=False) if (p.study, p.label, p.masks) not in taken]
    if not wanted:
        return {}
    drawn = {name: kind(table, wanted) for name, kind in KINDS.items()}
    drawn |= _mitigations(table, wanted) | _explained(table, wanted)
    return {name: chart for name, chart in drawn.items() if chart is not None}


def draw_shifted(table: pd.DataFrame, compared: pd.DataFrame) -> dict[str, Any]:
    """Draw each group's drop before and after a free shift of the output biases, a row a panel.

    Args:
        table: The table of one or more studies.
        compared: What their comparisons say of each seed (:func:`fairline.study.store.read_by_seed`).

    Returns:
        The chart by name; empty if no study was compared.
    """
    charts, used = [], []
    for panel, rows, own in shifted_panels(table, compared):
        means = over_seeds(drops(rows, own))
        shown = _shown_groups(means, panel.data)
        # One axis for both; above the bars stand numbers.
        limits = shown[["value", "low", "high"]].to_numpy(float)
        least, most = min(0.0, float(np.nanmin(limits))), max(0.0, float(np.nanmax(limits)))
        scale = alt.Scale(domain=[least, most + 0.1 * (most - least)])
        pair = [
            _drawn(shown, name, "points of accuracy lost", f"{panel.title}: {said}").encode(y=alt.Y(scale=scale))
            for name, said in (("before", "as finetuned"), ("after", "biases shifted"))
        ]
        charts += pair
        used.append(_of_seeds(rows, own))
    if not charts:
        return {}
    note = "Both networks of a drop are shifted by what validation images chose for the linearized one."
    title = "What each group lost, before and after a free shift of the output biases"
    return {"moved_prior": _arranged(charts, 2, title, used, of_images=False, note=note)}


def draw(table: pd.DataFrame, numbers: Sequence[int] | None = None) -> dict[int, Any]:
    """Draw figures of the paper.

    Args:
        table: The table of one or more studies.
        numbers: Which; all that the table allows, by default, of panels that one recipe holds.

    Returns:
        The charts by number.

    Raises:
        FairlineError: The paper has no such empirical figure, or the table does not hold what one shows.
    """
    for number in numbers or ():
        if number not in FIGURES:
            raise FairlineError(f"The paper has no empirical figure {number}; it has {', '.join(map(str, FIGURES))}.")
    rows = table if numbers else papers_part(table)
    drawn = {number: FIGURES[number](rows) for number in numbers or FIGURES}
    missing = [number for number, chart in drawn.items() if chart is None]
    if numbers and missing:
        raise FairlineError(f"No study here holds what figure {missing[0]} shows.")
    return {number: chart for number, chart in drawn.items() if chart is not None}
