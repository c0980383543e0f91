"""The job of ``fairline compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fairline._io import resolve_device, write_table
from fairline.audit.comparison import BASE, Scored, compare
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.jobs._common import STUDENTS, data_of, require_split
from fairline.masking import masked_relus
from fairline.runs import (
    NetworkInfo,
    Run,
    load_info,
    load_network,
)
from fairline.training import Progress, ProgressCallback


def method_label(run: Run, info: NetworkInfo) -> str:
    """What was done to a network after its base training: ``"masks lagrangian, lagrangian mu=0.005"``."""
    if info.stage == "base":
        return BASE
    parts = [] if not info.placement else [f"masks {info.placement}"]
    if info.surrogate != "identity":
        parts.append(info.surrogate)
    if run.command == "linearize":
        parts.append("not finetuned")
    own = run
    while own.command == "last-layer":
        own = own.lineage()[-2]
    if own.command == "finetune":
        options = " ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in own.config["objective_options"].items()
        )
        text = f"{own.config['objective']} {options}".strip()
        parts.append(text if own.config.get("distill", True) else f"{text}, labels only")
    if run.command == "last-layer":
        parts.append("last layer")
    label = ", ".join(parts)
    # The linearizer is named only where it is not the usual one.
    return label if info.method == "snl" else f"{info.method}: {label}"


def compare_job(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    baseline: str | None = None,
    split: str = "test",
    resamples: int = 2000,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Compare runs at equal budgets into ``out``; runs from several base networks (seeds) are replicates.

    Predictions are kept as soon as all of a base network's are known, so an interrupted comparison resumes there.

    Args:
        sources: Folders of linearize, finetune or last-layer runs.
        out: The run folder.
        baseline: Method to compare with, as the table names it; ``erm`` (plain distillation) by default, else the
            first.
        split: Part to measure on.
        resamples: Bootstrap resamples, where there is one base network.
        root: Where the data are now, if they have moved.
        seed: Of the bootstrap.
        device: The accelerator if there is one, by default.
        progress: Told how far it is.

    Returns:
        The run: ``comparison.parquet``, ``predictions.parquet``, ``layers.parquet``.

    Raises:
        FairlineError: The runs are of different data, or not the same for every base network.
    """
    where = resolve_device(device)
    if not sources:
        raise FairlineError("A comparison needs at least one run.")
    require_split(split)
    runs = [Run.read(source, *STUDENTS) for source in sources]
    families: dict[Path, list[Run]] = {}
    for run in runs:
        families.setdefault(run.base().folder.resolve(), []).append(run)
    bases = [Run.read(folder, "train") for folder in families]
    for base in bases[1:]:
        for key in ("name", "options"):
            if base.config["data"][key] != bases[0].config["data"][key]:
                raise FairlineError(f"{base.folder} and {bases[0].folder} were trained on different data.")
    config = {
        "sources": [run.parent_entry() for run in runs],
        "data": bases[0].config["data"],
        "baseline": baseline,
        "split": split,
        "resamples": resamples,
        "seed": seed,
        "lineage": {str(run.folder.resolve()): run.config for source in runs for run in source.lineage()},
    }
    with Run.write(out, "compare", config, where) as run:
        if not run.finished:
            tables, layers, counts = [], [], []
            count = sum(len(source.networks()) for source in runs) + len(bases)
            done = 0
            for position, (base, family) in enumerate(zip(bases, families.values(), strict=True)):
                kept = [run.checkpoint / f"{position}.{part}.parquet" for part in ("predictions", "layers", "counts")]
                networks = _labelled(base, family)
                if not all(path.exists() for path in kept):
                    _, parts = data_of(base, root).load()
                    data = parts[split]
                    found, masks = [], []
                    for (label, info), folder in networks:
                        model, _ = load_network(folder)
                        right = predict(model, data, device=where).argmax(1).cpu() == data.labels.cpu()
                        what = {"base": str(base.folder), "method": label, "relus": info.relus, "total": info.total}
                        found.append(
                            pd.DataFrame(
                                {
                                    **what,
                                    "sample": range(len(data)),
                                    "group": np.asarray(data.group_names)[data.groups.cpu().numpy()],
                                    "correct": right.numpy(),
                                }
                            )
                        )
                        masks += [
                            {
                                **what,
                                "placement": info.placement,
                                "linearizer": info.method,
                                "layer": name,
                                "kept": layer.num_kept,
                                "units": layer.kept.numel(),
                                "position": place,
                            }
                            for place, (name, layer) in enumerate(masked_relus(model).items())
                        ]
                        done += 1
                        if progress is not None:
                            progress(Progress("comparing", done, count, label))
                    write_table(kept[0], pd.concat(found))
                    write_table(kept[1], pd.DataFrame(masks))
                    write_table(kept[2], parts["train"].counts().reset_index())
                tables.append(pd.read_parquet(kept[0]))
                layers.append(pd.read_parquet(kept[1]))
                counts.append(pd.read_parquet(kept[2]))
            predictions = pd.concat(tables)
            groups = list(dict.fromkeys(predictions["group"]))
            replicates = [_scored(table, groups) for table in tables]
            if len({replicate.total for replicate in replicates}) > 1:
                raise FairlineError("The base networks have different numbers of ReLUs and cannot be replicates.")
            methods = list(dict.fromkeys(method for method, _ in replicates[0].correct if method != BASE))
            chosen = baseline or ("erm" if "erm" in methods else methods[0])
            table = compare(replicates, groups, chosen, resamples=resamples, seed=seed).assign(baseline=chosen)
            table["train_n"] = table["group"].map(pd.concat(counts).groupby("group")["n"].mean())
            write_table(run.folder / "predictions.parquet", predictions)
            write_table(run.folder / "layers.parquet", pd.concat(layers))
            write_table(run.folder / "comparison.parquet", table)
    return run


def _labelled(base: Run, family: Sequence[Run]) -> list[tuple[tuple[str, NetworkInfo], Path]]:
    """Every network of one base network, and the name of its method."""
    folder = base.networks()["base"]
    found = [((BASE, load_info(folder)), folder)]
    taken: dict[tuple[str, int], Path] = {}
    for run in family:
        for path in run.networks().values():
            info = load_info(path)
            label = method_label(run, info)
            other = taken.get((label, info.relus))
            if other is not None:
                raise FairlineError(
                    f"{run.folder} and {other} both hold '{label}' with {info.relus:,} ReLUs; compare one of them."
                )
            taken[label, info.relus] = run.folder
            found.append(((label, info), path))
    return found


def _scored(table: pd.DataFrame, group_names: Sequence[str]) -> Scored:
    parts = list(table.groupby(["method", "relus"], sort=False))
    index = {name: position for position, name in enumerate(group_names)}
    return Scored(
        parts[0][1]["group"].map(index).to_numpy(np.int64),
        {(str(method), int(relus)): part["correct"].to_numpy(bool) for (method, relus), part in parts},
        int(table["total"].iloc[0]),
    )
