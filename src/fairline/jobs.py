"""The five jobs of the command line, each from run folder to run folder, each resumable after a kill."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairline import linearize as linearizers
from fairline import objectives
from fairline._io import atomic_path, resolve_device
from fairline.audit import audit as audit_model
from fairline.errors import FairlineError
from fairline.runs import (
    DataSpec,
    ModelSpec,
    NetworkInfo,
    Run,
    count_relus,
    digest,
    load_network,
    load_weights,
    save_network,
)
from fairline.training import Progress, ProgressCallback, finetune, train

logger = logging.getLogger(__name__)


def train_job(
    out: str | Path,
    data: DataSpec,
    model: str,
    model_options: Mapping[str, Any] | None = None,
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Train a base network into ``out``; ``settings`` go to :func:`fairline.train`.

    Args:
        out: Run folder.
        data: What to train on.
        model: Architecture; see :func:`fairline.models.build`.
        model_options: Its options.
        weights: A safetensors file to start from; with ``epochs=0`` they are taken as they are.
        seed: Of initialisation and training.
        device: The accelerator if there is one, by default.
        progress: Called after every batch.
        settings: Of the training.

    Returns:
        The finished run.

    Raises:
        FairlineError: The input is wrong; the sentence says where.
    """
    where = resolve_device(device)
    spec, parts = data.load()
    _, channels, height, width = parts["train"].images.shape
    if height != width:
        raise FairlineError(f"{spec.name}: images are {height}×{width}; square ones are needed.")
    model_spec = ModelSpec(model, parts["train"].num_classes, channels, height, dict(model_options or {}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = model_spec.build()
    if weights is not None:
        load_weights(network, Path(weights))
    elif settings.get("epochs") == 0:
        raise FairlineError("A network that is not trained (epochs 0) needs weights.")
    total = count_relus(network, model_spec)
    config: dict[str, Any] = {"data": asdict(spec), "model": asdict(model_spec), "settings": settings, "seed": seed}
    if weights is not None:
        config["weights"] = {"file": str(Path(weights).resolve()), "digest": digest([Path(weights)])}
    with Run.write(out, "train", config, where) as run:
        if not run.finished:
            rows: list[dict[str, float]] = []
            if settings.get("epochs") != 0:
                rows = train(
                    network,
                    parts["train"],
                    parts["val"],
                    seed=seed,
                    device=where,
                    progress=progress,
                    checkpoint=run.checkpoint / "train.safetensors",
                    **settings,
                )
            run.write_metrics(rows)
            save_network(
                run.network_folder("base"),
                network,
                NetworkInfo(model_spec, "base", total, total, total, seed=seed),
            )
    return run


def linearize_job(
    source: str | Path,
    out: str | Path,
    budgets: Sequence[float],
    method: str = "snl",
    *,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Linearize a base network to several budgets into ``out``; ``settings`` go to the method."""
    where = resolve_device(device)
    parent = Run.read(source, "train")
    linearizer = linearizers.build(method, seed=seed, **settings)
    teacher, info = load_network(parent.networks()["base"])
    linearizers.resolve_budgets(budgets, info.total)
    config = {
        "parent": parent.parent_entry(),
        "data": parent.config["data"],
        "budgets": list(budgets),
        "method": method,
        "settings": settings,
        "seed": seed,
    }
    with Run.write(out, "linearize", config, where) as run:
        if not run.finished:
            _, parts = _data(parent, root).load()
            rows: list[dict[str, float]] = []
            for cut in linearizer.linearize(
                teacher,
                parts["train"],
                budgets,
                device=where,
                progress=progress,
                checkpoint=run.checkpoint,
                history=rows,
            ):
                save_network(
                    run.network_folder(f"budget-{cut.budget}"),
                    cut.model,
                    NetworkInfo(
                        info.model,
                        "linearized",
                        cut.relus,
                        cut.total,
                        cut.budget,
                        method,
                        seed=seed,
                        reached=bool(cut.info.get("reached", True)),
                    ),
                )
                logger.info("budget %d: kept %d of %d ReLUs; %s", cut.budget, cut.relus, cut.total, cut.info)
            run.write_metrics(rows)
    return run


def finetune_job(
    source: str | Path,
    out: str | Path,
    objective: str = "erm",
    objective_options: Mapping[str, Any] | None = None,
    *,
    distill: bool = True,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Finetune every network of a linearize run into ``out``; ``settings`` go to :func:`fairline.finetune`."""
    where = resolve_device(device)
    parent = Run.read(source, "linearize")
    objectives.build(objective, **(objective_options or {}))
    config = {
        "parent": parent.parent_entry(),
        "data": parent.config["data"],
        "objective": objective,
        "objective_options": dict(objective_options or {}),
        "distill": distill,
        "settings": settings,
        "seed": seed,
    }
    with Run.write(out, "finetune", config, where) as run:
        if not run.finished:
            _, parts = _data(parent, root).load()
            teacher, _ = load_network(parent.base().networks()["base"])
            rows: list[dict[str, Any]] = []
            for position, (name, folder) in enumerate(parent.networks().items(), start=1):
                network, info = load_network(folder)
                stage = f"finetuning {position}/{len(parent.networks())} ({info.percent:.3g} % of ReLUs)"
                history: list[dict[str, float]] = []
                finetune(
                    network,
                    teacher if distill else None,
                    parts["train"],
                    parts["val"],
                    objective=objectives.build(objective, **(objective_options or {})),
                    seed=seed,
                    device=where,
                    progress=_named(progress, stage),
                    checkpoint=run.checkpoint / f"{name}.safetensors",
                    history=history,
                    **settings,
                )
                rows += [{"network": name, **row} for row in history]
                save_network(
                    run.network_folder(name),
                    network,
                    replace(info, stage="finetuned", objective=objective, seed=seed),
                )
            run.write_metrics(rows)
    return run


def audit_job(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    measures: Sequence[str] = ("accuracy",),
    split: str = "test",
    resamples: int = 2000,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Audit every network of some runs, and the base network that they come from, into ``out``."""
    where = resolve_device(device)
    if not sources:
        raise FairlineError("An audit needs at least one run.")
    if split not in ("train", "val", "test"):
        raise FairlineError(f"The split is train, val or test, not '{split}'.")
    runs = [Run.read(source, "train", "linearize", "finetune") for source in sources]
    base = runs[0].base()
    for run in runs[1:]:
        if run.base().folder.resolve() != base.folder.resolve():
            raise FairlineError(f"{run.folder} and {runs[0].folder} come from different base networks.")
    config = {
        "parent": base.parent_entry(),
        "sources": [run.parent_entry() for run in runs],
        "data": base.config["data"],
        "measures": list(measures),
        "split": split,
        "resamples": resamples,
        "seed": seed,
        "lineage": {str(run.folder.resolve()): run.config for source in runs for run in source.lineage()},
    }
    with Run.write(out, "audit", config, where) as run:
        if not run.finished:
            _, parts = _data(base, root).load()
            reference, _ = load_network(base.networks()["base"])
            folders = {"base": base.networks()["base"]}
            for source in runs:
                if source.command != "train":
                    folders |= {f"{source.folder.name}/{name}": path for name, path in source.networks().items()}
            tables, predictions = [], []
            for position, (name, folder) in enumerate(folders.items()):
                model, info = load_network(folder)
                report = audit_model(
                    model,
                    parts[split],
                    None if name == "base" else reference,
                    measures=measures,
                    name=name,
                    split=split,
                    seed=seed,
                    resamples=resamples,
                    device=where,
                )
                described = {
                    "stage": info.stage,
                    "method": info.method,
                    "objective": info.objective,
                    "relus": info.relus,
                    "total_relus": info.total,
                    "seed": info.seed,
                    "reached": info.reached,
                }
                tables.append(report.to_frame().assign(**described))
                predictions.append(report.predictions.assign(model=name))
                if progress is not None:
                    progress(Progress("auditing", position + 1, len(folders), name))
            counts = pd.concat([part.counts().assign(part=name) for name, part in parts.items()]).reset_index()
            for file, table in (
                ("counts.parquet", counts),
                ("predictions.parquet", pd.concat(predictions)),
                ("audit.parquet", pd.concat(tables)),
            ):
                with atomic_path(run.folder / file) as temporary:
                    table.to_parquet(temporary, index=False)
    return run


def _data(run: Run, root: str | None) -> DataSpec:
    """The run's data, from another folder if they have moved."""
    return run.data if root is None else replace(run.data, root=root)


def _named(progress: ProgressCallback | None, stage: str) -> ProgressCallback | None:
    if progress is None:
        return None
    callback = progress
    return lambda update: callback(replace(update, stage=stage))
