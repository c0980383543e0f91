"""What the networks of an audit are predicted to cost: no engine is needed, and one export an architecture."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fairline._io import load_tensors
from fairline.compiler.mask_cost import with_kept
from fairline.errors import FairlineError
from fairline.masking import masked_relus
from fairline.masking.files import SIGNS
from fairline.private.basis import PREDICTED
from fairline.private.cost import COSTS, PARTS, estimate
from fairline.private.export import to_graph
from fairline.private.graph import PlainGraph
from fairline.private.replacement import replacement
from fairline.private.wire import NETWORKS, Network
from fairline.runs import NetworkInfo, load_info, load_network

logger = logging.getLogger(__name__)

#: What an audit's networks are priced on: those that are calibrated on the engine that runs them.
PROTOCOLS = ("cheetah", "semi2k")
WIRES = (NETWORKS["lan"], NETWORKS["wan"])

#: Of a table of costs; see :func:`priced`.
COLUMNS = (
    *("model", "protocol", "network", "relus", "total_relus", "compiled", *COSTS),
    *(f"{cost}_{part}" for cost in COSTS for part in PARTS),
    *("replace", "replace_in", *(f"replaced_{cost}" for cost in COSTS), "basis"),
)


def priced(graph: PlainGraph, protocol: str, wire: Network) -> dict[str, Any]:
    """What one image costs, and its parts.

    Returns:
        ``Estimate.row()`` and what :func:`~fairline.private.replacement.replacement` says.
    """
    told = estimate(graph, protocol=protocol, network=wire)
    return {**told.row(), **replacement(graph, told)}


def predicted_costs(networks: Mapping[str, Path]) -> pd.DataFrame:
    """Predict what one image costs, on each of :data:`PROTOCOLS` over each of :data:`WIRES`.

    An architecture is exported once: masks change the counts of its ReLUs alone.

    Args:
        networks: Their folders, by name.

    Returns:
        A row for each network, protocol and network between the parties, with :data:`COLUMNS`. A network that cannot
        be exported has none, and the log says why.
    """
    rows = []
    for name, (info, graph) in _graphs(networks).items():
        about = {"relus": info.relus, "total_relus": info.total, "compiled": info.compiled}
        for protocol in PROTOCOLS:
            for wire in WIRES:
                where = {"model": name, "protocol": protocol, "network": wire.name}
                rows.append({**where, **about, **priced(graph, protocol, wire), "basis": PREDICTED})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _graphs(networks: Mapping[str, Path]) -> dict[str, tuple[NetworkInfo, PlainGraph]]:
    """Public graphs of the networks that have one, in their order."""
    alike: dict[str, dict[str, NetworkInfo]] = {}
    for name, folder in networks.items():
        info = load_info(folder)
        # What is compiled or shares signs has a graph of its own; all others of an architecture have one.
        own = info.compiled or _shares_signs(folder)
        shared = [asdict(info.model), info.surrogate, name if own else ""]
        alike.setdefault(json.dumps(shared, sort_keys=True, default=str), {})[name] = info
    found: dict[str, tuple[NetworkInfo, PlainGraph]] = {}
    for infos in alike.values():
        try:
            graphs = _graphs_alike({name: networks[name] for name in infos})
        except FairlineError as error:
            logger.warning("No costs are predicted of %s, which cannot be exported: %s", ", ".join(infos), error)
            continue
        found |= {name: (info, graphs[name]) for name, info in infos.items()}
    return {name: found[name] for name in networks if name in found}


def _graphs_alike(folders: Mapping[str, Path]) -> dict[str, PlainGraph]:
    """Public graphs of networks that differ in weights and masks alone."""
    first = next((each for each in folders.values() if (each / "masks.safetensors").exists()), None)
    if first is None or _shares_signs(first):
        # The base network, one that is compiled and says its graph itself, or one that shares signs.
        return {name: _exported(folder) for name, folder in folders.items()}
    model, info = load_network(first)
    sizes = {}
    for name, layer in masked_relus(model).items():
        units = sizes[name] = layer.kept.numel()
        # Neither whole nor empty, where it can be, so that the graph has the node of each.
        layer.set_mask(torch.arange(units).view(layer.shape) >= min(1, units - 1))
    graph = to_graph(model, info.model.example()).public()
    return {name: with_kept(graph, _kept(folder) or sizes) for name, folder in folders.items()}


def _exported(folder: Path) -> PlainGraph:
    if load_info(folder).compiled:
        return PlainGraph.load_public(folder / "graph.safetensors")
    model, info = load_network(folder)
    return to_graph(model, info.model.example()).public()


def _shares_signs(folder: Path) -> bool:
    """Whether units of a network share signs."""
    file = folder / "masks.safetensors"
    return file.exists() and any(name.endswith(SIGNS) for name in load_tensors(file)[0])


def _kept(folder: Path) -> dict[str, int]:
    """ReLUs that each layer of a network keeps; none where it has no masks."""
    file = folder / "masks.safetensors"
    return {name: int(mask.sum()) for name, mask in load_tensors(file)[0].items()} if file.exists() else {}
