"""The job of ``fairline frontier``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairline._io import write_table
from fairline.audit.cells import cells
from fairline.audit.control import beside, control_of
from fairline.audit.verdict import require_within
from fairline.jobs._checkpoints import Checkpoint, find_networks, identities
from fairline.jobs.costs import priced
from fairline.private.basis import PREDICTED, basis, same_wire
from fairline.private.cost import require_cost_model
from fairline.private.frontier import BASE, frontier, judge, verdicts
from fairline.private.plan import graph_digest
from fairline.private.wire import Network
from fairline.private.wire import network as find_network
from fairline.runs import Run, digest
from fairline.training import Progress, ProgressCallback


def frontier_job(
    audit: str | Path,
    out: str | Path,
    *,
    measured: Sequence[str | Path] = (),
    fixed_point: str | Path | None = None,
    protocols: Sequence[str] = ("cheetah",),
    network: str = "lan",
    within: float = 5.0,
    critical: Sequence[str] = (),
    progress: ProgressCallback | None = None,
) -> Run:
    """Put the accuracies of an audit beside what its networks cost, into ``out``: ``frontier.parquet``.

    Costs are reckoned once; asked anew with another tolerance, a finished run is only judged again.

    Args:
        audit: Folder of an audit run.
        out: The run folder.
        measured: Folders of ``private run`` runs; a network whose architecture and masks none of them has has its
            cost predicted.
        fixed_point: Folder of a ``private fixed-point`` run, shown beside.
        protocols: Keys of ``fairline.private.PROTOCOL_COSTS``.
        network: Between the parties. Measured on loopback, seconds are what was measured plus what this network adds.
        within: Loss of any group or class that is tolerated, in percentage points.
        critical: Classes whose recall may not fall.
        progress: Told of every network.

    Returns:
        The run; ``cells.parquet`` counts what each network and its control get right in each set of images.

    Raises:
        FairlineError: The input is wrong, or a network of the audit has changed since.
    """
    require_within(within)
    source = Run.read(audit, "audit")
    wire = find_network(network)
    for protocol in protocols:
        require_cost_model(protocol)
    privates = [Run.read(folder, "private-run") for folder in measured]
    bits = None if fixed_point is None else Run.read(fixed_point, "fixed-point")
    folders = [each["folder"] for each in source.config["sources"]]
    if source.config.get("with_base", True):
        folders.insert(0, source.config["parent"]["folder"])
    found, _ = find_networks(folders)
    config = {
        **_sources_config(source, privates, bits),
        "networks": identities(found),
        "protocols": list(protocols),
        "network": wire.name,
    }
    with Run.write(out, "frontier", config, torch.device("cpu")) as run:
        if not run.finished:
            costs = _costs(found, protocols, wire, _measurements(privates, wire), progress)
            _write_tables(run, source, bits, costs)
    # A finished run stays so, whatever is asked of it.
    _judge(run, source, within, critical)
    return run


def _sources_config(source: Run, privates: Sequence[Run], bits: Run | None) -> dict[str, Any]:
    """What a frontier was made of, for its config."""
    return {
        "audit": {"folder": str(source.folder.resolve()), "digest": digest([source.folder / "audit.parquet"])},
        "measured": [
            {"folder": str(run.folder.resolve()), "digest": digest([run.folder / "private.parquet"])}
            for run in privates
        ],
        **({"fixed_point": str(bits.folder.resolve())} if bits is not None else {}),
        "data": source.config["data"],
        "lineage": source.config["lineage"],
    }


def _costs(
    found: Sequence[Checkpoint],
    protocols: Sequence[str],
    wire: Network,
    known: Mapping[tuple[str, str], Mapping[str, Any]],
    progress: ProgressCallback | None,
) -> pd.DataFrame:
    """A row for each network and protocol: what one image costs, measured where that is known, else predicted."""
    rows = []
    for position, checkpoint in enumerate(found, start=1):
        graph = checkpoint.graph()
        name = graph_digest(graph)
        for protocol in protocols:
            rows.append(
                {
                    "model": checkpoint.name,
                    "protocol": protocol,
                    "wire": wire.name,
                    "relus": checkpoint.info.relus,
                    "total_relus": checkpoint.info.total,
                    "compiled": checkpoint.info.compiled,
                    **_cost(priced(graph, protocol, wire), wire, known.get((name, protocol))),
                }
            )
        if progress is not None:
            progress(Progress("costs", position, len(found), checkpoint.name))
    return pd.DataFrame(rows)


def _cost(told: dict[str, Any], wire: Network, measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """A prediction, in whose place a measurement stands where there is one; the parts are predicted in any case."""
    if measured is None:
        return {**told, "basis": PREDICTED}
    seconds, on = measured["seconds"], find_network(measured["wire"])
    if not same_wire(on, wire):
        # Not the messages that were counted: some need not wait for others.
        seconds += wire.seconds(measured["bytes"], told["rounds"])
    found = {"bytes": measured["bytes"], "rounds": measured["rounds"], "seconds": seconds}
    return {**told, **found, "basis": basis(wire, on)}


def _write_tables(run: Run, source: Run, bits: Run | None, costs: pd.DataFrame) -> None:
    if bits is not None:
        write_table(run.folder / "fixed_point.parquet", pd.read_parquet(bits.folder / "fixed_point.parquet"))
    counted = count_cells(source)
    write_table(run.folder / "cells.parquet", counted)
    scores = pd.read_parquet(source.folder / "audit.parquet")
    scores = scores[scores["measure"].isin(["accuracy", "relative_drop"])]
    write_table(run.folder / "accuracy.parquet", scores)
    write_table(run.folder / "counts.parquet", pd.read_parquet(source.folder / "counts.parquet"))
    write_table(run.folder / "frontier.parquet", frontier(scores, costs, counted))


def count_cells(source: Run) -> pd.DataFrame:
    """Count what each network of an audit and its control get right in each set of images.

    Args:
        source: The audit.

    Returns:
        Rows of :func:`fairline.audit.cells.cells` with the ``model`` and its ``control``, empty where there is none.
        The base network is counted against itself.
    """
    about = source.table("audit.parquet").drop_duplicates("model").set_index("model")
    about = about[about["stage"] != "base"]
    images = dict(list(source.table("predictions.parquet").groupby("model", sort=False)))
    tables = []
    for model, own in images.items():
        if model == BASE:
            own = own.assign(reference_correct=own["correct"])
        control = control_of(about.loc[model], about) if model in about.index else None
        counted = cells(own if control is None else beside(own, images[control]))
        tables.append(counted.assign(model=model, control=control or ""))
    return pd.concat(tables, ignore_index=True)


def _judge(run: Run, source: Run, within: float, critical: Sequence[str]) -> None:
    """Write verdicts into ``frontier.parquet``; a finished run of an earlier version is counted anew first."""
    file = run.folder / "cells.parquet"
    if not file.exists() or "control" not in run.table("cells.parquet"):
        write_table(file, count_cells(source))
    table = run.table("frontier.parquet")
    judged = judge(table, verdicts(run.table("cells.parquet"), within, critical))
    if not judged.equals(table):
        write_table(run.folder / "frontier.parquet", judged)


def _measurements(runs: Sequence[Run], wire: Network) -> dict[tuple[str, str], dict[str, Any]]:
    """Costs of one image measured on this network or on loopback, by digest of the public graph and protocol."""
    # Not by name: weights change no cost.
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        table = pd.read_parquet(run.folder / "private.parquet")
        for row in table[table["batch_size"] == 1].to_dict("records"):
            key = row["graph"], row["protocol"]
            on = find_network(row["wire"])
            # What was measured over this network is worth more than what must be reckoned.
            if same_wire(on, wire) or (basis(wire, on) is not None and key not in known):
                known[key] = {name: row[name] for name in ("bytes", "rounds", "seconds", "wire")}
    return known
