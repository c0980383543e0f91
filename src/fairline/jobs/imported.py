"""The job of ``fairline import``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus, relu_count
from fairline.runs import NetworkInfo, Run, digest, load_network, save_network
from fairline.weights import import_masks, load_weights


def import_job(
    source: str | Path, out: str | Path, *, weights: str | Path | None = None, masks: str | Path | None = None
) -> Run:
    """Take over a network that was linearized elsewhere, beside its base network, as a linearize run in ``out``.

    Args:
        source: Folder of the base network's train run; the network has its architecture.
        out: The run folder.
        weights: File of its weights, and of its masks if it holds any; see :func:`fairline.load_weights`. The base
            network's by default.
        masks: File of its masks; see :func:`fairline.import_masks`.

    Returns:
        The run.

    Raises:
        FairlineError: A file is wrong, or none holds masks that cut a ReLU.
    """
    parent = Run.read(source, "train")
    network, info = load_network(parent.networks()["base"])
    student = mask_relus(network, info.model.example())
    if weights is not None:
        load_weights(student, weights)
    if masks is not None:
        import_masks(student, masks)
    kept = relu_count(student)
    if kept == info.relus:
        given = " and ".join(str(file) for file in (weights, masks) if file is not None) or "Nothing that was given"
        raise FairlineError(f"{given} cuts no ReLU: name a file of masks, or of weights with masks beside them.")
    files = {key: file for key, file in (("weights", weights), ("masks", masks)) if file is not None}
    config: dict[str, Any] = {
        "parent": parent.parent_entry(),
        "data": parent.config["data"],
        "method": "imported",
        **{key: {"file": str(Path(file).resolve()), "digest": digest([Path(file)])} for key, file in files.items()},
    }
    with Run.write(out, "linearize", config, torch.device("cpu")) as run:
        if not run.finished:
            total = sum(layer.kept.numel() for layer in masked_relus(student).values())
            described = NetworkInfo(info.model, "linearized", kept, total, kept, "imported")
            save_network(run.network_folder(f"budget-{kept}"), student, described)
            run.write_metrics([])
    return run
