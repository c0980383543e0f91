"""How long a study will take: from cells that were run before, else from the speed of a few training steps."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from fairline import linearize, models
from fairline._io import json_digest, resolve_device
from fairline.runs import DataSpec
from fairline.study.cells import Cell, cells_of, require_known
from fairline.study.spec import StudySpec
from fairline.study.storage import Storage
from fairline.training import DEFAULTS, finetune, train

#: Forward passes of the teacher, beside the student's forward and backward pass.
_DISTILLING = 4 / 3


def estimate(
    specs: Sequence[StudySpec],
    storage: Storage,
    *,
    root: str | None = None,
    jobs: int = 1,
    device: str | None = None,
) -> pd.DataFrame:
    """Estimate the time of what is left of some studies.

    Args:
        specs: The studies.
        storage: Where their cells are kept.
        root: Where the data are.
        jobs: Cells at a time; the cores are shared.
        device: Where they run.

    Returns:
        A row for each kind of cell: ``kind``, ``cells``, ``finished``, ``left``, ``seconds`` (of all that are left,
        one after another), ``basis`` (``measured``: equal cells but for the seed were run here; ``reckoned``: from
        epochs, images and the speed of training steps, at most; ``unknown`` counts as nothing).

    Raises:
        FairlineError: A study names what nothing here knows, or the data cannot be loaded.
    """
    for spec in specs:
        require_known(spec)
    cells = list({cell.key: cell for spec in specs for cell in cells_of(spec)}.values())
    before = _measured(storage)
    speeds: dict[str, tuple[float, int]] = {}
    rows = []
    for cell in cells:
        done = storage.finished(cell)
        seconds, basis = 0.0, ""
        if not done:
            known = before.get(_signature(cell.content, {one.key: one.content for one in cell.ancestors()}))
            if known:
                seconds, basis = sum(known) / len(known), "measured"
            else:
                epochs = _epochs(cell)
                basis = "unknown" if epochs is None else "reckoned"
                if epochs:
                    rate, images = _speed(cell, root, jobs, device, speeds)
                    seconds = epochs * images / rate
        rows.append({"kind": cell.kind, "finished": done, "seconds": seconds, "basis": basis})
    table = pd.DataFrame(rows)
    grouped = table.groupby("kind", sort=False)
    return pd.DataFrame(
        {
            "cells": grouped.size(),
            "finished": grouped["finished"].sum(),
            "left": grouped.size() - grouped["finished"].sum(),
            "seconds": grouped["seconds"].sum(),
            "basis": grouped["basis"].agg(lambda column: ", ".join(sorted({name for name in column if name}))),
        }
    ).reset_index()


def _measured(storage: Storage) -> dict[str, list[float]]:
    """Seconds of finished cells, by signature."""
    known = storage.notes()
    found: dict[str, list[float]] = {}
    for note in known.values():
        if not note["resumed"]:
            found.setdefault(_signature(note, known), []).append(float(note["seconds"]))
    return found


def _signature(content: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> str:
    """What a cell is, apart from seeds."""
    arguments = {name: value for name, value in content["arguments"].items() if name != "seed"}
    parents = [_signature(known[key], known) if key in known else key for key in content["parents"]]
    return json_digest({"kind": content["kind"], "arguments": arguments, "parents": parents})


def _epochs(cell: Cell) -> float | None:
    """Passes over the training images, in steps of the student, at most; None where they cannot be told."""
    given = cell.arguments
    match cell.kind:
        case "train":
            return float(_setting(train, given["settings"], "epochs"))
        case "finetune":
            count = len(cell.parents[0].arguments["budgets"])
            return count * float(_setting(finetune, given["settings"], "epochs")) * _DISTILLING
        case "linearize":
            method = linearize.REGISTRY[given["method"]]
            names = [name for name in inspect.signature(method).parameters if name.endswith("epochs")]
            names = [name for name in names if not name.startswith("min")]
            learning = sum(float(_setting(method, given["settings"], name) or 0) for name in names)
            return (learning + _epochs_for_cost(given["settings"].get("for_cost"))) * _DISTILLING
        case "audit":
            return None if given["explain"] or set(given["measures"]) - {"accuracy"} else 0.0
    return 0.0


def _epochs_for_cost(options: Mapping[str, Any] | None) -> float:
    """Epochs of a choice of layers, whose last one is finetuned twice, at most."""
    if options is None:
        return 0.0
    adapt, measurements = (float(_setting(linearize.ForCost, options, name)) for name in ("adapt", "measurements"))
    return adapt * (measurements + 1)


def _setting(call: Any, settings: Mapping[str, Any], name: str) -> Any:
    return settings.get(name, inspect.signature(call).parameters[name].default)


def _speed(
    cell: Cell, root: str | None, jobs: int, device: str | None, speeds: dict[str, tuple[float, int]]
) -> tuple[float, int]:
    """Images a second of training steps of a cell's model, and how many training images there are."""
    base = cell if cell.kind == "train" else cell.ancestors()[0]
    data, model = base.arguments["data"], base.arguments["model"]
    key = json.dumps([data, model], sort_keys=True)
    if key not in speeds:
        _, parts = DataSpec(data["name"], root, data["options"], base.arguments["seed"]).load()
        part = parts["train"]
        where = resolve_device(device)
        network = models.build(
            model["name"], part.num_classes, part.images.shape[1], part.images.shape[2:], **model["options"]
        ).to(where)
        size = min(int((DEFAULTS | base.arguments["settings"])["batch_size"]), len(part))
        images = torch.rand(size, *part.images.shape[1:], device=where)
        labels = torch.zeros(size, dtype=torch.long, device=where)
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // jobs))
        try:
            times = []
            for _ in range(4):
                begun = time.perf_counter()
                F.cross_entropy(network(images), labels).backward()
                if where.type == "cuda":
                    torch.cuda.synchronize(where)
                times.append(time.perf_counter() - begun)
        finally:
            torch.set_num_threads(threads)
        speeds[key] = size / min(times[1:]), len(part)
    return speeds[key]
