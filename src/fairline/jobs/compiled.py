"""The job of ``fairline compile``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch

from fairline._io import read_json, write_table
from fairline.compiler import CompiledNetwork, Terms, compile, file_bytes, multiply_adds
from fairline.compiler.planner import MAX_WEIGHTS, Measure
from fairline.compiler.regions import weights_of
from fairline.data import GroupedData
from fairline.errors import FairlineError
from fairline.inference import predict
from fairline.jobs._common import STUDENTS, built_on, do_once, load_parts, require_split
from fairline.private.export import to_graph
from fairline.private.graph import PlainGraph
from fairline.private.wire import network as find_network
from fairline.runs import NetworkInfo, Run, load_info, load_network, save_compiled
from fairline.training import ProgressCallback, named_stage

logger = logging.getLogger(__name__)

#: Largest error of a logit in float32, as a part of the largest logit, that is taken for rounding.
ROUNDING = 1e-3
#: Share of the images on which rounding may turn a shared sign, so that their logits differ by more.
TURNED = 0.1


def compile_job(
    source: str | Path,
    out: str | Path,
    *,
    networks: Sequence[str] = (),
    protocol: str = "cheetah",
    network: str = "lan",
    batch_size: int = 1,
    minimise: str = "seconds",
    max_weights: int = MAX_WEIGHTS,
    split: str = "test",
    root: str | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    """Compile networks of a run into ``out``, under their names, and compare each with its original on every image.

    The run holds ``compiled.parquet``, a row a network: what it costs and what the original does, and how far the
    predictions agree; and ``plan.parquet``, a row a block, the plan of :class:`~fairline.compiler.CompiledNetwork`. A
    network that is done is kept, so an interrupted job resumes at the next.

    Args:
        source: A linearize, finetune, last-layer, adjust or choose run.
        out: The run folder.
        networks: Names of those to compile; all by default.
        protocol: This and what follows: see :func:`fairline.compiler.compile`.
        network: Between the parties.
        batch_size: Images in a call.
        minimise: ``"seconds"``, ``"bytes"`` or ``"rounds"``.
        max_weights: Numbers that all weights may be.
        split: Part whose images both networks are compared on, in float32.
        root: Where the data are now, if they have moved.
        progress: Told how far it is.

    Returns:
        The run.

    Raises:
        FairlineError: The input is wrong, or a compiled network does not compute what its original does.
    """
    require_split(split)
    terms = Terms(protocol, find_network(network), batch_size, cast(Measure, minimise), max_weights)
    terms.check()
    parent = Run.read(source, *STUDENTS)
    found = _chosen(parent, networks)
    config = {
        **built_on(parent),
        **({"networks": list(networks)} if networks else {}),
        **_described(terms),
        "split": split,
    }

    def work(run: Run) -> None:
        _compile_each(run, found, terms, load_parts(parent, root)[split], progress)

    return do_once(out, "compile", config, torch.device("cpu"), work)


def _described(terms: Terms) -> dict[str, Any]:
    """Their part of the run's config."""
    # JSON has no infinity.
    network = {**asdict(terms.network), "bandwidth": str(terms.network.bandwidth)}
    return {**asdict(terms), "network": network}


def _compile_each(
    run: Run, found: Mapping[str, Path], terms: Terms, data: GroupedData, progress: ProgressCallback | None
) -> None:
    """Compile networks, each at most once, and write what was found."""
    rows, plans = [], []
    for position, (name, folder) in enumerate(found.items(), start=1):
        kept = run.checkpoint / f"{name}.parquet"
        if not kept.exists():
            told = named_stage(progress, f"compiling {position}/{len(found)} ({name})")
            row = _compile(folder, run.network_folder(name), terms, data, told)
            write_table(kept, pd.DataFrame([{"network": name, **row}]))
        rows.append(pd.read_parquet(kept))
        plan = read_json(run.network_folder(name) / "compiled.json")["plan"]
        plans.append(pd.DataFrame(plan).assign(network=name))
    write_table(run.folder / "plan.parquet", pd.concat(plans, ignore_index=True))
    write_table(run.folder / "compiled.parquet", pd.concat(rows, ignore_index=True))


