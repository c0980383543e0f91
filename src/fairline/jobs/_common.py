"""What several jobs share: the run that is done once, its data, its base network, networks made of networks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairline._registry import is_number
from fairline.data import Groups
from fairline.data.grouped import GroupedData, regrouped, too_few
from fairline.errors import FairlineError
from fairline.runs import DataSpec, NetworkInfo, Run, load_network, save_network

logger = logging.getLogger(__name__)

#: Ways to the last layer, and what networks are then called.
LAST_LAYERS = {"dfr": "last layer", "afr": "AFR", "self": "SELF"}

#: Commands whose runs hold linearized networks that can be trained on; each can be told other groups than the data's.
STUDENTS = ("linearize", "finetune", "last-layer", "adjust", "choose")

#: Commands whose runs hold linearized networks.
LINEARIZED = (*STUDENTS, "compile")

#: What is told of a network while it is made: a row an epoch, for ``metrics.parquet``.
Rows = list[dict[str, Any]]

#: Changes a network in place. Takes its position among its run's, its name, the network and what stands beside it;
#: returns what stands beside it now, and rows of metrics.
Change = Callable[[int, str, nn.Module, NetworkInfo], tuple[NetworkInfo, Rows]]


def do_once(
    out: str | Path, command: str, config: Mapping[str, Any], device: torch.device, work: Callable[[Run], None]
) -> Run:
    """Do a job in its run folder, or go on with it, unless it is done.

    Args:
        out: The run folder.
        command: Name of the job.
        config: What determines the result.
        device: Where it computes.
        work: The job; resumes by itself from what it finds in the run.

    Returns:
        The finished run.
    """
    with Run.write(out, command, config, device) as run:
        if not run.finished:
            work(run)
    return run


def open_runs(what: str, sources: Sequence[str | Path], *commands: str) -> list[Run]:
    """The finished runs that a job reads.

    Args:
        what: The job, for the error message.
        sources: Folders.
        commands: Whose runs they may be.

    Returns:
        The runs, in their order.

    Raises:
        FairlineError: There is none, or a folder holds no such run.
    """
    if not sources:
        raise FairlineError(f"{what} needs at least one run.")
    return [Run.read(source, *commands) for source in sources]


def built_on(parent: Run) -> dict[str, Any]:
    """What the config of a job says of the run that it is built on."""
    return {"parent": parent.parent_entry(), "data": parent.config["data"]}


def last_layer_told(config: Mapping[str, Any]) -> str:
    """How a last layer is retrained, in words: ``"AFR strength=4"``, ``"last layer by class on train"``.

    Args:
        config: Of its run, or those settings of it that are not the default.

    Returns:
        The words.
    """
    told = [LAST_LAYERS[config.get("method", "dfr")]]
    balance = config.get("balance", "group")
    told += [] if balance == "group" else [f"by {balance.replace('_', ' ')}"]
    told += [f"on {config['part']}"] if "part" in config else []
    # Of several strengths the one that was taken is told beside.
    told += [f"{name}={config[name]:g}" for name in ("strength", "within") if is_number(config.get(name))]
    return " ".join(told)


def lineage_of(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The configs of some runs and of all that they were built on or chosen from, by folder."""
    found: dict[str, dict[str, Any]] = {}
    for source in runs:
        for run in source.lineage():
            found |= lineage_of(run.candidates())
            found[str(run.folder.resolve())] = run.config
    return found


def require_split(split: str) -> None:
    """Refuse a part that data do not have.

    Raises:
        FairlineError: It is none of the three.
    """
    if split not in ("train", "val", "test"):
        raise FairlineError(f"The split is train, val or test, not '{split}'.")


def require_bootstrap(split: str, resamples: int) -> None:
    """Refuse a bootstrap over a part that data do not have, or of no resample.

    Raises:
        FairlineError: The split is none of the three, or there is not one resample.
    """
    require_split(split)
    if resamples < 1:
        raise FairlineError(f"The bootstrap needs at least one resample, not {resamples}.")


def data_of(run: Run, root: str | None) -> DataSpec:
    """The run's data, from another folder if they have moved."""
    return run.data if root is None else replace(run.data, root=root)


def load_parts(run: Run, root: str | None, groups: Groups | None = None) -> dict[str, GroupedData]:
    """The parts ``train``, ``val`` and ``test`` of the run's data, in groups that are named or that it was made for."""
    parts = data_of(run, root).load()[1]
    groups = made_for(run) if groups is None else groups
    return parts if groups is None else regrouped(parts, groups)


def parts_once(run: Run, root: str | None, groups: Groups | None) -> Callable[[], dict[str, GroupedData]]:
    """As :func:`load_parts`, once, when they are asked for; at once where groups are named, which may not fit them."""
    parts = cache(partial(load_parts, run, root, groups))
    if groups is not None:
        parts()
    return parts


def warn_of_small(data: GroupedData, part: str) -> None:
    """Log which groups of a part have too few images to choose by."""
    if told := too_few(data.counts()["n"], part):
        logger.warning("%s", told)


def made_for(run: Run) -> Groups | None:
    """Other groups than the data's that a run's masks or networks were made or chosen in, the last that were named."""
    for each in reversed(run.lineage()):
        # What a choice was made of is not before it, but beside; groups that it names win.
        found = [made_for(candidate) for candidate in each.candidates()]
        found += [each.config.get("groups")] if each.command in STUDENTS else []
        if groups := [own for own in found if own is not None]:
            return groups[-1]
    return None


def judged_in(runs: Sequence[Run], groups: Groups | None) -> Groups | None:
    """The groups to judge runs in: those that are named, else those that any of them was made for.

    Returns:
        The groups; None for those of the data.

    Raises:
        FairlineError: None are named, and the runs were made for different ones.
    """
    if groups is not None:
        return groups
    found = {str(own): own for run in runs if (own := made_for(run)) is not None}
    if len(found) > 1:
        told = "; ".join(found)
        raise FairlineError(f"The runs were made for different groups ({told}); name those to judge by (--groups).")
    return next(iter(found.values()), None)


def in_groups(groups: Groups | None) -> dict[str, Any]:
    """What the config of a job says of groups that are not those of the run's data."""
    return {} if groups is None else {"groups": groups if isinstance(groups, str) else list(groups)}


def settings_told(name: str, options: Mapping[str, Any]) -> str:
    """What a method is called under some settings.

    >>> settings_told("lagrangian", {"mu": 0.005, "violation": "signed"})
    'lagrangian mu=0.005 violation=signed'

    Returns:
        The name and each setting.
    """
    values = (f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items())
    return " ".join([name, *values])


def load_base(run: Run) -> tuple[nn.Module, NetworkInfo]:
    """The base network that a run's networks come from."""
    return load_network(run.base().base_network())


def with_step(info: NetworkInfo, told: str) -> NetworkInfo:
    """What stands beside a network that one step more was done to, which is told in words."""
    return replace(info, stage="finetuned", objective=f"{info.objective} + {told}" if info.objective else told)


def remake(
    parent: Run, run: Run, change: Callable[[int, str, nn.Module, NetworkInfo], tuple[NetworkInfo, Rows]]
) -> None:
    """Make a network of each of a parent's, save it under the same name, and write the metrics of all.

    Args:
        parent: Whose networks are taken.
        run: Where the new ones and the metrics go.
        change: What is done to each.
    """
    rows: Rows = []
    for position, (name, folder) in enumerate(parent.networks().items(), start=1):
        network, before = load_network(folder)
        after, own = change(position, name, network, before)
        rows += [{"network": name, **row} for row in own]
        save_network(run.network_folder(name), network, after)
    run.write_metrics(rows)
