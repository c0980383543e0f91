"""The comparison page: methods side by side at equal budgets, in one HTML file (paper, Section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from fairline.audit.cells import named
from fairline.audit.verdict import CANNOT_TELL, MAY, MAY_NOT
from fairline.charts import palette, save_charts, themed
from fairline.data.grouped import OVERALL, TOO_SMALL, WORST
from fairline.report import constraints, null_front, verdict
from fairline.report.figures import METHOD_NAMES, budget_labels, budget_order
from fairline.report.page import by_groups, settings, too_small, write_page
from fairline.report.verdict import KINDS, Candidate, limits_told, methods, moved, signed
from fairline.runs import Run

#: Columns of a figure in its file, and the width of a panel there; on the page a panel is as wide as its card.
_LAYOUT = {
    **{"gain": (1, 560), "pareto": (2, 300), "above_null": (2, 300), "beyond_control": (1, 560)},
    **{"drop": (3, 250), "layers": (2, 380)},
}


def prepare(comparison: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``comparison.parquet`` with ``budget``, a label of ``percent``, and ``who`` they speak of, in words."""
    # In a comparison of an earlier version all rows are of all classes.
    frame = comparison if "class" in comparison else comparison.assign(**{"class": ""})
    return frame.assign(
        budget=frame["percent"].map(budget_labels(frame["percent"].unique())),
        who=[who(group, label) for group, label in frame[["group", "class"]].to_numpy()],
    )


def who(group: str, label: str) -> str:
    """A group, a class, or a class in a group, in words."""
    if not label:
        return group
    kind = "class" if group == OVERALL else "cell"
    return named({"kind": kind, "group": group, "class": label})


def group_order(frame: pd.DataFrame) -> list[str]:
    """All images and the worst group, then groups from the most to the fewest training images."""
    sizes = frame[frame["measure"] == "accuracy"].groupby("group", sort=False)["train_n"].max()
    own = sizes.drop([OVERALL, WORST]).sort_values(ascending=False, kind="stable")
    return [OVERALL, WORST, *map(str, own.index)]


def order(frame: pd.DataFrame) -> list[str]:
    """Everyone the rows speak of: as :func:`group_order`, then classes, then classes in each group."""
    classes = frame[frame["class"] != ""]
    at = {group: position for position, group in enumerate(group_order(frame))}
    classes = classes.sort_values("group", key=lambda groups: groups.map(at), kind="stable")
    return list(dict.fromkeys([*group_order(frame), *classes["who"]]))


def _colour(column: str, shown: Sequence[str], names: Sequence[str]) -> Any:
    colours = palette(names)
    scale = alt.Scale(domain=list(shown), range=[colours[name] for name in shown])
    return alt.Color(f"{column}:N", sort=list(shown), scale=scale, title=None)


def _methods(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame.loc[frame["measure"] == "accuracy", "method"]))


def differences(frame: pd.DataFrame, measure: str, title: str) -> list[Any]:
    """Points with intervals, a panel a budget: groups and classes from top to bottom, methods one below another."""
    rows = frame[(frame["measure"] == measure) & ((frame["class"] == "") | (frame["group"] == OVERALL))]
    methods = _methods(frame)
    drawn = [method for method in methods if method in set(rows["method"])]
    people = [name for name in order(frame) if name in set(rows["who"])]
    panels = []
    for budget in budget_order(rows):
        own = rows[rows["budget"] == budget]
        here = [method for method in drawn if method in set(own["method"])]
        base = alt.Chart(own[["method", "group", "class", "who", "value", "low", "high"]])
        y = alt.Y("who:N", sort=people, title=None, axis=alt.Axis(labelLimit=150, grid=True))
        offset = alt.YOffset("method:N", sort=here, scale=alt.Scale(domain=here, paddingOuter=0.4))
        colour = _colour("method", drawn, methods)
        tooltip = [
            alt.Tooltip("method:N"),
            alt.Tooltip("who:N", title="who"),
            alt.Tooltip("value:Q", format="+.2f", title=title),
            alt.Tooltip("low:Q", format="+.2f", title="95 % from"),
            alt.Tooltip("high:Q", format="+.2f", title="to"),
        ]
        zero = alt.Chart(pd.DataFrame({"x": [0]})).mark_rule(color="#888", strokeDash=[4, 3]).encode(x="x:Q")
        x = alt.X("value:Q", title=title, axis=alt.Axis(tickCount=6))
        whiskers = base.mark_rule(strokeWidth=1.6).encode(y=y, yOffset=offset, x="low:Q", x2="high:Q", color=colour)
        points = base.mark_point(filled=True, size=46, opacity=1).encode(
            x=x, y=y, yOffset=offset, color=colour, tooltip=tooltip
        )
        height = max(22, 13 * len(here)) * own["who"].nunique()
        panels.append(alt.layer(zero, whiskers, points).properties(height=height, title=f"{budget} of the ReLUs"))
    return panels


