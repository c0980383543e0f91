"""The jobs of ``fairline finetune``, ``last-layer`` and ``ablate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fairline import linearize as linearizers
from fairline import objectives
from fairline._io import resolve_device
from fairline.errors import FairlineError
from fairline.jobs._common import STUDENTS, data_of
from fairline.jobs.compare import compare_job
from fairline.runs import (
    Run,
    load_network,
    save_network,
)
from fairline.training import Progress, ProgressCallback, finetune, named_stage


def finetune_job(
    source: str | Path,
    out: str | Path,
    objective: str = "erm",
    objective_options: Mapping[str, Any] | None = None,
    *,
    distill: bool = True,
    preset: str | None = None,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Finetune every network of a linearize run into ``out``; ``settings`` go to :func:`fairline.finetune`.

    ``preset`` names one of ``fairline.linearize.FINETUNE_PRESETS``; settings and options that are given win over it.
    """
    where = resolve_device(device)
    parent = Run.read(source, "linearize")
    if preset is not None:
        if preset not in linearizers.FINETUNE_PRESETS:
            raise FairlineError(
                f"There is no preset '{preset}'; choose one of {', '.join(linearizers.FINETUNE_PRESETS)}."
            )
        chosen = linearizers.FINETUNE_PRESETS[preset]
        settings = {**chosen["settings"], **settings}
        objective_options = {**chosen["objective"], **(objective_options or {})}
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
            _, parts = data_of(parent, root).load()
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
                    progress=named_stage(progress, stage),
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


def last_layer_job(
    source: str | Path,
    out: str | Path,
    *,
    balance: str = "group",
    repeats: int = 10,
    root: str | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Run:
    """Retrain the last layer of every network of a linearize or finetune run on balanced validation data, into ``out``.

    See :func:`fairline.retrain_last_layer`.
    """
    parent = Run.read(source, *STUDENTS)
    config = {
        "parent": parent.parent_entry(),
        "data": parent.config["data"],
        "balance": balance,
        "repeats": repeats,
        "seed": seed,
    }
    with Run.write(out, "last-layer", config, torch.device("cpu")) as run:
        if not run.finished:
            _, parts = data_of(parent, root).load()
            rows = []
            networks = parent.networks()
            for position, (name, folder) in enumerate(networks.items(), start=1):
                network, info = load_network(folder)
                said = objectives.retrain_last_layer(network, parts["val"], balance=balance, repeats=repeats, seed=seed)
                for strength, worst in said["worst_group_accuracy"].items():
                    rows.append(
                        {
                            "network": name,
                            "strength": strength,
                            "worst_group_accuracy": worst,
                            "chosen": strength == said["strength"],
                            "per_cell": said["per_cell"],
                        }
                    )
                objective = f"{info.objective} + last layer" if info.objective else "last layer"
                save_network(
                    run.network_folder(name), network, replace(info, stage="finetuned", objective=objective, seed=seed)
                )
                if progress is not None:
                    progress(Progress("retraining last layers", position, len(networks), name))
            run.write_metrics(rows)
    return run


def ablate_job(
    source: str | Path,
    out: str | Path,
    vary: str,
    values: Sequence[Any],
    objective: str = "lagrangian",
    objective_options: Mapping[str, Any] | None = None,
    *,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Finetune a linearize run plainly and once for each value of an objective's option, and compare (Figure 15).

    Args:
        source: A linearize run.
        out: Folder of the finetune runs and of the comparison, ``compare``.
        vary: The option, such as ``"mu"``.
        values: What it takes.
        objective: The objective.
        objective_options: Its other options.
        root: Where the data are now, if they have moved.
        seed: Of every random choice.
        device: The accelerator if there is one, by default.
        progress: Called after every batch.
        settings: Of the finetune.

    Returns:
        The compare run.

    Raises:
        FairlineError: There is no value, or the objective does not know the option.
    """
    if not values:
        raise FairlineError(f"No value of {vary} was given.")
    variants: list[tuple[str, str, dict[str, Any]]] = [("erm", "erm", {})]
    for value in values:
        options = {**(objective_options or {}), vary: value}
        objectives.build(objective, **options)
        variants.append((f"{vary}-{value:g}" if isinstance(value, float) else f"{vary}-{value}", objective, options))
    runs = []
    for name, chosen, options in variants:
        runs.append(
            finetune_job(
                source,
                Path(out) / name,
                chosen,
                options,
                root=root,
                seed=seed,
                device=device,
                progress=progress if progress is None else _prefixed(progress, name),
                **settings,
            ).folder
        )
    return compare_job(
        runs, Path(out) / "compare", baseline="erm", root=root, seed=seed, device=device, progress=progress
    )


def _prefixed(progress: ProgressCallback, name: str) -> ProgressCallback:
    return lambda update: progress(replace(update, stage=f"{name}: {update.stage}"))
