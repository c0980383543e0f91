"""The cost model of private inference against real two-party runs.

By default it measures networks that no constant was fitted on, and prints predicted beside measured bytes, rounds and
seconds; ``--out`` writes the table with its provenance. ``--calibrate`` measures one operation at a time, which is how
the constants in ``fairline/private/cost.py`` were found, and prints what a constant would be now.
``--validate-compiled`` measures networks as compilation leaves them: few units in levels, each level a matrix from all
that came before, behind convolutions or not. There, rounds are the one-way trips that a slow network adds.

    python benchmarks/private_cost.py [--repeats 3] [--out papers/results/private_cost]
        [--calibrate | --validate-compiled]

Bytes do not depend on how busy the machine is; seconds do.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from fairline._io import atomic_path, write_text
from fairline.masking import mask_relus, masked_relus, patches
from fairline.models import build
from fairline.private import Network, PlainGraph, estimate, measure, to_graph
from fairline.private.graph import Node
from fairline.runs import environment

SEED = 0


class PooledNet(nn.Module):
    """What the registry's networks have not: a strided stem, max pooling, grouped convolutions, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(2))
        self.left = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU())
        self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (B, 3, 32, 32)."""
        x = self.stem(x)
        return self.head(torch.cat([self.left(x), self.right(x)], 1))


def masked(model: nn.Module, share: float, surrogate: str = "identity") -> PlainGraph:
    """Keep a share of each layer's ReLUs at random, of the third layer's none."""
    example = torch.zeros(2, 3, 32, 32)
    result = mask_relus(model.eval(), example, surrogate)
    generator = torch.Generator().manual_seed(SEED)
    for place, layer in enumerate(masked_relus(result).values()):
        keep = 0.0 if place == 2 and share < 1 else share
        layer.set_mask(torch.rand(layer.kept.shape, generator=generator) < keep)
    return to_graph(result, example)


def validation_networks() -> dict[str, PlainGraph]:
    """Networks of several architectures, widths and masks; untrained, which costs the same."""
    torch.manual_seed(SEED)
    return {
        "cnn, 100 %": masked(build("cnn", 5, 3, 32, width=8), 1.0),
        "cnn, 10 %": masked(build("cnn", 5, 3, 32, width=8), 0.1),
        "cnn, 10 %, quadratics": masked(build("cnn", 5, 3, 32, width=8), 0.1, "quadratic"),
        "resnet18 width 4, 30 %": masked(build("resnet18", 5, 3, 32, width=4), 0.3),
        "resnet18 width 6 with stem ReLU, 5 %": masked(build("resnet18", 10, 3, 32, width=6, stem_relu=True), 0.05),
        "vgg19 width 4, 50 %": masked(build("vgg19", 5, 3, 32, width=4), 0.5),
        "wide_resnet22_8 width 2, 20 %": masked(build("wide_resnet22_8", 5, 3, 32, width=2), 0.2),
        "pooled net, 100 %": masked(PooledNet(), 1.0),
    }


def validate(repeats: int) -> pd.DataFrame:
    """Predicted beside measured, for batches of 1 and 4."""
    graphs = validation_networks()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
    rows = []
    for size in (1, 4):
        # A batch of four costs what it costs whichever network it is; three will do.
        chosen = graphs if size == 1 else {name: graph for name, graph in graphs.items() if name.startswith("cnn")}
        found = measure(chosen, images[:size], batch_sizes=[size], repeats=repeats, seed=SEED)
        for row in found.table.to_dict("records"):
            told = estimate(graphs[row["network"]], protocol=row["protocol"], batch_size=size, network="loopback")
            rows.append(
                {
                    "network": row["network"],
                    "protocol": row["protocol"],
                    "batch_size": size,
                    "relus": row["relus"],
                    "measured_bytes": row["bytes"],
                    "predicted_bytes": told.bytes,
                    "measured_rounds": row["rounds"],
                    "predicted_rounds": told.rounds,
                    "measured_seconds": row["seconds"],
                    "predicted_seconds": told.compute_seconds,
                    "max_abs_error": row["max_abs_error"],
                }
            )
    return pd.DataFrame(rows)


class Levels(nn.Module):
    """The dense form of a network with few kept ReLUs: each level is a matrix from the input and all earlier units.

    Args:
        inputs: Values of an image.
        kept: Units of each level.
        summed: One matrix from each earlier part instead of one from all of them.
    """

    def __init__(self, inputs: int, kept: list[int], *, summed: bool = False, classes: int = 5) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        parts = [inputs]
        for size in [*kept, classes]:
            sources = parts if summed else [sum(parts)]
            self.levels.append(nn.ModuleList([nn.Linear(source, size) for source in sources]))
            parts = [*parts, size]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images or features of any shape."""
        parts = [x.flatten(1)]
        *levels, last = self.levels
        for level in levels:
            parts.append(torch.relu(self._affine(level, parts)))
        return self._affine(last, parts)

    @staticmethod
    def _affine(level: nn.ModuleList, parts: list[Tensor]) -> Tensor:
        if len(level) == 1:
            return level[0](torch.cat(parts, 1) if len(parts) > 1 else parts[0])
        total = level[0](parts[0])
        for linear, part in zip(level[1:], parts[1:], strict=True):
            total = total + linear(part)
        return total