def pareto_front(frame: pd.DataFrame, free: pd.DataFrame | None = None) -> list[Any]:
    """Overall against worst-group accuracy, a panel a budget; the front is filled and joined.

    Args:
        frame: From :func:`prepare`.
        free: Null fronts to draw behind the methods, from :func:`fairline.report.null_front.lines`.

    Returns:
        Altair charts without a width.
    """
    accuracy = frame[(frame["measure"] == "accuracy") & frame["group"].isin([OVERALL, WORST])]
    wide = accuracy.pivot_table(index=["budget", "percent", "method"], columns="group", values="value", sort=False)
    front = frame[frame["measure"] == "pareto"].set_index(["budget", "percent", "method"])["value"]
    table = wide.assign(front=front).reset_index().rename(columns={OVERALL: "overall", WORST: "worst"})
    methods = list(dict.fromkeys(table["method"]))
    panels = []
    for budget in budget_order(table):
        rows = table[table["budget"] == budget]
        colour = _colour("method", methods, methods)
        x = alt.X(
            "overall:Q",
            title="overall accuracy",
            axis=alt.Axis(format="~%", tickCount=4),
            scale=alt.Scale(zero=False, nice=True, padding=14),
        )
        y = alt.Y(
            "worst:Q",
            title="worst-group accuracy",
            axis=alt.Axis(format="~%", tickCount=5),
            scale=alt.Scale(zero=False, nice=True, padding=14),
        )
        tooltip = [
            alt.Tooltip("method:N"),
            alt.Tooltip("overall:Q", format=".1%"),
            alt.Tooltip("worst:Q", format=".1%", title="worst group"),
        ]
        best = alt.Chart(rows[rows["front"] == 1])
        line = best.mark_line(color="#999", strokeDash=[4, 3], strokeWidth=1).encode(x=x, y=y, order="overall:Q")
        filled = best.mark_point(filled=True, size=110, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip)
        hollow = (
            alt.Chart(rows[rows["front"] == 0])
            .mark_point(filled=False, size=80, opacity=1, strokeWidth=2)
            .encode(x=x, y=y, color=colour, tooltip=tooltip)
        )
        under = [] if free is None else null_front.behind(free[free["budget"] == budget], x, y)
        panels.append(alt.layer(*under, line, hollow, filled).properties(height=260, title=f"{budget} of the ReLUs"))
    return panels


def kept_by_layer(layers: pd.DataFrame) -> list[Any]:
    """Share of each layer's ReLUs that is kept, a panel a budget and a line a way to place them."""
    layers = layers.reset_index(drop=True)
    rows = layers[layers["relus"] < layers["total"]].copy()
    rows["percent"] = 100 * rows["relus"] / rows["total"]
    rows["budget"] = rows["percent"].map(budget_labels(rows["percent"].unique()))
    rows["share"] = rows["kept"] / rows["units"]
    rows["masks"] = masks_of(layers)[rows.index]
    table = rows.groupby(["budget", "percent", "masks", "position", "layer"], as_index=False, sort=False)[
        "share"
    ].mean()
    names = list(dict.fromkeys(table["masks"]))
    panels = []
    for budget in budget_order(table):
        chart = (
            alt.Chart(table[table["budget"] == budget])
            .mark_line(point=True)
            .encode(
                x=alt.X(
                    "layer:N",
                    sort=list(dict.fromkeys(table.sort_values("position")["layer"])),
                    title=None,
                    axis=alt.Axis(labelAngle=-50, labelLimit=120),
                ),
                y=alt.Y("share:Q", title="ReLUs kept", axis=alt.Axis(format="%")),
                color=_colour("masks", names, names),
                tooltip=["layer:N", "masks:N", alt.Tooltip("share:Q", format=".1%")],
            )
        )
        panels.append(chart.properties(height=170, title=f"{budget} of the ReLUs"))
    return panels


