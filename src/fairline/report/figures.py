"""The figures of accuracy by group and budget (paper, Figures 1, 5 and 6), and names and orders for all figures.

Each takes audit rows (see :func:`prepare`) and returns an Altair chart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import pandas as pd

from fairline.audit.control import control_of
from fairline.charts import BASE, CONTROL, INK, PALETTE, RAMP, SHIPPED, themed
from fairline.data.grouped import OVERALL
from fairline.report.verdict import Candidate, focus

#: What the base network is called where networks stand side by side.
BASE_NAME = "base network"

#: What all images together are called.
EVERYONE = "all images"


def prepare(audit: pd.DataFrame, counts: pd.DataFrame) -> pd.DataFrame:
    """Add what the figures need to the rows of ``audit.parquet``.

    Args:
        audit: Rows of ``audit.parquet``.
        counts: Rows of ``counts.parquet``.

    Returns:
        The rows with ``percent`` (ReLUs kept), ``budget`` (the same, as a label), ``variant`` (method and finetune,
        in words; two networks with as many ReLUs never have the same), ``network`` (:data:`BASE_NAME` or the budget)
        and ``train_n`` (training images of the group). Rows of an earlier version get the columns that they lack.
    """
    frame = audit.copy()
    frame["class"] = frame["class"].fillna("") if "class" in frame else ""
    frame["percent"] = 100 * frame["relus"] / frame["total_relus"]
    labels = budget_labels(frame["percent"].unique())
    frame["budget"] = frame["percent"].map(labels)
    sizes = counts[counts["part"] == "train"].set_index("group")["n"]
    frame["train_n"] = frame["group"].map(sizes).fillna(sizes.sum()).astype(int)
    for column, usual in (("placement", ""), ("surrogate", "identity"), ("compiled", False)):
        if column not in frame:
            frame[column] = usual
    frame["variant"] = [
        variant_label(*row)
        for row in frame[["stage", "method", "objective", "placement", "surrogate", "compiled"]].itertuples(
            index=False, name=None
        )
    ]
    frame["variant"] = _told_apart(frame)
    frame["network"] = frame["budget"].where(frame["stage"] != "base", BASE_NAME)
    return frame


def _told_apart(frame: pd.DataFrame) -> pd.Series[str]:
    """Variants, with the run's name where it takes that to tell networks apart."""
    models = frame[["model", "variant", "relus"]].drop_duplicates("model")
    alike = set(models.loc[models.duplicated(["variant", "relus"], keep=False), "variant"])
    runs = frame["model"].astype(str).str.rpartition("/")[0].where(lambda run: run != "", frame["model"])
    return frame["variant"].where(~frame["variant"].isin(alike), frame["variant"] + " · " + runs)


def budget_labels(percents: Iterable[float]) -> dict[float, str]:
    """Label percentages, with as few digits as tell them apart.

    >>> budget_labels([100.0, 9.988, 2.009])
    {100.0: '100 %', 9.988: '10 %', 2.009: '2 %'}
    >>> budget_labels([12.31, 12.44])
    {12.31: '12.3 %', 12.44: '12.4 %'}

    Returns:
        Labels by percentage.
    """
    values = list(dict.fromkeys(percents))
    for digits in range(2, 12):
        labels = {value: f"{float(f'{value:.{digits}g}'):g} %" for value in values}
        if len(set(labels.values())) == len(values):
            break
    return labels


#: Methods whose names are not plain words.
METHOD_NAMES = {
    "snl": "SNL",
    "senet": "SENet",
    "autorep": "AutoReP",
    "deepreduce": "DeepReDuce",
    "delphi": "DELPHI",
    "safenet": "SAFENet",
    "taylor": "Taylor",
    "shapley": "Shapley",
    "cryptonas": "CryptoNAS",
}


