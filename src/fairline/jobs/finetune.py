"""The jobs of ``fairline finetune``, ``last-layer`` and ``ablate`` (paper, Section 6 and Figure 15)."""

from __future__ import annotations

import math
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
from fairline._registry import is_number
from fairline.data import Groups
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.jobs._common import (
    LAST_LAYERS,
    STUDENTS,
    Rows,
    built_on,
    do_once,
    in_groups,
    load_base,
    parts_once,
    remake,
    warn_of_small,
    with_step,
)
from fairline.jobs._objective import known_by, tried_on, uses_groups
from fairline.jobs._precision import settle
from fairline.jobs.compare import compare_job
from fairline.objectives.choice import Strength, as_given
from fairline.objectives.last_layer import penalties_of, require_halves
from fairline.runs import NetworkInfo, Run
from fairline.training import Progress, ProgressCallback, finetune, named_stage

#: Balanced subsets that a last layer is averaged over unless another number is asked for.
REPEATS = 10


def finetune_job(
    source: str | Path,
    out: str | Path,
    objective: str = "erm",
    objective_options: Mapping[str, Any] | None = None,
    *,
    distill: bool = True,
    preset: str | None = None,
    groups: Groups | None = None,
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
        groups: Other groups to repair for than those of the run's data; see :meth:`GroupedData.regroup`. What is built
            on the run is chosen and judged in them.
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
    by_group = uses_groups(objectives.build(objective, **options)) or settings.get("select") == "worst_group_accuracy"
    known = known_by(objective, options)
    asked = {"distill": distill, "settings": settings, "seed": seed, **in_groups(groups)}
    config = {**built_on(parent), **known, **asked}
    data = tried_on(parent, root, out, objective, options, groups)

    def work(run: Run) -> None:
        base, parts = load_base(parent)[0], data()
        if by_group:
            warn_of_small(parts["val"], "val")
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
    method: str = "dfr",
    balance: str = "group",
    part: str = "val",
    repeats: int = REPEATS,
    strength: Strength = None,
    within: float | None = None,
    groups: Groups | None = None,
    root: str | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Run:
    """Retrain the last layer of every network of a run, into ``out``.

    Args:
        source: A linearize, finetune, last-layer, adjust or choose run.
        out: The run folder.
        method: ``"dfr"`` (:func:`fairline.retrain_last_layer`), ``"afr"`` (:func:`fairline.reweight_last_layer`) or
            ``"self"`` (:func:`fairline.finetune_last_layer`, against the base network).
        balance: Under ``"dfr"``, as many images of each: ``"group"``, ``"class"`` or ``"group_and_class"``.
        part: Of which part: ``"val"``, or ``"train"``, which the network has seen.
        repeats: Under ``"dfr"``, balanced subsets to average over.
        strength: C of ``"dfr"``, γ of ``"afr"``, points of ``"self"``; of several (default) one is chosen on halves.
        within: Overall accuracy that a strength may cost to be chosen, in percentage points; any by default.
        groups: Other groups to balance and choose in than those that the run was made for; as for :func:`finetune_job`.
        root: Where the data are now, if they have moved.
        seed: Of halves and subsets.
        progress: Told of every network.

    Returns:
        The run; ``metrics.parquet`` has a row for each strength that was tried.

    Raises:
        FairlineError: There is no such method or part, the images cannot be balanced or halved, or a setting is out of
            range.
    """
    parent = Run.read(source, *STUDENTS)
    strength = as_given(strength, "A strength")
    said = _known_as(method, balance, part, repeats, strength, within)
    config = {**built_on(parent), **said, **in_groups(groups), "seed": seed}
    # Of a strength that is given dfr alone halves the groups.
    data = _part_once(parent, root, groups, part, by_group=method == "dfr" or not is_number(strength))

    def work(run: Run) -> None:
        images = data()
        reference = load_base(parent)[0] if method == "self" else None
        own: dict[str, Any] = {"dfr": {"balance": balance, "repeats": repeats}, "self": {"reference": reference}}

        def change(position: int, name: str, network: nn.Module, info: NetworkInfo) -> tuple[NetworkInfo, Rows]:
            done = _retrained(network, images, method, strength, seed, {**own.get(method, {}), "within": within})
            if progress is not None:
                progress(Progress("retraining last layers", position, len(parent.networks()), name))
            return replace(with_step(info, LAST_LAYERS[method]), seed=seed), _tried(done)

        remake(parent, run, change)

    return do_once(out, "last-layer", config, torch.device("cpu"), work)


def _known_as(
    method: str, balance: str, part: str, repeats: int, strength: Strength, within: float | None
) -> dict[str, Any]:
    """What a last-layer run is known by beside its parent and seed."""
    if method not in LAST_LAYERS:
        raise FairlineError(f"Last layers are retrained by {', '.join(LAST_LAYERS)}, not '{method}'.")
    if method != "dfr" and balance != "group":
        raise FairlineError(f"Images are balanced by {balance} under dfr only; {method} weighs classes alike.")
    if method != "dfr" and repeats != REPEATS:
        raise FairlineError(f"Fits are averaged over {repeats} subsets under dfr only; {method} fits to all images.")
    if part not in ("val", "train"):
        raise FairlineError(f"Last layers are retrained on val or train, not '{part}'.")
    if is_number(strength) and within is not None:
        raise FairlineError("A strength is given, or chosen within some points of overall accuracy, not both.")
    # What is not said is no part of the identity, so that older runs keep theirs.
    said: dict[str, Any] = {"method": method} if method != "dfr" else {"balance": balance, "repeats": repeats}
    said |= {} if part == "val" else {"part": part}
    said |= {} if strength is None else {"strength": strength}
    said |= {} if within is None else {"within": within}
    return said


def _part_once(
    parent: Run, root: str | None, groups: Groups | None, part: str, by_group: bool
) -> Callable[[], GroupedData]:
    """Gives the images to retrain on, with a warning; other groups that are named and not to be halved are refused."""
    data = parts_once(parent, root, groups)
    if groups is not None and by_group:
        require_halves(data()[part])

    def images() -> GroupedData:
        if by_group:
            warn_of_small(data()[part], part)
        return data()[part]

    return images


def _retrained(
    network: nn.Module,
    images: GroupedData,
    method: str,
    strength: Strength,
    seed: int,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """A network's last layer, retrained in place by a method."""
    if method == "dfr":
        return objectives.retrain_last_layer(network, images, strengths=penalties_of(strength), seed=seed, **given)
    if method == "afr":
        return objectives.reweight_last_layer(network, images, gamma=strength, seed=seed, **given)
    # A command line has one option for all strengths, a float.
    points: Any = strength
    return objectives.finetune_last_layer(network, images, points=points, seed=seed, **given)


def _tried(done: Mapping[str, Any]) -> Rows:
    """A row for each strength that was tried, or for the one given; one without a strength where none was within."""
    about = {"per_cell": done["per_cell"]} if "per_cell" in done else {}
    tried = [
        {
            "strength": each,
            "worst_group_accuracy": worst,
            "accuracy": done["accuracy"][each],
            "chosen": each == done["strength"],
            **about,
        }
        for each, worst in done["worst_group_accuracy"].items()
    ]
    if done["strength"] is None:
        tried.append({"strength": math.nan, "chosen": True, **about})
    return tried or [{"strength": float(done["strength"]), "chosen": True}]


def ablate_job(
    source: str | Path,
    out: str | Path,
    vary: str,
    values: Sequence[Any],
    objective: str = "lagrangian",
    objective_options: Mapping[str, Any] | None = None,
    *,
    groups: Groups | None = None,
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
        groups: Other groups to finetune and compare for than the data's; as for :func:`finetune_job`.
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
    common: dict[str, Any] = {"root": root, "seed": seed, "device": device, "groups": groups}
    runs = []
    for name, (chosen, options) in variants.items():
        told = progress if progress is None else _prefixed(progress, name)
        runs.append(finetune_job(source, Path(out) / name, chosen, options, progress=told, **common, **settings))
    folders = [run.folder for run in runs]
    # The first is plain distillation, whatever the masks are called.
    return compare_job(folders, Path(out) / "compare", progress=progress, **common)


def _prefixed(progress: ProgressCallback, name: str) -> ProgressCallback:
    return lambda update: progress(replace(update, stage=f"{name}: {update.stage}"))