def _chosen(parent: Run, names: Sequence[str]) -> dict[str, Path]:
    """Folders of the networks that were asked for."""
    found = parent.networks()
    for name in names:
        if name not in found:
            raise FairlineError(f"{parent.folder} holds no network '{name}'; it holds {', '.join(found)}.")
    chosen = {name: found[name] for name in names or found}
    for name, folder in chosen.items():
        if load_info(folder).compiled:
            raise FairlineError(f"{name} of {parent.folder} is compiled already; compile what it was made of.")
    return chosen


def _compile(
    source: Path, target: Path, terms: Terms, data: GroupedData, progress: ProgressCallback | None
) -> dict[str, Any]:
    """Compile one network, compare it, save it; returns its row of ``compiled.parquet``."""
    student, info = load_network(source)
    graph = to_graph(student, info.model.example())
    compiled = compile(
        graph,
        protocol=terms.protocol,
        network=terms.network,
        batch_size=terms.batch_size,
        minimise=terms.minimise,
        max_weights=terms.max_weights,
        progress=progress,
    )
    turned = TURNED if any(node.op == "shared_relu" for node in graph.nodes) else 0.0
    agreement = _agreement(student, compiled, data, turned)
    after = replace(info, relus=int(compiled.plan["relus"].sum()), compiled=True)
    save_compiled(target, compiled, after)
    return {**agreement, **_sizes(graph, compiled, info), "left_out": " ".join(compiled.left_out)}


def _agreement(
    student: torch.nn.Module, compiled: CompiledNetwork, data: GroupedData, turned: float = 0.0
) -> dict[str, Any]:
    """How far both say the same of every image, in float32.

    Args:
        student: The original.
        compiled: What became of it; equal to it in float64.
        data: The images.
        turned: Share of them on which a sum of votes may be so near zero that rounding turns the sign.

    Returns:
        ``images``; ``same``, those that get the same class; ``difference``, the largest of a logit; ``largest_logit``.

    Raises:
        FairlineError: A logit differs by more than rounding can explain.
    """
    expected, found = (predict(each, data) for each in (student, compiled))
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    others = int((~((found - expected).abs().amax(1) <= ROUNDING * largest)).sum())
    if 0 < others <= turned * len(data):
        logger.warning("%d of %d images get other logits: rounding turns a sign that units share", others, len(data))
    elif others:
        raise FairlineError(
            f"The compiled network computes something else on {data.name}: a logit differs by {difference:.1e}, the "
            f"largest is {largest:.1e}."
        )
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    if same < len(data):
        logger.warning(
            "%d of %d images get another class: two logits tie but for rounding", len(data) - same, len(data)
        )
    return {"images": len(data), "same": same, "difference": difference, "largest_logit": largest}


def _sizes(before: PlainGraph, compiled: CompiledNetwork, info: NetworkInfo) -> dict[str, Any]:
    """What both cost: in the clear exactly, private as predicted."""
    after, plan = compiled.graph(), compiled.plan
    totals: Mapping[str, float] = plan[[f"{key}{end}" for key in PRICES for end in ("", "_before")]].sum().to_dict()
    return {
        "relus": int(plan["relus"].sum()),
        "relus_before": info.relus,
        "levels": int(plan["levels"].sum()),
        "weights": weights_of(after),
        "weights_before": weights_of(before),
        "multiply_adds": multiply_adds(after),
        "multiply_adds_before": multiply_adds(before),
        "file_bytes": file_bytes(after),
        "file_bytes_before": file_bytes(before),
        **totals,
    }


#: What a private inference is predicted to take; each has a twin, ``…_before``, of the original.
PRICES = ("bytes", "offline_bytes", "rounds", "seconds")
