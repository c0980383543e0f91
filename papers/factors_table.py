"""What varies claims 8 and 9: the same numbers under each factor, and how far each factor moves them.

Accuracies and gains are points on the test part. A gain is that of Algorithm 1 (μ·E = 0.5) over plain distillation, and
the span is of the smallest group's accuracy over the three μ; both are means over the budgets below 100 %, or of the
control, the network that kept all its ReLUs and had the same further training. Student's 95 % interval over seeds.
Behind “less” stands the difference from the first study, seed by seed.

    python papers/factors_table.py papers/results
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from fairline.audit.intervals import student_interval

#: What each study varies; the first is what the others are compared with.
STUDIES = {
    "factors_utkface_race": "12 base epochs, width 8, 4 finetune epochs",
    "factors_utkface_race_epochs": "16 finetune epochs",
    "factors_utkface_race_converged": "40 base epochs",
    "factors_utkface_race_wide": "width 16",
}
BASE, PLAIN, GAINS, SPAN = "base network", "plain distillation", "gain", "span over μ"
KEYS = ["what", "group"]


def told(values: pd.Series) -> str:
    """Mean and interval."""
    low, high = student_interval(values.to_numpy(float))
    value, low, high = (f"{each:.1f}".replace("-", "−").replace("−0.0", "0.0") for each in (values.mean(), low, high))
    return f"{value} [{low}, {high}]"


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
    }
    return pd.concat(parts, names=KEYS)


def table(results: Path, *, control: bool = False) -> list[str]:
    """Its lines, in Markdown."""
    lines: list[list[str]] = []
    first = pd.DataFrame()
    for study, title in STUDIES.items():
        own = numbers(pd.read_parquet(results / study / "results.parquet"), control=control)
        if first.empty:
            first = own
            heads = ["", *(f"{what}, {group}" for what, group in own.index)]
            lines += [heads, ["---"] * len(heads)]
        lines.append([title, *(told(each) for _, each in own.iterrows())])
        if own is not first:
            paired = own.columns.intersection(first.columns)
            less = own[paired] - first[paired]
            lines.append(["… less the first", *(told(each) for _, each in less.iterrows())])
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    """Print both."""
    results = Path(sys.argv[1]) if len(sys.argv) == 2 else Path()
    if missing := [study for study in STUDIES if not (results / study / "results.parquet").exists()]:
        sys.exit(f"Name the folder of the results, such as papers/results; it must hold {', '.join(missing)}.")
    print("Below 100 % of the ReLUs:", "", *table(results), "", sep="\n")
    print("The control:", "", *table(results, control=True), sep="\n")


if __name__ == "__main__":
    main()
