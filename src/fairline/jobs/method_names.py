"""What a comparison calls methods: by what was done after the base training, and by settings where it must."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fairline import linearize
from fairline._registry import is_number
from fairline.audit.comparison import BASE
from fairline.jobs._common import last_layer_told, made_for, settings_told
from fairline.jobs.linearize import placement_of
from fairline.runs import NetworkInfo, Run, load_info
from fairline.training import DEFAULTS, finetune

#: What a config says that is no setting, or that names of methods tell in any case.
_TOLD = {"command", "parent", "data", "sources", "reference", "budgets", "settings", "objective", "objective_options"}
#: Before the settings of a job; those of masks stand behind their placement, those of a finetune by themselves.
_PREFIXES = {"linearize": "", "finetune": "", "last-layer": "last layer "}

#: A job's place in a lineage, what it is, and a setting of it.
_Setting = tuple[int, str, str]


@dataclass(frozen=True)
class MethodName:
    """What a network is called in a comparison.

    Attributes:
        label: Its method.
        placement: Under what its masks were placed; empty, if as the linearizer does by itself.
    """

    label: str
    placement: str


def method_names(families: Sequence[Sequence[Run]]) -> dict[Path, MethodName]:
    """What networks are called beside each other.

    Methods that :func:`method_label` calls alike are told apart by the groups that they were made for, else by those
    settings that differ between networks of one base network and budget: the first run's go without saying.

    Args:
        families: Runs by their base network.

    Returns:
        Names by a network's folder; two of one base network and budget are one only where nothing tells them apart.
    """
    runs = {path.resolve(): run for family in families for run in family for path in run.networks().values()}
    infos = {path: load_info(path) for path in runs}
    plain = {path: method_label(run, infos[path]) for path, run in runs.items()}
    suffixes = _made_for(runs, plain)
    labels = {path: plain[path] + suffixes[path] for path in runs}
    settings = {path: _settings(run) for path, run in runs.items()}
    varied = _varied(families, labels, settings)
    first: dict[str, dict[_Setting, Any]] = {}
    names = {}
    for path, run in runs.items():
        own = settings[path]
        usual = first.setdefault(labels[path], own)
        told: dict[bool, list[str]] = {True: [], False: []}  # by whether they are of the masks
        for place, job, name in varied.get(labels[path], ()):
            if own.get((place, job, name)) != usual.get((place, job, name)):
                value = _text(own.get((place, job, name)))
                told[job == "linearize"].append(f"{_PREFIXES.get(job, f'{job} ')}{name}={value}")
        placement = " ".join(filter(None, [placed(run, infos[path]), *told[True]]))
        label = method_label(run, infos[path], placement) + suffixes[path]
        names[path] = MethodName(", ".join([label, *told[False]]), placement)
    return names


def _made_for(runs: Mapping[Path, Run], labels: Mapping[Path, str]) -> dict[Path, str]:
    """The groups that networks were made for, where nothing else tells two methods apart; else nothing."""
    several: dict[str, set[str]] = {}
    for path, run in runs.items():
        several.setdefault(labels[path], set()).add(str(made_for(run)))
    found = {}
    for path, run in runs.items():
        groups = made_for(run)
        alone = groups is None or len(several[labels[path]]) == 1
        found[path] = "" if alone else f" for {groups if isinstance(groups, str) else ' × '.join(groups or ())}"
    return found


def _varied(
    families: Sequence[Sequence[Run]], labels: Mapping[Path, str], settings: Mapping[Path, Mapping[_Setting, Any]]
) -> dict[str, list[_Setting]]:
    """By name, the settings in which networks of one base network, name and budget differ."""
    found: dict[str, dict[_Setting, None]] = {}
    for family in families:
        alike: dict[tuple[str, int], list[Path]] = {}
        for run in family:
            for path in run.networks().values():
                alike.setdefault((labels[path.resolve()], load_info(path).budget), []).append(path.resolve())
        for (label, _), paths in alike.items():
            for one, other in combinations(paths, 2):
                keys = {**settings[one], **settings[other]}
                differ = {key: None for key in keys if settings[one].get(key) != settings[other].get(key)}
                found.setdefault(label, {}).update(differ)
    return {label: sorted(keys) for label, keys in found.items()}


def _settings(run: Run) -> dict[_Setting, Any]:
    """All settings of a run and of what it was built on, but for the base training, with the defaults of each job."""
    found: dict[_Setting, Any] = {}
    for place, each in enumerate(run.lineage()[1:]):
        beside = {
            name: value for name, value in each.config.items() if name not in _TOLD and not isinstance(value, dict)
        }
        all_of_it = {**_defaults(each), **beside, **each.config.get("settings", {})}
        found |= {(place, each.command, name): value for name, value in all_of_it.items()}
    return found


def _defaults(run: Run) -> dict[str, Any]:
    """What a job does where its config says nothing."""
    if run.command == "finetune":
        return {**DEFAULTS, "epochs": inspect.signature(finetune).parameters["epochs"].default}
    if run.command == "linearize" and run.config["method"] in linearize.REGISTRY:
        known = inspect.signature(linearize.REGISTRY[run.config["method"]]).parameters
        return {name: each.default for name, each in known.items()}
    return {}


def _text(value: Any) -> str:
    return f"{value:g}" if is_number(value) else str(value).lower()


def method_label(run: Run, info: NetworkInfo, placement: str | None = None) -> str:
    """What was done to a network after its base training: ``"masks lagrangian, lagrangian mu=0.005"``.

    Args:
        run: That it is of.
        info: What stands beside it.
        placement: Under what its masks were placed, where that is told in more words than :func:`placed` has.

    Returns:
        The words.
    """
    if info.stage == "base":
        return BASE
    placement = placed(run, info) if placement is None else placement
    parts = [f"masks {placement}"] if placement else []
    if info.surrogate != "identity":
        parts.append(info.surrogate)
    if run.command == "linearize":
        parts.append("not finetuned")
    parts += [text for each in run.lineage() for text in _steps(each)]
    label = ", ".join(parts)
    # The linearizer is named only where it is not the usual one.
    return label if info.method == "snl" else f"{info.method}: {label}"


def _steps(run: Run) -> list[str]:
    """What was done in one run, in words."""
    # What a choice was compared with comes first.
    return steps_told(run.config, run.candidates()[1].config if run.command == "choose" else {})


def steps_told(config: Mapping[str, Any], chosen_from: Mapping[str, Any], varied: str = "") -> list[str]:
    """What a job does to networks, in the words that a comparison calls them by.

    >>> steps_told({"command": "finetune", "objective": "lagrangian", "objective_options": {"mu": 0.005}}, {})
    ['lagrangian mu=0.005']
    >>> steps_told({"command": "adjust", "method": "logit_adjust", "tau": None}, {})
    ['logit adjust']

    Args:
        config: Its run's.
        chosen_from: The config of one of the runs that ``choose`` chooses from; of other jobs empty.
        varied: An option whose value is not told.

    Returns:
        The words; none of a job that changes no network.
    """
    command = config["command"]
    if command == "choose":
        rule = "" if config["rule"] == "worst_group" else f" by {config['rule'].replace('_', ' ')}"
        return [*steps_told(chosen_from, {}, config["option"]), f"{config['option']} chosen{rule}"]
    if command == "finetune":
        options = {key: value for key, value in config["objective_options"].items() if key != varied}
        text = settings_told(config["objective"], options)
        return [text if config.get("distill", True) else f"{text}, labels only"]
    if command == "last-layer":
        return [last_layer_told(config)]
    if command == "adjust":
        told = [config["method"].replace("_", " ")]
        # Of several strengths the one that was taken is told beside.
        if is_number(config["tau"]):
            told += [] if varied == "tau" else [f"tau={config['tau']:g}"]
        elif config.get("rule", "worst_group") != "worst_group":
            told.append(config["rule"].replace("_", " "))
        return [" ".join(told)]
    return []


def placed(run: Run, info: NetworkInfo) -> str:
    """Under what a network's masks were placed; in the same words for runs of earlier versions, which told less."""
    config = next((each.config for each in run.lineage() if each.command == "linearize"), None)
    return info.placement if config is None else placement_of(config)
