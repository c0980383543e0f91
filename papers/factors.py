"""What varies claims 8 and 9: the same numbers under each factor, and how far each factor moves them.

Accuracies and gains are points on the test part. A gain is that of Algorithm 1 (μ·E = 0.5) over plain distillation, and
the spans are of the smallest group's accuracy over the three μ, and over the two up to 0.5; all are means over the
budgets below 100 %, or of the control, the network that kept all its ReLUs and had the same further training. Student's
95 % interval over seeds. Behind “less” stands the difference from the study that varies one thing less, seed by seed.
The last table has the violations of the smallest group at the end of Algorithm 1, the picture every group's gains.

    python papers/factors.py papers/results
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from fairline.audit.intervals import student_interval
from fairline.charts import palette, save_charts, themed

#: What each study varies.
STUDIES = {
    "factors_utkface_race": "12 base epochs, width 8, 4 finetune epochs",
    "factors_utkface_race_epochs": "16 finetune epochs",
    "factors_utkface_race_converged": "40 base epochs",
    "factors_utkface_race_wide": "width 16",
    "factors_utkface_race_held_out": "40 base epochs, λ by held-out images",
}
#: What each is compared with, in place of the first.
FROM = {"factors_utkface_race_held_out": "factors_utkface_race_converged"}
#: Finetunes, by what each step μ comes to over the epochs of its study.
STEPS = {"lagrangian-low": "0.1", "lagrangian": "0.5, the paper's", "lagrangian-high": "2"}
BASE, PLAIN, GAINS, SPAN, NEAR = "base network", "plain distillation", "gain", "span over μ", "span to μ·E = 0.5"
KEYS = ["what", "group"]


def told(values: pd.Series) -> str:
    """Mean and interval; of one seed its value."""
    found = values.to_numpy(float)
    limits = student_interval(found) if len(found) > 1 else ()
    value, *limits = (f"{each:.1f}".replace("-", "−").replace("−0.0", "0.0") for each in (found.mean(), *limits))
    return f"{value} [{', '.join(limits)}]" if limits else value


def extremes(rows: pd.DataFrame) -> tuple[str, str]:
    """The largest and the smallest group of the training part."""
    sizes = rows[rows["group"] != "overall"].dropna(subset="train_n").groupby("group")["train_n"].mean()
    return str(sizes.idxmax()), str(sizes.idxmin())


def numbers(rows: pd.DataFrame, *, control: bool) -> pd.DataFrame:
    """A row for each number and group, a column for each seed, in points.

    Args:
        rows: A study's results.
        control: Of the network that kept all its ReLUs, in place of those that lost most of them.

    Returns:
        The numbers.
    """
    own = rows[(rows["measure"] == "accuracy") & (rows["class"] == "")]
    largest, smallest = extremes(rows)
    keep = ["overall", largest, smallest]
    made = own[(own["stage"] == "finetuned") & ((own["relus"] == own["total_relus"]) == control)]
    wide = 100 * made.pivot_table(index=["finetune", "group"], columns="seed", values="value")
    base = own[own["stage"] == "base"].pivot_table(index="group", columns="seed", values="value")
    span = wide.drop(index="erm", level="finetune").groupby(level="group").agg(lambda each: each.max() - each.min())
    parts = {
        BASE: 100 * base.loc[["overall", smallest]],
        PLAIN: wide.loc["erm"].loc[["overall", smallest]],
        GAINS: (wide.loc["lagrangian"] - wide.loc["erm"]).loc[keep],
        SPAN: span.loc[[smallest]],
        NEAR: (wide.loc["lagrangian"] - wide.loc["lagrangian-low"]).abs().loc[[smallest]],
    }
    return pd.concat(parts, names=KEYS)


def table(results: Path, *, control: bool = False) -> list[str]:
    """Its lines, in Markdown."""
    found = {study: numbers(read(results, study), control=control) for study in STUDIES}
    first = next(iter(STUDIES))
    heads = ["", *(f"{what}, {group}" for what, group in found[first].index)]
    lines = [heads, ["---"] * len(heads)]
    for study, own in found.items():
        lines.append([STUDIES[study], *(told(each) for _, each in own.iterrows())])
        if study != first:
            other = FROM.get(study, first)
            # Seeds that one of them lacks drop out.
            less = (own - found[other]).dropna(axis=1)
            name = "the first" if other == first else STUDIES[other]
            lines.append([f"… less {name}", *(told(each) for _, each in less.iterrows())])
    return _written(lines)


def read(results: Path, study: str) -> pd.DataFrame:
    """A study's results."""
    return pd.read_parquet(results / study / "results.parquet")


