"""The fairness report: one HTML file that opens offline and says who paid."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from fairline.charts import save_charts
from fairline.data.grouped import OVERALL, TOO_SMALL
from fairline.report import corrections, explanations, figures
from fairline.report import costs as cost_panel
from fairline.report.page import by_groups, settings, write_page
from fairline.runs import Run

#: Below this, about ±10 points.
SMALL = 100

#: A relative drop divides by the images that the base network gets right; of fewer than these it is noise.
RARELY = 10


def write_report(
    audit: str | Path, out: str | Path | None = None, *, costs: str | Path | None = None, within: float = 5.0
) -> Path:
    """Write the report of an audit run.

    Args:
        audit: Folder of a finished audit run.
        out: The HTML file; ``report.html`` in that folder by default.
        costs: Folder of a frontier run of this audit, for the cost panel.
        within: Drop in percent that any group may suffer, for the cost panel.

    Returns:
        The file.

    Raises:
        FairlineError: The folder holds no finished audit, or the costs are of another one.
    """
    run = Run.read(audit, "audit")
    counts = run.table("counts.parquet")
    frame = figures.prepare(run.table("audit.parquet"), counts)
    charts = figures.figures(frame)
    why = explanations.figures(frame, run.table("predictions.parquet")) if explanations.explains(frame) else {}
    split = corrections.figures(frame)
    priced: dict[str, Any] = {}
    content: dict[str, Any] = {}
    if costs is not None:
        priced, content = cost_panel.panel(costs, within, run)
    return write_page(
        Path(out) if out is not None else run.folder / "report.html",
        "report.html.j2",
        charts | why | split | priced,
        title=f"Who pays for linearization: {run.data.name}{by_groups(run)}",
        headline=headline(frame),
        warnings=warnings(frame, run) + explanations.warnings(frame),
        charts=charts.keys(),
        why=why.keys(),
        costs=content,
        corrections=corrections.panel(frame, run.table("predictions.parquet")) if split else [],
        correction_charts=split.keys(),
        bounds=[
            (variant, table)
            for variant in figures.main_variants(frame)
            if (table := explanations.bound_table(frame, variant))
        ],
        binary=explanations.binary_table(frame),
        balance=explanations.balance_table(frame),
        measured=set(frame["measure"]),
        tables=[(variant, _accuracy_table(frame, variant)) for variant in figures.main_variants(frame)],
        gaps=_gap_table(frame),
        counts=_counts_table(counts),
        settings=settings(run),
        has_drop=bool((frame["measure"] == "relative_drop").any()),
        has_linearized=bool((frame["stage"] != "base").any()),
        resamples=run.config["resamples"],
        split=run.config["split"],
    )


def headline(frame: pd.DataFrame) -> list[str]:
    """What happened, in a sentence or two for each variant."""
    before, rare = _before(frame), _rarely_right(frame)
    sentences = []
    for variant in figures.main_variants(frame):
        own = frame[frame["variant"] == variant]
        smallest = own[own["percent"] == own["percent"].min()]
        if (own["stage"] == "base").all():
            accuracy = _values(smallest, "accuracy")
            worst = min((g for g in accuracy if g != OVERALL), key=lambda g: accuracy[g])
            sentences.append(
                f"The base network is right on {accuracy[OVERALL]:.1%} of all images and on {accuracy[worst]:.1%} "
                f"of group “{worst}”, its worst."
            )
        else:
            sentences.append(_told(variant, smallest, before, rare))
    return sentences


def _told(variant: str, rows: pd.DataFrame, before: dict[str, float], rare: Collection[str]) -> str:
    """What linearization did to all images and to the groups that lose most and least; ``rare`` ones are left out."""
    accuracy = _values(rows, "accuracy")
    drops = {g: v for g, v in _values(rows, "relative_drop").items() if not math.isnan(v)}

    def change(group: str) -> str:
        return (f"{before[group]:.1%} to " if group in before else "to ") + f"{accuracy[group]:.1%}"

    whole = f"goes from {change(OVERALL)}" if OVERALL in before else f"is {accuracy[OVERALL]:.1%}"
    after = f"{variant}, {rows['budget'].iloc[0]} of the ReLUs: overall accuracy {whole}."
    groups = [group for group in drops if group != OVERALL and group not in rare]
    if not groups:
        return after
    hardest, mildest = max(groups, key=lambda g: drops[g]), min(groups, key=lambda g: drops[g])
    low, high = _limits(rows, "relative_drop", hardest)
    limits = f"({change(hardest)}; 95 % interval of the loss {low:.1f} to {high:.1f} %)"
    if drops[hardest] > 0:
        unsure = ", which includes no loss" if low <= 0 else ""
        told = f"Group “{hardest}” loses {drops[hardest]:.1f} % of its accuracy {limits}{unsure}"
    else:
        told = f"No group loses: even “{hardest}” gains {abs(drops[hardest]):.1f} % {limits}"
    other = ""
    if mildest != hardest:
        verb = "loses" if drops[mildest] > 0 else "gains"
        other = f"; “{mildest}” {verb} {abs(drops[mildest]):.1f} % ({change(mildest)})"
    return f"{after} {told}{other}."


def _rarely_right(frame: pd.DataFrame) -> dict[str, int]:
    """Groups in which the base network is right on too few images for a ratio of them, and how many those are."""
    sizes = frame[frame["measure"] == "accuracy"].groupby("group", sort=False)["n"].max()
    right = {group: round(accuracy * sizes[group]) for group, accuracy in _before(frame).items() if group != OVERALL}
    return {group: count for group, count in right.items() if count < RARELY}


def _before(frame: pd.DataFrame) -> dict[str, float]:
    """The base network's accuracy by group, as far as the audit tells it."""
    base = frame[frame["stage"] == "base"]
    if len(base):
        return _values(base, "accuracy")
    # Without rows of its own: a drop is (before − after) / before · 100, and undefined where before is 0.
    pairs = frame[frame["measure"] == "accuracy"].merge(
        frame.loc[frame["measure"] == "relative_drop", ["model", "group", "value"]],
        on=["model", "group"],
        suffixes=("", "_drop"),
    )
    known = pairs[pairs["value_drop"] != 100]
    before = (known["value"] / (1 - known["value_drop"] / 100)).fillna(0.0)
    return {str(group): float(values.iloc[0]) for group, values in before.groupby(known["group"], sort=False)}


