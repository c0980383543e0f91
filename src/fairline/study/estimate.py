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
from fairline._io import json_digest, read_table, resolve_device
from fairline.runs import DataSpec
from fairline.study.cell import Cell
from fairline.study.cells import cells_of, require_known
from fairline.study.spec import StudySpec
from fairline.study.storage import Storage
from fairline.training import DEFAULTS, finetune, train

#: Forward passes of the teacher, beside the student's forward and backward pass.
_DISTILLING = 4 / 3


def estimate(
    specs: Sequence[StudySpec],
    storage: Storage,
    *,
    seeds: Mapping[str, Sequence[int]] | None = None,
    root: str | None = None,
    jobs: int = 1,
    device: str | None = None,
) -> pd.DataFrame:
    """Estimate the time of what is left of some studies.

    Args:
        specs: The studies.
        storage: Where their cells are kept.
        seeds: By a study's name, those of its seeds that are asked about.
        root: Where the data are.
        jobs: Cells at a time; the cores are shared.
        device: Where they run.

    Returns:
        A row for each kind of cell: ``kind``, ``cells``, ``finished``, ``left``, ``seconds`` (of all that are left,
        one after another), ``basis`` (``measured``: equal cells but for the seed were run here; ``past epochs``: masks
        were learned here under the same settings, and took so many epochs; ``reckoned``: from epochs, images and the
        speed of training steps, at most; ``unknown`` counts as nothing).

    Raises:
        FairlineError: A study names what nothing here knows, or the data cannot be loaded.
    """
    for spec in specs:
        require_known(spec)
    asked = seeds or {}
    cells = list({cell.key: cell for spec in specs for cell in cells_of(spec, asked.get(spec.name))}.values())
    before, learned = _measured(storage), _learned(storage)
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
                epochs = learned.get(_recipe(cell.kind, cell.arguments))
                basis = "past epochs"
                if epochs is None:
                    epochs = _epochs(cell)
                    basis = "unknown" if epochs is None else "reckoned"
                if epochs:
                    rate, images = _speed(cell, root, jobs, device, speeds)
                    seconds = epochs * images / rate
        rows.append({"kind": cell.kind, "finished": done, "seconds": seconds, "basis": basis})
    return _by_kind(rows)


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Cells, and what is left of them, a row a kind."""
    grouped = pd.DataFrame(rows).groupby("kind", sort=False)
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


def _learned(storage: Storage) -> dict[str, float]:
    """Passes over the training images that mask learning took in finished cells.

    Masks are learned until the last budget is reached, mostly long before ``max_epochs``.

    Returns:
        Their mean over the cells of each recipe.
    """
    found: dict[str, list[int]] = {}
    for key, note in storage.notes().items():
        file = storage.local / "cells" / key / "metrics.parquet"
        if note["kind"] != "linearize" or not file.exists():
            continue
        rows = read_table(file)
        if "relus" in rows:
            found.setdefault(_recipe("linearize", note["arguments"]), []).append(int(rows["relus"].notna().sum()))
    return {recipe: _DISTILLING * sum(epochs) / len(epochs) for recipe, epochs in found.items()}


def _recipe(kind: str, arguments: Mapping[str, Any]) -> str:
    """How masks are learned, whatever the data, the network and the seed."""
    return json_digest({"kind": kind, **{name: value for name, value in arguments.items() if name != "seed"}})


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
            str(base.about.get("own_model") or model["name"]),
            part.num_classes,
            part.images.shape[1],
            part.images.shape[2:],
            **model["options"],
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