def violations(results: Path) -> list[str]:
    """How far the smallest group's loss is from that of all at the end of Algorithm 1, on both parts, by budget."""
    lines = [["", "part", "100 %", "10 %", "2 %"], ["---"] * 5]
    for study, title in STUDIES.items():
        rows = read(results, study)
        own = rows[(rows["finetune"] == "lagrangian") & (rows["group"] == extremes(rows)[1])]
        for measure, part in (("train_violation", "training"), ("val_violation", "held out")):
            by_budget = own[own["measure"] == measure].groupby("percent")["value"].mean().sort_index(ascending=False)
            lines.append([title, part, *(f"{value:.2f}" for value in by_budget)])
    return _written(lines)


def _written(lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in lines]


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """What each group gains under each μ·E, mean over the budgets below 100 %, with limits over seeds."""
    own = rows[(rows["measure"] == "accuracy") & (rows["class"] == "") & (rows["stage"] == "finetuned")]
    own = own[own["relus"] < own["total_relus"]]
    wide = 100 * own.pivot_table(index="finetune", columns=["group", "seed"], values="value")
    found = []
    for finetune, step in STEPS.items():
        for group, each in (wide.loc[finetune] - wide.loc["erm"]).groupby(level="group", sort=False):
            low, high = student_interval(each.to_numpy(float)) if len(each) > 1 else (each.iloc[0], each.iloc[0])
            found.append({"μ·E": step, "group": group, "gain": each.mean(), "low": low, "high": high})
    return pd.DataFrame(found)


def picture(results: Path) -> Any:
    """Gains by group and μ·E, a panel a study, all on one axis."""
    tables = {study: read(results, study) for study in STUDIES}
    sizes = tables[next(iter(STUDIES))].dropna(subset="train_n").groupby("group")["train_n"].mean()
    order = list(sizes.sort_values(ascending=False).index)
    drawn = {study: gains(rows) for study, rows in tables.items()}
    ends = pd.concat(drawn)[["low", "high"]]
    axis = alt.Scale(domain=[float(ends.min().min()), float(ends.max().max())], nice=True)
    colours = palette(list(STEPS.values()))
    charts = []
    for study, rows in drawn.items():
        base = alt.Chart(rows).encode(
            y=alt.Y("group:N", sort=order, title=None, axis=alt.Axis(grid=True)),
            yOffset=alt.YOffset("μ·E:N", sort=list(STEPS.values())),
            color=alt.Color(
                "μ·E:N",
                scale=alt.Scale(domain=list(colours), range=list(colours.values())),
                legend=alt.Legend(orient="bottom", title="μ·E"),
            ),
        )
        zero = alt.Chart(pd.DataFrame({"at": [0]})).mark_rule(strokeDash=[4, 3], color="#7d8590").encode(x="at:Q")
        limits = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", scale=axis, title="gain, points"), x2="high:Q")
        dots = base.mark_point(filled=True, size=55, opacity=1).encode(x=alt.X("gain:Q", scale=axis))
        charts.append(alt.layer(zero, limits, dots).properties(title=STUDIES[study], width=330, height=230))
    return themed(alt.concat(*charts, columns=2, spacing=24))


def main() -> None:
    """Print the tables and draw the picture."""
    results = Path(sys.argv[1]) if len(sys.argv) == 2 else Path()
    if missing := [study for study in STUDIES if not (results / study / "results.parquet").exists()]:
        sys.exit(f"Name the folder of the results, such as papers/results; it must hold {', '.join(missing)}.")
    print("Below 100 % of the ReLUs:", "", *table(results), "", sep="\n")
    print("The control:", "", *table(results, control=True), "", sep="\n")
    print("Violations:", "", *violations(results), "", sep="\n")
    print(*save_charts({"factors": picture(results)}, results / next(iter(STUDIES)), ("png",)))


if __name__ == "__main__":
    main()
