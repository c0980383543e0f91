"""The job of ``fairline compare`` (paper, Section 6)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pyarrow.parquet import read_schema
from torch import nn

from fairline._io import resolve_device, write_table
from fairline.audit.above_null import Shiftable, above_null
from fairline.audit.comparison import BASE, Scored, compare
from fairline.audit.null_front import chosen_tau, right_between, shifted
from fairline.data import Groups
from fairline.data.grouped import WORST, GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.jobs._common import (
    STUDENTS,
    do_once,
    in_groups,
    judged_in,
    lineage_of,
    load_parts,
    open_runs,
    require_bootstrap,
)
from fairline.jobs.choose import choices, tried_of
from fairline.jobs.constraints import constraints
from fairline.jobs.method_names import MethodName, method_names
from fairline.masking import masked_relus
from fairline.runs import NetworkInfo, Run, load_info, load_network
from fairline.training import Progress, ProgressCallback

#: Between what the base networks took.
_AND = " · "


def compare_job(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    baseline: str | None = None,
    split: str = "test",
    resamples: int = 2000,
    groups: Groups | None = None,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Compare runs at equal budgets into ``out``; runs from several base networks (seeds) are replicates.

    A budget is what was asked for; of one that cannot be met fewer are ``kept``. An interrupted comparison goes on.

    Args:
        sources: Folders of linearize, finetune, last-layer, adjust or choose runs.
        out: The run folder.
        baseline: Method to compare with, as the table names it; plain distillation by default, else the first.
        split: Part to measure on.
        resamples: Bootstrap resamples, where there is one base network.
        groups: Other groups to compare in than the data's (:meth:`GroupedData.regroup`) or those the runs are made for.
        root: Where the data are now, if they have moved.
        seed: Of the bootstrap.
        device: The accelerator if there is one, by default.
        progress: Told how far it is.

    Returns:
        The run: ``comparison.parquet``, and the tables of predictions, layers, null front and constraints.

    Raises:
        FairlineError: The runs are of different data, or not the same for every base network.
    """
    where = resolve_device(device)
    require_bootstrap(split, resamples)
    runs = open_runs("A comparison", sources, *STUDENTS)
    groups = judged_in(runs, groups)
    families = _families(runs)
    config = {
        "sources": [run.parent_entry() for run in runs],
        "data": families[0].base.config["data"],
        "baseline": baseline,
        "split": split,
        "resamples": resamples,
        "seed": seed,
        **in_groups(groups),
        "lineage": lineage_of(runs),
    }
    if groups is not None:
        # Before the folder is taken: the groups may not fit the data.
        load_parts(families[0].base, root, groups)

    def work(run: Run) -> None:
        count = sum(len(source.networks()) for source in runs) + len(families)
        look = partial(_seen, split=split, root=root, groups=groups, device=where, told=_counter(progress, count))
        _write(run, [_kept(run, *each, look) for each in enumerate(families)], families, baseline, resamples, seed)

    return do_once(out, "compare", config, where, work)


def _write(
    run: Run,
    tables: Sequence[Sequence[pd.DataFrame]],
    families: Sequence[_Family],
    baseline: str | None,
    resamples: int,
    seed: int,
) -> None:
    """The run's tables, of what was seen of each family and what was chosen for it."""
    predictions, layers, counts, shifts = zip(*tables, strict=True)
    table = _compared(predictions, baseline, resamples, seed)
    free = _against_null(predictions, shifts, table["baseline"].iloc[0], resamples, seed)
    table = pd.concat([table, free], ignore_index=True).merge(_chosen(families), "left", ["method", "relus"])
    table["train_n"] = table["group"].map(pd.concat(counts).groupby("group")["n"].mean())
    write_table(run.folder / "predictions.parquet", pd.concat(predictions))
    write_table(run.folder / "null_front.parquet", pd.concat(shifts))
    write_table(run.folder / "layers.parquet", pd.concat(layers))
    write_table(run.folder / "constraints.parquet", _constrained(families))
    write_table(run.folder / "comparison.parquet", table)


def told_by_seed(run: Run) -> bool:
    """Whether a comparison kept enough for :func:`by_seed`; those of earlier versions did not."""
    return _told_by_seed(run, run.table("predictions.parquet"), run.table("comparison.parquet"))


