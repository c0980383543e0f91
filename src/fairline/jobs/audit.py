"""The job of ``fairline audit``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from fairline._io import resolve_device, write_json, write_table
from fairline.audit import REGISTRY, Subject, audit_subject, explaining
from fairline.data import Groups
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.jobs._common import (
    LINEARIZED,
    built_on,
    do_once,
    in_groups,
    judged_in,
    lineage_of,
    load_base,
    load_parts,
    open_runs,
    require_bootstrap,
)
from fairline.jobs.costs import predicted_costs
from fairline.ranks import here
from fairline.runs import NetworkInfo, Run, linearized_networks, load_info, load_network
from fairline.training import Progress, ProgressCallback

logger = logging.getLogger(__name__)


def audit_job(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    measures: Sequence[str] = ("accuracy",),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    explain: bool = False,
    split: str = "test",
    resamples: int = 2000,
    with_base: bool = True,
    costs: bool = True,
    groups: Groups | None = None,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Audit every network of some runs, and the base network that they come from, into ``out``.

    Each network's numbers are kept as soon as they are known, so an interrupted audit resumes at the next network.

    Args:
        sources: Folders of train, linearize, finetune, last-layer, adjust, choose or compile runs of one base network.
        out: The run folder.
        measures: Which; see ``fairline.audit.REGISTRY``. The base network is left out where a reference is needed.
        options: Settings of measures, by name.
        explain: Also take every measure with which the paper explains the disparity.
        split: Part to measure on.
        resamples: Bootstrap resamples.
        groups: Other groups to measure by than the data's (:meth:`GroupedData.regroup`) or those the runs are made for.
        with_base: Whether the base network has rows of its own; it is what the others are compared with anyway.
        costs: Whether to predict what private inference of each network, and of the base network, costs.
        root: Where the data are now, if they have moved.
        seed: Of the bootstrap and of every other random choice.
        device: The accelerator if there is one, by default.
        progress: Told how far it is.

    Returns:
        The run.

    Raises:
        FairlineError: The runs do not belong together, or a measure does not suit them.
    """
    where = resolve_device(device)
    require_bootstrap(split, resamples)
    runs = open_runs("An audit", sources, "train", *LINEARIZED)
    request = _Request(measures, options or {}, explain, split, resamples, seed, judged_in(runs, groups))
    base = _common_base(runs)
    # Before the folder is taken: the groups may not fit the data.
    regrouped = None if request.groups is None else _told(load_parts(base, root, request.groups), split)

    def work(run: Run) -> None:
        parts = regrouped or load_parts(base, root)
        data = parts[split].without_empty_groups()
        sizes = parts["train"].counts()["n"][list(data.group_names)].to_dict()
        reference = Subject(load_base(base)[0], data, None, where, seed, resamples, "base", progress, sizes)
        _measure(run, _networks(base, runs, with_base), reference, request)
        _write_beside(run, parts, _networks(base, runs, with_base=True) if costs else {})

    return do_once(out, "audit", _config(base, runs, request, with_base, costs), where, work)


def _config(base: Run, runs: Sequence[Run], request: _Request, with_base: bool, costs: bool) -> dict[str, Any]:
    """What determines the audit."""
    return {
        **built_on(base),
        "sources": [run.parent_entry() for run in runs],
        **request.config(),
        **({} if with_base else {"with_base": False}),
        **({} if costs else {"costs": False}),
        "lineage": lineage_of(runs),
    }


def _write_beside(run: Run, parts: Mapping[str, GroupedData], priced: Mapping[str, Path]) -> None:
    """How many images each group has, and what the networks that are to be priced cost."""
    write_table(run.folder / "counts.parquet", _counts(parts))
    write_json(run.folder / "classes.json", {"classes": list(parts[run.config["split"]].class_names)})
    if priced:
        write_table(run.folder / "costs.parquet", here().first(lambda: predicted_costs(priced)))


def _told(parts: dict[str, GroupedData], split: str) -> dict[str, GroupedData]:
    """The parts; tells of groups that have no image in the one that is measured."""
    n = parts[split].counts()["n"]
    gone = [f"'{group}'" for group in n.index[n == 0]]
    if gone:
        logger.warning("no image in the %s part, so left out: %s", split, ", ".join(gone))
    return parts


