"""What each group lost against the control, and what is left once every network has its own free shift.

The control kept all its ReLUs and had the same further training. With a(τ) a network's accuracy under the shift τ that
validation images chose for it, and c(τ) the control's: the loss is c(0) − a(0), what more is given back
(a(τ) − a(0)) − (c(τ) − c(0)), and what is left their difference; points, Student's 95 % interval over seeds. "beyond"
is a group's less that of the largest.

    python papers/against_control.py papers/results/repairs_utkface_race 0,1

Without seeds behind it it is over all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from fairline.audit.intervals import student_interval


def told(values: pd.Series) -> str:
    """Mean and interval."""
    low, high = student_interval(values.to_numpy(float))
    return f"{values.mean():+.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    """Print them for plain distillation, by budget and group."""
    rows = pd.read_parquet(Path(sys.argv[1]) / "by_seed.parquet")
    if len(sys.argv) > 2:
        rows = rows[rows["seed"].isin([int(seed) for seed in sys.argv[2].split(",")])]
    rows = rows[(rows["method"] == "erm") & (rows["class"] == "") & ~rows["results"].str.endswith("_curves")]
    rows = rows.dropna(subset="train_n")
    largest = rows.groupby("group")["train_n"].mean().idxmax()
    wide = rows.pivot_table(index=["measure", "percent", "seed"], columns="group", values="value")
    lost, back = wide.loc["drop_points"], wide.loc["undone"]
    for percent in sorted({each for each in rows["percent"] if each < 100}, reverse=True):
        loss, more = lost.loc[percent] - lost.loc[100.0], back.loc[percent] - back.loc[100.0]
        left = loss - more
        for group in loss:
            line = f"{percent:5.3g} % {group:8} lost {told(loss[group])}, given back more {told(more[group])}, "
            line += f"left {told(left[group])}"
            if group != largest:
                beyond = [told(each[group] - each[largest]) for each in (loss, left)]
                line += f"; beyond {largest}: lost {beyond[0]}, left {beyond[1]}"
            print(line)


if __name__ == "__main__":
    main()
