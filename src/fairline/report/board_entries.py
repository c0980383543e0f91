"""A board's entries, made of what studies committed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fairline._io import read_json, write_json
from fairline.audit.intervals import mean_interval
from fairline.data.grouped import OVERALL
from fairline.errors import FairlineError
from fairline.report.board import NO_LINEARIZER, Measured, parse_entry
from fairline.report.figures import METHOD_NAMES, variant_label
from fairline.report.panels import one_of_several
from fairline.study.store import read_results

#: The table of a study, where it comes from, and a frontier of its networks.
RESULTS, PROVENANCE, FRONTIER = "results.parquet", "provenance.json", "compiled"

_WORST = "worst_group_accuracy"
_BASE = "base network"


def entries_of(results: str | Path) -> dict[str, Measured]:
    """The entries of one study.

    Args:
        results: Its folder of committed results: ``results.parquet`` and ``provenance.json``, which
            ``fairline study run --results`` writes, and perhaps ``compiled`` with a frontier of its networks.

    Returns:
        An entry for each network that the study compares, by its file name on the board, ``STUDY/NAME.json``. Single
        values of a sweep are left out: what was chosen of them is there.

    Raises:
        FairlineError: A file is missing or broken, or is of another study.
    """
    folder = Path(results)
    if not (folder / RESULTS).is_file():
        raise FairlineError(f"{results} holds no {RESULTS}; fairline study run --results writes it.")
    rows = read_results([folder / RESULTS])
    made = read_json(folder / PROVENANCE)
    study = str(rows["study"].iloc[0])
    if not isinstance(made, dict) or made.get("study") != study or made.get("spec_hash") != rows["spec_hash"].iloc[0]:
        raise FairlineError(f"{folder / PROVENANCE} is not of the study that {folder / RESULTS} holds, '{study}'.")
    costs = _costs(folder / FRONTIER, study, made["spec_hash"])
    rows = rows[(rows["class"] == "") & ~one_of_several(rows) & rows["stage"].isin(["base", "finetuned"])]
    rows = rows[rows["measure"].isin(["accuracy", _WORST])]
    contents: dict[str, tuple[str, dict[str, Any]]] = {}
    called: dict[tuple[str, str], dict[int, set[str]]] = {}
    columns = ["data_label", "masks", "finetune", "asked"]
    for (label, masks, finetune, asked), own in rows.groupby(columns, sort=False):
        kept = "base" if own["stage"].iloc[0] == "base" else f"{masks}-{finetune}-{asked}"
        name = f"{study}/{re.sub(r'[^A-Za-z0-9_=.+-]+', '_', f'{label}-{kept}')}.json"
        content = {"kind": "measured", **_content(own, int(asked)), "provenance": _provenance(made)}
        called.setdefault((label, content["method"]["name"]), {}).setdefault(int(asked), set()).add(masks)
        content["costs"] = list(_costs_of(own.iloc[0], costs))
        contents[name] = (label, content)
    found: dict[str, Measured] = {}
    for name, (label, content) in contents.items():
        method = content["method"]
        # Masks that differ in their settings alone are told apart by what the study calls them.
        if any(len(masks) > 1 for masks in called[label, method["name"]].values()):
            content["method"] = method | {"name": f"{method['name']} ({method['masks']})"}
        entry = parse_entry(content, name)
        assert isinstance(entry, Measured)
        found[name] = entry
    return found


def add_entries(board: str | Path, results: str | Path) -> list[Path]:
    """Write the entries of one study to a board, in a folder of its name, and remove those that it no longer has.

    Args:
        board: Folder of the board.
        results: As for :func:`entries_of`.

    Returns:
        The files written.

    Raises:
        FairlineError: As of :func:`entries_of`, or a file cannot be written.
    """
    entries = entries_of(results)
    files = []
    for name, entry in entries.items():
        files.append(Path(board) / name)
        write_json(files[-1], plain(entry))
    for file in set(files[0].parent.glob("*.json")) - set(files):
        file.unlink()
    return files


def plain(entry: Measured) -> dict[str, Any]:
    """An entry as it is written: nothing that says nothing."""
    content: dict[str, Any] = entry.model_dump(mode="json", exclude_none=True)
    if not entry.costs:
        del content["costs"]
    kind = content.pop("kind")
    whole: dict[str, Any] = _whole({"kind": kind, **content})
    return whole


def _whole(value: Any) -> Any:
    """Whole numbers as such."""
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _content(own: pd.DataFrame, asked: int) -> dict[str, Any]:
    """All of an entry but for costs and provenance."""
    first = own.iloc[0]
    options, model = json.loads(first["data_options"] or "{}"), json.loads(first["model_options"] or "{}")
    width = model.pop("width", None)
    relus, total = float(own.groupby("seed")["relus"].first().mean()), int(first["total_relus"])
    accuracy = own[own["measure"] == "accuracy"]
    content: dict[str, Any] = {
        "method": _method(first),
        "data": {"name": first["data"], "groups": _groups(first["data"], options), "options": options},
        "network": {"architecture": first["model"], "relus": total, "width": width, "options": model},
        "budget": {"percent": _digits(100 * relus / total), "relus": _digits(relus)},
        "seeds": sorted(int(seed) for seed in own["seed"].unique()),
        "accuracy": {
            "overall": _share(accuracy[accuracy["group"] == OVERALL]),
            "groups": {
                str(group): _share(part) for group, part in accuracy.groupby("group", sort=False) if group != OVERALL
            },
            "worst": _share(own[own["measure"] == _WORST], images=False),
        },
        "scale": first["scale"],
    }
    if asked != relus:
        content["budget"]["asked"] = asked
    return content


def _method(row: pd.Series[Any]) -> dict[str, str]:
    if row["stage"] == "base":
        return {"name": _BASE, "linearizer": NO_LINEARIZER}
    name = METHOD_NAMES.get(row["method"], row["method"].replace("_", " "))
    if row["relus"] == row["total_relus"]:
        # No ReLU went, whatever was to place them.
        name = "all ReLUs, finetuned"
    placement = [f"masks {row['placement']}"] if row["placement"] else []
    finetune = [] if row["finetune"] == "erm" else [_finetune(row)]
    return {
        "name": ", ".join([name, *placement, *finetune]),
        "linearizer": row["method"],
        "masks": row["masks"],
        "surrogate": row["surrogate"],
        "finetune": row["finetune"],
    }


def _finetune(row: pd.Series[Any]) -> str:
    """What a finetune is called: its objective with its options where the study's label is short for that."""
    label, objective = str(row["finetune"]), str(row["objective"])
    options = json.loads(row["objective_options"] or "{}")
    told = " ".join([objective, *(f"{name}={value}" for name, value in options.items())])
    return (told if label.partition("-")[0] == objective else label).replace("_", " ")


