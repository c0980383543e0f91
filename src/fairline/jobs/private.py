"""The jobs of ``fairline private`` and ``fairline frontier``, from run folder to run folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairline import data as registry
from fairline._io import write_json, write_table
from fairline.errors import FairlineError
from fairline.jobs._common import data_of, require_split
from fairline.private.cost import estimate, require_cost_model
from fairline.private.export import to_graph
from fairline.private.fixed_point import IN_THE_CLEAR, agreement, check_request
from fairline.private.frontier import frontier
from fairline.private.graph import PlainGraph
from fairline.private.onnx_graph import write_onnx
from fairline.private.plan import graph_digest
from fairline.private.serve import Preprocessing
from fairline.private.spu import check_options, measure, require_spu
from fairline.private.wire import NETWORKS, Network
from fairline.private.wire import network as find_network
from fairline.runs import DataSpec, NetworkInfo, Run, digest, load_info, load_network
from fairline.training import Progress, ProgressCallback, named_stage

logger = logging.getLogger(__name__)

#: Commands whose runs hold networks.
WITH_NETWORKS = ("train", "linearize", "finetune", "last-layer")


@dataclass(frozen=True)
class Checkpoint:
    """A network on disk.

    Attributes:
        name: ``"students/budget-500"``, as audits name it.
        folder: Of its files.
        info: What stands beside its weights.
    """

    name: str
    folder: Path
    info: NetworkInfo

    def graph(self) -> PlainGraph:
        """Its plain graph, with weights."""
        return to_graph(load_network(self.folder)[0], self.info.model.example())

    @property
    def digest(self) -> str:
        """Of its weights and masks."""
        return digest(sorted(self.folder.glob("*.safetensors")))


def find_networks(sources: Sequence[str | Path]) -> tuple[list[Checkpoint], Run]:
    """The networks of run folders, or of folders of single networks, and the run of the first.

    Raises:
        FairlineError: A folder is neither, or a network is named twice.
    """
    if not sources:
        raise FairlineError("No network was given.")
    found: list[Checkpoint] = []
    runs: list[Run] = []
    for source in map(Path, sources):
        single = (source / "network.json").exists()
        run = Run.read(source.absolute().parent.parent if single else source, *WITH_NETWORKS)
        runs.append(run)
        folders = {source.absolute().name: source} if single else run.networks()
        for name, folder in folders.items():
            full = "base" if run.command == "train" else f"{run.folder.absolute().name}/{name}"
            if full not in {checkpoint.name for checkpoint in found}:
                found.append(Checkpoint(full, folder, load_info(folder)))
            elif folder.resolve() not in {checkpoint.folder.resolve() for checkpoint in found}:
                raise FairlineError(f"{source} and another source both hold a network '{full}'.")
    shapes = {(c.info.model.in_channels, c.info.model.image_size) for c in found}
    if len(shapes) > 1:
        raise FairlineError("The networks take images of different shapes; measure them apart.")
    return found, runs[0]


def _graphs(found: Sequence[Checkpoint], progress: ProgressCallback | None) -> dict[str, PlainGraph]:
    graphs = {}
    for position, checkpoint in enumerate(found, start=1):
        graphs[checkpoint.name] = checkpoint.graph()
        if progress is not None:
            progress(Progress("exporting", position, len(found), checkpoint.name))
    return graphs


def _identity(found: Sequence[Checkpoint]) -> list[dict[str, str]]:
    return [{"name": c.name, "folder": str(c.folder.resolve()), "digest": c.digest} for c in found]


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
    check_options(
        protocols=protocols,
        batch_sizes=batch_sizes,
        repeats=repeats,
        ring_bits=ring_bits,
        fraction_bits=fraction_bits,
    )
    if images < 1:
        raise FairlineError("A private inference needs one image at least.")
    config = {
        "networks": _identity(found),
        "data": parent.config["data"],
        "protocols": list(protocols),
        "images": images,
        "batch_sizes": list(batch_sizes),
        "repeats": repeats,
        "network": {"name": wire.name, "rtt": wire.rtt, "bandwidth": str(wire.bandwidth)},
        "ring_bits": ring_bits,
        "fraction_bits": fraction_bits,
        "split": split,
        "seed": seed,
    }
    with Run.write(out, "private-run", config, torch.device("cpu")) as run:
        if not run.finished:
            data = data_of(parent, root).load()[1][split]
            index = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:images]
            chosen = data.normalized(index)
            graphs = _graphs(found, progress)
            measured = measure(
                graphs,
                chosen,
                protocols=protocols,
                batch_sizes=batch_sizes,
                repeats=repeats,
                ring_bits=ring_bits,
                fraction_bits=fraction_bits,
                seed=seed,
                network=wire,
                timeout=timeout,
                checkpoint=run.checkpoint / "calls.json",
                progress=progress,
            )
            write_table(run.folder / "operators.parquet", measured.operators)
            write_table(run.folder / "calls.parquet", measured.calls)
            write_table(run.folder / "private.parquet", _with_predictions(measured.table, found, graphs, wire))
    return run


def _with_predictions(
    table: pd.DataFrame, found: Sequence[Checkpoint], graphs: dict[str, PlainGraph], wire: Network
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
        A row for each network, protocol and network between the parties; and a row for each layer of each network on
        each protocol.

    Raises:
        FairlineError: The input is wrong.
    """
    found, _ = find_networks(sources)
    wires = [find_network(name) for name in networks]
    totals, layers = [], []
    for name, graph in _graphs(found, progress).items():
        for protocol in protocols:
            for wire in wires:
                told = estimate(graph, protocol=protocol, network=wire, batch_size=batch_size)
                totals.append(
                    {
                        "network": name,
                        "relus": told.relus,
                        "protocol": protocol,
                        "wire": wire.name,
                        "bytes": told.bytes,
                        "relu_bytes": told.relu_bytes,
                        "linear_bytes": told.linear_bytes,
                        "offline_bytes": told.offline_bytes,
                        "rounds": told.rounds,
                        "compute_seconds": told.compute_seconds,
                        "seconds": told.seconds,
                    }
                )
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

    See :func:`fairline.private.agreement`. What is known of a network at some bits is kept, so an interrupted job
    resumes there.
    """
    check_request(protocol, fraction_bits, ring_bits, samples, batch_size)
    require_split(split)
    found, parent = find_networks(sources)
    config = {
        "networks": _identity(found),
        "data": parent.config["data"],
        "fraction_bits": list(fraction_bits),
        "ring_bits": ring_bits,
        "protocol": protocol,
        "samples": samples,
        "split": split,
        "seed": seed,
    }
    with Run.write(out, "fixed-point", config, torch.device("cpu")) as run:
        if not run.finished:
            data = data_of(parent, root).load()[1][split]
            tables = []
            for position, checkpoint in enumerate(found):
                graph = None
                for bits in fraction_bits:
                    kept = run.checkpoint / f"{position}-{bits}.parquet"
                    if not kept.exists():
                        graph = graph or checkpoint.graph()
                        table = agreement(
                            graph,
                            data,
                            fraction_bits=[bits],
                            ring_bits=ring_bits,
                            protocol=protocol,
                            samples=samples,
                            batch_size=batch_size,
                            seed=seed,
                            progress=named_stage(progress, f"{checkpoint.name}, {bits} bits"),
                        )
                        write_table(kept, table.assign(network=checkpoint.name, relus=checkpoint.info.relus))
                    tables.append(pd.read_parquet(kept))
            write_table(run.folder / "fixed_point.parquet", pd.concat(tables, ignore_index=True))
    return run


def frontier_job(
    audit: str | Path,
    out: str | Path,
    *,
    measured: Sequence[str | Path] = (),
    fixed_point: str | Path | None = None,
    protocols: Sequence[str] = ("cheetah",),
    network: str = "lan",
    progress: ProgressCallback | None = None,
) -> Run:
    """Put the accuracies of an audit beside what its networks cost, into ``out``: ``frontier.parquet``.

    Args:
        audit: Folder of an audit run.
        out: The run folder.
        measured: Folders of ``private run`` runs; a network whose architecture and masks none of them has has its
            cost predicted.
        fixed_point: Folder of a ``private fixed-point`` run, shown beside.
        protocols: Keys of ``fairline.private.PROTOCOL_COSTS``.
        network: Between the parties. Measured on loopback, seconds are what was measured plus what this network adds.
        progress: Told of every network.

    Returns:
        The run.

    Raises:
        FairlineError: The input is wrong, or a network of the audit has changed since.
    """
    source = Run.read(audit, "audit")
    wire = find_network(network)
    for protocol in protocols:
        require_cost_model(protocol)
    privates = [Run.read(folder, "private-run") for folder in measured]
    bits = None if fixed_point is None else Run.read(fixed_point, "fixed-point")
    found, _ = find_networks([source.config["parent"]["folder"], *(s["folder"] for s in source.config["sources"])])
    config = {
        "audit": {"folder": str(source.folder.resolve()), "digest": digest([source.folder / "audit.parquet"])},
        "measured": [
            {"folder": str(run.folder.resolve()), "digest": digest([run.folder / "private.parquet"])}
            for run in privates
        ],
        **({"fixed_point": str(bits.folder.resolve())} if bits is not None else {}),
        "data": source.config["data"],
        "networks": _identity(found),
        "protocols": list(protocols),
        "network": wire.name,
        "lineage": source.config["lineage"],
    }
    with Run.write(out, "frontier", config, torch.device("cpu")) as run:
        if not run.finished:
            known = _measurements(privates, wire)
            rows = []
            for position, checkpoint in enumerate(found, start=1):
                graph = checkpoint.graph()
                name = graph_digest(graph)
                for protocol in protocols:
                    told = estimate(graph, protocol=protocol, network=wire)
                    cost: dict[str, Any] = {
                        "bytes": told.bytes + told.offline_bytes,
                        "rounds": told.rounds,
                        "seconds": told.seconds,
                        "source": "predicted",
                    }
                    found_cost = known.get((name, protocol))
                    if found_cost is not None:
                        cost = {**found_cost, "source": "measured"}
                        if cost.pop("wire") != wire.name:
                            # Not the messages that were counted: some need not wait for others.
                            cost["seconds"] += wire.seconds(cost["bytes"], told.rounds)
                    info = checkpoint.info
                    rows.append(
                        {
                            "model": checkpoint.name,
                            "protocol": protocol,
                            "wire": wire.name,
                            "relus": info.relus,
                            "total_relus": info.total,
                            **cost,
                        }
                    )
                if progress is not None:
                    progress(Progress("costs", position, len(found), checkpoint.name))
            if bits is not None:
                write_table(run.folder / "fixed_point.parquet", pd.read_parquet(bits.folder / "fixed_point.parquet"))
            scores = pd.read_parquet(source.folder / "audit.parquet")
            scores = scores[scores["measure"].isin(["accuracy", "relative_drop"])]
            write_table(run.folder / "accuracy.parquet", scores)
            write_table(run.folder / "counts.parquet", pd.read_parquet(source.folder / "counts.parquet"))
            write_table(run.folder / "frontier.parquet", frontier(scores, pd.DataFrame(rows)))
    return run


def _measurements(runs: Sequence[Run], wire: Network) -> dict[tuple[str, str], dict[str, Any]]:
    """Costs of one image measured on this network or on loopback, by digest of the public graph and protocol.

    Weights change no cost.
    """
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        table = pd.read_parquet(run.folder / "private.parquet")
        for row in table[table["batch_size"] == 1].to_dict("records"):
            key = row["graph"], row["protocol"]
            # What was measured over this network is worth more than what must be reckoned.
            if row["wire"] == wire.name or (row["wire"] == NETWORKS["loopback"].name and key not in known):
                known[key] = {name: row[name] for name in ("bytes", "rounds", "seconds", "wire")}
    return known


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
        FairlineError: The network cannot be exported.
    """
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