def masks_of(layers: pd.DataFrame) -> pd.Series[str]:
    """What placed the ReLUs: the linearizer where there are several, and under what it learned the masks."""
    placement = layers["placement"].where(layers["placement"] != "", "plain distillation")
    if "linearizer" not in layers or layers["linearizer"].nunique() == 1:
        return placement
    names = layers["linearizer"].map(lambda name: METHOD_NAMES.get(name, name.replace("_", " ")))
    return names.where(layers["placement"] == "", names + ", " + layers["placement"])


def drop_by_budget(frame: pd.DataFrame) -> list[Any]:
    """Relative accuracy drop against the ReLUs kept, a panel a group and a line a method."""
    rows = frame[(frame["measure"] == "relative_drop") & (frame["percent"] < 100)]
    methods = _methods(frame)
    panels = []
    for group in group_order(frame):
        own = rows[rows["group"] == group]
        if own.empty:
            continue
        chart = (
            alt.Chart(own)
            .mark_line(point=alt.OverlayMarkDef(size=36), strokeWidth=1.8)
            .encode(
                x=alt.X(
                    "percent:Q",
                    title="ReLUs kept, %",
                    scale=alt.Scale(type="log", reverse=True),
                    axis=alt.Axis(values=sorted(own["percent"].unique()), format=".3~g"),
                ),
                y=alt.Y("value:Q", title="relative accuracy drop, %", scale=alt.Scale(zero=True)),
                color=_colour("method", methods, methods),
                tooltip=[
                    "method:N",
                    "budget:N",
                    alt.Tooltip("value:Q", format=".1f", title="drop, %"),
                    alt.Tooltip("low:Q", format=".1f", title="95 % from"),
                    alt.Tooltip("high:Q", format=".1f", title="to"),
                ],
            )
        )
        zero = alt.Chart(pd.DataFrame({"y": [0]})).mark_rule(color="#888", strokeDash=[4, 3]).encode(y="y:Q")
        title: Any = group
        if own["value"].isna().all():
            title = alt.TitleParams(group, subtitle="no drop: a base network gets none right")
        panels.append(alt.layer(zero, chart).properties(height=190, title=title))
    return panels


def panels(frame: pd.DataFrame, layers: pd.DataFrame, free: pd.DataFrame | None = None) -> dict[str, list[Any]]:
    """All figures that the rows allow, panel by panel, by name.

    Args:
        frame: From :func:`prepare`.
        layers: Rows of ``layers.parquet``.
        free: From :func:`fairline.report.null_front.lines`, where there are null fronts.

    Returns:
        Altair charts without a width.
    """
    made: dict[str, list[Any]] = {}
    if (frame["measure"] == "gain").any():
        made["gain"] = differences(frame, "gain", "gain, points")
    made["pareto"] = pareto_front(frame, free)
    if above := null_front.above(frame, _colour("method", _methods(frame), _methods(frame))):
        made["above_null"] = above
    if (frame["measure"] == "beyond_control").any():
        made["beyond_control"] = differences(frame, "beyond_control", "gain beyond the control, points")
    drops = frame[(frame["measure"] == "relative_drop") & (frame["percent"] < 100)]
    if drops["percent"].nunique() > 1:
        made["drop"] = drop_by_budget(frame)
    if masks_of(layers).nunique() > 1:
        made["layers"] = kept_by_layer(layers)
    return made


def figures(frame: pd.DataFrame, layers: pd.DataFrame, free: pd.DataFrame | None = None) -> dict[str, Any]:
    """The figures of :func:`panels`, each whole, by file name."""
    made = {name: themed(_joined(name, own)) for name, own in panels(frame, layers, free).items()}
    return {name: chart.configure_legend(orient="bottom", columns=3, labelLimit=320) for name, chart in made.items()}


def _joined(name: str, own: Sequence[Any]) -> Any:
    columns, width = _LAYOUT[name]
    return alt.concat(*(panel.properties(width=width) for panel in own), columns=columns).resolve_scale(color="shared")


def _fluid(name: str, panel: Any) -> Any:
    """As wide as its place on the page, which has legends of its own, and headings of what can be folded."""
    own = panel.properties(width="container")
    if name in ("gain", "beyond_control"):
        own.title = alt.Undefined
    return themed(own).configure_legend(disable=True)