def warnings(frame: pd.DataFrame, run: Run) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    sizes = (
        frame[(frame["measure"] == "accuracy") & (frame["group"] != OVERALL)].groupby("group", sort=False)["n"].max()
    )
    tiny = [f"“{name}” ({n})" for name, n in sizes.items() if n < TOO_SMALL]
    small = [f"“{name}” ({n})" for name, n in sizes.items() if TOO_SMALL <= n < SMALL]
    if tiny:
        found.append(
            f"Too small to judge: {', '.join(tiny)} have fewer than {TOO_SMALL} images in the {run.config['split']} "
            "part. Do not decide anything on their accuracy."
        )
    if small:
        found.append(
            f"Small: {', '.join(small)} have fewer than {SMALL} images; one accuracy can be off by ten points. "
            "Read the intervals, not the bars."
        )
    if run.config["split"] != "test":
        found.append(f"These numbers are from the {run.config['split']} part, which training or selection has seen.")
    rare = [f"“{group}” ({count})" for group, count in _rarely_right(frame).items()]
    if rare and (frame["measure"] == "relative_drop").any():
        found.append(
            f"The base network is right on fewer than {RARELY} images of {', '.join(rare)}: a relative drop says "
            "little there, and is undefined where it is never right."
        )
    short = frame[~frame["reached"]]
    if len(short):
        labels = ", ".join(dict.fromkeys(short["budget"]))
        found.append(
            f"Mask learning ended before it reached {labels} of the ReLUs; there the largest masks were kept "
            "as they were, which costs accuracy. Raise max_epochs, the learning rate or λ."
        )
    drops = frame[(frame["measure"] == "relative_drop") & (frame["group"] == OVERALL)]
    better = drops[drops["high"] < 0]
    if len(better):
        found.append(
            f"With {', '.join(dict.fromkeys(better['budget']))} of its ReLUs the network is more accurate than "
            "the base network, so the base network was not trained to its best: drops here mix linearization with "
            "further training. Train the base network longer, or add the budget 100 % as a control that is "
            "finetuned alike."
        )
    return found


