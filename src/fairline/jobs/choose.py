"""The job of ``fairline choose``: of runs that differ in one setting, for each budget the best on validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairline._io import read_table, resolve_device, write_table
from fairline.data import Groups
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.jobs._common import (
    STUDENTS,
    Rows,
    built_on,
    do_once,
    in_groups,
    judged_in,
    load_base,
    open_runs,
    parts_once,
    warn_of_small,
)
from fairline.objectives.choice import Rule, accuracies, chosen, is_within, require_rule
from fairline.runs import Run, load_info, load_network, save_network
from fairline.training import Progress, ProgressCallback

#: Commands whose runs may be chosen from.
_CANDIDATES = ("finetune", "last-layer", "adjust")

#: Strength of the reference, which is taken where no other is near enough.
NONE = "none"

#: What every group is needed for.
_PURPOSE = "choosing a strength"


def choose_job(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    reference: str | Path,
    rule: Rule = "worst_group",
    within: float = 1.0,
    groups: Groups | None = None,
    root: str | None = None,
    device: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Take, for each budget, one network of some runs that differ in one setting, into ``out``.

    Every network is measured on the validation part, as it was saved; no other part is looked at. What is chosen is a
    copy. Where no run is within reach, it is the reference's network, whose strength is called ``none``.

    Args:
        sources: Finetune, last-layer or adjust runs of one parent, which differ in one setting; of equals the first is
            taken, so name them from the weakest on.
        out: The run folder.
        reference: Plain distillation of the same masks, with the same budgets.
        rule: See :func:`fairline.objectives.choice.chosen`; losses are counted against the base network.
        within: Overall accuracy that may be lost against the reference, in percentage points, under ``"worst_group"``.
        groups: Other groups to choose in than those that the runs are made for; see :meth:`GroupedData.regroup`. What
            is built on the run is chosen and judged in them.
        root: Where the data are now, if they have moved.
        device: The accelerator if there is one, by default.
        progress: Told of every network.

    Returns:
        The run; ``metrics.parquet`` has a row for each network that was tried: ``network`` (of which budget),
        ``strength``, ``accuracy`` and ``worst_group_accuracy`` in [0, 1] with ``worst_group``, ``largest_loss``
        (points, under that rule), ``within`` and ``chosen``.

    Raises:
        FairlineError: The runs differ in more, or the reference is of other masks or budgets, or a group has no
            validation image.
    """
    require_rule(rule, within, "The strength")
    where = resolve_device(device)
    runs = open_runs("A choice", sources, *_CANDIDATES)
    plain = Run.read(reference, *STUDENTS)
    config = {**_choice(runs, plain), "rule": rule, "within": within, **in_groups(groups)}
    data = parts_once(runs[0], root, judged_in(runs, groups))
    if groups is not None:
        data()["val"].require_groups(_PURPOSE)
    strengths = [NONE, *(strength(config["option"], value) for value in config["values"])]
    tried = [_Tried(*each) for each in zip(strengths, [plain, *runs], strict=True)]

    def work(run: Run) -> None:
        val = data()["val"]
        warn_of_small(val, "val")
        _write(run, tried, pd.concat(_kept(run, tried, val, rule, where, progress)), rule, within)

    return do_once(out, "choose", config, where, work)


def _choice(runs: Sequence[Run], plain: Run) -> dict[str, Any]:
    """What is chosen from, as a choice is known by it; refused where the runs do not fit together."""
    option, values = varied(runs)
    _require_same_masks(runs, plain)
    return {
        **built_on(runs[0].lineage()[-2]),
        "option": option,
        "values": values,
        "sources": [run.parent_entry() for run in runs],
        "reference": plain.parent_entry(),
    }


@dataclass(frozen=True)
class _Tried:
    """A run that may be chosen."""

    strength: str
    run: Run


def strength(option: str, value: Any) -> str:
    """How a value of an option is called: ``mu=0.5``."""
    told = "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"{option}={told}"


def varied(runs: Sequence[Run]) -> tuple[str, list[Any]]:
    """The one setting in which runs differ.

    Args:
        runs: Of one parent.

    Returns:
        Its name, and its value in each.

    Raises:
        FairlineError: There is one alone, or they have several parents, are not of one job, or differ in nothing or in
            more.
    """
    if len(runs) < 2:
        raise FairlineError("A choice needs two runs at least, which differ in one setting.")
    parents = {run.lineage()[-2].folder.resolve() for run in runs}
    if len(parents) > 1 or len({run.command for run in runs}) > 1:
        raise FairlineError("A choice is among runs of one job that were made of the same run.")
    told = [_leaves({key: value for key, value in run.config.items() if key != "parent"}) for run in runs]
    names = list(dict.fromkeys(name for each in told for name in each))
    different = [name for name in names if any(each.get(name) != told[0].get(name) for each in told)]
    if len(different) != 1:
        differ = f"they differ in {', '.join(different)}" if different else "they are the same"
        raise FairlineError(f"A choice is among runs that differ in one setting; {differ}.")
    values = [each.get(different[0]) for each in told]
    for place, value in enumerate(values):
        if value in values[:place]:
            raise FairlineError(f"{runs[place].folder} and another run both have {strength(different[0], value)}.")
    return different[0].rpartition(".")[2], values