def levels(units: int, depth: int) -> list[int]:
    """So many units in levels that fall, as masks of trained networks do: most in the first ones."""
    shares = [0.75**place for place in range(depth)]
    sizes = [max(1, round(units * share / sum(shares))) for share in shares]
    # Rounding leaves some over or takes some too many.
    return [sizes[0] + units - sum(sizes), *sizes[1:]] if sizes else []


def prefixed(widths: list[int], share: float, units: int, depth: int) -> PlainGraph:
    """Convolutions that keep a share of their ReLUs, and a dense tail: where a planner may end the convolutions."""
    layers: list[nn.Module] = []
    channels, side = 3, 32
    for place, width in enumerate(widths):
        layers += [nn.Conv2d(channels, width, 3, stride=1 + (place > 0), padding=1), nn.ReLU()]
        channels, side = width, side if place == 0 else side // 2
    example = torch.zeros(2, 3, 32, 32)
    network = nn.Sequential(*layers, Levels(channels * side * side, levels(units, depth)))
    network = mask_relus(network.eval(), example)
    generator = torch.Generator().manual_seed(SEED)
    for layer in masked_relus(network).values():
        spatial = len(layer.kept.shape) > 1
        layer.set_mask(torch.rand(layer.kept.shape, generator=generator) < (share if spatial else 1.0))
    return to_graph(network, example)


def compiled_networks() -> dict[str, PlainGraph]:
    """Networks of the forms that compilation gives, with random weights; none was fitted on."""
    torch.manual_seed(SEED)
    example = torch.zeros(2, 3, 32, 32)

    def dense(units: int, depth: int, *, summed: bool = False) -> PlainGraph:
        return to_graph(Levels(3072, levels(units, depth), summed=summed).eval(), example)

    return {
        "40 units in 3 levels": dense(40, 3),
        "123 units in 11 levels": dense(123, 11),
        "123 units in 11 levels, matrices summed": dense(123, 11, summed=True),
        "300 units in 17 levels": dense(300, 17),
        "500 units in 5 levels": dense(500, 5),
        "1,000 units in 12 levels": dense(1000, 12),
        "1 convolution, 60 units in 4 levels": prefixed([8], 0.02, 60, 4),
        "3 convolutions, 100 units in 6 levels": prefixed([8, 16, 32], 0.05, 100, 6),
        "4 convolutions, no other units": prefixed([16, 16, 32, 32], 0.1, 0, 0),
    }


#: Between the parties when trips are counted: nothing but a delay.
DELAY = Network("delay", 0.03, float("inf"))


