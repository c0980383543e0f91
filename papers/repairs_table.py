"""The table of a study of repairs, as its README has it: every method's chosen strengths at the budgets below 100 %.

Accuracies are means over seeds on the test part. Behind them the worst group's points above the free line at the same
overall accuracy where groups are classes, else its gain against plain distillation; and either beyond the control, the
network that kept all its ReLUs under the same method. Student's 95 % interval over seeds.

    python papers/repairs_table.py papers/results/repairs_utkface_race
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

#: What comparisons call methods, and READMEs.
NAMES = {
    "erm": "plain distillation",
    "erm, logit adjust": "biases shifted, τ chosen",
    "erm, tau norm": "τ-normalisation",
    "erm, weight scale": "weight scaling",
    "erm, last layer within=1": "last layer retrained (DFR)",
    "erm, AFR within=1": "AFR (no group labels)",
    "erm, SELF within=1": "SELF (no group labels)",
    "lagrangian, mu chosen": "Algorithm 1",
    "lagrangian on=val, mu chosen": "Algorithm 1, λ by held-out images",
    "drop, epsilon chosen": "the drop as the constraint",
    "drop measure=accuracy excess=True, epsilon chosen": "the drop of accuracy beyond that of all",
    "group_dro, step chosen": "group DRO",
    "logit_adjust teacher=adjusted, tau chosen": "logit adjustment of both terms",
    "reweighting, beta chosen": "reweighting by effective number",
    "balanced_kd, strength chosen": "class-balanced KD",
    "ada_alpha, strength chosen": "AdaAlpha",
    "ada_margin, strength chosen": "AdaMargin",
    "long_tail_kd, strength chosen": "long-tail KD",
    "ldam, margin chosen": "LDAM",
    "chi2_dro, alpha_min chosen": "χ²-DRO (no group labels)",
    "arl, lr chosen": "ARL (no group labels)",
}


def number(value: float, plus: bool = False) -> str:
    """A number of points, to a tenth."""
    text = f"{value:.1f}".replace("-", "−").replace("−0.0", "0.0")
    return f"+{text}" if plus and float(f"{value:.1f}") > 0 else text


def table(folder: Path) -> list[str]:
    """Its lines, in Markdown."""
    name = folder.name.removeprefix("repairs_utkface_")
    (file,) = (file for file in folder.glob("*.csv") if (folder / f"{file.stem}_curves.csv").exists())
    rows = pd.read_csv(file)
    rows = rows[rows["class"].isna()]
    keys = ["method", "percent", "group", "measure"]
    found = rows.set_index(keys)[["value", "low", "high"]].to_dict("index")
    budgets = sorted({each for each in rows["percent"] if each < 100}, reverse=True)
    # Where groups lie across classes no shift favours one.
    measures = ["gain", "beyond_control"] if "_by_" in name else ["above_null", "above_null_beyond_control"]

    def accuracy(method: str, group: str) -> str:
        return " / ".join(number(100 * found[method, budget, group, "accuracy"]["value"]) for budget in budgets)

    def points(method: str, budget: float, measure: str) -> str:
        if (own := found.get((method, budget, "worst group", measure))) is None:
            return ""
        value, low, high = own.values()
        return number(value, plus=True) + ("" if pd.isna(low) or low == high else f" [{number(low)}, {number(high)}]")

    told = " / ".join(f"{budget:.3g} %" for budget in budgets)
    first = {"gain": "gain", "above_null": "above the free line"}[measures[0]]
    heads = ["", "tried", f"overall, {told}", f"worst group, {told}"]
    heads += [f"{what}, {budget:.3g} %" for what in (first, "beyond the control") for budget in budgets]
    lines = [heads, ["---"] * len(heads)]
    for method in rows["method"].drop_duplicates():
        if method == "base network":
            continue
        tried = rows.loc[rows["method"] == method, "tried"].max()
        own = [points(method, budget, measure) for measure in measures for budget in budgets]
        lines.append(
            [
                NAMES.get(method, method),
                f"{tried:.0f}",
                accuracy(method, "overall"),
                accuracy(method, "worst group"),
                *own,
            ]
        )
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    """Print it."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "provenance.json").exists():
        sys.exit("Name the folder of a study of repairs, such as papers/results/repairs_utkface_race.")
    print("\n".join(table(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
