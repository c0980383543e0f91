"""The job of ``fairline train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fairline._io import resolve_device
from fairline.errors import FairlineError
from fairline.runs import (
    DataSpec,
    ModelSpec,
    NetworkInfo,
    Run,
    count_relus,
    digest,
    load_weights,
    save_network,
)
from fairline.training import ProgressCallback, train


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
        weights: A safetensors file to start from; with ``epochs=0`` they are taken as they are.
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
    model_spec = ModelSpec(model, parts["train"].num_classes, channels, (height, width), dict(model_options or {}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = model_spec.build()
    if weights is not None:
        load_weights(network, Path(weights))
    elif settings.get("epochs") == 0:
        raise FairlineError("A network that is not trained (epochs 0) needs weights.")
    total = count_relus(network, model_spec)
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
                NetworkInfo(model_spec, "base", total, total, total, seed=seed),
            )
    return run