def _told_by_seed(run: Run, predictions: pd.DataFrame, whole: pd.DataFrame) -> bool:
    told_all = {"label", "right_from", "kept"} <= set(predictions) and "tried" in whole
    return told_all and (run.folder / "null_front.parquet").exists()


def by_seed(run: Run) -> pd.DataFrame:
    """What a comparison is the mean of: its numbers for each base network alone.

    Args:
        run: A finished compare run.

    Returns:
        Rows as of ``comparison.parquet`` with ``seed`` in place of limits and ``replicates``, without ``pareto``, which
        is of means.

    Raises:
        FairlineError: The run is of an earlier version, which kept too little.
    """
    predictions, whole = run.table("predictions.parquet"), run.table("comparison.parquet")
    if not _told_by_seed(run, predictions, whole):
        raise FairlineError(f"{run.folder} is of an earlier version; remove it to compare again.")
    shifts, baseline = run.table("null_front.parquet"), str(whole["baseline"].iloc[0])
    bases = list(dict.fromkeys(predictions["base"]))
    # What is of several strengths at once, a front of them, took none.
    told = whole.drop_duplicates(["method", "relus"])[["method", "relus", "tried", "strength"]].fillna({"strength": ""})
    tables = []
    for place, base in enumerate(bases):
        own = [predictions[predictions["base"] == base]]
        # Limits are not asked for, so few draws do.
        found = pd.concat(
            [
                _compared(own, baseline, 2, 0),
                _against_null(own, [shifts[shifts["base"] == base]], baseline, 2, 0),
            ],
            ignore_index=True,
        )
        of_seed = told.assign(strength=[_of_one(each, place, len(bases)) for each in told["strength"]])
        kept = own[0].drop_duplicates(["method", "relus"])[["method", "relus", "kept"]]
        found = found[found["measure"] != "pareto"].merge(kept, "left", ["method", "relus"])
        found = found.merge(of_seed, "left", ["method", "relus"])
        seed = int(run.config["lineage"][base]["seed"])
        tables.append(found.drop(columns=["low", "high", "replicates"]).assign(seed=seed))
    return pd.concat(tables, ignore_index=True)


def _of_one(strengths: str, place: int, count: int) -> str:
    """What one base network took, where :func:`_chosen` told of all."""
    parts = strengths.split(_AND)
    return parts[place] if len(parts) == count else strengths


@dataclass(frozen=True)
class _Family:
    """A base network and the runs that were made of it.

    Attributes:
        base: The training run.
        runs: What is compared of it.
        names: What networks of all families are called, by folder.
    """

    base: Run
    runs: list[Run]
    names: dict[Path, MethodName]


def _families(runs: Sequence[Run]) -> list[_Family]:
    """Runs by their base network; all of the same data."""
    made_of: dict[Path, list[Run]] = {}
    for run in runs:
        made_of.setdefault(run.base().folder.resolve(), []).append(run)
    names = method_names(list(made_of.values()))
    families = [_Family(Run(base), own, names) for base, own in made_of.items()]
    first = families[0].base
    for family in families[1:]:
        for key in ("name", "options"):
            if family.base.config["data"][key] != first.config["data"][key]:
                raise FairlineError(f"{family.base.folder} and {first.folder} were trained on different data.")
    return families


def _counter(progress: ProgressCallback | None, total: int) -> Callable[[str], None]:
    """Tells that one network more is compared."""
    done = itertools.count(1)

    def told(label: str) -> None:
        if progress is not None:
            progress(Progress("comparing", next(done), total, label))

    return told


def _kept(
    run: Run, position: int, family: _Family, look: Callable[[_Family], Sequence[pd.DataFrame]]
) -> list[pd.DataFrame]:
    """What was seen of a family, now or before an interruption."""
    files = [run.checkpoint / f"{position}.{part}.parquet" for part in ("predictions", "layers", "counts", "shifts")]
    # What an earlier version kept may lack the strengths, or what is kept of a budget.
    if not all(path.exists() for path in files) or not {"right_from", "kept"} <= {*read_schema(files[0]).names}:
        for file, table in zip(files, look(family), strict=True):
            write_table(file, table)
    return [pd.read_parquet(path) for path in files]


