"""``fl.compile``: a network with r ReLUs as an equal one that costs what r ReLUs cost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from fairline._io import make_folder, read_json, write_json
from fairline.compiler import planner
from fairline.compiler.planner import MAX_WEIGHTS, LeftOut, Measure, Terms
from fairline.compiler.regions import Regions
from fairline.errors import FairlineError
from fairline.private.export import to_graph
from fairline.private.graph import PlainGraph
from fairline.private.network import GraphNetwork
from fairline.private.plan import graph_digest
from fairline.private.wire import Network
from fairline.private.wire import network as find_network
from fairline.training.progress import ProgressCallback

#: Largest relative error, in float64, of a compiled network's logits.
TOLERANCE = 1e-9

_FORMAT = "fairline compiled network 1"


class CompiledNetwork(GraphNetwork):
    """A network equal to another one, made to be cheap under cryptography; see :func:`compile`.

    Args:
        graph: With weights, whose kind of number the parameters have.
        plan: What became of which part of the original.
        terms: What it was compiled for, as plain values.
        source: Digest of the original network.
        left_out: What would be cheaper and was too large, a sentence each.

    Attributes:
        plan: A row a block: ``form`` (``"as it stands"`` or ``"dense"``), ``first`` and ``last`` layer, ``levels`` of
            nonlinear units, ``relus``, ``weights``, ``bytes``, ``offline_bytes``, ``rounds``, ``seconds``, and the last
            six of the original, ``relus_before`` and so on.
        terms: ``protocol``, ``network``, ``batch_size``, ``minimise``, ``max_weights``.
        left_out: Sentences.
    """

    def __init__(
        self,
        graph: PlainGraph,
        plan: pd.DataFrame,
        terms: dict[str, object],
        source: str,
        left_out: Sequence[str] = (),
    ) -> None:
        super().__init__(graph)
        self.plan, self.terms, self.source, self.left_out = plan, terms, source, tuple(left_out)

    def save(self, folder: str | Path) -> None:
        """Write it to a folder: ``graph.safetensors`` is public, ``weights.safetensors`` is not."""
        folder = make_folder(folder)
        graph = self.graph(dtype=next(self.parameters()).dtype)
        graph.save_public(folder / "graph.safetensors")
        graph.save_weights(folder / "weights.safetensors")
        described = {
            "format": _FORMAT,
            "digest": digest(graph),
            "source": self.source,
            "terms": self.terms,
            "left_out": list(self.left_out),
            "plan": self.plan.to_dict("records"),
        }
        write_json(folder / "compiled.json", described)

    @classmethod
    def load(cls, folder: str | Path, original: PlainGraph | None = None) -> CompiledNetwork:
        """Read what :meth:`save` wrote.

        Args:
            folder: Where it lies.
            original: The graph of the network that it must have been compiled from.

        Returns:
            The network.

        Raises:
            FairlineError: A file is missing or broken, belongs to another compiled network, or this is one of another
                original.
        """
        folder = Path(folder)
        described = read_json(folder / "compiled.json")
        if not isinstance(described, dict) or described.get("format") != _FORMAT:
            raise FairlineError(f"{folder / 'compiled.json'} does not describe a compiled network.")
        if original is not None and digest(original) != described["source"]:
            raise FairlineError(f"{folder} holds a network that was compiled from another one, or from other weights.")
        graph = PlainGraph.load_public(folder / "graph.safetensors")
        graph.load_weights(folder / "weights.safetensors", dtype=None)
        if digest(graph) != described["digest"]:
            raise FairlineError(f"The files in {folder} do not belong together.")
        plan = pd.DataFrame(described["plan"])
        return cls(graph, plan, described["terms"], described["source"], described["left_out"])


def digest(graph: PlainGraph) -> str:
    """Digest of a graph and its weights."""
    found = hashlib.blake2b(graph_digest(graph).encode(), digest_size=16)
    for name in graph.shapes:
        found.update(graph.weights[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def compile(
    student: nn.Module | PlainGraph,
    example: Tensor | None = None,
    *,
    protocol: str = "cheetah",
    network: str | Network = "lan",
    batch_size: int = 1,
    minimise: Measure = "seconds",
    max_weights: int = MAX_WEIGHTS,
    progress: ProgressCallback | None = None,
) -> CompiledNetwork:
    """Turn a linearized network into an equal one that is as cheap under cryptography as a planner can make it.

    Between two kept ReLUs everything is one affine map. Where that is cheaper, it becomes one matrix from the values
    that are known to exactly those that are needed next; nothing is approximated. Which parts do, the cost model says.

    Args:
        student: A network with masks, or a plain graph with weights. Not changed.
        example: An input (B, C, H, W); not needed for a plain graph.
        protocol: Of the private inference: ``"cheetah"``, ``"semi2k"``, ``"delphi"`` or ``"cryptflow2"``.
        network: Between the parties: ``"lan"``, ``"wan"``, ``"MBITS:MS"``, or a :class:`~fairline.private.Network`.
        batch_size: Images in a call.
        minimise: ``"seconds"``, ``"bytes"`` (ahead of time included) or ``"rounds"``. By this measure the result is
            never predicted to be dearer than the student.
        max_weights: Numbers that all weights may be, or as many as the student has, if that is more. What would be
            cheaper and is too large stays as it stands, and ``left_out`` says so.
        progress: Told how far the plan and the matrices are.

    Returns:
        The network, its weights of the student's kind of number. ``to_graph`` gives its graph.

    Raises:
        FairlineError: There is no such protocol, network or measure, the student cannot be exported, or the result does
            not compute what the student computes.

    >>> from fairline.models import build
    >>> from fairline.linearize import Random
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator ...>
    >>> student = build("cnn", num_classes=3, image_size=8, width=4)
    >>> compiled = compile(student.eval(), torch.zeros(1, 3, 8, 8), minimise="rounds")
    >>> compiled(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 3])
    """
    terms = Terms(protocol, find_network(network), batch_size, minimise, max_weights)
    terms.check()
    graph, dtype = _graph_of(student, example)
    regions = Regions(graph)
    planned = planner.plan(regions, terms, progress)
    built = regions.build(planned.plan, progress)
    _verify(graph, built)
    built.weights = {name: value.to(dtype) for name, value in built.weights.items()}
    described = {**asdict(terms), "network": asdict(terms.network)}
    table = planner.table(regions, planned.plan, terms)
    return CompiledNetwork(built, table, described, digest(graph), [str(each) for each in planned.left_out])


def _graph_of(student: nn.Module | PlainGraph, example: Tensor | None) -> tuple[PlainGraph, torch.dtype]:
    """The graph, and the kind of number of its weights."""
    values = student.weights.values() if isinstance(student, PlainGraph) else student.parameters()
    dtype = torch.float64 if torch.float64 in {value.dtype for value in values} else torch.float32
    if isinstance(student, PlainGraph):
        if set(student.weights) != set(student.shapes):
            raise FairlineError("Compiling needs a plain graph with its weights, not the public half alone.")
        return student, dtype
    if example is None:
        raise FairlineError("Compiling a module needs an example input, (B, C, H, W).")
    return to_graph(student, example, dtype), dtype


def _verify(graph: PlainGraph, built: PlainGraph) -> None:
    """Compare both on random images in float64.

    Raises:
        FairlineError: They differ.
    """
    images = torch.randn(4, *graph.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected, found = graph(images), built(images)
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
    if not error <= TOLERANCE:
        raise FairlineError(
            f"The compiled network computes something else: logits differ by {error:.1e} of the largest."
        )


__all__ = ["CompiledNetwork", "LeftOut", "compile", "digest"]
