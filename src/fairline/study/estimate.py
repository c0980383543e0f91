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
from torch import Tensor, nn

from fairline import linearize
from fairline._io import json_digest, read_table, resolve_device
from fairline.precision import Precision, default_precision
from fairline.runs import DataSpec, ModelSpec
from fairline.study.cell import Cell
from fairline.study.cells import cells_of, require_known
from fairline.study.spec import StudySpec
from fairline.study.storage import Storage
from fairline.training import DEFAULTS, choose, finetune, train

#: Passes over the images where the teacher looks at each augmented batch anew: its forward one, beside the student's
#: forward and backward one. It looks once where nothing is augmented.
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
    speeds: dict[str, tuple[float, int]] = {}  # of each data set, network and precision
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
    found: dict[str, list[float]] = {}
    for key, note in storage.notes().items():
        file = storage.local / "cells" / key / "metrics.parquet"
        if note["kind"] != "linearize" or not file.exists():
            continue
        rows = read_table(file)
        if "relus" in rows:
            passes = float(rows["relus"].notna().sum()) * _passes(note["arguments"])
            found.setdefault(_recipe("linearize", note["arguments"]), []).append(passes)
    return {recipe: sum(passes) / len(passes) for recipe, passes in found.items()}


def _passes(arguments: Mapping[str, Any]) -> float:
    """Over the training images, in steps of the student, for each epoch in which masks are learned."""
    settings, method = arguments["settings"], linearize.REGISTRY[arguments["method"]]
    known = inspect.signature(method).parameters
    control = "control" in known and _setting(method, settings, "control")  # trained for as many epochs
    augment = "augment" in known and _setting(method, settings, "augment")
    return (2 if control else 1) * (_DISTILLING if augment else 1.0)


def _recipe(kind: str, arguments: Mapping[str, Any]) -> str:
    """How masks are learned, whatever the data, the network and the seed."""
    return json_digest({"kind": kind, **{name: value for name, value in arguments.items() if name != "seed"}})


def _signature(content: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> str:
    """What a cell is, apart from seeds."""
    arguments = {name: value for name, value in content["arguments"].items() if name != "seed"}
    parents = [_signature(known[key], known) if key in known else key for key in content["parents"]]
    return json_digest({"kind": content["kind"], "arguments": arguments, "parents": parents})


#: Methods whose settings say how often they pass over the training images; of others rounds, stages, searches do.
_TOLD = ("snl", "autorep", "layerwise", "block_relu", "magnitude", "random")


def _epochs(cell: Cell) -> float | None:
    """Passes over the training images, in steps of the student, at most; None where they cannot be told."""
    given = cell.arguments
    match cell.kind:
        case "train":
            return float(_setting(train, given["settings"], "epochs"))
        case "finetune":
            count = len(cell.parents[0].arguments["budgets"])
            passes = _DISTILLING if (DEFAULTS | given["settings"])["augment"] else 1.0
            return count * float(_setting(finetune, given["settings"], "epochs")) * passes
        case "linearize" if given["method"] not in _TOLD:
            return None
        case "linearize":
            method = linearize.REGISTRY[given["method"]]
            names = [name for name in inspect.signature(method).parameters if name.endswith("epochs")]
            names = [name for name in names if not name.startswith("min")]
            learning = sum(float(_setting(method, given["settings"], name) or 0) for name in names)
            return learning * _passes(given) + _epochs_for_cost(given["settings"].get("for_cost"))
        case "audit":
            return None if given["explain"] or set(given["measures"]) - {"accuracy"} else 0.0
    return 0.0


def _epochs_for_cost(options: Mapping[str, Any] | None) -> float:
    """Passes of a choice of layers, whose last one is finetuned twice, at most; each looks at its images once."""
    if options is None:
        return 0.0
    adapt, measurements = (float(_setting(linearize.ForCost, options, name)) for name in ("adapt", "measurements"))
    return adapt * (measurements + 1) * _DISTILLING


def _setting(call: Any, settings: Mapping[str, Any], name: str) -> Any:
    return settings.get(name, inspect.signature(call).parameters[name].default)


def _speed(
    cell: Cell, root: str | None, jobs: int, device: str | None, speeds: dict[str, tuple[float, int]]
) -> tuple[float, int]:
    """Images a second of training steps of a cell's model, in its precision, and how many training images there are."""
    base = cell if cell.kind == "train" else cell.ancestors()[0]
    data, model = base.arguments["data"], base.arguments["model"]
    own, inherited = (each.arguments["settings"].get("precision") for each in (cell, base))
    precision = own or inherited or default_precision()
    key = json.dumps([data, model, precision], sort_keys=True)
    if key not in speeds:
        _, parts = DataSpec(data["name"], root, data["options"], base.arguments["seed"]).load()
        part = parts["train"]
        _, channels, height, width = part.images.shape
        name = str(base.about.get("own_model") or model["name"])
        network = ModelSpec(name, part.num_classes, channels, (height, width), model["options"]).build()
        size = min(int((DEFAULTS | base.arguments["settings"])["batch_size"]), len(part))
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // jobs))
        try:
            seconds = _seconds_of_a_step(network, part.normalized(slice(size)), precision, resolve_device(device))
        finally:
            torch.set_num_threads(threads)
        speeds[key] = size / seconds, len(part)
    return speeds[key]


def _seconds_of_a_step(network: nn.Module, images: Tensor, precision: Precision | None, where: torch.device) -> float:
    """The least of a few training steps, after one that is not counted."""
    network.to(where)
    arithmetic = choose(precision, network, images, where)
    arithmetic.place(network, where)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
    labels = torch.zeros(len(images), dtype=torch.long, device=where)
    images = arithmetic.order(images.to(where))
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        optimizer.zero_grad()
        with arithmetic.autocast(where):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        times.append(time.perf_counter() - begun)
    return min(times[1:])