def validate_compiled(repeats: int) -> pd.DataFrame:
    """Predicted beside measured, for compiled networks and batches of 1 and 4; trips are what a delay adds to one."""
    graphs = compiled_networks()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
    batched = {name: graphs[name] for name in ("123 units in 11 levels", "300 units in 17 levels")}
    found = pd.concat(
        measure(chosen, images[:size], batch_sizes=[size], repeats=repeats, seed=SEED).table
        for size, chosen in ((1, graphs), (4, batched))
    )
    delayed = measure(graphs, images[:1], repeats=2, seed=SEED, network=DELAY).table
    slow = delayed.set_index(["network", "protocol", "batch_size"])["seconds_low"]
    rows = []
    for row in found.to_dict("records"):
        key = (row["network"], row["protocol"], row["batch_size"])
        graph = graphs[row["network"]]
        told = estimate(graph, protocol=row["protocol"], batch_size=row["batch_size"], network="loopback")
        rows.append(
            {
                **dict(zip(("network", "protocol", "batch_size"), key, strict=True)),
                "relus": row["relus"],
                "weights": sum(weight.numel() for weight in graph.weights.values()),
                "measured_bytes": row["bytes"],
                "predicted_bytes": told.bytes,
                "messages": row["rounds"],
                "measured_rounds": (slow.get(key, math.nan) - row["seconds_low"]) / (DELAY.rtt / 2),
                "predicted_rounds": told.rounds,
                "measured_seconds": row["seconds"],
                "predicted_seconds": told.compute_seconds,
                "max_abs_error": row["max_abs_error"],
            }
        )
    return pd.DataFrame(rows)


def one_operation(
    op: str, shape: tuple[int, ...], output: tuple[int, ...], weights: dict[str, tuple[int, ...]], **options
):
    """A graph of one operation, and a reshape that makes logits of its output."""
    size = 1
    for side in output:
        size *= side
    nodes = [
        Node(op, "op", "op", ("x",), output, tuple(weights), options.pop("mask", None), options),
        Node("reshape", "flat", "flat", ("op",), (size,)),
    ]
    graph = PlainGraph(shape, nodes, dict(weights), {}, {})
    generator = torch.Generator().manual_seed(SEED)
    graph.weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in weights.items()}
    return graph


