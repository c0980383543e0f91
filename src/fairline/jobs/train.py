"""The job of ``fairline train``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fairline._io import resolve_device
from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus
from fairline.masking.published import take_over_published
from fairline.runs import (
    DataSpec,
    ModelSpec,
    NetworkInfo,
    Run,
    count_relus,
    digest,
    save_network,
)
from fairline.training import ProgressCallback, train
from fairline.weights import load_weights


def train_job(
    out: str | Path,
    data: DataSpec,
    model: str,
    model_options: Mapping[str, Any] | None = None,
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Run:
    """Train a base network into ``out``; ``settings`` go to :func:`fairline.train`.

    Args:
        out: Run folder.
        data: What to train on.
        model: Architecture; see :func:`fairline.models.build`.
        model_options: Its options.
        weights: A file to start from, as for :func:`fairline.load_weights`; with ``epochs=0`` they are taken as they
            are.
        seed: Of initialisation and training.
        device: The accelerator if there is one, by default.
        progress: Called after every batch.
        settings: Of the training.

    Returns:
        The finished run.

    Raises:
        FairlineError: The input is wrong; the sentence says where.
    """
    where = resolve_device(device)
    spec, parts = data.load()
    _, channels, height, width = parts["train"].images.shape
    if height != width:
        raise FairlineError(f"{spec.name}: images are {height}×{width}; square ones are needed.")
    model_spec = ModelSpec(model, parts["train"].num_classes, channels, height, dict(model_options or {}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = model_spec.build()
    if weights is not None:
        load_weights(network, Path(weights))
    elif settings.get("epochs") == 0:
        raise FairlineError("A network that is not trained (epochs 0) needs weights.")
    if take_over_published(copy.deepcopy(network), model_spec.example()):
        network = mask_relus(network, model_spec.example())
    relus = count_relus(network, model_spec)
    total = sum(layer.kept.numel() for layer in masked_relus(network).values()) or relus
    config: dict[str, Any] = {"data": asdict(spec), "model": asdict(model_spec), "settings": settings, "seed": seed}
    if weights is not None:
        config["weights"] = {"file": str(Path(weights).resolve()), "digest": digest([Path(weights)])}
    with Run.write(out, "train", config, where) as run:
        if not run.finished:
            rows: list[dict[str, float]] = []
            if settings.get("epochs") != 0:
                rows = train(
                    network,
                    parts["train"],
                    parts["val"],
                    seed=seed,
                    device=where,
                    progress=progress,
                    checkpoint=run.checkpoint / "train.safetensors",
                    **settings,
                )
            run.write_metrics(rows)
            save_network(
                run.network_folder("base"),
                network,
                NetworkInfo(model_spec, "base", relus, total, relus, seed=seed),
            )
    return run