def _groups(data: str, options: dict[str, Any]) -> str:
    groups = options.get("groups") or data.partition(":")[2] or "class"
    return groups if isinstance(groups, str) else ",".join(groups)


def _share(rows: pd.DataFrame, *, images: bool = True) -> dict[str, float]:
    """The mean over seeds, with Student's limits; of one seed its own."""
    rows = rows.dropna(subset=["value"])
    values = rows.sort_values("seed")["value"].to_numpy(np.float64)
    if len(values) > 1:
        low, high = mean_interval(values, 0.0, 1.0)
    else:
        low, high = (float(rows[limit].iloc[0]) for limit in ("low", "high"))
    share = {"value": _digits(float(values.mean()))}
    if not math.isnan(low):
        share |= {"low": _digits(low), "high": _digits(high)}
    return share | ({"n": _digits(float(rows["n"].mean()))} if images else {})


def _digits(value: float) -> float:
    """Five digits, as the tables of results have; a whole number as such."""
    return value if value.is_integer() else float(f"{value:.5g}")


def _provenance(made: dict[str, Any]) -> dict[str, Any]:
    study = made["study"]
    kept = {name: made[name] for name in ("spec_hash", "commits", "devices", "platforms", "python", "packages")}
    return {
        "study": study,
        "spec": f"papers/{study}.yaml",
        **kept,
        "command": f"fairline study run papers/{study}.yaml --root DATA --out STORE --results papers/results",
        "date": made["written"],
    }


def _costs(folder: Path, study: str, spec_hash: str) -> pd.DataFrame:
    """What networks of the study cost, with the seeds of which they are; empty where nothing is known."""
    if not (folder / "frontier.csv").is_file():
        return pd.DataFrame(columns=["variant", "relus", "stage"])
    made = read_json(folder / PROVENANCE)
    if not any(each["name"] == study and each["spec_hash"] == spec_hash for each in made["studies"]):
        raise FairlineError(f"{folder} is not of the networks of '{study}' as its results stand.")
    table = pd.read_csv(folder / "frontier.csv")
    return table.assign(seeds=[made["seeds"]] * len(table))


def _costs_of(row: pd.Series[Any], costs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Costs of the network of a row, as it is and compiled."""
    stage, method, objective, placement, surrogate = (
        str(row[name]) for name in ("stage", "method", "objective", "placement", "surrogate")
    )
    # A frontier tells objectives apart, not several finetunes under one.
    if costs.empty or row["finetune"] != objective:
        return
    names = {
        variant_label(stage, method, objective, placement, surrogate, compiled=compiled) for compiled in (False, True)
    }
    names = {_BASE} if stage == "base" else names
    same = costs[costs["variant"].isin(names) & (costs["relus"] == row["relus"])]
    # Where several seeds' networks are priced, none of them stands for the others.
    same = same[~same.duplicated(["variant", "protocol", "wire"], keep=False)]
    for cost in same.to_dict("records"):
        content = {
            "protocol": cost["protocol"],
            "network": cost["wire"],
            "basis": cost["basis"],
            "compiled": bool(cost["compiled"]),
            "seeds": cost["seeds"],
        }
        for name, factor in (("seconds", 1.0), ("bytes", 1e6), ("rounds", 1.0)):
            if not math.isnan(cost[name]):
                content["megabytes" if name == "bytes" else name] = _digits(cost[name] / factor)
        yield content
