"""What compiling a linearized network saves: ratios of compiled over not.

ResNet-18 on 3×32×32 images with random masks: predicted seconds, bytes and rounds of a private inference,
multiply-adds, size of the file, and milliseconds of one image in PyTorch and onnxruntime on one thread; with --spu also
measured seconds, bytes and messages between two processes. Aim: below 1 everywhere at 0.1 % of the ReLUs.

    python benchmarks/compile.py [--width 16] [--shares 0.001,0.02] [--protocols cheetah,semi2k] [--rounds 15] [--spu]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _ratio import interleaved, timed
from torch import nn

import fairline as fl
from fairline.compiler import CompiledNetwork, file_bytes, multiply_adds
from fairline.masking import mask_relus, masked_relus
from fairline.models import build
from fairline.private import PlainGraph, estimate, measure, to_graph, write_onnx

EXAMPLE = torch.zeros(1, 3, 32, 32)


def student(width: int, share: float) -> nn.Module:
    """An untrained network that keeps a share of its ReLUs at random."""
    torch.manual_seed(0)
    model = mask_relus(build("resnet18", 5, width=width).eval(), EXAMPLE)
    for layer in masked_relus(model).values():
        layer.set_mask(torch.rand(layer.shape) < share)
    return model


def in_onnxruntime(graph: PlainGraph, folder: Path, name: str) -> Callable[[], object]:
    """A call of onnxruntime with one image."""
    import onnxruntime

    write_onnx(folder / name, graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
    image = EXAMPLE.numpy()
    return lambda: session.run(None, {"images": image})


def milliseconds(model: nn.Module, compiled: CompiledNetwork, graphs: dict[str, PlainGraph], rounds: int) -> None:
    """Print the ratios of what one image takes in the clear."""

    def forward(network: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return [network(EXAMPLE) for _ in range(10)]

        return run

    with tempfile.TemporaryDirectory() as folder:
        runtimes = {name: in_onnxruntime(graph, Path(folder), f"{name}.onnx") for name, graph in graphs.items()}
        for engine, calls in (
            ("PyTorch", {"plain": forward(model), "compiled": forward(compiled)}),
            ("onnxruntime", runtimes),
        ):
            times = interleaved({name: lambda call=call: timed(call) for name, call in calls.items()}, rounds)
            print(f"  {engine} milliseconds, compiled / not: {times['compiled'] / times['plain']:.3f}")


def between_parties(graphs: dict[str, PlainGraph], protocol: str) -> None:
    """Print the ratios of what one image takes between two processes."""
    table = measure(graphs, torch.randn(1, 3, 32, 32), protocols=[protocol], batch_sizes=[1]).table
    rows = {row["network"]: row for row in table.to_dict("records")}
    for key in ("seconds", "bytes", "rounds"):
        print(f"  {protocol} measured {key}, compiled / not: {rows['compiled'][key] / rows['plain'][key]:.3f}")


def main() -> None:
    """Print one ratio a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--shares", default="0.001,0.02")
    parser.add_argument("--protocols", default="cheetah,semi2k")
    parser.add_argument("--minimise", default="seconds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--spu", action="store_true", help="measure between two processes, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for share in map(float, arguments.shares.split(",")):
        model = student(arguments.width, share)
        plain = to_graph(model, EXAMPLE)
        for protocol in arguments.protocols.split(","):
            compiled = fl.compile(model, EXAMPLE, protocol=protocol, minimise=arguments.minimise)
            graphs = {"plain": plain, "compiled": to_graph(compiled, EXAMPLE)}
            forms = ", ".join(compiled.plan["form"])
            print(f"{fl.relu_count(model):,} ReLUs, for {protocol} ({forms}):")
            told = {name: estimate(graph, protocol=protocol) for name, graph in graphs.items()}
            for key in ("seconds", "bytes", "rounds"):
                ratio = getattr(told["compiled"], key) / getattr(told["plain"], key)
                print(f"  {protocol} predicted {key}, compiled / not: {ratio:.3f}")
            for name, size in (("multiply-adds", multiply_adds), ("bytes of the file", file_bytes)):
                print(f"  {name}, compiled / not: {size(graphs['compiled']) / size(plain):.3f}")
            milliseconds(model, compiled, graphs, arguments.rounds)
            if arguments.spu:
                between_parties(graphs, protocol)


if __name__ == "__main__":
    main()
