"""The job of ``fairline linearize``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fairline import linearize as linearizers
from fairline import objectives
from fairline._io import resolve_device
from fairline.jobs._common import data_of
from fairline.masking import surrogate_of
from fairline.runs import (
    NetworkInfo,
    Run,
    load_network,
    save_network,
)
from fairline.training import ProgressCallback

logger = logging.getLogger(__name__)


def linearize_job(
    source: str | Path,
    out: str | Path,
    budgets: Sequence[float],
    method: str = "snl",
    objective: str = "erm",
    objective_options: Mapping[str, Any] | None = None,
    *,
    root: str | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Linearize a base network to several budgets into ``out``; ``settings`` go to the method.

    With another ``objective`` than ``"erm"`` the masks are learned under it: fair placement.
    """
    where = resolve_device(device)
    parent = Run.read(source, "train")
    fair: dict[str, Any] = {}
    if objective != "erm" or objective_options:
        fair = {"objective": objective, "objective_options": dict(objective_options or {})}
        linearizer = linearizers.build(
            method, seed=seed, objective=objectives.build(objective, **fair["objective_options"]), **settings
        )
    else:
        linearizer = linearizers.build(method, seed=seed, **settings)
    marks = {"protect": "protect", "empty_layers": "layers emptied"}
    placement = " ".join(
        filter(None, [objective if fair else "", *(mark for key, mark in marks.items() if settings.get(key))])
    )
    teacher, info = load_network(parent.networks()["base"])
    linearizers.resolve_budgets(budgets, info.total)
    config = {
        "parent": parent.parent_entry(),
        "data": parent.config["data"],
        "budgets": list(budgets),
        "method": method,
        **fair,
        "settings": settings,
        "seed": seed,
    }
    with Run.write(out, "linearize", config, where) as run:
        if not run.finished:
            _, parts = data_of(parent, root).load()
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
                        replace(info.model, options={**info.model.options, **cut.info.get("model_options", {})}),
                        "linearized",
                        cut.relus,
                        cut.total,
                        cut.budget,
                        method,
                        seed=seed,
                        reached=bool(cut.info.get("reached", True)),
                        placement=placement,
                        surrogate=surrogate_of(cut.model),
                    ),
                )
                logger.info("budget %d: kept %d of %d ReLUs; %s", cut.budget, cut.relus, cut.total, cut.info)
            run.write_metrics(rows)
    return run