def _seen(
    family: _Family,
    *,
    split: str,
    root: str | None,
    groups: Groups | None,
    device: torch.device,
    told: Callable[[str], None],
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Every network of a family on every image: a row an image, a layer, a training group and a shift."""
    parts = load_parts(family.base, root, groups)
    shares = torch.bincount(parts["train"].labels.cpu(), minlength=parts["train"].num_classes) / len(parts["train"])
    if not bool(shares.all()):
        empty = parts["train"].class_names[int(shares.argmin())]
        raise FairlineError(
            f"{family.base.folder}: class “{empty}” has no training image, so no bias can be shifted by its share."
        )
    data = parts[split]
    classes = np.asarray(data.class_names)[data.labels.cpu().numpy()]
    images, layers, shifts = [], [], []
    for (label, info, placement), folder in _labelled(family):
        model, _ = load_network(folder)
        what = {"base": str(family.base.folder), "method": label, "relus": info.budget, "total": info.total}
        what["kept"] = info.relus
        # τ is chosen on the validation part, the one pass beside that over the part itself.
        for name in dict.fromkeys([split, "val"]):
            logits, part = predict(model, parts[name], device=device).cpu(), parts[name]
            between = right_between(logits, part.labels, shares)
            shifts.append(shifted(between, _groups(part)).assign(**what, part=name))
            if name == split:
                own = {"sample": range(len(data)), "label": classes, "group": _groups(data)}
                own |= {"correct": (logits.argmax(1) == data.labels.cpu()).numpy()}
                own |= dict(zip(("right_from", "right_to"), between, strict=True))
                images.append(pd.DataFrame({**what, **own}))
        layers += [{**what, **row} for row in _kept_by_layer(model, info, placement)]
        told(label)
    return pd.concat(images), pd.DataFrame(layers), parts["train"].counts().reset_index(), pd.concat(shifts)


def _groups(part: GroupedData) -> NDArray[np.str_]:
    """Name of each image's group."""
    return np.asarray(part.group_names)[part.groups.cpu().numpy()]


def _with_choices(family: _Family) -> Iterator[tuple[str, NetworkInfo, Path, tuple[int, str]]]:
    """Every network of one base network: its method, what stands beside it, its folder, settings tried and taken."""
    of_run = {run.folder.resolve(): choices(run) for run in family.runs}
    for (label, info, _), folder in _labelled(family):
        yield label, info, folder, of_run.get(folder.parents[1].resolve(), {}).get(folder.name, (1, ""))


def _chosen(families: Sequence[_Family]) -> pd.DataFrame:
    """ReLUs ``kept`` for each method and budget, settings ``tried``, and which each base network takes."""
    rows = [
        {"method": label, "relus": info.budget, "kept": info.relus, "tried": tried, "strength": strength}
        for family in families
        for label, info, _, (tried, strength) in _with_choices(family)
    ]
    found = pd.DataFrame(rows).groupby(["method", "relus"], as_index=False, sort=False)
    return found.agg({"kept": "mean", "tried": "max", "strength": lambda own: _AND.join(filter(None, own))})


def _constrained(families: Sequence[_Family]) -> pd.DataFrame:
    """Violations and multipliers of every network under a constraint, those that were not chosen among them."""
    tables = [pd.DataFrame(columns=["base", "method", "relus", "strength", "taken", "group", "measure", "value"])]
    for family in families:
        of_run = {
            run.folder.resolve(): [(strength, constraints(each)) for strength, each in tried_of(run)]
            for run in family.runs
        }
        for label, info, folder, (_, taken) in _with_choices(family):
            for strength, found in of_run.get(folder.parents[1].resolve(), ()):
                own = found[found["network"] == folder.name].drop(columns="network")
                about = {"method": label, "relus": info.budget, "strength": strength, "taken": strength == taken}
                if len(own):
                    tables.append(own.assign(base=str(family.base.folder), **about))
    return pd.concat(tables[1:] or tables, ignore_index=True)[list(tables[0])]


def _kept_by_layer(model: nn.Module, info: NetworkInfo, placement: str) -> list[dict[str, Any]]:
    """A row for each layer of ReLUs, input to output."""
    return [
        {
            "placement": placement,
            "linearizer": info.method,
            "layer": name,
            "kept": layer.num_kept,
            "units": layer.kept.numel(),
            "position": place,
        }
        for place, (name, layer) in enumerate(masked_relus(model).items())
    ]


def _compared(tables: Sequence[pd.DataFrame], baseline: str | None, resamples: int, seed: int) -> pd.DataFrame:
    """Rows of ``comparison.parquet`` from the predictions of each family."""
    groups = list(dict.fromkeys(pd.concat(tables)["group"]))
    for table in tables:
        lacking = [group for group in groups if group not in set(table["group"])]
        if lacking:
            raise FairlineError(
                f"Group '{lacking[0]}' has no image in the part of {table['base'].iloc[0]}; take coarser groups."
            )
    if WORST in groups:
        raise FairlineError(f"A comparison speaks of the '{WORST}' of each method; a group cannot be called so.")
    classes = list(dict.fromkeys(pd.concat(tables)["label"]))
    replicates = [_scored(table, groups, classes) for table in tables]
    if len({replicate.total for replicate in replicates}) > 1:
        raise FairlineError("The base networks have different numbers of ReLUs and cannot be replicates.")
    methods = list(dict.fromkeys(method for method, _ in replicates[0].correct if method != BASE))
    chosen = baseline or ("erm" if "erm" in methods else methods[0])
    found = compare(replicates, groups, chosen, class_names=classes, resamples=resamples, seed=seed)
    return found.assign(baseline=chosen)


def _against_null(
    tables: Sequence[pd.DataFrame], shifts: Sequence[pd.DataFrame], baseline: str, resamples: int, seed: int
) -> pd.DataFrame:
    """Rows of ``comparison.parquet`` that speak of shifted biases, from each family's predictions and shifts."""
    groups = list(dict.fromkeys(pd.concat(tables)["group"]))
    replicates = [_shiftable(*each, groups) for each in zip(tables, shifts, strict=True)]
    found = above_null(replicates, groups, baseline, resamples=resamples, seed=seed)
    return found.assign(baseline=baseline)


def _shiftable(table: pd.DataFrame, shifts: pd.DataFrame, group_names: Sequence[str]) -> Shiftable:
    parts = list(table.groupby(["method", "relus"], sort=False))
    of_val = shifts[shifts["part"] == "val"]
    # Other groups than those of the split may have no validation image.
    whole = set(group_names) <= set(of_val["group"])
    chosen = of_val.groupby(["method", "relus"], sort=False) if whole else ()
    return Shiftable(
        parts[0][1]["group"].map({name: position for position, name in enumerate(group_names)}).to_numpy(np.int64),
        {(str(m), int(r)): (own["right_from"].to_numpy(), own["right_to"].to_numpy()) for (m, r), own in parts},
        {(str(m), int(r)): chosen_tau(own) for (m, r), own in chosen},
        int(table["total"].iloc[0]),
    )


def _labelled(family: _Family) -> list[tuple[tuple[str, NetworkInfo, str], Path]]:
    """Every network of one base network: the name of its method, what stands beside it, and how masks were placed."""
    folder = family.base.base_network()
    found = [((BASE, load_info(folder), ""), folder)]
    taken: dict[tuple[str, int], Path] = {}
    for run in family.runs:
        for path in run.networks().values():
            info, name = load_info(path), family.names[path.resolve()]
            other = taken.setdefault((name.label, info.budget), path)
            if other is not path:
                raise FairlineError(
                    f"{run.folder} and {other.parents[1]} both hold '{name.label}' with {info.budget:,} ReLUs; "
                    "compare one of them."
                )
            found.append(((name.label, info, name.placement), path))
    return found


def _scored(table: pd.DataFrame, group_names: Sequence[str], class_names: Sequence[str]) -> Scored:
    parts = list(table.groupby(["method", "relus"], sort=False))
    first = parts[0][1]
    return Scored(
        first["group"].map({name: position for position, name in enumerate(group_names)}).to_numpy(np.int64),
        {(str(method), int(relus)): part["correct"].to_numpy(bool) for (method, relus), part in parts},
        int(table["total"].iloc[0]),
        first["label"].map({name: position for position, name in enumerate(class_names)}).to_numpy(np.int64),
    )
