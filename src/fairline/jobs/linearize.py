"""The job of ``fairline linearize``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from fairline import linearize as linearizers
from fairline import objectives
from fairline._io import resolve_device
from fairline._registry import build_named
from fairline.compiler.mask_cost import PredictedCost
from fairline.data import Groups
from fairline.jobs._common import built_on, do_once, in_groups, load_base, settings_told
from fairline.jobs._objective import known_by, tried_on
from fairline.jobs._precision import settle
from fairline.linearize import ForCost, Linearized
from fairline.masking import surrogate_of
from fairline.runs import NetworkInfo, Run, save_network
from fairline.training import ProgressCallback

logger = logging.getLogger(__name__)

#: Settings of methods that change what masks are placed for, how the placement is called then, and the value that goes
#: without saying.
_MARKS = {"protect": ("protect", 1.0), "empty_layers": ("layers emptied", None), "cost": ("scored for the cost", None)}
#: How the placement is called whose layers were chosen for a cost.
_FOR_COST = "for {protocol}'s {minimise}"


def linearize_job(
    source: str | Path,
    out: str | Path,
    budgets: Sequence[float],
    method: str = "snl",
    objective: str = "erm",
    objective_options: Mapping[str, Any] | None = None,
    *,
    for_cost: Mapping[str, Any] | None = None,
    groups: Groups | None = None,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    agreed: Path | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Linearize a base network to budgets into ``out``; under another ``objective`` than ``"erm"``: fair placement.

    Args:
        source: A train run.
        out: The run folder.
        budgets: ReLUs to keep; see :func:`fairline.linearize.resolve_budgets`.
        method: A key of ``fairline.linearize.REGISTRY``.
        objective: What the masks are learned under, as for :func:`~fairline.jobs.finetune.finetune_job`.
        objective_options: Its options.
        for_cost: Layers are emptied first: settings of :class:`~fairline.linearize.ForCost` and of the predicted cost.
        groups: Other groups to place them for than the data's; as for :func:`~fairline.jobs.finetune.finetune_job`.
        root: Where the data are now, if they have moved.
        seed: Of every random choice.
        device: The accelerator if there is one, by default.
        agreed: As for :func:`~fairline.jobs.train.train_job`.
        progress: Called after every batch.
        settings: Of the method.

    Returns:
        The run.
    """
    where = resolve_device(device)
    parent = Run.read(source, "train")
    fair = _fair(objective, objective_options)
    linearizer = build_linearizer(method, objective, objective_options, for_cost=for_cost, seed=seed, **settings)
    teacher, info = load_base(parent)
    linearizers.resolve_budgets(budgets, info.total)
    asked = {"budgets": list(budgets), "method": method, **fair, "settings": settings, "seed": seed}
    config = {**built_on(parent), **asked, **_more(for_cost, groups)}
    common = replace(info, stage="linearized", method=method, seed=seed, placement=placement_of(config))
    parts = tried_on(parent, root, out, objective, objective_options or {}, groups)

    def work(run: Run) -> None:
        rows: list[dict[str, float]] = []
        data, val = parts()["train"], parts()["val"]
        watched: dict[str, Any] = {"progress": progress, "checkpoint": run.checkpoint, "history": rows, "device": where}
        in_it = replace(linearizer, precision=settle(run, settings.get("precision"), teacher, data, where, agreed))
        for cut in in_it.linearize(teacher, data, budgets, val=val, **watched):
            save_network(run.network_folder(f"budget-{cut.budget}"), cut.model, _described(cut, common))
            logger.info("budget %d: kept %d of %d ReLUs; %s", cut.budget, cut.relus, cut.total, cut.info)
        run.write_metrics(rows)

    return do_once(out, "linearize", config, where, work)


def _more(for_cost: Mapping[str, Any] | None, groups: Groups | None) -> dict[str, Any]:
    """What the config says of masks that are placed for a cost, or for other groups; else nothing."""
    return {**({} if for_cost is None else {"for_cost": dict(for_cost)}), **in_groups(groups)}


def _fair(objective: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the config says of an objective of the placement; nothing for plain distillation."""
    if objective == "erm" and not options:
        return {}
    return known_by(objective, options or {})


def build_linearizer(
    method: str,
    objective: str = "erm",
    objective_options: Mapping[str, Any] | None = None,
    *,
    for_cost: Mapping[str, Any] | None = None,
    **settings: Any,
) -> linearizers.Linearizer:
    """The method that a job uses.

    Args:
        method: As for :func:`linearize_job`.
        objective: As there; only a method that places masks under an objective of its own is told of one.
        objective_options: As there.
        for_cost: As there.
        settings: Of the method.

    Returns:
        The linearizer.
    """
    given: dict[str, Any] = dict(settings)
    if fair := _fair(objective, objective_options):
        given["objective"] = objectives.build(objective, **fair["objective_options"])
    if for_cost is not None:
        given["for_cost"] = _choice(for_cost)
    if isinstance(given.get("cost"), str):
        given["cost"] = PredictedCost(given["cost"])
    return linearizers.build(method, **given)


def _choice(options: Mapping[str, Any]) -> ForCost:
    """The choice of layers that some settings describe."""
    of_cost = {each.name for each in fields(PredictedCost)}
    told = {key: value for key, value in options.items() if key in of_cost}
    cost = build_named("masks", {"for cost": PredictedCost}, "for cost", told)
    rest = {key: value for key, value in options.items() if key not in of_cost}
    return build_named("masks", {"for cost": ForCost}, "for cost", {"cost": cost, **rest})


def placement_of(config: Mapping[str, Any]) -> str:
    """Under what the masks of a linearize run are placed, in words.

    >>> placement_of({"settings": {"protect": 2.0}, "objective": "lagrangian", "objective_options": {"mu": 0.02}})
    'lagrangian mu=0.02 protect=2'
    >>> placement_of({"settings": {}, "for_cost": {"protocol": "cheetah", "may_lose": 0.05}})
    "for cheetah's seconds may_lose=0.05"

    Args:
        config: The run's.

    Returns:
        The objective, if it is not plain distillation, and all that makes the masks other ones than the method's; of
        the settings those that differ from the defaults.
    """
    marks = [settings_told(config["objective"], config["objective_options"])] if "objective" in config else []
    for key, (mark, usual) in _MARKS.items():
        if value := config["settings"].get(key):
            amount = value if isinstance(value, str) else f"{value:g}"
            marks.append(mark if value == usual else f"{mark}={amount}")
    if (options := config.get("for_cost")) is not None:
        choice = _choice(options)
        told = _differing(choice.cost) | _differing(choice)
        named = _FOR_COST.format(**vars(choice.cost))
        marks.append(settings_told(named, {key: told[key] for key in told if f"{{{key}}}" not in _FOR_COST}))
    return " ".join(marks)


def _differing(choice: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults; those that have none are left out."""
    return {
        each.name: value
        for each in fields(choice)
        if each.default is not MISSING and (value := getattr(choice, each.name)) != each.default
    }


def _described(cut: Linearized, common: NetworkInfo) -> NetworkInfo:
    """What stands beside a cut network."""
    if "model" in cut.info:
        # A network of another architecture, which none of the user's files builds.
        model = replace(common.model, **cut.info["model"], files={})
    else:
        model = replace(common.model, options={**common.model.options, **cut.info.get("model_options", {})})
    return replace(
        common,
        model=model,
        relus=cut.relus,
        total=cut.total,
        budget=cut.budget,
        reached=bool(cut.info.get("reached", True)),
        surrogate=surrogate_of(cut.model),
    )
