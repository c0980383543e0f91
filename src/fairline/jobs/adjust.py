"""The job of ``fairline adjust``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairline._registry import is_number
from fairline.data import Groups
from fairline.jobs._common import (
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
from fairline.objectives.choice import Strength, as_given
from fairline.objectives.post_hoc import Method, Rule, adjust_in_place, require_settings
from fairline.runs import NetworkInfo, Run
from fairline.training import Progress, ProgressCallback


def adjust_job(
    source: str | Path,
    out: str | Path,
    *,
    method: Method = "logit_adjust",
    tau: Strength = None,
    rule: Rule = "worst_group",
    within: float = 1.0,
    groups: Groups | None = None,
    root: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Raise the logits of rare classes in every network of a run, into ``out``; see :func:`fairline.adjust`.

    Args:
        source: A linearize, finetune, last-layer, adjust or choose run.
        out: The run folder.
        method: ``"logit_adjust"``, ``"tau_norm"`` or ``"weight_scale"``.
        tau: The strength, or several, of which one is chosen for each network on the validation part; see there.
        rule: How; losses are counted against the base network.
        within: Overall accuracy that may go, in percentage points, under the rule ``"worst_group"``.
        groups: Other groups to choose in than those that the run was made for; see :meth:`GroupedData.regroup`. What is
            built on the run is chosen and judged in them.
        root: Where the data are now, if they have moved.
        progress: Told of every network.

    Returns:
        The run; ``metrics.parquet`` has a row for each strength that was tried.

    Raises:
        FairlineError: A setting is out of range, a class has no training image, or a group no validation image.
    """
    tau = as_given(tau, "τ")
    require_settings(method, rule, within)
    parent = Run.read(source, *STUDENTS)
    chooses = not is_number(tau)
    settings: dict[str, Any] = {"method": method, "tau": tau, "rule": rule, "within": within}
    config = {**built_on(parent), **settings, **in_groups(groups)}
    data = parts_once(parent, root, groups)
    if groups is not None and chooses:
        data()["val"].require_groups("choosing τ")

    def work(run: Run) -> None:
        parts = data()
        if chooses:
            warn_of_small(parts["val"], "val")
        base, _ = load_base(parent)
        count = len(parent.networks())

        def change(position: int, name: str, network: nn.Module, info: NetworkInfo) -> tuple[NetworkInfo, Rows]:
            reference = base if rule == "largest_loss" else None
            said = adjust_in_place(network, parts["train"], parts["val"], reference=reference, **settings)
            tried = [{**row, "chosen": row["tau"] == said["tau"]} for row in said["tried"]]
            if progress is not None:
                progress(Progress("adjusting", position, count, name))
            return with_step(info, method.replace("_", " ")), tried or [{"tau": said["tau"], "chosen": True}]

        remake(parent, run, change)

    return do_once(out, "adjust", config, torch.device("cpu"), work)