def variant_label(
    stage: str,
    method: str,
    objective: str,
    placement: str = "",
    surrogate: str = "identity",
    compiled: bool = False,
) -> str:
    """Say what was done to the network.

    >>> variant_label("finetuned", "snl", "erm", placement="lagrangian")
    'SNL (lagrangian) + finetune (erm)'

    Returns:
        A few words.
    """
    if stage == "base":
        return "base network"
    details = ", ".join(filter(None, [placement, "" if surrogate == "identity" else surrogate]))
    masks = METHOD_NAMES.get(method, method.replace("_", " "))
    masks = f"{masks} ({details})" if details else masks
    words = f"{masks}, not finetuned" if stage == "linearized" else f"{masks} + finetune ({objective})"
    return f"{words}, compiled" if compiled else words


def with_base(frame: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Rows of the base network and of one variant."""
    return pd.concat(
        [frame[frame["stage"] == "base"], frame[(frame["variant"] == variant) & (frame["stage"] != "base")]]
    )


def beside(frame: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Rows of the base network, of one variant, and of its control where that is another variant's."""
    rows = with_base(frame, variant)
    own = rows[rows["stage"] != "base"]
    if own.empty or (own["relus"] == own["total_relus"]).any():
        return rows
    about = frame[frame["stage"] != "base"].drop_duplicates("model").set_index("model")
    control = control_of(own.iloc[0], about)
    return rows if control is None else pd.concat([rows, frame[frame["model"] == control]])


def group_order(frame: pd.DataFrame) -> list[str]:
    """Groups in their natural order where they have one, else from the majority to the smallest of the training images.

    Returns:
        Their names.
    """
    sizes = frame[frame["group"] != OVERALL].groupby("group", sort=False)["train_n"].max()
    names = [str(name) for name in sizes.sort_values(ascending=False, kind="stable").index]
    return natural_order(names) or names


def natural_order(names: Sequence[str]) -> list[str]:
    """Sort names that are numbers or ranges of such; anything else has no order of its own.

    >>> natural_order(["30-39", "over 60", "under 20", "20-29"])
    ['under 20', '20-29', '30-39', 'over 60']
    >>> natural_order(["old", "young"])
    []

    Returns:
        The names in order; empty if one has no number, or two the same.
    """
    keys = {}
    for name in names:
        number = re.search(r"\d+(?:\.\d+)?", name)
        if number is None:
            return []
        before = name[: number.start()].strip().lower()
        keys[name] = (float(number[0]), before not in ("<", "≤", "<=", "under", "below", "up to"))
    return sorted(names, key=keys.__getitem__) if len(set(keys.values())) == len(names) else []


def _shades(frame: pd.DataFrame) -> alt.Scale:
    """One shade a budget, the darkest for the most ReLUs."""
    labels = budget_order(frame)
    # Light enough to see error bars on.
    ramp = ["#2f6ea8", "#5b94c5", "#8bb8da", "#b5d3e9", "#d8e8f4", "#eef5fa"]
    if len(labels) > len(ramp):
        return alt.Scale(domain=labels, scheme="blues", reverse=True)
    step = (len(ramp) - 1) / max(len(labels) - 1, 1)
    return alt.Scale(domain=labels, range=[ramp[round(i * step)] for i in range(len(labels))])


def budget_order(frame: pd.DataFrame) -> list[str]:
    """Budget labels, most ReLUs first."""
    table = frame[["percent", "budget"]].drop_duplicates().sort_values("percent", ascending=False, kind="stable")
    return list(dict.fromkeys(table["budget"]))


def network_order(frame: pd.DataFrame) -> list[str]:
    """Names of networks side by side: the base network, then by ReLUs kept, most first."""
    names = budget_order(frame[frame["network"] != BASE_NAME])
    return [BASE_NAME, *names] if (frame["network"] == BASE_NAME).any() else names


def of_the_relus(network: str) -> str:
    """What a network among others is called in full."""
    return network if network == BASE_NAME else f"{network} of the ReLUs"


def slug(variant: str) -> str:
    """A variant as a part of a file's name."""
    return "".join(c if c.isalnum() else "_" for c in variant.lower()).strip("_")


def group_axis(groups: Sequence[str], room: float, limit: float) -> alt.Axis:
    """An axis of groups, whose names are tilted where they would lie over each other.

    Args:
        groups: Their names.
        room: Pixels of each.
        limit: Pixels that a name may take where it is not tilted.

    Returns:
        The axis.
    """
    # About six pixels a letter.
    tilted = 6 * max(map(len, groups)) > room and min(room, limit) < 90
    return alt.Axis(labelAngle=-40, labelLimit=160) if tilted else alt.Axis(labelAngle=0, labelLimit=limit)


def bars(frame: pd.DataFrame, measure: str, title: str, axis: alt.Axis, reference: str, size: int) -> Any:
    """Bars of a measure, a group and budget, with limits where it has them and group sizes above."""
    rows = frame[(frame["measure"] == measure) & (frame["group"] != OVERALL)]
    groups, budgets = group_order(frame), budget_order(rows)
    # Every value in one column, so that tooltips read the same in all figures.
    base = alt.Chart(rows)
    width = max(46, min(120, 18 * len(budgets)))
    total = max(320, min(size, width * len(groups)))
    x = alt.X("group:N", sort=groups, title=reference, axis=group_axis(groups, total / len(groups), width + 30))
    offset = alt.XOffset("budget:N", sort=budgets)
    tooltip = [
        alt.Tooltip("group:N"),
        alt.Tooltip("budget:N", title="ReLUs kept"),
        alt.Tooltip("value:Q", format=".3~f", title=title),
        alt.Tooltip("low:Q", format=".3~f", title="95 % from"),
        alt.Tooltip("high:Q", format=".3~f", title="to"),
        alt.Tooltip("n:Q", title="images measured"),
        alt.Tooltip("train_n:Q", title="training images"),
    ]
    boxes = base.mark_bar(stroke="#1f4e79", strokeWidth=0.5).encode(
        x=x,
        xOffset=offset,
        y=alt.Y("value:Q", title=title, axis=axis),
        color=alt.Color("budget:N", sort=budgets, scale=_shades(rows), title="ReLUs kept"),
        tooltip=tooltip,
    )
    whiskers = base.mark_rule(color="#222", strokeWidth=1.1).encode(
        x=x, xOffset=offset, y=alt.Y("low:Q"), y2="high:Q", tooltip=tooltip
    )
    top = rows.groupby("group", as_index=False).agg(n=("train_n", "max"), high=("high", "max"), value=("value", "max"))
    # Above the axis where bars hang from it or there is none.
    top["y"] = top[["high", "value"]].max(axis=1).fillna(0).clip(lower=0)
    sizes = (
        alt.Chart(top)
        .mark_text(dy=-8, fontSize=11, color="#444")
        .encode(x=x, y=alt.Y("y:Q"), text=alt.Text("n:Q", format=","))
    )
    return alt.layer(boxes, whiskers, sizes).properties(width=total, height=260)


def network_scale(rows: pd.DataFrame, shipped: str | None = None) -> alt.Scale:
    """One colour a network: the base network grey, the control orange, dark the one that one would ship.

    Args:
        rows: With ``network`` and ``percent``.
        shipped: The label of the last; the one with the fewest ReLUs by default.

    Returns:
        The scale.
    """
    labels = network_order(rows)
    whole = set(rows.loc[(rows["percent"] == 100) & (rows["network"] != BASE_NAME), "network"])
    others = [label for label in labels if label != BASE_NAME and label not in whole]
    dark = shipped if shipped in labels else (others[-1] if others else None)
    # The shades nearest to the dark one are for those with as few ReLUs.
    light = [label for label in others if label != dark]
    shades = {label: RAMP[min(i, len(RAMP) - 1)] for i, label in enumerate(reversed(light))}
    colours = shades | dict.fromkeys(whole, CONTROL) | {BASE_NAME: BASE} | ({} if dark is None else {dark: SHIPPED})
    return alt.Scale(domain=labels, range=[colours[label] for label in labels])


def span(rows: pd.DataFrame, least: float, *, whole: tuple[float, float], keep: Sequence[float] = ()) -> list[float]:
    """An axis that all figures of a measure share, so that they can be compared.

    Args:
        rows: With ``value``, ``low`` and ``high``.
        least: How long it is at least: small differences shall look small.
        whole: What values there can be.
        keep: Values that it holds in any case.

    Returns:
        Both ends.
    """
    ends = pd.concat([rows["value"], rows["low"], rows["high"], pd.Series(list(keep), dtype=float)]).dropna()
    low, high = float(ends.min()), float(ends.max())
    more = max(0.0, least - (high - low)) / 2 + 0.02 * max(high - low, least)
    low, high = low - more, high + more
    # What does not fit at one end is put to the other.
    low, high = low - max(0.0, high - whole[1]), high + max(0.0, whole[0] - low)
    return [max(low, whole[0]), min(high, whole[1])]


def dots(
    rows: pd.DataFrame,
    order: Sequence[str],
    scale: alt.Scale,
    title: str,
    *,
    domain: Sequence[float] | None = None,
    form: str = "",
    marks: Sequence[float] = (),
) -> Any:
    """Points with intervals, who it is of along the vertical axis, networks side by side within.

    Args:
        rows: With ``who``, ``network``, ``value``, ``low``, ``high`` and ``n``.
        order: Of who.
        scale: From :func:`network_scale`.
        title: Of the horizontal axis.
        domain: Ends of that axis.
        form: How its numbers are written.
        marks: Values with a line: the first a whole one, the others dashed.

    Returns:
        A chart as wide as what it stands in.
    """
    # All that have a colour, so that rows of figures side by side are at one height.
    networks = list(scale.domain)
    ends = alt.Scale(zero=False, nice=True) if domain is None else alt.Scale(domain=list(domain), nice=False)
    axis = alt.Axis(format=form, tickCount=5, grid=True) if form else alt.Axis(tickCount=5, grid=True)
    y = alt.Y("who:N", sort=list(order), title=None, axis=alt.Axis(labelLimit=150, grid=False, ticks=False))
    offset = alt.YOffset("network:N", sort=networks, scale=alt.Scale(domain=networks))
    colour = alt.Color(
        "network:N",
        sort=networks,
        scale=scale,
        title=None,
        legend=alt.Legend(orient="bottom", columns=3, symbolOpacity=1),
    )
    base = alt.Chart(rows)
    x = alt.X("value:Q", title=title, scale=ends, axis=axis)
    layers = [
        alt.Chart(pd.DataFrame({"x": [mark]}))
        .mark_rule(color=INK, strokeWidth=1, opacity=0.6, strokeDash=[4, 3] if i else [1, 0])
        .encode(x=alt.X("x:Q", title=title, scale=ends))
        for i, mark in enumerate(marks)
    ]
    whisker = base.mark_rule(strokeWidth=1.6).encode(
        y=y, yOffset=offset, x=alt.X("low:Q", title=title, scale=ends, axis=axis), x2="high:Q", color=colour
    )
    point = base.mark_point(filled=True, size=55, opacity=1).encode(
        y=y, yOffset=offset, x=x, color=colour, tooltip=_told_of_a_dot(title, form or ".3~f")
    )
    # Room between two of them, for the eye to tell them apart.
    height = len(order) * max(22, 11 * len(networks) + 8)
    return alt.layer(*layers, whisker, point).properties(width="container", height=height)


def _told_of_a_dot(title: str, number: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("who:N", title="who"),
        alt.Tooltip("network:N", title="ReLUs kept"),
        alt.Tooltip("value:Q", format=number, title=title),
        alt.Tooltip("low:Q", format=number, title="95 % from"),
        alt.Tooltip("high:Q", format=number, title="to"),
        alt.Tooltip("n:Q", format=",", title="images"),
    ]


def _who(groups: pd.Series[str], n: dict[str, int]) -> pd.Series[str]:
    """Groups as the axes call them, with the images that they were measured on."""
    return groups.map(lambda name: f"{EVERYONE if name == OVERALL else name} ({n[name]:,})")


def accuracies(frame: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Accuracy of each group, a row a network, for :func:`dots`; of the base network and the control too."""
    rows = beside(frame, variant)
    rows = rows[rows["measure"] == "accuracy"]
    return rows.assign(who=_who(rows["group"], rows.groupby("group")["n"].max().to_dict()))


def recalls(frame: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Recall of each class, likewise; empty where classes are the groups or an older audit did not measure it."""
    rows = beside(frame, variant)
    rows = rows[(rows["measure"] == "recall") & (rows["group"] == OVERALL)]
    return rows.assign(who=[f"{name} ({n:,})" for name, n in zip(rows["class"], rows["n"], strict=True)])


def changes(found: Sequence[Candidate], kind: str) -> pd.DataFrame:
    """Changes against the base network, a row a network and set of images, for :func:`dots`.

    Args:
        found: Networks of one variant, and their control.
        kind: ``group`` (all images among them) or ``class``.

    Returns:
        The rows.
    """
    tables = []
    for each in found:
        cells = each.verdict.cells
        rows = cells[cells["kind"].isin(["overall", "group"] if kind == "group" else [kind])]
        names = rows["group"].replace(OVERALL, EVERYONE) if kind == "group" else rows["class"]
        tables.append(
            rows.assign(
                network=each.budget,
                budget=each.budget,
                percent=each.percent,
                value=rows["change"],
                who=[f"{name} ({int(n):,})" for name, n in zip(names, rows["n"], strict=True)],
            )
        )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["who", "network", "value"])


def order_of(frame: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """Order of who is on an axis: all images, then the groups in their order, or classes in theirs."""
    present = list(dict.fromkeys(rows["who"]))
    plain = {who: who.rpartition(" (")[0] for who in present}
    if "class" in rows and (rows["class"] != "").all() and (rows["group"] == OVERALL).all():
        named = natural_order(list(plain.values())) or sorted(plain.values())
    else:
        named = [EVERYONE, *group_order(frame)]
    return sorted(present, key=lambda who: named.index(plain[who]))


def accuracy_by_budget(frame: pd.DataFrame, variant: str) -> Any:
    """Overall accuracy, and the best and the worst group's, against the budget (paper, Figure 5)."""
    rows = with_base(frame, variant)
    accuracy = rows[rows["measure"] == "accuracy"]
    groups = accuracy[accuracy["group"] != OVERALL]
    lines: list[pd.DataFrame] = [accuracy[accuracy["group"] == OVERALL].assign(line=EVERYONE)]
    for label, pick in (("best group", "idxmax"), ("worst group", "idxmin")):
        chosen = groups.loc[getattr(groups.groupby("network")["value"], pick)()]
        lines.append(chosen.assign(line=label))
    table = pd.concat(lines)
    domain = [EVERYONE, "best group", "worst group"]
    # A network without ReLUs has no place on a logarithmic axis.
    table = table[table["percent"] > 0].copy()
    table["kept"] = [float(label.split()[0]) for label in table["budget"]]
    # The base network stands beside the control as hollow points.
    controlled = bool((table.loc[table["network"] != BASE_NAME, "percent"] == 100).any())
    base = table["network"] == BASE_NAME
    values = sorted(table["kept"].unique())
    x = alt.X(
        "kept:Q",
        scale=alt.Scale(type="log", domain=[table["percent"].min() / 1.25, 125]),
        axis=alt.Axis(values=values, labelExpr="datum.value + ' %'", labelOverlap="parity"),
        title="ReLUs kept (logarithmic)",
    )
    colour = alt.Color(
        "line:N",
        scale=alt.Scale(domain=domain, range=[INK, PALETTE[0], PALETTE[1]]),
        title=None,
        legend=alt.Legend(orient="bottom", columns=3),
    )
    tooltip = [
        alt.Tooltip("line:N", title="line"),
        alt.Tooltip("group:N"),
        alt.Tooltip("network:N", title="ReLUs kept"),
        alt.Tooltip("value:Q", format=".1%", title="accuracy"),
        alt.Tooltip("low:Q", format=".1%", title="95 % from"),
        alt.Tooltip("high:Q", format=".1%", title="to"),
    ]
    accuracies = table.loc[:, ["low", "high", "value"]]
    ends = alt.Scale(domain=span(accuracies, 0.2, whole=(0, 1)), nice=False)
    y = alt.Y("value:Q", title="accuracy", axis=alt.Axis(format="~%"), scale=ends)
    drawn = alt.Chart(table[~base] if controlled else table)
    layers = [
        drawn.mark_line().encode(x=x, y=y, color=colour),
        drawn.mark_rule(strokeWidth=1.4).encode(x=x, y=alt.Y("low:Q", scale=ends), y2="high:Q", color=colour),
        drawn.mark_point(filled=True, size=55, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip),
    ]
    if controlled:
        hollow = alt.Chart(table[base]).mark_point(filled=False, size=70, opacity=1, strokeWidth=1.6)
        layers.append(hollow.encode(x=x, y=y, color=colour, tooltip=tooltip))
    return alt.layer(*layers).properties(
        width="container", height=240, title=alt.Title("Accuracy against ReLU budget", subtitle=variant)
    )


def figures(frame: pd.DataFrame, found: Sequence[Candidate] = (), within: float = 5.0) -> dict[str, Any]:
    """All figures that the rows allow, by file name.

    Args:
        frame: From :func:`prepare`.
        found: The networks with their verdicts, from :func:`fairline.report.verdict.candidates`.
        within: Tolerated loss in points, a dashed line.

    Returns:
        Altair charts.
    """
    made: dict[str, Any] = {}
    shown = main_variants(frame)
    measured = pd.concat([accuracies(frame, variant) for variant in shown])
    shared = {"accuracy": span(measured, 0.2, whole=(0, 1))}
    moved = [changes(found, kind) for kind in ("group", "class")]
    if any(len(rows) for rows in moved):
        shared["change"] = span(pd.concat(moved), 10, whole=(-100, 100), keep=(0, -within))
    for variant in shown:
        made |= _of_variant(frame, variant, with_control(found, variant), shared, within)
        if with_base(frame, variant)["network"].nunique() > 1:
            made[f"accuracy_by_budget_{slug(variant)}"] = themed(accuracy_by_budget(frame, variant))
    return made


def with_control(found: Sequence[Candidate], variant: str) -> list[Candidate]:
    """The networks of a variant, and their control where that is another variant's."""
    own = [each for each in found if each.variant == variant]
    names = {each.control.name for each in own if each.control is not None}
    return [each for each in found if each in own or each.name in names]


def _of_variant(
    frame: pd.DataFrame, variant: str, found: Sequence[Candidate], shared: dict[str, list[float]], within: float
) -> dict[str, Any]:
    """Accuracy and change of each group, and recall and change of each class, side by side."""
    made: dict[str, Any] = {}
    chosen = focus([each for each in found if each.variant == variant])
    scale = network_scale(beside(frame, variant), None if chosen is None else chosen.budget)
    against = "change, points"
    for kind, of, rows in (
        ("group", "accuracy", accuracies(frame, variant)),
        ("class", "recall", recalls(frame, variant)),
    ):
        moved = changes(found, kind)
        if kind == "class" and moved.empty and found:
            # Classes are the groups.
            continue
        if len(rows):
            chart = dots(
                rows,
                order_of(frame, rows),
                scale,
                of,
                domain=shared["accuracy"] if kind == "group" else None,
                form="~%",
            )
            title = alt.Title(f"{of.capitalize()} by {kind}", subtitle=variant)
            made[f"{of}_by_{kind}_{slug(variant)}"] = themed(chart.properties(title=title))
        if len(moved):
            chart = dots(moved, order_of(frame, moved), scale, against, domain=shared["change"], marks=(0, -within))
            title = alt.Title(f"What each {kind} gains or loses", subtitle=variant)
            made[f"change_by_{kind}_{slug(variant)}"] = themed(chart.properties(title=title))
    return made


def main_variants(frame: pd.DataFrame) -> list[str]:
    """What to draw: finetuned networks first; the base network alone if there is nothing else."""
    rank = {"finetuned": 0, "linearized": 1, "base": 2}
    table = frame[["variant", "stage"]].drop_duplicates()
    ordered = sorted(table.itertuples(index=False), key=lambda row: rank[str(row.stage)])
    names = [str(row.variant) for row in ordered if row.stage != "base"]
    return names or ["base network"]