def conv(channels: int, outputs: int, side: int, kernel: int = 3) -> PlainGraph:
    """A convolution that keeps its sides."""
    return one_operation(
        "conv2d",
        (channels, side, side),
        (outputs, side, side),
        {"weight": (outputs, channels, kernel, kernel), "bias": (outputs,)},
        stride=[1, 1],
        padding=[kernel // 2] * 2,
        dilation=[1, 1],
        groups=1,
    )


def vector(inputs: int, outputs: int) -> PlainGraph:
    """A vector times a matrix."""
    graph = one_operation("linear", (inputs,), (outputs,), {"w": (outputs, inputs), "b": (outputs,)})
    # Images have three axes.
    graph.input_shape = (inputs, 1, 1)
    graph.nodes.insert(0, Node("reshape", "in", "in", ("x",), (inputs,)))
    graph.nodes[1] = Node("linear", "op", "op", ("in",), (outputs,), ("w", "b"))
    return graph


def after_conv(graph: PlainGraph, first: PlainGraph) -> PlainGraph:
    """The operation behind a convolution: what it works on is then shared, not the image's owner's alone."""
    nodes = [Node("conv2d", "first", "first", ("x",), first.nodes[0].shape, ("first.weight", "first.bias"))]
    nodes[0] = Node(**{**vars(nodes[0]), "options": first.nodes[0].options})
    nodes += [
        Node(**{**vars(node), "inputs": tuple("first" if n == "x" else n for n in node.inputs)}) for node in graph.nodes
    ]
    weights = {f"first.{name}": value for name, value in first.weights.items()} | graph.weights
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return PlainGraph(first.input_shape, nodes, shapes, graph.masks, weights)


def calibration_graphs() -> dict[str, dict[str, PlainGraph]]:
    """Graphs of one operation; within a set all take images of one shape."""
    elementwise: dict[str, dict[str, PlainGraph]] = {}
    for side in (4, 32, 64):
        shape = (8, side, side)
        first = conv(3, 8, side, 1)
        quadratic = one_operation("quadratic", shape, shape, {"coefficients": (3, 8, 1, 1)}, mask="none")
        quadratic.masks["none"] = torch.zeros(shape, dtype=torch.bool)
        shared = one_operation("shared_relu", shape, shape, {}, mask="signs")
        shared.masks["signs"] = patches(shape, (2, 2)).long()
        operations = {
            "relu": one_operation("relu", shape, shape, {}),
            "scale": one_operation("scale", shape, shape, {}, factor=0.3),
            "affine": one_operation("affine", shape, shape, {"scale": (8, 1, 1), "shift": (8, 1, 1)}),
            "quadratic": quadratic,
            "relu, 2×2 patches": shared,
        }
        elementwise[f"elements {8 * side * side}"] = {BASELINE: first} | {
            name: after_conv(graph, first) for name, graph in operations.items()
        }
    products = {
        f"conv {channels} at {side}": {f"to {outputs}": conv(channels, outputs, side) for outputs in (4, 16, 64)}
        for channels, side in ((3, 32), (8, 32), (16, 16), (64, 8))
    }
    vectors = {
        f"vector of {inputs}": {f"to {outputs}": vector(inputs, outputs) for outputs in outputs_of}
        for inputs, outputs_of in ((64, (10, 300)), (256, (5, 100)), (3072, (3, 20, 100, 400)))
    }
    return {**elementwise, **products, **vectors}


#: The convolution that operations on single elements stand behind; theirs is the difference.
BASELINE = "conv alone"


def calibrate(repeats: int) -> pd.DataFrame:
    """Measured bytes, rounds and seconds of single operations, with what the model says."""
    rows = []
    for kind, graphs in calibration_graphs().items():
        shape = next(iter(graphs.values())).input_shape
        images = torch.randn(1, *shape, generator=torch.Generator().manual_seed(SEED))
        found = measure(graphs, images, repeats=repeats, seed=SEED).table
        for protocol, part in found.groupby("protocol", sort=False):
            costs = {}
            for row in part.to_dict("records"):
                told = estimate(graphs[row["network"]], protocol=protocol, network="loopback")
                # What opening the result takes is known exactly.
                opened = 8 * graphs[row["network"]].outputs + 42
                costs[row["network"]] = {
                    "measured_bytes": row["bytes"] - opened,
                    "predicted_bytes": told.bytes - opened,
                    "measured_rounds": row["rounds"] - 1,
                    "predicted_rounds": told.rounds - 1,
                    "measured_seconds": row["seconds"],
                    "predicted_seconds": told.compute_seconds,
                }
            base = costs.pop(BASELINE, {})
            for name, cost in costs.items():
                own = {key: value - base.get(key, 0.0) for key, value in cost.items()}
                elements = graphs[name].outputs
                rows.append(
                    {
                        "operation": f"{kind}: {name}",
                        "protocol": protocol,
                        **own,
                        "bytes_an_element": own["measured_bytes"] / elements,
                    }
                )
    return pd.DataFrame(rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--calibrate", action="store_true")
    kind.add_argument("--validate-compiled", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    name, option, run = "validation.csv", "", validate
    if arguments.calibrate:
        name, option, run = "calibration.csv", " --calibrate", calibrate
    elif arguments.validate_compiled:
        name, option, run = "compiled.csv", " --validate-compiled", validate_compiled
    table = run(arguments.repeats)
    for what in ("bytes", "rounds", "seconds"):
        table[f"{what}_ratio"] = table[f"predicted_{what}"] / table[f"measured_{what}"]
    for protocol, part in table.groupby("protocol", sort=False):
        print(f"{protocol}: predicted / measured")
        for row in part.to_dict("records"):
            label = row.get("network") or row["operation"]
            batch = f", batch of {row['batch_size']}" if "batch_size" in row else ""
            print(
                f"  {label + batch:<52} bytes {row['bytes_ratio']:.3f}  rounds {row['rounds_ratio']:.2f}  "
                f"seconds {row['seconds_ratio']:.2f}  ({row['measured_bytes'] / 1e6:.2f} MB, "
                f"{row['measured_rounds']:.0f} rounds, {row['measured_seconds']:.2f} s)"
            )
        errors = (part["bytes_ratio"] - 1).abs()
        print(f"  largest error in bytes: {errors.max():.1%}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with atomic_path(arguments.out / name) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
        provenance = {
            **environment(torch.device("cpu")),
            "command": f"python benchmarks/private_cost.py{option}",
            "seed": SEED,
            "scale": "untrained networks of reduced width; both parties on two cores of one machine",
            "repeats": arguments.repeats,
            "written": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        file = arguments.out / "provenance.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        write_text(file, json.dumps({**kept, name: provenance}, indent=2) + "\n")


if __name__ == "__main__":
    # The parties are processes of their own and import this file's modules anew.
    main()