def _values(rows: pd.DataFrame, measure: str) -> dict[str, float]:
    part = rows[rows["measure"] == measure]
    return {str(group): float(value) for group, value in zip(part["group"], part["value"], strict=True)}


def _limits(rows: pd.DataFrame, measure: str, group: str) -> tuple[float, float]:
    row = rows[(rows["measure"] == measure) & (rows["group"] == group)].iloc[0]
    return float(row["low"]), float(row["high"])


def _accuracy_table(frame: pd.DataFrame, variant: str) -> dict[str, Any]:
    """Rows: groups; columns: budgets; cells: accuracy with interval, and drop with interval."""
    rows = figures.with_base(frame, variant)
    budgets = figures.budget_order(rows)
    body = []
    for group in [*figures.group_order(frame), OVERALL]:
        cells = []
        for budget in budgets:
            here = rows[(rows["budget"] == budget) & (rows["group"] == group)].set_index("measure")
            accuracy = here.loc["accuracy"]
            cell = {
                "accuracy": f"{accuracy['value']:.1%}",
                "interval": f"{accuracy['low']:.1%} – {accuracy['high']:.1%}",
            }
            if "relative_drop" in here.index and not math.isnan(here.loc["relative_drop", "value"]):
                drop = here.loc["relative_drop"]
                cell["drop"] = f"drop {drop['value']:+.1f} % [{drop['low']:+.1f}, {drop['high']:+.1f}]"
                cell["sure"] = "loss" if drop["low"] > 0 else ("gain" if drop["high"] < 0 else "")
            cells.append(cell)
        n = int(rows[(rows["group"] == group) & (rows["measure"] == "accuracy")]["n"].max())
        body.append({"group": group, "n": f"{n:,}", "cells": cells, "small": n < TOO_SMALL})
    return {"budgets": budgets, "rows": body}


def _gap_table(frame: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for (variant, budget), part in frame.groupby(["variant", "budget"], sort=False):
        measures = part[part["group"] == OVERALL].set_index("measure")
        row = {
            "variant": str(variant),
            "budget": str(budget),
            "relus": f"{int(part['relus'].iloc[0]):,}",
            "overall": f"{measures.loc['accuracy', 'value']:.1%}",
        }
        for key, measure, factor, unit in (
            ("worst", "worst_group_accuracy", 100, " %"),
            ("gap", "accuracy_gap", 100, ""),
            ("drop_gap", "relative_drop_gap", 1, ""),
        ):
            if measure in measures.index:
                value, low, high = (factor * float(measures.loc[measure, c]) for c in ("value", "low", "high"))
                limits = "" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]"
                row[key] = f"{value:.1f}{unit}{limits}"
        rows.append(row)
    return rows


def _counts_table(counts: pd.DataFrame) -> dict[str, Any]:
    parts = [part for part in ("train", "val", "test") if part in set(counts["part"])]
    wide = counts.pivot_table(index="group", columns="part", values="n", sort=False)[parts]
    share = 100 * wide["train"] / wide["train"].sum()
    rows = [
        {"group": group, "n": [f"{int(n):,}" for n in wide.loc[group]], "share": f"{share[group]:.2f} %"}
        for group in wide["train"].sort_values(ascending=False).index
    ]
    return {"parts": parts, "rows": rows, "total": [f"{int(n):,}" for n in wide.sum()]}


def write_figures(audit: str | Path, folder: str | Path) -> list[Path]:
    """Write each figure of an audit run as SVG and PNG.

    Returns:
        The files.

    Raises:
        FairlineError: The folder holds no finished audit.
    """
    run = Run.read(audit, "audit")
    frame = figures.prepare(run.table("audit.parquet"), run.table("counts.parquet"))
    charts = figures.figures(frame)
    if explanations.explains(frame):
        charts |= explanations.figures(frame, run.table("predictions.parquet"))
    charts |= corrections.figures(frame)
    return save_charts(charts, Path(folder))
