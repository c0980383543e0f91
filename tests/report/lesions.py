"""An audit run of constructed predictions: skin lesions, of which a network loses half of the melanomas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from fairline.audit.accuracy import relative_drop
from fairline.data.grouped import OVERALL
from fairline.runs import Run

#: Group, class, images, right before, lost and gained: of 123 melanomas 48 are right before, and 25 after.
LESIONS = [
    *(
        (age, "nevus", n, round(0.8 * n), round(0.01 * n), round(0.08 * n))
        for age, n in (("<40", 500), ("40-59", 600), ("≥60", 557))
    ),
    ("<40", "melanoma", 13, 5, 2, 0),
    ("40-59", "melanoma", 45, 18, 9, 0),
    ("≥60", "melanoma", 65, 25, 12, 0),
    *((age, "keratosis", n, round(0.5 * n), 2, 9) for age, n in (("<40", 30), ("40-59", 80), ("≥60", 113))),
]
#: What the control, with all its ReLUs, does to the same: it loses nearly as many melanomas.
CONTROL = [
    (*row[:4], *((row[4] - (row[0] == "≥60"), 0) if row[1] == "melanoma" else (row[4], row[5] - 1))) for row in LESIONS
]

NAMES = {"base": 10_000, "students/budget-500": 500, "students/budget-10000": 10_000}


def images(sets, model: str) -> pd.DataFrame:
    """Predictions of (group, class, images, right before, lost, gained)."""
    rows = []
    for group, label, n, before, lost, gained in sets:
        reference = np.arange(n) < before
        own = reference.copy()
        if model != "base":
            own[:lost] = False
            own[before : before + gained] = True
        rows.append(pd.DataFrame({"group": group, "label": label, "correct": own, "reference_correct": reference}))
    table = pd.concat(rows, ignore_index=True)
    if model == "base":
        table["reference_correct"] = None
    return table.assign(index=range(len(table)), model=model)


def audited(predictions: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``audit.parquet`` for the networks of predictions."""
    rows = []
    for model, own in predictions.groupby("model", sort=False):
        for group in [OVERALL, *own["group"].unique()]:
            part = own if group == OVERALL else own[own["group"] == group]
            after, n = float(part["correct"].mean()), len(part)
            row = {"model": model, "split": "test", "group": group, "class": "", "n": n}
            rows.append({**row, "measure": "accuracy", "value": after, "low": after - 0.02, "high": after + 0.02})
            if model != "base":
                drop = float(relative_drop(part["reference_correct"].mean(), after))
                rows.append({**row, "measure": "relative_drop", "value": drop, "low": drop - 2, "high": drop + 2})
        for name, part in own.groupby("label", sort=False):
            share = float(part["correct"].mean())
            row = {
                "model": model,
                "split": "test",
                "group": OVERALL,
                "class": name,
                "n": len(part),
                "measure": "recall",
            }
            rows.append({**row, "value": share, "low": share - 0.05, "high": share + 0.05})
    table = pd.DataFrame(rows)
    base = table["model"] == "base"
    return table.assign(
        stage=np.where(base, "base", "finetuned"),
        method=np.where(base, "", "snl"),
        objective=np.where(base, "", "erm"),
        relus=table["model"].map(NAMES),
        total_relus=10_000,
        seed=0,
        reached=True,
    )


def lesions_run(folder: Path, *, lesions=LESIONS, control=CONTROL, weights: str | None = None) -> Run:
    """Write it.

    Args:
        folder: Where.
        lesions: Of the network with 5 % of its ReLUs.
        control: Of the one with all; none if empty.
        weights: The file that the base network's weights came from.

    Returns:
        The finished run.
    """
    folder.mkdir(parents=True)
    parts = [images(lesions, "base"), images(lesions, "students/budget-500")]
    if control:
        parts.append(images(control, "students/budget-10000"))
    predictions = pd.concat(parts, ignore_index=True)
    predictions.to_parquet(folder / "predictions.parquet")
    audited(predictions).to_parquet(folder / "audit.parquet")
    sizes = parts[0].groupby("group", sort=False).size()
    counts = [
        sizes.rename("n").reset_index().assign(n=lambda rows, k=k: rows["n"] * k, part=part)
        for part, k in (("train", 3), ("val", 1), ("test", 1))
    ]
    pd.concat(counts).to_parquet(folder / "counts.parquet")
    costs(list(predictions["model"].unique())).to_parquet(folder / "costs.parquet")
    data = {
        "name": "lesions",
        "root": None,
        "options": {},
        "split_seed": 0,
        "fingerprint": "none",
        "mean": [],
        "std": [],
    }
    start = {} if weights is None else {"weights": {"file": f"/elsewhere/{weights}", "digest": "0"}}
    lineage = {str(folder / "base"): {"command": "train", "data": data, "seed": 0, **start}}
    config = {"command": "audit", "data": data, "split": "test", "resamples": 100, "seed": 0, "lineage": lineage}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu"}))
    (folder / "status.json").write_text(json.dumps({"status": "finished"}))
    return Run.read(folder, "audit")


def costs(models: list[str]) -> pd.DataFrame:
    """Rows of ``costs.parquet``: a network costs a floor, and so much for each ReLU."""
    from fairline.jobs.costs import COLUMNS

    rows = []
    for model in models:
        for wire, seconds in (("lan", 1.0), ("wan", 20.0)):
            share = 0.2 + 0.8 * NAMES[model] / 10_000
            totals = {"bytes": 1e8 * share, "rounds": 100.0, "seconds": seconds * share}
            row = dict.fromkeys(COLUMNS, 0.0) | totals | {f"{cost}_relu": value for cost, value in totals.items()}
            row |= {
                "model": model,
                "protocol": "cheetah",
                "network": wire,
                "relus": NAMES[model],
                "total_relus": 10_000,
                "compiled": False,
                "replace": "",
                "replace_in": "",
                "basis": "predicted",
            }
            rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def lesions_frontier(folder: Path, audit: Run) -> Run:
    """Write the frontier run of such an audit, over a LAN."""
    from fairline.jobs.frontier import count_cells
    from fairline.private.frontier import frontier

    folder.mkdir(parents=True)
    scores, counted, priced = audit.table("audit.parquet"), count_cells(audit), audit.table("costs.parquet")
    priced = priced[priced["network"] == "lan"].rename(columns={"network": "wire"})
    scores = scores[scores["measure"].isin(["accuracy", "relative_drop"])]
    scores.to_parquet(folder / "accuracy.parquet")
    audit.table("counts.parquet").to_parquet(folder / "counts.parquet")
    counted.to_parquet(folder / "cells.parquet")
    frontier(scores, priced, counted).to_parquet(folder / "frontier.parquet")
    config = {**audit.config, "command": "frontier", "audit": {"folder": str(audit.folder)}}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("environment.json", "status.json"):
        (folder / name).write_bytes((audit.folder / name).read_bytes())
    return Run.read(folder, "frontier")
