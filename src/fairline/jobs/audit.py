"""The job of ``fairline audit``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from fairline._io import resolve_device, write_table
from fairline.audit import REGISTRY, Subject, audit_subject, explaining
from fairline.errors import FairlineError
from fairline.jobs._common import STUDENTS, data_of, require_split
from fairline.runs import (
    Run,
    load_info,
    load_network,
)
from fairline.training import Progress, ProgressCallback


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
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Audit every network of some runs, and the base network that they come from, into ``out``.

    Each network's numbers are kept as soon as they are known, so an interrupted audit resumes at the next network.

    Args:
        sources: Folders of train, linearize or finetune runs with one base network.
        out: The run folder.
        measures: Which; see ``fairline.audit.REGISTRY``. The base network is left out where a reference is needed.
        options: Settings of measures, by name.
        explain: Also take every measure with which the paper explains the disparity.
        split: Part to measure on.
        resamples: Bootstrap resamples.
        with_base: Whether the base network has rows of its own; it is what the others are compared with anyway.
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
    if not sources:
        raise FairlineError("An audit needs at least one run.")
    require_split(split)
    runs = [Run.read(source, "train", *STUDENTS) for source in sources]
    base = runs[0].base()
    for run in runs[1:]:
        if run.base().folder.resolve() != base.folder.resolve():
            raise FairlineError(f"{run.folder} and {runs[0].folder} come from different base networks.")
    config = {
        "parent": base.parent_entry(),
        "sources": [run.parent_entry() for run in runs],
        "data": base.config["data"],
        "measures": list(measures),
        **({"options": {name: dict(own) for name, own in options.items()}} if options else {}),
        **({"explain": True} if explain else {}),
        **({} if with_base else {"with_base": False}),
        "split": split,
        "resamples": resamples,
        "seed": seed,
        "lineage": {str(run.folder.resolve()): run.config for source in runs for run in source.lineage()},
    }
    with Run.write(out, "audit", config, where) as run:
        if not run.finished:
            _, parts = data_of(base, root).load()
            network, _ = load_network(base.networks()["base"])
            reference = Subject(network, parts[split], None, where, seed, resamples, "base", progress)
            folders = {"base": base.networks()["base"]} if with_base else {}
            for source in runs:
                if source.command != "train":
                    folders |= {f"{source.folder.name}/{name}": path for name, path in source.networks().items()}
            tables, predictions = [], []
            for position, (name, folder) in enumerate(folders.items()):
                kept = [run.checkpoint / f"{position}.{part}.parquet" for part in ("audit", "predictions")]
                if not all(path.exists() for path in kept):
                    subject = reference
                    if name != "base":
                        subject = replace(
                            reference,
                            model=load_network(folder)[0],
                            reference=reference,
                            name=name,
                            samples={},
                            rows=[],
                            _kept={},
                        )
                    chosen = _measures(subject, measures, options, explain)
                    report = audit_subject(subject, list(chosen), split=split, options=chosen)
                    write_table(kept[0], report.to_frame())
                    write_table(kept[1], report.predictions.assign(model=name))
                info = load_info(folder)
                described = {
                    "stage": info.stage,
                    "method": info.method,
                    "objective": info.objective,
                    "placement": info.placement,
                    "surrogate": info.surrogate,
                    "relus": info.relus,
                    "total_relus": info.total,
                    "seed": info.seed,
                    "reached": info.reached,
                }
                tables.append(pd.read_parquet(kept[0]).assign(**described))
                predictions.append(pd.read_parquet(kept[1]))
                if progress is not None:
                    progress(Progress("auditing", position + 1, len(folders), name))
            counts = pd.concat([part.counts().assign(part=name) for name, part in parts.items()]).reset_index()
            write_table(run.folder / "counts.parquet", counts)
            write_table(run.folder / "predictions.parquet", pd.concat(predictions))
            write_table(run.folder / "audit.parquet", pd.concat(tables))
    return run


def _measures(
    subject: Subject,
    measures: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None,
    explain: bool,
) -> dict[str, dict[str, Any]]:
    """Measures to take of one network, with their options."""
    has_reference = subject.reference is not None
    chosen: dict[str, dict[str, Any]] = {
        name: {}
        for name in ("accuracy", *measures)  # the report stands on accuracy
        # An unknown name is refused by the audit.
        if has_reference or name not in REGISTRY or not REGISTRY[name].needs_reference
    }
    if explain:
        chosen |= explaining(subject)
    for name, own in (options or {}).items():
        if name in chosen or name not in REGISTRY:
            chosen[name] = {**chosen.get(name, {}), **own}
        elif not REGISTRY[name].needs_reference or has_reference:
            raise FairlineError(f"Options are given for the measure '{name}', which is not taken.")
    return chosen
