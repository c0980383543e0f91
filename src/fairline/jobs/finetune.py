"""The jobs of ``fairline finetune``, ``last-layer`` and ``ablate`` (paper, Section 6 and Figure 15)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairline import linearize as linearizers
from fairline import objectives
from fairline._io import resolve_device
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.jobs._common import STUDENTS, Rows, built_on, do_once, load_base, load_parts, remake
from fairline.jobs._objective import known_by, tried_on
from fairline.jobs._precision import settle
from fairline.jobs.compare import compare_job
from fairline.runs import NetworkInfo, Run
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
    agreed: Path | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Finetune every network of a linearize run into ``out``; ``settings`` go to :func:`fairline.finetune`.

    Args:
        source: A linearize run.
        out: The run folder.
        objective: A key of ``fairline.objectives.REGISTRY``, or ``file.py:Class`` of the user's own; that is tried on
            two images first, and what its code says is part of what the run is known by.
        objective_options: Its options.
        distill: Whether the base network teaches.
        preset: One of ``fairline.linearize.FINETUNE_PRESETS``; settings and options that are given win over it.
        root: Where the data are now, if they have moved.
        seed: Of every random choice.
        device: The accelerator if there is one, by default.
        agreed: As for :func:`~fairline.jobs.train.train_job`.
        progress: Called after every batch.
        settings: Of the finetune.

    Returns:
        The run.
    """
    where = resolve_device(device)
    parent = Run.read(source, "linearize")
    chosen = _preset(preset)
    settings = {**chosen.get("settings", {}), **settings}
    options = {**chosen.get("objective", {}), **(objective_options or {})}
    objectives.build(objective, **options)
    known = known_by(objective, options)
    config = {**built_on(parent), **known, "distill": distill, "settings": settings, "seed": seed}
    data = tried_on(parent, root, out, objective, options)

    def work(run: Run) -> None:
        base, parts = load_base(parent)[0], data()
        arithmetic = settle(run, settings.get("precision"), base, parts["train"], where, agreed)
        build = partial(objectives.build, objective, **options)
        taught: dict[str, Any] = {"seed": seed, "device": where, **settings, "precision": arithmetic}
        _finetune_each(parent, run, parts, base if distill else None, build, progress, taught)

    return do_once(out, "finetune", config, where, work)


def _finetune_each(
    parent: Run,
    run: Run,
    parts: Mapping[str, GroupedData],
    teacher: nn.Module | None,
    build: Callable[[], objectives.Objective],
    progress: ProgressCallback | None,
    settings: Mapping[str, Any],
) -> None:
    """Finetune every network of a parent, each under an objective of its own."""
    count = len(parent.networks())

    def change(position: int, name: str, network: nn.Module, info: NetworkInfo) -> tuple[NetworkInfo, Rows]:
        history: list[dict[str, float]] = []
        finetune(
            network,
            teacher,
            parts["train"],
            parts["val"],
            objective=build(),
            progress=named_stage(progress, f"finetuning {position}/{count} ({info.percent:.3g} % of ReLUs)"),
            checkpoint=run.checkpoint / f"{name}.safetensors",
            history=history,
            **settings,
        )
        return replace(info, stage="finetuned", objective=run.config["objective"], seed=settings["seed"]), history

    remake(parent, run, change)


def _preset(name: str | None) -> Mapping[str, Mapping[str, Any]]:
    """Published settings of a finetune and options of its objective."""
    if name is None:
        return {}
    if name not in linearizers.FINETUNE_PRESETS:
        raise FairlineError(f"There is no preset '{name}'; choose one of {', '.join(linearizers.FINETUNE_PRESETS)}.")
    return linearizers.FINETUNE_PRESETS[name]


def last_layer_job(
    source: str | Path,
    out: str | Path,
    *,
    balance: str = "group",
    part: str = "val",
    repeats: int = 10,
    root: str | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Run:
    """Retrain the last layer of every network of a linearize or finetune run on balanced images, into ``out``.

    See :func:`fairline.retrain_last_layer`.

    Args:
        source: A linearize or finetune run.
        out: The run folder.
        balance: As many images of each: ``"group"``, ``"class"`` or ``"group_and_class"``.
        part: Of which part: ``"val"``, or ``"train"``, which the network has seen.
        repeats: Balanced subsets to average over.
        root: Where the data are now, if they have moved.
        seed: Of the subsets.
        progress: Told of every network.

    Returns:
        The run.

    Raises:
        FairlineError: There is no such part, or the images cannot be balanced.
    """
    parent = Run.read(source, *STUDENTS)
    if part not in ("val", "train"):
        raise FairlineError(f"Last layers are retrained on val or train, not '{part}'.")
    where = {} if part == "val" else {"part": part}
    config = {**built_on(parent), "balance": balance, "repeats": repeats, "seed": seed, **where}

    def work(run: Run) -> None:
        images = load_parts(parent, root)[part]
        count = len(parent.networks())

        def change(position: int, name: str, network: nn.Module, info: NetworkInfo) -> tuple[NetworkInfo, Rows]:
            said = objectives.retrain_last_layer(network, images, balance=balance, repeats=repeats, seed=seed)
            tried = [
                {
                    "strength": strength,
                    "worst_group_accuracy": worst,
                    "chosen": strength == said["strength"],
                    "per_cell": said["per_cell"],
                }
                for strength, worst in said["worst_group_accuracy"].items()
            ]
            if progress is not None:
                progress(Progress("retraining last layers", position, count, name))
            objective = f"{info.objective} + last layer" if info.objective else "last layer"
            return replace(info, stage="finetuned", objective=objective, seed=seed), tried

        remake(parent, run, change)

    return do_once(out, "last-layer", config, torch.device("cpu"), work)


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
    variants: dict[str, tuple[str, dict[str, Any]]] = {"erm": ("erm", {})}
    for value in values:
        options = {**(objective_options or {}), vary: value}
        objectives.build(objective, **options)
        variants[f"{vary}-{value:g}" if isinstance(value, float) else f"{vary}-{value}"] = objective, options
    common: dict[str, Any] = {"root": root, "seed": seed, "device": device}
    runs = []
    for name, (chosen, options) in variants.items():
        told = progress if progress is None else _prefixed(progress, name)
        runs.append(finetune_job(source, Path(out) / name, chosen, options, progress=told, **common, **settings))
    folders = [run.folder for run in runs]
    return compare_job(folders, Path(out) / "compare", baseline="erm", progress=progress, **common)


def _prefixed(progress: ProgressCallback, name: str) -> ProgressCallback:
    return lambda update: progress(replace(update, stage=f"{name}: {update.stage}"))