def _counts(parts: Mapping[str, GroupedData]) -> pd.DataFrame:
    """Images of each group in each part."""
    return pd.concat([part.counts().assign(part=name) for name, part in parts.items()]).reset_index()


@dataclass(frozen=True)
class _Request:
    """What is asked of an audit; see :func:`audit_job`."""

    measures: Sequence[str]
    options: Mapping[str, Mapping[str, Any]]
    explain: bool
    split: str
    resamples: int
    seed: int
    groups: Groups | None = None

    def config(self) -> dict[str, Any]:
        """Its part of the run's config."""
        return {
            "measures": list(self.measures),
            **({"options": {name: dict(own) for name, own in self.options.items()}} if self.options else {}),
            **({"explain": True} if self.explain else {}),
            "split": self.split,
            "resamples": self.resamples,
            "seed": self.seed,
            **in_groups(self.groups),
        }

    def measures_of(self, subject: Subject) -> dict[str, dict[str, Any]]:
        """Measures to take of one network, with their options."""
        has_reference = subject.reference is not None
        chosen: dict[str, dict[str, Any]] = {
            name: {}
            for name in ("accuracy", "recall", *self.measures)  # the report stands on them
            # An unknown name is refused by the audit.
            if has_reference or name not in REGISTRY or not REGISTRY[name].needs_reference
        }
        if self.explain:
            chosen |= explaining(subject)
        for name, own in self.options.items():
            if name in chosen or name not in REGISTRY:
                chosen[name] = {**chosen.get(name, {}), **own}
            elif not REGISTRY[name].needs_reference or has_reference:
                raise FairlineError(f"Options are given for the measure '{name}', which is not taken.")
        return chosen


def _measure(run: Run, folders: Mapping[str, Path], reference: Subject, request: _Request) -> None:
    """Measure every network, each at most once, and write what was found."""
    tables, predictions = [], []
    for position, (name, folder) in enumerate(folders.items()):
        kept = [run.checkpoint / f"{position}.{part}.parquet" for part in ("audit", "predictions")]
        if not here().first(partial(_all_exist, kept)):
            subject = reference if name == "base" else _student(reference, name, folder)
            chosen = request.measures_of(subject)
            report = audit_subject(subject, list(chosen), split=request.split, options=chosen)
            write_table(kept[0], report.to_frame())
            write_table(kept[1], report.predictions.assign(model=name))
            here().barrier()
        tables.append(pd.read_parquet(kept[0]).assign(**_described(load_info(folder))))
        predictions.append(pd.read_parquet(kept[1]))
        if reference.progress is not None:
            reference.progress(Progress("auditing", position + 1, len(folders), name))
    write_table(run.folder / "predictions.parquet", pd.concat(predictions))
    write_table(run.folder / "audit.parquet", pd.concat(tables))


def _all_exist(files: Sequence[Path]) -> bool:
    return all(file.exists() for file in files)


def _common_base(runs: Sequence[Run]) -> Run:
    """The training run that all come from."""
    base = runs[0].base()
    for run in runs[1:]:
        if run.base().folder.resolve() != base.folder.resolve():
            raise FairlineError(f"{run.folder} and {runs[0].folder} come from different base networks.")
    return base


def _networks(base: Run, runs: Sequence[Run], with_base: bool) -> dict[str, Path]:
    """Folders of the networks under audit, by name."""
    return ({"base": base.base_network()} if with_base else {}) | linearized_networks(runs)


def _student(reference: Subject, name: str, folder: Path) -> Subject:
    """A network on the data of the base network, compared with it."""
    model, _ = load_network(folder)
    return replace(reference, model=model, reference=reference, name=name, samples={}, rows=[], _kept={})


def _described(info: NetworkInfo) -> dict[str, Any]:
    """Columns that say what a network is."""
    return {
        "stage": info.stage,
        "method": info.method,
        "objective": info.objective,
        "placement": info.placement,
        "surrogate": info.surrogate,
        "compiled": info.compiled,
        "relus": info.relus,
        "total_relus": info.total,
        "seed": info.seed,
        "reached": info.reached,
    }