def write_comparison(
    run_folder: str | Path,
    out: str | Path | None = None,
    *,
    within: float = 5.0,
    critical: Sequence[str] = (),
    found: Sequence[Candidate] | None = None,
) -> Path:
    """Write the page of a compare run.

    Args:
        run_folder: Folder of a finished compare run.
        out: The HTML file; ``comparison.html`` in that folder by default.
        within: Loss against the base network that is tolerated, in percentage points.
        critical: Classes whose recall may not fall.
        found: From :func:`judged` with these two, where it is known.

    Returns:
        The file.

    Raises:
        FairlineError: The folder holds no finished comparison, the tolerance is none, or there is no such class.
    """
    run = Run.read(run_folder, "compare")
    frame = prepare(run.table("comparison.parquet"))
    found = judged(run, within, critical) if found is None else found
    layers = run.table("layers.parquet")
    own = panels(frame, layers, free_lines(run, frame))
    drawn = {f"{name}-{at}": _fluid(name, panel) for name, all_of in own.items() for at, panel in enumerate(all_of)}
    return write_page(
        Path(out) if out is not None else run.folder / "comparison.html",
        "comparison.html.j2",
        drawn,
        title=f"Methods at equal ReLU budgets: {run.data.name}{by_groups(run)}",
        baseline=frame["baseline"].iloc[0],
        headline=headline(frame, found),
        verdicts=verdict_table(found),
        answers=", ".join(f"{count} {answer}" for answer, count in _counted(found).items()),
        within=f"{within:g}",
        warnings=warnings(frame, run, found) + verdict.cautions(found),
        interval=_interval(frame, run),
        panels={name: [f"{name}-{at}" for at in range(len(all_of))] for name, all_of in own.items()},
        budgets=budget_order(frame[frame["measure"] == "gain"]),
        beyond_budgets=budget_order(frame[frame["measure"] == "beyond_control"]),
        legends={name: legend(name, frame, layers) for name in own},
        free=free_told(run, frame),
        constraints=constraints.lacking(run, frame, group_order(frame)),
        choices=choices(frame),
        has_small=bool(too_small(frame, run.config["split"])),
        has_classes=bool((frame["class"] != "").any()),
        tables=[(budget, table(frame, budget)) for budget in budget_order(frame)],
        settings=settings(run),
    )


def free_lines(run: Run, frame: pd.DataFrame) -> pd.DataFrame | None:
    """The null fronts of a compare run, to be drawn; None where an earlier version wrote none."""
    if not (run.folder / "null_front.parquet").exists():
        return None
    return null_front.lines(run.table("null_front.parquet"), frame, run.config["split"])


def free_told(run: Run, frame: pd.DataFrame) -> dict[str, Any] | None:
    """What the page says of the null front."""
    if not (run.folder / "null_front.parquet").exists():
        return None
    budgets = budget_order(frame[frame["measure"] == "undone"])
    return {
        "distances": null_front.distances(frame),
        "acts": null_front.acts_on_groups(run.table("predictions.parquet")),
        "undoing": null_front.undoing(frame),
        "tables": [(budget, null_front.undone_table(frame, budget, group_order(frame))) for budget in budgets],
        "kinds": {null_front.ABOVE: "may", null_front.BELOW: "may-not", null_front.UNTOLD: "open"},
    }


def legend(name: str, frame: pd.DataFrame, layers: pd.DataFrame) -> list[tuple[str, str]]:
    """Names and colours of what a figure draws."""
    if name == "layers":
        return list(palette(list(dict.fromkeys(masks_of(layers)[layers["relus"] < layers["total"]]))).items())
    measures = {"pareto": "accuracy", "drop": "relative_drop"}
    drawn = set(frame.loc[frame["measure"] == measures.get(name, name), "method"])
    if name == "above_null":
        drawn -= set(frame["baseline"])
    return [(method, colour) for method, colour in palette(_methods(frame)).items() if method in drawn]


def judged(run: Run, within: float = 5.0, critical: Sequence[str] = ()) -> list[Candidate]:
    """The verdict of each method and budget of a compare run; see :func:`fairline.report.verdict.methods`."""
    return methods(prepare(run.table("comparison.parquet")), run.table("predictions.parquet"), within, critical)


def verdict_table(found: Sequence[Candidate]) -> list[dict[str, str]]:
    """A row for each method and budget: its verdict, and the set of images that decides."""
    rows = []
    for each in found:
        cell = each.verdict.decisive
        rows.append(
            {
                "method": each.variant,
                "budget": each.budget,
                "answer": each.answer,
                "kind": KINDS[each.answer],
                "who": named(cell),
                "change": f"{signed(cell['change'])} {limits(cell)}",
                "reason": each.reason(),
                "control": each.control_told(),
            }
        )
    return rows