def _leaves(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their path."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _require_same_masks(runs: Sequence[Run], reference: Run) -> None:
    """Refuse runs that the reference cannot be set beside, budget by budget."""
    of, own = (run.lineage()[1].folder.resolve() for run in (reference, runs[0]))
    if of != own:
        raise FairlineError(f"{reference.folder} is made of the masks of {of}, not of {own}; a choice needs the same.")
    for run in runs:
        if list(run.networks()) != list(reference.networks()):
            raise FairlineError(f"{run.folder} and {reference.folder} do not hold networks of the same budgets.")


def _kept(
    run: Run,
    tried: Sequence[_Tried],
    val: GroupedData,
    rule: Rule,
    device: torch.device,
    progress: ProgressCallback | None,
) -> list[pd.DataFrame]:
    """What the networks of each run get right, now or before an interruption."""
    val.require_groups(_PURPOSE)
    plain = tried[0].run
    base = accuracies(predict(load_base(plain)[0], val, device=device), val)[1] if rule == "largest_loss" else None
    for place, each in enumerate(tried):
        file = run.checkpoint / f"{place}.parquet"
        if not file.exists():
            rows = [_measured(each, name, val=val, base=base, device=device) for name in plain.networks()]
            write_table(file, pd.DataFrame(rows))
        if progress is not None:
            progress(Progress("choosing", place + 1, len(tried), each.strength))
    return [read_table(run.checkpoint / f"{place}.parquet") for place in range(len(tried))]


def _measured(
    tried: _Tried, name: str, *, val: GroupedData, base: Sequence[float] | None, device: torch.device
) -> dict[str, Any]:
    """What one network gets right of the validation part."""
    model, _ = load_network(tried.run.networks()[name])
    overall, groups = accuracies(predict(model, val, device=device), val)
    worst = min(groups)
    row = {"network": name, "strength": tried.strength, "accuracy": overall, "worst_group_accuracy": worst}
    loss = {} if base is None else {"largest_loss": max(100 * (b - a) for b, a in zip(base, groups, strict=True))}
    return {**row, "worst_group": val.group_names[groups.index(worst)], **loss}


def _write(run: Run, tried: Sequence[_Tried], table: pd.DataFrame, rule: Rule, within: float) -> None:
    """Copies of the networks that are chosen, and what was tried; the reference comes first of each budget."""
    rows: Rows = []
    for name in tried[0].run.networks():
        own: list[dict[str, Any]] = table[table["network"] == name].to_dict("records")
        plain = float(own[0]["accuracy"])
        place = chosen(own[1:], rule, within, plain)
        taken = 0 if place is None else place + 1
        model, info = load_network(tried[taken].run.networks()[name])
        # Of no strength it is still the method's: what the method comes to where it is not used.
        objective = load_info(tried[-1].run.networks()[name]).objective
        save_network(run.network_folder(name), model, replace(info, objective=objective))
        rows += [
            {**row, "within": is_within(row["accuracy"], within, plain), "chosen": at == taken}
            for at, row in enumerate(own)
        ]
    run.write_metrics(rows)


def tried_of(run: Run) -> list[tuple[str, Run]]:
    """The runs that a run stands for, by strength: those that a choice was among, or itself under no name."""
    if run.command != "choose":
        return [("", run)]
    option, values = run.config["option"], run.config["values"]
    return [(strength(option, value), each) for value, each in zip(values, run.candidates()[1:], strict=True)]


def choices(run: Run) -> dict[str, tuple[int, str]]:
    """How many settings were tried on validation data for each network of a run, and which were taken.

    Args:
        run: Any; every step that led to it counts.

    Returns:
        By name of the network: the number, 1 where there was nothing to choose, and the settings, such as
        ``"mu=0.5, tau=1"``.
    """
    steps = [_of_step(step) for step in run.lineage()]
    found = {}
    for name in run.networks():
        own = [step[name] for step in steps if name in step]
        told = ", ".join(text for _, text in own if text)
        found[name] = max(sum(tried for tried, _ in own if tried > 1), 1), told
    return found


def _of_step(run: Run) -> dict[str, tuple[int, str]]:
    """What one run tried for each of its networks, and took."""
    # An epoch of training is no setting.
    if run.command in ("train", "linearize", "finetune") or not (run.folder / "metrics.parquet").exists():
        return {}
    table = run.table("metrics.parquet")
    if "chosen" not in table or "network" not in table:
        return {}
    column = next(name for name in ("strength", "tau") if name in table)
    beside = [_of_step(candidate) for candidate in run.candidates()[1:]]
    found = {}
    for name, own in table.groupby("network", sort=False):
        value = own.loc[own["chosen"].astype(bool), column].iloc[0]
        told = value if isinstance(value, str) else NONE if pd.isna(value) else strength(column, float(value))
        changing = own[column].notna()
        if column == "tau" and len(own) > 1:
            # What leaves a network as it is is no setting.
            changing &= own[column] != 0
        tried = sum(step.get(name, (1, ""))[0] for step in beside) if beside else int(changing.sum())
        found[str(name)] = tried, told
    return found
