"""What bfloat16 costs in accuracy: two runs of one study that differ in precision alone, paired by seed.

    for p in fp32 bf16; do
        fairline study run papers/precision_utkface_race.yaml --scale $p --out studies --results results
    done
    python benchmarks/paired_precision.py results/precision_utkface_race_fp32 results/precision_utkface_race_bf16 \
        [--out papers/results/precision_utkface_race]

A row is a network (the base network, or a budget) and a group: accuracies in %, bfloat16's minus float32's in points,
and Student's 95 % limits of the mean over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fairline._io import atomic_path, read_json, write_json
from fairline.audit.intervals import student_interval
from fairline.data.grouped import OVERALL, WORST
from fairline.study.store import read_results

KEYS = ["percent", "method", "objective", "objective_options", "group"]


def paired(fp32: pd.DataFrame, bf16: pd.DataFrame) -> pd.DataFrame:
    """A row a network and group.

    Args:
        fp32: Results of the study in float32.
        bf16: The same in bfloat16, of as many seeds or fewer.

    Returns:
        Columns relus_percent, method, objective, group, seeds, fp32, bf16, difference, low, high.
    """
    both = [accuracies(frame) for frame in (fp32, bf16)]
    together = both[0].join(both[1], how="inner", lsuffix="_fp32", rsuffix="_bf16")
    rows = []
    for (percent, method, objective, _, group), seeds in together.groupby(level=KEYS, sort=False):
        difference = (seeds["value_bf16"] - seeds["value_fp32"]).to_numpy()
        low, high = student_interval(difference)
        rows.append(
            {
                "relus_percent": "base" if percent < 0 else f"{percent:g}",
                "method": method,
                "objective": objective,
                "group": group,
                "seeds": len(seeds),
                "fp32": seeds["value_fp32"].mean(),
                "bf16": seeds["value_bf16"].mean(),
                "difference": difference.mean(),
                "low": low,
                "high": high,
            }
        )
    return pd.DataFrame(rows)


def accuracies(results: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy in %, indexed by network, group and seed; the base network is -1 %."""
    chosen = results[
        results["measure"].isin(["accuracy", "worst_group_accuracy"]) & (results["split"] == "test")
    ].copy()
    chosen["group"] = chosen["group"].where(chosen["measure"] == "accuracy", WORST)
    chosen["percent"] = chosen["percent"].where(chosen["stage"] != "base", -1.0).round(3)
    chosen["value"] *= 100
    return chosen.set_index([*KEYS, "seed"])[["value"]]


def main() -> None:
    """Print the table, and keep it beside the two studies' provenance."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fp32", type=Path)
    parser.add_argument("bf16", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    table = paired(read_results([asked.fp32]), read_results([asked.bf16]))
    print(table.round(2).to_string(index=False))
    for group, most in ((OVERALL, 0.5), (WORST, 2.0)):
        largest = table.loc[table["group"] == group, "difference"].abs().max()
        verdict = "less" if largest < most else "NOT less"
        print(f"{group}: differs by at most {largest:.2f} points on average, {verdict} than {most}")
    if asked.out is not None:
        with atomic_path(asked.out / "paired.csv") as temporary:
            table.round(3).to_csv(temporary, index=False)
        for name, folder in (("fp32", asked.fp32), ("bf16", asked.bf16)):
            write_json(asked.out / f"provenance_{name}.json", read_json(folder / "provenance.json"))


if __name__ == "__main__":
    main()