def _counted(found: Sequence[Candidate]) -> dict[str, int]:
    """How many have each verdict."""
    answers = [each.answer for each in found]
    return {answer: answers.count(answer) for answer in (MAY, MAY_NOT, CANNOT_TELL) if answer in answers}


def write_comparison_figures(run_folder: str | Path, folder: str | Path) -> list[Path]:
    """Write each figure of a compare run as SVG and PNG; returns the files."""
    run = Run.read(run_folder, "compare")
    frame = prepare(run.table("comparison.parquet"))
    charts = figures(frame, run.table("layers.parquet"), free_lines(run, frame))
    return save_charts(charts, Path(folder))


def headline(frame: pd.DataFrame, found: Sequence[Candidate]) -> list[str]:
    """Which network may ship; then how the methods compare at the smallest budget, and what the best one's verdict is.

    Args:
        frame: From :func:`prepare`.
        found: From :func:`judged`; empty where there is no verdict.

    Returns:
        Sentences.
    """
    baseline = str(frame["baseline"].iloc[0])
    # Only some methods may have gone on to smaller budgets.
    budget = budget_order(frame[(frame["method"] == baseline) & (frame["measure"] == "accuracy")])[-1]
    own = frame[(frame["budget"] == budget) & (frame["class"] == "")]
    here = own.set_index(["measure", "group", "method"]).sort_index()
    worst = here.loc["accuracy", WORST]["value"]
    # Equal to the baseline is no winner.
    best = baseline if worst[baseline] >= worst.max() else str(worst.idxmax())
    sentences = [verdict.headline(found)] if found else []
    sentences.append(_best_told(here, budget, baseline, best) + _answer_told(found, best, budget))
    if told := null_front.summary(frame, budget):
        sentences.append(told)
    front = own[(own["measure"] == "pareto") & (own["value"] == 1)]["method"]
    sentences.append(f"On the Pareto front there: {', '.join(f'“{name}”' for name in front)}.")
    if ("beyond_control", WORST, best) in here.index:
        row = here.loc[("beyond_control", WORST, best)]
        told = "more than" if row["low"] > 0 else ("less than" if row["high"] < 0 else "not told apart from")
        sentences.append(
            f"That gain is {told} what the same method gains with all ReLUs ({signed(row['value'])} points beyond it, "
            f"{_interval_of(row)})."
        )
    return sentences


def _best_told(here: pd.DataFrame, budget: str, baseline: str, best: str) -> str:
    worst = here.loc["accuracy", WORST]["value"]
    if best == baseline:
        return (
            f"With {budget} of the ReLUs no method has a higher worst-group accuracy than “{baseline}” "
            f"({worst[best]:.1%})."
        )
    before, after = (here.loc["accuracy", OVERALL]["value"][method] for method in (baseline, best))
    row = here.loc[("gain", WORST, best)]
    sure = "" if row["low"] > 0 else ", which does not exclude chance"
    return (
        f"With {budget} of the ReLUs “{best}” has the highest worst-group accuracy: {worst[best]:.1%}, where "
        f"“{baseline}” has {worst[baseline]:.1%} (gain {signed(row['value'])} points, {_interval_of(row)}"
        f"{sure}). Overall accuracy: {after:.1%}, where “{baseline}” has {before:.1%}."
    )


def _answer_told(found: Sequence[Candidate], method: str, budget: str) -> str:
    """The best of all may yet be one that may not ship."""
    for each in found:
        if (each.variant, each.budget) == (method, budget):
            told = "it is undecided whether it may ship" if each.answer == CANNOT_TELL else f"it {each.answer}"
            change = f"{named(each.verdict.decisive)} {moved(each.verdict.decisive['change'])}"
            return f" Against the base network {told}: {change}."
    return ""


def limits(row: Mapping[str, Any]) -> str:
    """``[−0.4, +1.2]``; seeds that agree wholly do not tell how far others would be."""
    return limits_told(row).strip() or "no limits"


def _interval_of(row: Mapping[str, Any]) -> str:
    if math.isnan(row["low"]):
        return "the same for every seed, hence without limits"
    return f"95 % interval {signed(row['low'])} to {signed(row['high'])}"


