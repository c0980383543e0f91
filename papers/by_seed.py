"""A measure of each group in each seed, by the ReLUs kept: of the base network, plain distillation and Algorithm 1.

Accuracies in percent, other measures as they are.

    python papers/by_seed.py papers/results/medium/fig6_utkface_race_snl_medium gradient_norm

Without a measure it is the accuracy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from fairline.report.figures import budget_labels


def table(study: Path, measure: str = "accuracy") -> list[str]:
    """Its lines, in Markdown: groups from the largest on, seeds beside each other."""
    rows = pd.read_parquet(study / "results.parquet")
    rows = rows[(rows["measure"] == measure) & (rows["class"] == "")]
    groups = rows.groupby("group")["train_n"].mean().sort_values(ascending=False).index
    lines = [["ReLUs kept", *groups], ["---"] * (1 + len(groups))]
    labels = budget_labels(rows["percent"].unique())
    # The base network has no finetune, so it comes first.
    for (finetune, less), own in rows.groupby(["finetune", -rows["percent"]]):
        wide = own.pivot_table(index="seed", columns="group", values="value") * (100 if measure == "accuracy" else 1)
        digits = 1 if measure == "accuracy" else 2
        name = f"{finetune}, {labels[-less]}" if finetune else "base network"
        lines.append([name, *(", ".join(f"{value:.{digits}f}" for value in wide[group]) for group in groups)])
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    print("\n".join(table(Path(sys.argv[1]), *sys.argv[2:])))
