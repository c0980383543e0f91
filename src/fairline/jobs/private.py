"""The jobs of ``fairline private``: run, estimate, fixed-point and export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fairline import data as registry
from fairline._io import write_json, write_table
from fairline.data import GroupedData
from fairline.errors import FairlineError
from fairline.jobs._checkpoints import Checkpoint, export_graphs, find_networks, identities
from fairline.jobs._common import data_of, require_split
from fairline.private.cost import estimate
from fairline.private.fixed_point import IN_THE_CLEAR, agreement, check_request
from fairline.private.graph import PlainGraph
from fairline.private.onnx_graph import require_onnx, write_onnx
from fairline.private.plan import graph_digest
from fairline.private.replacement import replacement
from fairline.private.serve import Preprocessing
from fairline.private.spu import Measured, check_options, measure, require_spu
from fairline.private.wire import Network
from fairline.private.wire import network as find_network
from fairline.runs import DataSpec, Run
from fairline.training import ProgressCallback, named_stage

__all__ = ["estimate_networks", "export_network", "find_networks", "fixed_point_job", "private_job"]


def private_job(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    protocols: Sequence[str] = ("cheetah",),
    images: int = 1,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 3,
    network: str = "loopback",
    ring_bits: int = 64,
    fraction_bits: int = 18,
    split: str = "test",
    timeout: float = 120,
    root: str | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Run:
    """Run every network between two processes into ``out``; an interrupted measurement resumes at the next call.

    Args:
        sources: Run folders, or folders of single networks.
        out: The run folder: ``private.parquet`` (see :data:`fairline.private.spu.COLUMNS`, with the predictions beside
            it), ``operators.parquet`` and ``calls.parquet``.
        protocols: ``"cheetah"``, ``"semi2k"`` or both.
        images: How many, at random from the split.
        batch_sizes: Images in a call.
        repeats: Timed calls of each batch, all networks' in random order.
        network: Emulated between the processes.
        ring_bits: Of the ring: 64 or 128.
        fraction_bits: Of the fixed-point form.
        split: Part that the images come from.
        timeout: Seconds without a word between the parties after which the run fails.
        root: Where the data are now, if they have moved.
        seed: Of the images and of the order of the calls.
        progress: Told of every call.

    Returns:
        The run.

    Raises:
        FairlineError: The input is wrong, SPU is missing, or a party failed.
    """
    require_spu()
    require_split(split)
    found, parent = find_networks(sources)
    wire = find_network(network)
    options: dict[str, Any] = {"protocols": list(protocols), "batch_sizes": list(batch_sizes), "repeats": repeats}
    options |= {"ring_bits": ring_bits, "fraction_bits": fraction_bits}
    _check_run(options, images)
    config = _run_config(found, parent, wire) | options | {"images": images, "split": split, "seed": seed}
    with Run.write(out, "private-run", config, torch.device("cpu")) as run:
        if not run.finished:
            chosen = _some_images(data_of(parent, root).load()[1][split], images, seed)
            graphs = export_graphs(found, progress)
            options |= {"seed": seed, "network": wire, "timeout": timeout, "progress": progress}
            measured = measure(graphs, chosen, **options, checkpoint=run.checkpoint / "calls.json")
            _write_measurement(run, measured, found, graphs, wire)
    return run


def _check_run(options: Mapping[str, Any], images: int) -> None:
    check_options(**options)
    if images < 1:
        raise FairlineError("A private inference needs one image at least.")


def _run_config(found: Sequence[Checkpoint], parent: Run, wire: Network) -> dict[str, Any]:
    return {
        "networks": identities(found),
        "data": parent.config["data"],
        "network": {"name": wire.name, "rtt": wire.rtt, "bandwidth": str(wire.bandwidth)},
    }


def _some_images(data: GroupedData, count: int, seed: int) -> Tensor:
    """Normalised images, (N, C, H, W), at random."""
    return data.normalized(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count])


def _write_measurement(
    run: Run, measured: Measured, found: Sequence[Checkpoint], graphs: Mapping[str, PlainGraph], wire: Network
) -> None:
    write_table(run.folder / "operators.parquet", measured.operators)
    write_table(run.folder / "calls.parquet", measured.calls)
    write_table(run.folder / "private.parquet", _with_predictions(measured.table, found, graphs, wire))


def _with_predictions(
    table: pd.DataFrame, found: Sequence[Checkpoint], graphs: Mapping[str, PlainGraph], wire: Network
) -> pd.DataFrame:
    by_name = {checkpoint.name: checkpoint for checkpoint in found}
    rows = []
    for row in table.to_dict("records"):
        name = str(row["network"])
        told = estimate(graphs[name], protocol=row["protocol"], network=wire, batch_size=row["batch_size"])
        rows.append(
            {
                **row,
                "predicted_bytes": told.bytes,
                "predicted_rounds": told.rounds,
                "predicted_seconds": told.seconds,
                "total_relus": by_name[name].info.total,
                "graph": graph_digest(graphs[name]),
                "wire": wire.name,
            }
        )
    return pd.DataFrame(rows)


def estimate_networks(
    sources: Sequence[str | Path],
    protocols: Sequence[str] = ("cheetah",),
    networks: Sequence[str] = ("lan",),
    batch_size: int = 1,
    progress: ProgressCallback | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predict what every network costs.

    Args:
        sources: Run folders, or folders of single networks.
        protocols: Keys of ``fairline.private.PROTOCOL_COSTS``.
        networks: Between the parties.
        batch_size: Images in a call.
        progress: Told of every network.

    Returns:
        A row for each network, protocol and network between the parties, with ``Estimate.row()``, the bytes that are
        sent ahead of time, and what to replace first; and a row for each layer of each network on each protocol.

    Raises:
        FairlineError: The input is wrong.
    """
    found, _ = find_networks(sources)
    wires = [find_network(name) for name in networks]
    totals, layers = [], []
    compiled = {checkpoint.name: checkpoint.info.compiled for checkpoint in found}
    for name, graph in export_graphs(found, progress).items():
        for protocol in protocols:
            for wire in wires:
                told = estimate(graph, protocol=protocol, network=wire, batch_size=batch_size)
                about = {"network": name, "relus": told.relus, "protocol": protocol, "wire": wire.name}
                about |= {"compiled": compiled[name], "offline_bytes": told.offline_bytes}
                parts = {**told.row(), **replacement(graph, told)}
                totals.append({**about, **parts})
            layers.append(told.layers.assign(network=name, protocol=protocol))
    return pd.DataFrame(totals), pd.concat(layers, ignore_index=True)


