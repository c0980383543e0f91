"""What a run computes in: settled once, kept in its folder, and the same for what is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairline._io import alone, json_digest, read_json, write_json
from fairline.data.grouped import GroupedData
from fairline.precision import Arithmetic, Precision, default_precision, processor
from fairline.ranks import here
from fairline.runs import Run
from fairline.training import TRIAL_IMAGES, choose

#: In a run folder: the arithmetic, and the processor that it was chosen for.
FILE = "precision.json"


def settle(
    run: Run,
    precision: Precision | None,
    network: nn.Module,
    data: GroupedData,
    device: torch.device,
    agreed: Path | None = None,
) -> Arithmetic:
    """The arithmetic of a run.

    What its folder says already; else, unless one is asked for, what the run that it is built on took on such a
    processor. ``"auto"``, the default of a run built on none, takes that only where a trial chose it, else what other
    runs of the same network agreed on. Else what :func:`fairline.training.choose` finds.

    Args:
        run: Being written.
        precision: What was asked for; None goes on as what it is built on, else as FAIRLINE_PRECISION says.
        network: That is trained.
        data: Training part.
        device: Of the training.
        agreed: A file that runs of several seeds share.

    Returns:
        The arithmetic, kept in the run's folder.
    """
    # Of several processes one decides: it depends on files and on measured times.
    return here().first(lambda: _settled(run, precision, network, data, device, agreed))


def _settled(
    run: Run,
    precision: Precision | None,
    network: nn.Module,
    data: GroupedData,
    device: torch.device,
    agreed: Path | None,
) -> Arithmetic:
    """:func:`settle`, in one process."""
    machine = processor(device)
    before = run.lineage()[:-1] if precision in (None, "auto") else []
    for each in (run, *reversed(before)):
        kept = _kept(each.folder / FILE)
        # A default is no answer to "auto", which asks for a trial.
        tried = precision != "auto" or (kept is not None and kept["ratio"] is not None)
        if kept is not None and (each is run or (tried and kept["processor"] == machine)):
            return _keep(run, kept)
    precision = precision or default_precision()
    if precision != "auto" or agreed is None:
        return _keep(run, _found(precision, network, data, device))
    name = f"{machine}, {json_digest(run.base().config['model'])}"
    # Who comes second finds what the first one found.
    with alone(agreed.with_name(f".{agreed.name}.lock")):
        choices = read_json(agreed) if agreed.exists() else {}
        if name not in choices:
            write_json(agreed, {**choices, name: _found(precision, network, data, device)})
            choices = read_json(agreed)
    return _keep(run, choices[name])


def _found(precision: Precision | None, network: nn.Module, data: GroupedData, device: torch.device) -> dict[str, Any]:
    arithmetic = choose(precision, network, data.normalized(slice(TRIAL_IMAGES)), device)
    return {**arithmetic.to_dict(), "processor": processor(device)}


def _kept(file: Path) -> dict[str, Any] | None:
    return dict(read_json(file)) if file.exists() else None


def _keep(run: Run, choice: dict[str, Any]) -> Arithmetic:
    if _kept(run.folder / FILE) is None:
        write_json(run.folder / FILE, choice)
    if choice["bf16"]:
        run.note_device("bf16")
    return Arithmetic(**{key: value for key, value in choice.items() if key != "processor"})
