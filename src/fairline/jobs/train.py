"""The job of ``fairline train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairline import models
from fairline._io import resolve_device
from fairline.data.grouped import GroupedData
from fairline.errors import FairlineError
from fairline.jobs._common import do_once
from fairline.jobs._image_size import settle_image_size
from fairline.jobs._precision import settle
from fairline.jobs.first_look import first_look, write_first_look
from fairline.masking import copy_model, mask_relus, masked_relus
from fairline.masking.published import take_over_published
from fairline.precision import Precision
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
    precision: Precision | None = None,
    agreed: Path | None = None,
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
        precision: What to compute in; see :func:`fairline.training.choose`.
        agreed: A file through which runs of several seeds take the same arithmetic.
        progress: Called after every batch.
        settings: Of the training.

    Returns:
        The finished run.

    Raises:
        FairlineError: The input is wrong; the sentence says where.
    """
    where = resolve_device(device)
    spec, parts = settle_image_size(data, model, model_options, weights).load()
    model_spec = _model_for(parts["train"], model, model_options)
    network = _started(model_spec, weights, seed)
    trains = settings.get("epochs") != 0
    if weights is None and not trains:
        raise FairlineError("A network that is not trained (epochs 0) needs weights.")
    info = _described(network, model_spec, seed)
    config = {"data": asdict(spec), "model": model_spec.to_json(), "settings": settings, "seed": seed}
    config |= _asked(precision, weights)

    def work(run: Run) -> None:
        rows: list[dict[str, float]] = []
        if trains:
            own: dict[str, Any] = {"checkpoint": run.checkpoint / "train.safetensors", "progress": progress, **settings}
            own["precision"] = settle(run, precision, network, parts["train"], where, agreed)
            rows = train(network, parts["train"], parts["val"], seed=seed, device=where, **own)
        run.write_metrics(rows)
        save_network(run.network_folder("base"), network, info)
        if not trains:
            write_first_look(run.folder, first_look(network, parts, where))

    return do_once(out, "train", config, where, work)


def _asked(precision: Precision | None, weights: str | Path | None) -> dict[str, Any]:
    """What a run's config says only where it was asked for."""
    config: dict[str, Any] = {} if precision is None else {"precision": precision}
    if weights is not None:
        config["weights"] = {"file": str(Path(weights).resolve()), "digest": digest([Path(weights)])}
    return config


def _model_for(data: GroupedData, model: str, options: Mapping[str, Any] | None) -> ModelSpec:
    """The architecture for images and classes of these data."""
    _, channels, height, width = data.images.shape
    return ModelSpec(model, data.num_classes, channels, (height, width), dict(options or {}), models.files(model))


def _started(spec: ModelSpec, weights: str | Path | None, seed: int) -> nn.Module:
    """The network before training: at random, or with given weights, and with masks where it comes with such."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = spec.build()
    if weights is not None:
        load_weights(network, Path(weights))
    if take_over_published(copy_model(network), spec.example()):
        return mask_relus(network, spec.example())
    return network


def _described(network: nn.Module, spec: ModelSpec, seed: int) -> NetworkInfo:
    """What stands beside the base network."""
    relus = count_relus(network, spec)
    total = sum(layer.kept.numel() for layer in masked_relus(network).values()) or relus
    return NetworkInfo(spec, "base", relus, total, relus, seed=seed)