def fixed_point_job(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    fraction_bits: Sequence[int] = (8, 12, 18),
    ring_bits: int = 64,
    protocol: str = IN_THE_CLEAR,
    samples: int | None = 200,
    batch_size: int = 50,
    split: str = "test",
    root: str | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Run:
    """Compare private with plain predictions by group, for every network, into ``out``: ``fixed_point.parquet``.

    What is known of a network at some bits is kept, so an interrupted job resumes there.

    Args:
        sources: Run folders, or folders of single networks.
        out: The run folder.
        fraction_bits: This and what follows: see :func:`fairline.private.agreement`.
        ring_bits: Of the ring.
        protocol: That does the arithmetic.
        samples: Images of each group.
        batch_size: Images in a call.
        split: Part that the images come from.
        root: Where the data are now, if they have moved.
        seed: Of the sample.
        progress: Told of every batch.

    Returns:
        The run.

    Raises:
        FairlineError: The input is wrong, or SPU is missing.
    """
    check_request(protocol, fraction_bits, ring_bits, samples, batch_size)
    require_split(split)
    found, parent = find_networks(sources)
    options: dict[str, Any] = {"ring_bits": ring_bits, "protocol": protocol, "samples": samples, "seed": seed}
    config = {"networks": identities(found), "data": parent.config["data"], "split": split}
    config |= {"fraction_bits": list(fraction_bits), **options}
    with Run.write(out, "fixed-point", config, torch.device("cpu")) as run:
        if not run.finished:
            data = data_of(parent, root).load()[1][split]
            options |= {"batch_size": batch_size}
            tables = [
                _agreements(checkpoint, data, fraction_bits, options, run.checkpoint / str(position), progress)
                for position, checkpoint in enumerate(found)
            ]
            write_table(run.folder / "fixed_point.parquet", pd.concat(tables, ignore_index=True))
    return run


def _agreements(
    checkpoint: Checkpoint,
    data: GroupedData,
    fraction_bits: Sequence[int],
    options: Mapping[str, Any],
    kept: Path,
    progress: ProgressCallback | None,
) -> pd.DataFrame:
    """What :func:`agreement` says of one network, a file for each number of bits in the folder ``kept``."""
    graph = None
    tables = []
    for bits in fraction_bits:
        file = kept / f"{bits}.parquet"
        if not file.exists():
            graph = graph or checkpoint.graph()
            told = named_stage(progress, f"{checkpoint.name}, {bits} bits")
            table = agreement(graph, data, fraction_bits=[bits], **options, progress=told)
            write_table(file, table.assign(network=checkpoint.name, relus=checkpoint.info.relus))
        tables.append(pd.read_parquet(file))
    return pd.concat(tables, ignore_index=True)


def export_network(checkpoint: Checkpoint, spec: DataSpec, out: str | Path, *, onnx: bool = False) -> PlainGraph:
    """Write a network for private inference.

    Args:
        checkpoint: The network.
        spec: Of the data that it was trained on.
        out: The folder; the head of :mod:`fairline.private.serve` says what is in it.
        onnx: Also write an ONNX file.

    Returns:
        The graph.

    Raises:
        FairlineError: The network cannot be exported, or the package onnx is missing.
    """
    if onnx:
        require_onnx()
    folder = Path(out)
    graph = checkpoint.graph()
    # The class names stand with the data alone.
    names = registry.load(spec.name, spec.root, **spec.options).class_names
    (folder / "public").mkdir(parents=True, exist_ok=True)
    preprocessing = Preprocessing(shape=graph.input_shape, mean=spec.mean, std=spec.std, class_names=names)
    write_json(folder / "public" / "images.json", preprocessing.model_dump())
    graph.save_public(folder / "public" / "graph.safetensors")
    graph.save_weights(folder / "weights.safetensors")
    if onnx:
        write_onnx(folder / "network.onnx", graph)
    return graph