def warnings(frame: pd.DataFrame, run: Run, found: Sequence[Candidate]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    told = []
    if not found:
        told.append(
            "This comparison was made before classes were written down, so nothing tells whether a network may ship: "
            "a class may be lost that no group shows. Compare the runs again, into another folder."
        )
    replicates = int(frame["replicates"].iloc[0])
    if replicates == 1:
        told.append(
            "One base network: the intervals speak of the test images drawn, not of training again. Compare several "
            "seeds before choosing a method."
        )
    elif replicates < 5:
        told.append(
            f"{replicates} base networks: Student’s interval from so few is wide, and what it does not exclude is not "
            "shown to be absent."
        )
    if tiny := too_small(frame, run.config["split"], "“”"):
        told.append(f"{tiny}. Do not choose a method by their accuracy, nor by a worst group that may be one of them.")
    told += kept_fewer(frame)
    pairs = int(frame["measure"].eq("gain").sum())
    if pairs > 20:
        told.append(
            f"{pairs} differences are shown. At 95 % about one in twenty excludes zero by chance alone; trust what "
            "holds at several budgets."
        )
    if run.config["split"] != "test":
        told.append(f"These numbers are from the {run.config['split']} part, which training or selection has seen.")
    return told


def kept_fewer(frame: pd.DataFrame) -> list[str]:
    """Which methods keep fewer ReLUs than a budget allows, in a sentence; none where no method does."""
    if "kept" not in frame:
        return []
    rows = frame[(frame["measure"] == "accuracy") & (frame["kept"] < frame["relus"])]
    rows = rows.drop_duplicates(["method", "relus"])
    each = [f"“{m}” keeps {kept:,.0f} of {asked:,}" for m, kept, asked in rows[["method", "kept", "relus"]].to_numpy()]
    return [f"Not every budget can be met exactly: {', '.join(each)} ReLUs."] if each else []


def table(frame: pd.DataFrame, budget: str) -> list[dict[str, Any]]:
    """The page's table of one budget: for each group, class and class in a group, a row a method."""
    rows = frame[frame["budget"] == budget]
    found = rows.set_index(["who", "method", "measure"]).sort_index()
    front = rows[(rows["measure"] == "pareto") & (rows["value"] == 1)]["method"]
    small = set(rows.loc[(rows["measure"] == "accuracy") & (rows["n"] < TOO_SMALL), "group"]) - {OVERALL, WORST}
    made = []
    for name in order(rows):
        own = []
        for method in _methods(rows):
            share = "accuracy" if (name, method, "accuracy") in found.index else "recall"
            row = {"method": method, "share": f"{found.loc[(name, method, share), 'value']:.1%}"}
            if (name, method, "gain") in found.index:
                gain = found.loc[(name, method, "gain")]
                row["gain"], row["interval"] = signed(gain["value"]), limits(gain)
                row["sure"] = "gain" if gain["low"] > 0 else ("loss" if gain["high"] < 0 else "")
            if (name, method, "mitigation_drop") in found.index:
                drop = float(found.loc[(name, method, "mitigation_drop"), "value"])
                row["mitigation"] = "" if math.isnan(drop) else f"{signed(drop)} %"
            if name == OVERALL:
                row["front"] = "◆" if method in set(front) else ""
                if (name, method, "balanced_accuracy") in found.index:
                    row["balanced"] = f"balanced {found.loc[(name, method, 'balanced_accuracy'), 'value']:.1%}"
            own.append(row)
        made.append({"who": name, "share": share, "rows": own, "small": name in small})
    return made


def choices(frame: pd.DataFrame) -> list[dict[str, str]]:
    """A row for each method and budget whose strength was chosen on validation images: how many were tried, and which.

    Args:
        frame: From :func:`prepare`; a comparison of an earlier version tells of none.

    Returns:
        ``method``, ``budget``, ``tried`` and ``strength``, one for each base network in their order.
    """
    if "tried" not in frame:
        return []
    own = frame[(frame["tried"] > 1)].drop_duplicates(["budget", "method"])
    return [
        {"method": row.method, "budget": row.budget, "tried": f"{row.tried:.0f}", "strength": row.strength}
        for row in own[["method", "budget", "tried", "strength"]].itertuples(index=False)
    ]


def _interval(frame: pd.DataFrame, run: Run) -> str:
    replicates = int(frame["replicates"].iloc[0])
    if replicates == 1:
        return (
            f"Whiskers are 95 % bootstrap intervals over the {run.config['split']} images "
            f"({run.config['resamples']:,} resamples within each group, the same images for every method)."
        )
    return (
        f"Points are means over {replicates} base networks; whiskers are Student’s 95 % intervals of the paired "
        "differences, which hold what training, split and test images change."
    )
